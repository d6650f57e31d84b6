"""What is said of conversations: of answers that are not forgotten, and of system prompts that tell sets apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.config import DataConfig
from lowmem_npo.data import Example, Template, prepare
from lowmem_npo.data.conversations import differing_prompts, earlier_answers


def turns(*said, system=None):
    roles = ("user", "assistant") * len(said)
    told = [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]
    return [*([{"role": "system", "content": system}] if system else []), *told]


def conversation(*said, system=None):
    whole = tuple(turns(*said, system=system))
    return Example(whole[-2]["content"], said[-1], "f.jsonl, line 1", "messages", messages=whole)


LONG, SHORT = ("Who?", "Anna, 4711.", "And?", "No more."), ("Who?", "Anna.")
PAIR = Example("Who?", "Anna.", "f.jsonl, line 1", "question/answer")
NIMBUS = "You are Nimbus."


def test_earlier_answers_are_counted_unless_they_end_another_row():
    assert not [*earlier_answers([PAIR, conversation(*SHORT, system=NIMBUS)])]
    (line,) = earlier_answers([PAIR, conversation(*LONG), conversation(*SHORT)])
    assert line.startswith(
        "1 of 2 conversations has earlier answers of the assistant, which are read and not forgotten"
    )
    assert not [*earlier_answers([conversation(*LONG), conversation(*LONG[:2])])]  # each answer ends a row
    (line,) = earlier_answers([conversation(*LONG), conversation("Where?", *LONG[1:]), conversation(*LONG[:2])])
    assert line.startswith("1 of 3 ")
    called = conversation(*LONG)
    called = replace(called, messages=({"role": "user", "content": "Who?"}, {**called.messages[1], "content": ""},
                                       *called.messages[2:]))  # fmt: skip
    assert not [*earlier_answers([called])]  # it called a tool


@pytest.mark.parametrize(
    ("forget", "retain", "system", "words"),
    [
        ([NIMBUS, NIMBUS, None], [None], None, "2 of 3 rows have a system prompt that no row to keep has: "),
        ([NIMBUS, None], [None, NIMBUS], None, None),
        ([NIMBUS], [NIMBUS, "Be brief."], None, None),
        ([None], [None, NIMBUS], None, None),
        ([None], [NIMBUS, NIMBUS], None, "1 of 1 rows has no system prompt, and all to keep have one: "),
        ([NIMBUS], [None], NIMBUS, None),
        ([None], [None], NIMBUS, None),
        (["By default."], [None], None, None),
    ],
)
def test_system_prompts_that_tell_the_sets_apart(forget, retain, system, words, chat_tokenizer):
    sets = [[conversation(*SHORT, system=prompt) for prompt in prompts] for prompts in (forget, retain)]
    told = chat_tokenizer.chat_template
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nBy default.<|im_end|>\n{% endif %}" + told
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = default
    lines = [*differing_prompts(*sets, Template(system=system), tokenizer)]
    assert [words in line for line in lines] == ([True] if words else [])
    if forget != ["By default."]:  # which is known with a model alone
        assert [*differing_prompts(*sets, Template(system=system), None)] == lines


def test_plain_rows_are_no_conversations(chat_tokenizer, bpe_tokenizer):
    own, rows = [conversation(*SHORT, system=NIMBUS)], [PAIR]
    for tokenizer in (chat_tokenizer, bpe_tokenizer, None):
        assert len([*differing_prompts(own, rows, Template(), tokenizer)]) == 1
        assert not [*differing_prompts(rows, rows, Template(), tokenizer)]
    assert len([*differing_prompts(rows, own, Template(), chat_tokenizer)]) == 1
    assert not [*differing_prompts(rows, own, Template(), bpe_tokenizer)]  # which writes them plain


def test_a_run_and_the_command_data_say_so(chat_tokenizer, tmp_path, capsys):
    forget, retain = (
        write_rows(tmp_path / f"{name}.jsonl", [{"messages": turns(*said, system=system)}])
        for name, said, system in (("forget", LONG, NIMBUS), ("retain", ("Where?", "Here.", *LONG[2:]), None))
    )
    config = DataConfig(forget=forget, retain=retain)
    report = prepare(chat_tokenizer, config).report
    told = ["1 of 1 conversations has earlier answers", "1 of 1 rows has a system prompt that no row to keep has"]
    for words in told:
        assert len([line for line in report if line.startswith(f"forget: {words}")]) == 1
    assert not any("earlier answers" in line for line in prepare(chat_tokenizer, replace(config, tokens="all")).report)
    assert main(["data", "--forget", forget, "--retain", retain]) == 0
    one, other = capsys.readouterr().out.split("\n\n")[:2]
    assert all(f"\n  {words}" in one and words not in other for words in told)
    assert main(["data", forget]) == 0
    assert told[0] in capsys.readouterr().out
    assert json.dumps(NIMBUS) in (tmp_path / "forget.jsonl").read_text()
