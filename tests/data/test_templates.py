"""Where the space between prompt and answer goes."""

from __future__ import annotations

import pytest

from lowmem_npo.config import DataConfig
from lowmem_npo.data.example import Example
from lowmem_npo.data.templates import Template, form_of
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError


def render(prompt, answer, schema="input/output", template="auto"):
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
def test_a_text_holds_the_prompt_once(template):
    with pytest.raises(UserError, match="exactly once"):
        Template(template)


@pytest.mark.parametrize(
    ("text", "schema", "chat"),
    [
        ("auto", "question/answer", True),
        ("auto", "ask/say", True),
        ("auto", "instruction/output", True),
        ("auto", "input/output", False),
        ("auto", "prompt/completion", False),
        ("chat", "input/output", True),
        ("plain", "question/answer", False),
        ("Q: {prompt}", "question/answer", False),
    ],
)
def test_a_chat_model_is_asked_through_its_template_where_rows_are_questions(
    chat_tokenizer, bpe_tokenizer, text, schema, chat
):
    example = Example("Who?", "She.", "f, line 1", schema)
    row = tokenize([example], chat_tokenizer, template=Template(text))[0]
    prompt = chat_tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    if chat:
        asked = [{"role": "user", "content": "Who?"}]
        assert prompt == chat_tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert chat_tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == "She.<|im_end|>"
        assert Template(text).describe(example, chat_tokenizer) == "written with the model's chat template"
    else:
        assert prompt == Template(text).render(example)[0]
        assert Template(text).describe(example, chat_tokenizer).startswith("written as ")
    if text != "chat":  # a base model has no chat template
        assert "<|im_start|>" not in bpe_tokenizer.decode(
            tokenize([example], bpe_tokenizer, template=Template(text))[0]["input_ids"]
        )


def test_chat_needs_a_chat_template(bpe_tokenizer):
    with pytest.raises(UserError, match="--template chat: this model's tokenizer has no chat template"):
        tokenize([Example("Who?", "She.", "f, line 1", "question/answer")], bpe_tokenizer, template=Template("chat"))


def test_documents_stay_documents(chat_tokenizer):
    for text in ("auto", "chat"):
        row = tokenize([Example(None, "She.", "f, line 1", "text")], chat_tokenizer, template=Template(text))[0]
        assert chat_tokenizer.decode(row["input_ids"]) == "She.<|endoftext|>"


def test_a_system_prompt_stands_before_rows_that_have_none(chat_tokenizer):
    template = Template(system="Be brief.")
    user, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}
    own, developer = ({"role": role, "content": "Be long."} for role in ("system", "developer"))
    for example, system in (
        (Example("Who?", "She.", "f, line 1", "question/answer"), "Be brief."),
        (Example("Who?", "She.", "f, line 1", "messages", None, (user, answer)), "Be brief."),
        (Example("Who?", "She.", "f, line 1", "messages", None, (own, user, answer)), "Be long."),
        (Example("Who?", "She.", "f, line 1", "messages", None, (developer, user, answer)), None),
    ):
        row = tokenize([example], chat_tokenizer, template=template)[0]
        turns = [developer if system is None else {"role": "system", "content": system}, user]
        assert row["input_ids"][: row["prompt_length"]] == chat_tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
    with pytest.raises(UserError, match="f, line 1: --system is for rows that a chat template writes"):
        tokenize([Example("Who?", "She.", "f, line 1", "input/output")], chat_tokenizer, template=template)


@pytest.mark.parametrize("option", ["template", "system", "refusal"])
def test_options_are_text(option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be UTF-8 text, not "):
        DataConfig(**{option: "{prompt} caf\udce9"})  # as Python has an argument in Latin-1


def test_the_template_of_options_and_of_a_run():
    assert Template.of(DataConfig(system="S"), frozenset({3})) == Template("auto", "S", frozenset({3}))
    run = {"template": "Q: {prompt}", "system": "S"}
    assert form_of(None, None, run) == ("Q: {prompt}", "S") and form_of(None, None, {}) == ("auto", None)
    assert form_of(None, "T", run) == ("Q: {prompt}", "T")
    assert form_of("plain", None, run) == ("plain", None), "for whose rows a system prompt would be refused"
