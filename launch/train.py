"""Run the stages of a config, or the whole recipe; run again, it resumes.

python launch/train.py --config=configs/rlaif.py --workdir=runs/demo [--config.sft.batch_size=8]
Run again, it resumes and skips finished stages. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("train")
