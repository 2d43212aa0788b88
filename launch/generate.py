"""Answer a file of prompts in bulk; run again after a kill, it resumes.

python launch/generate.py --model=DIR --prompts=FILE.jsonl --output=FILE.jsonl --num_samples=4
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("generate")
