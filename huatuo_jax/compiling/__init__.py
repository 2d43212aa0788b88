"""Compiling a config for TPUs and GPUs that are not there: does it fit, how fast can it be."""
