"""What lies beside the weights of a Hugging Face model and is passed on with them."""

import pathlib

from huatuo_jax.checkpoint import tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

# As patterns. A family with code of its own keeps it: it is carried along and never run.
SIDE_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    *tokenizer.TOKENIZER_FILES,
    tokenizer.TEMPLATE_FILES,
    "*.py",
)


def side_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The side files that a model folder has."""
    return sorted(path for pattern in SIDE_FILES for path in folder.glob(pattern))
