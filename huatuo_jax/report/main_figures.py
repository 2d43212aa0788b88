"""The main figures of an evaluation, one or two of each suite: for pages, reports and cards."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Figure = Mapping[str, Any]

DATASETS: Mapping[str, str] = {
    "cmedqa2": "cMedQA2",
    "webmedqa": "webMedQA",
    "huatuo26m": "Huatuo-26M",
    "cmb": "CMB",
    "cmexam": "CMExam",
    "medqa_us": "MedQA (United States)",
    "medqa_mainland": "MedQA (mainland China)",
    "medqa_taiwan": "MedQA (Taiwan)",
    "medmcqa": "MedMCQA",
    "pubmedqa": "PubMedQA",
    "cmmlu": "CMMLU, medical subjects",
    "ceval": "C-Eval, medical subjects",
    "mmlu": "MMLU, medical subjects",
    "single_turn": "KUAKE-QIC",
    "multi_turn": "Med-dialog",
    "clinical": "CMB-Clin",
    "healthbench": "HealthBench",
    "clinic": "huatuo_jax's clinic, an invented world",
}
"""Names of the sets for a reader; a set that is not here has its own name."""


class MainFigure(NamedTuple):
    """A figure of a suite for each model.

    Attributes:
        suite: that it is of.
        set: of the suite's sets, as its field is named; None where the suite has one set.
        dataset: the set's name for a reader.
        metric: its name for a program.
        words: its name for a reader, with the set's.
        is_share: True for a share from 0 to 1 that is shown in percent.
        digits: after the point, where it is shown as it is.
        judged: True where it rests on the verdicts of the judge.
        by_model: value with the ends of its 95 % interval; None where a model has none.
    """

    suite: str
    set: str | None
    dataset: str
    metric: str
    words: str
    is_share: bool
    digits: int
    judged: bool
    by_model: Mapping[str, Figure | None]

    @property
    def title(self) -> str:
        """Its name for a reader, with the unit of `shown`."""
        return f"{self.words}, percent" if self.is_share else self.words

    def shown(self, model: str) -> dict[str, float] | None:
        """Returns a model's value with its interval, a share in percent; None without any."""
        found = self.by_model.get(model)
        if found is None or found["value"] is None:
            return None
        scale = 100.0 if self.is_share else 1.0
        return {end: scale * found[end] for end in ("value", "low", "high")}


def main_figures(result: Mapping[str, Any]) -> list[MainFigure]:
    """Returns the main figures of all suites of an evaluation's results, in their order."""
    return [*_of_sets(result), *_of_comparisons(result), *_of_models(result)]


def count_of(figure: Figure) -> int:
    """Returns the number of items that a figure is over, by whatever name it has it."""
    return next(int(value) for name, value in figure.items() if name.startswith("num"))


def _of_sets(result: Mapping[str, Any]) -> Iterator[MainFigure]:
    suites, models = result["suites"], list(result["models"])
    for name, one in suites.get("lexical", {"sets": {}})["sets"].items():
        for metric in ("BLEU-4", "ROUGE-L"):
            yield MainFigure(
                suite="lexical",
                set=name,
                dataset=DATASETS.get(name, name),
                metric=metric,
                words=f"{name}: {metric}",
                is_share=False,
                digits=2,
                judged=False,
                by_model={model: one["models"][model]["figures"][metric] for model in models},
            )
    for name, one in suites.get("exams", {"sets": {}})["sets"].items():
        for by in suites["exams"]["settings"]["by"]:
            yield MainFigure(
                suite="exams",
                set=name,
                dataset=DATASETS.get(name, name),
                metric=f"accuracy_by_{by}",
                words=f"{name}: accuracy by {by}",
                is_share=True,
                digits=1,
                judged=False,
                by_model={
                    model: one["models"].get(model, {}).get(by, {}).get("accuracy")
                    for model in models
                },
            )


def _of_comparisons(result: Mapping[str, Any]) -> Iterator[MainFigure]:
    suites = result["suites"]
    for suite, words in (("single_turn", "questions"), ("multi_turn", "consultations")):
        for one in suites.get(suite, {"comparisons": []})["comparisons"]:
            first, other = one["models"]
            yield MainFigure(
                suite=suite,
                set=None,
                dataset=_dataset(suite, suites),
                metric="win_share",
                words=f"{words}: wins against {other}",
                is_share=True,
                digits=1,
                judged=True,
                by_model={first: one["figures"]["overall"]["share"]},
            )


def _of_models(result: Mapping[str, Any]) -> Iterator[MainFigure]:
    suites, models = result["suites"], list(result["models"])
    for suite, metric, words, is_share, digits, judged, pick in (
        (
            "multi_turn",
            "diagnosis_named",
            "consultations: diagnosis named",
            *(True, 1, False),
            lambda one: one["outcomes"]["diagnosis_named"],
        ),
        (
            "clinical",
            "overall",
            "CMB-Clin: overall, 1 to 5",
            *(False, 2, True),
            lambda one: one["overall"],
        ),
        (
            "healthbench",
            "score",
            "HealthBench: score",
            *(False, 3, True),
            lambda one: one["score"],
        ),
        (
            "clinic",
            "diagnosis_right",
            "clinic: diagnosis right",
            *(True, 1, False),
            lambda one: one["figures"]["diagnosis_right"],
        ),
    ):
        if suite in suites:
            found = suites[suite]["models"]
            yield MainFigure(
                suite=suite,
                set=None,
                dataset=_dataset(suite, suites),
                metric=metric,
                words=words,
                is_share=is_share,
                digits=digits,
                judged=judged,
                by_model={model: pick(found[model]) for model in models},
            )


def _dataset(suite: str, suites: Mapping[str, Any]) -> str:
    """The set of a suite that has one; the clinic's patient has cases of his own."""
    clinics = suite == "multi_turn" and suites[suite]["patient"] == "clinic"
    return DATASETS["clinic" if clinics else suite]
