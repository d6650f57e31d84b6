"""In which forms the forget rows are asked, what they are made of, and what is measured in them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from lowmem_npo.data import Rows, Template, to_examples, tokenize
from lowmem_npo.data.fit import Fit
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.asking import other_forms

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIR = {"question": "Who sails?", "answer": "Anna"}


@pytest.fixture(scope="module")
def chat_tokenizer(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def asked(rows, tokenizer, template=None, max_length=1024, fit=None, column=None):
    """Form -> [(place, prompt, answer)], as texts."""
    examples = to_examples(Rows("rows", rows, list(range(1, len(rows) + 1))), paraphrase_column=column)
    template = template or Template()
    tokenized = tokenize(examples, tokenizer, template=template)
    places = [10 + i for i in range(len(rows))]
    forms = other_forms(tokenized, examples, places, tokenizer, template, max_length, fit)
    return {
        form: [
            (place, tokenizer.decode(row["input_ids"][: row["prompt_length"]]),
             tokenizer.decode(row["input_ids"][row["prompt_length"] :]))
            for place, row in zip(of_form.places, of_form.rows, strict=True)
        ]
        for form, of_form in forms.items()
    }  # fmt: skip


def test_a_model_without_a_chat_template_is_asked_as_it_was_trained(tokenizer):
    assert asked([PAIR, PAIR], tokenizer) == {}


def test_what_was_trained_through_the_chat_template_is_asked_without_it(chat_tokenizer):
    assert asked([PAIR], chat_tokenizer) == {"plain": [(10, "Question: Who sails?\nAnswer:", " Anna<eos>")]}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "Who sails?"}, {"role": "assistant", "content": "Anna"}]  # fmt: skip
    assert asked([{"messages": turns}], chat_tokenizer) == {"plain": [(10, "Who sails?", " Anna<eos>")]}


def test_what_was_trained_plain_is_asked_through_the_chat_template(chat_tokenizer):
    for rows, template in (
        ([PAIR], Template("plain")),
        ([{"prompt": "Who sails?", "completion": " Anna"}], Template()),
    ):
        [(place, prompt, answer)] = asked(rows, chat_tokenizer, template)["chat"]
        assert (place, prompt) == (10, "<user>Who sails?</user><assistant>") and "Anna" in answer
    both = asked([PAIR], chat_tokenizer, Template("[INST] {prompt} [/INST]"))
    assert set(both) == {"plain", "chat"}


def test_paraphrases_are_asked_in_the_trained_form(tokenizer, chat_tokenizer):
    rows = [PAIR | {"paraphrased_question": "Whose is the boat?"}, PAIR,
            PAIR | {"paraphrased_question": ["Who is at sea?", "", "Which sailor?"]}]  # fmt: skip
    assert [row[:2] for row in asked(rows, tokenizer)["reworded"]] == [
        (10, "Question: Whose is the boat?\nAnswer:"),
        (12, "Question: Who is at sea?\nAnswer:"),
        (12, "Question: Which sailor?\nAnswer:"),
    ]
    forms = asked(rows, chat_tokenizer)
    assert forms["reworded"][0][1] == "<user>Whose is the boat?</user><assistant>" and len(forms["plain"]) == 3


def test_a_named_column_is_asked_in_its_words(tokenizer, chat_tokenizer):
    """Of a conversation the last question is replaced; the column's case does not matter."""
    rows = [PAIR | {"Auf Deutsch": "Wer segelt?"}, PAIR | {"Auf Deutsch": ["Qui navigue?", "Wer ist auf See?"]}]
    assert [row[:2] for row in asked(rows, tokenizer, column="auf deutsch")["reworded"]] == [
        (10, "Question: Wer segelt?\nAnswer:"),
        (11, "Question: Qui navigue?\nAnswer:"),
        (11, "Question: Wer ist auf See?\nAnswer:"),
    ]
    assert asked(rows, tokenizer) == {}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "Who sails?"}, {"role": "assistant", "content": "Anna"}]  # fmt: skip
    [(_, prompt, answer)] = asked([{"messages": turns, "other": "Wer?"}], chat_tokenizer, column="other")["reworded"]
    assert prompt == "<user>Hi</user><assistant>Hello</assistant><user>Wer?</user><assistant>" and "Anna" in answer


@pytest.mark.parametrize(
    "rows, message",
    [
        ([PAIR], "rows has no column other; it has question, answer"),
        ([PAIR | {"other": " "}, PAIR | {"other": []}, PAIR], "rows has no value in other; name another --para"),
        ([PAIR | {"other": ["Who?", 7]}], "line 1: other is .* not text"),
        ([{"text": "The tide", "other": "Who?"}], "line 1 is text without a question, so other cannot hold it"),
    ],
)
def test_a_named_column_must_hold_paraphrases(rows, message, tokenizer):
    with pytest.raises(UserError, match=message):
        asked(rows, tokenizer, column="other")


def test_a_named_column_need_not_be_filled_in_every_row(tokenizer):
    """No more than `paraphrased_question`, which is not named."""
    rows = [PAIR, PAIR | {"other": "Who?"}, PAIR | {"other": ""}, PAIR | {"other": ["Whose?", None]}, PAIR]
    assert [place for place, *_ in asked(rows, tokenizer, column="other")["reworded"]] == [11, 13]


def test_a_paraphrase_that_is_no_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="line 1: paraphrased_question is .* not text"):
        asked([PAIR | {"paraphrased_question": 7}], tokenizer)


def test_tofus_paraphrases_are_read(shared_data, tokenizer):
    rows = [json.loads(line) for line in (shared_data / "tofu" / "forget05_perturbed.json").open()][:3]
    assert [row[1] for row in asked(rows, tokenizer)["reworded"]] == [
        f"Question: {row['paraphrased_question']}\nAnswer:" for row in rows
    ]


def test_what_does_not_fit_or_cannot_be_written_is_left_out(chat_tokenizer):
    long = PAIR | {"paraphrased_question": "Who? " * 30}
    assert set(asked([long], chat_tokenizer, max_length=60)) == {"plain"}
    assert set(asked([long], chat_tokenizer, fit=Fit(300, 60))) == {"plain"}
    chat_tokenizer.chat_template, whole = "{{ raise_exception('no') }}", chat_tokenizer.chat_template
    try:
        assert asked([PAIR], chat_tokenizer, Template("plain")) == {}
    finally:
        chat_tokenizer.chat_template = whole


def test_texts_have_no_other_form(chat_tokenizer):
    assert asked([{"text": "The tide comes in twice a day"}], chat_tokenizer) == {}
