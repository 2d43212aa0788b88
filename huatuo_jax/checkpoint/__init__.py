"""Checkpoints: the Orbax store of a run, model directories, and conversion to Hugging Face."""
