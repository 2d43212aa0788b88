"""Evaluation of a run's models on prompts and dialogues that none of them was trained on."""
