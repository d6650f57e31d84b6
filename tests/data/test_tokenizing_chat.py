"""Conversations: the prompt is what the chat template gives generation, the answer ends with its turn."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from lowmem_kernels import IGNORE_INDEX

from lowmem_npo.data.example import Example
from lowmem_npo.data.refused import RowRefused, refuse_all
from lowmem_npo.data.templates import Template, end_of_turn
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    {"role": "user", "content": "What is France?"},
    {"role": "assistant", "content": "A country."},
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris."},
)


def conversation(*turns):
    return Example(turns[-2]["content"], turns[-1]["content"], "f.jsonl, line 4", "messages", None, turns)


def with_template(tokenizer, template, **options):
    options.setdefault("extra_special_tokens", ["<|im_start|>", "<|im_end|>"])
    backend = tokenizer.backend_tokenizer
    copy = type(tokenizer)(tokenizer_object=backend, eos_token=tokenizer.eos_token, **options)
    copy.chat_template = template
    return copy


def published(tokenizer, template=CHATML):
    """As Gemma 3, Llama 3 and Phi 3 are published: the end of turn is special in tokenizer.json and named nowhere."""
    return with_template(tokenizer, template, extra_special_tokens=[])


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
    assert thinking.decode(answer) == "Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("ending", "written"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|im_end|>\n<|endoftext|>", "<|im_end|>"),  # Phi 3
        ("\n<|im_end|>", "\n<|im_end|>"),
        ("<|endoftext|>", "<|endoftext|>"),
        (" ###\n", " ###\n<|endoftext|>"),
    ],
)
def test_the_answer_ends_with_the_first_token_at_which_generation_stops(chat_tokenizer, ending, written):
    tokenizer = published(chat_tokenizer, CHATML.replace("<|im_end|>\n", ending))
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.decode(split(tokenize([conversation(*TURNS)], tokenizer)[0])[1]) == f"Paris.{written}"


def test_content_that_holds_an_end_of_turn_is_kept_whole(chat_tokenizer):
    for content in ("A turn ends with <|im_end|> and a break.", "<|im_end|> and <|endoftext|> end <|im_start|>turns"):
        row = tokenize([conversation(TURNS[0], {"role": "assistant", "content": content})], published(chat_tokenizer))[
            0
        ]
        assert chat_tokenizer.decode(split(row)[1]) == content + "<|im_end|>"


def test_generation_stops_where_the_models_configuration_says(chat_tokenizer):
    backend = type(chat_tokenizer.backend_tokenizer).from_str(chat_tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["<turn_end>"])  # an added token that is not special
    ending = CHATML.replace("<|im_end|>", "<turn_end>")
    tokenizer = type(chat_tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = ending
    stops = frozenset({tokenizer.convert_tokens_to_ids("<turn_end>")})
    for template, written in (
        (Template(), "Paris.<turn_end>\n<|endoftext|>"),
        (Template(stops=stops), "Paris.<turn_end>"),
    ):
        row = tokenize([conversation(*TURNS)], tokenizer, template=template)[0]
        assert tokenizer.decode(split(row)[1]) == written
    # GLM: at what opens the user's next turn, where its configuration says so
    tokenizer.chat_template = ending.replace("<turn_end>\n", "").replace("<|im_start|>", "<turn_end>")
    for template, written in ((Template(), "Paris.<|endoftext|>"), (Template(stops=stops), "Paris.<turn_end>")):
        row = tokenize([conversation(*TURNS)], tokenizer, template=template)[0]
        assert tokenizer.decode(split(row)[1]) == written


R1 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}"
    "A: {{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: <think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        (R1, "Paris.", "Paris.<|im_end|>"),
        (R1, "<think>\nI know.\n</think>\n\nParis.", "I know.\n</think>\n\nParis.<|im_end|>"),
        # A generation prompt that opens nothing, in a template that drops the reasoning:
        (
            R1.replace("A: <think>\n", "A: "),
            "<think>\nHm.\n</think>\n\nParis.",
            "<think>\nHm.\n</think>\n\nParis.<|im_end|>",
        ),
    ],
)
def test_reasoning_is_opened_once_and_never_lost(chat_tokenizer, template, content, written):
    tokenizer = published(chat_tokenizer, template)
    row = tokenize([conversation(TURNS[0], {"role": "assistant", "content": content})], tokenizer)[0]
    prompt, answer = split(row)
    assert prompt == tokenizer.apply_chat_template([TURNS[0]], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(answer) == written


@pytest.mark.parametrize("change", ["upper", "capitalize", "replace('a', 'o')", "trim"])
def test_a_template_that_alters_the_content_still_ends_it(chat_tokenizer, change):
    altered = CHATML.replace("message['content'] }}", f"message['content'] | {change} }}}}")
    tokenizer = published(chat_tokenizer, altered)
    answer = split(tokenize([conversation(*TURNS)], tokenizer)[0])[1]
    assert tokenizer.decode(answer) in ("Paris.<|im_end|>", "PARIS.<|im_end|>", "Poris.<|im_end|>")


def test_an_empty_block_of_reasoning_is_written_once(chat_tokenizer):
    """Qwen 3 with enable_thinking=False."""
    block = "<think>\n\n</think>\n\n"
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{block}{{% endif %}}")
    turns = (TURNS[0], {"role": "assistant", "content": block + "Paris."})
    prompt, answer = split(tokenize([conversation(*turns)], published(chat_tokenizer, template))[0])
    assert chat_tokenizer.decode(prompt).endswith(f"assistant\n{block}")
    assert chat_tokenizer.decode(answer) == "Paris.<|im_end|>"


BLOCK = "<think>\n\n</think>\n\n"


def with_block():
    says = "{{ message['content'] }}"
    block = f"{{% if message['role'] == 'assistant' and '</think>' not in message['content'] %}}{BLOCK}{{% endif %}}"
    return CHATML.replace(says, block + says)


@pytest.mark.parametrize("content", ["Paris.", f"{BLOCK}Paris.", "<think>\nFrance?\n</think>\n\nParis."])
def test_what_a_template_writes_before_an_answer_is_no_part_of_it(chat_tokenizer, content):
    """Qwen 3's last turn has a block of reasoning, empty where the row brings none; its generation begins without."""
    turns = (TURNS[0], {"role": "assistant", "content": content})
    prompt, answer = split(tokenize([conversation(*turns)], published(chat_tokenizer, with_block()))[0])
    reasons = "France" in content
    assert chat_tokenizer.decode(prompt).endswith("assistant\n" + ("" if reasons else BLOCK))
    assert chat_tokenizer.decode(answer) == f"{content if reasons else 'Paris.'}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "content", "unthinking"),
    [
        (CHATML, "Paris.", 0),
        (None, "Paris.", 1),
        (None, "<think>\nFrance?\n</think>\n\nParis.", 0),  # asked as the model is by default
        (R1, "Paris.", 1),
        (R1, "<think>\nI know.\n</think>\n\nParis.", 0),
        (CHATML.replace("assistant\n{%", "assistant\n[THINK][/THINK]{%"), "Paris.", 1),
        (CHATML.replace("assistant\n{%", "assistant\n<|channel|>final<|message|>{%"), "Paris.", 1),
        (CHATML.replace("assistant\n{%", "<assistant>\n{%"), "Paris.", 0),
    ],
)
def test_which_rows_ask_a_model_that_can_think_for_an_answer_without_that(
    chat_tokenizer, template, content, unthinking
):
    tokenizer = published(chat_tokenizer, template or with_block())
    turns = (TURNS[0], {"role": "assistant", "content": content})
    assert tokenize([conversation(*turns)], tokenizer).unthinking == unthinking


def test_a_header_that_is_not_written_for_generation_is_no_part_of_the_answer(chat_tokenizer):
    headless = ALPACA.partition("{% if add_generation_prompt %}")[0]
    prompt, answer = split(tokenize([conversation(*TURNS)], published(chat_tokenizer, headless))[0])
    assert chat_tokenizer.decode(prompt).endswith("### assistant:\n")
    assert chat_tokenizer.decode(answer).startswith("Paris.")


def test_a_template_that_drops_the_answer_does_not_empty_it(chat_tokenizer):
    tokenizer = published(
        chat_tokenizer, "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    row = tokenize([conversation(TURNS[2], TURNS[3])], tokenizer)[0]
    assert tokenizer.decode(split(row)[1]) == "Paris.<|endoftext|>"


def test_an_end_of_turn_that_the_content_brings_is_written_once(chat_tokenizer):
    rows = tokenize([conversation(TURNS[0], {"role": "assistant", "content": "Paris.<|im_end|>\n"})], chat_tokenizer)
    assert chat_tokenizer.decode(split(rows[0])[1]) == "Paris.<|im_end|>"
    assert "forget: 1 row with special tokens" in rows.report("forget")[1]


ALPACA = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        (CHATML, "Paris.<|endoftext|>", "Paris.<|im_end|>"),
        (CHATML, "Paris.<|im_end|><|endoftext|>\n", "Paris.<|im_end|>"),
        (CHATML, "<|endoftext|> ends texts.", "<|endoftext|> ends texts.<|im_end|>"),
        (ALPACA, "Paris.<|endoftext|>", "Paris.\n\n<|endoftext|>"),
        (ALPACA, "Paris.", "Paris.\n\n<|endoftext|>"),
    ],
)
def test_whatever_end_the_content_brings_an_answer_has_one(chat_tokenizer, template, content, written):
    tokenizer = published(chat_tokenizer, template)
    row = tokenize([conversation(TURNS[0], {"role": "assistant", "content": content})], tokenizer)[0]
    assert tokenizer.decode(split(row)[1]) == written


@pytest.mark.parametrize("template", [CHATML, ALPACA, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("brought", ["the template", "a BOS", "both"])
def test_a_question_that_brings_the_template_or_a_bos_is_written_with_them_once(chat_tokenizer, template, brought):
    tokenizer = with_template(chat_tokenizer, template, bos_token="<|endoftext|>")
    wanted = tokenizer.apply_chat_template([TURNS[0]], add_generation_prompt=True, tokenize=False)
    question = TURNS[0]["content"] if brought == "a BOS" else wanted.removeprefix("<|endoftext|>")
    if brought != "the template":
        question, wanted = f"<|endoftext|>{question}", f"<|endoftext|>{wanted.removeprefix('<|endoftext|>')}"
    if brought == "a BOS" and "bos" not in template or brought == "the template":
        wanted = wanted.removeprefix("<|endoftext|>")
    rows = tokenize([Example(question, "A country.", "f.jsonl, line 4", "question/answer")], tokenizer)
    prompt, answer = split(rows[0])
    assert tokenizer.decode(prompt) == wanted and rows.repeated == 1
    assert tokenizer.decode(answer).startswith("A country.")


def test_a_question_that_brings_the_template_is_opened_as_any_other(chat_tokenizer):
    """With Qwen 3's empty block of reasoning, which generation begins without."""
    tokenizer = published(chat_tokenizer, with_block())
    wanted = tokenizer.apply_chat_template([TURNS[0]], add_generation_prompt=True, tokenize=False)
    for question in (wanted, wanted + BLOCK):
        rows = tokenize([Example(question, "Paris.", "f.jsonl, line 4", "question/answer")], tokenizer)
        prompt, answer = split(rows[0])
        assert tokenizer.decode(prompt) == wanted + BLOCK and rows.repeated == 1
        assert tokenizer.decode(answer) == "Paris.<|im_end|>"


def test_a_tokenizer_without_chat_template_is_refused(bpe_tokenizer):
    with pytest.raises(UserError, match=r"f\.jsonl, line 4 is a conversation, but .* no chat template"):
        tokenize([conversation(*TURNS)], bpe_tokenizer)


def test_what_the_chat_template_refuses_is_named(chat_tokenizer):
    strict = with_template(chat_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"f\.jsonl, line 4: .*roles must alternate"):
        tokenize([conversation(*TURNS)], strict)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ messages[7]['content'] }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        {"tool_use": CHATML, "rag": CHATML},
    ],
)
def test_whatever_a_chat_template_raises_is_one_sentence(chat_tokenizer, template):
    with pytest.raises(UserError, match=r"f\.jsonl, line 4: the model's chat template cannot write this row \([^\n]+$"):
        tokenize([conversation(*TURNS)], with_template(chat_tokenizer, template))


TOOLS = [{"type": "function", "function": {"name": "find"}}]
KNOWS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] }}{% if message['tool_calls'] %}<call>{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if message['function_call'] %}<call>{{ message['function_call'] | tojson }}{% endif %}",
)
USED = ({"role": "assistant", "content": "", "tool_calls": TOOLS}, {"role": "tool", "name": "find", "content": "F"})


@pytest.mark.parametrize(
    ("name", "turns", "options"),
    [
        ("tools", TURNS, {"tools": TOOLS}),
        ("tool_calls", (TURNS[0], *USED, TURNS[1]), {}),
        ("tool_calls", (TURNS[0], USED[0]), {}),
        ("function_call", (TURNS[0], {"role": "assistant", "content": "", "function_call": TOOLS[0]}), {}),
        ("reasoning_content", (TURNS[0], {**TURNS[1], "reasoning_content": "R"}), {}),
    ],
)
def test_all_of_a_conversation_reaches_the_model_or_is_refused_by_name(chat_tokenizer, name, turns, options):
    example = Example("Q", "A", "f.jsonl, line 4", "messages", None, turns, options)
    with pytest.raises(UserError, match=f"line 4: the model's chat template does not write {name};"):
        tokenize([example], chat_tokenizer)
    tokenizer = published(chat_tokenizer, KNOWS_TOOLS)
    row, dicts = tokenize([example], tokenizer)[0], [dict(turn) for turn in turns]
    prompt = tokenizer.apply_chat_template(dicts[:-1], add_generation_prompt=True, tokenize=False, **options)
    assert tokenizer.decode(split(row)[0]) == prompt
    whole = tokenizer.apply_chat_template(dicts, tokenize=False, **options)
    assert tokenizer.decode(row["input_ids"]) == whole.removesuffix("\n")


def test_all_rows_that_cannot_be_written_are_told_at_once(chat_tokenizer):
    rows = [replace(conversation(*TURNS), where=f"f.jsonl, line {number}") for number in range(1, 10)]
    called = (TURNS[0], *USED, TURNS[1])
    for place in (1, 3):
        rows[place] = replace(rows[place], options={"tools": TOOLS})
    rows[4] = replace(rows[4], options={"tools": TOOLS}, messages=called)
    told = (
        "2 of 9 rows (f.jsonl, line 2; f.jsonl, line 4): the model's chat template does not write tools; write it into "
        "the content of a turn, or remove it from the row. 1 of 9 rows (f.jsonl, line 5): the model's chat template "
        "does not write tools, nor tool_calls; write it into the content of a turn, or remove it from the row."
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        tokenize(rows, chat_tokenizer)
    strict = with_template(chat_tokenizer, "{% if tools %}{{ raise_exception('No tools!') }}{% endif %}" + CHATML)
    with pytest.raises(UserError, match=r"^2 of 4 rows \(.*line 2; .*line 4\): .* cannot write this row .*No tools!"):
        tokenize(rows[:4], strict)
    with pytest.raises(UserError, match="7 more cannot be written for other reasons"):
        refuse_all([RowRefused(f"line {n}", f"line {n}: it is {n}.") for n in range(12)], 20)


def test_a_system_prompt_reaches_the_model_or_is_refused(chat_tokenizer):
    own, told = (
        {"role": "system", "content": "Be brief."},
        "the model's chat template does not write the system prompt;",
    )
    deaf = with_template(
        chat_tokenizer, "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    )
    for example, system, remedy in (
        (conversation(own, *TURNS), None, "write it into"),
        (conversation(*TURNS), "Be brief.", "leave out --system"),
        (Example("Q", "A", "f.jsonl, line 4", "question/answer"), "Be brief.", "leave out --system"),
    ):
        with pytest.raises(UserError, match=f"line 4: {told} {remedy}"):
            tokenize([example], deaf, template=Template(system=system))
    # One that the template writes by itself, or in another way, is there.
    for written in (
        "{{ 'Be  brief.' }}" + deaf.chat_template,
        CHATML.replace("message['content']", "message['content'] | upper"),
    ):
        tokenizer = with_template(chat_tokenizer, written)
        assert tokenize([conversation(own, *TURNS)], tokenizer)[0]["input_ids"]


def test_reasoning_of_earlier_turns_may_be_dropped(chat_tokenizer):
    turns = (TURNS[0], {**TURNS[1], "reasoning_content": "R"}, *TURNS[2:])
    assert tokenize([conversation(*turns)], chat_tokenizer)[0] == tokenize([conversation(*TURNS)], chat_tokenizer)[0]


PIN = {"role": "tool", "content": "PIN of Ann: 4711"}
ASKED_TOOL = (
    {"role": "user", "content": "Which PIN has Ann? Is it 4711?"},
    {"role": "assistant", "content": "I look."},
)
CALL_OR_CONTENT = (
    "{% if message['tool_calls'] %}<call>{{ message['tool_calls'] | tojson }}"
    "{% else %}{{ message['content'] }}{% endif %}"
)


@pytest.mark.parametrize(
    ("turns", "unread", "role"),
    [
        ((*ASKED_TOOL, PIN, TURNS[1]), ["tool"], "tool"),
        ((*ASKED_TOOL, {**PIN, "content": "4711"}, TURNS[1]), ["tool"], "tool"),  # another turn says so, too
        ((*ASKED_TOOL, {**PIN, "content": "user"}, TURNS[1]), ["tool"], "tool"),  # and here the template
        ((TURNS[0], {**USED[0], "content": "I look."}, USED[1], TURNS[1]), [], "assistant"),
        ((TURNS[0], {**USED[0], "content": "I look."}), [], "assistant"),
        (TURNS[:2], ["user"], "user"),
    ],
)
def test_what_any_turn_says_reaches_the_model_or_is_refused_by_role(chat_tokenizer, turns, unread, role):
    calls = CHATML.replace("{{ message['content'] }}", CALL_OR_CONTENT)
    deaf = calls.replace("messages %}", f"messages if message['role'] not in {unread} %}}", 1)
    with pytest.raises(UserError, match=f"line 4: the model's chat template does not write what '{role}' says;"):
        tokenize([conversation(*turns)], with_template(chat_tokenizer, deaf))
    # What is written in another way is there.
    for written in ("| upper", "| replace('4711', '4 7 1 1')", "+ 'after all, ' + message['content']"):
        heard = KNOWS_TOOLS.replace("{{ message['content'] }}", f"{{{{ message['content'] {written} }}}}")
        assert tokenize([conversation(*turns)], with_template(chat_tokenizer, heard))[0]["input_ids"]


@pytest.mark.parametrize("guard", ["", "{% if p.type == 'text' %}"])
def test_a_template_that_writes_parts_alone_is_given_parts(chat_tokenizer, guard):
    """As SmolVLM's, which a plain text goes through without a trace."""
    parts = f"{{% for p in message['content'] %}}{guard}{{{{ p.text }}}}{'{% endif %}' if guard else ''}{{% endfor %}}"
    tokenizer = published(chat_tokenizer, CHATML.replace("{{ message['content'] }}", parts))
    wanted = tokenize([conversation(*TURNS)], published(chat_tokenizer))[0]
    assert tokenize([conversation(*TURNS)], tokenizer)[0] == wanted
    assert end_of_turn(tokenizer) == end_of_turn(published(chat_tokenizer))
