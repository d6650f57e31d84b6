"""What membership inference goes by: which of two groups has the larger values, and the least likely of some tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a value of `higher` is above one of `lower`, the area under the ROC curve: 0.5 tells nothing."""
    from sklearn.metrics import roc_auc_score  # late: it takes a second

    return float(roc_auc_score([1] * len(higher) + [0] * len(lower), [*higher, *lower]))


def deviation_by_chance(higher: int, lower: int) -> float:
    """The standard deviation of the AUC of groups of so many values that are alike (Mann and Whitney 1947)."""
    return math.sqrt((higher + lower + 1) / (12 * higher * lower))


def mean_of_lowest(values: Sequence[float], share: float) -> float:
    """The mean of this share of `values`, the lowest ones, at least of one: Min-K% of log-probs (Shi et al. 2024)."""
    return fmean(sorted(values)[: max(1, int(len(values) * share))])
