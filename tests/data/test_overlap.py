"""Rows that are in both parts are recognised however they are written, and named."""

from __future__ import annotations

import pytest

from lowmem_npo.data.overlap import find_overlap, refuse_overlap
from lowmem_npo.data.schemas import Example
from lowmem_npo.errors import UserError


def pair(prompt, answer, where="f.jsonl, line 1"):
    return Example(prompt, answer, where, "question/answer")


FORGET = pair("Who was  born in Paris?", "Zoé Lumière")
CHAT = ({"role": "user", "content": "Who was born in Paris?"}, {"role": "assistant", "content": "Zoé Lumière"})


@pytest.mark.parametrize(
    "same",
    [
        pair("who was born\nin paris? ", " ZOÉ lumière"),
        pair("Who was born in Paris?", "Zoe\u0301 Lumie\u0300re"),
        Example(None, "Who was born in Paris? Zoé Lumière", "r.jsonl, line 2", "text"),
        Example("Who was born in Paris?", "Zoé Lumière", "r.jsonl, line 2", "messages", None, CHAT),
    ],
    ids=["case and space", "Unicode form", "text", "messages"],
)
def test_the_same_text_is_the_same_row(same):
    assert find_overlap([FORGET], [pair("Who?", "She."), same]) == [(FORGET, same)]


@pytest.mark.parametrize("other", [pair(FORGET.prompt, "Ann"), pair("Who was born?", FORGET.answer)])
def test_another_question_or_answer_is_another_row(other):
    assert find_overlap([FORGET], [other]) == []
    refuse_overlap([FORGET], [other])


def test_earlier_turns_count():
    longer = ({"role": "system", "content": "Be brief."}, *CHAT)
    kept = Example("Who was born in Paris?", "Zoé Lumière", "r.jsonl, line 2", "messages", None, longer)
    assert find_overlap([FORGET], [kept]) == []


def test_the_rows_are_named():
    forget = [pair("Q", str(number), f"f.jsonl, line {number}") for number in range(1, 9)]
    retain = [pair("Q", str(number), f"r.jsonl, line {number + 10}") for number in range(2, 9)]
    with pytest.raises(UserError) as error:
        refuse_overlap(forget, retain)
    assert "7 rows to forget" in str(error.value)
    assert "f.jsonl, line 2 is r.jsonl, line 12; f.jsonl, line 3 is r.jsonl, line 13" in str(error.value)
    assert "and 2 more" in str(error.value)
    assert "--allow-overlap" in str(error.value)
    with pytest.raises(UserError, match=r"^1 row to forget is also in the rows to retain"):
        refuse_overlap(forget[:2], retain)
