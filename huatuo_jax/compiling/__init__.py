"""Compiling a config for TPUs and GPUs without having any: memory, FLOPs and a roofline."""
