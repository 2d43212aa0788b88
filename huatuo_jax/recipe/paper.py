"""The recipe with the paper's settings, for base models of real size.

Fine-tuning is as published (arXiv 2305.15075 and the authors' training script). Of what follows it
the paper tells the steps and no numbers: those here are PPO's of HuatuoGPT-o1 (arXiv 2412.18925),
by the same group, and where nothing is published, choices of this project, marked as such.
"""

import dataclasses
from typing import Literal

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.evaluation.answers import EvaluationConfig
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.ppo.config import (
    JudgingConfig,
    PpoConfig,
    PpoLoopConfig,
    RolloutConfig,
    ScoreConfig,
    ValueConfig,
)
from huatuo_jax.ppo.prompts import PromptsConfig as PpoPrompts
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.recipe.config import AnswersConfig, LabelsConfig, PromptsConfig, RlaifConfig
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

PUBLISHED = SourceConfig(name="huatuogpt_sft", paths=("FreedomIntelligence/HuatuoGPT-sft-data-v1",))
OPENAI = "https://api.openai.com/v1"
COMPUTE = ComputeSection(compute_dtype="bfloat16", remat="full", loss_chunk=512)
ROW_LENGTH = 2048
ANSWER_TOKENS = 512  # A choice; prompts have what is left of the row.
HELD_OUT = HeldOutConfig(share=0.005)


def paper_recipe(directory: str, *, template: str = "huatuogpt", tensor: int = 8) -> RlaifConfig:
    """Returns the recipe with all stages, from a base model to a released one.

    The judge is OpenAI's API, and its model has to be named: the paper's ChatGPT is not served any
    more. Whatever answers like that API can take its place.

    Args:
        directory: of the base model, or its name on the Hub.
        template: the chat template's name.
        tensor: devices that share the weights while answers are generated, as each decode step
            reads all of them; it must divide the model's key/value heads, and the devices.
    """
    generation = MeshConfig(data=-1, fsdp=1, tensor=tensor)
    return RlaifConfig(
        prompts=PromptsConfig(limit=20_000),  # A choice.
        sft=_sft(directory, template),
        answers=AnswersConfig(
            num_samples=4,
            sampling=SamplingConfig(max_new_tokens=ANSWER_TOKENS),
            mesh=generation,
        ),
        judge=JudgeConfig(base_url=OPENAI),
        labels=LabelsConfig(label=LabelConfig(protocol="score")),
        reward=_reward(template),
        ppo=_ppo(template, generation),
        evaluation=EvaluationConfig(
            template=template, max_new_tokens=ANSWER_TOKENS, mesh=generation
        ),
    )


def with_adapters(
    recipe: RlaifConfig,
    lora: LoraConfig,
    *,
    rows_at_once: int | Literal["auto"] = "auto",
    slots: int | None = None,
) -> RlaifConfig:
    """Returns the recipe with adapters in place of all weights, for a single large device.

    In PPO policy, reference and critic share the frozen weights. Rates are choices: ten times
    those of all weights and more, as adapters want (arXiv 2106.09685, appendix D).

    Args:
        recipe: with all weights trained.
        lora: the adapters of every model.
        rows_at_once: rows of 2,048 tokens that go through a model together; `auto` for as many as
            fit the device's memory.
        slots: answers of a rollout that are decoded at once; their keys and values take memory.
    """

    def adapted(model: ModelConfig) -> ModelConfig:
        return dataclasses.replace(model, lora=lora)

    def at_rate(optimizer: OptimizerConfig, rate: float) -> OptimizerConfig:
        return dataclasses.replace(optimizer, learning_rate=rate, weight_decay=0.0)

    sft, reward, ppo = recipe.sft, recipe.reward, recipe.ppo
    # Its rows are four times as long.
    of_reward: int | Literal["auto"] = "auto"
    if isinstance(rows_at_once, int):
        of_reward = max(rows_at_once // 4, 1)
    critic = dataclasses.replace(
        ppo.value,
        start="shared",
        lora=lora,
        optimizer=at_rate(ppo.optimizer, 1e-4),
    )
    return dataclasses.replace(
        recipe,
        sft=dataclasses.replace(
            sft,
            model=adapted(sft.model),
            optimizer=at_rate(sft.optimizer, 2e-4),
            micro_batch_size=rows_at_once,
        ),
        reward=dataclasses.replace(
            reward,
            model=adapted(reward.model),
            optimizer=at_rate(reward.optimizer, 1e-4),
            micro_batch_size=of_reward,
        ),
        ppo=dataclasses.replace(
            ppo,
            model=adapted(ppo.model),
            optimizer=at_rate(ppo.optimizer, 1e-5),
            value=critic,
            rollout=dataclasses.replace(ppo.rollout, slots=slots),
            micro_batch_size=rows_at_once,
        ),
    )


def _sft(directory: str, template: str) -> SftConfig:
    return SftConfig(
        model=ModelConfig(directory=directory),
        data=DataConfig(
            sources=(PUBLISHED,),
            template=template,
            row_length=ROW_LENGTH,
            packed=True,
            held_out=HELD_OUT,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            decay="cosine",
            warmup_share=0.05,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        num_epochs=3,
        batch_size=128,
        compute=COMPUTE,
        loop=LoopConfig(evaluate_every=500, checkpoint_every=500),
    )


def _reward(template: str) -> RewardConfig:
    """Returns the reward model's config; its numbers are choices: one epoch against overfitting."""
    return RewardConfig(
        model=ModelConfig(directory="{workdir}/sft/model"),
        data=ComparisonsConfig(
            sources=(ComparisonSource(paths=("{workdir}/comparisons.jsonl",)),),
            template=template,
            max_length=ROW_LENGTH,
            row_length=4 * ROW_LENGTH,
            held_out=HELD_OUT,
        ),
        optimizer=OptimizerConfig(learning_rate=9e-6, warmup_share=0.05),
        num_epochs=1,
        batch_size=64,
        compute=COMPUTE,
        normalization_answers="{workdir}/answers.jsonl",
        loop=LoopConfig(evaluate_every=200, checkpoint_every=200),
    )


def _ppo(template: str, generation: MeshConfig) -> PpoConfig:
    """Returns PPO's config; rate, batch, epochs, KL, discount and clip are HuatuoGPT-o1's."""
    return PpoConfig(
        model=ModelConfig(directory="{workdir}/sft/model"),
        data=PpoPrompts(
            paths=("{workdir}/prompts.jsonl",),
            template=template,
            max_prompt_tokens=ROW_LENGTH - ANSWER_TOKENS,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-7, decay="constant", warmup_steps=10, weight_decay=0.0
        ),
        value=ValueConfig(
            optimizer=OptimizerConfig(learning_rate=9e-6, decay="constant", weight_decay=0.0),
            warmup_iterations=10,
        ),
        rollout=RolloutConfig(num_prompts=128, max_new_tokens=ANSWER_TOKENS, mesh=generation),
        score=ScoreConfig(clip=5.0),
        kl_coef=0.03,
        gamma=1.0,
        gae_lambda=0.95,
        num_epochs=3,
        num_iterations=400,
        judging=JudgingConfig(every=20, num_prompts=100),
        compute=COMPUTE,
        loop=PpoLoopConfig(checkpoint_every=20),
    )
