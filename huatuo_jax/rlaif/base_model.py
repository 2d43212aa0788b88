"""A base model of one's own: the settings that follow from its size and from what is trained.

Learning rates, and rows of an optimizer step or prompts of an iteration:

| parameters | trained | SFT | reward model | PPO: policy, critic |
|---|---|---|---|---|
| up to 50 M | weights | 5e-4, 8 rows | 2e-4, 8 rows | 5e-5, 5e-4; 20 times 64 prompts |
| up to 3 B | weights | 2e-5, 64 rows | 1e-5, 64 rows | 1e-6, 5e-6; 200 times 128 |
| more | adapters | 2e-4, 128 rows | 1e-4, 64 rows | 1e-5, 1e-4; 400 times 128 |
| more | weights | 5e-5, 128 rows | 9e-6, 64 rows | 5e-7, 9e-6; 400 times 128 |

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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.presets import PRESETS, preset
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.tokenizer import load_tokenizer
from huatuo_jax.config import replaced
from huatuo_jax.data.chat_pieces import special_strings
from huatuo_jax.data.held_out import HeldOutConfig
from huatuo_jax.data.records import Message
from huatuo_jax.data.templates import by_name
from huatuo_jax.rlaif.config import RlaifConfig
from huatuo_jax.rlaif.paper import paper_recipe, with_adapters
from huatuo_jax.sharding import MeshConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Trained = Literal["weights", "adapters"]
FIRST = ("base_model", "trained")
"""Fields of a recipe that other fields' defaults follow from."""

_CONVERSATION = 2 * [Message("user", "a"), Message("assistant", "b")]
_CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}

LORA = LoraConfig(rank=64, alpha=128.0)
HELD_OUT = HeldOutConfig(share=0.1)


class Hardware(NamedTuple):
    """What fits some hardware, of a model whose card says so.

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
        trained: unless told otherwise.
        row_length: tokens.
        response_length: tokens.
        rows: of an optimizer step of fine-tuning, and of the reward model.
        rates: of fine-tuning, reward model, policy and critic, where weights are trained.
        num_prompts: of an iteration of PPO.
        num_iterations: of PPO.
        prompts: to learn from, at most.
    """

    up_to: float
    trained: Trained
    row_length: int
    response_length: int
    rows: tuple[int, int]
    rates: tuple[float, float, float, float]
    num_prompts: int
    num_iterations: int
    prompts: int


SIZES = (
    Size(5e7, "weights", 512, 128, (8, 8), (5e-4, 2e-4, 5e-5, 5e-4), 64, 20, 1_000),
    Size(3e9, "weights", 2048, 512, (64, 64), (2e-5, 1e-5, 1e-6, 5e-6), 128, 200, 10_000),
    Size(math.inf, "adapters", 2048, 512, (128, 64), (5e-5, 9e-6, 5e-7, 9e-6), 128, 400, 20_000),
)


def adapted(config: RlaifConfig) -> RlaifConfig:
    """A recipe for its `base_model`: model, template and settings are replaced.

    Data, clinic, judge, stages, labels, export and report stay. Without a base model the recipe is
    returned as it is.

    Raises:
        ValueError: a base model of an unsupported family or without a tokenizer, or `trained` is
            given without a base model.
        OSError: the base model cannot be found.
    """
    name = config.base_model
    if name is None:
        if config.trained is not None:
            raise ValueError(f"trained={config.trained!r} needs a base_model")
        return config
    architecture, model, template = _look_at(name, config.sft.model.tokenizer)
    return _settled(config, architecture, model, template=template)


def on_hardware(
    config: RlaifConfig,
    name: str,
    *,
    template: str,
    hardware: str,
    settings: Mapping[str, Hardware],
) -> RlaifConfig:
    """A recipe for a published base model on known hardware, for a card; nothing is downloaded.

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
    recipe = _settled(
        config, models.architecture_of(name), ModelConfig(directory=name), template=template
    )
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


def _settled(
    config: RlaifConfig, architecture: BackboneConfig, model: ModelConfig, *, template: str
) -> RlaifConfig:
    """The recipe with the settings that follow from a base model that is known."""
    name = config.base_model
    assert name is not None
    size = next(one for one in SIZES if num_parameters(architecture) <= one.up_to)
    trained = config.trained or size.trained
    recipe = _sized(paper_recipe(name, template=template), architecture, size)
    if trained == "adapters":
        recipe = with_adapters(recipe, LORA, rows_at_once=1, slots=16)
        recipe = replaced(
            recipe,
            {f"{stage}.micro_batch_size": None for stage in ("sft", "reward", "ppo")}
            | {"ppo.rollout.slots": None},
        )
    model = dataclasses.replace(model, lora=recipe.sft.model.lora)
    data = dataclasses.replace(recipe.sft.data, sources=config.sft.data.sources)
    prompts = dataclasses.replace(config.prompts, limit=config.prompts.limit or size.prompts)
    return dataclasses.replace(
        recipe,
        base_model=name,
        trained=config.trained,
        sft=dataclasses.replace(recipe.sft, model=model, data=data),
        prompts=prompts,
        labels=config.labels,
        **{
            field: getattr(config, field)
            for field in ("stages", "data", "data_encoding", "clinic", "judge", "export", "report")
        },
    )


def num_parameters(architecture: BackboneConfig) -> int:
    """How many a backbone with its token head has."""
    params = jax.eval_shape(
        lambda: init_params(jax.random.key(0), architecture, ComputeConfig(), head="lm")
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _look_at(name: str, tokenizer: str | None) -> tuple[BackboneConfig, ModelConfig, str]:
    """Architecture, model section and chat template of a base model."""
    if name in PRESETS:
        if tokenizer is None:
            raise ValueError(
                f"base_model={name!r} is a preset, whose weights are fresh and which has no "
                "tokenizer: give sft.model.tokenizer"
            )
        return preset(name), ModelConfig(preset=name, tokenizer=tokenizer), "huatuogpt"
    try:
        architecture = models.architecture_of(name)
        source = load_tokenizer(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise type(error)(f"config.base_model={name!r}: {reason}") from error
    return architecture, ModelConfig(directory=name), _template_of(source)


def _template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own template where conversations can be trained in it."""
    if tokenizer.chat_template is None:
        return "huatuogpt"
    try:
        by_name("tokenizer").render(_CONVERSATION, tokenizer)
    except ValueError:
        return "chatml" if _CHATML_TOKENS <= set(special_strings(tokenizer)) else "huatuogpt"
    return "tokenizer"


def _sized(recipe: RlaifConfig, architecture: BackboneConfig, size: Size) -> RlaifConfig:
    """The paper's recipe with the settings of a size."""
    row = min(size.row_length, architecture.max_positions)
    response = min(size.response_length, row // 4)
    of_sft, of_reward, of_policy, of_critic = size.rates
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
