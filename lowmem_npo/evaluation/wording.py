"""How much of one text comes in another, by their `tokens`; those of a-z and 0-9 alone are stemmed as ROUGE's are.

On English text the tokens are those of rouge-score.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import regex

from lowmem_npo.data.words import appears, tokens

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

NOT_LATIN = regex.compile(r"[^\P{L}\p{Latin}]")


class StemmedTokens:
    """`tokens`, those of a-z and 0-9 stemmed (Porter), for `RougeScorer`."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        cut = [self.english.tokenize(token) if token.isascii() else [token] for token in tokens(text)]
        return list(chain.from_iterable(cut))


@cache
def _rouge() -> RougeScorer:
    drawn = random.getstate()
    from rouge_score.rouge_scorer import RougeScorer  # which imports nltk and scipy, and they draw random numbers

    random.setstate(drawn)
    return RougeScorer(["rougeL"], tokenizer=StemmedTokens())


def rouge_l_recall(reference: str, answer: str) -> float:
    """Between 0 and 1: how much of `reference` is anywhere in `answer`, in order (Lin 2004)."""
    if not tokens(reference):  # nothing but punctuation
        return float(appears(reference, answer))
    return _rouge().score(reference, answer)["rougeL"].recall


def begins(reference: str, answer: str) -> bool:
    """Whether `answer` begins with the whole of `reference`, compared as by `appears`."""
    wanted = tokens(reference)
    if wanted:
        return tokens(answer)[: len(wanted)] == wanted
    return bool(reference.strip()) and answer.strip().startswith(reference.strip())


def other_scripts(name: str, references: Sequence[str], score: str) -> list[str]:
    """A note on `score`, an official one with rouge-score's own tokenizer, for rows that it cannot judge; or none."""
    unseen = sum(map(beyond_rouge, references))
    if not unseen:
        return []
    return [
        f"{name}: {unseen} of {len(references)} true answers are in scripts other than Latin. {score} sees only a-z "
        "and 0-9 of them, and is near 0 whatever the model says."
    ]


def beyond_rouge(text: str) -> bool:
    """Whether `text` has words of which rouge-score's own tokenizer, that of official scores, sees nothing."""
    return NOT_LATIN.search(text) is not None
