"""Makes training data of the four kinds by a teacher model, within a budget."""
