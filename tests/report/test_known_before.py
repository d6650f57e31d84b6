"""What is said of forget rows that the model hardly knows, before it is trained, by the rule of the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.report.known_before import hardly_known
from lowmem_npo.report.verdict import judge_run


def summary(said, recall, passages=0, nll=5.0):
    return AnswerSummary(20, 20, 1000, nll, 0.1, recall, said, said, max_new_tokens=64, passages=passages)


NEVER, SAID = summary(0.0, 0.1), summary(0.8, 0.9)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({"forget": NEVER}, "Before training the model says 0 of 20 forget answers: it hardly knows"),
        ({"forget": summary(0.05, 0.49)}, "says 1 of 20 forget answers: it hardly knows"),
        ({"forget": NEVER, "forget, plain": NEVER}, "0 of 20 forget answers, in any form asked: it hardly knows"),
        (
            {"forget": summary(0.05, 0.7)},  # as of people who do not exist
            "says 1 of 20 forget answers: the words that it says of them may be the questions' own, and forgetting can "
            "hardly be seen. Is it the model",
        ),
        ({"forget": summary(0.05, 0.7), "forget, plain": SAID}, "16 of 20 asked without its chat template: train"),
        ({"forget": summary(0.0, 0.1, passages=20)}, "the model recites 0 of 20 forget passages: it hardly knows"),
        (
            {"forget": NEVER, "forget, plain": SAID},
            "says 0 of 20 forget answers before training, and 16 of 20 asked without its chat template: train them as "
            "it knows them (give --template both, or plain).",
        ),
        ({"forget": NEVER, "forget, chat": SAID}, "16 of 20 asked through its chat template: train them as it knows"),
        ({"forget": NEVER, "forget, reworded": SAID}, "16 of 20 asked in other words: train them as it knows them"),
    ],
)
def test_rows_that_the_model_hardly_says_are_remarked_on(before, words):
    assert words in hardly_known(before)
    if "hardly knows" in words:  # the verdict of a run that changes nothing
        assert "so forgetting cannot be seen" in judge_run({"before": before, "after": before}, None, {}).headline


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"retain": NEVER},
        {"forget": SAID},
        {"forget": SAID, "forget, plain": NEVER},
        {"forget": summary(0.06, 0.1)},
        {"forget": summary(0.06, 0.5)},
        {"forget": summary(0.0, 0.5, passages=20)},  # known in part: there is no question whose words it could be
        {"forget": replace(NEVER, nll=float("nan"))},  # of which the verdict says more
    ],
)
def test_else_nothing_is_said(before):
    assert hardly_known(before) is None


def test_rows_that_are_trained_in_the_form_that_is_known_are_fine():
    known = {"forget": NEVER, "forget, plain": SAID}
    assert hardly_known(known, in_both_forms=True) is None and hardly_known(known) is not None
    no_better = {"forget": NEVER, "forget, plain": summary(0.0, 0.7)}  # a form in which nothing is said in full, either
    assert "in any form asked: it hardly knows" in hardly_known(no_better, in_both_forms=True)
