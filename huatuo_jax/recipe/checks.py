"""Checks a run's inputs before its first stage compiles anything, and chooses its offline judge."""

import os
import pathlib
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.checkpoint import models
from huatuo_jax.core import distributed, sharding
from huatuo_jax.core.files import absolute, as_path
from huatuo_jax.data.accounting import Account, placed
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.chat.tokenizer_template import TokenizerTemplate, gives_the_tokens
from huatuo_jax.data.readers import read_comparisons, read_prompts
from huatuo_jax.data.records import Prompt
from huatuo_jax.data.tokenizing import tokenizer_hash
from huatuo_jax.evaluation.answers import EvaluationConfig
from huatuo_jax.evaluation.release import CANDIDATES
from huatuo_jax.evaluation.suite_run import SuiteRun
from huatuo_jax.evaluation.suite_settings import check_once, check_settings
from huatuo_jax.generation import weights
from huatuo_jax.generation.prompts import make_tasks
from huatuo_jax.hf.config import exported_layout
from huatuo_jax.hf.tokenizer import check_fits, load_tokenizer
from huatuo_jax.judge.offline import has_truth, is_of_clinic
from huatuo_jax.judge.questions import read_answered
from huatuo_jax.ppo.held_out import open_held_out
from huatuo_jax.ppo.prompts import open_prompts
from huatuo_jax.ppo.rollout import mesh_of
from huatuo_jax.recipe.config import RELEASED, SUITES_FLAG, AnswersConfig, RlaifConfig
from huatuo_jax.training.initial_model import InitialModel, exported_tokenizer, open_model
from huatuo_jax.training.loop import check_rows
from huatuo_jax.training.stage import on_devices
from huatuo_jax.training.trackers import check_trackers


def check_inputs(cfg: RlaifConfig, workdir: str | os.PathLike[str], wanted: set[str]) -> None:
    """Checks the inputs of all stages that are still to be run.

    Files that an earlier stage of the run writes may be absent; all others must exist and be valid.

    Args:
        cfg: in its workdir.
        workdir: the run's folder.
        wanted: the stages that are to be run.

    Raises:
        ValueError: an invalid file or setting; names the field.
        OSError: a file or model does not exist.
    """
    model = open_model(cfg.sft.model, cfg.sft.compute.compute_config())
    template = cfg.sft.data.chat_template
    tokenizer = model.load_tokenizer("sft", template)
    if "sft" in wanted:
        _check_positions("sft.data.row_length", cfg.sft.data.row_length, model)
    for name, stage, value in (
        ("answers.model", "answers", cfg.answers.model),
        ("reward.model.directory", "reward", cfg.reward.model.directory),
        ("ppo.model.directory", "ppo", cfg.ppo.model.directory),
        ("ppo.reward_model", "ppo", cfg.ppo.reward_model),
        ("evaluation.base", "evaluation", cfg.evaluation.base),
        ("evaluation.sft", "evaluation", cfg.evaluation.sft),
        ("evaluation.ppo", "evaluation", cfg.evaluation.ppo),
        ("evaluation.reward", "evaluation", cfg.evaluation.reward),
        ("export.policy", "export", cfg.exported_policy),
        ("export.reward", "export", cfg.export.reward),
    ):
        if stage in wanted and value is not None:
            found = _check_model(name, value, cfg, tokenizer, workdir, made=_makers(wanted))
            _check_mesh(name, found or model.cfg, cfg)
    if "answers" in wanted:
        _check_prompts(
            "answers",
            cfg.answers,
            model,
            tokenizer,
            template,
            max_new_tokens=cfg.answers.sampling.max_new_tokens,
        )
    if "labels" in wanted and not _is_made(cfg.labels.answers, workdir, wanted, "answers"):
        read_answered(cfg.labels.answers)
    if "reward" in wanted:
        _check_positions("reward.data.max_length", cfg.reward.data.max_length, model)
        for source in cfg.reward.data.sources:
            for path in source.paths:
                if source.reads == "comparisons" and not _is_made(path, workdir, wanted, "labels"):
                    next(iter(read_comparisons(path)), None)
        for probe in cfg.reward.probes:
            for path in probe.paths:
                next(iter(read_comparisons(path, encoding=probe.encoding)), None)
    if "ppo" in wanted:
        _check_positions("ppo.data.max_prompt_tokens + rollout", cfg.ppo.max_length, model)
        # Too many long prompts must be reported now, and not after the reward model's training.
        open_prompts(
            cfg.ppo.data,
            tokenizer,
            max_new_tokens=cfg.ppo.rollout.max_new_tokens,
            stop_token_ids=template.stop_token_ids(tokenizer),
        )
        if cfg.ppo.judging is not None:
            open_held_out(cfg.ppo, tokenizer)
    if "evaluation" in wanted:
        _check_prompts(
            "evaluation",
            cfg.evaluation,
            model,
            tokenizer,
            template,
            max_new_tokens=cfg.evaluation.max_new_tokens,
        )
    check_settings(cfg.suites, flag=SUITES_FLAG)
    if "suites" in wanted and cfg.suites.suite:
        _check_suites(cfg, as_path(workdir))
    if "export" in wanted:
        sharding.host_mesh()  # Export needs the CPU's memory.
        _tell_other_tokens(template, tokenizer, model.cfg)
    for name, section in (("sft", cfg.sft), ("reward", cfg.reward), ("ppo", cfg.ppo)):
        if name in wanted:
            rows = f"config.{name}.micro_batch_size"
            mesh = section.mesh.make()
            of_devices, _ = on_devices(section, mesh, name=name, workdir=workdir)
            check_rows(of_devices.rows_at_once, name=rows, mesh=mesh)
            if distributed.is_first():
                check_trackers(section.loop.trackers)


def _check_suites(cfg: RlaifConfig, workdir: pathlib.Path) -> None:
    """Checks sets, judges and models of the suites; models of the run need not be there yet."""
    if distributed.count() > 1:
        raise ValueError(
            f"{SUITES_FLAG}suite={','.join(cfg.suites.suite)} needs one process, and there are "
            f"{distributed.count()}: leave it out, and run `huatuo evaluate` on the run's models"
        )
    check_once(cfg.suites.models, name=f"{SUITES_FLAG}models")
    chosen = cfg.suite_models
    SuiteRun(cfg.suites, chosen, workdir / "suites", flag=SUITES_FLAG)
    for name, one in chosen.items():
        if name not in CANDIDATES and not one.by_server:
            models.find_model(one.source)


def _tell_other_tokens(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, cfg: BackboneConfig
) -> None:
    """Prints a line if the exported chat template does not give the tokens of training."""
    exported = exported_tokenizer(template, tokenizer, model_type=exported_layout(cfg))
    if distributed.is_first() and not gives_the_tokens(template, exported):
        print(
            f"export: with this tokenizer ({type(tokenizer).__name__}) the chat template "
            f"{template.name!r} gives the text of training, but tokens that reach over the border "
            "of two turns; config.sft.data.template=chatml or tokenizer gives the same tokens",
            flush=True,
        )


def _makers(wanted: set[str]) -> dict[str, str]:
    """Maps each folder of the run that a stage of `wanted` will write to that stage."""
    return {
        folder: stage
        for folder, stage in (("base", "sft"), ("sft", "sft"), ("reward", "reward"), ("ppo", "ppo"))
        if stage in wanted
    }


def _is_made(path: str, workdir: str | os.PathLike[str], wanted: set[str], stage: str) -> bool:
    """Tells whether `stage` will write the file in this run."""
    inside = absolute(path).parent == absolute(workdir)
    return inside and stage in wanted


def _check_model(
    name: str,
    place: str,
    cfg: RlaifConfig,
    tokenizer: PreTrainedTokenizerBase,
    workdir: str | os.PathLike[str],
    *,
    made: dict[str, str],
) -> BackboneConfig | None:
    """Checks that a folder holds a model of the right kind with the run's tokenizer.

    Returns:
        Its architecture; None for a model that this run will write.
    """
    whole, run = absolute(place), absolute(workdir)
    is_of_run = run in whole.parents
    if is_of_run and whole.relative_to(run).parts[0] in made:
        return None
    try:
        info = models.find_model(place)
    except FileNotFoundError as error:
        names = f"; or one of {', '.join((RELEASED, *CANDIDATES))}"
        others = names if name == "export.policy" else ""
        raise FileNotFoundError(f"config.{name}: {error}{others}") from error
    # A reward model may begin with either head.
    is_reward = name in ("ppo.reward_model", "evaluation.reward", "export.reward")
    if is_reward != (info.head == "score") and name != "reward.model.directory":
        wanted = "a reward model, with a score head" if is_reward else "a model with a token head"
        raise ValueError(f"config.{name}={place!r} must be {wanted}")
    if is_of_run:  # Made by a stage of this run, with this very tokenizer.
        return info.cfg
    theirs = load_tokenizer(info.folder)
    if not _say_alike(theirs, tokenizer, cfg.sft.data.chat_template, info.cfg):
        raise ValueError(
            f"config.{name}={place!r} has another tokenizer than config.sft.model "
            f"({cfg.sft.model.tokenizer_source}): all models of a run share one"
        )
    check_fits(theirs, info.cfg.vocab_size, name=f"config.{name}={place!r}: its tokenizer")
    return info.cfg


def _say_alike(
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    template: ChatTemplate,
    cfg: BackboneConfig,
) -> bool:
    """Tells whether two tokenizers give the same tokens for every dialogue.

    Training writes its template beside the weights, so that of the files counts only where it is
    the run's, and what it needs of a tokenizer, which the base model's need not have.
    """
    is_own = template.name == TokenizerTemplate.name
    if not is_own:
        layout = exported_layout(cfg)
        one = exported_tokenizer(template, one, model_type=layout)
        other = exported_tokenizer(template, other, model_type=layout)
    if tokenizer_hash(one, chat_template=False) != tokenizer_hash(other, chat_template=False):
        return False
    return not is_own or template.to_jinja(one) == template.to_jinja(other)


def _check_mesh(name: str, backbone: BackboneConfig, cfg: RlaifConfig) -> None:
    """Checks that the mesh on which a model generates divides it."""
    if name == "ppo.model.directory":
        mesh_of(cfg.ppo.rollout, cfg.ppo.mesh.make(), backbone)
    for stage, section in (("answers", cfg.answers), ("evaluation", cfg.evaluation)):
        if name in (f"{stage}.model", f"{stage}.base", f"{stage}.sft", f"{stage}.ppo"):
            devices = sharding.make_mesh()
            weights.mesh_for(backbone, section.mesh, devices, field=f"config.{stage}.mesh")


def _check_positions(name: str, length: int, model: InitialModel) -> None:
    if length > model.cfg.max_positions:
        raise ValueError(
            f"config.{name}={length} must be at most the model's {model.cfg.max_positions} "
            "positions"
        )


def _check_prompts(
    name: str,
    cfg: AnswersConfig | EvaluationConfig,
    model: InitialModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_new_tokens: int,
) -> None:
    """Checks that the prompts can be read, and that enough of them leave room for a response."""
    account = Account("prompts")
    make_tasks(
        placed(read_prompts(cfg.prompts)),
        template,
        tokenizer,
        max_length=model.cfg.max_positions,
        max_new_tokens=max_new_tokens,
        drop_oldest_turns=True,
        least_new_tokens=1,
        account=account,
        purpose="to answer",
    )
    account.check(
        cfg.max_left_out_share,
        name=f"config.{name}.max_left_out_share",
        limit=f"the model's {model.cfg.max_positions} positions",
    )


def choose_offline_judge(
    cfg: RlaifConfig, workdir: str | os.PathLike[str]
) -> tuple[RlaifConfig, str]:
    """Puts the offline judge of a run's prompts in place of "auto".

    Args:
        cfg: in its workdir, whose files of prompts are written.
        workdir: the run's folder.

    Returns:
        The config, and a line that names the judge and the reason.

    Raises:
        ValueError: the clinic's judge or its fields are given and a prompt is not of the clinic, or
            a file of prompts cannot be read.
        OSError: a file of prompts does not exist.
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
    """Yields each prompt to be judged, with its stage and its place in a file."""
    if "labels" in cfg.stages:
        answers = cfg.labels.answers
        inside = absolute(answers).parent == absolute(workdir)
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
