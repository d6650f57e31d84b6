"""What a cell of a table holds: text, a list of texts or more in JSON, a missing value, what a row is called by.

Tables without nested columns, such as CSV, write lists and objects as JSON into a cell; pandas writes NaN where nothing
is, and 1.0 for 1.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from typing import Any

from lowmem_npo.data.rows import is_text
from lowmem_npo.errors import UserError


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with null for NaN, which is how pandas writes a missing value."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def label(value: Any) -> str | None:
    """What a row is called by, the same for 1, 1.0 and "1": pandas writes a column of whole numbers as 1.0 where one is
    missing; and for an accent that is part of its letter and one that follows it. None for nothing."""
    whole = isinstance(value, float) and value.is_integer()
    text = "" if value is None else str(int(value) if whole else value)
    return unicodedata.normalize("NFC", text).strip() or None


def folded(text: str) -> str:
    """The same for texts that differ in case, white space or Unicode form alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text that `row` has in `field`.

    Raises UserError for anything else, also for white space alone.
    """
    value = row.get(field)
    if value is None:
        raise UserError(f"{where} has no {field}; fill the field or remove the row.")
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {kind_in_words(value)}, not text; write it as a string.")
    if not value.strip():
        raise UserError(f"{where} has an empty {field}; fill the field or remove the row.")
    return value


def optional(row: dict[str, Any], field: str) -> Any:
    """What `row` has in a field that need not be filled; None for white space alone, which fills it with nothing."""
    value = row.get(field)
    return None if isinstance(value, str) and not value.strip() else value


def parsed_json(value: Any) -> Any:
    """`value`, read as JSON where it is JSON in a string, as tables without nested columns have it."""
    if not isinstance(value, str):  # columns of Parquet and Arrow also hold bytes, dates and decimals
        return value
    try:
        parsed = json.loads(value)
        return parsed if is_text(parsed) else value  # an escape may be half of a surrogate pair
    except (ValueError, RecursionError):
        return value


def no_value(name: str, what: str, value: Any) -> str:
    """The end of a message: what `name` holds is not `what`, which it must be."""
    in_text = ", in a string as JSON with double quotes (json.dumps), not as Python shows it"
    return f"{name} is not {what}; write it as one{in_text if isinstance(value, str) else ''}."


def list_in_text(row: dict[str, Any], column: str, where: str) -> Any:
    """The value of a column; a list of texts also where it is written as JSON in a string, as a cell of a CSV has it.

    Raises UserError for a list as pandas writes it there: brackets and all it would be taken for one text.
    """
    value = row.get(column)
    parsed = parsed_json(value)
    if _holds_text(parsed):
        return parsed
    if isinstance(value, str) and _holds_text(as_python(value)):
        raise UserError(
            f"{where}: {column} holds a list as Python writes it, not as JSON; write it with json.dumps (a text that "
            "only looks like a list goes into one by itself)."
        )
    return value


def _holds_text(value: Any) -> bool:
    """Whether it is a list with a text in it."""
    return isinstance(value, list) and any(isinstance(item, str) for item in value)


def as_python(text: str) -> Any:
    """The list that `text` writes in Python, None where it writes none; of NumPy's lists, which have no commas, the
    texts are run together."""
    try:
        return ast.literal_eval(re.sub(r"}\s+{", "}, {", text.strip())) if text.lstrip().startswith("[") else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def without_none(value: Any) -> Any:
    """`value` without the nulls that a table adds for keys that other rows have."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def check_json(where: str, value: Any) -> None:
    """Raises UserError for a conversation in which something is that JSON does not have, such as a date."""

    def refuse(part: Any) -> None:
        raise UserError(
            f"{where}: the conversation holds something {kind_in_words(part)}, not text; write it as a string, or "
            "remove it."
        )

    json.dumps(value, default=refuse)


def kind_in_words(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
