"""Score every answer in a file with a reward model."""

from huatuo_jax import multi_host
from huatuo_jax.reward.score_file import ScoreConfig, score_file

Flags = ScoreConfig


@multi_host.joined()
def main(flags: ScoreConfig) -> None:
    """Score, and print how it went."""
    scored = score_file(flags)
    if multi_host.is_first():
        print(scored)
        print(f"written: {flags.output}")
