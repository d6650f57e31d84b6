"""The unlearning step: its objective, its trainer, its rows, its reference, and what stops a run."""
