"""Runs the command of lm-evaluation-harness with our model and task files.

python -m huatuo_jax.evaluation.harness --model huatuo --model_args pretrained=DIR \
    --tasks huatuo_cmb --metadata '{"cmb": "CMB-val-merge.json"}'

All flags are the harness's own; `--include_path` names our task files unless it is given.
"""

import os
import sys

from huatuo_jax.evaluation.harness.model import TASKS


def main() -> None:
    """Runs the command; what a user can cause ends in one line, code 1."""
    from lm_eval.__main__ import cli_evaluate

    if len(sys.argv) > 1 and not any(one.startswith("--include_path") for one in sys.argv):
        sys.argv += ["--include_path", os.fspath(TASKS)]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
