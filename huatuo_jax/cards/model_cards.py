"""The cards of a release, `README.md` of each model, in the form of the Hugging Face Hub."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from huatuo_jax.cards import figures
from huatuo_jax.cards.origin import Origin
from huatuo_jax.markdown import fenced, inline, interval, number, plain, table
from huatuo_jax.report.run import Run
from huatuo_jax.reward.export import USAGE_FOLDER, usage
from huatuo_jax.scoring import Normalization

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
    """The policy's card.

    Args:
        run: what the run's folder holds.
        release: of `release.json`: `policy`, `sentence`, and `best_of_n` where that is released.
        origin: where the model comes from.
        title: of the run.
        num_weights: of the model.
        num_samples: sample answers to be shown.
        same_tokens: whether the chat template gives the very tokens of training.

    Raises:
        ValueError: the card cannot be read back.
    """
    name = release["policy"]
    evaluation = None if name == "folder" else run.evaluation
    held_out = _data_name(origin, "prompts")
    results = [] if evaluation is None else figures.policy_results(name, evaluation, data=held_out)
    limits = _limits(origin, num_weights)
    values: dict[str, Any] = {
        "best_of_n": _best_of_n(release),
        "data_table": "" if name == "folder" else figures.data_table(run),
        "settings_table": figures.settings_table(run, _STAGES[name]),
        "samples": [] if name == "folder" else _samples(run, name, num_samples),
        "same_tokens": same_tokens,
        "held_out_table": "",
    }
    if evaluation is not None:
        limits.insert(0, f"The judge: {figures.judge_in_words(evaluation['judge'])}")
        values |= _evaluated(evaluation, held_out)
    return _card(
        "policy.md",
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
    """The reward model's card.

    Args:
        run: what the run's folder holds.
        origin: where the model comes from.
        normalization: of its scores.
        title: of the run.
        num_weights: of the model.
        is_of_run: whether the run has trained it, so that the run's figures are its own.

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
        "data_table": figures.data_table(run) if is_of_run else "",
        "settings_table": figures.settings_table(run, _STAGES["best_of_n"][:-1])
        if is_of_run
        else "",
        "accuracy_table": "",
    }
    results = []
    if report is not None:
        results = figures.reward_results(report, data=_data_name(origin, "comparisons"))
        values |= _accuracy(report)
        if run.labels is not None:
            judges = dict.fromkeys(part["judge"] for part in run.labels["judges"])
            limits[:0] = [f"Whom it imitates: {figures.judge_in_words(one)}" for one in judges]
    return _card(
        "reward.md",
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
    """Metadata and body in one text, which is read back as the Hub will."""
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
        autoescape=False,  # Markdown; `huatuo_jax.markdown` has made every value safe.
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
    """The parts of a policy's card that are of an evaluation."""
    sampling, divergence = evaluation["sampling"], evaluation["kl"]["per_sequence"]
    release = evaluation["release"]
    return {
        "held_out_table": figures.held_out_table(evaluation),
        "evaluated": (
            f"{evaluation['num_prompts']} held-out {held_out}, {sampling['num_samples']} answers "
            f"of each model to each at temperature {sampling['temperature']:g}, of at most "
            f"{sampling['max_new_tokens']} tokens; in brackets 95 % intervals over prompts."
        ),
        "judged": f"Compared in both orders by {inline(evaluation['judge'])}:",
        "comparisons_table": figures.comparisons_table(evaluation),
        "divergence": f"KL divergence of PPO from SFT: {interval(divergence)} nats an answer.",
        "warnings": [inline(one) for one in release["warnings"]],
    }


def _accuracy(report: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a reward model's card that are of its held-out report."""
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
    """The first prompts with the first answer to each, each as a block of code."""
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
