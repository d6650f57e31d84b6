"""Rows from a file or from the Hugging Face hub, each with a location for messages.

JSON and CSV are read by the standard library, which guesses no types: `datasets` would make timestamps of a column
whose every value looks like "1969-12-21", 42 of "0042" and a missing value of the answer "NA". It also knows the
line of a mistake. Parquet, Arrow and the hub go through `datasets`.

Local files leave no copy behind in the `datasets` cache: what is to be forgotten should not linger there.
`datasets` is imported where it is used: an estimate without data would spend much of its time on that import.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from lowmem_npo.errors import UserError
from lowmem_npo.libraries import hub_problem

TEXT_KINDS = (".jsonl", ".json", ".csv")
FILE_KINDS = (*TEXT_KINDS, ".parquet", ".arrow", *(f"{kind}.gz" for kind in TEXT_KINDS))
# owner/name, then optionally :configuration, /split and @revision
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(/(?P<split>[\w.-]+))?)?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in its order.

    name: what messages call the source (the path or hub name as the user wrote it).
    rows: one dictionary per row, column name to value.
    lines: the line (from 1) each row begins in, or None for sources without lines.
    """

    name: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def where(self, index: int) -> str:
        """The location of row `index` (from 0), counted from 1: "forget.jsonl, line 3" or "forget.parquet, row 3"."""
        return f"{self.name}, row {index + 1}" if self.lines is None else f"{self.name}, line {self.lines[index]}"


def read_rows(source: str, *, limit: int | None = None) -> Rows:
    """The rows of `source`: a .jsonl, .json, .csv (also .gz of them), .parquet or .arrow file, or a hub name.

    A hub name is `owner/name`, `owner/name:configuration` or `owner/name:configuration/split`, each optionally
    followed by `@revision`. Unless named, the split is `train`, or the only one there is.
    Only the first `limit` rows are kept.

    Raises UserError for a source that is missing, unreadable, malformed or empty.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder; name one file in it ({', '.join(FILE_KINDS)}).")
    if path.exists():
        rows = _read_file(source, path)
    elif _kind(path) in FILE_KINDS:
        raise UserError(f"There is no file {source}; check the path.")
    elif match := HUB_NAME.fullmatch(source):
        rows = _read_hub(source, **match.groupdict())
    else:
        raise UserError(
            f"{source} is neither a file nor a hub name; give a path ({', '.join(FILE_KINDS)}) "
            "or owner/name:configuration."
        )
    if not rows.rows:
        raise UserError(f"{source} holds no rows; give a file with at least one.")
    return Rows(rows.name, rows.rows[:limit], rows.lines and rows.lines[:limit])


def _kind(path: Path) -> str:
    """The suffix that says how the file is read; two where the file is compressed."""
    suffixes = path.name.lower().split(".")[1:]
    return "".join(f".{suffix}" for suffix in (suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:]))


def _read_file(name: str, path: Path) -> Rows:
    kind = _kind(path)
    if kind in (".xlsx", ".xls", ".ods"):
        raise UserError(f"{name} is a spreadsheet; save the sheet with the rows as CSV (UTF-8) and name that file.")
    if kind not in FILE_KINDS:
        raise UserError(f"{name} is of an unsupported file type; convert it to one of {', '.join(FILE_KINDS)}.")
    if path.stat().st_size == 0:
        return Rows(name, [])
    read = _read_csv if kind.startswith(".csv") else _read_json if kind.startswith(".json") else _read_table
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
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline=newline, errors=errors))


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
    return rows


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
    records, lines, end = [], [], 0
    with _open(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for record in reader:
                if len(record) > 1 or "".join(record).strip():
                    records.append(record)
                    lines.append(end + 1)
                end = reader.line_num
        except csv.Error as error:
            raise UserError(f"{name}, line {end + 1} cannot be read as csv ({error}); check its quotes.") from error
    header = records[0] if records else []
    if len(header) == 1 and (separator := re.search(r"[;\t]", header[0])):
        raise UserError(
            f"{name}, line {lines[0]} has one field, {header[0]!r}; separate fields with commas, not {separator[0]!r}."
        )
    if twice := next((column for column in header if column and header.count(column) > 1), None):
        raise UserError(f"{name}, line {lines[0]} names the column {twice} twice; rename one of the two.")
    for record, line in zip(records, lines, strict=True):
        if len(record) > len(header):
            raise UserError(
                f"{name}, line {line} has {len(record)} fields but the header has {len(header)}; "
                "put text that holds a comma in double quotes."
            )
    return Rows(name, [dict(zip(header, record, strict=False)) for record in records[1:]], lines[1:])


def _read_table(name: str, path: Path) -> Rows:
    """Parquet or Arrow, through a cache that is removed afterwards. The path is not a glob pattern."""
    import datasets

    builder, files = path.suffix.lower()[1:], glob.escape(str(path.resolve()))
    with tempfile.TemporaryDirectory(prefix="lowmem-npo-") as cache, _quietly():
        return Rows(name, datasets.load_dataset(builder, data_files=files, split="train", cache_dir=cache).to_list())


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars or logged errors from `datasets`: a local file is quick, and its errors are reported once."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


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
        raise UserError(
            f"{name} is no local file, the hub cannot be reached, and there is no local copy of {repo}; "
            "connect to the network once, or give the path of a file."
        ) from error
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
