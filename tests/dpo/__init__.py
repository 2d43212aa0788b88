"""Tests of huatuo_jax.dpo."""
