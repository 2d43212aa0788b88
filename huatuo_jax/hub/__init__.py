"""Pushing what a run made to the Hugging Face Hub."""
