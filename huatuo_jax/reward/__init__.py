"""The reward model: comparisons in, a score for any answer out."""
