"""Runs the stages that a config names, or the whole recipe, and resumes them.

python launch/train.py --config=configs/rlaif.py --workdir=runs/demo [--config.sft.batch_size=8]
Run again, it resumes and skips finished stages. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.

The stages: huatuo_jax/sft.py, reward/stage.py, ppo/stage.py (whose update is in ppo/trainer.py) and
dpo.py. huatuo_jax/training/stage.py has the course of each.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("train")
