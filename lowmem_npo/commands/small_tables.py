"""Rows of small tables on this machine, read before the libraries are loaded: a mistyped column is answered at once."""

from __future__ import annotations

from lowmem_npo.config import DataConfig
from lowmem_npo.files import expanded
from lowmem_npo.sources import BUILTIN, SELF, TEXT_KINDS, data_names, kind_of

SMALL = 2**20  # bytes


def check_small_tables(data: DataConfig) -> None:
    """Raises UserError for what `prepare` would refuse in rows or columns of these."""
    from lowmem_npo.data import read_rows, to_examples  # late: --help need not load them
    from lowmem_npo.data.schemas import check_some_have

    named = data.prompt_column, data.answer_column
    beside = ("alternative_column", "group_column", "paraphrase_column")
    sources = {part: source for part in ("forget", "retain", "holdout") if (source := getattr(data, part)) is not None}
    small = {part: source for part, source in sources.items() if all(map(_is_small_table, data_names(source)))}
    met: dict[str, None] = {}
    for part, source in small.items():
        names = ("prompt_column", "answer_column", *(beside if part == "forget" else ()))
        rows = read_rows(source, limit=data.limit, columns=named)
        to_examples(rows, **{name: getattr(data, name) for name in names}, or_recognised=True)
        met.update(dict.fromkeys(rows.columns))
    if "forget" in sources and all(
        part in small or source in BUILTIN or SELF.fullmatch(source) for part, source in sources.items()
    ):
        check_some_have(met, *named)


def _is_small_table(name: str) -> bool:
    path = expanded(name)
    return path.is_file() and kind_of(path) in TEXT_KINDS and path.stat().st_size <= SMALL
