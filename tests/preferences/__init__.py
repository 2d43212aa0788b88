"""Tests of huatuo_jax.preferences."""
