"""How an optimizer step of fine-tuning scales with chips, as compiled for them without having them.

Every chip gets the same rows, so that the rows of a step grow with the chips (weak scaling); the
step is compiled for each slice by the program of `launch/compile.py`, and timed by its roofline.
Efficiency is the tokens a second and chip, over those of the first slice of the same model and
rows, once with computation, memory traffic and communication overlapping entirely and once with
none of them overlapping: a run lies between. Over several slices, `data` is the number of slices:
weights are divided within a slice, and only gradients cross the network between slices.

    python benchmarks/scaling.py
    python benchmarks/tables.py

Needs libtpu (`huatuo_jax[tpu]`), no TPU and a CPU for an hour; slices that the file of results
holds are left as they are.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

from absl import app, flags

from huatuo_jax.compiling.command import CompileConfig, compile_config
from huatuo_jax.core.config import load_card, replaced
from huatuo_jax.core.files import make_folder, write_file
from huatuo_jax.recipe.config import StagesConfig

_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/scaling.json", "File of the figures.")


class Place(NamedTuple):
    """A model on some slices.

    Attributes:
        card: under `configs`.
        topology: of a slice.
        num_slices: of that topology.
        rows: of a chip, in a step.
    """

    card: str
    topology: str
    num_slices: int
    rows: int

    def name(self) -> str:
        """Returns its key in the file of results."""
        return f"{self.card} {self.num_slices} x {self.topology}, {self.rows} rows a chip"


_SMALL, _PAPER = "qwen3_0_6b:v5e-8", "huatuogpt_7b"
PLACES = (
    *(
        Place(_SMALL, topology, 1, 2)
        for topology in ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
    ),
    Place(_SMALL, "v5e:16x16", 2, 2),
    # The paper's step has 128 rows: 2 a chip of 64, and 1 of 128.
    Place(_PAPER, "v5e:8x8", 1, 2),
    Place(_PAPER, "v5e:8x8", 1, 1),
    Place(_PAPER, "v5e:16x16", 1, 2),
    Place(_PAPER, "v5e:16x16", 1, 1),
    Place(_PAPER, "v5e:16x16", 4, 2),
)


def main(_: list[str]) -> None:
    """Compiles what the file of results does not hold yet."""
    output = pathlib.Path(_OUTPUT.value)
    found = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    for place in PLACES:
        if place.name() in found:
            continue
        found[place.name()] = compiled(place)
        make_folder(output.parent)
        ordered = {one.name(): found[one.name()] for one in PLACES if one.name() in found}
        write_file(output, json.dumps(ordered, indent=2) + "\n")


def compiled(place: Place) -> dict[str, Any]:
    """Compiles a step, and returns its figures.

    Raises:
        ValueError: it does not fit the chips.
    """
    _, shape = place.topology.split(":")
    chips = place.num_slices * math.prod(map(int, shape.split("x")))
    changes = {
        "sft.batch_size": place.rows * chips,
        "sft.micro_batch_size": place.rows * chips,
        "sft.mesh.data": place.num_slices,
        "sft.mesh.fsdp": -1,
    }
    config = StagesConfig(sft=replaced(load_card(place.card), changes).sft)
    cfg = CompileConfig(topology=place.topology, num_slices=place.num_slices, stages=("sft",))
    figures = compile_config(config, cfg, lambda line: print(line, flush=True))
    (program,) = figures["programs"]
    if not program["fits"]:
        raise ValueError(f"{place.name()}: does not fit")
    roofline = program["roofline"]
    parts = {name: roofline[f"{name}_s"] for name in ("compute", "memory", "interconnect")}
    return {
        **place._asdict(),
        "chips": chips,
        "tokens": program["tokens"],
        "memory_gib": round(program["memory_bytes_per_device"]["total"] / 2**30, 2),
        **{f"{name}_s": round(seconds, 4) for name, seconds in parts.items()},
        "binds": roofline["binds"],
        "utilisation": round(roofline["utilisation"], 4),
        "utilisation_without_overlap": round(roofline["utilisation_without_overlap"], 4),
        "versions": figures["versions"],
    }


if __name__ == "__main__":
    app.run(main)
