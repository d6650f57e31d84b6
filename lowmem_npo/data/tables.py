"""Tables of text: how one is recognised and read, JSON or fields with separators.

A spreadsheet saves tables as .txt, too: such a file is a table if its first line names columns that are known, or that
the user has named, and its records fit this header. What is named .csv or .jsonl is a table, and what is named .md is a
document, whatever is in it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from lowmem_npo.data.documents import UNMARKED, decoded_lines, marked_encoding, unmarked_encoding
from lowmem_npo.data.rows import Rows, is_text
from lowmem_npo.data.turns import have_roles, is_turns
from lowmem_npo.errors import UserError
from lowmem_npo.run_directory import SELF_WRITTEN
from lowmem_npo.sources import TABLE_KINDS, kind_of

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Columns by which a header is recognised, and with it its separator.
HEADERS = {"question", "answer", "input", "output", "instruction", "response", "context", "prompt", "completion",
           "messages", "conversations", "text", "document", "id", "task"}  # fmt: skip
# Keys of an object under which rows are.
USUAL = {"data", "rows", "examples", "items", "records", "train", "test", "validation"}
ENOUGH = {"messages", "conversations", "text"}  # of which one key makes an object a row
DECLARED = re.compile(r'"?sep=([^\w\s"]|\t)"?', re.IGNORECASE)  # the first line of a file for Excel
SAMPLE = 20  # records by which a separator, and a table, is recognised

Reader = Callable[[str, Path], Rows]


# -- text -------------------------------------------------------------------------------------------------------------


def open_text(name: str, path: Path, newline: str | None = None) -> TextIO:
    """As UTF-8, or as its byte order mark says: what spreadsheets call Unicode text is UTF-16.

    Raises UserError for UTF-16 or UTF-32 without a mark, which as UTF-8 would be text full of NULs.
    """
    with _opener(path)(path, "rb") as file:
        head = file.read(4096)
    encoding = marked_encoding(head)
    if encoding is None and (unmarked := unmarked_encoding(head)):
        raise UserError(UNMARKED.format(name=name, encoding=unmarked))
    encoding = (encoding or "utf-8").replace("utf-8", "utf-8-sig")
    return cast(TextIO, _opener(path)(path, "rt", encoding=encoding, newline=newline))


def undecodable(path: Path) -> tuple[int, str]:
    """The first line (from 1) of a file that is not in its encoding, and the encoding."""
    with _opener(path)(path, "rb") as file:
        content = file.read()
    encoding = marked_encoding(content) or "utf-8"
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return decoded_lines(content, encoding, error), encoding.upper()
    return 1, encoding.upper()


def _opener(path: Path) -> Any:
    return gzip.open if path.suffix.lower() == ".gz" else open


# -- recognising ------------------------------------------------------------------------------------------------------


def is_table(name: str, path: Path) -> bool:
    """Whether a file is one by its name or, of a .txt, by what it holds."""
    return kind_of(path) in TABLE_KINDS or table_in_text(name, path)[0] is not None


def table_in_text(name: str, path: Path, columns: Collection[str] = ()) -> tuple[Reader | None, tuple[str, ...]]:
    """What reads the table in a .txt file, None of a document, and a remark on what is not certain. columns: those that
    the user has named."""
    if not kind_of(path).startswith((".txt", ".text")):
        return None, ()
    try:
        keys = _first_keys(name, path)
        if keys is not None:
            if _known(keys, columns) or any(key.strip().casefold() in ENOUGH for key in keys):
                return partial(read_json, columns=columns), (
                    f"{name} holds a table of JSON objects; if it is a document, name it .md",
                )
            return None, (_unknown(name, "JSON objects"),)
        return _table_with_separator(name, path, columns)
    except (ValueError, OSError, EOFError, zlib.error, csv.Error, UserError):
        return None, ()  # as a document it has messages of its own


def _table_with_separator(name: str, path: Path, columns: Collection[str]) -> tuple[Reader | None, tuple[str, ...]]:
    declared = _declared(name, path)
    separator = separator_of(name, path, columns)
    records = _records(name, path, separator)
    if records and len(records[0]) == 1 and not declared:  # a spreadsheet's only column: its commas are text
        separator = "\t"
        records = _records(name, path, separator)
    if not records:
        return None, ()
    fields = _separated(separator)
    known, share = _known(records[0], columns), _share_that_fits(records, separator)
    if declared or (known and share >= (1 if separator == "," else 0.5)):
        note = f"{name} holds a table, separated by {fields}; if it is a document, name it .md"
        return partial(read_csv, columns=columns, separator=separator), (note,)
    if known:
        note = f"{name} begins like a table separated by {fields}, but its lines do not fit this header"
        return None, (f"{note}: it is read as a document; if it is a table, name it .csv",)
    if separator != "," and min(len(records), len(records[0])) > 1 and share == 1:
        return None, (_unknown(name, f"a table separated by {fields}"),)
    return None, ()


def _unknown(name: str, what: str) -> str:
    return (
        f"{name} looks like {what}, of which no column is known: it is read as a document; if it is a table, name its "
        "columns with --prompt-column and --answer-column"
    )


def _known(names: Iterable[str], columns: Collection[str]) -> bool:
    """Whether these name the columns of a table: all that the user has named, or more than one known."""
    names = {name.strip().casefold() for name in names}
    return (bool(columns) and names >= {column.strip().casefold() for column in columns}) or len(HEADERS & names) > 1


def _first_keys(name: str, path: Path) -> list[str] | None:
    """The keys of the object that a file begins with, alone or in an array: none of one that cannot be read; None if it
    begins with no object."""
    with open_text(name, path) as file:
        first = next((line.lstrip() for line in file if line.strip()), "")
        text = first + file.read() if first.startswith(("{", "[")) else ""
    begin = re.match(r"(\[?)\s*(?=\{)", text)
    if begin is None:
        return None
    try:
        row, end = json.JSONDecoder().raw_decode(text, begin.end())
    except (ValueError, RecursionError):
        return [] if re.match(r'\{\s*"', text[begin.end() :]) else None
    after, ends = (text[end:].lstrip(), (",", "]")) if begin[1] else (text[end:].lstrip(" \t"), ("\n",))
    return list(row) if after.startswith(ends) or not after else None


def _declared(name: str, path: Path) -> str | None:
    """What a first line `sep=;`, as Excel writes and reads it, says."""
    with open_text(name, path, newline="") as file:
        match = DECLARED.fullmatch(file.readline(16).rstrip("\r\n"))
    return match and match[1]


def separator_of(name: str, path: Path, columns: Collection[str] = ()) -> str:
    """What separates the fields: what the first line declares, or of the characters that divide the header, the one
    that gives most known columns and that the records fit; the comma if in doubt."""
    if declared := _declared(name, path):
        return declared
    if kind_of(path).startswith(".tsv"):
        return "\t"
    known = HEADERS | {column.strip().casefold() for column in columns}

    def fitness(separator: str) -> tuple[bool, bool, float, int, int, int, bool]:
        records = _records(name, path, separator)
        if not records or len(records[0]) == 1:
            return False, False, 0, 0, 0, 0, separator == ","
        number = sum(field.strip().casefold() in known for field in records[0])
        share = _share_that_fits(records, separator)
        as_in_prose = sum(field.startswith(" ") for record in records for field in record[1:])
        return True, number > 1, share, number, -as_in_prose, len(records[0]), separator == ","

    return max(SEPARATORS, key=fitness)


def _records(name: str, path: Path, separator: str) -> list[list[str]]:
    """The header and the first records."""
    csv.field_size_limit(2**31 - 1)  # a document may well be one cell
    with open_text(name, path, newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        return list(islice((record for record in reader if _is_filled(record)), 1 + SAMPLE))


def _is_filled(record: list[str]) -> bool:
    """Whether some cell holds something: a spreadsheet writes separators alone for an empty line."""
    return any(field.strip() for field in record)


def _share_that_fits(records: list[list[str]], separator: str) -> float:
    """The share of the records that have the fields of the header: not fewer either if these are divided by commas,
    which prose has, too."""
    header, *others = records
    least = len(header) if separator == "," else min(2, len(header))
    return sum(least <= len(record) <= len(header) for record in others) / len(others) if others else 1.0


def _separated(separator: str) -> str:
    return SEPARATORS.get(separator, repr(separator))


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(name: str, path: Path, *, columns: Collection[str] = ()) -> Rows:
    """JSON Lines (one object per line, empty lines allowed), one array of objects, or one row over several lines; the
    suffix does not matter. Where all are strings, each is a `text`. columns: those that the user has named."""
    with open_text(name, path) as file:
        lines = [line.rstrip("\n") for line in file]
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if filled and lines[filled[0] - 1].lstrip().startswith("["):
        rows = Rows(name, _parse(name, "\n".join(lines), 1))
    elif filled and (row := _only_object(name, lines, filled)) is not None:
        _check_is_row(name, row, columns, over_lines=len(filled) > 1)
        rows = Rows(name, [row], filled[:1])
    else:
        rows = Rows(name, [_parse(name, lines[number - 1], number) for number in filled], filled)
    if all(isinstance(row, str) for row in rows.rows):  # as in MUSE's own files of membership
        rows = replace(rows, rows=[{"text": row} for row in rows.rows])
    for index, row in enumerate(rows.rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{rows.where(index)} is not a JSON object; "
                'every row must be an object such as {"question": "...", "answer": "..."}.'
            )
        if column := next((column for column, value in row.items() if not is_text([column, value])), None):
            raise UserError(
                f"{rows.where(index)}: {column} holds half of a surrogate pair (an escape such as \\ud83d without its "
                "partner), which is no character; repair the text or remove the row."
            )
    return Rows(rows.name, rows.rows, rows.lines, mixed=path.name == SELF_WRITTEN)


def _only_object(name: str, lines: list[str], filled: list[int]) -> dict[str, Any] | None:
    """The object that a file is; None where it is something else, or more."""
    first, text = lines[filled[0] - 1], ""
    if first.lstrip().startswith("{") and (len(filled) == 1 or not _is_json(first)):
        text = "\n".join(lines)
    return _parse(name, text, 1) if _is_json(text) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_is_row(name: str, row: dict[str, Any], columns: Collection[str], over_lines: bool) -> None:
    """Raises UserError for an object that holds the rows under one of its keys, or, written over several lines, has no
    column that is known: it is hardly meant as one."""
    if _known(row, columns) or any(key.strip().casefold() in ENOUGH for key in row):
        return
    tables = [key for key, value in row.items() if is_turns(value) and not have_roles(value)]
    named_so = [key for key in tables if key.strip().casefold() in USUAL]
    alone = over_lines or not any(isinstance(value, str) for value in row.values())
    if tables := named_so or (tables if alone and len(tables) == 1 else []):
        raise UserError(
            f"{name} holds one object, not an array of rows; the rows seem to be under "
            f"{' or '.join(map(repr, tables))}: write that array into a file of its own."
        )
    if over_lines:
        raise UserError(
            f"{name} holds one object, not an array of rows, and it is no row with known columns; write an array of "
            "objects, or one object per line."
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise LookupError(next(key for key in keys if keys.count(key) > 1))
    return values


def _parse(name: str, text: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except LookupError as error:
        place = name if "\n" in text else f"{name}, line {first_line}"
        raise UserError(f"{place} has the key {error.args[0]!r} twice in one object; remove one of the two.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}, line {first_line + error.lineno - 1} is not valid JSON ({error.msg}, column {error.colno}); "
            "a file holds one object per line, or one array of objects."
        ) from error
    except RecursionError as error:
        place = name if "\n" in text else f"{name}, line {first_line}"
        raise UserError(f"{place} nests lists or objects too deeply to be read; remove the row.") from error


def read_csv(name: str, path: Path, *, columns: Collection[str] = (), separator: str | None = None) -> Rows:
    """Every cell as text. A record may be shorter than the header: what it lacks is missing."""
    csv.field_size_limit(2**31 - 1)
    declared = _declared(name, path) is not None
    separator = separator or separator_of(name, path, columns)
    records, lines, end = [], [], int(declared)
    with open_text(name, path, newline="") as file:
        if declared:
            file.readline()
        reader = csv.reader(file, strict=True, delimiter=separator)
        try:
            for record in reader:
                if _is_filled(record):
                    records.append(record)
                    lines.append(end + 1)
                end = reader.line_num + declared
        except csv.Error as error:
            raise UserError(f"{name}, line {end + 1} cannot be read as csv ({error}); check its quotes.") from error
    header = records[0] if records else []
    times = Counter(header)
    if twice := next((column for column in header if column and times[column] > 1), None):
        raise UserError(f"{name}, line {lines[0]} names the column {twice} twice; rename one of the two.")
    named = max((number for number, column in enumerate(header, 1) if column.strip()), default=0)  # up to the last
    for record, line in zip(records, lines, strict=True):
        filled = max((number for number, field in enumerate(record, 1) if field.strip()), default=0)
        if len(record) > len(header) or filled > named:
            raise UserError(
                f"{name}, line {line} has {max(filled, named + 1)} fields but the header has {named}, separated by "
                f"{_separated(separator)}; put text that holds one in double quotes."
            )
    rows = [dict(zip(header, record, strict=False)) for record in records[1:]]
    notes = () if separator == "," else (f"{name} is separated by {_separated(separator)}",)
    return Rows(name, rows, lines[1:], notes=notes)
