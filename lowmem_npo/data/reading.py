"""Rows from files or from the Hugging Face hub, each with a location for messages.

JSON and CSV are read by the standard library, which guesses no types: `datasets` would make timestamps of a column
whose every value looks like "1969-12-21", 42 of "0042" and a missing value of the answer "NA". It also knows the
line of a mistake. Parquet and Arrow are read by pyarrow, the hub through `datasets`.

Local files leave no copy behind in the `datasets` cache: what is to be forgotten should not linger there.
`datasets` is imported where it is used: an estimate without data would spend much of its time on that import.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TextIO, cast

from lowmem_npo.data.documents import marked_encoding, read_document
from lowmem_npo.data.passages import Passages
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import hub_problem
from lowmem_npo.run_directory import SELF_WRITTEN
from lowmem_npo.sources import (
    BUILTIN,
    DOCUMENT_KINDS,
    FILE_KINDS,
    HUB_NAME,
    SELF,
    TABLE_KINDS,
    check_data_name,
    data_names,
    data_not_here,
    kind_of,
)

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Columns by which a header is recognised, and with it its separator.
HEADERS = {"question", "answer", "input", "output", "instruction", "response", "context", "prompt", "completion",
           "messages", "conversations", "text", "document", "id", "task"}  # fmt: skip
GENERAL = (*BUILTIN.values(), "openings")  # questions with answers, and texts


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in its order.

    name: what messages call the source (the path or hub name as the user wrote it).
    rows: one dictionary per row, column name to value.
    lines: the line (from 1) each row begins in, or None for sources without lines.
    places: where each row is, for sources whose rows have neither lines nor numbers.
    mixed: whether each row has columns of its own, among them `continues` where its text goes on after the row: so in
        what this package makes of documents, and in its general texts.
    notes: remarks on how the source was read.
    """

    name: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None
    places: list[str] | None = None
    mixed: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def where(self, index: int) -> str:
        """The location of row `index` (from 0), counted from 1: "forget.jsonl, line 3" or "forget.parquet, row 3"."""
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, row {index + 1}" if self.lines is None else f"{self.name}, line {self.lines[index]}"


def read_rows(source: str, *, limit: int | None = None, passages: Passages | None = None) -> Rows:
    """The rows of `source`: a table (.jsonl, .json, .csv, .tsv, also .gz of them, .parquet, .arrow), a document (.txt,
    .md, .html, .pdf), a folder of documents, a hub name, or several of these with commas between them.

    A document is cut into `passages` (default: counted in words). A hub name is `owner/name`,
    `owner/name:configuration` or `owner/name:configuration/split`, each optionally followed by `@revision`. Unless
    named, the split is `train`, or the only one there is. `builtin` is the bundled general set.
    Only the first `limit` rows are kept.

    Raises UserError for a source that is missing, unreadable, malformed or empty.
    """
    parts = [_read_source(name, passages or Passages()) for name in data_names(source)]
    if len({part.mixed for part in parts}) > 1:
        table, document = (next(part.name for part in parts if part.mixed is mixed) for mixed in (False, True))
        raise UserError(f"{document} is a document and {table} holds rows: name files of one of the two kinds.")
    rows = parts[0] if len(parts) == 1 else joined(source, parts)
    lines, places = rows.lines and rows.lines[:limit], rows.places and rows.places[:limit]
    return Rows(rows.name, rows.rows[:limit], lines, places, rows.mixed, rows.notes)


def described(source: str) -> str:
    """A source as a report names it: what `builtin` and `self` are is not known to its readers."""
    if source in BUILTIN:
        return f"{source}, a bundled set of general questions, answers and texts"
    return f"{source}, texts that the original model wrote itself" if SELF.fullmatch(source) else source


def joined(name: str, parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts`, one after the other."""
    rows, notes = [row for part in parts for row in part.rows], tuple(note for part in parts for note in part.notes)
    places = [part.where(index) for part in parts for index in range(len(part))]
    return Rows(name, rows, places=places, mixed=any(part.mixed for part in parts), notes=notes)


def _read_source(source: str, passages: Passages) -> Rows:
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _read_folder(source, path, passages)
    elif path.exists():
        rows = _read_path(source, path, passages)
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


def _read_folder(source: str, folder: Path, passages: Passages) -> Rows:
    """All documents in a folder and the folders in it, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    documents = [path for path in files if kind_of(path) in DOCUMENT_KINDS]
    tables = [path for path in files if kind_of(path) in TABLE_KINDS]
    if not documents or tables:
        what = f"a folder with both documents ({documents[0].name}) and tables" if documents else "a folder"
        kinds = "" if tables else f" ({', '.join(FILE_KINDS)})"
        listed = f", such as {tables[0].relative_to(folder)}" if tables else ""
        raise UserError(f"{source} is {what}; name one file in it{listed}{kinds}.")
    names = [str(Path(source) / path.relative_to(folder)) for path in documents]
    parts = [_read_document(name, path, passages) for name, path in zip(names, documents, strict=True)]
    rows = joined(source, parts)
    notes = [f"{source} has {len(documents)} documents"]
    if others := [path.name for path in files if path not in documents]:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"not read, being of other kinds: {', '.join(others[:5])}{more}")
    return Rows(rows.name, rows.rows, places=rows.places, mixed=True, notes=(*notes, *rows.notes))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_document(name: str, path: Path, passages: Passages) -> Rows:
    document = read_document(name, path, kind_of(path))
    rows, places = passages.rows(document.text)
    return Rows(name, rows, places=[f"{name}, {place}" for place in places], mixed=True, notes=document.notes)


def _read_path(name: str, path: Path, passages: Passages) -> Rows:
    """A document, or a table: also one that a spreadsheet has saved as .txt."""
    kind = kind_of(path)
    if kind not in DOCUMENT_KINDS:
        return _read_file(name, path)
    table = _table_in_text(name, path) if kind.startswith((".txt", ".text")) else None
    return table or _read_document(name, path, passages)


def _table_in_text(name: str, path: Path) -> Rows | None:
    """The rows of a text file whose first line names known columns, separated, or is an object with such; None of a
    document."""
    try:
        with _open(path) as file:
            first = next((line.strip() for line in file if line.strip()), "")
        if first.startswith("{") and HEADERS & {key.casefold() for key in json.loads(first)}:
            return replace(_read_json(name, path), notes=(f"{name} holds a table, a JSON object a line",))
        separator = _separator(path)
        header = {column.strip().casefold() for column in next(csv.reader([first], delimiter=separator), [])}
        if len(HEADERS & header) > 1:
            return replace(
                _read_csv(name, path), notes=(f"{name} holds a table, separated by {SEPARATORS[separator]}",)
            )
    except (ValueError, AttributeError, OSError, csv.Error):  # as a document it has messages of its own
        pass
    return None


def _read_file(name: str, path: Path) -> Rows:
    kind = kind_of(path)
    if kind in (".xlsx", ".xls", ".ods"):
        raise UserError(f"{name} is a spreadsheet; save the sheet with the rows as CSV (UTF-8) and name that file.")
    if kind in (".docx", ".doc", ".odt", ".rtf", ".pages", ".epub"):
        raise UserError(f"{name} is a word processor's document or a book; save it as .txt, .html or .pdf.")
    if kind not in FILE_KINDS:
        raise UserError(f"{name} is of an unsupported file type; convert it to one of {', '.join(FILE_KINDS)}.")
    if path.stat().st_size == 0:
        return Rows(name, [])
    read = _read_csv if kind.startswith((".csv", ".tsv")) else _read_json if kind.startswith(".json") else _read_table
    try:
        return read(name, path)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow, gzip and csv each have exceptions of their own
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            place = f"{name}, line {_undecodable_line(path)}"
            raise UserError(f"{place} is not UTF-8 text; save the file as UTF-8.") from error
        reason = " ".join(str(cause).split())
        raise UserError(f"{name} cannot be read as {kind[1:]} ({reason}); check the file.") from error


def _open(path: Path, newline: str | None = None, errors: str = "strict") -> TextIO:
    """As UTF-8, or as its byte order mark says: what spreadsheets call Unicode text is UTF-16."""
    opener = cast(Any, gzip.open if path.suffix.lower() == ".gz" else open)
    with opener(path, "rb") as file:
        encoding = (marked_encoding(file.read(4)) or "utf-8").replace("utf-8", "utf-8-sig")
    return cast(TextIO, opener(path, "rt", encoding=encoding, newline=newline, errors=errors))


def _read_json(name: str, path: Path) -> Rows:
    """JSON Lines (one object per line, empty lines allowed), or one array of objects; the suffix does not matter."""
    with _open(path) as file:
        lines = [line.rstrip("\n") for line in file]
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if filled and lines[filled[0] - 1].lstrip().startswith("["):
        rows = Rows(name, _parse(name, "\n".join(lines), 1))
    else:
        rows = Rows(name, [_parse(name, lines[number - 1], number) for number in filled], filled)
    for index, row in enumerate(rows.rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{rows.where(index)} is not a JSON object; "
                'every row must be an object such as {"question": "...", "answer": "..."}.'
            )
        if column := next((column for column, value in row.items() if not is_text(value)), None):
            raise UserError(
                f"{rows.where(index)}: {column} holds half of a surrogate pair (an escape such as \\ud83d without its "
                "partner), which is no character; repair the text or remove the row."
            )
    return Rows(rows.name, rows.rows, rows.lines, mixed=path.name == SELF_WRITTEN)


def is_text(value: Any) -> bool:
    """Whether all strings in `value` can be written as UTF-8, which half a surrogate pair cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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


def _read_csv(name: str, path: Path) -> Rows:
    """Every cell as text. A record may be shorter than the header: what it lacks is missing."""
    csv.field_size_limit(2**31 - 1)  # a document may well be one cell
    separator = _separator(path)
    records, lines, end = [], [], 0
    with _open(path, newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=separator)
        try:
            for record in reader:
                if len(record) > 1 or "".join(record).strip():
                    records.append(record)
                    lines.append(end + 1)
                end = reader.line_num
        except csv.Error as error:
            raise UserError(f"{name}, line {end + 1} cannot be read as csv ({error}); check its quotes.") from error
    header = records[0] if records else []
    if twice := next((column for column in header if column and header.count(column) > 1), None):
        raise UserError(f"{name}, line {lines[0]} names the column {twice} twice; rename one of the two.")
    for record, line in zip(records, lines, strict=True):
        if len(record) > len(header):
            raise UserError(
                f"{name}, line {line} has {len(record)} fields but the header has {len(header)}, separated by "
                f"{SEPARATORS[separator]}; put text that holds one in double quotes."
            )
    rows = [dict(zip(header, record, strict=False)) for record in records[1:]]
    notes = () if separator == "," else (f"{name} is separated by {SEPARATORS[separator]}",)
    return Rows(name, rows, lines[1:], notes=notes)


def _separator(path: Path) -> str:
    """What separates the fields of the header: of the characters that divide it, the one that gives most known columns,
    the comma if in doubt."""
    if kind_of(path).startswith(".tsv"):
        return "\t"
    with _open(path, newline="") as file:
        header = next((line for line in file if line.strip()), "")
    fields = {separator: next(csv.reader([header], delimiter=separator), []) for separator in SEPARATORS}

    def fitness(separator: str) -> tuple[int, bool]:
        names = fields[separator]
        return sum(name.strip().casefold() in HEADERS for name in names) if len(names) > 1 else -1, separator == ","

    best = max(SEPARATORS, key=fitness)
    if fitness(best)[0] <= 0 and len(fields[","]) == 1:  # no known column: what divides it into most
        best = max(SEPARATORS, key=lambda separator: (len(fields[separator]), separator == ","))
    return best


def _read_table(name: str, path: Path) -> Rows:
    """Parquet or Arrow, without the copy on the disk that `datasets` would make, and leave behind if it is killed."""
    import pyarrow
    import pyarrow.parquet

    if kind_of(path) == ".parquet":
        return Rows(name, pyarrow.parquet.ParquetFile(path).read().to_pylist())
    with path.open("rb") as file:
        try:
            return Rows(name, pyarrow.ipc.open_stream(file).read_all().to_pylist())
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            file.seek(0)
            return Rows(name, pyarrow.ipc.open_file(file).read_all().to_pylist())


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
        reason = " ".join(str(error).split()).split(" Example of usage")[0]
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


def _undecodable_line(path: Path) -> int:
    """The first line (from 1) that is not UTF-8."""
    with _open(path, errors="surrogateescape") as file:
        return next((number for number, line in enumerate(file, 1) if not is_text(line)), 1)
