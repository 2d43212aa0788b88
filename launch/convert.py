"""Convert a model: Hugging Face to Orbax or back, decided by the source.

python launch/convert.py --source=DIR_OR_HUB_ID --target=DIR [--verify]
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("convert")
