"""Proximal policy optimization of an answering model against a reward model."""
