"""The clinic: a small synthetic world of consultations with a known truth, judge and patient."""
