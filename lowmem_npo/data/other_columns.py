"""What a row has beside its prompt and its answer, in a column that an option names: other answers, which are
preferred, the prompt in other words, or what the row is about."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from lowmem_npo.data.cells import as_python, kind_in_words, label, list_in_text, no_value, parsed_json, text_of
from lowmem_npo.data.example import Example
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.turns import TURNS, begin_with, continued, have_roles, is_turns, turn, turns_in_cell
from lowmem_npo.errors import UserError
from lowmem_npo.sizes import first_of

# The field of an Example, and the option that names its column.
BESIDE = {"alternatives": "--alternative-column", "paraphrases": "--paraphrase-column", "group": "--group-column"}
PUNCTUATION = ".,;:!?…\"'“”‘’„«»()[]。、「」『』"  # around a word, of which it is no part


def check_beside(
    rows: Rows, columns: Mapping[str, str], prompts: str | None = None, answers: str | None = None
) -> None:
    """Raises UserError for a column that is the rows' own, and for rows that lack an answer to be preferred.

    columns: field of an Example -> its column.
    """
    for name in ("alternatives", "paraphrases"):
        for of, column in (("prompts", prompts), ("answers", answers)):
            if columns.get(name) is not None and columns[name] == column:
                raise UserError(
                    f"{BESIDE[name]} {column}: that is the column of the {of} themselves; name another, or none."
                )
    if (column := columns.get("alternatives")) is None:
        return
    values = [row.get(column) for row in rows.rows]
    without = [
        rows.where(place)
        for place, value in enumerate(values)
        if value in (None, []) or (isinstance(value, str) and not value.strip())
    ]
    if without:
        raise UserError(
            f"{BESIDE['alternatives']} {column}: {len(without)} of {len(values)} rows have none ({first_of(without)}); "
            "fill the field, remove these rows, or let the model write others (--alternatives self)."
        )


def _group(row: dict[str, Any], column: str, example: Example) -> str | None:
    return label(row.get(column))


def _alternatives(row: dict[str, Any], column: str, example: Example) -> tuple[str, ...]:
    """A text or a conversation that ends with one, or a list of either, none of which is the answer: preferred to
    itself, it teaches nothing."""
    texts = _other_answers(row, column, example)
    if any(words(text) == words(example.answer) for text in texts):
        raise UserError(f"{example.where}: {column} holds the answer itself; write another one into it.")
    return texts


def words(text: str) -> list[str]:
    """The words of a text, whatever their case, the space between them and the punctuation around them; of a text that
    is nothing but punctuation, this. "C++" and "C" are two words, and so are "-5" and "5"."""
    parts = unicodedata.normalize("NFKC", text).casefold().split()
    return [word for part in parts if (word := part.strip(PUNCTUATION))] or parts


def _named_paraphrases(row: dict[str, Any], column: str, example: Example) -> tuple[str, ...]:
    """Those of a row that has a prompt."""
    texts = paraphrases_of(row, column, example.where)
    if texts and not (example.prompt or "").strip():
        raise UserError(f"{example.where} is text without a question, so {column} cannot hold it in other words.")
    return texts


def _other_answers(row: dict[str, Any], column: str, example: Example) -> tuple[str, ...]:
    """One at least. Turns that are written in a string are a conversation beside others, and where they begin with the
    prompt; else they are text."""
    where, value = example.where, list_in_text(row, column, example.where)
    if value == []:
        raise UserError(f"{where}: {column} is an empty list; fill it or remove the row.")
    if isinstance(value, str):
        read = parsed_json(value), as_python(value)
        if any(have_roles(turns) and (example.messages or begin_with(turns, example.prompt)) for turns in read):
            value = turns_in_cell(value, column, where)
    values = [value] if have_roles(value) or not isinstance(value, list) else value
    return tuple(_last_answer(one, column, example) for one in values)


def _last_answer(value: Any, column: str, example: Example) -> str:
    """A text, or what a conversation ends with that goes on after the row's prompt, or holds it."""
    where = example.where
    if isinstance(value, dict | list) and not have_roles(value):
        raise UserError(f"{where}: {no_value(column, f'text, a list of texts, or {TURNS}', value)}")
    if not isinstance(value, list):
        return text_of({column: value}, column, where)
    asked = [*example.messages[:-1]] if example.messages else [turn("user", example.prompt)] if example.prompt else []
    last = continued(asked, value, ("the row's prompt", column), where)[-1]
    if last["role"] != "assistant":
        raise UserError(f"{where}: {column} does not end with an assistant's answer; remove what follows the answer.")
    return text_of(last, "content", f"{where}, {column}")


def paraphrases_of(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """What `column` holds, a text or a list of texts; empty ones do not count."""
    texts = list_in_text(row, column, where)
    texts = texts if isinstance(texts, list) else [texts]
    if unlike := next((text for text in texts if not isinstance(text, str | None)), None):
        kind = "a list of objects" if isinstance(unlike, dict) and is_turns(row[column]) else kind_in_words(unlike)
        raise UserError(f"{where}: {column} is {kind}, not text; write it as a string or a list of strings.")
    return tuple(text for text in texts if text and text.strip())


READERS: Mapping[str, Callable[[dict[str, Any], str, Example], Any]] = {
    "alternatives": _alternatives,
    "paraphrases": _named_paraphrases,
    "group": _group,
}
"""The field of an Example -> what reads it, of a row and its column."""
