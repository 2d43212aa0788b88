"""Have the answers of a file judged, and make comparisons; run again after a kill, it resumes.

python launch/label.py --answers=FILE.jsonl --output=FILE.jsonl --judge=offline
python launch/label.py --answers=FILE.jsonl --output=FILE.jsonl --judge=MODEL --base_url=URL \
    --protocol=pairwise --max_cost=5 --comparisons=FILE.jsonl

The key is taken from OPENAI_API_KEY. With `--dry_run` nothing is sent, and the cost is printed.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("label")
