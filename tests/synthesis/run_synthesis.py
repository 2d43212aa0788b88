"""Makes data against a server in a process of its own, to be killed.

python -m tests.synthesis.run_synthesis FLAGS_AS_JSON
"""

import dataclasses
import json
import sys

from huatuo_jax import synthesize
from huatuo_jax.synthesis import run as synthesis_run

QUICK = {"first_delay_s": 0.01, "max_delay_s": 0.05, "max_attempts": 12, "timeout_s": 20.0}


def run(flags):
    """Runs the command with short waits before a request is sent again."""
    chat_model = synthesis_run._chat_model

    def quick(given, model):
        cfg = chat_model(given, model)
        return dataclasses.replace(cfg, server=dataclasses.replace(cfg.server, **QUICK))

    synthesis_run._chat_model = quick
    try:
        synthesize.main(synthesize.Flags(**flags))
    finally:
        synthesis_run._chat_model = chat_model


def result(folder):
    """What must not depend on faults and kills."""
    report = json.loads((folder / "rows.jsonl.report.json").read_text(encoding="utf-8"))
    return (
        (folder / "rows.jsonl").read_bytes(),
        (folder / "rows.jsonl.rejected.jsonl").read_bytes(),
        {name: report[name] for name in ("yield", "labels", "rejections", "diversity", "lengths")},
    )


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
