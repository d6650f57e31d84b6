"""Evaluation: what was forgotten, what was kept, and what may still leak."""
