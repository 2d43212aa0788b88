"""Weights on disk: the Orbax store and the Hugging Face layout, both ways."""
