"""Rows that are in both parts are recognised however they are written, and named."""

from __future__ import annotations

import json
import random

import pytest

from lowmem_npo.data import bundled_rows, overlap, read_rows, to_examples
from lowmem_npo.data.example import Example
from lowmem_npo.data.overlap import (
    find_overlap,
    find_related,
    first_alike,
    keys_of,
    near_duplicates,
    refuse_overlap,
    sharing_text,
)
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.tokenized_rows import TokenizedRows
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


def test_a_space_counts_but_beside_a_script_that_has_none():
    for one, other in ((("Room 1", "23"), ("Room 12", "3")), (("Which?", "1 12"), ("Which?", "11 2"))):
        assert find_overlap([pair(*one)], [pair(*other)]) == []
    for prompt, answer in (("她看见", "了。"), ("เขา", "เห็น"), ("彼は見た。", "Python 3")):
        text = Example(None, prompt + answer, "d.txt, passage 1", "text")
        assert find_overlap([pair(prompt, answer)], [text]) == [(pair(prompt, answer), text)]


SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
NAMED = {"role": "user", "content": "Somebody was born there."}


def chat(*turns, where="r.jsonl, line 2"):
    return Example(turns[-2]["content"], turns[-1]["content"], where, "messages", None, turns)


@pytest.mark.parametrize("before", [[SYSTEM], [*HELLO], [SYSTEM, *HELLO], [NAMED]])
def test_the_same_last_question_and_answer_are_the_same_row(before):
    """In either part, beside a question or a conversation without others before it, as a row to forget, an attack's and
    a fold's."""
    longer, other = chat(*before, *CHAT), chat({**SYSTEM, "content": "Be long."}, *CHAT, where="o, line 1")
    for one, same in ((FORGET, longer), (longer, FORGET), (longer, other), (other, longer), (longer, chat(*CHAT))):
        assert find_overlap([one], [pair("Who?", "She."), same]) == [(one, same)]
        with pytest.raises(UserError, match=f": {one.where} is {same.where} but for earlier turns; remove"):
            refuse_overlap([one], [same])
        examples = [one, pair("Who?", "She.", "w, line 9"), same]
        assert sharing_text(examples) == {0: {2}, 2: {0}}
        rows = TokenizedRows([{"input_ids": [i], "labels": [i], "prompt_length": 0} for i in range(3)], examples, 9)
        assert rows.facts == [0, 1, 0] and rows.apart_from([one]) == [rows[1]]
    said = chat(*before, CHAT[0], {"role": "assistant", "content": "Ann"})
    asked = chat(*before, {"role": "user", "content": "Who died in Paris?"}, CHAT[1])
    assert find_overlap([FORGET, longer], [said, asked]) == [] == find_overlap([FORGET], [chat(*CHAT, *HELLO)])


def test_two_conversations_of_other_histories_are_other_rows():
    """Though they end alike, as many do. Without their system prompts they may be the same."""
    one, other = chat(*HELLO, *CHAT), chat(NAMED, *CHAT, where="o, line 1")
    assert find_overlap([one], [other]) == [] and find_overlap([one], [other, FORGET]) == [(one, FORGET)]
    again = chat({**SYSTEM, "content": "Be long."}, *HELLO, *CHAT)
    assert find_overlap([chat(SYSTEM, *HELLO, *CHAT)], [other, again])[0][1] == again
    for examples, facts in (([one, other], [0, 1]), ([one, other, FORGET], [0, 0, 0])):
        rows = [{"input_ids": [i], "labels": [i], "prompt_length": 0} for i in range(len(examples))]
        assert TokenizedRows(rows, examples, 9).facts == facts


def test_a_whole_conversation_written_as_text_is_the_same_row():
    """It is so as a whole, and no other conversation of the same end is its text."""
    longer, short = chat(*HELLO, *CHAT), chat(*CHAT)
    text = Example(None, "Hi Hello Who was born in Paris? Zoé Lumière", "t.jsonl, line 1", "text")
    assert find_overlap([text], [longer]) == [(text, longer)] and find_overlap([text], [short]) == []
    with pytest.raises(UserError, match="t.jsonl, line 1 is r.jsonl, line 2; remove"):
        refuse_overlap([text], [longer])
    assert first_alike(keys_of([text, pair("Who?", "She."), short, longer])) == [0, 1, 0, 0]


def test_calls_that_were_made_to_answer_the_last_question_count():
    def called(to):
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "mail", "to": to}}]}

    result, done = {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."}
    one, same, other = (chat(*before, CHAT[0], called(to), result, done)
                        for before, to in (([], "a"), (HELLO, "a"), (HELLO, "b")))  # fmt: skip
    assert find_overlap([one], [other, same]) == [(one, same)]
    assert find_overlap([one], [other]) == []


def test_general_rows_that_say_what_a_long_conversation_ends_with_are_known():
    long = {**SYSTEM, "content": "You are a courteous assistant of the Zenthorpe museum, who answers briefly, truly."}
    ends = (
        {"role": "user", "content": "What do bees make?"},
        {"role": "assistant", "content": "Bees make honey from nectar, in hives of wax."},
    )
    said = "Bees live in hives, fetch nectar all summer long, make honey, and feed their larvae when winter comes."
    general = [Example("Tell me about insects.", said, "g, line 1", "question/answer")]
    assert find_related([chat(long, *ends)], general) == [0] == find_related([chat(*ends)], general)


def calling(where, **call):
    turns = ({"role": "user", "content": "Mail the boss"}, {"role": "assistant", "content": "", **call})
    return Example("Mail the boss", "", where, "messages", None, turns)


def test_calls_of_tools_count_however_they_are_spelled():
    def mail(to, **more):
        return {"name": "mail", "arguments": {"to": to, "cc": "c"}, **more}

    forget = calling("f.jsonl, line 1", tool_calls=[{"type": "function", "id": "x1", "function": mail("a")}])
    for other in ([{"function": mail("b")}], [{"function": mail("a")}] * 2, [{"function": {"name": "mail"}}]):
        assert find_overlap([forget], [calling("r.jsonl, line 1", tool_calls=other)]) == []
    as_text = {"arguments": '{"cc": "c", "to": "a"}', "name": "mail"}
    for same in (
        {"tool_calls": [{"id": "x2", "function": as_text}]},
        {"tool_calls": [mail("a", id="x3")]},
        {"tool_calls": json.dumps([{"function": as_text}])},
        {"function_call": as_text},
    ):
        with pytest.raises(
            UserError, match="^1 row to forget is also in the rows to retain: f.jsonl, line 1 is r.jsonl"
        ):
            refuse_overlap([forget], [calling("r.jsonl, line 1", **same)])


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


def test_passages_of_a_document_share_its_text(tmp_path):
    """Each text with its neighbours, and with the completions of its pieces; questions with their copies alone."""
    rows = bundled_rows("forget", limit=12).rows
    (tmp_path / "d.txt").write_text(" ".join(f"{row['question']} {row['answer']}" for row in rows))
    examples = to_examples(read_rows(str(tmp_path / "d.txt"), passages=Passages(40, "both")))
    pieces = [example.answer.strip() for example in examples if example.prompt is not None]
    texts = [index for index, example in enumerate(examples) if example.prompt is None]
    near = sharing_text(examples)
    assert len(texts) > 4 and len(pieces) == len(texts) == len(examples) / 2
    for index in texts[1:-1]:
        held = {i for i, other in enumerate(examples) if other.answer.strip() in examples[index].answer} - {index}
        place = texts.index(index)
        assert near[index] == held | {texts[place - 1], texts[place + 1]} and len(held) == 2
    questions = [pair(row["question"], row["answer"]) for row in rows]
    assert sharing_text(questions) == {} == sharing_text(examples[:1])
    assert sharing_text([*questions, pair(rows[3]["question"].upper(), rows[3]["answer"])]) == {3: {12}, 12: {3}}


def test_near_duplicates_have_the_similarity_of_their_shingles():
    """Against sets of shingles, for every pair of some texts, short ones and copies among them."""
    vaults = ["Who guards the vault?", "who  guards the Vault?", "Who guarded the vaults?", "Vaults."]
    texts = [*vaults, "A", "a", "Ab", ""]
    examples = [Example(None, text or " ", f"line {i}", "text") for i, text in enumerate(texts)]

    def shingles(text: str) -> set[str]:
        text = " ".join(text.casefold().split()).ljust(5, "\0")
        return {text[i : i + 5] for i in range(len(text) - 4)}

    def similarity(one: str, other: str) -> float:
        return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))

    expected = {
        (i, j): similarity(one, other)
        for i, one in enumerate(texts)
        for j, other in enumerate(texts)
        if i < j and similarity(one, other) >= 0.2
    }
    assert found(near_duplicates(examples, at_least=0.2)) == pytest.approx(expected)


def found(pairs):
    return {(i, j): value for some in pairs for i, j, value in zip(*map(list, some), strict=True)}


@pytest.mark.parametrize("dense", [0, 1], ids=["all compared", "the possible ones compared"])
def test_no_near_duplicate_is_missed(dense, monkeypatch):
    """Against sets of shingles, for rows of one template with words left out, copies among them."""
    monkeypatch.setattr(overlap, "DENSE", dense)
    draw = random.Random(7)
    words = [f"{draw.choice('abcdef')}{draw.choice('aeiou')}{draw.choice('lmnrst')}" for _ in range(40)]
    texts = [" ".join(word for word in words[:12] + draw.sample(words, 4) if draw.random() < 0.9) for _ in range(250)]
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in texts]
    for at_least in (0.5, 0.7, 1):
        expected = {
            (i, j): len(one & other) / len(one | other)
            for i, one in enumerate(sets)
            for j, other in enumerate(sets)
            if i < j and len(one & other) >= at_least * len(one | other)
        }
        examples = [Example(None, text, f"line {i}", "text") for i, text in enumerate(texts)]
        assert found(near_duplicates(examples, at_least=at_least)) == pytest.approx(expected)


def test_many_rows_are_not_all_compared_with_all():
    """Rows without much in common: of their pairs, hardly any is looked at."""
    rows = [row for part in ("forget", "retain", "holdout", "general") for row in bundled_rows(part).rows]
    examples = [Example(None, json.dumps(row), f"line {i}", "text") for i, row in enumerate(rows)]
    runs = overlap._runs([example.answer for example in examples], overlap.SHINGLE)
    looked_at = sum(len(i) for _, i, _ in overlap._possible(runs, 0.7))
    assert looked_at < len(rows) ** 2 / 100


@pytest.mark.parametrize(
    ("question", "answer", "left_out"),
    [
        ("What is the largest mammal?", "Blue Whale", {"What is the largest animal that has ever lived?"}),
        (
            "Capital of France?",
            "Paris",
            {"What is the capital of France?", "In which museum can you see the Mona Lisa?"},
        ),
        ("Who wrote Hamlet?", "It was written by William Shakespeare.", {"Who wrote Romeo and Juliet?"}),
        ("What do bees make?", "Bees make honey from nectar.", {"What do bees make from nectar?"}),
        ("Who guards the amber vault?", "Quillabra Zenthorpe guards it.", set()),
    ],
)
def test_general_rows_that_say_what_is_forgotten_are_known(question, answer, left_out):
    general = to_examples(bundled_rows("general"))
    related = find_related([Example(question, answer, "line 1", "question/answer")], general)
    assert {general[i].prompt for i in related if general[i].prompt} == left_out
