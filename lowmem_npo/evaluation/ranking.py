"""What membership inference goes by: which of two groups has the larger values, and the least likely of some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a value of `higher` is above one of `lower`, the area under the ROC curve: 0.5 tells nothing."""
    from sklearn.metrics import roc_auc_score  # late: it takes a second

    return float(roc_auc_score([1] * len(higher) + [0] * len(lower), [*higher, *lower]))


def mean_of_lowest(values: Sequence[float], share: float) -> float:
    """The mean of this share of `values`, the lowest ones, at least of one: Min-K% of log-probs (Shi et al. 2024)."""
    return fmean(sorted(values)[: max(1, int(len(values) * share))])
