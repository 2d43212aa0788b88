"""A reward model of GPT-4's scores of real consultations, five-fold, beside a length-only one.

DISC-MedLLM's evaluation let several models consult with the same simulated patients, and GPT-4
scored each consultation. Two consultations on one case with different mean scores are a pair. Each
fold leaves a fifth of the cases out, trains on the others from the same fine-tuned backbone with
one seed, and scores the pairs of its own cases. The pairs of all folds are then judged together:
accuracy and calibration with intervals from a bootstrap over cases, and the same for the length of
the doctor's answers alone, whose slope is fitted on each fold's training pairs.

Both consultations of a pair are whole: one that is longer than `--max_length` is left out with its
pairs, and counted. (`results/reward_real_data.json` was made before that rule: it looked at the
last 512 tokens of each consultation, some 450,000 tokens a pass, 6 minutes a fold on two cores.)
An interrupted run resumes with the next fold.

The intervals are over cases. They leave out what another seed, or another division, would change.

    HUATUO_SHARED_DATA=DIR python benchmarks/reward_real_data.py --sft=runs/real/sft/model
"""

import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import real_data
from absl import app, flags

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.core import sharding
from huatuo_jax.core.statistics import NUM_RESAMPLES
from huatuo_jax.data.mixture import permutation
from huatuo_jax.data.records import Comparison
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, Group, open_comparisons
from huatuo_jax.reward import report
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.reward.report import ScoredPairs, all_answers, given, length_slope, scored_pairs
from huatuo_jax.reward.stage import run_reward
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.scoring import Scorer

_SFT = flags.DEFINE_string("sft", None, "Directory of the fine-tuned backbone, with tokenizer.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/reward_real", "Folder of the five runs.")
_TEMPLATE = flags.DEFINE_string("template", "chatml", "Chat template of the backbone.")
_EPOCHS = flags.DEFINE_integer("epochs", 1, "Passes over the training pairs.")
_STEPS = flags.DEFINE_integer("steps", None, "Optimizer steps instead, to try it out.")
_FOLDS = flags.DEFINE_integer("folds", 5, "How many of the five folds to run, to try it out.")
_CASES = flags.DEFINE_integer("cases", None, "So many cases only, to try it out.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-4, "The highest one.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens of a consultation.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 6144, "Tokens of a row.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Rows of an optimizer step.")
_OUTPUT = flags.DEFINE_string(
    "output", "benchmarks/results/reward_real_data.json", "File for the figures."
)
flags.mark_flag_as_required("sft")

NUM_FOLDS = 5
NUM_NORMALIZING = 32
BACKBONE_SAW = (
    "the backbone was fine-tuned on these models' consultations too (the texts, also those of the"
    " cases held out here; no scores), where its data were those of benchmarks/sft_real_data.py"
)
INTERVALS = "95 %, bootstrap over cases; one seed and one division into folds"
SEED = 0  # Of folds, order, head and bootstrap; fixed before anything was run.


def main() -> None:
    """Run the folds, judge their pairs together, write the figures."""
    by_case = dict(itertools.islice(real_data.disc_pairs().items(), _CASES.value))
    begun_s = time.monotonic()
    folds = []
    for fold in range(_FOLDS.value):
        folds.append(run_fold(fold, by_case))
        minutes = (time.monotonic() - begun_s) / 60
        share = report.accuracy(folds[-1].pairs, seed=SEED)
        told = "no pairs" if share is None else f"accuracy {share.value:.3f}"
        print(f"fold {fold + 1} of {_FOLDS.value}: {told}, {minutes:.1f} minutes", flush=True)
    pairs = joined([fold.pairs for fold in folds])
    by_length = np.concatenate([fold.by_length for fold in folds])
    figures = {
        "cases": len(by_case),
        "folds": len(folds),
        "seed": SEED,
        "intervals": INTERVALS,
        "backbone": {"directory": pathlib.Path(_SFT.value).name, "note": BACKBONE_SAW},
        "settings": {
            "epochs": _EPOCHS.value,
            "learning_rate": _LEARNING_RATE.value,
            "steps": _STEPS.value,
            "max_length": _MAX_LENGTH.value,
            "row_length": _ROW_LENGTH.value,
            "batch_size": _BATCH_SIZE.value,
        },
        "minutes_of_this_call": round((time.monotonic() - begun_s) / 60, 1),
        "reward_model": judged(pairs, pairs.difference),
        "length_only": judged(pairs, by_length),
        "accuracy_above_length_only": json_of(report.accuracy_gain(pairs, by_length, seed=SEED)),
        "length_log_odds_per_character": [fold.slope for fold in folds],
        "accuracy_by_fold": [json_of(report.accuracy(fold.pairs, seed=SEED)) for fold in folds],
        "accuracy_by_margin": [
            {"margin_low": low, "margin_high": high}
            | (json_of(report.accuracy(pairs.only(inside(pairs, low, high)), seed=SEED)) or {})
            for low, high in report.margin_ranges(pairs.margin)
        ],
    }
    text = json.dumps(figures, indent=2)
    print(text)
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Fold:
    """The scored pairs of a fold's own cases, and what length alone says of them."""

    pairs: ScoredPairs
    by_length: np.ndarray
    slope: float


def run_fold(fold: int, by_case: dict[str, list[Comparison]]) -> Fold:
    """Trains without the fold's cases (or finds it done) and scores them."""
    workdir = pathlib.Path(_WORKDIR.value) / f"fold{fold}"
    workdir.mkdir(parents=True, exist_ok=True)
    cases = sorted(by_case)
    fold_of = permutation(len(cases), SEED, "folds") % NUM_FOLDS
    own = {case for case, number in zip(cases, fold_of.tolist(), strict=True) if number == fold}
    others = pairs_of_others(by_case, own)
    train = real_data.write_pairs(workdir / "train.jsonl", others)
    held_out = real_data.write_pairs(
        workdir / "held_out.jsonl", [p for c in cases if c in own for p in by_case[c]]
    )
    data = ComparisonsConfig(
        sources=(
            ComparisonSource(paths=(train,), held_out_by="never"),
            ComparisonSource(paths=(held_out,), held_out_by="always"),
        ),
        template=_TEMPLATE.value,
        max_length=_MAX_LENGTH.value,
        max_left_out_share=1.0,
        row_length=_ROW_LENGTH.value,
        group_field="case",
    )
    # The fold's own cases are scored once, below; the stage would do so several times. What its
    # scores are normalised on changes nothing here, so a few answers are enough.
    few = real_data.write_pairs(
        workdir / "few.jsonl", others[:: -(-len(others) // NUM_NORMALIZING)]
    )
    settings = RewardConfig(
        model=ModelConfig(directory=_SFT.value),
        data=dataclasses.replace(data, sources=data.sources[:1]),
        normalization_answers=few,
        optimizer=OptimizerConfig(learning_rate=_LEARNING_RATE.value, warmup_share=0.1),
        num_epochs=_EPOCHS.value,
        num_steps=_STEPS.value,
        batch_size=_BATCH_SIZE.value,
        seed=SEED,
        loop=LoopConfig(evaluate_every=1000, checkpoint_every=25, tensorboard=False),
    )
    run_reward(settings, workdir)
    comparisons = open_comparisons(data, load_tokenizer(_SFT.value))
    slope = length_slope(comparisons.train)
    pairs = scored_pairs(comparisons.held_out, saved_scores(workdir, comparisons.held_out))
    return Fold(pairs, slope * pairs.length_difference, slope)


def pairs_of_others(by_case: Mapping[str, Sequence[Comparison]], own: Set[str]) -> list[Comparison]:
    """The pairs of all cases but a fold's own, in the order of the cases."""
    return [pair for case in sorted(by_case) if case not in own for pair in by_case[case]]


def saved_scores(workdir: pathlib.Path, groups: Sequence[Group]) -> np.ndarray:
    """The scores that the saved model gives the groups' answers, in their order."""
    info = find_model(workdir / "reward" / "model")
    mesh = sharding.make_mesh()
    scorer = Scorer(
        Transformer(info.cfg),
        {"params": load_params(info, mesh=mesh)},
        mesh=mesh,
        rows_at_once=_BATCH_SIZE.value,
        row_length=2 * _MAX_LENGTH.value,  # Shorter rows take less attention.
    )
    return scorer.scores([given(answer) for answer in all_answers(groups)])


def joined(folds: Sequence[ScoredPairs]) -> ScoredPairs:
    """The pairs of all folds; no two folds share a case."""
    columns: dict[str, list[np.ndarray]] = {}
    first = 0
    for pairs in folds:
        for field in dataclasses.fields(pairs):
            values = getattr(pairs, field.name)
            shifted = values + first if field.name == "cases" else values
            columns.setdefault(field.name, []).append(shifted)
        first += int(pairs.cases.max()) + 1
    return ScoredPairs(**{name: np.concatenate(parts) for name, parts in columns.items()})


def judged(pairs: ScoredPairs, difference: np.ndarray) -> dict[str, Any]:
    """Accuracy and calibration of one score."""
    table = report.reliability(difference, pairs.p_chosen)
    scored = dataclasses.replace(pairs, difference=difference)
    return {
        "accuracy": json_of(report.accuracy(scored, seed=SEED)),
        "loss": report.cross_entropy(difference, pairs.p_chosen),
        "expected_calibration_error": report.calibration_error(table),
        "expected_calibration_error_interval": calibration_interval(scored),
        "bins": [one._asdict() for one in table],
    }


def calibration_interval(pairs: ScoredPairs) -> list[float]:
    """The 95 % interval of the expected calibration error, by a bootstrap over cases.

    Resampling adds noise of its own to the bins, so that it lies somewhat high.
    """
    of_case = [np.flatnonzero(pairs.cases == case) for case in np.unique(pairs.cases)]
    draw = np.random.default_rng(SEED)
    errors = []
    for _ in range(NUM_RESAMPLES):
        drawn = np.concatenate(
            [of_case[case] for case in draw.integers(len(of_case), size=len(of_case))]
        )
        table = report.reliability(pairs.difference[drawn], pairs.p_chosen[drawn])
        errors.append(report.calibration_error(table))
    return [float(bound) for bound in np.quantile(errors, (0.025, 0.975))]


def inside(pairs: ScoredPairs, low: float, high: float) -> np.ndarray:
    """Which pairs have a margin in a range."""
    return (np.abs(pairs.margin) >= low) & (np.abs(pairs.margin) <= high)


def json_of(share: report.Share | None) -> dict[str, float | int] | None:
    """A share by name."""
    return None if share is None else share.to_json()


if __name__ == "__main__":
    app.run(lambda _: main())
