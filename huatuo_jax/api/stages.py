"""The training stages and the recipe as functions, on files or on data in memory.

Each takes the fields of its stage's config as keywords, runs in a workdir, resumes there if it is
called again, and returns the trained model.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

from huatuo_jax.api.in_use import ModelInUse, Settings
from huatuo_jax.api.models import Model, RewardModel, open_policy, open_reward_model
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.clinic.files import ClinicConfig
from huatuo_jax.core.files import as_path
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.python_data import DialogueLike, Rows, as_file, as_prompts
from huatuo_jax.dpo import DpoConfig, run_dpo
from huatuo_jax.dpo import Form as PairForm
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.ppo.config import (
    Denominator,
    Estimator,
    KlPlace,
    PpoConfig,
    PpoLoopConfig,
    Ratio,
    ReferenceSyncConfig,
    RolloutConfig,
    ScoreConfig,
    ValueConfig,
)
from huatuo_jax.ppo.held_out_config import HeldOutRewardsConfig
from huatuo_jax.ppo.judging import JudgingConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.ptx import PtxConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.preferences.rows import Denominator as PairsDenominator
from huatuo_jax.recipe.base_model import Trainer, size_of
from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.recipe import run_rlaif
from huatuo_jax.reward.config import ProbeConfig, RewardConfig
from huatuo_jax.reward.stage import run_reward
from huatuo_jax.reward_functions.functions import Function as RewardFunction
from huatuo_jax.reward_functions.functions import name_of
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.micro_batch import MicroBatchSize
from huatuo_jax.training.optimizer import OptimizerConfig

ModelLike = str | os.PathLike[str] | Model | RewardModel | ModelConfig
"""A folder of either format or a Hub id; a loaded model; or a section, for adapters or presets."""

Prompts = str | os.PathLike[str] | Iterable[DialogueLike]
"""A path, or dialogues: the user's message, messages, or rows of a file of prompts."""

Made = TypeVar("Made", bound=ModelInUse)
_ROW_LENGTH = 2048
_COMPARED_LENGTH = 1024
_PROMPT_LENGTH = 512
_HELD_OUT_SHARE = 0.1
_WARMUP_SHARE = 0.05


class _Common(TypedDict, total=False):
    """The fields of all stages."""

    optimizer: OptimizerConfig
    num_epochs: int
    micro_batch_size: MicroBatchSize
    seed: int
    compute: ComputeSection
    mesh: MeshConfig


class _Steps(_Common, total=False):
    """The fields of the stages that train on given data."""

    num_steps: int | None
    batch_size: int
    loop: LoopConfig


class SftFields(_Steps, total=False):
    """The fields of `huatuo_jax.sft.SftConfig`."""

    clinic: ClinicConfig | None
    samples: SamplesConfig


class RewardFields(_Steps, total=False):
    """The fields of `huatuo_jax.reward.config.RewardConfig`."""

    probes: tuple[ProbeConfig, ...]
    denominator: PairsDenominator
    margin_scale: float
    centring: float
    head_init: float
    head_only: bool
    normalization_answers: str | None


class DpoFields(_Steps, total=False):
    """The fields of `huatuo_jax.dpo.DpoConfig`."""

    beta: float
    form: PairForm
    label_smoothing: float
    per_token: bool
    sft_coef: float
    denominator: PairsDenominator


class PpoFields(_Common, total=False):
    """The fields of `huatuo_jax.ppo.config.PpoConfig`."""

    reward_model: str
    value: ValueConfig
    rollout: RolloutConfig
    score: ScoreConfig
    estimator: Estimator
    divide_by_deviation: bool
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    ratio: Ratio
    sampler_ratio_cap: float | None
    trains_on_truncated: bool
    stop_at_total_kl: float | None
    ptx: PtxConfig | None
    held_out_rewards: HeldOutRewardsConfig | None
    kl_coef: float
    kl_in: KlPlace
    target_kl_per_sequence: float | None
    kl_gain: float
    reference_sync: ReferenceSyncConfig | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    denominator: Denominator
    num_iterations: int
    num_minibatches: int
    stop_at_kl: float | None
    packed: bool
    loop: PpoLoopConfig
    judging: JudgingConfig | None


class _DataOptions(NamedTuple):
    """The keywords of a stage that make its section of data, where none is given."""

    template: str | None
    default_system: str | None
    max_length: int | None
    held_out_share: float | None


class _Template(TypedDict):
    """The fields of a section of data that say how its dialogues are rendered."""

    template: str
    default_system: str | None
    template_date: str | None


def sft(
    model: ModelLike,
    data: Rows | DataConfig,
    *,
    workdir: str | os.PathLike[str],
    template: str | None = None,
    default_system: str | None = None,
    max_length: int | None = None,
    held_out_share: float | None = None,
    **fields: Unpack[SftFields],
) -> Model:
    """Fine-tunes a model on dialogues; see `huatuo_jax.sft`.

    Args:
        model: to start from.
        data: dialogues, as a path or as rows in any format that files may have; or a section.
        workdir: the run's folder; the model is left in `{workdir}/sft/model`.
        template: chat template by name; None for the model's own, else HuatuoGPT's.
        default_system: its system text; None for the template's own.
        max_length: tokens of a row; None for 2,048, or the model's positions where they are fewer.
        held_out_share: of the dialogues, to evaluate on, chosen by their content; None for 0.1.
        **fields: of `SftConfig`; without `optimizer` and `batch_size` those that
            `huatuo_jax.recipe.base_model` has for models of this size.

    Raises:
        ValueError: invalid data, model or field, or a folder that holds another run.
        Interrupted: the run was stopped and saved; the same call resumes it.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    options = _DataOptions(template, default_system, max_length, held_out_share)
    if isinstance(data, DataConfig):
        _check_unused(**options._asdict())
        section, dialogues = _section(model), data
    else:
        section, backbone, rendered = _opened(model, template, default_system)
        dialogues = DataConfig(
            sources=(SourceConfig(name="data", paths=(as_file(data, workdir, "dialogues"),)),),
            row_length=max_length or min(_ROW_LENGTH, backbone.max_positions),
            held_out=_held_out(held_out_share),
            **rendered,
        )
    rows, optimizer = _of_size(section, "sft")
    chosen: SftFields = {"optimizer": optimizer, "batch_size": rows, **fields}
    cfg = SftConfig(model=section, data=dialogues, **chosen)
    return _trained(run_sft, cfg, workdir, "sft", open_policy)


def train_reward_model(
    model: ModelLike,
    comparisons: Rows | ComparisonsConfig,
    *,
    workdir: str | os.PathLike[str],
    template: str | None = None,
    default_system: str | None = None,
    max_length: int | None = None,
    held_out_share: float | None = None,
    **fields: Unpack[RewardFields],
) -> RewardModel:
    """Trains a score head, and the model under it, on comparisons; see `huatuo_jax.reward`.

    Args:
        model: to start from, usually the SFT model.
        comparisons: as a path or as rows, `{"messages", "chosen", "rejected"}` or any other format
            that files may have; or a section.
        workdir: the run's folder; the model is left in `{workdir}/reward/model`.
        template: as for `sft`.
        default_system: as for `sft`.
        max_length: tokens of a prompt and a response; None for 1,024, or the model's positions
            where they are fewer.
        held_out_share: of the prompts, to evaluate on, chosen by their content; None for 0.1.
        **fields: of `RewardConfig`; without `optimizer` and `batch_size` those that
            `huatuo_jax.recipe.base_model` has for models of this size.

    Raises:
        ValueError: as for `sft`, and so the others.
    """
    options = _DataOptions(template, default_system, max_length, held_out_share)
    section, data = _compared(model, comparisons, workdir, options)
    rows, optimizer = _of_size(section, "reward")
    chosen: RewardFields = {"optimizer": optimizer, "batch_size": rows, **fields}
    cfg = RewardConfig(model=section, data=data, **chosen)
    return _trained(run_reward, cfg, workdir, "reward", open_reward_model)


def dpo(
    model: ModelLike,
    comparisons: Rows | ComparisonsConfig,
    *,
    workdir: str | os.PathLike[str],
    template: str | None = None,
    default_system: str | None = None,
    max_length: int | None = None,
    held_out_share: float | None = None,
    **fields: Unpack[DpoFields],
) -> Model:
    """Trains a policy on comparisons directly; see `huatuo_jax.dpo`.

    Args:
        model: the policy to start from, which is the reference too.
        comparisons: as for `train_reward_model`.
        workdir: the run's folder; the model is left in `{workdir}/dpo/model`.
        template: as for `sft`.
        default_system: as for `sft`.
        max_length: as for `train_reward_model`.
        held_out_share: as for `train_reward_model`.
        **fields: of `DpoConfig`; without `optimizer` and `batch_size` those that
            `huatuo_jax.recipe.base_model` has for models of this size.

    Raises:
        ValueError: as for `sft`, and so the others.
    """
    options = _DataOptions(template, default_system, max_length, held_out_share)
    section, data = _compared(model, comparisons, workdir, options)
    rows, optimizer = _of_size(section, "dpo", weight_decay=0.0)
    chosen: DpoFields = {"optimizer": optimizer, "batch_size": rows, **fields}
    return _trained(
        run_dpo, DpoConfig(model=section, data=data, **chosen), workdir, "dpo", open_policy
    )


def ppo(
    policy: ModelLike,
    *,
    reward: str | os.PathLike[str] | RewardModel | RewardFunction | RewardMixConfig,
    prompts: Prompts | PromptsConfig,
    workdir: str | os.PathLike[str],
    template: str | None = None,
    default_system: str | None = None,
    max_prompt_tokens: int | None = None,
    **fields: Unpack[PpoFields],
) -> Model:
    """Trains a policy by PPO, or a relative of it, against a reward; see `huatuo_jax.ppo`.

    Args:
        policy: to start from, which is the reference too.
        reward: the reward model; a folder or Hub id, or a loaded one. Or a function of prompts,
            responses and columns, see `huatuo_jax.reward_functions`; or a weighted sum of these,
            whose reward model, where it has one, is the field `reward_model`.
        prompts: a path, or dialogues that end with the user; or a section.
        workdir: the run's folder; the model is left in `{workdir}/ppo/model`.
        template: as for `sft`.
        default_system: as for `sft`.
        max_prompt_tokens: tokens of a prompt; None for 512, or what the model's positions leave
            beside the response where that is less.
        **fields: of `PpoConfig`; without `optimizer` and `batch_size` those that
            `huatuo_jax.recipe.base_model` has for models of this size.

    Raises:
        ValueError: as for `sft`, and so the others.
    """
    if isinstance(prompts, PromptsConfig):
        _check_unused(
            template=template, default_system=default_system, max_prompt_tokens=max_prompt_tokens
        )
        section, data = _section(policy), prompts
    else:
        section, backbone, rendered = _opened(policy, template, default_system)
        rollout = fields["rollout"] if "rollout" in fields else RolloutConfig()
        room = backbone.max_positions - rollout.max_new_tokens
        if room < 1:
            raise ValueError(
                f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in "
                f"the model's {backbone.max_positions} positions"
            )
        data = PromptsConfig(
            paths=(_prompts_file(prompts, workdir),),
            max_prompt_tokens=max_prompt_tokens or min(_PROMPT_LENGTH, room),
            **rendered,
        )
    mix = _reward_mix(reward)
    if mix is None:
        if "reward_model" in fields:
            raise ValueError("reward_model: give the reward model as reward, or a sum of terms")
        assert not callable(reward) and not isinstance(reward, RewardMixConfig)
        folder = reward.folder if isinstance(reward, ModelInUse) else reward
        fields["reward_model"] = os.fspath(folder)
    _, optimizer = _of_size(section, "ppo", decay="constant", warmup_share=0.02, weight_decay=0.0)
    chosen: PpoFields = {"optimizer": optimizer, **fields}
    cfg = PpoConfig(model=section, data=data, reward=mix, **chosen)
    return _trained(run_ppo, cfg, workdir, "ppo", open_policy)


def _reward_mix(
    reward: str | os.PathLike[str] | RewardModel | RewardFunction | RewardMixConfig,
) -> RewardMixConfig | None:
    """Returns the terms of a reward; None for a reward model alone."""
    if isinstance(reward, RewardMixConfig):
        return reward
    if not callable(reward):
        return None
    name = getattr(reward, "__name__", "")
    label = name if name.isidentifier() else "function"
    return RewardMixConfig(terms=(RewardTerm(of=name_of(reward), name=label),))


def run_recipe(config: RlaifConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the whole recipe in a run's folder, resuming it; see `huatuo_jax.recipe`.

    Returns:
        The main figures; `released` says what is released, `report` is the report's path.

    Raises:
        ValueError: as for `sft`, and so the others.
    """
    return _run(run_rlaif, config, workdir)


def _run(
    stage: Callable[[Any, str | os.PathLike[str]], dict[str, Any]],
    cfg: Any,
    workdir: str | os.PathLike[str],
) -> dict[str, Any]:
    try:
        return stage(cfg, workdir)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _trained(
    stage: Callable[[Any, str | os.PathLike[str]], dict[str, Any]],
    cfg: Any,
    workdir: str | os.PathLike[str],
    name: str,
    open_made: Callable[..., Made],
) -> Made:
    """Runs a stage and opens its model; weights are read when they are first used."""
    result = _run(stage, cfg, workdir)
    return open_made(as_path(workdir) / name / "model", Settings(), result=result)


def _compared(
    model: ModelLike,
    comparisons: Rows | ComparisonsConfig,
    workdir: str | os.PathLike[str],
    options: _DataOptions,
) -> tuple[ModelConfig, ComparisonsConfig]:
    """Returns the sections of model and data of a stage that trains on comparisons."""
    if isinstance(comparisons, ComparisonsConfig):
        _check_unused(**options._asdict())
        return _section(model), comparisons
    section, backbone, rendered = _opened(model, options.template, options.default_system)
    limit = options.max_length or min(_COMPARED_LENGTH, backbone.max_positions)
    source = ComparisonSource(paths=(as_file(comparisons, workdir, "comparisons"),))
    data = ComparisonsConfig(
        sources=(source,),
        max_length=limit,
        row_length=2 * limit,
        held_out=_held_out(options.held_out_share),
        **rendered,
    )
    return section, data


def _section(model: ModelLike) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, ModelInUse):
        return ModelConfig(
            directory=str(model.folder), ignore_config_fields=model.ignored_config_fields
        )
    return ModelConfig(directory=os.fspath(model))


def _of_size(section: ModelConfig, stage: Trainer, **optimizer: Any) -> tuple[int, OptimizerConfig]:
    """Returns the rows of a step and the optimizer for a model of this size, with other fields."""
    size = size_of(open_model(section, ComputeConfig()).cfg)
    rate = size.rate(stage, "weights" if section.lora is None else "adapters")
    fields = {"learning_rate": rate, "warmup_share": _WARMUP_SHARE, **optimizer}
    return size.rows[stage != "sft"], OptimizerConfig(**fields)


def _opened(
    model: ModelLike, template: str | None, default_system: str | None
) -> tuple[ModelConfig, BackboneConfig, _Template]:
    """Returns a model's section, its backbone, and the fields that render its dialogues."""
    section = _section(model)
    try:
        backbone = open_model(section, ComputeConfig()).cfg
    except FileNotFoundError as error:
        raise ValueError(f"{section.directory} is no model: {error}") from error
    if template is None and isinstance(model, ModelInUse):
        found = model.template
    else:
        found = templates.for_tokenizer(load_tokenizer(section.tokenizer_source), template)
    if default_system is None and found.default_system != type(found)().default_system:
        default_system = found.default_system
    rendered = _Template(
        template=found.name,
        default_system=default_system,
        template_date=found.date if isinstance(found, templates.TokenizerTemplate) else None,
    )
    return section, backbone, rendered


def _prompts_file(prompts: Prompts, workdir: str | os.PathLike[str]) -> str:
    """Returns the path of prompts, writing dialogues in memory to a file."""
    if isinstance(prompts, str | os.PathLike):
        return os.fspath(prompts)
    rows = [one.to_json() for one in as_prompts(prompts, name="prompts")]
    return as_file(rows, workdir, "prompts")


def _held_out(share: float | None) -> HeldOutConfig:
    return HeldOutConfig(share=_HELD_OUT_SHARE if share is None else share)


def _check_unused(**given: object) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(f"{', '.join(names)}: say this in the section of data that is given")
