"""A recipe of the smallest size: a model of a few thousand weights, a few dozen dialogues."""

import dataclasses
import pathlib

from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.clinic.files import ClinicConfig, ClinicSizes
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.evaluation.answers import EvaluationConfig
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.ppo.config import JudgingConfig, PpoConfig, PpoLoopConfig, RolloutConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.recipe.config import STAGES, AnswersConfig, RlaifConfig
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig, clinic_sources
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.tiny import TOKENIZER, backbone, write_rows

BACKBONE = backbone(num_layers=1, num_kv_heads=1)
HELD_OUT = HeldOutConfig(share=0.25)
LOOP = LoopConfig(evaluate_every=2, checkpoint_every=2, log_every=1, tensorboard=False)
ANSWER_TOKENS = 12
RUN_STAGES = tuple(name for name in STAGES if name not in ("synthesis", "suites"))
"""The stages of a recipe that names neither data to make nor suites, as this one."""

CLINIC = ClinicConfig(
    sizes=ClinicSizes(
        dialogues=24,
        held_out_dialogues=12,
        prompts=12,
        held_out_prompts=8,
        cases=2,
        exams=2,
        pairs=4,
    )
)


def write_dialogues(path: pathlib.Path, *, count: int = 24) -> None:
    """Questions with answers in the form that most people have them in."""
    rows = [
        {"question": f"咳嗽{index}天了，怎么办？", "answer": f"先多喝水，第{index}天来复查。"}
        for index in range(1, count + 1)
    ]
    write_rows(path, rows)


def tiny_recipe(data: pathlib.Path) -> RlaifConfig:
    """All stages, a step or two each."""
    optimizer = OptimizerConfig(learning_rate=1e-2)
    return RlaifConfig(
        sft=SftConfig(
            model=ModelConfig(backbone=BACKBONE, tokenizer=TOKENIZER),
            data=DataConfig(
                sources=(SourceConfig(name="mine", paths=(str(data),)),),
                row_length=128,
                held_out=HELD_OUT,
                num_threads=0,
            ),
            optimizer=optimizer,
            num_steps=4,
            batch_size=8,
            loop=LOOP,
        ),
        answers=AnswersConfig(
            num_samples=3, sampling=SamplingConfig(max_new_tokens=ANSWER_TOKENS), chunk_size=8
        ),
        reward=RewardConfig(
            model=ModelConfig(directory="{workdir}/sft/model"),
            data=ComparisonsConfig(
                sources=(ComparisonSource(paths=("{workdir}/comparisons.jsonl",)),),
                max_length=128,
                row_length=512,
                held_out=HELD_OUT,
            ),
            optimizer=optimizer,
            num_steps=4,
            batch_size=8,
            normalization_answers="{workdir}/answers.jsonl",
            loop=LOOP,
        ),
        ppo=PpoConfig(
            model=ModelConfig(directory="{workdir}/sft/model"),
            data=PromptsConfig(paths=("{workdir}/prompts.jsonl",), max_prompt_tokens=100),
            optimizer=optimizer,
            rollout=RolloutConfig(num_prompts=8, max_new_tokens=ANSWER_TOKENS),
            num_iterations=2,
            num_epochs=1,
            loop=PpoLoopConfig(checkpoint_every=1, tensorboard=False),
            judging=JudgingConfig(every=1, num_prompts=3),
        ),
        evaluation=EvaluationConfig(num_samples=2, max_new_tokens=ANSWER_TOKENS),
    )


def tiny_clinic_recipe() -> RlaifConfig:
    """The same on a clinic of a few dozen dialogues."""
    recipe = tiny_recipe(pathlib.Path("none"))
    sft, ppo = recipe.sft, recipe.ppo
    return dataclasses.replace(
        recipe,
        clinic=CLINIC,
        sft=dataclasses.replace(
            sft,
            model=dataclasses.replace(sft.model, tokenizer=str(clinic_files.TOKENIZER)),
            data=dataclasses.replace(sft.data, sources=clinic_sources(), row_length=256),
        ),
        reward=dataclasses.replace(
            recipe.reward, data=dataclasses.replace(recipe.reward.data, max_length=256)
        ),
        ppo=dataclasses.replace(ppo, data=dataclasses.replace(ppo.data, max_prompt_tokens=200)),
    )
