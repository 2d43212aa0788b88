"""Exams by likelihood beside lm-evaluation-harness with torch: questions per second, in one run.

Each contender answers the medical questions of CMMLU with the same random Llama in float32, in a
process of its own, on the same cores: our evaluator, our model in lm-evaluation-harness, and the
exported model in torch there, with batches of several sizes. A turn answers all questions twice;
the second time counts, as the first one compiles. Contenders take turns, ratios are of the same
round, and all have to give the same log-probabilities. Times are from files to answers, prompts and
tokens included; the harness, too, computes a context once for all its one-token answers. The table
also has CPU seconds of all cores together, which are valid where other work shares the machine.

CMMLU's files are read from the folder of real data (beside the checkout, or where
HUATUO_SHARED_DATA says). With `--torch_python` torch runs in another environment, as it needs
accelerate there.

    python benchmarks/exams.py --sizes=10m --rounds=3
"""

import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence

import contenders
import contest
import exams_contenders
import jax
import numpy as np
import real_data
from absl import app, flags

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import count_parameters, init_params
from huatuo_jax.clinic.files import TOKENIZER
from huatuo_jax.evaluation.exam_sets import CMMLU_SUBJECTS
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.tokenizer import load_tokenizer

_SIZES = flags.DEFINE_list("sizes", ["10m"], "Models: 50m, 10m, tiny.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Requests of a batch, in torch.")
_QUESTIONS = flags.DEFINE_integer("questions", None, "Of each subject; all by default.")
_TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "What runs torch.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/exams_cpu.json", "Where to.")

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers", "lm_eval")
TOLERANCE = 1e-3
POSITIONS = 2048
SEED = 0
COLUMNS = {
    "questions per second": ("questions_per_second", ".1f"),
    "ours is faster by": ("ours_is_faster_by", ".2f"),
    "at least": ("least", ".2f"),
    "at most": ("most", ".2f"),
    "seconds of the first pass": ("first_seconds", ".1f"),
    "CPU seconds": ("cpu_seconds", ".1f"),
    "ours takes less by": ("cpu_seconds_over_ours", ".2f"),
}


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    contest.check_names(_SIZES.value, (), ())
    contest.hold(
        _SIZES.value,
        pathlib.Path(_OUTPUT.value),
        "real questions: CMMLU, medical subjects",
        measure,
        lambda size, found: contest.print_rows(COLUMNS, found["contenders"]),
        libraries=LIBRARIES,
    )


def measure(size: str) -> contest.Result:
    """All contenders on a model of one size."""
    tokenizer = load_tokenizer(TOKENIZER)
    cfg = contenders.backbone(size, vocab_size=len(tokenizer), max_positions=POSITIONS)
    torch_names = [f"{exams_contenders.TORCH}{batch}" for batch in _BATCHES.value]
    names = [exams_contenders.OURS, exams_contenders.HARNESS, *torch_names]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        params = init_params(jax.random.key(SEED), cfg, ComputeConfig())
        export_model(params, cfg, folder / "model", head="lm", source_folder=TOKENIZER)
        files = {"cmmlu": str(copy_questions(folder / "cmmlu"))}
        (folder / "files.json").write_text(json.dumps(files), encoding="utf-8")
        turns = contest.take_turns(
            size,
            "exams_contenders.py",
            folder,
            (),
            others=names,
            interpreters=dict.fromkeys(torch_names, _TORCH_PYTHON.value),
        )
    check_answers(turns)
    ours = turns[exams_contenders.OURS]
    return {
        "num_parameters": count_parameters(params),
        "num_questions": len(ours[0]["log_probs"]),
        "contenders": {name: figures(found, ours) for name, found in turns.items()},
    }


def copy_questions(folder: pathlib.Path) -> pathlib.Path:
    """CMMLU's medical subjects as published: a folder for each split."""
    (folder / "test").mkdir(parents=True)
    for subject in CMMLU_SUBJECTS:
        source = real_data.SHARED_DATA / "6_exam" / "cc_by_nc_sa" / f"cmmlu_test_{subject}.csv"
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        most = None if _QUESTIONS.value is None else _QUESTIONS.value + 1
        target = folder / "test" / f"{subject}.csv"
        target.write_text("".join(lines[:most]), encoding="utf-8")
    return folder


def check_answers(turns: Mapping[str, Sequence[contest.Result]]) -> None:
    """Raise RuntimeError unless all contenders give the same log-probabilities."""
    ours = np.asarray(turns[exams_contenders.OURS][0]["log_probs"])
    for name, found in turns.items():
        apart = np.abs(np.asarray(found[0]["log_probs"]) - ours).max()
        if apart > TOLERANCE:
            raise RuntimeError(f"not the same work: {name} differs by {apart}")


def figures(
    turns: Sequence[contest.Result], ours: Sequence[contest.Result]
) -> dict[str, float | list[float]]:
    """A contender's medians, and how much faster ours is in the same round."""
    num = len(turns[0]["log_probs"])
    speeds = [num / turn["seconds"] for turn in turns]
    ratios = [one["seconds"] / our["seconds"] for one, our in zip(turns, ours, strict=True)]
    return {
        "questions_per_second": statistics.median(speeds),
        "each_turn": speeds,
        "ours_is_faster_by": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "each_ratio": ratios,
        "first_seconds": statistics.median(turn["first_seconds"] for turn in turns),
        "cpu_seconds": statistics.median(turn["cpu_seconds"] for turn in turns),
        "cpu_seconds_over_ours": statistics.median(
            one["cpu_seconds"] / our["cpu_seconds"] for one, our in zip(turns, ours, strict=True)
        ),
    }


if __name__ == "__main__":
    app.run(main)
