"""The judge's client against a server that others wrote: `transformers serve` with a tiny model.

Needs the packages fastapi and uvicorn beside torch and transformers.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from transformers.utils.import_utils import is_serve_available

from huatuo_jax.judge.judgements import CRITERIA, read_judgements
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import SpendingFile
from huatuo_jax.preferences.label import LabelRun, run_labels, spending_path
from tests.judge.planted_answers import make_answers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="transformers serve needs fastapi and uvicorn"
    ),
]

# What the model says, one token each; the last comes before the end.
SCORES = dict(zip(CRITERIA, (4, 3, 2, 5, 1), strict=True))
PIECES = [f'"{name}": {{"reason": "因{name}", "score": {score}}}' for name, score in SCORES.items()]
PIECES = ["{" + PIECES[0], *(f", {piece}" for piece in PIECES[1:]), "}"]
WRONG_PIECES = ["这条", "回答", "不错"]


def make_model(folder, pieces):
    """A Llama that can only say these pieces in this order, whatever it is asked.

    Attention and MLP are zero; the embedding of a token is a unit vector of its own, which the head
    turns into the next token.
    """
    torch = pytest.importorskip("torch")
    import tokenizers
    import transformers

    names = ["<unk>", "<end>", "<say>", *pieces]
    model = tokenizers.models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.decoder = tokenizers.decoders.Fuse()
    raw.add_special_tokens(["<unk>", "<end>", "<say>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}<say>"
    )
    tokenizer.save_pretrained(folder)
    cfg = transformers.LlamaConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    assert len(names) <= cfg.hidden_size
    llama = transformers.LlamaForCausalLM(cfg)
    say = names.index("<say>")
    order = [say, *range(say + 1, len(names)), 1]
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for now, then in zip(order, order[1:], strict=False):
            llama.model.embed_tokens.weight[now, now] = 1.0
            llama.lm_head.weight[then, now] = 1.0
    llama.generation_config.do_sample = False
    llama.save_pretrained(folder)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Serving:
    """`transformers serve` while the context lasts."""

    def __init__(self, folder, log):
        self.port, self.folder, self.log = free_port(), folder, log

    def __enter__(self):
        arguments = ["serve", str(self.folder), "--device", "cpu", "--host", "127.0.0.1"]
        self.output = self.log.open("wb")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from transformers.cli.transformers import main; sys.exit(main())",
                *arguments,
                "--port",
                str(self.port),
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        deadline_s = time.monotonic() + 400
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline_s, self.log.read_text()
                time.sleep(0.2)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.output.close()


@pytest.mark.parametrize("pieces", [PIECES, WRONG_PIECES], ids=["scores", "prose"])
def test_a_server_that_others_wrote_is_driven_end_to_end(tmp_path, monkeypatch, pieces):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    folder, answers = tmp_path / "model", tmp_path / "answers.jsonl"
    make_model(folder, pieces)
    make_answers(answers, num_prompts=3, num_answers=2)
    output, told = tmp_path / "labels.jsonl", []
    with Serving(folder, tmp_path / "serve.log") as serving:
        server = ServerConfig(base_url=f"http://127.0.0.1:{serving.port}/v1", timeout_s=120.0)
        openai = OpenAIJudgeConfig(
            model=str(folder), server=server, structured="none", max_tokens=32
        )
        cfg = LabelRun(
            answers=str(answers),
            output=str(output),
            openai=openai,
            label=LabelConfig(concurrency=2),
        )
        labels = run_labels(cfg, told.append)
    assert labels.error is None and len(labels.judgements) == 6
    for judgement in read_judgements(output):
        assert judgement.raw == "".join(pieces)
        if pieces is PIECES:
            assert judgement.scores == SCORES and judgement.reason.startswith("informative: 因")
        else:
            assert judgement.failed and "not JSON" in judgement.error
    spending = SpendingFile(spending_path(output))
    totals = spending.totals()
    spending.close()
    assert (totals.requests, totals.unknown_requests) == (6, 0)
    # The server counts the pieces, and the end with them or not.
    assert 6 * len(pieces) <= totals.usage.output_tokens <= 6 * (len(pieces) + 1)
    assert totals.usage.input_tokens > 6 * 50
    assert json.loads((tmp_path / "labels.jsonl.report.json").read_text(encoding="utf-8"))
