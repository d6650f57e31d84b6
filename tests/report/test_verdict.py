"""The first sentences of a report say what the figures say: each state, each threshold, each reservation."""

from __future__ import annotations

import math

import pytest

from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.report.verdict import FORGET_WORDS, RETAIN_WORDS, judge_run


def summary(exact=0.0, recall=0.0, probability=0.0, nll=5.0, rows=100, of=100):
    return AnswerSummary(rows, of, 1000, nll, probability, recall, exact)


RECITED = summary(1.0, 1.0, 0.99, 0.01)
GONE = summary(0.0, 0.1, 0.01, 5.0)


def stages(forget=GONE, retain=RECITED, before=RECITED, before_retain=RECITED, gold=None):
    by_stage = {"before": {"forget": before}, "after": {"forget": forget}}
    if retain is not None:
        by_stage["before"]["retain"], by_stage["after"]["retain"] = before_retain, retain
    if gold is not None:
        by_stage["gold"] = {"forget": gold, "retain": RECITED}
    return by_stage


@pytest.mark.parametrize(
    ("measured", "forget", "retain", "tone"),
    [
        (stages(), "forgotten", "kept", "good"),
        (stages(summary(0.05, 0.5, 0.49)), "forgotten", "kept", "good"),  # just inside every bound
        (stages(summary(0.06, 0.5, 0.49)), "partly", "kept", "mixed"),
        (stages(summary(0.05, 0.51, 0.49)), "partly", "kept", "mixed"),
        (stages(summary(0.0, 0.1, 0.6)), "partly", "kept", "mixed"),  # no longer said, but still there
        (stages(summary(1.0, 1.0, 0.97, 0.03)), "untouched", "kept", "bad"),
        (stages(retain=summary(0.9, 0.95, 0.95, 0.1)), "forgotten", "kept", "good"),
        (stages(retain=summary(0.9, 0.94, 0.95, 0.1)), "forgotten", "worse", "mixed"),
        (stages(retain=summary(0.9, 0.99, 0.7, 0.3)), "forgotten", "damaged", "bad"),
        (stages(retain=summary(0.0, 0.1, 0.0, 9.0)), "forgotten", "damaged", "bad"),
        (stages(before=summary(0.0, 0.15, 0.05, 3.0)), "unknown", "kept", "unknown"),
        (stages(retain=None), "forgotten", None, "mixed"),
        # A model that half remembered: no fixed number would do.
        (stages(summary(0.01, 0.2, 0.05), before=summary(0.1, 0.5, 0.3, 1.2)), "forgotten", "kept", "good"),
        (stages(summary(0.05, 0.48, 0.28), before=summary(0.1, 0.5, 0.3, 1.2)), "untouched", "kept", "bad"),
        # What a model that never saw the rows says by chance does not count against this one.
        (stages(summary(0.1, 0.6, 0.1), gold=summary(0.06, 0.58, 0.1)), "forgotten", "kept", "good"),
        (stages(summary(0.1, 0.6, 0.1)), "partly", "kept", "mixed"),
    ],
)
def test_each_state(measured, forget, retain, tone):
    verdict = judge_run(measured, 50304, {})
    assert FORGET_WORDS[forget] in verdict.headline and RETAIN_WORDS[retain] in verdict.headline
    assert not any(words in verdict.headline for state, words in FORGET_WORDS.items() if state != forget)
    assert verdict.tone == tone and verdict.headline.startswith("On the rows measured, the model")


@pytest.mark.parametrize(
    ("measured", "vocabulary", "overdone"),
    [
        (stages(summary(nll=10.8)), 50304, False),  # ln 50304 = 10.83
        (stages(summary(nll=10.9)), 50304, True),
        (stages(summary(nll=10.9)), None, False),  # not known without the vocabulary
        (stages(summary(nll=6.4), gold=GONE), 50304, False),
        (stages(summary(nll=6.6), gold=GONE), 50304, True),
    ],
)
def test_forgetting_can_be_overdone(measured, vocabulary, overdone):
    verdict = judge_run(measured, vocabulary, {})
    assert ("overdone" in verdict.headline) == overdone == (verdict.tone == "mixed")
    assert any("what was removed" in sentence for sentence in verdict.sentences) == overdone


def test_leaks_are_a_reservation():
    none = {"extraction": LeakResult({}, "", False), "membership": LeakResult({}, "", None)}
    some = {**none, "relearning": LeakResult({}, "", True)}
    clean, leaking = (judge_run(stages(), 50304, {"before": some, "after": tests}) for tests in (none, some))
    assert clean.tone == "good" and clean.sentences[-1] == "No traces in any conclusive leak test: extraction."
    assert leaking.tone == "mixed" and leaking.headline.endswith(", but leak tests still find traces.")
    assert leaking.sentences[-1] == "Traces in 1 of 2 conclusive leak tests: relearning."
    unknown = judge_run(stages(), 50304, {"before": some, "after": {"membership": none["membership"]}})
    assert "No leak test was run" in unknown.sentences[-1] and unknown.tone == "good"
    for gold, ending in ((none, "saw the rows: none."), (some, "saw the rows: relearning.")):
        assert judge_run(stages(), 50304, {"after": some, "gold": gold}).sentences[-1].endswith(ending)


def test_the_sentences_contain_the_numbers():
    measured = stages(
        summary(0.02, 0.1, 0.01, 4.5, rows=50, of=1112), before=summary(0.9, 0.95, 0.9, 0.125, rows=50, of=1112)
    )
    forget, retain, _ = judge_run(measured, 50304, {}).sentences
    assert forget == (
        "Of 50 measured of 1112 forget answers, 1 comes word for word (before: 45); the NLL per answer token went from "
        "0.12 to 4.50."
    )
    assert retain.startswith("Of 100 retain answers, 100 come word for word (before: 100)")


def test_what_was_not_measured_is_not_judged():
    for measured in ({}, {"before": {"forget": RECITED}}):
        verdict = judge_run(measured, 50304, {})
        assert verdict.tone == "unknown" and "not measured" in verdict.headline
    broken = judge_run(stages(summary(nll=math.nan)), 50304, {})
    assert broken.tone == "bad" and "finite" in broken.headline
