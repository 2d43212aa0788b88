"""Tests of huatuo_jax.ppo."""
