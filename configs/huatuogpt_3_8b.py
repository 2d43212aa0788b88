"""HuatuoGPT-3's reinforcement learning on Qwen3-8B: GRPO with rubrics and a grader.

    export OPENAI_API_KEY=none
    python launch/train.py --config=configs/huatuogpt_3_8b.py:problems.jsonl --workdir=runs/three

Settings are those of the paper's launcher (OnePO, FreedomIntelligence/HuatuoGPT-3): 128 problems of
8 responses of at most 8,000 tokens an iteration, in steps of 16 problems at 2e-6; clip from .2 to
.28 and 10 where the advantage is negative, a loss by tokens, no KL; groups of equal rewards are
drawn anew, 20 rounds at most; DAPO's penalty of overlong responses, .6 of it; 500 iterations.
Prompts: after the colon, a file whose records have `rubrics` (items of `criterion` and signed
`points`), or `options` and `answer` for multiple choice; both kinds are expected.
Reward: the share of the rubric's points that a response gains, from 0 to 1, by one call a response;
1 or 0 for a multiple choice. A response without a verdict has no reward.
Grader: the only model of the server at localhost:30001, such as HuatuoGPT-3-Grader-8B in vLLM or
SGLang; `--config.ppo.reward.grader.judge.base_url=` takes another. The questions' wording is ours.
Prompts may have 4,032 tokens instead of 4,000, so that rows are a multiple of the kernels' blocks.
Not built: a teacher's response in place of a student's (OnePO itself).
Hardware: a TPU slice v5p-16 or more. What a device holds, without one:

    python launch/compile.py --config=configs/huatuogpt_3_8b.py --topology=v5p:2x2x4
"""

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.reward_functions.grader import GraderConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.optimizer import OptimizerConfig

ANSWER_TOKENS = 8000
GRADER = GraderConfig(
    judge=JudgeConfig(base_url="http://localhost:30001/v1"), concurrency=64, timeout_s=600.0
)
TERMS = (
    RewardTerm(of="huatuo_jax.reward_functions.graded:rubric", settings={"rule": "huatuogpt_3"}),
    RewardTerm(of="huatuo_jax.evaluation.choice_reward:multiple_choice", name="choice"),
    RewardTerm(
        of="huatuo_jax.reward_functions.lengths:overlong",
        weight=0.6,
        adjusts=True,
        settings={"max_tokens": ANSWER_TOKENS, "buffer": 4000},
    ),
)


def get_config(prompts: str = "{workdir}/problems.jsonl") -> StagesConfig:
    """Returns the stage and its settings; `prompts` is a file of problems."""
    ppo = PpoConfig(
        model=ModelConfig(directory="Qwen/Qwen3-8B"),
        data=PromptsConfig(paths=(prompts,), template="tokenizer", max_prompt_tokens=4032),
        optimizer=OptimizerConfig(
            learning_rate=2e-6, decay="constant", warmup_steps=1, weight_decay=0.1
        ),
        rollout=RolloutConfig(
            num_prompts=128,
            answers_per_prompt=8,
            redraw_rounds=20,
            max_new_tokens=ANSWER_TOKENS,
            mesh=MeshConfig(data=-1, fsdp=1, tensor=8),
        ),
        score=ScoreConfig(scale="raw", on_truncation="keep", penalty=None),
        reward=RewardMixConfig(terms=TERMS, grader=GRADER),
        estimator="grpo",
        kl_coef=0.0,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=10.0,
        num_iterations=500,
        num_epochs=1,
        num_minibatches=8,
        compute=ComputeSection(compute_dtype="bfloat16", remat="full", loss_chunk=512),
        loop=PpoLoopConfig(checkpoint_every=60),
    )
    return StagesConfig(ppo=ppo)
