"""HuatuoGPT-o1 on Llama-3.1-8B: fine-tuning on reasoning, then PPO against a verifier.

    export OPENAI_API_KEY=...
    python launch/train.py --config=configs/huatuogpt_o1_8b.py:verifiable.jsonl --workdir=runs/o1 \
        --config.ppo.reward.grader.judge.model=JUDGE

Settings are those of the paper's code (arXiv 2412.18925): fine-tuning at 5e-6 on rows of 8,192
tokens, 128 of them a step, three epochs; PPO at 5e-7, 128 problems of one response of at most 1,300
tokens at temperature .5 an iteration, three epochs of one step, KL .03, for 20,000 responses.
Data: `FreedomIntelligence/medical-o1-reasoning-SFT`, the reasoning trained before the response.
Prompts: after the colon, problems with the field `reference`, as `launch/synthesize.py
--kind=verifiable` makes them of exam questions.
Reward: 1 for `## Thinking` and `## Final Response` with a right answer, .1 for a wrong one, 0 for
another form. Whether it is right tells a judge; `configs/huatuogpt_o1_8b.py:FILE,exact` compares
texts and numbers instead and asks nobody. The paper's verifier is a classifier of 3B parameters:
the function `graded:classified` takes it, as a folder in Hugging Face format with two labels.
Choices, where ours differs: the critic starts from the policy (theirs from Llama-3.2-3B), and the
judge answers true or false, not with a probability.
Hardware: a TPU slice v5e-64 or a host of 8 H100s. What a device holds, without one:

    python launch/compile.py --config=configs/huatuogpt_o1_8b.py --topology=v5e:8x8
"""

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.reward_functions.grader import GraderConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

BASE = "meta-llama/Llama-3.1-8B-Instruct"
TEMPLATE = "llama3"
COMPUTE = ComputeSection(compute_dtype="bfloat16", remat="full", loss_chunk=512)
ROW_LENGTH = 8192
ANSWER_TOKENS = 1300
PROMPT_TOKENS = 748
POINTS = {"correct": 1.0, "wrong": 0.1, "invalid": 0.0}
OPENAI = "https://api.openai.com/v1"


def get_config(files: str = "{workdir}/verifiable.jsonl") -> StagesConfig:
    """Returns both stages and their settings; the module describes the argument."""
    prompts, _, match = files.partition(",")
    if match not in ("", "exact"):
        raise ValueError(f"{match!r} must be 'exact' or left out")
    return StagesConfig(sft=_sft(), ppo=_ppo(prompts, exact=match == "exact"))


def _sft() -> SftConfig:
    source = SourceConfig(
        name="medical_o1",
        paths=("FreedomIntelligence/medical-o1-reasoning-SFT",),
        adapter="huatuo_o1",
    )
    return SftConfig(
        model=ModelConfig(directory=BASE),
        data=DataConfig(
            sources=(source,),
            template=TEMPLATE,
            row_length=ROW_LENGTH,
            held_out=HeldOutConfig(share=0.005),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_share=0.05, weight_decay=0.1),
        num_epochs=3,
        batch_size=128,
        compute=COMPUTE,
        loop=LoopConfig(evaluate_every=100, checkpoint_every=100),
    )


def _reward(*, exact: bool) -> RewardMixConfig:
    if exact:
        of = "huatuo_jax.reward_functions.verifiers:medical_o1"
        return RewardMixConfig(terms=(RewardTerm(of=of, name="verifier", settings=POINTS),))
    of = "huatuo_jax.reward_functions.graded:verified"
    return RewardMixConfig(
        terms=(RewardTerm(of=of, name="verifier", settings=POINTS),),
        grader=GraderConfig(judge=JudgeConfig(base_url=OPENAI), concurrency=32, timeout_s=600.0),
    )


def _ppo(prompts: str, *, exact: bool) -> PpoConfig:
    return PpoConfig(
        model=ModelConfig(directory="{workdir}/sft/model"),
        data=PromptsConfig(paths=(prompts,), template=TEMPLATE, max_prompt_tokens=PROMPT_TOKENS),
        optimizer=OptimizerConfig(
            learning_rate=5e-7, decay="linear", warmup_share=0.05, weight_decay=0.0
        ),
        value=ValueConfig(start="policy"),
        rollout=RolloutConfig(
            num_prompts=128,
            max_new_tokens=ANSWER_TOKENS,
            temperature=0.5,
            mesh=MeshConfig(data=-1, fsdp=1, tensor=8),
        ),
        score=ScoreConfig(scale="raw", on_truncation="keep", penalty=None),
        reward=_reward(exact=exact),
        kl_coef=0.03,
        gamma=1.0,
        gae_lambda=0.95,
        num_iterations=156,
        num_epochs=3,
        compute=COMPUTE,
        loop=PpoLoopConfig(checkpoint_every=20),
    )
