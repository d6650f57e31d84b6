"""ROUGE-L as benchmarks have it, whose tokenizer knows only a-z and 0-9; that of our own figures is in `wording`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.scoring import Score


def rouge_l(reference: str, text: str, *, stemmed: bool = True) -> Score:
    """Recall, precision and F of the words that `reference` and `text` have in common, in order (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stemmed).score(reference, text)["rougeL"]
