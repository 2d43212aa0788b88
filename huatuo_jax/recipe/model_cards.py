"""Writes the model cards of a release (`README.md`) in the format of the Hugging Face Hub."""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from huatuo_jax.checkpoint import models
from huatuo_jax.core.files import as_path
from huatuo_jax.core.markdown import fenced, inline, interval, number, plain, table
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.recipe import model_card_figures
from huatuo_jax.report.run import Run
from huatuo_jax.reward.export import USAGE_FOLDER, usage
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.scoring import Normalization

_READ_OF_EACH = 200
_LEAST_SHARE = 0.05
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_OTHER_EAST_ASIAN = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile("[A-Za-z]+")
_COMMON_ENGLISH = frozenset(
    """a an and are as at be but by can do does for from had has have he how i if in is it my not of
    on or she should so that the there they this to was we what when which who why will with you
    your""".split()
)
ADVICE = (
    "Nothing that this model says is medical advice. It is no doctor, and it must not be used to "
    "diagnose or to treat anyone."
)
_TITLES: Mapping[str, str] = {
    "base": "the base model",
    "sft": "the SFT model",
    "best_of_n": "the SFT model, for best-of-n",
    "ppo": "the model after PPO",
    "folder": "a model that the config names",
}
_STAGES = {
    "base": ("evaluation",),
    "sft": ("sft", "evaluation"),
    "best_of_n": ("sft", "answers", "labels", "reward", "evaluation"),
    "ppo": ("sft", "answers", "labels", "reward", "ppo", "evaluation"),
    "folder": (),
}
_SPEAKERS = {"user": "Patient", "assistant": "Doctor"}
_TURN_CHARACTERS = 600
_SMALL = 100_000_000


class License(NamedTuple):
    """A licence as a card's metadata says it; all None where it is unknown.

    Attributes:
        id: of the Hub's list, or `other`.
        name: of a licence that is `other`.
        link: to its text.
        told_by: the source of the licence, for a reader.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    told_by: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Base model, licence, languages and data of a release, for both cards.

    Attributes:
        base_model: a Hub id; None for a model that has none.
        base: the base model in words, Markdown.
        license: of the release.
        languages: ISO codes, the most frequent first; () where they are not known.
        datasets: the Hub ids of the data.
        is_clinic: True for data of the made-up clinic.
    """

    base_model: str | None
    base: str
    license: License
    languages: tuple[str, ...]
    datasets: tuple[str, ...]
    is_clinic: bool

    def of_model(self, model: ModelConfig, *, license: str | None, has_data: bool) -> "Origin":
        """Returns the origin of a model that started from another base.

        Args:
            model: that one.
            license: that the config gives.
            has_data: it has seen the run's data.
        """
        return dataclasses.replace(
            self,
            base_model=hub_id(model.directory),
            base=base_in_words(model),
            license=find_license(model.directory, license),
            datasets=self.datasets if has_data else (),
            is_clinic=self.is_clinic and has_data,
        )


def find_origin(
    model: ModelConfig,
    sources: Sequence[SourceConfig],
    prompts: Sequence[pathlib.Path],
    *,
    license: str | None,
    languages: tuple[str, ...],
    is_clinic: bool,
) -> Origin:
    """Returns base model, licence, languages and data of a run's models.

    Args:
        model: that training began with.
        sources: of the dialogues.
        prompts: files of prompts.
        license: that the config gives; None for the base model's.
        languages: that the config gives; () tells them by dialogues and prompts.
        is_clinic: True for data of the made-up clinic.

    Raises:
        OSError: a file cannot be read.
    """
    named = [hub_id(path) for source in sources for path in source.paths]
    return Origin(
        base_model=hub_id(model.directory),
        base=base_in_words(model),
        license=find_license(model.directory, license),
        languages=languages or languages_of(texts_of(sources, prompts)),
        datasets=tuple(dict.fromkeys(name for name in named if name is not None)),
        is_clinic=is_clinic,
    )


def hub_id(source: str | None) -> str | None:
    """Returns the Hub id of a model or data set; None for a local path."""
    if source is None or as_path(source).exists() or source.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def base_in_words(model: ModelConfig) -> str:
    """Names the model that training began with, without local paths, in Markdown."""
    if (name := hub_id(model.directory)) is not None:
        return f"[{inline(name)}](https://huggingface.co/{name})"
    if model.directory is not None:
        name = pathlib.Path(model.directory).resolve().name
        return f"a model from a folder, {inline(name)}, which is none of the Hub by that name"
    if model.preset is not None:
        return f"none: fresh weights in the architecture `{model.preset}`"
    assert model.backbone is not None
    cfg = model.backbone
    return (
        f"none: fresh weights, {cfg.family}, {cfg.num_layers} layers, width {cfg.hidden_size}, "
        f"vocabulary {cfg.vocab_size}"
    )


def find_license(source: str | None, given: str | None) -> License:
    """Returns the licence that the config gives, else that of the base model's own card.

    Args:
        source: the base model's folder or Hub id; None for fresh weights.
        given: `export.license`.
    """
    if given is not None:
        return License(given, None, None, "the config of the run")
    name = hub_id(source)
    if source is None:
        return License()
    path = models.find_folder(source) / models.CARD_FILE
    if not path.is_file():
        return License()
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # Whatever a YAML reader raises of somebody else's file: it says nothing.
        return License()
    found, title, link = (data.get(one) for one in ("license", "license_name", "license_link"))
    if not isinstance(found, str):
        return License()
    if link is not None and "://" not in str(link):
        link = None if name is None else f"https://huggingface.co/{name}/blob/main/{link}"
    return License(found, title, link, "the base model's card")


def languages_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Detects Chinese (`zh`) and English (`en`), each where one text in twenty or more is in it.

    Chinese is detected by its script, English by its most frequent words; no others are detected.
    """
    counts = {"zh": 0, "en": 0}
    total = 0
    for text in texts:
        total += 1
        words = _WORD.findall(text.lower())
        num_han = len(_HAN.findall(text))
        num_common = sum(word in _COMMON_ENGLISH for word in words)
        if num_han > len(words):
            counts["zh"] += 20 * len(_OTHER_EAST_ASIAN.findall(text)) < num_han
        else:
            counts["en"] += bool(words) and 5 * num_common >= len(words)
    found = sorted(counts, key=lambda name: -counts[name])
    return tuple(name for name in found if total and counts[name] >= _LEAST_SHARE * total)


def texts_of(
    sources: Sequence[SourceConfig], prompts: Sequence[pathlib.Path], *, limit: int = _READ_OF_EACH
) -> Iterable[str]:
    """Yields some dialogues of each file, and some prompts, each as one text.

    Args:
        sources: of the dialogues; names on the Hub are not looked up.
        prompts: files of prompts; those that are not there are left out.
        limit: the most of each file.
    """
    for source in sources:
        for path in filter(_is_there, source.paths):
            for one in itertools.islice(read_dialogues(path, **source.reading()), limit):
                yield "\n".join(message.content for message in one.messages)
    for file in filter(_is_there, prompts):
        for prompt in itertools.islice(read_prompts(file), limit):
            yield "\n".join(message.content for message in prompt.messages)


def _is_there(path: str | os.PathLike[str]) -> bool:
    return as_path(path).exists()


def policy_card(
    run: Run,
    release: Mapping[str, Any],
    origin: Origin,
    *,
    title: str,
    num_weights: int,
    num_samples: int,
    same_tokens: bool,
) -> str:
    """Returns the policy's card.

    Args:
        run: the files of the run.
        release: of `release.json`: `policy`, `sentence`, and `best_of_n` where that is released.
        origin: of the model.
        title: of the run.
        num_weights: of the model.
        num_samples: sample answers to be shown.
        same_tokens: True if the chat template gives exactly the tokens of training.

    Raises:
        ValueError: the card cannot be read back.
    """
    name = release["policy"]
    evaluation = None if name == "folder" else run.evaluation
    held_out = _data_name(origin, "prompts")
    results = (
        []
        if evaluation is None
        else model_card_figures.policy_results(name, evaluation, data=held_out)
    )
    limits = _limits(origin, num_weights)
    values: dict[str, Any] = {
        "best_of_n": _best_of_n(release),
        "data_table": "" if name == "folder" else model_card_figures.data_table(run),
        "settings_table": model_card_figures.settings_table(run, _STAGES[name]),
        "samples": [] if name == "folder" else _samples(run, name, num_samples),
        "same_tokens": same_tokens,
        "held_out_table": "",
        "suites_table": "",
    }
    # Best-of-n has the weights of SFT, whose single responses the suites are about.
    weights = "sft" if name == "best_of_n" else name
    if run.suites is not None and weights in run.suites["models"]:
        results += model_card_figures.suite_results(weights, run.suites)
        values |= _suites(run.suites, limits)
    if evaluation is not None:
        limits.insert(0, f"The judge: {model_card_figures.judge_in_words(evaluation['judge'])}")
        values |= _evaluated(evaluation, held_out)
    return _card(
        "policy_card.md",
        values,
        origin,
        pipeline_tag="text-generation",
        tags=["medical", "huatuogpt", "rlaif"],
        results=results,
        title=f"{title}: {_TITLES[name]}",
        sentence=release["sentence"],
        limits=limits,
    )


def reward_card(
    run: Run,
    origin: Origin,
    normalization: Normalization | None,
    *,
    title: str,
    num_weights: int,
    is_of_run: bool,
) -> str:
    """Returns the reward model's card.

    Args:
        run: the files of the run.
        origin: of the model.
        normalization: of its scores.
        title: of the run.
        num_weights: of the model.
        is_of_run: True if the run has trained it, so that the run's figures are its own.

    Raises:
        ValueError: the card cannot be read back.
    """
    report = run.reward if is_of_run else None
    limits = [
        "Scores tell answers to the same prompt apart. They are no measure of medical correctness.",
        *_limits(origin, num_weights),
    ]
    values: dict[str, Any] = {
        "usage": usage(normalization),
        "data_table": model_card_figures.data_table(run) if is_of_run else "",
        "settings_table": model_card_figures.settings_table(run, _STAGES["best_of_n"][:-1])
        if is_of_run
        else "",
        "accuracy_table": "",
    }
    results = []
    if report is not None:
        results = model_card_figures.reward_results(report, data=_data_name(origin, "comparisons"))
        values |= _accuracy(report)
        if run.labels is not None:
            judges = dict.fromkeys(part["judge"] for part in run.labels["judges"])
            limits[:0] = [
                f"Whom it imitates: {model_card_figures.judge_in_words(one)}" for one in judges
            ]
    return _card(
        "reward_card.md",
        values,
        origin,
        pipeline_tag="text-classification",
        tags=["reward-model", "medical", "huatuogpt", "rlaif"],
        results=results,
        title=f"{title}: the reward model",
        sentence="One score for a dialogue that ends with the doctor: higher is better.",
        limits=limits,
    )


def _card(
    template: str,
    values: Mapping[str, Any],
    origin: Origin,
    *,
    pipeline_tag: str,
    tags: list[str],
    results: list[EvalResult],
    title: str,
    sentence: str,
    limits: Sequence[str],
) -> str:
    """Renders a card's metadata and body, and reads them back as the Hub does."""
    license = origin.license
    metadata = ModelCardData(
        base_model=origin.base_model,
        datasets=list(origin.datasets) or None,
        language=list(origin.languages) or None,
        library_name="transformers",
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        pipeline_tag=pipeline_tag,
        tags=tags,
        model_name=plain(title) if results else None,
        eval_results=results or None,
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown; `huatuo_jax.core.markdown` has made every value safe.
    )
    body = environment.get_template(template).render(
        **values,
        title=inline(title),
        sentence=inline(sentence),
        limits=limits,
        advice=ADVICE,
        folder=USAGE_FOLDER,
        base=origin.base,
        languages=", ".join(origin.languages) or "not known",
        license=_license(origin),
        data=_data_name(origin, "dialogues"),
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body.rstrip()}\n"
    read = ModelCard(text)
    assert read.data.to_dict() == metadata.to_dict(), "a card's metadata is what is read back"
    return text


def _license(origin: Origin) -> str:
    found = origin.license
    if found.id is None:
        return "unknown: neither the run's config nor a card of the base model names one"
    name = f" ({inline(found.name)})" if found.name is not None else ""
    return f"{inline(found.id)}{name}, as {found.told_by} says"


def _data_name(origin: Origin, what: str) -> str:
    if origin.is_clinic:
        return f"{what} of huatuo_jax's clinic, an invented world"
    named = ", ".join(origin.datasets)
    return f"{what} of {inline(named)}" if named else f"{what} of the run's own files"


def _limits(origin: Origin, num_weights: int) -> list[str]:
    found = []
    if origin.is_clinic:
        found.append(
            "The data is written by a small invented world of consultations. What was learned "
            "there is no medicine, and says nothing of real patients."
        )
    if num_weights < _SMALL:
        found.append(
            f"The model is small ({num_weights:,} weights): it shows that the recipe works, and it "
            "knows what its data says and no more."
        )
    return [
        *found,
        "It may be wrong with confidence, leave out a danger, or repeat errors and biases of its "
        "data. It has been tried on the prompts above and on nothing else.",
    ]


def _best_of_n(release: Mapping[str, Any]) -> dict[str, Any] | None:
    if release["policy"] != "best_of_n":
        return None
    how = release["best_of_n"]
    rule = ", ".join(f"{inline(name)} {inline(value)}" for name, value in how["score"].items())
    return {
        "n": how["n"],
        "temperature": f"{how['temperature']:g}",
        "max_new_tokens": how["max_new_tokens"],
        "rule": rule,
    }


def _evaluated(evaluation: Mapping[str, Any], held_out: str) -> dict[str, Any]:
    """Returns a policy card's values that come from the evaluation."""
    sampling, divergence = evaluation["sampling"], evaluation["kl"]["per_sequence"]
    release = evaluation["release"]
    return {
        "held_out_table": model_card_figures.held_out_table(evaluation),
        "evaluated": (
            f"{evaluation['num_prompts']} held-out {held_out}, {sampling['num_samples']} answers "
            f"of each model to each at temperature {sampling['temperature']:g}, of at most "
            f"{sampling['max_new_tokens']} tokens; in brackets 95 % intervals over prompts."
        ),
        "judged": f"Compared in both orders by {inline(evaluation['judge'])}:",
        "comparisons_table": model_card_figures.comparisons_table(evaluation),
        "divergence": f"KL divergence of PPO from SFT: {interval(divergence)} nats an answer.",
        "warnings": [inline(one) for one in release["warnings"]],
    }


def _suites(suites: Mapping[str, Any], limits: list[str]) -> dict[str, Any]:
    """Returns a policy card's values that come from the suites, and tells the judge's limits."""
    judge, settings = suites["judge"], suites["settings"]
    judged = ""
    if judge is not None:
        name = str(judge["judge"])
        judged = f" Comparisons and grades are those of {inline(name)}."
        told = f"The judge: {model_card_figures.judge_in_words(name)}"
        if told not in limits:
            limits.insert(0, told)
    limited = settings["limit"]
    drawn = "" if limited is None else f" At most {limited} items of each set were drawn."
    return {
        "suites_table": model_card_figures.suites_table(suites),
        "suites_told": (
            "One response of each model to each prompt, at temperature "
            f"{settings['temperature']:g}, of at most {settings['max_new_tokens']} tokens; in "
            f"brackets 95 % intervals.{drawn}{judged} Evaluated with huatuo_jax "
            f"{inline(suites['versions']['huatuo_jax'])}."
        ),
    }


def _accuracy(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a reward model card's values that come from its held-out report."""
    rows = [
        ["reward model", interval(report["accuracy"]), number(report["loss"])],
        [
            "length alone",
            interval(report["length_baseline"]["accuracy"]),
            number(report["length_baseline"]["loss"]),
        ],
        [
            "reward model above length",
            interval(report["accuracy_above_length_baseline"]),
            number(None),
        ],
    ]
    probes = [
        [
            inline(one["name"]),
            f"the {inline(one['chosen'])} one" + (" (neither is right)" if one["neutral"] else ""),
            interval(one["accuracy"]),
            interval(one["length_accuracy"]),
            number(one["accuracy"]["num_pairs"] if one["accuracy"] else 0),
        ]
        for one in report.get("probes", ())
    ]
    head = ["what differs", "scores higher", "reward model", "length alone", "pairs"]
    return {
        "num_pairs": number(report["num_pairs"]),
        "num_prompts": number(report["num_cases"]),
        "accuracy_table": table(["", "accuracy", "loss"], rows),
        "probes_table": table(head, probes) if probes else "",
    }


def _samples(run: Run, name: str, number_of_them: int) -> list[str]:
    """Returns the first prompts with the first answer to each, each as a code block."""
    found = []
    for record in run.answers[name][:number_of_them]:
        turns = [
            (_SPEAKERS[one["role"]], one["content"])
            for one in record["messages"]
            if one["role"] in _SPEAKERS
        ]
        turns.append(("This model", record["answers"][0]["text"]))
        found.append(fenced("\n".join(f"{who}: {_cut(said)}" for who, said in turns)))
    return found


def _cut(text: str) -> str:
    whole = plain(text)
    return whole if len(whole) <= _TURN_CHARACTERS else f"{whole[:_TURN_CHARACTERS]} ... (cut)"
