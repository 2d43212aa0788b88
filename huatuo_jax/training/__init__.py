"""Training: state, optimizer, update, loop, metrics and the run directory."""
