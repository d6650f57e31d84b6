"""A safetensors file that is filled row by row: the reference's values for each answer token of a dataset.

    checksums  (rows,) I64  2^32 + CRC-32 of the row's values, or 0: not stored yet
    values     (T, width)   answer tokens of all rows, one row after the other

Any program that reads safetensors can map it. Here it is read and written at offsets: a full or failing disk then
raises an error that can be handled, where a mapping would end the process by a signal. A row counts as stored when its
checksum is there and right, so neither a killed run nor a power cut leaves values that could be mistaken for good ones.
"""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from lowmem_npo.claim import make_directory
from lowmem_npo.files import PARTIAL

HOST = re.sub(r"\W", "_", platform.node())
"""Of this machine's processes: others may write into the same directory."""

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class AnswerFile:
    """One such file, existing or created by the first `write`. Several processes of one machine may share it.

    Args:
        lengths: answer tokens of each row of the dataset.
        width, dtype: of one token's values.
        metadata: what the values depend on, written into the header of a new file.

    Raises:
        ValueError: the existing file is damaged or of another kind; the message is a clause such as "it is cut off".
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int, dtype: torch.dtype, metadata: dict[str, str]):
        self.path, self.lengths, self.width, self.dtype = path, list(lengths), width, dtype
        self.metadata = metadata  # of the existing file, if there is one
        self._starts = [0, *accumulate(self.lengths)]
        self._checked: set[int] = set()  # rows whose values this process has verified or written
        self._file = -1  # its descriptor, once it exists
        self.fits = True  # False: the existing file is for rows of other lengths, or for values of another size or type
        self._header = self._make_header()
        self._use_data_at(len(self._header))
        self._clear()
        if path.exists():
            self._file = os.open(path, os.O_RDWR)
            self._read_header()

    @property
    def exists(self) -> bool:
        return self._file >= 0

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self._values_at + self._bytes_of(self._starts[-1])

    def holds(self, rows: Sequence[int]) -> bool:
        """Whether all of `rows` are stored; that their values are right is not looked at."""
        return self.exists and all(row in self._checked or self._checksum(row) for row in rows)

    def read(self, rows: Sequence[int]) -> Tensor | None:
        """(N, width) values of `rows`, one after the other, on the host; None unless all of them are stored."""
        if not self.exists:
            return None
        lengths = [self.lengths[row] for row in rows]
        result = torch.empty(sum(lengths), self.width, dtype=self.dtype)
        stored = all(self._read_row(row, part) for row, part in zip(rows, result.split(lengths), strict=True))
        return result if stored else None

    def write(self, rows: Sequence[int], values: Tensor) -> bool:
        """Stores the (N, width) `values` of those `rows` that are not stored yet; whether these were all. Raises
        OSError, for example when the disk is full; what was stored before stays valid."""
        new = True
        if not self.exists:
            self._create()
        for row, part in zip(rows, values.cpu().split([self.lengths[row] for row in rows]), strict=True):
            if row in self._checked or self._read_row(row, torch.empty_like(part)):  # in this process or before it
                new = False
                continue
            part = part.contiguous()
            _write_all(self._file, _bytes(part), self._values_at + self._bytes_of(self._starts[row]))
            _write_all(self._file, struct.pack("<q", _checksum_of(part)), self._checksums_at + 8 * row)
            self._checked.add(row)
        return new

    def _partial(self, process: int | str) -> Path:
        return self.path.with_name(f"{self.path.name}.{HOST}-{process}{PARTIAL}")

    def _clear(self) -> None:
        """Removes what processes of this machine have left that were killed while they created the file."""
        for left in self.path.parent.glob(self._partial("*").name):
            process = left.name.split(".")[-2].rpartition("-")[2]
            if process == str(os.getpid()) or not os.path.exists(f"/proc/{process}"):
                left.unlink(missing_ok=True)

    def _create(self) -> None:
        """Reserves the whole file, so that space cannot run out later; leaves none behind if that fails."""
        make_directory(self.path.parent)
        partial = self._partial(os.getpid())
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(file, 0, self.nbytes)
            _write_all(file, self._header, 0)
            try:
                os.link(partial, self.path)  # unlike renaming, never replaces what another process has created
            except FileExistsError:
                os.close(file)
                file = os.open(self.path, os.O_RDWR)
        except OSError:
            os.close(file)
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._file = file

    def _make_header(self) -> bytes:
        rows, tokens = len(self.lengths), self._starts[-1]
        ends = 8 * rows, 8 * rows + self._bytes_of(tokens)
        header = {
            "__metadata__": self.metadata,
            "checksums": {"dtype": "I64", "shape": [rows], "data_offsets": [0, ends[0]]},
            "values": {"dtype": DTYPES[self.dtype], "shape": [tokens, self.width], "data_offsets": list(ends)},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as the format aligns its values
        return struct.pack("<Q", len(text)) + text

    def _read_header(self) -> None:
        try:
            (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
            header = json.loads(os.pread(self._file, min(length, 2**20), 8))
            self.metadata = header.pop("__metadata__")
            shapes = {name: entry["shape"] for name, entry in header.items()}
        except (struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("it is not a reference cache") from error
        expected = json.loads(self._header[8:])
        if shapes.keys() != expected.keys() - {"__metadata__"}:
            raise ValueError("it is not a reference cache")
        self._use_data_at(8 + length)
        if any(entry != expected[name] for name, entry in header.items()):
            self.fits = False
        elif os.fstat(self._file).st_size != self.nbytes:
            raise ValueError("it is cut off")

    def _use_data_at(self, start: int) -> None:
        self._checksums_at, self._values_at = start, start + 8 * len(self.lengths)

    def _bytes_of(self, tokens: int) -> int:
        return tokens * self.width * self.dtype.itemsize

    def _checksum(self, row: int) -> int:
        stored = os.pread(self._file, 8, self._checksums_at + 8 * row)
        return struct.unpack("<q", stored)[0] if len(stored) == 8 else 0

    def _read_row(self, row: int, part: Tensor) -> bool:
        """Fills `part` with the row's values; whether they are stored, and right."""
        checksum = 0
        if row not in self._checked and not (checksum := self._checksum(row)):
            return False
        self._read_into(part, row)
        if checksum and checksum != _checksum_of(part):
            return False
        self._checked.add(row)
        return True

    def _read_into(self, part: Tensor, row: int) -> None:
        buffer, at = memoryview(_bytes(part)), self._values_at + self._bytes_of(self._starts[row])
        while buffer:
            count = os.preadv(self._file, [buffer], at)
            if count == 0:
                raise OSError(f"'{self.path}' ends within row {row}")
            buffer, at = buffer[count:], at + count

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum_of(part: Tensor) -> int:
    return 2**32 + zlib.crc32(_bytes(part))


def _write_all(file: int, data: bytes | memoryview, at: int) -> None:
    data = memoryview(data)
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count
