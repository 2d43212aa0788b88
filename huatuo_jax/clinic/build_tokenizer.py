"""Trains the tokenizer that ships with the clinic, on a clinic of fixed seed and sizes.

Run as `python -m huatuo_jax.clinic.build_tokenizer [TARGET]`; without a target it overwrites the
shipped one. Tables and grammar decide its bytes: run it again when they have changed.
"""

import os
import sys
import tempfile

from huatuo_jax.clinic.files import TOKENIZER, ClinicSizes, write_clinic
from huatuo_jax.data import build_tokenizer

SEED = 0
SIZES = ClinicSizes(
    dialogues=1_800,
    held_out_dialogues=0,
    prompts=0,
    held_out_prompts=0,
    cases=200,
    exams=200,
    pairs=0,
)


def build(target: str | os.PathLike[str]) -> None:
    """Writes the tokenizer's files into a folder."""
    with tempfile.TemporaryDirectory() as data:
        write_clinic(data, seed=SEED, sizes=SIZES)
        build_tokenizer.build(data, target)


if __name__ == "__main__":
    build(sys.argv[1] if len(sys.argv) > 1 else TOKENIZER)
