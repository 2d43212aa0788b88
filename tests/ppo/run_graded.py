"""A process whose rewards come from a judge, to be killed: `run_graded.py WORKDIR JUDGE_URL`."""

import os
import sys

# The same arithmetic in every process, on one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import dataclasses
import pathlib

from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.ppo.reward_mix import MixedRewards
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.reward_functions.grader import Grader, GraderConfig
from tests.evaluation.scripted_server import KEY
from tests.ppo.tiny import PROMPT, config, run_tiny, token_text

NUM_ITERATIONS = 5
CONCURRENCY = 4


def graded_rewards(workdir, url, **fields):
    """Two criteria a response, graded by the judge at an address."""
    judge = JudgeConfig(base_url=url, model="scripted")
    mix = RewardMixConfig(
        terms=(
            RewardTerm(of="huatuo_jax.reward_functions.graded:rubric"),
            RewardTerm(of="length", weight=0.01, adjusts=True),
        ),
        grader=GraderConfig(judge=judge, concurrency=CONCURRENCY, **fields),
    )
    server = judge.openai("scripted")
    patient = dataclasses.replace(server.server, first_delay_s=0.01, max_delay_s=0.05)
    grader = Grader(
        mix.grader,
        pathlib.Path(workdir) / "ppo" / "graded",
        server=dataclasses.replace(server, server=patient),
        key=KEY,
    )
    rewards = MixedRewards(
        mix,
        scorer=None,
        normalization=None,
        decode=token_text,
        count_tokens=lambda text: len(text.split()),
        services={"grader": grader},
    )
    return mix, rewards


def prompts(number=24):
    """Prompts of the same tokens, each with a rubric of its own."""
    return [
        TokenPrompt(
            f"p{n}",
            PROMPT.token_ids,
            ({"role": "user", "content": f"{n}"},),
            {
                "rubrics": [
                    {"criterion": f"is like {n}", "points": 3},
                    {"criterion": f"is unlike {n}", "points": -1},
                ]
            },
        )
        for n in range(number)
    ]


def settings(mix):
    return config(
        num_iterations=NUM_ITERATIONS,
        reward=mix,
        score={"scale": "running"},
        loop={"checkpoint_every": 3, "samples_per_iteration": 8},
    )


if __name__ == "__main__":
    mix, rewards = graded_rewards(sys.argv[1], sys.argv[2])
    run_tiny(settings(mix), sys.argv[1], rewards=rewards, prompts=prompts())
