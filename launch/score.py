"""Score every answer in a file with a reward model.

python launch/score.py --model=DIR --input=FILE.jsonl --output=FILE.jsonl
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("score")
