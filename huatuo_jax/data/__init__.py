"""Data: files read, mixed, rendered by a chat template, tokenized and packed into batches."""

import pathlib

SAMPLE_FOLDER = pathlib.Path(__file__).resolve().parent / "sample"
"""The sample data that the project ships: an example of each file format, with a tokenizer."""
