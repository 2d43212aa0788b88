"""Makes data against a server in a process of its own, to be killed.

python -m tests.synthesis.run_synthesis FLAGS_AS_JSON
"""

import dataclasses
import json
import sys

from huatuo_jax import synthesize

QUICK = {"first_delay_s": 0.01, "max_delay_s": 0.05, "max_attempts": 12, "timeout_s": 20.0}


def run(flags):
    """Runs the command with short waits before a request is sent again."""
    chat_model = synthesize._chat_model

    def quick(given, model):
        cfg = chat_model(given, model)
        return dataclasses.replace(cfg, server=dataclasses.replace(cfg.server, **QUICK))

    synthesize._chat_model = quick
    try:
        synthesize.main(synthesize.Flags(**flags))
    finally:
        synthesize._chat_model = chat_model


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
