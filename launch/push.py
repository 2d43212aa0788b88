"""Push a run to the Hugging Face Hub: policy, reward model, data; run again, it resumes.

python launch/push.py --run=runs/demo --repo=NAME [--what=policy,reward,data] [--dry_run]

Repositories are private unless --public is given. The token is that of --token (which other users
of the machine can see in its list of processes), of HF_TOKEN, or of the stored login
(`hf auth login`).
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("push")
