"""What became of the rows to keep, by the rules of `verdict_rules`: a state, and the measure that decided it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lowmem_npo.evaluation.answer_table import GENERAL, RETAIN
from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.figures import side_by_side
from lowmem_npo.report.verdict_rules import (
    BEYOND_CHANCE,
    DAMAGED,
    GENERAL_KEPT,
    KEPT,
    KNOWN,
    MOSTLY_SAID,
    REMAINS,
    SAID,
)

STATES = ("kept", "unsure", "doubtful", "worse", "damaged")  # by what is lost
# What decides on rows to keep, and how it is called.
MEASURES = {"rouge_l_recall": "recall", "probability": "probability", "appears": "the share of answers that appear"}


class Kept(NamedTuple):
    """What became of rows to keep: a state, and how much is left by the measure that decided it, which the sentence
    `by` names."""

    state: str = "kept"
    left: float = 1.0
    by: str = ""

    @property
    def severity(self) -> int:
        return STATES.index(self.state)


def what_became(name: str, before: AnswerSummary, after: AnswerSummary, errors: Mapping[str, float]) -> Kept:
    found = [Kept()]
    whole = name == RETAIN and after.rows == after.rows_in_set  # which stand for no others
    unknown = math.inf if name == GENERAL else 0.0  # own rows to keep count where nothing is known of chance
    if name == RETAIN and hardly_said(before):
        return _as_likely(before, after, {} if whole else errors)
    for measure, words in MEASURES.items():
        was, now = getattr(before, measure), getattr(after, measure)
        answers = measure == "appears"
        if answers and (name == GENERAL or None in (was, now) or was < MOSTLY_SAID):
            continue  # answers that were seldom said as they are written may be worded otherwise
        # Of general answers the wording is free: it changes where nothing is lost.
        enough = DAMAGED if answers else GENERAL_KEPT if (name, measure) == (GENERAL, "rouge_l_recall") else KEPT
        if (left := remains(was, now)) >= enough:
            continue
        much = left < DAMAGED and not answers  # a word that differs is enough for an answer not to appear
        by_chance = was - now <= BEYOND_CHANCE * (0.0 if whole else errors.get(measure, unknown))
        found.append(_fallen(much, by_chance, left, f"{words}, which fell", was, now))
    return _worst_of(found)


def _as_likely(before: AnswerSummary, after: AnswerSummary, errors: Mapping[str, float]) -> Kept:
    """What became of rows to keep that were hardly said: by their likelihood alone, where its change can be seen. What
    few words they share with the answers, and by how much a probability near 0 falls, says nothing."""
    found = [Kept()]
    rise, fall = after.nll - before.nll, before.probability - after.probability
    likelihood = math.exp(-max(rise, 0.0))  # of a token, as a share of what it was
    if not likelihood >= DAMAGED:
        by_chance = rise <= BEYOND_CHANCE * errors.get("nll", 0.0)
        words = "the NLL per answer token, which rose"
        found.append(_fallen(likelihood < REMAINS, by_chance, likelihood, words, before.nll, after.nll))
    if fall > SAID and (left := remains(before.probability, after.probability)) < DAMAGED:
        by_chance = fall <= BEYOND_CHANCE * errors.get("probability", 0.0)
        words = f"{MEASURES['probability']}, which fell"
        found.append(_fallen(left < REMAINS, by_chance, left, words, before.probability, after.probability))
    return _worst_of(found)


def _fallen(much: bool, by_chance: bool, left: float, what: str, was: float, now: float) -> Kept:
    """What a figure that is too low says. much: whether by much. by_chance: whether the rows scatter as much."""
    state = ("doubtful" if much else "unsure") if by_chance else ("damaged" if much else "worse")
    start = "Chance may explain" if state == "unsure" else "What decided is"
    values = " to ".join(side_by_side([was, now], decimals=2))
    return Kept(state, left, f" {start} {what} from {values}.")


def _worst_of(found: Sequence[Kept]) -> Kept:
    return max(found, key=lambda kept: (kept.severity, -kept.left))


def hardly_said(before: AnswerSummary) -> bool:
    return before.rouge_l_recall < KNOWN and before.appears <= SAID


def hardly_in_full(before: AnswerSummary) -> bool:
    """Whether hardly an answer was said: what is said of their words may then be the questions' own, as the name in "X
    was born in Rome". A text that the model goes on with has no question, and may be known in part."""
    return hardly_said(before) or (before.appears <= SAID and not of_passages(before))


def of_passages(measured: AnswerSummary) -> bool:
    """Whether all rows are texts that the model goes on with."""
    return measured.passages == measured.rows


def remains(before: float, after: float) -> float:
    return after / before if before > 0 else 1.0
