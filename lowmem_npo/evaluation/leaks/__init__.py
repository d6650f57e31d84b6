"""Leak tests: what a model that has forgotten may still give away. contract.py says what one is."""
