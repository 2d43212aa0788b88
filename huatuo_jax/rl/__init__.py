"""The arithmetic of reinforcement learning from feedback: pure functions on arrays."""
