"""The transformer: its config, positions, attention, heads and adapters."""
