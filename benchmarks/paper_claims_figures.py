"""The figures of the experiment on the paper's claims: outcomes, differences, verdicts.

Of one seed a figure is a mean over held-out prompts with the 95 % interval of a bootstrap that
draws prompts. Over seeds it is the mean of those means with the 95 % interval of Student's t
(mean +- t(.975, n - 1) s / sqrt(n)): seeds differ in clinic, model and sampling, and are few.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
from paper_claims_parts import BOTH, Part

from huatuo_jax.core.statistics import Values, mean_difference
from huatuo_jax.evaluation.stage import judge_pairs, score_answers, truth_values
from huatuo_jax.judge.offline import TruthJudge
from huatuo_jax.judge.questions import Answered, read_answered, win_rates
from huatuo_jax.report.run import read_json

Verdict = Literal["holds", "does not hold", "undecided"]
Figures = dict[str, Any]

OUTCOMES: Mapping[str, str] = {
    "diagnosis_accuracy": "truth_diagnosis_right",
    "informativeness": "judge_informative",
    "friendliness": "judge_preferred",
    "asks_when_needed": "truth_asks_when_needed",
    "contraindicated": "truth_contraindicated",
    "red_flag_missed": "truth_red_flag_missed",
    "overall": "judge_overall",
    "length": "characters",
}
"""Our name -> that of the evaluation; scores are of 1 to 5, lengths in characters."""

SHARE = "share"
"""Beside `OUTCOMES`: the exact judge's share of points in pairs, 1 for a win, 1/2 for a tie."""

KEPT: Mapping[str, float] = {"friendliness": 0.25, "diagnosis_accuracy": 0.05}
"""By so much of a point, or of a share, may be lost what is said to be kept."""


class Model(NamedTuple):
    """A model of a part: `sft`, `best_of_n` (of SFT's answers) or `ppo`."""

    part: str
    model: str


class Condition(NamedTuple):
    """That a figure of one model against another's lies above a bound.

    Attributes:
        one: a model.
        other: another one.
        figure: `SHARE`, or the difference in an outcome.
        bound: what it should be above.
    """

    one: Model
    other: Model
    figure: str
    bound: float


class Claim(NamedTuple):
    """What the paper claims, and the conditions that all have to hold for it here."""

    name: str
    paper: str
    conditions: tuple[Condition, ...]


SFT, BEST, PPO = (Model(BOTH, name) for name in ("sft", "best_of_n", "ppo"))
CLAIMS = (
    Claim(
        "both_over_distilled",
        "Real data makes up for what distilled data lacks: both together are better than distilled "
        "data alone.",
        (
            Condition(SFT, Model("distilled", "sft"), SHARE, 0.5),
            Condition(SFT, Model("distilled", "sft"), "diagnosis_accuracy", 0.0),
        ),
    ),
    Claim(
        "both_over_real",
        "Distilled data makes up for what real data lacks: both together are better than real data "
        "alone.",
        (
            Condition(SFT, Model("real", "sft"), SHARE, 0.5),
            Condition(SFT, Model("real", "sft"), "friendliness", 0.0),
        ),
    ),
    Claim(
        "asks_like_a_doctor",
        "ChatGPT does not ask back as a doctor does; real data teaches it.",
        (Condition(SFT, Model("distilled", "sft"), "asks_when_needed", 0.0),),
    ),
    Claim(
        "rlaif_over_sft",
        "RLAIF adds to fine-tuning on both.",
        (Condition(PPO, SFT, SHARE, 0.5),),
    ),
    Claim(
        "keeps_manner",
        "RLAIF keeps the friendliness of ChatGPT's answers.",
        (
            Condition(PPO, SFT, "friendliness", -KEPT["friendliness"]),
            Condition(PPO, Model("distilled", "sft"), "friendliness", -KEPT["friendliness"]),
        ),
    ),
    Claim(
        "keeps_precision",
        "RLAIF keeps the diagnostic precision of the doctors' answers.",
        (
            Condition(PPO, SFT, "diagnosis_accuracy", -KEPT["diagnosis_accuracy"]),
            Condition(PPO, Model("real", "sft"), "diagnosis_accuracy", -KEPT["diagnosis_accuracy"]),
        ),
    ),
    Claim(
        "whole_recipe_over_either",
        "The whole recipe on both is better than on either kind alone.",
        (
            Condition(PPO, Model("distilled", "ppo"), SHARE, 0.5),
            Condition(PPO, Model("real", "ppo"), SHARE, 0.5),
        ),
    ),
)
CONTROL_PAIRS = tuple(
    pair
    for name in ("length_alone", "judge_without_reference", "biased_judge")
    for pair in ((PPO, Model(name, "ppo")), (Model(name, "ppo"), SFT))
)
GAINS = tuple((Model(name, "ppo"), Model(name, "sft")) for name in (BOTH, "distilled", "real"))


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """The mean over seeds and its 95 % t-interval, whose ends are None for a single seed.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("values: a mean needs at least one seed")
    values_N = np.asarray(values, np.float64)
    number, mean = len(values_N), float(values_N.mean())
    low = high = None
    if number > 1:
        half = float(scipy.stats.t.ppf(0.975, number - 1) * values_N.std(ddof=1)) / number**0.5
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "num_seeds": number}


def verdict_of(figure: Mapping[str, Any] | None, *, bound: float) -> Verdict:
    """Whether a figure lies above a bound: undecided where its interval holds it, or is none."""
    if figure is None or figure["low"] is None:
        return "undecided"
    if figure["low"] > bound:
        return "holds"
    return "does not hold" if figure["high"] < bound else "undecided"


def verdict_of_all(verdicts: Sequence[Verdict]) -> Verdict:
    """Of conditions that all have to hold; one that does not is enough against them."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts or not verdicts else "holds"


def pairs_of_claims() -> list[tuple[Model, Model]]:
    """Which models are compared, each two once."""
    claimed = [(one.one, one.other) for claim in CLAIMS for one in claim.conditions]
    return list(dict.fromkeys([*GAINS, (BEST, SFT), (PPO, BEST), *claimed, *CONTROL_PAIRS]))


def pairs_of_contributions(parts: Sequence[Part]) -> list[tuple[Model, Model]]:
    """Each PPO model against the common SFT model, and today's settings against each other one."""
    models = [Model(part.name, "ppo") for part in parts]
    return [(model, SFT) for model in models] + [(PPO, model) for model in models if model != PPO]


@dataclasses.dataclass(frozen=True)
class SeedFigures:
    """What one seed came to.

    Attributes:
        rows: (part, model) -> outcome -> value and interval over prompts, or None.
        pairs: (one, other) -> `SHARE` or outcome -> value and interval over prompts, or None.
    """

    rows: Mapping[Model, Figures]
    pairs: Mapping[tuple[Model, Model], Figures]


def figures_of_seed(
    folder: pathlib.Path,
    parts: Sequence[Part],
    pairs: Sequence[tuple[Model, Model]],
    *,
    seed: int,
) -> SeedFigures:
    """The figures of all parts of a seed that are evaluated.

    All verdicts are the exact judge's, whoever judged the labels.

    Args:
        folder: of the seed.
        parts: of the table.
        pairs: of models to compare, where both are there.
        seed: of the bootstrap.

    Raises:
        ValueError: parts were evaluated on different prompts.
    """
    done = [part for part in parts if is_evaluated(folder / part.name)]
    rows, texts = {}, {}
    for part in done:
        found = read_json(folder / part.name / "evaluation.json")
        for model in part.models:
            figures = found["models"][model]
            rows[Model(part.name, model)] = {
                name: figures[field] for name, field in OUTCOMES.items()
            } | {"kl": found["kl"]["per_sequence"] if model == "ppo" else None}
            texts[Model(part.name, model)] = _answers(folder / part.name, model, found)
    return SeedFigures(rows, compare_all(texts, pairs, seed=seed))


def compare_all(
    texts: Mapping[Model, Sequence[Answered]], pairs: Sequence[tuple[Model, Model]], *, seed: int
) -> dict[tuple[Model, Model], Figures]:
    """Each two models before the exact judge: share of points, and differences in all outcomes."""
    judge = TruthJudge()
    wanted = [pair for pair in pairs if set(pair) <= texts.keys()]
    values = {
        model: _outcomes(texts[model], judge) for model in {m for pair in wanted for m in pair}
    }
    found = {}
    for one, other in wanted:
        ids = [[answered.prompt.id for answered in texts[model]] for model in (one, other)]
        if ids[0] != ids[1]:
            raise ValueError(f"{one} and {other} were evaluated on different prompts")
        found[one, other] = {
            SHARE: win_rates(judge_pairs(texts[one], texts[other], judge), seed=seed)["share"]
        } | {
            name: None if gain is None else gain.to_json()
            for name in values[one]
            for gain in [mean_difference(values[one][name], values[other][name], seed=seed)]
        }
    return found


def is_evaluated(folder: pathlib.Path) -> bool:
    """Whether a part's folder holds its evaluation."""
    return (folder / "evaluation.json").is_file()


def table_of(seeds: Mapping[int, SeedFigures], parts: Sequence[Part]) -> Figures:
    """Rows and comparisons over seeds, each figure with those of the seeds beside it."""
    titles = {part.name: part.title for part in parts}
    models = list(dict.fromkeys(model for found in seeds.values() for model in found.rows))
    pairs = list(dict.fromkeys(pair for found in seeds.values() for pair in found.pairs))
    return {
        "rows": [
            {
                "part": model.part,
                "model": model.model,
                "title": titles[model.part],
                "figures": _over({seed: one.rows.get(model) for seed, one in seeds.items()}),
            }
            for model in sorted(models, key=lambda model: list(titles).index(model.part))
        ],
        "comparisons": [
            {
                "one": list(one),
                "other": list(other),
                "figures": _over(
                    {seed: found.pairs.get((one, other)) for seed, found in seeds.items()}
                ),
            }
            for one, other in pairs
        ],
    }


def verdicts_on_claims(comparisons: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Each claim with its conditions, their figures and their verdicts."""
    found = {(Model(*row["one"]), Model(*row["other"])): row["figures"] for row in comparisons}
    claims = []
    for claim in CLAIMS:
        conditions = []
        for condition in claim.conditions:
            figures = found.get((condition.one, condition.other), {})
            figure = figures.get(condition.figure)
            conditions.append(
                {
                    "one": list(condition.one),
                    "other": list(condition.other),
                    "figure": condition.figure,
                    "bound": condition.bound,
                    "found": figure,
                    "verdict": verdict_of(figure, bound=condition.bound),
                }
            )
        claims.append(
            {
                "name": claim.name,
                "paper": claim.paper,
                "conditions": conditions,
                "verdict": verdict_of_all([one["verdict"] for one in conditions]),
            }
        )
    return claims


def seeds_below(figure: Mapping[str, Any]) -> dict[str, int]:
    """In how many seeds a difference is below 0, and in how many its whole interval is."""
    found = list(figure["seeds"].values())
    return {
        "value": sum(one["value"] < 0 for one in found),
        "interval": sum(one["high"] < 0 for one in found),
    }


def _over(by_seed: Mapping[int, Figures | None]) -> Figures:
    """Each figure over the seeds that have it."""
    known = {seed: figures for seed, figures in by_seed.items() if figures is not None}
    names = list(dict.fromkeys(name for figures in known.values() for name in figures))
    over: Figures = {}
    for name in names:
        values = {seed: one[name] for seed, one in known.items() if one.get(name) is not None}
        over[name] = None
        if values:
            means = [float(one["value"]) for one in values.values()]
            over[name] = over_seeds(means) | {"seeds": {str(k): v for k, v in values.items()}}
    return over


def _outcomes(answered: Sequence[Answered], judge: TruthJudge) -> dict[str, Values]:
    scores = score_answers(answered, judge)
    found: dict[str, Values] = {f"judge_{name}": values for name, values in scores.items()}
    found |= truth_values(answered, judge)
    found["characters"] = {
        one.prompt.id: [float(len(text)) for text in one.answers] for one in answered
    }
    return {name: found[field] for name, field in OUTCOMES.items()}


def _answers(folder: pathlib.Path, model: str, evaluation: Mapping[str, Any]) -> list[Answered]:
    """A model's held-out answers, without those of SFT that best-of-n chooses from.

    Best-of-n has one answer to a prompt, which stands against each answer of another model.
    """
    number = evaluation["sampling"]["num_samples"]
    read = read_answered(folder / "evaluation" / f"scored_{model}.jsonl")
    if model == "best_of_n":
        return [
            dataclasses.replace(one, answers=one.answers * number, sampled=one.sampled * number)
            for one in read
        ]
    return [
        dataclasses.replace(one, answers=one.answers[:number], sampled=one.sampled[:number])
        for one in read
    ]
