"""Push a run to the Hugging Face Hub: policy, reward model, data; run again, it resumes."""

import jax

from huatuo_jax.hub.config import PushConfig
from huatuo_jax.hub.push import push

Flags = PushConfig


def main(flags: PushConfig) -> None:
    """Push, and print what is where."""
    # Nothing is computed here, and no accelerator is to be taken.
    jax.config.update("jax_platforms", "cpu")
    push(flags)
