"""How often chance alone would show what was seen."""

from __future__ import annotations


def of_several(p: float, tries: int) -> float:
    """A p-value, where the best of so many `tries` was chosen (Bonferroni)."""
    return min(1.0, p * tries)
