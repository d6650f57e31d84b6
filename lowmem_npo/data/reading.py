"""Rows from files or from the Hugging Face hub, each with a location for messages.

JSON and CSV are read by the standard library, which guesses no types: `datasets` would make timestamps of a column
whose every value looks like "1969-12-21", 42 of "0042" and a missing value of the answer "NA". It also knows the
line of a mistake. Parquet and Arrow are read by pyarrow, the hub through `datasets`.

Local files leave no copy behind in the `datasets` cache: what is to be forgotten should not linger there.
`datasets` is imported where it is used: an estimate without data would spend much of its time on that import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

from lowmem_npo.data.columnar import read_columnar
from lowmem_npo.data.documents import check_expansion, read_document
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.rows import Rows, joined
from lowmem_npo.data.tables import Reader, read_csv, read_json, table_in_text, undecodable
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded
from lowmem_npo.libraries import hub_problem
from lowmem_npo.sizes import first_of
from lowmem_npo.sources import (
    BUILTIN,
    DOCUMENT_KINDS,
    FILE_KINDS,
    HUB_NAME,
    SELF,
    TABLE_KINDS,
    check_data_name,
    check_named_once,
    data_names,
    data_not_here,
    kind_of,
)

MOST_CHARACTERS = 10_000_000  # of a text in a row: more take minutes and gigabytes to be tokenised
GENERAL = (*BUILTIN.values(), "openings")  # questions with answers, and texts
SAVED_BESIDE_ROWS = ("dataset_dict.json", "dataset_info.json", "state.json")  # by `Dataset.save_to_disk`
# Files that hold texts or rows and are not read. In a folder, too, they are refused: what they hold would be missing.
UNREAD = {
    **dict.fromkeys(
        (".xlsx", ".xls", ".ods"),
        "{name} is a spreadsheet; save the sheet with the rows as CSV (UTF-8) and name that file.",
    ),
    **dict.fromkeys(
        (".docx", ".doc", ".odt", ".rtf", ".pages", ".epub"),
        "{name} is a word processor's document or a book; save it as .txt, .html or .pdf.",
    ),
}


def read_rows(
    source: str, *, limit: int | None = None, passages: Passages | None = None, columns: Iterable[str | None] = ()
) -> Rows:
    """The rows of `source`: a table (.jsonl, .json, .csv, .tsv, also .gz of them, .parquet, .arrow), a document (.txt,
    .md, .html, .pdf), a folder of documents, a hub name, or several of these with commas between them.

    A document is cut into `passages` (default: counted in words). A hub name is `owner/name`,
    `owner/name:configuration` or `owner/name:configuration/split`, each optionally followed by `@revision`. Unless
    named, the split is `train`, or the only one there is. `builtin` is the bundled general set.
    Only the first `limit` rows are kept. `columns` are those that the user has named, by which a table is recognised.

    Raises UserError for a source that is missing, unreadable, malformed, empty or named twice.
    """
    named = tuple(filter(None, columns))
    names = data_names(source)
    check_named_once(names)
    parts = [_read_source(name, passages or Passages(), named) for name in names]
    if len({part.mixed for part in parts}) > 1:
        table, document = (next(part.name for part in parts if part.mixed is mixed) for mixed in (False, True))
        raise UserError(f"{document} is a document and {table} holds rows: name files of one of the two kinds.")
    if len(parts) == 1:
        return parts[0].first(limit)
    if limit is not None:
        before = [0, *accumulate(map(len, parts))]
        parts = [part.first(limit - number) for part, number in zip(parts, before, strict=False) if number < limit]
    return joined(first_of(names, separator=", "), parts)


def general_words(source: str) -> str | None:
    """What `builtin` and `self` are, which readers of a report do not know; None for what the user chose."""
    if source in BUILTIN:
        return "a bundled set of general questions, answers and texts"
    return "texts that the original model wrote itself" if SELF.fullmatch(source) else None


def described(source: str) -> str:
    """A source as a report names it."""
    general = general_words(source)
    return f"{source}, {general}" if general else first_of(data_names(source), separator=", ")


def _read_source(source: str, passages: Passages, columns: Collection[str]) -> Rows:
    path = expanded(source)
    if path.is_dir():
        rows = _read_folder(source, path, passages, columns)
    elif path.is_file():
        rows = _read_path(source, path, passages, columns)
    elif source in BUILTIN:
        rows = bundled_rows(BUILTIN[source])
    elif SELF.fullmatch(source):
        raise UserError(
            f"{source} are texts that the original model writes for --retain of a training run; name files."
        )
    else:
        check_data_name(source)
        match = HUB_NAME.fullmatch(source)
        assert match is not None, "it is neither a file nor anything else"
        rows = _read_hub(source, **match.groupdict())
    if not rows.rows:
        raise UserError(f"{source} holds no rows; give a file with at least one.")
    return rows


def bundled_rows(part: str, *, limit: int | None = None) -> Rows:
    """A bundled set. The biographies: part "forget", "retain", or "holdout", people whom nothing is trained on. General
    questions, answers and texts: part "general", and "general_holdout", which nothing is trained on either; "openings"
    are first words to go on from."""
    file = resources.files("lowmem_npo.data.bundled") / f"{part}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = list(range(1, len(rows) + 1))
    return Rows(f"bundled {part}.jsonl", rows[:limit], lines[:limit], mixed=part in GENERAL)


def _read_folder(source: str, folder: Path, passages: Passages, columns: Collection[str]) -> Rows:
    """All documents in a folder and the folders in it, by name."""
    files = sorted(_entries(folder))
    names = {path: str(Path(source) / path.relative_to(folder)) for path in files}
    for path, name in names.items():
        if kind_of(path) in UNREAD:
            refusal = UNREAD[kind_of(path)].format(name=name).rstrip(".")
            raise UserError(f"{refusal}, or move it out of {source}.")
    to_read = [path for path in files if kind_of(path) in FILE_KINDS and not path.is_dir()]
    for path in to_read:
        check_data_name(names[path])  # it may be a link to nothing, or no file
    in_text = {path: table_in_text(names[path], path, columns) for path in to_read}
    is_table = {path: kind_of(path) in TABLE_KINDS or in_text[path][0] is not None for path in to_read}
    tables = [path for path in to_read if is_table[path]]
    documents = [path for path in to_read if not is_table[path]]
    if not documents or tables:
        what = f"a folder with both documents ({documents[0].name}) and tables" if documents else "a folder"
        if not tables:
            raise UserError(f"{source} is a folder without a file that can be read ({', '.join(FILE_KINDS)}).")
        with_rows = [path for path in tables if path.name not in SAVED_BESIDE_ROWS] or tables
        raise UserError(f"{source} is {what}; name one file in it, such as {with_rows[0].relative_to(folder)}.")
    parts = [_read_document(names[path], path, passages, in_text[path][1]) for path in documents]
    rows = joined(source, parts)
    notes = [f"{source} has {len(documents)} documents"]
    if others := [path.name for path in files if path not in is_table]:
        notes.append(f"not read, being of other kinds: {first_of(others, separator=', ')}")
    return Rows(rows.name, rows.rows, places=rows.places, mixed=True, notes=(*notes, *rows.notes))


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder and the folders in it, but for these, what is hidden, and the notes that word processors keep
    of open files (~$…). A link to a folder is not followed: it may lead back.

    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(where, name).is_symlink()]
        yield from (Path(where, name) for name in (*files, *links) if not name.startswith((".", "~$")))


def _read_document(name: str, path: Path, passages: Passages, notes: tuple[str, ...]) -> Rows:
    document = read_document(name, path, kind_of(path))
    rows, places = passages.rows(document.text)
    places = [f"{name}, {place}" for place in places]
    return Rows(name, rows, places=places, mixed=True, notes=(*notes, *document.notes))


def _read_path(name: str, path: Path, passages: Passages, columns: Collection[str]) -> Rows:
    """A document, or a table: also one that a spreadsheet has saved as .txt."""
    check_expansion(name, path)
    if kind_of(path) not in DOCUMENT_KINDS:
        return _read_file(name, path, columns)
    table, notes = table_in_text(name, path, columns)
    if table is None:
        return _read_document(name, path, passages, notes)
    try:
        return replace(_read_file(name, path, columns, table), notes=notes)
    except UserError as error:
        raise UserError(f"{error} If it is no table but a document, name it .md.") from error


def _read_file(name: str, path: Path, columns: Collection[str], read: Reader | None = None) -> Rows:
    kind = kind_of(path)
    if kind in UNREAD:
        raise UserError(UNREAD[kind].format(name=name))
    if kind not in FILE_KINDS:
        raise UserError(f"{name} is of an unsupported file type; convert it to one of {', '.join(FILE_KINDS)}.")
    if path.stat().st_size == 0:
        return Rows(name, [])
    if read is None and kind.startswith((".csv", ".tsv")):
        read = partial(read_csv, columns=columns)
    read = read or (partial(read_json, columns=columns) if kind.startswith(".json") else read_columnar)
    try:
        rows = read(name, path)
        _check_lengths(rows)
        return rows
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow, gzip and csv each have exceptions of their own
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            line, encoding = undecodable(path)
            raise UserError(f"{name}, line {line} is not {encoding} text; save the file as UTF-8.") from error
        reason = " ".join(str(cause).split())
        raise UserError(f"{name} cannot be read as {kind[1:]} ({reason}); check the file.") from error


def _check_lengths(rows: Rows) -> None:
    """Raises UserError for a text that is longer than a row can be."""
    for index, row in enumerate(rows.rows):
        for column, value in row.items():
            if _longest(value) > MOST_CHARACTERS:
                raise UserError(
                    f"{rows.where(index)}: {column} has more than {MOST_CHARACTERS:,} characters, which no row "
                    "has; divide it, or name the text as a document of its own."
                )


def _longest(value: Any) -> int:
    """Characters of the longest text in `value`."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_longest, inner), default=0)


def _read_hub(name: str, repo: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    hub_problem()
    try:
        splits = datasets.load_dataset(repo, config, revision=revision)
    except DatasetNotFoundError as error:
        raise UserError(
            f"There is neither a file {name} nor a dataset {repo} on the hub that you may read; check the name, "
            "or log in with `hf auth login` if it is private or gated."
        ) from error
    except OSError as error:  # ConnectionError, OfflineModeIsEnabled and the like
        raise UserError(data_not_here(name, repo)) from error
    except Exception as error:  # an unknown configuration or revision, a dataset with code of its own
        reason = one_line(error).split(" Example of usage")[0]
        raise UserError(
            f"{name} cannot be read from the hub ({reason}); name it as owner/name:configuration."
        ) from error
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and chosen != "train" and len(splits) > 1):
        problem = f"has no split {split}" if split else "has several splits"
        raise UserError(
            f"{name} {problem}; it has {', '.join(splits)}: name one as {repo}:{config or 'default'}/SPLIT."
        )
    return Rows(name, splits[chosen].to_list())
