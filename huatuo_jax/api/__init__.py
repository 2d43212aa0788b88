"""The Python API: models that generate and score, and the stages on data in memory."""
