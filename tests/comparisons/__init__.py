"""Tests of huatuo_jax.comparisons."""
