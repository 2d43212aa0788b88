"""Hugging Face model folders: configs, weights and tokenizers, read and written."""
