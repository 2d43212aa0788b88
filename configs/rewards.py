"""Rewards without a reward model, on the clinic: a verifier, a rubric, and length as the control.

    python launch/train.py --config=configs/rewards.py:diagnosis --workdir=runs/diagnosis
    python launch/train.py --config=configs/rewards.py:rubric --workdir=runs/rubric
    python launch/train.py --config=configs/rewards.py:length,runs/diagnosis --workdir=runs/length

Stages: fine-tuning on dialogues that ChatGPT would have written (both distilled kinds), then RLOO
with four answers a prompt. After a comma, the folder of a run whose fine-tuned model and clinic are
taken in place of others.
Rewards: `diagnosis` is 1 where an answer names the right disease, and none where the patient has
not told enough to know it; `rubric` is a sum of signed points over the most that there are, as
HuatuoGPT-3 has it, from the clinic's truth and not from a judge; `length` is the answer's tokens.
Hardware: any CPU.
"""

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.clinic.files import TOKENIZER, ClinicConfig, ClinicSizes
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.held_out_config import HeldOutRewardsConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.sft import SftConfig, clinic_sources
from huatuo_jax.training.dialogue_data import DataConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_positions=512,
    tie_embeddings=True,
)
COMPUTE = ComputeSection(query_chunk=64, loss_chunk=512)
DIAGNOSIS = RewardTerm(of="huatuo_jax.reward_functions.clinic:right_diagnosis", name="diagnosis")
RUBRIC = RewardTerm(of="huatuo_jax.reward_functions.clinic:clinic_rubric", name="rubric")
TERMS = {
    "diagnosis": DIAGNOSIS,
    "rubric": RUBRIC,
    "length": RewardTerm(of="length", weight=0.02),
}


def get_config(reward: str = "diagnosis") -> StagesConfig:
    """Returns the stages and their settings; the module describes the argument."""
    kind, _, run = reward.partition(",")
    if kind not in TERMS:
        raise ValueError(f"{kind!r} must be one of {', '.join(TERMS)}")
    ppo = _ppo(TERMS[kind], run or "{workdir}")
    return StagesConfig(ppo=ppo) if run else StagesConfig(sft=_sft(), ppo=ppo)


def _sft() -> SftConfig:
    return SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=str(TOKENIZER)),
        clinic=ClinicConfig(
            sizes=ClinicSizes(dialogues=6_000, prompts=1_500, held_out_prompts=214)
        ),
        data=DataConfig(
            sources=clinic_sources(("distilled_instruction", "distilled_conversation")),
            row_length=512,
        ),
        compute=COMPUTE,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_share=0.05, beta2=0.99),
        num_epochs=3,
        batch_size=1,
        loop=LoopConfig(evaluate_every=500, checkpoint_every=500, log_every=100),
    )


def _ppo(term: RewardTerm, run: str) -> PpoConfig:
    return PpoConfig(
        model=ModelConfig(directory=f"{run}/sft/model"),
        data=PromptsConfig(paths=(f"{run}/clinic/prompts.jsonl",), max_prompt_tokens=256),
        compute=COMPUTE,
        optimizer=OptimizerConfig(learning_rate=5e-4, decay="constant", weight_decay=0.0),
        value=ValueConfig(),
        estimator="rloo",
        rollout=RolloutConfig(
            num_prompts=32, answers_per_prompt=4, max_new_tokens=100, temperature=0.7
        ),
        score=ScoreConfig(scale="raw", penalty=0.5),
        reward=RewardMixConfig(terms=(term,), most_without=0.9),
        kl_coef=0.005,
        num_iterations=80,
        num_epochs=1,
        num_minibatches=2,
        held_out_rewards=HeldOutRewardsConfig(
            prompts=f"{run}/clinic/held_out_prompts.jsonl", every=10, num_prompts=None
        ),
        loop=PpoLoopConfig(checkpoint_every=10, samples_per_iteration=4, tensorboard=False),
    )
