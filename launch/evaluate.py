"""Compare models on exams, patients' questions and consultations: figures and a page.

python launch/evaluate.py --model=DIR[,DIR...] --suite=NAME[,NAME...] --output=DIR
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("evaluate")
