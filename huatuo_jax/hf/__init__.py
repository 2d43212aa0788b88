"""The Hugging Face layout: configs, weights and tokenizers, read and written."""
