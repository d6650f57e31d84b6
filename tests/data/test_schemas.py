"""Rows of every recognised schema become the same example; what does not fit is named."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy
import pandas
import pytest

from lowmem_npo.data.example import PASSAGE, Example
from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.schemas import to_examples, with_alternatives, with_answer
from lowmem_npo.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def one(row, **columns):
    return to_examples(Rows("f.jsonl", [row], [7]), **columns)[0]


@pytest.mark.parametrize("columns", ["input/output", "question/answer", "prompt/completion"])
def test_pairs_are_recognised(columns):
    prompt, answer = columns.split("/")
    example = one({"id": 3, answer: "A", prompt: "Q", "task": "Task2"})
    assert (example.prompt, example.answer, example.schema, example.id) == ("Q", "A", columns, "3")
    assert example.where == "f.jsonl, line 7"
    assert example.messages is None


def test_text_has_no_prompt():
    example = one({"text": "A"})
    assert (example.prompt, example.answer, example.schema) == (None, "A", "text")


@pytest.mark.parametrize("row", [{"messages": [QUESTION, ANSWER]}, {"prompt": [QUESTION], "completion": [ANSWER]}])
def test_conversations_are_recognised(row):
    example = one(row)
    assert (example.prompt, example.answer) == ("Q", "A")
    assert example.messages == (QUESTION, ANSWER)


TURNS = (QUESTION, ANSWER)
CALL = [{"type": "function", "function": {"name": "find", "arguments": {"of": "Q"}}}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"from": "user", "value": "Q", "weight": None}, {"from": "assistant", "value": "A"}]},
        {"messages": json.dumps(TURNS)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
        {"prompt": [QUESTION], "completion": "A"},
        {"prompt": "Q", "completion": [ANSWER]},
        {"messages": [{**QUESTION, "tool_calls": None, "reasoning_content": None}, {**ANSWER, "tool_calls": None}]},
    ],
)
def test_every_spelling_of_a_conversation_is_read(row):
    assert one(row).messages == TURNS


SYSTEM = {"role": "system", "content": "Be brief."}
NEXT = ({"role": "user", "content": "R"}, {"role": "assistant", "content": "B"})


@pytest.mark.parametrize(
    ("prompt", "completion", "turns"),
    [
        ("Q", [*TURNS], TURNS),
        (" q\n", [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], TURNS),
        ([QUESTION], [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER], TURNS),
        ("Q", [SYSTEM, *TURNS], (SYSTEM, *TURNS)),
        ([SYSTEM, QUESTION], [*TURNS], (SYSTEM, *TURNS)),
        ([SYSTEM, QUESTION], [SYSTEM, *TURNS], (SYSTEM, *TURNS)),
        ([SYSTEM], [SYSTEM, *TURNS], (SYSTEM, *TURNS)),
        ("Q", [SYSTEM, ANSWER], (SYSTEM, *TURNS)),
        ("Q", [*TURNS, *NEXT], (*TURNS, *NEXT)),
        ([*TURNS, NEXT[0]], [*TURNS, *NEXT], (*TURNS, *NEXT)),
        ([*TURNS], [*NEXT], (*TURNS, *NEXT)),
        ([ANSWER, QUESTION], [ANSWER, *TURNS], (ANSWER, *TURNS)),
    ],
)
def test_a_completion_may_hold_the_prompt_again(prompt, completion, turns):
    row = {"prompt": prompt, "rejected": completion}
    named = {"prompt_column": "prompt", "answer_column": "rejected"}
    assert one(row, **named).messages == turns
    cells = {"prompt": prompt if isinstance(prompt, str) else json.dumps(prompt), "rejected": json.dumps(completion)}
    if completion != [SYSTEM, ANSWER]:  # which beside a text only looks like turns
        assert one(cells, **named).messages == turns, "as a CSV has it"


@pytest.mark.parametrize(
    ("prompt", "completion", "said"),
    [
        ("Q", [*NEXT], "its message 1, from user, is another"),
        ([SYSTEM, QUESTION], [{**SYSTEM, "content": "Be long."}, *TURNS], "its message 1, from system, is another"),
        ("Q", [SYSTEM, *NEXT], "its message 2, from user, is another"),
        ([*TURNS, NEXT[0]], [QUESTION, NEXT[1]], "its message 2, from assistant, is another"),
        ([*TURNS, NEXT[0]], [*TURNS], "it ends before"),
        ([*TURNS], [QUESTION, NEXT[1]], "its message 2, from assistant, is another"),
        ([QUESTION, QUESTION], [*TURNS], "its message 2 is from assistant, not from user"),
    ],
)
def test_a_completion_that_is_another_conversation_is_refused(prompt, completion, said):
    whole = f"line 7: completion is a whole conversation that begins otherwise than prompt ({said}); make"
    with pytest.raises(UserError, match=re.escape(whole)):
        one({"prompt": prompt, "completion": completion})


NO = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "Q", "rejected": [*TURNS], "chosen": [QUESTION, NO]}, ("No.",)),
        ({"prompt": [QUESTION], "rejected": [ANSWER], "chosen": [NO]}, ("No.",)),
        ({"prompt": [SYSTEM, QUESTION], "rejected": [*TURNS], "chosen": [SYSTEM, QUESTION, NO]}, ("No.",)),
        ({"prompt": "Q", "rejected": "A", "chosen": [QUESTION, NO]}, ("No.",)),
        ({"prompt": "Q", "rejected": "A", "chosen": [[QUESTION, NO], [NEXT[1]], "Never."]}, ("No.", "B", "Never.")),
        ({"prompt": "Q", "rejected": [*TURNS, *NEXT], "chosen": [*TURNS, NEXT[0], NO]}, ("No.",)),
        ({"prompt": "Q", "rejected": "A", "chosen": json.dumps([QUESTION, NO])}, ("No.",)),
        ({"prompt": "Q", "rejected": [*TURNS], "chosen": json.dumps([NO])}, ("No.",)),
        ({"prompt": "Show one.", "rejected": "A", "chosen": json.dumps([NO])}, (json.dumps([NO]),)),
        ({"rejected": [*TURNS], "chosen": [QUESTION, NO]}, ("No.",)),
        ({"rejected": json.dumps([*TURNS]), "chosen": json.dumps([QUESTION, NO])}, ("No.",)),
    ],
)
def test_another_answer_may_be_a_conversation(row, texts):
    prompts = {"prompt_column": "prompt"} if "prompt" in row else {}
    example = one(row, answer_column="rejected", alternative_column="chosen", **prompts)
    assert example.alternatives == texts
    assert bool(example.messages) == (isinstance(row["rejected"], list) or "prompt" not in row)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([NEXT[0], NO], "chosen is a whole conversation that begins otherwise than the row's prompt (its message 1"),
        ([QUESTION, NO, QUESTION], "chosen does not end with an assistant's answer"),
        ([QUESTION, ANSWER], "chosen holds the answer itself"),
        ([{"text": "No."}], "chosen is not text, a list of texts, or a list of {"),
        ([{**NO, "content": " "}], "line 7, chosen, message 1 has an empty content"),
        (str([QUESTION, NO]), "chosen is not a list of"),
    ],
)
def test_a_conversation_that_is_no_other_answer_is_named(chosen, message):
    row = {"prompt": "Q", "rejected": [ANSWER], "chosen": chosen}
    with pytest.raises(UserError, match=re.escape(message)):
        one(row, prompt_column="prompt", answer_column="rejected", alternative_column="chosen")
    if isinstance(chosen, list):
        with pytest.raises(UserError, match="chosen is a list of objects, not text"):
            one(row, prompt_column="prompt", answer_column="rejected", paraphrase_column="chosen")


def test_a_prompts_text_that_python_shows_again_is_refused():
    with pytest.raises(UserError, match="line 7: completion is not a list of .* not as Python shows it"):
        one({"prompt": "Q", "completion": str(numpy.array([QUESTION, ANSWER]))})


def test_what_a_conversation_has_beside_its_text_is_kept():
    turns = [
        {"role": "system", "content": ""},
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "name": "find", "content": "A"},
        {**ANSWER, "reasoning_content": "It was found."},
    ]
    options = {"enable_thinking": False}
    for tools in (CALL, json.dumps(CALL)):
        example = one({"messages": turns, "tools": tools, "chat_template_kwargs": options})
        assert example.messages == (*turns[:2], {**turns[2], "content": ""}, *turns[3:])
        assert example.options == {"enable_thinking": False, "tools": CALL}


@pytest.mark.parametrize("columns", [["messages"], ["prompt", "completion"]])
@pytest.mark.parametrize("turned", [False, True])
def test_a_cell_may_hold_a_conversation_as_json_and_not_as_python_shows_it(columns, turned, tmp_path):
    path = tmp_path / "f.csv"
    first, last = ({key: turn[key] for key in sorted(turn, reverse=not turned)} for turn in (QUESTION, ANSWER))
    parts = [[first, last]] if len(columns) == 1 else [[first], [last]]

    def read(form):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, [form(part) for part in parts]])
        return to_examples(read_rows(str(path)))[0]

    assert read(json.dumps).messages == (QUESTION, ANSWER)
    shown = rf"f.csv, line 2: {columns[0]} is not a list of .* as JSON with double quotes \(json.dumps\), not as Python"
    for form in (str, lambda part: str(numpy.array(part))):
        with pytest.raises(UserError, match=shown):
            read(form)


def test_several_turns_before_the_answer_as_numpy_shows_them_are_no_text():
    shown = {"prompt": str(numpy.array([QUESTION, ANSWER, QUESTION])), "completion": str(numpy.array([ANSWER]))}
    with pytest.raises(UserError, match="prompt is not a list of"):
        one(shown)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who may?", '[{"role": "admin", "permissions": ["all"]}]'),
        ("Where?", '[{"from": "Berlin", "to": "Rome"}]'),
        ("Where, in Python?", "[{'from': 'Berlin', 'to': 'Rome'}]"),
        ('[{"role": "user", "content": "hi"}] What is this?', "A chat."),
        ("Show an example chat.", json.dumps([QUESTION, ANSWER])),
        (json.dumps([QUESTION]), "A chat."),
        ("An example?", str([QUESTION, ANSWER])),
    ],
)
def test_what_only_looks_like_turns_is_text(question, answer):
    example = one({"question": question, "answer": answer})
    assert (example.prompt, example.answer, example.messages) == (question, answer, None)


def test_alpaca_and_dolly():
    for answer, more in (("output", "input"), ("response", "context"), ("response", "input"), ("output", "context")):
        assert one({"instruction": "Translate.", more: "Q", answer: "A"}).prompt == "Translate.\nQ"
        assert one({"instruction": "Say A.", more: "", answer: "A"}).prompt == "Say A."
        assert one({"instruction": "Say A.", answer: "A"}).schema == f"instruction/{answer}"
    named = {"prompt_column": "instruction", "answer_column": "context"}
    assert one({"instruction": "Q", "context": "A"}, **named).prompt == "Q"  # the answer is no part of it
    row = {"instruction": "Q", "input": "", "output": "A", "system": "Be brief.", "history": [["1", "2"]]}
    assert [turn["content"] for turn in one(row).messages] == ["Be brief.", "1", "2", "Q", "A"]
    assert one({**row, "system": "", "history": []}).messages is None
    assert one({**row, "history": json.dumps(row["history"])}) == one(row)
    with pytest.raises(UserError, match="line 7: history is not a list of"):
        one({**row, "history": ["1"]})


@pytest.mark.parametrize("blank", ["", " ", "\n\t", None, float("nan")])
def test_a_field_that_need_not_be_filled_may_be_blank(blank):
    for answer, more in (("output", "input"), ("response", "context")):
        asked = one({"instruction": "Say A.", more: blank, answer: "A"})
        assert (asked.prompt, asked.schema) == ("Say A.", f"instruction/{answer}")
    row = {"instruction": "Q", "output": "A"}
    assert one({**row, "input": blank, "system": blank, "history": blank}) == one(row)
    asked = one({**row, "system": blank, "history": [["1", "2"]]})
    assert [turn["content"] for turn in asked.messages] == ["1", "2", "Q", "A"]
    beside = {"system": blank, "tools": blank, "chat_template_kwargs": blank}
    assert one({"messages": [*TURNS], **beside}).messages == TURNS
    with pytest.raises(UserError, match="line 7 has (an empty|no) instruction"):
        one({**row, "instruction": blank})


@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_a_turn_that_need_say_nothing_may_be_blank(blank):
    """Of a call of a tool, as models write it, and of what the tool gives back."""
    called = {"role": "assistant", "content": blank, "tool_calls": CALL}
    turns = ({"role": "system", "content": blank}, QUESTION, called, {"role": "tool", "content": blank}, ANSWER)
    assert one({"messages": [*turns]}).messages == turns
    assert one({"messages": [QUESTION, called]}).answer == json.dumps([CALL, None])
    for turn in (QUESTION, ANSWER):
        with pytest.raises(UserError, match="has an empty content"):
            one({"messages": [{**other, "content": " "} if other is turn else other for other in TURNS]})


def test_named_columns_take_precedence():
    row = {"question": "q", "answer": "a", "frage": "F", "antwort": "W"}
    example = one(row, prompt_column="frage", answer_column="antwort")
    assert (example.prompt, example.answer, example.schema) == ("F", "W", "frage/antwort")
    assert one(row, answer_column="antwort").prompt is None


def test_a_column_that_differs_in_case_alone_may_hold_other_answers():
    row = {"question": "Q", "answer": "A", "Answer": "B"}
    assert one(row, alternative_column="Answer").alternatives == ("B",)
    with pytest.raises(UserError, match="--alternative-column Answer: that is the column of the answers"):
        one({"question": "Q", "Answer": "A"}, alternative_column="answer")


def test_a_cell_may_hold_a_list_of_texts_as_json(tmp_path):
    path, texts = tmp_path / "f.csv", ["In A.", 'In "B".']
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer", "alt"], ["Q", "A", json.dumps(texts)], ["Q", "A", "In A."]])
    first, second = to_examples(read_rows(str(path)), alternative_column="alt")
    assert (first.alternatives, second.alternatives) == (tuple(texts), ("In A.",))
    assert to_examples(read_rows(str(path)), paraphrase_column="alt")[0].paraphrases == tuple(texts)
    assert one({"question": "Q", "answer": "A", "paraphrased_question": json.dumps(texts)}).paraphrases == tuple(texts)
    for text in ("[redacted]", "[1, 2]", '{"a": 1}', "'A' or 'B'", "2"):  # none is a list of texts
        assert one({"question": "Q", "answer": "A", "alt": text}, alternative_column="alt").alternatives == (text,)
    with pytest.raises(UserError, match="alt holds the answer itself"):
        one({"question": "Q", "answer": "A", "alt": '["B", "A"]'}, alternative_column="alt")


@pytest.mark.parametrize("column", ["alt", "paraphrased_question"])
@pytest.mark.parametrize("write", [str, lambda texts: str(numpy.array(texts)), lambda texts: str([None, *texts])])
def test_a_list_that_is_no_json_is_no_text(write, column, tmp_path):
    """As `to_csv` of pandas writes a column of lists, or of the arrays that it makes of a Parquet file's."""
    row = {"question": "Q", "answer": "A", column: ["In A.", "It's in B."]}
    path = tmp_path / "f.csv"
    pandas.DataFrame([{**row, column: write(row[column])}]).to_csv(path, index=False)
    with pytest.raises(UserError, match=f"f.csv, line 2: {column} holds a list as Python writes it, not as JSON; "):
        to_examples(read_rows(str(path)), alternative_column=column if column == "alt" else None)
    code = {**row, column: ["['a', 'b']"]}
    assert one(code, alternative_column=column).alternatives == ("['a', 'b']",)
    for text in ('["yes"] or ["no"]', "['a', 'b'] + ['c']", "['a'] is what is meant by x[1]", "[unquoted, 'a']"):
        assert one({**row, column: text}, alternative_column=column).alternatives == (text,)
    with pytest.raises(UserError, match=f"{column} is a number, not text"):
        one({**row, column: '["In A.", 5]'}, alternative_column=column if column == "alt" else None)


def test_an_answer_in_other_spacing_case_or_punctuation_is_no_other_answer():
    def alternatives(answer, *others):
        return one({"question": "Q", "answer": answer, "alt": [*others]}, alternative_column="alt").alternatives

    for same in (" In  Kyiv.\n", "in kyiv", "“In Kyiv”!", "Ｉｎ\u00a0Kyiv."):
        with pytest.raises(UserError, match="line 7: alt holds the answer itself"):
            alternatives("In Kyiv.", "In Rome.", same)
    for answer, other in (("C++", "C"), ("-5", "5"), ("$5", "€5"), ("?", "!"), ("3.5", "35")):
        assert alternatives(answer, other) == (other,)


def test_a_group_is_the_same_however_its_accents_are_written():
    rows = [{"text": "A", "of": name} for name in ("Jos\u00e9", "Jose\u0301", "Jose")]
    first, second, third = (example.group for example in to_examples(Rows("f", rows), group_column="of"))
    assert first == second != third


def test_a_group_is_the_same_however_its_number_is_written():
    rows = [{"text": "A", "of": value} for value in (1, 1.0, "1", " 1 ", 1.5, True)]
    assert [example.group for example in to_examples(Rows("f", rows), group_column="of")] == [*"1111", "1.5", "True"]
    assert one({"text": "A", "id": 3.0}).id == "3"  # an integer column with a gap, as pandas writes it


def test_nan_is_a_missing_value():
    nan = float("nan")
    rows = [{"text": "A", "of": "x", "id": 1.0}, {"text": "B", "of": nan, "id": nan}, {"text": "C", "of": None}]
    examples = to_examples(Rows("f", rows), group_column="of")
    assert [example.group for example in examples] == ["x", None, None]
    assert [example.id for example in examples] == ["1", None, None]
    with pytest.raises(UserError, match="has no value in of"):
        one({"text": "A", "of": nan}, group_column="of")
    with pytest.raises(UserError, match="line 7 has no answer"):
        one({"question": "Q", "answer": nan})
    assert one({"question": "Q", "answer": "A", "paraphrased_question": nan}).paraphrases == ()


def test_unknown_columns_are_listed():
    with pytest.raises(UserError, match=r"f\.csv has the columns x, y, none"):
        to_examples(Rows("f.csv", [{"x": "", "": "", "y": "", " ": ""}]))
    with pytest.raises(UserError, match=r"f\.jsonl has the columns a, b.*--prompt-column and --answer-column"):
        one({"a": "x", "b": "y"})
    with pytest.raises(UserError, match=r"f\.jsonl has no column c; it has a, b"):
        one({"a": "x", "b": "y"}, prompt_column="a", answer_column="c")
    with pytest.raises(UserError, match="--answer-column"):
        one({"a": "x"}, prompt_column="a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q"}, "f.jsonl, line 8 has no answer"),
        ({"question": None, "answer": "A"}, "f.jsonl, line 8 has no question"),
        ({"question": "Q", "answer": ""}, "f.jsonl, line 8 has an empty answer"),
        ({"question": " \n", "answer": "A"}, "f.jsonl, line 8 has an empty question"),
        ({"question": "Q", "answer": 42}, "f.jsonl, line 8: answer is a number, not text"),
        ({"question": "Q", "answer": True}, "f.jsonl, line 8: answer is true or false, not text"),
        ({"question": ["Q"], "answer": "A"}, "f.jsonl, line 8: question is a list, not text"),
        ({"question": {"a": 1}, "answer": "A"}, "f.jsonl, line 8: question is an object, not text"),
    ],
)
def test_fields_that_do_not_fit_are_named(row, message):
    rows = Rows("f.jsonl", [{"question": "fine", "answer": "fine"}, row], [1, 8])
    with pytest.raises(UserError) as error:
        to_examples(rows)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "line 7 has no messages"),
        ([], "line 7 has no messages"),
        ("hello", "is not a list of"),
        (["hello"], "is not a list of"),
        ([QUESTION], "does not end with an assistant's answer"),
        ([ANSWER], "does not end with an assistant's answer"),
        ([QUESTION, ANSWER, QUESTION], "does not end with an assistant's answer"),
        (
            [QUESTION, {"role": "assistant", "content": [{"type": "image"}]}],
            "message 2: content has a part of type image, which is no",
        ),
        ([{"role": "user"}, ANSWER], "message 1 has no content"),
        ([{"content": "Q"}, ANSWER], "message 1 has no role"),
        ([{"role": "user", "content": ["Q", ""]}, ANSWER], "message 1: content has a part of type str, which is no"),
        ([{"role": "user", "content": [{}]}, ANSWER], "message 1: content has"),
        ([{"from": "narrator", "value": "Q"}, ANSWER], "message 1 is from 'narrator'"),
        ([QUESTION, {"role": "assistant", "content": None}], "message 2 has no content"),
        ([QUESTION, {"role": "assistant", "content": ""}], "message 2 has an empty content"),
        ([QUESTION, {**ANSWER, "weight": 0}], "the answer has weight 0, which keeps it out of training"),
        ([QUESTION, {**ANSWER, "train": False}], "the answer has train False, which keeps it out of training"),
    ],
)
def test_conversations_that_do_not_fit_are_named(messages, message):
    with pytest.raises(UserError) as error:
        one({"messages": messages})
    assert message in str(error.value)
    assert "line 7" in str(error.value)


def test_a_weight_that_changes_nothing_is_taken():
    turns = [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "weight": 1}]
    assert one({"messages": turns}).answer == ANSWER["content"]


def test_refusals_replace_every_answer():
    examples = [one({"question": "Q", "answer": "A"}), one({"messages": [QUESTION, ANSWER]})]
    pair, conversation = with_answer(examples, "I don't know.")
    assert (pair.prompt, pair.answer, pair.where) == ("Q", "I don't know.", examples[0].where)
    assert conversation.messages == (QUESTION, {"role": "assistant", "content": "I don't know."})
    assert examples[1].messages == (QUESTION, ANSWER)


def test_another_answer_is_joined_to_its_prompt_as_the_true_one_is():
    """Where rows are joined as they are, its white space is the true one's, unless it has its own; and it ends, though
    the document goes on."""
    joined = [
        one({"prompt": "The sky is", "completion": " blue."}),
        Example("Half", "\nof it", "d", PASSAGE, continues=True),
    ]
    apart = [one({"prompt": "The sky is ", "completion": "blue."}), one({"question": "Q", "answer": " A"})]
    refused = with_answer([*joined, *apart], "No.")
    assert [each.answer for each in refused] == [" No.", "\nNo.", "No.", "No."]
    assert not any(each.continues for each in refused)
    others = [replace(each, alternatives=("green.", " red.")) for each in joined]
    assert [each.answer for each in with_alternatives(others)] == [" green.", "\ngreen.", " red.", " red."]


def test_text_cannot_be_refused():
    with pytest.raises(UserError, match=r"f\.jsonl, line 7 is text without a question") as error:
        with_answer([one({"text": "A"})], "No.")
    assert "use a forget term that teaches no refusal" in str(error.value)  # whichever was asked for
    with pytest.raises(UserError, match="--refusal"):
        with_answer([one({"question": "Q", "answer": "A"})], " ")
