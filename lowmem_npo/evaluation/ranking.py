"""What membership inference goes by: which of two groups has the larger values, and the least likely of some tokens."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data import TokenizedRow

SIGNIFICANT = 0.01  # a p-value below it
CLEAR = 0.25  # how far from 0.5 the AUC of a clear difference is: half of the way to the largest


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a value of `higher` is above one of `lower`, the area under the ROC curve: 0.5 tells nothing."""
    from sklearn.metrics import roc_auc_score  # late: it takes a second

    return float(roc_auc_score([1] * len(higher) + [0] * len(lower), [*higher, *lower]))


def p_of_auc(of_rows: float, higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often chance alone would set the AUC of rows so far from 0.5, two-sided, by these values of the rows, or of
    the groups that they are in (Mann and Whitney 1947); 1 where the groups are apart the other way round."""
    from scipy.stats import mannwhitneyu

    result = mannwhitneyu(higher, lower)
    of_values = result.statistic / (len(higher) * len(lower))
    return 1.0 if (of_values - 0.5) * (of_rows - 0.5) < 0 else float(result.pvalue)


def beyond_chance(higher: int, lower: int, tries: int = 1) -> float:
    """How far from 0.5 the AUC of groups of so many values must be for chance not to explain it (p < 0.01), or the
    furthest of so many AUCs (Bonferroni): that of values that are alike is about normal (Mann and Whitney 1947)."""
    deviations = NormalDist().inv_cdf(1 - SIGNIFICANT / tries / 2)
    return deviations * math.sqrt((higher + lower + 1) / (12 * higher * lower))


def tells_nothing(higher: int, lower: int, tries: int = 1) -> str | None:
    """Why an AUC near 0.5 of so few values says little: they would not show a clear difference either."""
    if (needed := beyond_chance(higher, lower, tries)) <= CLEAR:
        return None
    return f"only an AUC above {0.5 + needed:.2f} or below {max(0.0, 0.5 - needed):.2f} would show anything of so few"


def mean_of_lowest(values: Sequence[float], share: float) -> float:
    """The mean of this share of `values`, the lowest ones, at least of one: Min-K% of log-probs (Shi et al. 2024)."""
    return fmean(sorted(values)[: max(1, int(len(values) * share))])


def compressed(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the answer's text, compressed; of a text, but for its first token, which nothing precedes."""
    from lowmem_npo.evaluation.scoring.generation import text_of

    answer = text_of(tokenizer, row["input_ids"][max(1, row["prompt_length"]) :])
    return len(zlib.compress(answer.encode("utf-8")))
