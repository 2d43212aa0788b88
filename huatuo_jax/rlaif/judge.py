"""A run's judges: chosen and reached before anything is trained, and not missed hours later."""

import os
from collections.abc import Iterator

import openai

from huatuo_jax.data.accounting import placed
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.data.records import Prompt
from huatuo_jax.feedback.completions import NoCompletion, read_json
from huatuo_jax.feedback.judgements import printable
from huatuo_jax.feedback.openai_judge import OpenAIJudgeConfig
from huatuo_jax.feedback.prices import read_price
from huatuo_jax.feedback.questions import read_answered
from huatuo_jax.feedback.server_calls import key_from_environment
from huatuo_jax.feedback.server_faults import scrubbed
from huatuo_jax.feedback.truth_judge import has_truth, is_of_clinic
from huatuo_jax.rlaif.config import LabelsConfig, RlaifConfig

_TIMEOUT_S = 20.0
_SHOWN = 8
_NO_LIST = (404, 405, 501)  # What servers say that answer chats and nothing else.


def choose_offline_judge(
    cfg: RlaifConfig, workdir: str | os.PathLike[str]
) -> tuple[RlaifConfig, str]:
    """Puts the offline judge of a run's prompts in place of "auto".

    Args:
        cfg: in its workdir, whose files of prompts are written.
        workdir: the run's folder.

    Returns:
        The config, and a line that says who judges, and why.

    Raises:
        ValueError: the clinic's judge is asked for, and a prompt is none that it knows. Or a file
            of prompts cannot be read.
        OSError: a file of prompts is not there.
    """
    judged = list(_judged(cfg, workdir))
    foreign = [place for _, place, prompt in judged if not is_of_clinic(prompt)]
    chosen = cfg.with_offline_judge("rubric" if foreign or not judged else "clinic")
    own = cfg.evaluation.judge is not None
    judges = {
        "labels": ("labels.offline", None if cfg.labels.base_url else chosen.labels.offline),
        "evaluation": ("evaluation.judge" if own else "labels.offline", chosen.evaluation.judge),
    }
    for stage, place, prompt in judged:
        field, judge = judges[stage]
        if judge == "clinic" and not has_truth(prompt):
            raise ValueError(
                f"config.{field}='clinic' judges prompts of the clinic alone, and {place} has "
                f"diagnosis={prompt.diagnosis!r}, which is none of its diseases: take 'auto' or "
                "'rubric'"
            )
    return chosen, _told(cfg, chosen, len(judged), foreign)


def _judged(cfg: RlaifConfig, workdir: str | os.PathLike[str]) -> Iterator[tuple[str, str, Prompt]]:
    """The stage that has a prompt judged, the prompt's place, and the prompt."""
    if "labels" in cfg.stages:
        answers = cfg.labels.answers
        inside = os.path.dirname(os.path.abspath(answers)) == os.path.abspath(workdir)
        if inside and "answers" in cfg.stages:
            for place, prompt in placed(read_prompts(cfg.answers.prompts)):
                yield "labels", place, prompt
        else:
            for one in read_answered(answers):
                yield "labels", f"{answers}: prompt {one.prompt.id!r}", one.prompt
    if {"ppo", "evaluation"} & set(cfg.stages):
        for place, prompt in placed(read_prompts(cfg.evaluation.prompts)):
            yield "evaluation", place, prompt


def _told(cfg: RlaifConfig, chosen: RlaifConfig, number: int, foreign: list[str]) -> str:
    if not number:
        return "judge: nothing is judged"
    why = f"all {number} prompts are the clinic's"
    if foreign:
        why = f"{len(foreign)} of {number} prompts are not the clinic's, such as {foreign[0]}"
    shown = {
        "clinic": "the clinic's, which knows the truth",
        "rubric": "the rubric, which is fixed",
    }
    labels, later = chosen.labels.offline, chosen.evaluation.judge
    assert labels != "auto" and later is not None
    reason = why if cfg.labels.offline == "auto" else f"labels.offline={cfg.labels.offline!r}"
    of_labels = shown[labels]
    if cfg.labels.base_url is not None:
        of_labels = f"{cfg.labels.model or 'the model'} at {cfg.labels.base_url}"
    if of_labels == shown[later]:
        return f"judge: {of_labels} ({reason})"
    return f"judge: of the labels {of_labels}; of later answers {shown[later]} ({reason})"


def reach_judge(cfg: LabelsConfig) -> OpenAIJudgeConfig | None:
    """Asks the server for its models, which costs nothing; None for the offline judge.

    Returns:
        What to ask; where the config names no model, the only one that the server has.

    Raises:
        ValueError: no key, a server that does not answer or does not have the model, several models
            to choose from, or a budget of money for a model without a price.
    """
    if cfg.base_url is None:
        return None
    key = key_from_environment()
    names = _models(cfg.base_url, key)
    if cfg.model is None and len(names or ()) != 1:
        there = ", ".join((names or ())[:_SHOWN]) or "none that it tells of"
        raise ValueError(
            f"config.labels.model is not given, and {cfg.base_url} has several models or none: "
            f"{there}; name the judge's"
        )
    if cfg.model is not None and names is not None and cfg.model not in names:
        raise ValueError(
            f"config.labels.model={cfg.model!r} is not at {cfg.base_url}, which has "
            f"{', '.join(names[:_SHOWN]) or 'none'}"
        )
    model = cfg.model or (names or [""])[0]
    if cfg.max_cost is not None and read_price(model, cfg.prices) is None:
        raise ValueError(
            f"config.labels.max_cost={cfg.max_cost:g} needs a price for {model!r}: add it to a "
            "copy of the price table and name the copy by config.labels.prices"
        )
    return cfg.openai(model)


def _models(base_url: str, key: str) -> list[str] | None:
    """The names of the server's models; None where it answers but has no list."""
    client = openai.OpenAI(api_key=key, base_url=base_url, timeout=_TIMEOUT_S, max_retries=1)
    try:
        body = read_json(client.models.with_raw_response.list().content)
        listed = body.get("data") if isinstance(body, dict) else None
        if not isinstance(listed, list):
            return None
        ids = [one.get("id") for one in listed if isinstance(one, dict)]
        return [name for name in ids if isinstance(name, str)]
    except (openai.OpenAIError, NoCompletion) as error:
        if isinstance(error, openai.APIStatusError) and error.status_code in _NO_LIST:
            return None
        reason = printable(scrubbed(str(error), key))
        raise ValueError(
            f"the judge at {base_url} does not answer as it should: {reason} "
            "(config.labels.base_url, and the key in OPENAI_API_KEY)"
        ) from error
    finally:
        client.close()
