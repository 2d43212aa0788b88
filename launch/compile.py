"""Compile a config for TPUs or GPUs without one: does it fit, and how fast can it be at best?

python launch/compile.py --config=configs/huatuogpt_7b.py --topology=v5e:8x8 --output=FILE.json
python launch/compile.py --config=configs/huatuogpt_7b.py --topology=h100:8 --num_slices=2

From shapes alone: no weight and no data is read. Needs the extra of the hardware, and none of it:
pip install 'huatuo_jax[tpu]' or 'huatuo_jax[cuda]'.
Exit code 1 says that something does not fit; the fields that would help are named then.
"""

import sys

from absl import flags
from ml_collections import config_flags

from huatuo_jax import command_line
from huatuo_jax.compiling.command import (
    CompileConfig,
    compile_config,
    sweep_config,
    write_json,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "As launch/train.py takes it.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of all figures.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Try micro-batches and remat; recommend some.")
_FLAGS = (
    flags.DEFINE_string("topology", None, "Chip and slice, as v5e:8x8; or GPUs of a host, h100:8."),
    flags.DEFINE_integer("num_slices", 1, "So many slices or hosts, joined by their network."),
    flags.DEFINE_list("stages", [], "Some of the config's stages; default: all that train."),
    flags.DEFINE_string("preset", None, "Architecture in place of a model's directory."),
)
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """Compile, tell, write."""
    settings = {flag.name: flag.value for flag in _FLAGS}
    cfg = CompileConfig(**settings | {"stages": tuple(settings["stages"])})
    compiled = sweep_config if _SWEEP.value else compile_config
    figures = compiled(_CONFIG.value, cfg, lambda line: print(line, flush=True))
    if _OUTPUT.value is not None:
        write_json(_OUTPUT.value, figures)
        print(f"written: {_OUTPUT.value}")
    sys.exit(0 if figures["fits"] else 1)


if __name__ == "__main__":
    command_line.run(main)
