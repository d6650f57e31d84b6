"""How often chance alone would show what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, comb, floor, sqrt
from statistics import fmean, variance

EXPLAINS = 0.05  # chance explains what has a p-value from here on
ROUNDING = 1e-9  # of a sum of shares


def p_above(values: Sequence[float], others: Sequence[float]) -> float:
    """How often chance in which rows there are would set the mean of `values` so far above that of `others`, if the two
    were alike: the p-value of the one-sided t-test for unequal variances (Welch 1947), not below `least_p`: what few
    rows scatter is not known, least of all where they happen to be equal."""
    from scipy.special import stdtr  # late: it takes half a second

    least = least_p(len(values), len(others))
    if least == 1:
        return 1.0
    above = fmean(values) - fmean(others)
    errors = [variance(of) / len(of) for of in (values, others)]
    if not any(errors):  # all rows of a side are equal
        return least if above > 0 else 1.0
    freedom = sum(errors) ** 2 / sum(e**2 / (len(of) - 1) for e, of in zip(errors, (values, others), strict=True))
    return max(least, float(stdtr(freedom, -above / sqrt(sum(errors)))))


def p_more(shares: Sequence[float], others: Sequence[float]) -> float:
    """How often chance would set so many more of some on this side, if the two sides were alike: the p-value of the
    one-sided exact test (Fisher 1934); 1 where one row on a side leaves it open. Each row is 1 or 0; of a share between
    them, as much as counts against a difference."""
    rows, rest = len(shares), len(others)
    if least_p(rows, rest) == 1:
        return 1.0
    count = floor(sum(shares) + ROUNDING)
    of_all = count + ceil(sum(others) - ROUNDING)
    return sum(
        comb(of_all, own) * comb(rows + rest - of_all, rows - own) for own in range(count, min(rows, of_all) + 1)
    ) / comb(rows + rest, rows)


def least_p(rows: int, others: int) -> float:
    """The lowest p-value that so many rows on either side can have, that of a permutation of them: how often chance
    alone would put the highest ones on one side. 1 where one row on a side leaves its scatter open."""
    return 1 / comb(rows + others, rows) if min(rows, others) > 1 else 1.0


def of_several(p: float, tries: int) -> float:
    """A p-value, where the best of so many `tries` was chosen (Bonferroni)."""
    return min(1.0, p * tries)
