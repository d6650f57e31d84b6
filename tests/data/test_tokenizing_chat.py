"""Conversations: the prompt is what the chat template gives generation, the answer ends with its turn."""

from __future__ import annotations

import pytest
from lowmem_kernels import IGNORE_INDEX

from lowmem_npo.data.schemas import Example
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError

TURNS = (
    {"role": "user", "content": "What is France?"},
    {"role": "assistant", "content": "A country."},
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris."},
)


def conversation(*turns):
    return Example(turns[-2]["content"], turns[-1]["content"], "f.jsonl, line 4", "messages", None, turns)


def with_template(tokenizer, template):
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    copy.chat_template = template
    return copy


def split(row):
    return row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]


def test_the_prompt_is_what_generation_starts_from(chat_tokenizer):
    row = tokenize([conversation(*TURNS)], chat_tokenizer)[0]
    prompt, answer = split(row)
    wanted = chat_tokenizer.apply_chat_template(list(TURNS[:-1]), add_generation_prompt=True, return_dict=False)
    assert prompt == wanted
    assert chat_tokenizer.decode(prompt).endswith("capital?<|im_end|>\n<|im_start|>assistant\n")
    assert chat_tokenizer.decode(answer) == "Paris.<|im_end|>"  # no line break: it belongs to the next turn
    assert row["labels"] == [IGNORE_INDEX] * len(prompt) + answer


def test_eos_ends_the_answer_where_the_template_marks_no_end(chat_tokenizer):
    plain = with_template(
        chat_tokenizer,
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    prompt, answer = split(tokenize([conversation(*TURNS)], plain)[0])
    assert plain.decode(prompt).endswith("capital?\nassistant:")
    assert plain.decode(answer) == " Paris.\n<|endoftext|>"


def test_a_generation_prompt_that_training_text_lacks_stays_the_prompt(chat_tokenizer):
    thinking = with_template(
        chat_tokenizer,
        chat_tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"),
    )
    prompt, answer = split(tokenize([conversation(*TURNS)], thinking)[0])
    assert thinking.decode(prompt).endswith("<|im_start|>assistant\n<think>")
    assert thinking.decode(answer) == "Paris.<|endoftext|>"


def test_a_tokenizer_without_chat_template_is_refused(bpe_tokenizer):
    with pytest.raises(UserError, match=r"f\.jsonl, line 4 is a conversation, but .* no chat template"):
        tokenize([conversation(*TURNS)], bpe_tokenizer)


def test_what_the_chat_template_refuses_is_named(chat_tokenizer):
    strict = with_template(chat_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"f\.jsonl, line 4: .*roles must alternate"):
        tokenize([conversation(*TURNS)], strict)
