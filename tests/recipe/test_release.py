"""A released model answers in transformers as it does here, to its last token."""

import json

import pytest
import torch
import transformers

from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.hf.tokenizer import load_tokenizer, save_loaded
from huatuo_jax.recipe.export import Policy, export_policy
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests import hub_server as hubs
from tests.data.test_templates import LLAMA2_JINJA
from tests.tiny import write_rows

pytestmark = pytest.mark.usefixtures("on_one_device")
DIALOGUES = (
    ("咳嗽三天了怎么办？", "先多喝水，注意休息。", "还发烧呢？", "去呼吸内科。"),
    ("头痛应该看什么科？", "神经内科。", "谢谢。", "不客气。"),
)
LIMIT = 24
SAMPLING = SamplingConfig(max_new_tokens=LIMIT, temperature=0.6, top_p=0.9)
CHATML_MARKS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def qwen(folder, *, template=LLAMA2_JINJA):
    """A base model of Qwen's kind: its EOS is not the end of a turn."""
    hubs.save_qwen(folder, template=template)
    sizes = hubs.SIZES | {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=4)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def llama(folder):
    """A base model of LLaMA's kind, whose tokenizer has the marks of other templates."""
    hubs.save_llama(folder)
    config = transformers.LlamaConfig(**hubs.SIZES, num_key_value_heads=8)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHATML_MARKS, *LLAMA3_MARKS]})
    tokenizer.chat_template = hubs.QWEN_TEMPLATE
    save_loaded(tokenizer, folder)


def straddling(folder):
    """A base model whose tokens reach over the border of two turns, unless that is a border."""
    said = "".join(text for texts in DIALOGUES for text in texts)
    hubs.save_straddling_tokenizer(folder, template=hubs.QWEN_TEMPLATE, alphabet=said)
    config = transformers.LlamaConfig(**hubs.SIZES, num_key_value_heads=8)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def baichuan(folder):
    """A base model of Baichuan's kind: the tokens of its turns are no special ones."""
    hubs.save_baichuan(folder)
    hubs.rewrite_weights(folder, _quieten)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": hubs.QWEN_TEMPLATE}
    path.write_text(json.dumps(config), encoding="utf-8")


def _quieten(tensors):
    """Weights as before a training, from which a few steps learn two dialogues."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)


# Each template with a base that brings another one, but for the tokenizer's own.
BASES = {
    "huatuogpt": straddling,
    "chatml": qwen,
    "llama2": llama,
    "llama3": llama,
    "baichuan": baichuan,
    "tokenizer": lambda folder: qwen(folder, template=hubs.QWEN_TEMPLATE),
}


def messages_of(texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def trained(base, workdir, **data):
    """A model that knows its dialogues by heart."""
    rows = [{"messages": messages_of(one)} for one in DIALOGUES]
    source = SourceConfig(name="mine", paths=(write_rows(workdir / "mine.jsonl", 4 * rows),))
    config = SftConfig(
        model=ModelConfig(directory=str(base)),
        data=DataConfig(
            sources=(source,),
            row_length=192,
            held_out=HeldOutConfig(share=0.0),
            num_threads=0,
            **data,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_share=0.1, weight_decay=0.0),
        num_steps=60,
        batch_size=2,
        loop=LoopConfig(evaluate_every=60, checkpoint_every=60, log_every=60, tensorboard=False),
    )
    run_sft(config, workdir)
    return workdir / "sft" / "model"


def ours(model, workdir, **settings):
    """Greedy answers of the engine to each question of the dialogues, with all before it."""
    prompts = [
        {"id": answer, "messages": messages_of(texts[: 2 * turn + 1])}
        for texts in DIALOGUES
        for turn, answer in enumerate(texts[1::2])
    ]
    run_bulk(
        BulkConfig(
            model=str(model),
            prompts=write_rows(workdir / "prompts.jsonl", prompts),
            output=str(workdir / "answers.jsonl"),
            sampling=SamplingConfig(max_new_tokens=LIMIT, temperature=0.0),
            **settings,
        )
    )
    lines = (workdir / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_transformers_talks_as_the_run_does_and_stops_at_the_end_of_the_turn(tmp_path, name):
    base, export = tmp_path / "base", tmp_path / "export"
    base.mkdir()
    transformers.set_seed(0)
    BASES[name](base)
    assert load_tokenizer(base).chat_template  # That the trained one has to replace.
    model = trained(base, tmp_path, template=name)
    template = templates.by_name(name)
    export_policy(Policy("sft", str(model), {}, template, SAMPLING), export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    policy = transformers.AutoModelForCausalLM.from_pretrained(export)
    assert "Its tokens differ" not in tokenizer.chat_template
    stops = list(template.stop_token_ids(tokenizer))
    for file in ("config.json", "generation_config.json"):
        found = read(export, file)["eos_token_id"]
        assert (found if isinstance(found, list) else [found]) == stops
    for record in ours(model, tmp_path, template=name):
        (answer,) = record["answers"]
        prompt = tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, return_dict=False
        )
        assert prompt == record["prompt_token_ids"]
        generated = policy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LIMIT)
        assert generated[0, len(prompt) :].tolist() == answer["token_ids"]
        assert (answer["token_ids"][-1], answer["finish_reason"]) == (stops[0], "stop")
        assert answer["text"] == record["id"]
