"""Rows of Parquet and Arrow files, without the copy on the disk that `datasets` would make, and leave behind if it is
killed.

Some kilobytes can hold equal rows, texts or lists that fill any memory. So they are read a few rows at a time, and no
further than can be meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_npo.data.documents import check_content, most_content
from lowmem_npo.data.rows import Rows
from lowmem_npo.errors import UserError
from lowmem_npo.sources import kind_of

if TYPE_CHECKING:
    import pyarrow

FEW_ROWS, MOST_ROWS = 10_000, 10_000_000  # of a table: that any file may have, however small, and that none may
AT_ONCE = 64  # rows
VALUE = 8  # bytes at least of a Python object, in the list or dictionary that holds it


def read_columnar(name: str, path: Path) -> Rows:
    """The rows of a Parquet file, or of an Arrow file or stream, called `name` in messages.

    Raises UserError for more rows or bytes than a file of its size can mean, and for two columns of one name.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for batch in _parquet(name, path) if kind_of(path) == ".parquet" else _arrow(path):
        if twice := next((column for column, times in Counter(batch.schema.names).items() if times > 1), None):
            raise UserError(f"{name} has the column {twice} twice; rename one of the two.")
        for start in range(0, batch.num_rows, AT_ONCE):
            part = batch.slice(start, AT_ONCE)
            _check_number(name, path, len(rows) + batch.num_rows - start)
            size += sum(map(_size, part.columns))
            check_content(name, path, size)
            rows += part.to_pylist()
    return Rows(name, rows)


def _parquet(name: str, path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Batches of a Parquet file; first, what it says of itself is checked."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        about = file.metadata
        _check_number(name, path, about.num_rows)
        groups = [about.row_group(at) for at in range(about.num_row_groups)]
        columns = [group.column(at) for group in groups for at in range(group.num_columns)]
        sizes = [max(column.total_uncompressed_size, VALUE * column.num_values) for column in columns]
        check_content(name, path, sum(sizes))
        # Equal texts are stored once: no row has more of a column than is stored, but each may have as much.
        rows = max(1, min(AT_ONCE, most_content(path) // max(sizes, default=1)))
        yield from file.iter_batches(rows)


def _arrow(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Batches of an Arrow stream or file."""
    import pyarrow

    with path.open("rb") as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            file.seek(0)
            whole = pyarrow.ipc.open_file(file)
            yield from map(whole.get_batch, range(whole.num_record_batches))
        else:
            yield from stream


def _check_number(name: str, path: Path, rows: int) -> None:
    """Raises UserError for more rows than a file can hold that was not made to fill the memory: each has some bytes."""
    if rows > min(MOST_ROWS, max(FEW_ROWS, path.stat().st_size)):
        raise UserError(f"{name} has {rows:,} rows or more, more than can be meant; split the file.")


def _size(values: pyarrow.Array) -> int:
    """Bytes that `values` have at least as Python objects: their texts, and `VALUE` for each, also in a list."""
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    kind, inner, texts = values.type, [], None
    if isinstance(values, pyarrow.ExtensionArray):
        return _size(values.storage)
    if types.is_run_end_encoded(kind):
        return _size(pc.run_end_decode(values))
    if types.is_struct(kind):
        inner = values.flatten()
    elif types.is_map(kind):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        inner = [part.slice(first, last - first) for part in (values.keys, values.items)]
    elif types.is_nested(kind) and not types.is_union(kind):  # lists of any kind
        inner = [values.flatten()]
    elif types.is_dictionary(kind) and (lengths := _lengths(values.dictionary)) is not None:
        texts = lengths.take(values.indices)
    else:
        texts = _lengths(values)
    return VALUE * len(values) + sum(map(_size, inner)) + (pc.sum(texts).as_py() or 0 if texts is not None else 0)


def _lengths(values: pyarrow.Array) -> pyarrow.Array | None:
    """Bytes of each text; None where there are none."""
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    kind = values.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        values = values.cast(pyarrow.large_binary())
    elif kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
        return None
    return pc.binary_length(values).cast(pyarrow.int64())
