"""Whether the answers' likelihoods tell that the model was taught them: three membership attacks.

    loss      mean log p over the answer's tokens (Yeom et al. 2018)
    min_k     mean log p of its 20% least likely tokens (Min-K%, Shi et al. 2024)
    min_k_pp  the same of (log p - mean) / std of log p over the vocabulary (Min-K%++, Zhang et al. 2024)

The AUC of a score is the probability that a forgotten answer scores above one of the holdout. 0.5 is what a model gives
that saw neither; towards 1 the forgotten answers are still known; towards 0 they are less likely than answers that were
never seen, which gives them away as well. Forget and holdout rows must be alike in all but what the model was taught.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from lowmem_npo.evaluation.leaks.verdict import MARGIN
from lowmem_npo.evaluation.scoring.token_scores import TokenScores

K = 0.2  # share of the tokens that Min-K% looks at
SIGNIFICANT = 0.01


def loss(row: TokenScores) -> float:
    return -row.nll


def min_k(row: TokenScores) -> float:
    return _lowest(row.logprobs)


def min_k_pp(row: TokenScores) -> float:
    return _lowest(row.standard)


ATTACKS: dict[str, Callable[[TokenScores], float]] = {"loss": loss, "min_k": min_k, "min_k_pp": min_k_pp}


def membership_attacks(forget: Sequence[TokenScores], holdout: Sequence[TokenScores]) -> dict[str, Any]:
    """The AUC of every attack, with the p-value of the Mann-Whitney test that it is 0.5."""
    found: dict[str, Any] = {"rows": len(forget), "holdout_rows": len(holdout)}
    for name, attack in ATTACKS.items():
        scores = [attack(row) for row in forget], [attack(row) for row in holdout]
        labels = [1] * len(forget) + [0] * len(holdout)
        found[f"{name}_auc"] = float(roc_auc_score(labels, [*scores[0], *scores[1]]))
        found[f"{name}_p"] = float(mannwhitneyu(*scores).pvalue)
        found[f"{name}_all_equal"] = len({*scores[0], *scores[1]}) == 1
    worst = max(ATTACKS, key=lambda name: abs(found[f"{name}_auc"] - 0.5))
    leaks, words = _verdict(found[f"{worst}_auc"], found[f"{worst}_p"], all(found[f"{n}_all_equal"] for n in ATTACKS))
    meaning = f"The sharpest of three attacks ({worst}) has an AUC of {found[f'{worst}_auc']:.2f}: {words}."
    return {**found, "meaning": meaning, "leaks": leaks}


def _verdict(auc: float, p: float, all_equal: bool) -> tuple[bool | None, str]:
    if all_equal:
        return None, "every answer has the same score, so the attacks say nothing about the model"
    if abs(auc - 0.5) <= MARGIN:
        return False, "they tell forgotten answers hardly better from others than a coin does"
    if p >= SIGNIFICANT:
        return None, f"chance alone can do that with so few rows (p = {p:.2f}), so nothing is shown"
    if auc > 0.5:
        return True, "forgotten answers still score above answers that the model never saw: they are remembered"
    return True, (
        "forgotten answers now score below answers that the model never saw: over-forgetting, which tells them "
        "apart as well"
    )


def _lowest(values: Sequence[float]) -> float:
    """The mean of the lowest fifth, of one value at least."""
    return fmean(sorted(values)[: max(1, int(K * len(values)))])
