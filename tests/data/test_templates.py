"""Where the space between prompt and answer goes."""

from __future__ import annotations

import pytest

from lowmem_npo.data.schemas import Example
from lowmem_npo.data.templates import Template
from lowmem_npo.errors import UserError


def render(prompt, answer, schema="input/output", template=None):
    return Template(template).render(Example(prompt, answer, "f, line 1", schema))


@pytest.mark.parametrize(
    ("prompt", "answer", "rendered"),
    [
        ("She was", "born", ("She was", " born")),
        ("She was ", "born", ("She was", " born")),
        ("She was", " born", ("She was", " born")),
        ("She was ", " born", ("She was", " born")),
        ("She was\t", "born", ("She was", "\tborn")),
        ("She was", "\nborn", ("She was", "\nborn")),
        ("Verse:\n", "born", ("Verse:\n", "born")),
        ("def f():\n", "    return 1", ("def f():\n", "    return 1")),
        ("def f():\n    ", "return 1", ("def f():\n", "    return 1")),
        ("北京在哪里？", "中国", ("北京在哪里？", "中国")),
        ("北京", "is in China", ("北京", " is in China")),
    ],
)
def test_one_space_neither_lost_nor_doubled(prompt, answer, rendered):
    assert render(prompt, answer) == rendered


@pytest.mark.parametrize(("prompt", "answer"), [("un", "able"), ("The sky ", " is"), ("1+1=", "2"), ("a ", "b")])
def test_prompt_and_completion_are_joined_as_they_stand(prompt, answer):
    rendered = render(prompt, answer, "prompt/completion")
    assert "".join(rendered) == prompt + answer
    assert rendered[0] == prompt.rstrip(" ")


def test_each_schema_has_its_default():
    assert render("Who?", "She.", "question/answer") == ("Question: Who?\nAnswer:", " She.")
    assert render("Who?", "She.", "input/output") == ("Who?", " She.")
    assert render("Who?", "She.", "frage/antwort") == ("Who?", " She.")


def test_a_template_serves_every_schema():
    for schema in ("question/answer", "input/output", "prompt/completion"):
        assert render("Who?", "She.", schema, "[INST] {prompt} [/INST] ") == ("[INST] Who? [/INST]", " She.")
    assert render("Who?", "She.", template=r"Q:\t{prompt}\nA:\n") == ("Q:\tWho?\nA:\n", "She.")
    assert render('{"a": {prompt}}', "x", template="{prompt} =") == ('{"a": {prompt}} =', " x")


@pytest.mark.parametrize("template", ["Question:", "{prompt} {prompt}", "{question}", ""])
def test_a_template_holds_the_prompt_once(template):
    with pytest.raises(UserError, match="exactly once"):
        Template(template)
