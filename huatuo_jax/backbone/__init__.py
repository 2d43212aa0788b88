"""The transformer: its description, positions, attention, heads and adapters."""
