"""A training benchmark's contest: contenders take turns, each in a process of its own.

They train the same model on the same batches with the same AdamW on the same cores; their losses on
the first batch have to agree. Figures are medians over the turns, ratios are of the same round.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import app, flags
from contenders import SHAPES

STEPS = flags.DEFINE_integer("steps", 6, "Timed optimizer steps of a turn.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before them.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each contender.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "Cores that a contender runs on.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Packed rows of a step.", lower_bound=1)
MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 1, "Ours: passes a step is divided into.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "What is computed in; weights are in float32."
)
COMPUTE = flags.DEFINE_string("compute", "{}", "Ours: fields of ComputeSection, as JSON.")

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
ADAMW = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "clip_norm": 1.0}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "accelerate")
MIB = 2**20
COLUMNS = {
    "ours is faster by": ("ours_is_faster_by", ".2f"),
    "peak memory, MiB": ("peak_memory_mib", ".0f"),
}

Result = dict[str, Any]


def hold(
    sizes: Sequence[str],
    output: pathlib.Path,
    data: str,
    measure: Callable[[str], Result],
    table: Callable[[str, Result], None],
    *,
    libraries: Sequence[str] = LIBRARIES,
) -> None:
    """Measures every size, prints tables, writes the result, anew after each size.

    Args:
        sizes: of the model.
        output: where to.
        data: what is trained on, for the result.
        measure: all contenders on a model of one size.
        table: prints what was measured.
        libraries: whose versions the result names; those that are not installed are left out.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    result = machine(libraries) | {"data": data}
    for size in sizes:
        result[size] = measure(size)
        table(size, result[size])
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


def check_names(sizes: Collection[str], names: Collection[str], known: Collection[str]) -> None:
    """Raise UsageError for a size or a contender that there is not."""
    unknown = {*sizes} - {*SHAPES} | {*names} - {*known}
    if unknown:
        raise app.UsageError(f"unknown: {', '.join(sorted(unknown))}")


def settings(optimizer: Mapping[str, float], **others: Any) -> Result:
    """What contenders read, and the result repeats."""
    return {
        "num_warmup": WARMUP.value,
        "num_steps": WARMUP.value + STEPS.value,
        "batch_size": BATCH_SIZE.value,
        "dtype": DTYPE.value,
        **others,
        "optimizer": dict(optimizer),
        "ours": {
            "compute": {"compute_dtype": DTYPE.value, **json.loads(COMPUTE.value)},
            "num_micro_batches": MICRO_BATCHES.value,
        },
    }


def take_turns(
    title: str,
    script: str,
    folder: pathlib.Path,
    contenders: Collection[str],
    *,
    others: Collection[str] = (),
    interpreters: Mapping[str, str] | None = None,
) -> dict[str, list[Result]]:
    """Every contender's turns, round by round.

    Args:
        title: for the log.
        script: that runs them, beside this file.
        folder: what they read.
        contenders: whose first losses have to agree.
        others: what else the script measures, first in each round.
        interpreters: of those that do not run in this one's environment.

    Raises:
        RuntimeError: one failed, or does not do the same work.
    """
    turns: dict[str, list[Result]] = {one: [] for one in [*others, *contenders]}
    for number in range(ROUNDS.value):
        for one, results in turns.items():
            print(f"{title}, round {number + 1}: {one}", file=sys.stderr)
            python = (interpreters or {}).get(one, sys.executable)
            results.append(run(script, one, folder, python=python))
        if contenders and not number:
            check_losses({one: turns[one][0]["losses"][0] for one in contenders})
    return turns


def run(script: str, name: str, folder: pathlib.Path, *, python: str = sys.executable) -> Result:
    """One turn of a contender, in a process of its own."""
    threads = str(THREADS.value)
    done = subprocess.run(
        [python, str(FOLDER / script), name, str(folder), threads],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # As our commands ask for themselves.
        },
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check_losses(losses: Mapping[str, float]) -> None:
    """Raise RuntimeError unless all contenders begin with the same loss on the same data."""
    apart = {
        name: loss
        for name, loss in losses.items()
        if abs(loss - losses["ours"]) > LOSS_TOLERANCE[DTYPE.value] * losses["ours"]
    }
    if apart:
        raise RuntimeError(f"not the same work: ours has loss {losses['ours']}, but {apart}")


def figures(turns: Sequence[Result], ours: Sequence[Result], *, unit: str) -> Result:
    """A contender's medians, and ours over them; `unit` is what its `counts` count."""
    speeds = [speed(turn) for turn in turns]
    # Of the same round: what else the machine does changes between rounds.
    ratios = [speed(our) / theirs for our, theirs in zip(ours, speeds, strict=True)]
    return {
        f"{unit}_per_second": statistics.median(speeds),
        "each_turn": speeds,
        "ours_is_faster_by": statistics.median(ratios),
        "peak_memory_mib": max(turn["peak_memory"] for turn in turns) / MIB,
        "first_losses": turns[0]["losses"][:1],
        "seconds_of_steps": [turn["seconds"] for turn in turns],
    }


def speed(turn: Result) -> float:
    """What was trained on per second of one turn."""
    return sum(turn["counts"]) / sum(turn["seconds"])


def machine(libraries: Sequence[str]) -> Result:
    """The date, and what the figures depend on beside the code."""
    info = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    installed = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": THREADS.value,
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in libraries if name in installed},
    }


def print_rows(columns: Mapping[str, tuple[str, str]], contenders: Mapping[str, Result]) -> None:
    """One line a contender; a column's head stands for the name of its figure and its format."""
    print(f"{'':28}" + "".join(f"{head:>20}" for head in columns))
    for name, found in contenders.items():
        cells = (format(found[figure], form) for figure, form in columns.values())
        print(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))
