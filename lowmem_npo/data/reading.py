"""Rows from a file or from the Hugging Face hub, read through `datasets`, each with a location for messages.

Two traps are avoided here, because both change text silently:

- `datasets` reads JSON with pyarrow, which guesses types: a column whose every value looks like "1969-12-21" becomes
  timestamps. JSON is therefore read as lines (the `text` builder) and parsed by the standard library, which also
  reports the line of a mistake;
- pandas guesses types in CSV: "0042" becomes 42 and the answer "NA" becomes a missing value. Every CSV column is
  therefore declared to be text.

Local files leave no copy behind in the `datasets` cache: what is to be forgotten should not linger there.
`datasets` is imported where it is used: an estimate without data would spend much of its time on that import.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_npo.errors import UserError

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
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
    """The rows of `source`: a .jsonl, .json, .csv, .parquet or .arrow file, or a hub name.

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
    elif path.suffix.lower() in FILE_KINDS:
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


def _read_file(name: str, path: Path) -> Rows:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise UserError(f"{name} is of an unsupported file type; convert it to one of {', '.join(FILE_KINDS)}.")
    if path.stat().st_size == 0:
        return Rows(name, [])
    try:
        return {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv}.get(kind, _read_table)(name, path)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and pandas each have exceptions of their own
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            place = f"{name}, line {_undecodable_line(path)}"
            raise UserError(f"{place} is not UTF-8 text; save the file as UTF-8.") from error
        reason = " ".join(str(cause).split())
        raise UserError(f"{name} cannot be read as {kind[1:]} ({reason}); check the file.") from error


def _read_json(name: str, path: Path) -> Rows:
    """JSON Lines (one object per line, empty lines allowed), or one array of objects; the suffix does not matter."""
    lines = [row["text"] for row in _load("text", path, encoding="utf-8-sig")]
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
    return rows


def _parse(name: str, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}, line {first_line + error.lineno - 1} is not valid JSON ({error.msg}, column {error.colno}); "
            "a file holds one object per line, or one array of objects."
        ) from error


def _read_csv(name: str, path: Path) -> Rows:
    import datasets
    import pandas

    header = pandas.read_csv(path, nrows=0, encoding="utf-8-sig").columns
    as_text = datasets.Features({column: datasets.Value("string") for column in header})
    try:
        rows = _load("csv", path, features=as_text, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        if "corresponds to no data" in str(error):  # a header and nothing else
            return Rows(name, [])
        raise
    return Rows(name, rows, _csv_lines(path, len(rows)))


def _csv_lines(path: Path, num_rows: int) -> list[int] | None:
    """The line each record begins in; None if the standard library counts other records than pandas did."""
    lines, end = [], 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for record in reader:
            if record:
                lines.append(end + 1)
            end = reader.line_num
    return lines[1:] if len(lines) == num_rows + 1 else None


def _read_table(name: str, path: Path) -> Rows:
    return Rows(name, _load(path.suffix.lower()[1:], path))


def _load(builder: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    """All rows of a local file, through a cache that is removed afterwards. The path is not a glob pattern."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="lowmem-npo-") as cache, _quietly():
        table = datasets.load_dataset(
            builder, data_files=glob.escape(str(path.resolve())), split="train", cache_dir=cache, **options
        )
        return table.to_list()


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
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1
