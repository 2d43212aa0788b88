"""HuatuoGPT in JAX: supervised fine-tuning, AI feedback, a reward model and PPO."""
