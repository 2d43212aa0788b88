"""Derives the settings of all stages from a base model's size and from what is trained of it.

Learning rates, and rows of an optimizer step or prompts of an iteration:

| parameters | trained | SFT | reward model | PPO: policy, critic | DPO |
|---|---|---|---|---|---|
| up to 50 M | weights | 5e-4, 8 rows | 2e-4, 8 rows | 5e-5, 5e-4; 20 times 64 prompts | 5e-5 |
| up to 3 B | weights | 2e-5, 64 rows | 1e-5, 64 rows | 1e-6, 5e-6; 200 times 128 | 1e-6 |
| more | adapters | 2e-4, 128 rows | 1e-4, 64 rows | 1e-5, 1e-4; 400 times 128 | 5e-6 |
| more | weights | 5e-5, 128 rows | 9e-6, 64 rows | 5e-7, 9e-6; 400 times 128 | 5e-7 |

Fine-tuning takes 3 epochs of rows of 2,048 tokens, and responses have up to 512; 512 and 128 for
the smallest; never more than the model has positions for, and a quarter of a row for a response.
The chat template is the tokenizer's own, if conversations can be trained in it: Qwen3's renders
earlier answers otherwise than the last one. Else it is ChatML where the tokenizer has its tokens,
and HuatuoGPT's where it has not.

The last line of the table is `paper_recipe`, the one before it `with_adapters`; adapters of a
smaller model have its rates, and the batches of their size. The others are choices of this project:
rates that fine-tuning of such models commonly takes, and smaller batches for the smaller data that
they see.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax

from huatuo_jax.backbone.config import PRESETS, BackboneConfig, ComputeConfig, preset
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.core.config import WORKDIR_MARK, load_card, replaced
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat.template import ChatTemplate, special_strings
from huatuo_jax.data.chat.templates import by_name, for_tokenizer
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.readers import source_names
from huatuo_jax.data.records import Message
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import ComparisonSource
from huatuo_jax.recipe.config import RlaifConfig, StagesConfig
from huatuo_jax.recipe.paper import paper_recipe, with_adapters
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = RlaifConfig | StagesConfig
Trained = Literal["weights", "adapters"]
Trainer = Literal["sft", "reward", "ppo", "dpo"]
FIRST = ("base_model", "trained", "data", "template", "max_length", "compute", "mesh")
"""Fields that other fields' defaults follow from; those given beside them replace what follows."""

_CONVERSATION = 2 * [Message("user", "a"), Message("assistant", "b")]
_CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}

LORA = LoraConfig(rank=64, alpha=128.0)
HELD_OUT = HeldOutConfig(share=0.1)
_RATES_OF_ADAPTERS: dict[Trainer, float] = {
    "sft": 2e-4,
    "reward": 1e-4,
    "ppo": 1e-5,
    "dpo": 5e-6,
}
_TRAINING = ("sft", "reward", "ppo")


class Hardware(NamedTuple):
    """Settings that fit a card's model on some hardware.

    Attributes:
        trained: weights or adapters.
        rows_at_once: rows of fine-tuning and of PPO that go through a model together, on all
            devices.
        reward_rows_at_once: the same of the reward model's rows, which are four times as long.
        slots: answers that are decoded at once; their keys and values take memory.
    """

    trained: Trained
    rows_at_once: int
    reward_rows_at_once: int
    slots: int


class Size(NamedTuple):
    """Settings of models of a size, where they differ from `paper_recipe`.

    Attributes:
        up_to: parameters.
        trained: by default.
        row_length: tokens.
        response_length: tokens.
        rows: of an optimizer step of fine-tuning, and of the reward model (DPO takes as many).
        rates: of fine-tuning, reward model, policy, critic and DPO, where weights are trained.
        num_prompts: of an iteration of PPO.
        num_iterations: of PPO.
        prompts: to learn from, at most.
    """

    up_to: float
    trained: Trained
    row_length: int
    response_length: int
    rows: tuple[int, int]
    rates: tuple[float, float, float, float, float]
    num_prompts: int
    num_iterations: int
    prompts: int

    def rate(self, stage: Trainer, trained: Trained) -> float:
        """Returns the learning rate of a stage."""
        if trained == "adapters":
            return _RATES_OF_ADAPTERS[stage]
        places: dict[Trainer, int] = {"sft": 0, "reward": 1, "ppo": 2, "dpo": 4}
        return self.rates[places[stage]]


SIZES = (
    Size(5e7, "weights", 512, 128, (8, 8), (5e-4, 2e-4, 5e-5, 5e-4, 5e-5), 64, 20, 1_000),
    Size(3e9, "weights", 2048, 512, (64, 64), (2e-5, 1e-5, 1e-6, 5e-6, 1e-6), 128, 200, 10_000),
    Size(
        math.inf, "adapters", 2048, 512, (128, 64), (5e-5, 9e-6, 5e-7, 9e-6, 5e-7), 128, 400, 20_000
    ),
)


def recipe(card: str = "rlaif", **fields: Any) -> Config:
    """Returns the config of a card, with fields replaced as on the command line.

    Args:
        card: see `config.load_card`.
        fields: by name; dots of a path are double underscores, as `sft__num_epochs=3`.

    Raises:
        ValueError: an unknown field, or an invalid value.
        OSError: the card or the base model cannot be read.
    """
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    first = {name: value for name, value in changes.items() if name.partition(".")[0] in FIRST}
    config = adapted(replaced(load_card(card), first))
    return replaced(config, {name: changes[name] for name in changes if name not in first})


def adapted(config: Config) -> Config:
    """Returns a config whose stages follow from its fields of `FIRST`.

    With a base model, model, template and settings of all stages are replaced; data, clinic, judge,
    stages, labels, export and report stay. `template`, `max_length`, `compute` and `mesh` are those
    of all training stages.

    Raises:
        ValueError: a base model of an unsupported family or without a tokenizer, or `trained` is
            given without a base model.
        OSError: the base model cannot be found.
    """
    if isinstance(config, StagesConfig):
        config = _with_data(config)
    if config.base_model is not None:
        base, size = _recipe_of(config)
        config = (
            _of_recipe(config, base)
            if isinstance(config, RlaifConfig)
            else _stages(config, base, size)
        )
    elif config.trained is not None:
        raise ValueError(f"trained={config.trained!r} needs a base_model")
    return replaced(config, _shared(config))


def on_hardware(
    config: RlaifConfig,
    name: str,
    *,
    template: str,
    hardware: str,
    settings: Mapping[str, Hardware],
) -> RlaifConfig:
    """Returns a card's recipe for a published base model on known hardware; downloads nothing.

    As `adapted`, with what follows from the hardware's memory.

    Args:
        config: the recipe to start from.
        name: of the base model, one that `checkpoint.models.architecture_of` knows.
        template: the chat template's name.
        hardware: one of the settings' names.
        settings: by the hardware's name.

    Raises:
        ValueError: there are no settings for the hardware.
    """
    if hardware not in settings:
        raise ValueError(f"hardware={hardware!r} must be one of {', '.join(settings)}")
    found = settings[hardware]
    config = dataclasses.replace(config, base_model=name, trained=found.trained)
    architecture, model = models.architecture_of(name), ModelConfig(directory=name)
    base = _settled(config, architecture, size_of(architecture), model, template=template)
    recipe = _of_recipe(config, base)
    return replaced(
        recipe,
        {
            "sft.micro_batch_size": found.rows_at_once,
            "reward.micro_batch_size": found.reward_rows_at_once,
            "ppo.micro_batch_size": found.rows_at_once,
            "answers.slots": found.slots,
            "ppo.rollout.slots": found.slots,
            "evaluation.slots": found.slots,
        },
    )


def check_adapted(config: RlaifConfig) -> None:
    """Checks that the stages agree with the config's fields of `FIRST`.

    Raises:
        ValueError: a field that no stage follows.
    """
    model = config.sft.model
    found: dict[str, Collection[Any]] = {
        "base_model": (model.directory, model.preset),
        "template": (config.sft.data.template,),
        "compute": [getattr(config, name).compute for name in _TRAINING],
        "mesh": [getattr(config, name).mesh for name in _TRAINING],
        "max_length": (config.sft.data.row_length,),
    }
    for name, values in found.items():
        value = getattr(config, name)
        if value is not None and value not in values:
            raise ValueError(
                f"config.{name}={value!r} is followed by no stage; huatuo_jax.recipe({name}=...) "
                "makes a config in which all stages do"
            )


def _shared(config: Config) -> dict[str, Any]:
    """Returns the stages' fields that are given once at the top of the config."""
    stages = [name for name in ("sft", "reward", "dpo", "ppo") if getattr(config, name, None)]
    changes: dict[str, Any] = {}
    for name in ("compute", "mesh"):
        if (value := getattr(config, name)) is not None:
            changes |= {f"{stage}.{name}": value for stage in stages}
    if config.template is not None:
        changes |= {f"{stage}.data.template": config.template for stage in stages}
        if isinstance(config, RlaifConfig):
            changes["evaluation.template"] = config.template
    if (length := config.max_length) is not None:
        for stage in stages:
            if stage == "sft":
                changes["sft.data.row_length"] = length
            elif stage == "ppo":
                assert config.ppo is not None
                response = config.ppo.rollout.max_new_tokens
                if response >= length:
                    raise ValueError(
                        f"max_length={length} must be more than "
                        f"ppo.rollout.max_new_tokens={response}"
                    )
                changes["ppo.data.max_prompt_tokens"] = length - response
            else:
                rows = getattr(config, stage).data.row_length
                changes[f"{stage}.data.max_length"] = length
                changes[f"{stage}.data.row_length"] = max(rows, 2 * length)
    return changes


def _recipe_of(config: Config) -> tuple[RlaifConfig, Size]:
    """Returns the paper's recipe for a base model with the settings of its size, and that size."""
    assert config.base_model is not None
    given = None if config.sft is None else config.sft.model.tokenizer
    architecture, model, template = _look_at(config.base_model, given)
    size = size_of(architecture)
    found = _settled(config, architecture, size, model, template=template.name)
    if template.default_system != type(template)().default_system:  # An export's own.
        found = replaced(found, {"sft.data.default_system": template.default_system})
    return found, size


def _settled(
    config: Config,
    architecture: BackboneConfig,
    size: Size,
    model: ModelConfig,
    *,
    template: str,
) -> RlaifConfig:
    """Returns the paper's recipe with the settings that follow from a base model's architecture."""
    assert config.base_model is not None
    found = _sized(paper_recipe(config.base_model, template=template), architecture, size)
    if (config.trained or size.trained) == "adapters":
        found = with_adapters(found, LORA)
    model = dataclasses.replace(model, lora=found.sft.model.lora)
    return replaced(found, {"sft.model": model, "prompts.limit": size.prompts})


def size_of(architecture: BackboneConfig) -> Size:
    """Returns the row of `SIZES` for a model."""
    number = num_parameters(architecture)
    return next(one for one in SIZES if number <= one.up_to)


def _of_recipe(config: RlaifConfig, found: RlaifConfig) -> RlaifConfig:
    """Returns the recipe `found` with data, judge, stages and outputs of `config`."""
    inputs = ("stages", "data", "data_encoding", "clinic", "judge", "labels")
    outputs = ("suites", "export", "report")
    limit = config.prompts.limit or found.prompts.limit
    return dataclasses.replace(
        found,
        **{name: getattr(config, name) for name in (*inputs, *outputs, *FIRST)},
        prompts=dataclasses.replace(config.prompts, limit=limit),
        sft=replaced(found.sft, {"data.sources": config.sft.data.sources}),
    )


def _stages(config: StagesConfig, found: RlaifConfig, size: Size) -> StagesConfig:
    """Returns the stages with the settings of a base model, from which the first one starts."""
    own = found.sft.model

    def model(now: ModelConfig) -> ModelConfig:
        made = WORKDIR_MARK in (now.directory or "")
        return dataclasses.replace(now, lora=own.lora) if made else own

    made: dict[str, Any] = {}
    if config.sft is not None:
        sources = {"data.sources": config.sft.data.sources, "clinic": config.sft.clinic}
        made["sft"] = replaced(found.sft, sources)
    if config.reward is not None:
        own_data = {
            "data.sources": config.reward.data.sources,
            "data.group_field": config.reward.data.group_field,
            "normalization_answers": config.reward.normalization_answers,
            "model": model(config.reward.model),
        }
        made["reward"] = replaced(found.reward, own_data)
    if config.dpo is not None:
        reward = found.reward
        rate = size.rate("dpo", "weights" if own.lora is None else "adapters")
        made["dpo"] = dataclasses.replace(
            config.dpo,
            model=model(config.dpo.model),
            data=dataclasses.replace(
                reward.data,
                sources=config.dpo.data.sources,
                group_field=config.dpo.data.group_field,
            ),
            optimizer=dataclasses.replace(config.dpo.optimizer, learning_rate=rate),
            batch_size=reward.batch_size,
            compute=reward.compute,
        )
    if config.ppo is not None:
        made["ppo"] = replaced(
            found.ppo,
            {
                "model": model(config.ppo.model),
                "reward_model": config.ppo.reward_model,
                "data.paths": config.ppo.data.paths,
                "data.reads": config.ppo.data.reads,
                "judging": config.ppo.judging,
            },
        )
    return dataclasses.replace(config, **made)


def _with_data(config: StagesConfig) -> StagesConfig:
    """Returns the stages with `data` as the first one's files."""
    if config.data is None:
        return config
    paths = tuple(config.data.split(","))
    first = config.stages[0]
    if first == "ppo":
        return replaced(config, {"ppo.data.paths": paths, "ppo.data.reads": "prompts"})
    named = list(zip(source_names(paths), paths, strict=True))
    if first == "sft":
        dialogues = tuple(SourceConfig(name=name, paths=(path,)) for name, path in named)
        return replaced(config, {"sft.data.sources": dialogues, "sft.clinic": None})
    pairs = tuple(ComparisonSource(name=name, paths=(path,)) for name, path in named)
    return replaced(config, {f"{first}.data.sources": pairs, f"{first}.data.group_field": None})


def num_parameters(architecture: BackboneConfig) -> int:
    """Counts the parameters of a backbone with its token head."""
    params = jax.eval_shape(
        lambda: init_params(jax.random.key(0), architecture, ComputeConfig(), head="lm")
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _look_at(name: str, tokenizer: str | None) -> tuple[BackboneConfig, ModelConfig, ChatTemplate]:
    """Returns architecture, model section and chat template of a base model."""
    if name in PRESETS:
        if tokenizer is None:
            raise ValueError(
                f"base_model={name!r} is a preset, whose weights are fresh and which has no "
                "tokenizer: give sft.model.tokenizer"
            )
        given = for_tokenizer(load_tokenizer(tokenizer))
        return preset(name), ModelConfig(preset=name, tokenizer=tokenizer), given
    try:
        architecture = models.architecture_of(name)
        source = load_tokenizer(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise type(error)(f"config.base_model={name!r}: {reason}") from error
    return architecture, ModelConfig(directory=name), _template_of(source)


def _template_of(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """Returns the tokenizer's own template if conversations can be trained in it, else another."""
    template = for_tokenizer(tokenizer)
    if template.name != "tokenizer":
        return template
    try:
        template.render(_CONVERSATION, tokenizer)
    except ValueError:
        chatml = _CHATML_TOKENS <= set(special_strings(tokenizer))
        return by_name("chatml" if chatml else "huatuogpt")
    return template


def _sized(recipe: RlaifConfig, architecture: BackboneConfig, size: Size) -> RlaifConfig:
    """Returns the paper's recipe with the settings of a size."""
    row = min(size.row_length, architecture.max_positions)
    response = min(size.response_length, row // 4)
    of_sft, of_reward, of_policy, of_critic, _ = size.rates
    small = size is SIZES[0]
    # All devices hold copies of a small model's weights while it generates.
    mesh = MeshConfig(data=-1, fsdp=1) if size is not SIZES[-1] else MeshConfig()
    changes = {
        "sft.data.row_length": row,
        "sft.data.held_out": HELD_OUT,
        "sft.optimizer.learning_rate": of_sft,
        "sft.batch_size": size.rows[0],
        "answers.sampling.max_new_tokens": response,
        "answers.mesh": mesh,
        "reward.data.max_length": row,
        "reward.data.row_length": 4 * row,
        "reward.data.held_out": HELD_OUT,
        "reward.optimizer.learning_rate": of_reward,
        "reward.batch_size": size.rows[1],
        "ppo.data.max_prompt_tokens": row - response,
        "ppo.optimizer.learning_rate": of_policy,
        "ppo.value.optimizer.learning_rate": of_critic,
        "ppo.rollout.num_prompts": size.num_prompts,
        "ppo.rollout.max_new_tokens": response,
        "ppo.rollout.mesh": mesh,
        "ppo.num_iterations": size.num_iterations,
        "evaluation.max_new_tokens": response,
        "evaluation.mesh": mesh,
    }
    if small:
        compute = ComputeSection()
        changes |= {f"{stage}.compute": compute for stage in ("sft", "reward", "ppo")}
        changes |= {
            "ppo.optimizer.warmup_steps": 2,
            "ppo.value.warmup_iterations": 2,
            "ppo.judging.every": 5,
            "ppo.loop.checkpoint_every": 5,
            "sft.loop.evaluate_every": 100,
            "reward.loop.evaluate_every": 100,
        }
    return replaced(recipe, changes)
