"""Rows of small tables on this machine, read before the libraries are loaded: a mistyped column is answered at once."""

from __future__ import annotations

from lowmem_npo.config import DataConfig
from lowmem_npo.files import expanded
from lowmem_npo.sources import TEXT_KINDS, data_names, kind_of

SMALL = 2**20  # bytes


def check_small_tables(data: DataConfig) -> None:
    """Raises UserError for what `prepare` would refuse in rows or columns of these."""
    from lowmem_npo.data import read_rows, to_examples  # late: --help need not load them

    beside = ("alternative_column", "group_column", "paraphrase_column")
    for part in ("forget", "retain", "holdout"):
        source: str | None = getattr(data, part)
        if source is None or not all(map(_is_small_table, data_names(source))):
            continue
        names = ("prompt_column", "answer_column", *(beside if part == "forget" else ()))
        columns = {name: getattr(data, name) for name in names}
        to_examples(read_rows(source, limit=data.limit, columns=(data.prompt_column, data.answer_column)), **columns)


def _is_small_table(name: str) -> bool:
    path = expanded(name)
    return path.is_file() and kind_of(path) in TEXT_KINDS and path.stat().st_size <= SMALL
