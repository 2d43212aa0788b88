"""Run the stages that a config names, or the whole recipe, or go on with them.

python launch/train.py --config=configs/rlaif.py --workdir=runs/demo [--config.sft.batch_size=8]
Run again, it resumes and skips finished stages. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("train")
