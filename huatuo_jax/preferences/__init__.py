"""Comparisons of answers as tokens, and as the rows and batches of a run."""
