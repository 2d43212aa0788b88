"""Preference pairs: made from judgements or dialogues, as tokens, rows and batches."""
