"""Labels a file against the planted server in a process of its own, to be killed.

python run_labeller.py URL ANSWERS OUTPUT PRICES PROTOCOL
"""

import sys

from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import RateLimits
from huatuo_jax.preferences.label import LabelRun, run_labels

CONCURRENCY = 12
LIMITS = RateLimits(requests=40, tokens=60_000, window_s=1.5)
MODEL = "planted-judge"


def run(url, answers, output, prices, protocol, say=print):
    server = ServerConfig(
        base_url=url,
        limits=LIMITS,
        timeout_s=5.0,
        max_attempts=8,
        first_delay_s=0.05,
        max_delay_s=0.5,
    )
    openai = OpenAIJudgeConfig(model=MODEL, server=server, prices=prices, max_tokens=600)
    cfg = LabelRun(
        answers=answers,
        output=output,
        openai=openai,
        label=LabelConfig(protocol=protocol, concurrency=CONCURRENCY),
    )
    return run_labels(cfg, say)


if __name__ == "__main__":
    run(*sys.argv[1:])
