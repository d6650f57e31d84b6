"""How often chance alone would show what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance

EXPLAINS = 0.05  # chance explains what has a p-value from here on


def p_above(values: Sequence[float], others: Sequence[float]) -> float:
    """How often chance in which rows there are would set the mean of `values` so far above that of `others`, if the two
    were alike: the p-value of the one-sided t-test for unequal variances (Welch 1947). 1 where one row on a side leaves
    it open."""
    from scipy.special import stdtr  # late: it takes half a second

    if min(len(values), len(others)) < 2:
        return 1.0
    above = fmean(values) - fmean(others)
    errors = [variance(of) / len(of) for of in (values, others)]
    if not any(errors):  # all rows of a side are equal
        return 0.0 if above > 0 else 1.0
    freedom = sum(errors) ** 2 / sum(e**2 / (len(of) - 1) for e, of in zip(errors, (values, others), strict=True))
    return float(stdtr(freedom, -above / sqrt(sum(errors))))


def of_several(p: float, tries: int) -> float:
    """A p-value, where the best of so many `tries` was chosen (Bonferroni)."""
    return min(1.0, p * tries)
