"""Serve models over HTTP: OpenAI's interface, reward scores, and a web page.

python launch/serve.py --model=DIR --reward_model=DIR
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("serve")
