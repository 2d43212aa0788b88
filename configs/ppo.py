"""PPO on the sample data: minutes on two cores, no download, no judge.

    python launch/train.py --config=configs/ppo.py --workdir=runs/ppo
    python launch/train.py --config=configs/ppo.py:SFT_DIR,REWARD_DIR --workdir=runs/ppo
    python launch/train.py --config=configs/ppo.py:SFT_DIR,REWARD_DIR,mine.jsonl --workdir=runs/mine

Hardware: any CPU. Without models' directories a short SFT stage and a short reward stage make them
first. The reward model then learns that the sample's answers are better than spoiled ones (see
`configs/reward.py`): its scores show that the loop works, and nothing about medicine.

Prompts: the first words of the patients in the sample's real dialogues; or, after the directories,
files of prompts of your own.

Other ways to go: `--config=configs/ppo.py:rloo` or `configs/ppo.py:grpo` (four answers a prompt in
place of a critic; before the directories where those are named, as `rloo,SFT_DIR,REWARD_DIR`),
`--config.ppo.kl_in=sequence_square`, `--config.ppo.target_kl_per_sequence=2`.

Curves are in `ppo/metrics.jsonl` (and TensorBoard), answers with score, KL and length in
`ppo/samples.jsonl`, the policy in `ppo/model`.
"""

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.records import KINDS
from huatuo_jax.ppo.config import (
    Estimator,
    PpoConfig,
    PpoLoopConfig,
    RolloutConfig,
    ScoreConfig,
    ValueConfig,
)
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.preferences.synthetic import WHOLE_DIALOGUE
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_positions=512,
    tie_embeddings=True,
)
HELD_OUT = HeldOutConfig(share=0.2)
CRITIC = ValueConfig(
    optimizer=OptimizerConfig(learning_rate=3e-4, decay="constant", weight_decay=0.0)
)


def get_config(models_and_files: str = "") -> StagesConfig:
    """Returns the stages and their settings; the module describes the argument."""
    given = models_and_files.split(",") if models_and_files else []
    estimator: Estimator = "gae"
    if given and given[0] in ("rloo", "grpo"):
        estimator = "grpo" if given.pop(0) == "grpo" else "rloo"
    if len(given) == 1:
        raise ValueError(f"{given[0]!r} is one directory; give an SFT model's and a reward model's")
    files = tuple(given[2:])
    sample_files = tuple(
        str(SAMPLE_FOLDER / f"{kind}.jsonl") for kind in KINDS if kind.startswith("real")
    )
    ppo = PpoConfig(
        model=ModelConfig(directory=given[0] if given else "{workdir}/sft/model"),
        reward_model=given[1] if given else "{workdir}/reward/model",
        data=PromptsConfig(
            paths=files or sample_files,
            reads="prompts" if files else "first_turns",
            max_prompt_tokens=128,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, decay="constant", warmup_steps=4, weight_decay=0.0
        ),
        value=CRITIC if estimator == "gae" else ValueConfig(),
        rollout=RolloutConfig(num_prompts=32, max_new_tokens=48)
        if estimator == "gae"
        else RolloutConfig(num_prompts=8, answers_per_prompt=4, max_new_tokens=48),
        score=ScoreConfig(clip=5.0),
        estimator=estimator,
        kl_coef=0.03,
        num_iterations=16,
        num_epochs=2,
        num_minibatches=2,
        loop=PpoLoopConfig(checkpoint_every=4, samples_per_iteration=4),
    )
    if given:
        return StagesConfig(ppo=ppo)
    return StagesConfig(sft=_short_sft(), reward=_short_reward(), ppo=ppo)


def _short_sft() -> SftConfig:
    sources = tuple(
        SourceConfig(name=kind, paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), kind=kind)
        for kind in KINDS
    )
    return SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=str(SAMPLE_FOLDER / "tokenizer")),
        data=DataConfig(sources=sources, row_length=512, held_out=HELD_OUT),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_share=0.05),
        num_epochs=2,
        batch_size=4,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=10),
    )


def _short_reward() -> RewardConfig:
    sources = tuple(
        ComparisonSource(paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), reads="dialogues_to_spoil")
        for kind in KINDS
    )
    return RewardConfig(
        model=ModelConfig(directory="{workdir}/sft/model"),
        data=ComparisonsConfig(
            sources=sources,
            max_length=512,
            row_length=2048,
            held_out=HELD_OUT,
            group_field=WHOLE_DIALOGUE,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_share=0.1),
        num_epochs=1,
        batch_size=2,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=10),
    )
