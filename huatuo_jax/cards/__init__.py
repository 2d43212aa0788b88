"""Model cards: what a run's release is, how it was made, what it is worth, and how to load it."""
