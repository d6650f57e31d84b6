"""From the rows of any recognised schema to one form, the `Example`.

Recognised by their columns, in this order:

| columns | known from | an example is |
|---|---|---|
| `messages` | chat data | a conversation; its last turn, the assistant's, is the answer |
| `input`, `output` | LUME, SemEval-2025 Task 4 | prompt and answer |
| `question`, `answer` | TOFU | prompt and answer |
| `prompt`, `completion` | TRL | prompt and answer, or both as lists of messages |
| `text` | language modelling | no prompt; the whole text is the answer |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_npo.data.reading import Rows
from lowmem_npo.errors import UserError

PAIRS = (("input", "output"), ("question", "answer"), ("prompt", "completion"))


@dataclass(frozen=True)
class Example:
    """One row, canonical.

    prompt: what the model is given, as it is in the data (no template); None where there is nothing but text.
        For a conversation, the last turn before the answer.
    answer: what it must (un)learn to say.
    where: file and line, or source and row, for messages.
    schema: the columns it came from, such as "question/answer"; decides the default template.
    id: the row's `id` column, where it has one.
    messages: the whole conversation, answer included, where the row is one: dictionaries with `role` and `content`.
    """

    prompt: str | None
    answer: str
    where: str
    schema: str
    id: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


def to_examples(rows: Rows, *, prompt_column: str | None = None, answer_column: str | None = None) -> list[Example]:
    """One Example per row. Named columns take precedence; an answer column alone means text without a prompt.

    Raises UserError, naming the columns, when no schema fits, and with file and line for a missing, empty or non-text
    field.
    """
    columns = _choose_columns(rows, prompt_column, answer_column)
    return [_example(row, rows.where(index), *columns) for index, row in enumerate(rows.rows)]


def with_answer(examples: Sequence[Example], refusal: str) -> list[Example]:
    """The same prompts, each answered by `refusal`: what the forget term `idk` trains on.

    Raises UserError for a row without a prompt: there is no question to refuse.
    """
    if not refusal.strip():
        raise UserError("The refusal is empty; give --refusal the sentence that the model is to answer instead.")
    for example in examples:
        if example.prompt is None:
            raise UserError(
                f"{example.where} is text without a question, so there is nothing to refuse; "
                "use a forget term other than idk, or rows with a prompt."
            )
    return [replace(one, answer=refusal, messages=_with_last_turn(one.messages, refusal)) for one in examples]


def _with_last_turn(messages: tuple[dict[str, Any], ...] | None, content: str) -> tuple[dict[str, Any], ...] | None:
    return messages and (*messages[:-1], {"role": "assistant", "content": content})


def _choose_columns(rows: Rows, prompt_column: str | None, answer_column: str | None) -> tuple[str | None, str]:
    """The prompt column (None for text) and the answer column; ("messages", "messages") for conversations."""
    columns = rows.columns
    if prompt_column and not answer_column:
        raise UserError(f"The answer column of {rows.name} is missing; name it with --answer-column.")
    if answer_column:
        for column in filter(None, (prompt_column, answer_column)):
            if column not in columns:
                raise UserError(f"{rows.name} has no column {column}; it has {', '.join(columns)}.")
        return prompt_column, answer_column
    if "messages" in columns:
        return "messages", "messages"
    for prompt, answer in PAIRS:
        if prompt in columns and answer in columns:
            return prompt, answer
    if "text" in columns:
        return None, "text"
    raise UserError(
        f"{rows.name} has the columns {', '.join(columns) or '(none)'}, none of which is a recognised pair "
        f"({'; '.join('/'.join(pair) for pair in PAIRS)}; messages; text); "
        "name yours with --prompt-column and --answer-column."
    )


def _example(row: dict[str, Any], where: str, prompt_column: str | None, answer_column: str) -> Example:
    identity = str(row["id"]) if row.get("id") is not None else None
    if answer_column == "messages":
        return _conversation(row.get("messages"), where, "messages", identity)
    if prompt_column is None:
        return Example(None, _text(row, answer_column, where), where, "text", identity)
    schema = f"{prompt_column}/{answer_column}"
    prompt, answer = row.get(prompt_column), row.get(answer_column)
    if isinstance(prompt, list) and isinstance(answer, list):  # TRL's conversational form
        return _conversation([*prompt, *answer], where, schema, identity)
    return Example(_text(row, prompt_column, where), _text(row, answer_column, where), where, schema, identity)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if value is None:
        raise UserError(f"{where} has no {field}; fill the field or remove the row.")
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {_kind(value)}, not text; write it as a string.")
    if not value.strip():
        raise UserError(f"{where} has an empty {field}; fill the field or remove the row.")
    return value


def _conversation(messages: Any, where: str, schema: str, identity: str | None) -> Example:
    if messages is None or messages == []:
        raise UserError(f"{where} has no {schema}; fill the field or remove the row.")
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise UserError(f'{where}: {schema} is not a list of {{"role": ..., "content": ...}}; write it as one.')
    for number, turn in enumerate(messages, 1):
        _text(turn, "role", f"{where}, message {number}")
        _text(turn, "content", f"{where}, message {number}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the conversation does not end with an assistant's answer to an earlier message; "
            "remove the row, or what follows the answer."
        )
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
    return Example(turns[-2]["content"], turns[-1]["content"], where, schema, identity, turns)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
