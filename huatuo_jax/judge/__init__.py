"""Judges, what they say, and the comparisons that come of it."""
