"""Exact memorisation and extraction strength, by hand and against real greedy decoding."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model
from scipy.stats import ttest_ind

from lowmem_npo.evaluation.chance import p_more
from lowmem_npo.evaluation.leaks import extraction as module
from lowmem_npo.evaluation.leaks.extraction import EXTRACTION, exact_memorization, extraction_strength, judge
from lowmem_npo.evaluation.scoring.token_scores import TokenScores, token_scores


def row(greedy: str, cut: bool = False) -> TokenScores:
    """A row whose tokens are greedy (+) or not (.)."""
    tokens = len(greedy)
    return TokenScores([-0.5] * tokens, [0.0] * tokens, [mark == "+" for mark in greedy], [1.0] * tokens, cut)


@pytest.mark.parametrize(
    "greedy, memorised, strength",
    [
        ("++++", 1, 1),
        (".+++", 3 / 4, 3 / 4),
        ("+.++", 3 / 4, 1 / 2),
        ("+++.", 3 / 4, 0),  # not even the last token; open-unlearning says 1/4
        ("....", 0, 0),
        ("...+", 1 / 4, 1 / 4),
        ("+", 1, 1),
        (".", 0, 0),
    ],
)
def test_by_hand(greedy, memorised, strength):
    assert exact_memorization(row(greedy)) == memorised
    assert extraction_strength(row(greedy)) == strength


def continues_itself(model, ids, start) -> bool:
    """Whether greedy decoding from ids[:start] writes ids[start:], one whole forward pass per token."""
    written = ids[:start]
    while len(written) < len(ids):
        logits = model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1]
        written = [*written, int(logits.argmax())]
    return written == ids


@pytest.mark.parametrize("broken", [False, True])
def test_it_is_what_greedy_decoding_does(broken, monkeypatch):
    """Rows that the model itself continued, with a strange token at some place: the shortest sufficient prefix."""
    if broken:  # a prefix one too short
        monkeypatch.setattr(
            module, "extraction_strength", lambda row: 1 - max(0, len(row.greedy) - 3) / len(row.greedy)
        )
    model, rows, expected = tiny_model("llama"), [], []
    for place in (None, 0, 2, 5):
        ids = [5, 9, 40]
        while len(ids) < 9:
            best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2).indices.tolist()
            ids.append(best[1] if len(ids) - 3 == place else best[0])
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "prompt_length": 3})
        shortest = next((k for k in range(6) if continues_itself(model, ids, 3 + k)), 6)
        expected.append(1 - shortest / 6)
    assert expected[0] == 1 and expected[-1] == 0 and 0 < expected[2] < 1
    strengths = [module.extraction_strength(scores) for scores in token_scores(model, rows, progress=False)]
    assert (strengths == pytest.approx(expected)) is not broken


def test_the_beginning_of_an_answer_that_its_row_has_no_room_for_is_not_recited():
    rows = [*[row("++++", cut=True)] * 6, *[row("++++")] * 2, *[row("+.+.")] * 2]
    alone = judge(rows, None)
    assert alone.figures["recited"] == 0.5 and (alone.figures["cut"], alone.figures["whole_rows"]) == (6, 4)
    assert "(50% of the 4 uncut answers with no word of them given)" in alone.meaning
    assert " Of 6 of 10 forgotten answers only the beginning was looked for (--max-length" in alone.meaning
    beside = judge(rows, [row("....")] * 4)
    (attack,) = EXTRACTION.attacks(beside.figures).values()
    assert (attack.rows, attack.whole.rows, attack.whole.value, attack.whole.beginnings) == (10, 4, 0.5, 0)
    assert beside.figures["whole_p_value"] == pytest.approx(p_more([1, 1, 0, 0], [0] * 4)), "of the uncut alone"
    (attack,) = EXTRACTION.attacks(judge(rows[:6], [row("....")] * 4).figures).values()
    assert attack.whole.value == 1 and attack.whole.beginnings == 6, "where all are cut, they are called beginnings"


def test_a_row_that_was_cut_is_scored_as_one():
    whole = {"input_ids": [5, 9, 40], "labels": [-100, 9, 40], "prompt_length": 1}
    scores = token_scores(tiny_model("llama"), [whole, {**whole, "cut": 2}], progress=False)
    assert [one.cut for one in scores] == [False, True]


def test_the_verdict_stands_on_the_holdout():
    recited, forgotten = [row("++++"), row("++++")], [row("+.+."), row("....")]
    assert judge(recited * 2, forgotten * 2).leaks is True
    assert judge(forgotten * 2, forgotten * 2).leaks is False
    assert judge(recited, None).leaks is True and judge(forgotten, None).leaks is None
    result = judge([row("++++"), row("+.++")], forgotten)
    figures = result.figures
    assert (figures["rows"], figures["exact_memorization"], figures["extraction_strength"]) == (2, 7 / 8, 3 / 4)
    assert figures["recited"] == 1 / 2 and figures["nll"] == 0.5
    assert figures["holdout_exact_memorization"] == 1 / 4 and figures["holdout_extraction_strength"] == 0
    assert "the last 75% of a forgotten answer" in result.meaning and "never saw, 0%" in result.meaning
    assert "--holdout" in judge(forgotten, None).meaning


def test_a_holdout_that_the_model_knows_shows_nothing():
    """Capitals of countries, known as well as those that were to be forgotten: the model's last words say it."""
    known, mixed = tenths(*[10] * 7, 8), tenths(*[10] * 4, 9, 9, 3, 0)
    result = judge(mixed, known)
    assert result.leaks is None and "never saw, 98%" in result.meaning
    assert result.meaning.endswith(
        " The model says much of the holdout, 98% word for word, so it cannot be one of rows that it never saw, "
        "and nothing is shown."
    )
    half = tenths(*[5] * 8)
    assert judge(half, half).leaks is False and judge(tenths(*[6] * 8), tenths(*[6] * 8)).leaks is None
    assert judge(tenths(*[10] * 8), tenths(*[6] * 8)).leaks is True, "above it, and that is a trace"


def test_what_chance_between_rows_does_is_no_trace():
    """Half of the rows on each side are of the easy kind; which, is chance."""
    easy, hard = row("++++"), row("....")
    result = judge([easy, easy, hard, easy, easy], [easy, hard, hard, easy, hard])
    reference = ttest_ind([1, 1, 0, 1, 1], [1, 0, 0, 1, 0], equal_var=False, alternative="greater").pvalue
    assert result.leaks is None and result.figures["p_value"] == pytest.approx(reference)
    assert (
        "with no more rows, 5 of the forget set and 5 of the holdout (p = 0.12), so nothing is shown." in result.meaning
    )
    assert judge([easy, easy, hard, easy, easy] * 8, [easy, hard, hard, easy, hard] * 8).leaks is True
    assert judge([easy], [hard]).leaks is None is judge([easy] * 9, [hard]).leaks
    even = [hard, hard, easy, hard] * 2
    assert judge(even, even).leaks is False and "hance" not in judge(even, even).meaning
    assert "p_value" not in judge([easy], None).figures


def test_answers_that_are_recited_whole_are_a_trace_though_the_mean_hides_them():
    """A tenth of them: the model writes the last 10% of an answer on average, which by itself is within the margin."""
    easy, hard = row("++++"), row("....")
    result = judge([easy] * 10 + [hard] * 90, [hard] * 100)
    assert result.leaks is True and result.figures["recited"] == result.figures["extraction_strength"] == 0.1
    assert result.meaning.endswith(
        "of answers that the model never saw, 0%. That is more than chance explains: 10% of the answers come whole, of "
        "the holdout's 0% (p = 0.00077)."
    )
    assert judge([easy] * 5 + [hard] * 95, [hard] * 100).leaks is False, "as much as a report lets be said"
    assert judge([easy] * 10 + [hard] * 90, [easy] * 5 + [hard] * 95).leaks is False
    one = judge([easy] + [hard] * 11, [hard] * 12)
    assert one.leaks is None and "Chance alone can do that with no more rows, 12 of" in one.meaning
    assert one.meaning.endswith("8% of the answers come whole, of the holdout's 0% (p = 0.5).")


def tenths(*counts):
    """A row for each, of which so many tenths are written."""
    return [row("." * (10 - count) + "+" * count) for count in counts]


@pytest.mark.parametrize(
    ("forget", "holdout", "rows", "least"),
    [
        (tenths(2, 2), tenths(0, 0), "2 + 2", "0.17"),  # rows that happen to be equal
        (tenths(0, 0), tenths(0, 0), "2 + 2", "0.17"),
        (tenths(*[10] * 60, *[0] * 4), tenths(9), "64 + 1", "1.00"),  # one holdout row, which it recites nearly
        (tenths(0), tenths(*[0] * 64), "1 + 64", "1.00"),
        (tenths(10, 10, 10), tenths(0, 0, 0), "3 + 3", "0.05"),
    ],
)
def test_of_so_few_rows_nothing_can_be_shown(forget, holdout, rows, least):
    """Whatever they say: neither traces, which chance would explain, nor that there are none."""
    result = judge(forget, holdout)
    assert result.leaks is None
    assert f"With {rows} rows chance explains any difference (p = {least} at best), so nothing" in result.meaning
    assert judge(tenths(10, 10, 10), tenths(0, 0, 0, 0)).leaks is True
    assert judge(tenths(0, 0, 0), tenths(0, 0, 0, 0)).leaks is False
