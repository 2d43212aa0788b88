"""Push a run to the Hugging Face Hub: policy, reward model, data; run again, it goes on.

python launch/push.py --run=runs/demo --repo=NAME [--what=policy,reward,data] [--dry_run]

Repositories are private unless --public is given. The token is that of --token (which other users
of the machine can see in its list of processes), of HF_TOKEN, or of the stored login
(`hf auth login`).
"""

import os

# Nothing is computed here, and no accelerator is to be taken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from huatuo_jax import command_line
from huatuo_jax.hub.config import PushConfig
from huatuo_jax.hub.push import push

_FLAGS = (
    flags.DEFINE_string("run", None, "The run's folder."),
    flags.DEFINE_string("repo", None, "The policy's repository, NAME or OWNER/NAME."),
    flags.DEFINE_list("what", ["policy", "reward"], "Some of policy, reward, data."),
    flags.DEFINE_string("reward_repo", None, "Default: REPO-reward-model."),
    flags.DEFINE_string("data_repo", None, "Default: REPO-data."),
    flags.DEFINE_bool("public", False, "Everyone may see it."),
    flags.DEFINE_bool("create_pr", False, "Open a pull request in place of a commit."),
    flags.DEFINE_string("revision", None, "Branch, made where it is missing; default: main."),
    flags.DEFINE_string("commit_message", None, "Title of the commit or pull request."),
    flags.DEFINE_string("data_license", "unknown", "Of the dataset, by the Hub's identifier."),
    flags.DEFINE_bool("dry_run", False, "Say what would be pushed, and send nothing."),
    flags.DEFINE_string("token", None, "Default: HF_TOKEN, then the stored login."),
    flags.DEFINE_string("endpoint", None, "The Hub; default: HF_ENDPOINT, huggingface.co."),
)
flags.mark_flags_as_required(["run", "repo"])


def main() -> None:
    """Push, and say what is where."""
    fields = {flag.name: flag.value for flag in _FLAGS}
    push(PushConfig(**fields | {"what": tuple(fields["what"])}))


if __name__ == "__main__":
    command_line.run(main)
