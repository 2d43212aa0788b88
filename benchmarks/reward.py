"""Reward training beside TRL's RewardTrainer: pairs per second and memory, in one run.

Each contender trains the same Llama with a score head on the same pairs with the same AdamW in
float32, in a process of its own, on the same cores: ours on packed rows, TRL as it comes (padded,
gradient checkpointing) and without checkpointing. A step's pairs are those of one packed batch of
ours; TRL takes as many a step on average. They take turns, and figures are medians over the turns.
Their losses on the first batch have to agree.

Pairs are real ones where the folder of real data is (beside the checkout, or where
HUATUO_SHARED_DATA says), else made of the project's own samples.

    python benchmarks/reward.py --sizes=10m --steps=6 --rounds=3
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import reward_contenders
from absl import app, flags

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import count_parameters, init_params
from huatuo_jax.checkpoint.hf_export import export_model
from huatuo_jax.checkpoint.tokenizer import load_tokenizer
from huatuo_jax.data.held_out import HeldOutConfig
from huatuo_jax.reward.data import ComparisonsConfig, ComparisonSource, Group, open_comparisons
from huatuo_jax.reward.rows import RewardRows, RowsConfig

_SIZES = flags.DEFINE_list("sizes", ["10m"], "Models: 50m, 10m, tiny.")
_STEPS = flags.DEFINE_integer("steps", 6, "Timed optimizer steps of a turn.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before them.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each contender.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that a contender runs on.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Packed rows of a step.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "Tokens of a prompt and answer at most.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 1024, "Ours: tokens of a packed row.")
_CONTENDERS = flags.DEFINE_list(
    "contenders", [*reward_contenders.CONTENDERS], "Who takes part; `ours` always does."
)
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 1, "Ours: passes a step is divided into.")
_COMPUTE = flags.DEFINE_string("compute", "{}", "Ours: fields of ComputeSection, as JSON.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/reward_cpu.json", "Where to.")

SCRIPT = pathlib.Path(reward_contenders.__file__)
ROOT = SCRIPT.parents[1]
SAMPLE = ROOT / "huatuo_jax" / "data" / "sample"
SHARED_DATA = pathlib.Path(os.environ.get("HUATUO_SHARED_DATA", ROOT.parent / "shared" / "data"))
REAL_PAIRS = ("medicalgpt_reward_test.json", "medicalgpt_dpo_zh_500.jsonl")
OPTIMIZER = {
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
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

Result = dict[str, Any]


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    unknown = {*_SIZES.value} - {*SHAPES} | {*_CONTENDERS.value} - {*reward_contenders.CONTENDERS}
    if unknown:
        raise app.UsageError(f"unknown: {', '.join(sorted(unknown))}")
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    name, groups, tokenizer = read_all()
    result = {"date": datetime.date.today().isoformat(), **machine(), "data": name}
    for size in _SIZES.value:
        result[size] = measure(size, groups, tokenizer)
        print_table(size, result[size])
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


def read_all() -> tuple[str, Sequence[Group], pathlib.Path]:
    """The pairs, what they are called, and their tokenizer's folder."""
    if (SHARED_DATA / "MANIFEST.json").is_file():
        name, tokenizer = "real pairs: 4_preference", SHARED_DATA / "tokenizers" / "minimind_6400"
        paths = tuple(str(SHARED_DATA / "4_preference" / one) for one in REAL_PAIRS)
        source, template = ComparisonSource(paths=paths), "chatml"
    else:
        name, tokenizer = "pairs made of the project's sample dialogues", SAMPLE / "tokenizer"
        paths = tuple(str(path) for path in sorted(SAMPLE.glob("*_instruction.jsonl")))
        source, template = ComparisonSource(paths=paths, reads="dialogues"), "huatuogpt"
    cfg = ComparisonsConfig(
        sources=(source,),
        template=template,
        truncation="drop_row",
        max_length=_MAX_LENGTH.value,
        row_length=_ROW_LENGTH.value,
        held_out=HeldOutConfig(share=0.0),
    )
    return name, open_comparisons(cfg, load_tokenizer(tokenizer)).train, tokenizer


def packed_batches(
    groups: Sequence[Group], num_steps: int
) -> tuple[dict[str, np.ndarray], list[list[dict[str, list[int]]]]]:
    """The first batches of an epoch as our pipeline packs them, and the pairs of each.

    Raises:
        ValueError: there are not enough pairs.
    """
    rows = RewardRows(groups, RowsConfig(row_length=_ROW_LENGTH.value, seed=SEED))
    num_rows = num_steps * _BATCH_SIZE.value
    if num_rows > rows.first_row(1):
        raise ValueError(
            f"{num_steps} steps of {_BATCH_SIZE.value} rows are more than the "
            f"{rows.first_row(1)} rows there are; take fewer --steps"
        )
    places = rows.most_pairs(num_rows)
    read = [rows.read(row, num_pairs=places) for row in range(num_rows)]
    stacked = {name: np.stack([row[name] for row in read]) for name in read[0]}
    shape = (num_steps, _BATCH_SIZE.value)
    batches = {name: array.reshape(*shape, *array.shape[1:]) for name, array in stacked.items()}
    pairs: list[list[dict[str, list[int]]]] = [[] for _ in range(num_steps)]
    for row in range(num_rows):
        for part in rows.parts_in(row):
            pairs[row // _BATCH_SIZE.value] += [
                {
                    "chosen_ids": part.answers[pair.chosen].token_ids.tolist(),
                    "rejected_ids": part.answers[pair.rejected].token_ids.tolist(),
                }
                for pair in part.pairs
            ]
    # TRL knows hard labels only, so ours trains on the same.
    batches["p_chosen"] = np.ones_like(batches["p_chosen"])
    return batches, pairs


def measure(size: str, groups: Sequence[Group], tokenizer: pathlib.Path) -> Result:
    """All contenders on one model."""
    width, feed_forward, num_layers, num_heads = SHAPES[size]
    cfg = BackboneConfig(
        family="llama",
        # One id more than the tokenizer's, so that an id to pad with is free.
        vocab_size=len(load_tokenizer(tokenizer)) + 1,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        max_positions=_MAX_LENGTH.value,
    )
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig(), head="score")
    num_steps = _WARMUP.value + _STEPS.value
    batches, pairs = packed_batches(groups, num_steps)
    settings = {
        "num_warmup": _WARMUP.value,
        "num_steps": num_steps,
        "batch_size": _BATCH_SIZE.value,
        "row_length": _ROW_LENGTH.value,
        "max_length": _MAX_LENGTH.value,
        "pairs_per_step": round(statistics.mean(map(len, pairs))),
        "optimizer": OPTIMIZER,
        "ours": {
            "compute": json.loads(_COMPUTE.value),
            "num_micro_batches": _MICRO_BATCHES.value,
        },
    }
    names = dict.fromkeys(["ours", *_CONTENDERS.value])
    turns: dict[str, list[Result]] = {one: [] for one in names}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export_model(params, cfg, folder / "model", head="score", source_folder=tokenizer)
        np.savez(folder / "batches.npz", **batches)
        (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        for number in range(_ROUNDS.value):
            for one, results in turns.items():
                print(f"{size}, round {number + 1}: {one}", file=sys.stderr)
                results.append(run(one, folder))
            if not number:
                check_losses({one: turns[one][0]["losses"][0] for one in names})
    return {
        "parameters": count_parameters(params),
        "backbone": cfg.to_dict(),
        "settings": settings,
        "packing_efficiency": float((batches["segment_ids"] > 0).mean()),
        "contenders": {one: figures(turns[one], turns["ours"]) for one in names},
    }


def run(contender: str, folder: pathlib.Path) -> Result:
    """One turn of a contender, in a process of its own."""
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
    """Raise RuntimeError unless all contenders begin with the same loss on the same pairs."""
    apart = {
        name: loss
        for name, loss in losses.items()
        if abs(loss - losses["ours"]) > LOSS_TOLERANCE * losses["ours"]
    }
    if apart:
        raise RuntimeError(f"not the same work: ours has loss {losses['ours']}, but {apart}")


def figures(turns: list[Result], ours: list[Result]) -> Result:
    """A contender's medians, and ours over them."""
    speeds = [speed(turn) for turn in turns]
    # Of the same round: what else the machine does changes between rounds.
    ratios = [speed(our) / theirs for our, theirs in zip(ours, speeds, strict=True)]
    return {
        "pairs_per_second": statistics.median(speeds),
        "each_turn": speeds,
        "ours_is_faster_by": statistics.median(ratios),
        "peak_memory_mib": max(turn["peak_memory"] for turn in turns) / MIB,
        "first_losses": turns[0]["losses"][:1],
        "seconds_of_steps": [turn["seconds"] for turn in turns],
    }


def speed(turn: Result) -> float:
    """Pairs per second of one turn."""
    return sum(turn["pairs"]) / sum(turn["seconds"])


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
    print(
        f"\n{size}: {result['parameters'] / 1e6:.1f}M parameters, rows packed to "
        f"{result['packing_efficiency']:.1%}, {result['settings']['pairs_per_step']} pairs a step"
    )
    heads = ("pairs/s", "ours is faster by", "peak memory, MiB")
    print(f"{'':24}" + "".join(f"{head:>20}" for head in heads))
    for name, one in result["contenders"].items():
        values = (
            f"{one['pairs_per_second']:.2f}",
            f"{one['ours_is_faster_by']:.2f}",
            f"{one['peak_memory_mib']:.0f}",
        )
        print(f"{name:24}" + "".join(f"{value:>20}" for value in values))


if __name__ == "__main__":
    app.run(main)
