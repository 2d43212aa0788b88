"""What the models of a run are worth on prompts that none of them was trained on."""
