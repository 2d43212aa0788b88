"""Make training data of the paper's four kinds by a teacher model, within a budget.

python launch/synthesize.py --kind=distilled_instruction --output=FILE.jsonl
python launch/synthesize.py --kind=real_conversation --source=FILE --output=FILE.jsonl --max_cost=20
    --teacher=openai:NAME --base_url=URL

The key is taken from OPENAI_API_KEY. With `--dry_run` nothing is sent, and the cost is printed.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("synthesize")
