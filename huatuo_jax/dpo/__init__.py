"""Direct preference optimisation: comparisons in, a policy out, without a reward model."""
