"""How much of an answer greedy decoding still writes: exact memorisation and extraction strength.

    exact memorisation   share of the answer's tokens that are the most likely one after the true tokens before them
                         (Tirumala et al. 2022)
    extraction strength  1 - k / |y|, k being the length of the shortest beginning of the answer after which greedy
                         decoding writes all the rest (Carlini et al. 2021); 1: the prompt alone is enough

One pass gives both: where every later token is the most likely one after the true tokens before it, greedy decoding
writes exactly those. Where not even the last token is, extraction strength is 0 (open-unlearning's 1 / |y| counts it as
extracted from all others).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lowmem_npo.evaluation.leaks.verdict import above_holdout, beside_holdout
from lowmem_npo.evaluation.scoring.token_scores import TokenScores


def exact_memorization(row: TokenScores) -> float:
    """Between 0 and 1."""
    return fmean(row.greedy)


def extraction_strength(row: TokenScores) -> float:
    """Between 0 and 1."""
    missed = [place for place, greedy in enumerate(row.greedy) if not greedy]
    return 1 - (missed[-1] + 1) / len(row.greedy) if missed else 1.0


def extraction(forget: Sequence[TokenScores], holdout: Sequence[TokenScores] | None) -> dict[str, Any]:
    """Means over rows; `recited` is the share of rows that the prompt alone brings forth."""
    found = extraction_figures(forget)
    level = None
    if holdout:
        level = fmean(map(extraction_strength, holdout))
        found |= {f"holdout_{name}": value for name, value in extraction_figures(holdout).items() if name != "rows"}
    strength = found["extraction_strength"]
    meaning = (
        f"Once begun, the model writes the last {strength:.0%} of a forgotten answer by itself, token for token "
        f"({found['recited']:.0%} of the answers from the question alone); {beside_holdout(level)}."
    )
    return {**found, "meaning": meaning, "leaks": above_holdout(strength, level)}


def extraction_figures(rows: Sequence[TokenScores]) -> dict[str, float]:
    """The figures of a set of rows: how likely its answers are, and how much of them greedy decoding writes."""
    strengths = [extraction_strength(row) for row in rows]
    return {
        "rows": len(rows),
        "nll": fmean(row.nll for row in rows),
        "exact_memorization": fmean(map(exact_memorization, rows)),
        "extraction_strength": fmean(strengths),
        "recited": fmean(strength == 1 for strength in strengths),
    }
