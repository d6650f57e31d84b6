"""How much of an answer comes when the model is asked several times, not only in its most likely words.

Per row, the best ROUGE-L recall (stemmed words) of the true answer in k samples from the whole distribution. A model
whose greedy answer was moved elsewhere may still say the old one now and then (Scholten et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from lowmem_npo.evaluation.leaks.verdict import above_holdout, beside_holdout

SAMPLES = 8
TEMPERATURE = 1.0


def best_recalls(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> list[tuple[float, str]]:
    """Row by row the best recall, between 0 and 1, and the sample that has it."""
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(((rouge.score(answer, sample)["rougeL"].recall, sample) for sample in row), key=lambda each: each[0])
        for answer, row in zip(answers, samples, strict=True)
    ]


def sampling(
    forget: Sequence[float], holdout: Sequence[float] | None, samples: int, temperature: float
) -> dict[str, Any]:
    """What the best recalls of forget and holdout rows say; `whole` is the share of rows whose answer came whole."""
    found = {
        "rows": len(forget),
        "samples": samples,
        "temperature": temperature,
        "best_rouge_l_recall": fmean(forget),
        "whole": fmean(recall == 1 for recall in forget),
    }
    level = fmean(holdout) if holdout else None
    if level is not None:
        found |= {"holdout_best_rouge_l_recall": level, "holdout_whole": fmean(recall == 1 for recall in holdout)}
    meaning = (
        f"In the best of {samples} samples stands {found['best_rouge_l_recall']:.0%} of a forgotten answer; "
        f"{found['whole']:.0%} of the answers come whole; {beside_holdout(level)}."
    )
    return {**found, "meaning": meaning, "leaks": above_holdout(found["best_rouge_l_recall"], level)}
