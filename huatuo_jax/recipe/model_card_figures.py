"""Makes the tables of the model cards: held-out figures, settings, data, and the Hub's metadata."""

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult

from huatuo_jax.clinic import judge as clinic_judge
from huatuo_jax.core.markdown import ABSENT, inline, interval, number, plain, table
from huatuo_jax.judge.offline import TRUTHS
from huatuo_jax.report.main_figures import count_of, main_figures
from huatuo_jax.report.run import MODELS, Run
from huatuo_jax.report.sections import MEASURES, NAMES

Figure = Mapping[str, Any]

_DIGITS = 4  # Of a figure in the metadata.

# The settings of each stage that its result depends on most, by their paths.
_SETTINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "sft": (
        ("learning rate", "optimizer.learning_rate"),
        ("schedule", "optimizer.decay"),
        ("weight decay", "optimizer.weight_decay"),
        ("epochs", "num_epochs"),
        ("steps, where given", "num_steps"),
        ("rows a step", "batch_size"),
        ("tokens a row", "data.row_length"),
        ("template", "data.template"),
        ("trained turns", "data.trained_turns"),
        ("adapters' rank (LoRA)", "model.lora.rank"),
        ("compute dtype", "compute.compute_dtype"),
        ("seed", "seed"),
    ),
    "answers": (
        ("answers a prompt", "num_samples"),
        ("temperature", "sampling.temperature"),
        ("top-p", "sampling.top_p"),
        ("tokens at most", "sampling.max_new_tokens"),
    ),
    "labels": (
        ("offline judge", "offline"),
        ("judge's model", "model"),
        ("protocol", "label.protocol"),
        ("criterion", "comparison.criterion"),
        ("ties", "comparison.ties"),
    ),
    "reward": (
        ("learning rate", "optimizer.learning_rate"),
        ("schedule", "optimizer.decay"),
        ("epochs", "num_epochs"),
        ("steps, where given", "num_steps"),
        ("rows a step", "batch_size"),
        ("tokens of an answer and its prompt at most", "data.max_length"),
        ("loss is divided by the number of", "denominator"),
        ("head alone", "head_only"),
        ("adapters' rank (LoRA)", "model.lora.rank"),
    ),
    "ppo": (
        ("learning rate", "optimizer.learning_rate"),
        ("critic's learning rate", "value.optimizer.learning_rate"),
        ("iterations", "num_iterations"),
        ("passes over a rollout", "num_epochs"),
        ("minibatches", "num_minibatches"),
        ("prompts a rollout", "rollout.num_prompts"),
        ("answers a prompt", "rollout.answers_per_prompt"),
        ("temperature", "rollout.temperature"),
        ("tokens at most", "rollout.max_new_tokens"),
        ("KL coefficient at first", "kl_coef"),
        ("KL target (nats an answer)", "target_kl_per_sequence"),
        ("discount", "gamma"),
        ("GAE lambda", "gae_lambda"),
        ("ratio's clip", "clip_low"),
        ("score's clip", "score.clip"),
        ("adapters' rank (LoRA)", "model.lora.rank"),
    ),
    "evaluation": (
        ("answers a prompt", "num_samples"),
        ("n of best-of-n", "best_of_n"),
        ("temperature", "temperature"),
        ("tokens at most", "max_new_tokens"),
        ("judge", "judge"),
    ),
}
_STAGES = {
    "sft": "fine-tuning",
    "answers": "answers",
    "labels": "labels",
    "reward": "reward model",
    "ppo": "PPO",
    "evaluation": "evaluation",
}


def settings_table(run: Run, stages: Iterable[str]) -> str:
    """Returns a table of the settings of finished stages; empty without any."""
    rows = []
    for stage in stages:
        if stage not in run.journal or run.journal[stage]["result"] is None:
            continue
        settings = run.journal[stage]["settings"]
        told = ((words, _at(settings, path)) for words, path in _SETTINGS[stage])
        said = [_shown(words, value) for words, value in told if not _is_off(value)]
        result = run.journal[stage]["result"]
        if stage == "ppo" and result.get("kept_iteration") is not None:
            said.append(f"kept the policy of iteration {result['kept_iteration']}")
        rows.append([_STAGES[stage], "; ".join(said)])
    return table(["stage", "settings"], rows) if rows else ""


def data_table(run: Run) -> str:
    """Returns a table of the dialogues, prompts, labels and comparisons used; empty without any."""
    rows: list[list[str]] = []
    if run.dialogues is not None:
        splits = {name: found["by_kind"] for name, found in run.dialogues["splits"].items()}
        kinds = dict.fromkeys(kind for by_kind in splits.values() for kind in by_kind)
        for kind in kinds:
            counts = [
                splits[name][kind]["examples"] if name in splits and kind in splits[name] else 0
                for name in ("train", "held_out")
            ]
            words = f"dialogues, {inline(kind.replace('_', ' '))}"
            rows.append([words, *(number(count) for count in counts)])
    if "prompts" in run.accounts:
        account = run.accounts["prompts"]
        used = [account["used"].get(name, 0) for name in ("to train on", "held out")]
        rows.append(["prompts", *map(number, used)])
        for purpose, count in account["set_aside"].items():
            rows.append([f"prompts, {inline(purpose)}", ABSENT, number(count)])
    if run.labels is not None:
        for part in run.labels["judges"]:
            words = f"judgements of answers by {inline(part['judge'])} ({part['protocol']})"
            rows.append([words, number(part["judgements"]), ABSENT])
    if run.reward is not None:
        trained, held_out = run.reward["comparisons"]["train_pairs"], run.reward["num_pairs"]
        rows.append(["comparisons", number(trained), number(held_out)])
    return table(["", "to learn from", "held out"], rows) if rows else ""


def held_out_table(evaluation: Mapping[str, Any]) -> str:
    """Returns a table of each model's measures on the held-out prompts, with intervals."""
    there = [name for name in MODELS if name in evaluation["models"]]
    rows = [
        [
            words,
            *(interval(evaluation["models"][name].get(field), digits=digits) for name in there),
        ]
        for field, words, digits in MEASURES
        if any(field in evaluation["models"][name] for name in there)
    ]
    losses = evaluation["held_out_loss"]
    if losses:
        shown = [losses[name]["eval/loss"] if name in losses else None for name in there]
        rows.append(["loss on held-out dialogues (nats a token)", *map(number, shown)])
    return table(["", *(NAMES[name] for name in there)], rows)


def comparisons_table(evaluation: Mapping[str, Any]) -> str:
    """Returns a table of the judge's shares of points between the models."""
    rows = [
        [
            _versus(pair),
            interval(found["share"]),
            *(number(found[name]) for name in ("wins", "ties", "losses", "failed")),
        ]
        for pair, found in evaluation["win_rates"].items()
    ]
    return table(["", "share of points", "wins", "ties", "losses", "no verdict"], rows)


def policy_results(name: str, evaluation: Mapping[str, Any], *, data: str) -> list[EvalResult]:
    """Returns the held-out figures of a run's model for the metadata of its card.

    Args:
        name: of the evaluation's model.
        evaluation: `evaluation.json`.
        data: name of the held-out prompts.
    """
    judge = plain(evaluation["judge"])
    found: list[tuple[str, str, Figure | None]] = [
        ("win_rate", f"share of points over {_versus(pair, 1)}, judged by {judge}", won["share"])
        for pair, won in evaluation["win_rates"].items()
        if pair.startswith(f"{name}_over_")
    ]
    model = evaluation["models"][name]
    found += [(f"truth_{truth}", TRUTHS[truth][0], model.get(f"truth_{truth}")) for truth in TRUTHS]
    found += [
        ("judge_overall", f"overall, 1 to 5, judged by {judge}", model.get("judge_overall")),
        ("reward", "reward model's normalised score", model.get("reward")),
        ("stopped", "share of answers that came to an end", model.get("stopped")),
    ]
    return [
        _result("text-generation", data, metric, words, figure)
        for metric, words, figure in found
        if figure is not None
    ]


def suite_results(name: str, suites: Mapping[str, Any]) -> list[EvalResult]:
    """Returns a model's main figures of the suites for the metadata of its card.

    Args:
        name: of the model in the results.
        suites: `suites/evaluation.json`.
    """
    found = []
    for one in main_figures(suites):
        figure = one.by_model.get(name)
        if figure is None or figure["value"] is None:
            continue
        low, high = (round(figure[end], _DIGITS) for end in ("low", "high"))
        told = {"low": low, "high": high, "confidence": 0.95, "num_items": count_of(figure)}
        if one.judged:
            told["judge"] = plain(str(suites["judge"]["judge"]))
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=one.suite,
                dataset_name=plain(one.dataset),
                dataset_config=None if one.set is None else plain(one.set),
                dataset_args={"limit": suites["settings"]["limit"]},
                metric_type=one.metric,
                metric_value=round(figure["value"], _DIGITS),
                metric_name=plain(one.words),
                metric_args=told | {"huatuo_jax": suites["versions"]["huatuo_jax"]},
            )
        )
    return found


def suites_table(suites: Mapping[str, Any]) -> str:
    """Returns a table of the main figures of the suites, of all models; empty without any."""
    models = list(suites["models"])
    rows = []
    for one in main_figures(suites):
        counts = {count_of(found) for found in one.by_model.values() if found is not None}
        items = " to ".join(number(count) for count in sorted({*counts}))
        shown = (interval(one.shown(model), digits=one.digits) for model in models)
        rows.append([inline(one.title), inline(one.dataset), items or ABSENT, *shown])
    names = (inline(NAMES.get(model, model)) for model in models)
    return table(["", "set", "items", *names], rows) if rows else ""


def reward_results(report: Mapping[str, Any], *, data: str) -> list[EvalResult]:
    """Returns the held-out figures of a reward model for the metadata of its card.

    Args:
        report: `reward_report.json`.
        data: name of the held-out comparisons.
    """
    found = [("accuracy", "agrees with the judge's comparisons", report["accuracy"])]
    for probe in report.get("probes", ()):
        metric = "accuracy" if not probe["neutral"] else "preference"
        words = plain(f"probe {probe['name']}: scores the {probe['chosen']} one higher")
        found.append((metric, words, probe["accuracy"]))
    return [_result("text-classification", data, *one) for one in found if one[2] is not None]


def judge_in_words(name: str) -> str:
    """Describes a judge and the limits of its verdicts, in Markdown."""
    if name.startswith(clinic_judge.NAME):
        return (
            f"{inline(name)} reads an answer by the grammar of a small invented world and holds it "
            "against that world's table of diseases. It knows no other patients and no medicine."
        )
    if name.startswith("offline"):
        return (
            f"{inline(name)} is a fixed rubric that counts measurable properties. It does not "
            "understand a sentence and knows no medicine."
        )
    return (
        f"{inline(name)} is a language model. Its verdicts are no doctor's, and it may prefer "
        "answers for their length, their place or their style."
    )


def _versus(pair: str, place: int | None = None) -> str:
    names = [NAMES[name] for name in pair.split("_over_")]
    return " over ".join(names) if place is None else names[place]


def _result(task: str, data: str, metric: str, words: str, figure: Figure) -> EvalResult:
    counts = {name: figure[name] for name in ("num_prompts", "num_pairs") if name in figure}
    low, high = (round(figure[end], _DIGITS) for end in ("low", "high"))
    return EvalResult(
        task_type=task,
        dataset_type="held-out",
        dataset_name=data,
        metric_type=metric,
        metric_value=round(figure["value"], _DIGITS),
        metric_name=words,
        metric_args={"low": low, "high": high, "confidence": 0.95} | counts,
    )


def _at(settings: Any, path: str) -> Any:
    """Returns the value at a path such as `optimizer.learning_rate`; None where it is absent."""
    for name in path.split("."):
        if not isinstance(settings, Mapping) or name not in settings:
            return None
        settings = settings[name]
    return settings


def _is_off(value: Any) -> bool:
    return value is None or value is False


def _shown(words: str, value: Any) -> str:
    if value is True:
        return words
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {inline(value)}"
