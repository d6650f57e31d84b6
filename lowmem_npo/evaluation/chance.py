"""How often chance alone would show what was seen.

Rows are drawn in groups: the passages of a document, copies of a row, all that says the same of one person. What one
row of a group shows, the others are likely to show, so that a group is one piece of evidence, by the mean of its rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import ceil, comb, floor, sqrt
from statistics import fmean, variance

EXPLAINS = 0.05  # chance explains what has a p-value from here on
ROUNDING = 1e-9  # of a sum of shares
DRAWS = 9_999  # of permutations, where there are more


def group_means(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """The mean of each group of rows, in the order of their first ones. groups: that of each row; None: it is one by
    itself."""
    of_group: dict[Hashable, list[float]] = {}
    for row, (value, group) in enumerate(zip(values, groups, strict=True)):
        of_group.setdefault(("row", row) if group is None else ("group", group), []).append(value)
    return [of[0] if len(of) == 1 else fmean(of) for of in of_group.values()]


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


def p_more_of_groups(shares: Sequence[float], others: Sequence[float]) -> float:
    """The same of groups, each by a share of its rows: the p-value of the permutation test, which Fisher's is where all
    are 0 or 1. Of many permutations some are drawn, always the same ones."""
    import numpy as np

    if {*shares, *others} <= {0.0, 1.0} or least_p(len(shares), len(others)) == 1:
        return p_more(shares, others)
    pool, own = np.array([*shares, *others]), sum(shares) - ROUNDING
    if comb(len(pool), len(shares)) <= DRAWS:
        return fmean(sum(chosen) >= own for chosen in combinations(pool.tolist(), len(shares)))
    draw = np.random.default_rng(0)
    as_many = sum(draw.permutation(pool)[: len(shares)].sum() >= own for _ in range(DRAWS))
    return float((as_many + 1) / (DRAWS + 1))


def least_p(rows: int, others: int) -> float:
    """The lowest p-value that so many rows on either side can have, that of a permutation of them: how often chance
    alone would put the highest ones on one side. 1 where one row on a side leaves its scatter open."""
    return 1 / comb(rows + others, rows) if min(rows, others) > 1 else 1.0


def of_several(p: float, tries: int) -> float:
    """A p-value, where the best of so many `tries` was chosen (Bonferroni)."""
    return min(1.0, p * tries)
