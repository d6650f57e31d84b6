"""Evaluation benchmarks: whose rows are whose, and how they are scored. contract.py says what one is."""
