"""A released model answers in transformers as it does here, to its last token."""

import json

import pytest
import torch
import transformers

from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.data.held_out import HeldOutConfig
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests import hub as hubs

pytestmark = pytest.mark.usefixtures("on_one_device")
QUESTIONS = {"咳嗽三天了怎么办？": "先多喝水，注意休息。", "头痛应该看什么科？": "神经内科。"}
LIMIT = 24


def write_lines(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def trained(base, workdir, **data):
    """A model that knows its two answers by heart."""
    rows = [{"question": one, "answer": other} for one, other in QUESTIONS.items()]
    source = SourceConfig(name="mine", paths=(write_lines(workdir / "mine.jsonl", 4 * rows),))
    config = SftConfig(
        model=ModelConfig(directory=str(base)),
        data=DataConfig(
            sources=(source,),
            row_length=128,
            held_out=HeldOutConfig(share=0.0),
            num_threads=0,
            **data,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_share=0.1, weight_decay=0.0),
        num_steps=40,
        batch_size=2,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=40, tensorboard=False),
    )
    run_sft(config, workdir)
    return workdir / "sft" / "model"


def ours(model, workdir, **settings):
    prompts = [{"id": one, "question": one} for one in QUESTIONS]
    run_bulk(
        BulkConfig(
            model=str(model),
            prompts=write_lines(workdir / "prompts.jsonl", prompts),
            output=str(workdir / "answers.jsonl"),
            sampling=SamplingConfig(max_new_tokens=LIMIT, temperature=0.0),
            **settings,
        )
    )
    lines = (workdir / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_transformers_stops_where_training_ended_the_turn(tmp_path, template):
    """A base model of Qwen's kind: its EOS is not the end of a turn."""
    base = tmp_path / "base"
    base.mkdir()
    hubs.save_qwen(base)
    transformers.set_seed(0)
    sizes = hubs.SIZES | {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=4)
    transformers.Qwen2ForCausalLM(config).save_pretrained(base)
    model = trained(base, tmp_path, template=template)
    export = tmp_path / "export"
    convert(str(model), export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    policy = transformers.AutoModelForCausalLM.from_pretrained(export)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((export / name).read_text(encoding="utf-8"))
        assert found["eos_token_id"] == [end, tokenizer.eos_token_id]
        assert (found["pad_token_id"], found["bos_token_id"]) == (tokenizer.pad_token_id, 0)
    for record in ours(model, tmp_path, template=template):
        (answer,) = record["answers"]
        messages = [{"role": "user", "content": record["id"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert prompt == record["prompt_token_ids"]
        generated = policy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LIMIT)
        assert generated[0, len(prompt) :].tolist() == answer["token_ids"]
        assert (answer["token_ids"][-1], answer["finish_reason"]) == (end, "stop")
        assert answer["text"] == QUESTIONS[record["id"]]
