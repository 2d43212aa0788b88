"""A byte-level tokenizer trained on invented text, and a tiny model directory with it."""

import json

import pytest

from huatuo_jax.checkpoint.models import save_orbax
from tests.generation import tiny
from tests.tiny import byte_level_tokenizer

LINES = [
    "膝盖上下楼梯时酸胀，应该挂什么科？",
    "先减少爬楼，热敷几天，若仍酸胀请到骨科就诊。",
    "晚上总是鼻塞，换个枕头有用吗？",
    "The swelling went down after two days of rest. 谢谢医生！",
]
VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer(
        LINES,
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    source = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(source)
    cfg = tiny.config(vocab_size=len(tokenizer))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_orbax(tiny.variables(cfg)["params"], cfg, folder, head="lm", source_folder=source)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """Seven prompts, one of several turns."""
    rows = [
        {"id": f"p{number}", "question": LINES[number % 3] * (1 + number % 3), "department": number}
        for number in range(6)
    ]
    turns = [("user", LINES[0]), ("assistant", LINES[1]), ("user", LINES[2])]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows.append({"id": "long", "messages": messages, "reference": LINES[1]})
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path
