"""The sample data the project ships: an example of each file format, with a tokenizer."""

import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent
