"""Talk to a model in the terminal, on this machine or behind any OpenAI-compatible server.

python launch/chat.py --model=DIR
python launch/chat.py --base_url=http://127.0.0.1:8000/v1
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("chat")
