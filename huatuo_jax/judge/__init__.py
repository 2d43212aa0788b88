"""Judges of answers: asking, paying, and recording and reporting what they say."""
