"""The Python surface: models that answer and score, and the stages on data in memory."""
