"""Measurements of made-up models, before and after, for verdicts on them."""

from __future__ import annotations

from lowmem_npo.evaluation.answers import AnswerSummary


def summary(exact=0.0, recall=0.0, probability=0.0, nll=5.0, rows=100, of=100, appears=None):
    said = exact if appears is None else appears
    return AnswerSummary(rows, of, 1000, nll, probability, recall, exact, said, max_new_tokens=64)


MEASURED = ("rouge_l_recall", "probability")
RECITED = summary(1.0, 1.0, 0.99, 0.01)
GONE = summary(0.0, 0.1, 0.01, 5.0)


def stages(forget=GONE, retain=RECITED, before=RECITED, before_retain=RECITED, gold=None):
    by_stage = {"before": {"forget": before}, "after": {"forget": forget}}
    if retain is not None:
        by_stage["before"]["retain"], by_stage["after"]["retain"] = before_retain, retain
    if gold is not None:
        by_stage["gold"] = {"forget": gold, "retain": RECITED}
    return by_stage
