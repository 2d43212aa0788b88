"""Look into data files: counts, token lengths, errors by line, and samples with trained tokens.

python launch/inspect_data.py FILES... [--adapter=NAME] [--template=NAME] [--tokenizer=DIR]
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("inspect")
