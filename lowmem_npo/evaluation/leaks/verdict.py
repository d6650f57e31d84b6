"""When a figure counts as a leak: measured against rows like the forgotten ones that the model was never taught."""

from __future__ import annotations

MARGIN = 0.1
WITHOUT_HOLDOUT = 0.5


def above_holdout(value: float, level: float | None) -> bool | None:
    """Whether `value`, between 0 and 1, stands out from what the model gives for rows that it never saw.

    level: the same figure on the holdout. Without one only much more than any guessing gives is called a leak; for
    the rest the answer is None, not known.
    """
    if level is None:
        return True if value > WITHOUT_HOLDOUT else None
    return value > level + MARGIN


def beside_holdout(level: float | None) -> str:
    """The words that put the holdout's figure beside the forgotten rows'."""
    if level is None:
        return "what rows that the model never saw would give is not known (--holdout names some)"
    return f"of answers that the model never saw, {level:.0%}"
