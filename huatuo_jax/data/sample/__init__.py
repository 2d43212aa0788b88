"""The sample data the project ships, so that the whole recipe runs with no download."""

import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent
