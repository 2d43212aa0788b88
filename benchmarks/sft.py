"""Supervised fine-tuning beside its peers: trained tokens per second, memory, share of the peak.

Each contender trains the same Llama on the same dialogues with the same AdamW in float32, in a
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
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import sft_contenders
from absl import app, flags

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import count_parameters, init_params
from huatuo_jax.checkpoint.hf_export import export_model
from huatuo_jax.checkpoint.tokenizer import load_tokenizer
from huatuo_jax.data import templates
from huatuo_jax.data.examples import UNKNOWN_KIND, Example, Tokens
from huatuo_jax.data.packing import pack_row, plan_rows
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.shuffling import permutation
from huatuo_jax.data.tokenizing import TemplateTokenizer
from huatuo_jax.training.throughput import ModelFlops

_SIZES = flags.DEFINE_list("sizes", ["10m", "50m"], "Models: 10m, 50m, tiny.")
_STEPS = flags.DEFINE_integer("steps", 6, "Timed optimizer steps of a turn.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before them.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each contender.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that a contender runs on.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Packed rows of a step.", lower_bound=1)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 1024, "Tokens of a row at most (TRL's default).")
_CONTENDERS = flags.DEFINE_list(
    "contenders", [*sft_contenders.CONTENDERS], "Who takes part; `ours` always does."
)
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 1, "Ours: passes a step is divided into.")
_COMPUTE = flags.DEFINE_string("compute", "{}", "Ours: fields of ComputeSection, as JSON.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/sft_cpu.json", "Where to.")

SCRIPT = pathlib.Path(sft_contenders.__file__)
ROOT = SCRIPT.parents[1]
SHARED_DATA = pathlib.Path(os.environ.get("HUATUO_SHARED_DATA", ROOT.parent / "shared" / "data"))
OPTIMIZER = {
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "clip_norm": 1.0,
}
SHAPES = {  # Width, feed-forward width, layers, heads.
    "tiny": (64, 160, 2, 2),
    "10m": (256, 704, 8, 4),
    "50m": (512, 1408, 14, 8),
}
LOSS_TOLERANCE = 1e-4
SEED = 0
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "accelerate")
MIB = 2**20

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """What is trained on: its name in the result, examples as tokens, their tokenizer."""

    name: str
    examples: list[Example]
    tokenizer: Any


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    unknown = {*_SIZES.value} - {*SHAPES} | {*_CONTENDERS.value} - {*sft_contenders.CONTENDERS}
    if unknown:
        raise app.UsageError(f"unknown: {', '.join(sorted(unknown))}")
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    dialogues = read_all()
    result = {"date": datetime.date.today().isoformat(), **machine(), "data": dialogues.name}
    for size in _SIZES.value:
        result[size] = measure(size, dialogues)
        print_table(size, result[size])
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


def read_all() -> Dialogues:
    """The real dialogues with a tokenizer of 6,400 tokens, or the project's own with its own."""
    if (SHARED_DATA / "MANIFEST.json").is_file():
        name = "real dialogues: 1_sft_single_real and 2_sft_multi_real"
        adapters = {"toyhom_internal_medicine": "toyhom", "remedi_dev_human_annotation": "remedi"}
        folders = [SHARED_DATA / "1_sft_single_real", SHARED_DATA / "2_sft_multi_real"]
        paths = [path for folder in folders for path in sorted(folder.iterdir())]
        tokenizer = load_tokenizer(SHARED_DATA / "tokenizers" / "minimind_6400")
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        template = templates.by_name("chatml")
    else:
        name, adapters = "the project's sample dialogues", {}
        sample = ROOT / "huatuo_jax" / "data" / "sample"
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
    num_rows = num_steps * _BATCH_SIZE.value
    if num_rows > len(plan):
        raise ValueError(
            f"{num_steps} steps of {_BATCH_SIZE.value} rows are more than the {len(plan)} rows "
            "there are; take fewer --steps"
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
        name: array.reshape(num_steps, _BATCH_SIZE.value, *array.shape[1:])
        for name, array in stacked.items()
    }


def measure(size: str, dialogues: Dialogues) -> Result:
    """All contenders on one model."""
    width, feed_forward, num_layers, num_heads = SHAPES[size]
    cfg = BackboneConfig(
        family="llama",
        vocab_size=len(dialogues.tokenizer),
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        max_positions=_ROW_LENGTH.value,
    )
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig())
    num_steps = _WARMUP.value + _STEPS.value
    batches = packed_batches(dialogues, num_steps)
    per_step = batches["segment_ids"].max(axis=2).sum(axis=1)
    settings = {
        "num_warmup": _WARMUP.value,
        "num_steps": num_steps,
        "batch_size": _BATCH_SIZE.value,
        "row_length": _ROW_LENGTH.value,
        "dialogues_per_step": round(float(per_step.mean())),
        "optimizer": OPTIMIZER,
        "ours": {
            "compute": json.loads(_COMPUTE.value),
            "num_micro_batches": _MICRO_BATCHES.value,
        },
    }
    names = dict.fromkeys(["ours", *_CONTENDERS.value])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export_model(params, cfg, folder / "model", head="lm")
        dialogues.tokenizer.save_pretrained(folder / "tokenizer")
        np.savez(folder / "batches.npz", **batches)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        turns: dict[str, list[Result]] = {one: [] for one in [*sft_contenders.PEAKS, *names]}
        for number in range(_ROUNDS.value):
            for one, results in turns.items():
                print(f"{size}, round {number + 1}: {one}", file=sys.stderr)
                results.append(run(one, folder))
            if not number:
                check_losses({one: turns[one][0]["losses"][0] for one in names})
    peaks = {one: max(turn["flops"] for turn in turns.pop(one)) for one in sft_contenders.PEAKS}
    timed = {name: array[_WARMUP.value :] for name, array in batches.items()}
    flops_per_token = step_flops(cfg, timed) / int(timed["trained_mask"].sum())
    return {
        "parameters": count_parameters(params),
        "backbone": cfg.to_dict(),
        "settings": settings,
        "packing_efficiency": float((timed["segment_ids"] > 0).mean()),
        "trained_tokens_per_step": float(timed["trained_mask"].sum() / _STEPS.value),
        "peak_flops": peaks,
        "model_flops_per_trained_token": flops_per_token,
        "contenders": {
            one: figures(turns[one], turns["ours"], flops_per_token, max(peaks.values()))
            for one in names
        },
    }


def run(contender: str, folder: pathlib.Path) -> Result:
    """One turn of a contender, or one measurement of a peak, in a process of its own."""
    threads = str(_THREADS.value)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), contender, str(folder), threads],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check_losses(losses: dict[str, float]) -> None:
    """Raise RuntimeError unless all contenders begin with the same loss on the same dialogues."""
    apart = {
        name: loss
        for name, loss in losses.items()
        if abs(loss - losses["ours"]) > LOSS_TOLERANCE * losses["ours"]
    }
    if apart:
        raise RuntimeError(f"not the same work: ours has loss {losses['ours']}, but {apart}")


def step_flops(cfg: BackboneConfig, batches: Arrays) -> float:
    """What the model's mathematics asks for in all these batches, recomputation not counted."""
    inside = batches["segment_ids"] > 0
    return ModelFlops.of(cfg).of_step(
        tokens=int(inside.sum()),
        scored_tokens=int(batches["trained_mask"].sum()),
        attended_pairs=float(((batches["positions"] + 1) * inside).sum()),
    )


def figures(turns: list[Result], ours: list[Result], flops_per_token: float, peak: float) -> Result:
    """A contender's medians, and ours over them."""
    speeds = [speed(turn) for turn in turns]
    # Of the same round: what else the machine does changes between rounds.
    ratios = [speed(our) / theirs for our, theirs in zip(ours, speeds, strict=True)]
    median = statistics.median(speeds)
    memory = max(turn["peak_memory"] for turn in turns)
    return {
        "trained_tokens_per_second": median,
        "each_turn": speeds,
        "ours_is_faster_by": statistics.median(ratios),
        "share_of_peak": median * flops_per_token / peak,
        "peak_memory_mib": memory / MIB,
        "first_losses": turns[0]["losses"][:1],
        "last_losses": turns[0]["losses"][-1:],
        "seconds_of_steps": [turn["seconds"] for turn in turns],
    }


def speed(turn: Result) -> float:
    """Trained tokens per second of one turn."""
    return sum(turn["trained_tokens"]) / sum(turn["seconds"])


def machine() -> Result:
    """What the figures depend on beside the code."""
    info = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": _THREADS.value,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def print_table(size: str, result: Result) -> None:
    """One line a contender."""
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
    heads = ("trained tokens/s", "ours is faster by", "share of peak", "peak memory, MiB")
    print(f"{'':28}" + "".join(f"{head:>20}" for head in heads))
    for name, one in result["contenders"].items():
        values = (
            f"{one['trained_tokens_per_second']:.0f}",
            f"{one['ours_is_faster_by']:.2f}",
            f"{one['share_of_peak']:.1%}",
            f"{one['peak_memory_mib']:.0f}",
        )
        print(f"{name:28}" + "".join(f"{value:>20}" for value in values))


if __name__ == "__main__":
    app.run(main)
