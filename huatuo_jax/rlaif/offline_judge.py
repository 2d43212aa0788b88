"""Which offline judge a run has, told from the prompts that are judged."""

import os
from collections.abc import Iterator

from huatuo_jax.data.accounting import placed
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.data.records import Prompt
from huatuo_jax.feedback.questions import read_answered
from huatuo_jax.feedback.truth_judge import has_truth, is_of_clinic
from huatuo_jax.rlaif.config import RlaifConfig


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
        ValueError: the clinic's judge is asked for, or its fields are given, and a prompt is none
            that it knows. Or a file of prompts cannot be read.
        OSError: a file of prompts is not there.
    """
    judged = list(_judged(cfg, workdir))
    foreign = [place for _, place, prompt in judged if not is_of_clinic(prompt)]
    try:
        chosen = cfg.with_offline_judge("rubric" if foreign or not judged else "clinic")
    except ValueError as error:
        raise ValueError(f"config.judge: {error}; {_why(len(judged), foreign)}") from error
    own, judging = cfg.evaluation.judge is not None, chosen.ppo.judging
    judges = {
        "labels": ("judge.offline", None if cfg.judge.base_url else chosen.judge.offline),
        "evaluation": ("evaluation.judge" if own else "judge.offline", chosen.evaluation.judge),
    }
    if judging is not None and judging.judge is not None:
        offline = None if judging.judge.base_url else judging.judge.offline
        judges["ppo"] = ("ppo.judging.judge.offline", offline)
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
    judging = cfg.ppo.judging
    if "ppo" in cfg.stages and judging is not None and judging.prompts is not None:
        for place, prompt in placed(read_prompts(judging.prompts)):
            yield "ppo", place, prompt
    if "evaluation" in cfg.stages:
        for place, prompt in placed(read_prompts(cfg.evaluation.prompts)):
            yield "evaluation", place, prompt


def _told(cfg: RlaifConfig, chosen: RlaifConfig, number: int, foreign: list[str]) -> str:
    if not number:
        return "judge: nothing is judged"
    why = _why(number, foreign)
    shown = {
        "clinic": "the clinic's, which knows the truth",
        "rubric": "the rubric, which is fixed",
    }
    labels, later = chosen.judge.offline, chosen.evaluation.judge
    assert labels != "auto" and later is not None
    reason = why if cfg.judge.offline == "auto" else f"judge.offline={cfg.judge.offline!r}"
    of_labels = shown[labels]
    if changes := chosen.judge.clinic_judge.changes:
        of_labels = f"the clinic's with {', '.join(changes)}"
    if cfg.judge.base_url is not None:
        of_labels = f"{cfg.judge.model or 'the model'} at {cfg.judge.base_url}"
    if of_labels == shown[later]:
        return f"judge: {of_labels} ({reason})"
    return f"judge: of the labels {of_labels}; of later answers {shown[later]} ({reason})"


def _why(number: int, foreign: list[str]) -> str:
    if foreign:
        return f"{len(foreign)} of {number} prompts are not the clinic's, such as {foreign[0]}"
    return f"all {number} prompts are the clinic's"
