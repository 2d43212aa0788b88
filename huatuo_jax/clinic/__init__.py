"""A small world of consultations with a known truth: diseases, dialogues, a judge, a patient."""
