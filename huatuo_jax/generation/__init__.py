"""Answers from a model: the cache, sampling, and the engine that keeps the accelerator busy."""
