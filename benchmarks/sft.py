"""Supervised fine-tuning beside its peers: trained tokens per second, memory, share of the peak.

Each contender trains the same model on the same dialogues with the same AdamW in one dtype, in a
process of its own, on the same cores: ours on packed rows; a tight PyTorch loop and TRL's
SFTTrainer, each padded and packed (see `sft_contenders.py`). A step's dialogues are those of one
packed batch of ours; TRL takes as many dialogues a step on average, or as many rows. They take
turns, and figures are medians over the turns. Their losses on the first batch have to agree. The
share of the peak counts what the model's mathematics asks for (`throughput.ModelFlops`): no
padding, and nothing twice for being recomputed.

Dialogues are real ones where the folder of real data is (beside the checkout, or where
HUATUO_SHARED_DATA says), else the project's own samples.

    python benchmarks/sft.py --sizes=10m,50m --steps=6 --rounds=3
"""

import dataclasses
import itertools
import json
import pathlib
import tempfile
from typing import Any

import contenders
import contest
import jax
import numpy as np
import real_data
import sft_contenders
from absl import app, flags

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import count_parameters, init_params
from huatuo_jax.data.batches import pack_row, plan_rows
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import permutation
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example, TemplateTokenizer, Tokens
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.training.metrics import ModelFlops

_SIZES = flags.DEFINE_list("sizes", ["10m", "50m"], "Models: 10m, 50m, 494m, tiny.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 1024, "Tokens of a row at most (TRL's default).")
_CONTENDERS = flags.DEFINE_list(
    "contenders", [*sft_contenders.CONTENDERS], "Who takes part; `ours` always does."
)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/sft_cpu.json", "Where to.")

OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.1, **contest.ADAMW}
SEED = 0

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """What is trained on: its name in the result, examples as tokens, their tokenizer."""

    name: str
    examples: list[Example]
    tokenizer: Any


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    contest.check_names(_SIZES.value, _CONTENDERS.value, sft_contenders.CONTENDERS)
    dialogues = read_all()
    contest.hold(
        _SIZES.value,
        pathlib.Path(_OUTPUT.value),
        dialogues.name,
        lambda size: measure(size, dialogues),
        print_table,
    )


def read_all() -> Dialogues:
    """The real dialogues with a tokenizer of 6,400 tokens, or the project's own with its own."""
    if (real_data.SHARED_DATA / "MANIFEST.json").is_file():
        name = "real dialogues: 1_sft_single_real and 2_sft_multi_real"
        adapters = {"toyhom_internal_medicine": "toyhom", "remedi_dev_human_annotation": "remedi"}
        folders = [
            real_data.SHARED_DATA / "1_sft_single_real",
            real_data.SHARED_DATA / "2_sft_multi_real",
        ]
        paths = [path for folder in folders for path in sorted(folder.iterdir())]
        tokenizer = load_tokenizer(real_data.SHARED_DATA / "tokenizers" / "minimind_6400")
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        template = templates.by_name("chatml")
    else:
        name, adapters = "the project's sample dialogues", {}
        sample = contest.ROOT / "huatuo_jax" / "data" / "sample"
        paths = sorted([*sample.glob("*_conversation.jsonl"), *sample.glob("*_instruction.jsonl")])
        tokenizer = load_tokenizer(sample / "tokenizer")
        template = templates.by_name("huatuogpt")
    tokenize = TemplateTokenizer(
        template=template, tokenizer=tokenizer, max_tokens=_ROW_LENGTH.value
    )
    readings = [read_dialogues(path, adapter=adapters.get(path.stem)) for path in paths]
    results = [tokenize(dialogue.messages) for dialogue in itertools.chain(*readings)]
    examples = [
        Example(one.token_ids, one.trained_mask, UNKNOWN_KIND, str(number))
        for number, one in enumerate(results)
        if isinstance(one, Tokens)
    ]
    return Dialogues(name, examples, tokenizer)


def packed_batches(dialogues: Dialogues, num_steps: int) -> Arrays:
    """The first batches of an epoch, as our pipeline packs it: `[steps, B, T]` each.

    Raises:
        ValueError: there are not enough dialogues.
    """
    lengths = [len(example.token_ids) for example in dialogues.examples]
    order = permutation(len(lengths), SEED, "order")
    plan = plan_rows(lengths, order, row_length=_ROW_LENGTH.value, key=(SEED, "rows"))
    num_rows = num_steps * contest.BATCH_SIZE.value
    if num_rows > len(plan):
        raise ValueError(
            f"{num_steps} steps of {contest.BATCH_SIZE.value} rows are more than the {len(plan)} "
            "rows there are; take fewer --steps"
        )
    rows = [
        pack_row(
            [dialogues.examples[index] for index in plan[row]],
            row_length=_ROW_LENGTH.value,
            pad_token_id=dialogues.tokenizer.pad_token_id,
        )
        for row in range(num_rows)
    ]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {
        name: array.reshape(num_steps, contest.BATCH_SIZE.value, *array.shape[1:])
        for name, array in stacked.items()
    }


def measure(size: str, dialogues: Dialogues) -> contest.Result:
    """All contenders on one model."""
    cfg = contenders.backbone(
        size, vocab_size=len(dialogues.tokenizer), max_positions=_ROW_LENGTH.value
    )
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig())
    num_steps = contest.WARMUP.value + contest.STEPS.value
    batches = packed_batches(dialogues, num_steps)
    per_step = batches["segment_ids"].max(axis=2).sum(axis=1)
    settings = contest.settings(
        OPTIMIZER,
        row_length=_ROW_LENGTH.value,
        dialogues_per_step=round(float(per_step.mean())),
    )
    names = dict.fromkeys(["ours", *_CONTENDERS.value])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export_model(params, cfg, folder / "model", head="lm")
        dialogues.tokenizer.save_pretrained(folder / "tokenizer")
        np.savez(folder / "batches.npz", **batches)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        turns = contest.take_turns(
            size, "sft_contenders.py", folder, names, others=sft_contenders.PEAKS
        )
    peaks = {one: max(turn["flops"] for turn in turns.pop(one)) for one in sft_contenders.PEAKS}
    timed = {name: array[contest.WARMUP.value :] for name, array in batches.items()}
    flops_per_token = step_flops(cfg, timed) / int(timed["trained_mask"].sum())
    return {
        "parameters": count_parameters(params),
        "backbone": cfg.to_dict(),
        "settings": settings,
        "packing_efficiency": float((timed["segment_ids"] > 0).mean()),
        "trained_tokens_per_step": float(timed["trained_mask"].sum() / contest.STEPS.value),
        "peak_flops": peaks,
        "model_flops_per_trained_token": flops_per_token,
        "contenders": {
            one: figures(turns[one], turns["ours"], flops_per_token, max(peaks.values()))
            for one in names
        },
    }


def step_flops(cfg: BackboneConfig, batches: Arrays) -> float:
    """What the model's mathematics asks for in all these batches, recomputation not counted."""
    inside = batches["segment_ids"] > 0
    return ModelFlops.of(cfg).of_step(
        tokens=int(inside.sum()),
        scored_tokens=int(batches["trained_mask"].sum()),
        attended_pairs=float(((batches["positions"] + 1) * inside).sum()),
    )


def figures(
    turns: list[contest.Result],
    ours: list[contest.Result],
    flops_per_token: float,
    peak: float,
) -> contest.Result:
    """A contender's medians, and ours over them."""
    found = contest.figures(turns, ours, unit="trained_tokens")
    return found | {
        "dtype": contest.DTYPE.value,
        "share_of_peak": found["trained_tokens_per_second"] * flops_per_token / peak,
        "last_losses": turns[0]["losses"][-1:],
    }


def print_table(size: str, result: contest.Result) -> None:
    """What was trained on, then one line a contender."""
    peaks = ", ".join(
        f"{name.removeprefix('peak_')} {peak / 1e9:.0f}"
        for name, peak in result["peak_flops"].items()
    )
    print(
        f"\n{size}: {result['parameters'] / 1e6:.1f}M parameters, rows packed to "
        f"{result['packing_efficiency']:.1%}, {result['trained_tokens_per_step']:.0f} trained "
        f"tokens and {result['settings']['dialogues_per_step']} dialogues a step; matrix products "
        f"at their best, GFLOP/s: {peaks}"
    )
    columns = {
        "trained tokens/s": ("trained_tokens_per_second", ".0f"),
        **contest.COLUMNS,
        "share of peak": ("share_of_peak", ".1%"),
    }
    contest.print_rows(columns, result["contenders"])


if __name__ == "__main__":
    app.run(main)
