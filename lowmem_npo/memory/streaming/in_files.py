"""A decoder layer's weights that stay in their files, and are read from there whenever they are needed.

What is mapped must not be used where it lies: a disk that fails, or a file that has become shorter, would end the
process by a signal (SIGBUS), without a word.
"""

from __future__ import annotations

import os
from bisect import bisect
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from lowmem_npo.errors import UserError
from lowmem_npo.memory.streaming.blocks import Block


class Part(NamedTuple):
    """The bytes of a tensor."""

    file: BinaryIO
    offset: int  # in the file
    place: int  # in the block
    size: int


class MappedFiles:
    """The files that this process has mapped into its memory, now."""

    def __init__(self) -> None:
        lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        self._ranges = [  # in the order of their addresses: start, end, offset in the file, path
            (int(ends.split("-")[0], 16), int(ends.split("-")[1], 16), int(offset, 16), path[0])
            for ends, _, offset, _, _, *path in lines
            if path and path[0].startswith("/")
        ]
        self._open: dict[str, BinaryIO] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return self._range_of(tensor) is not None

    def where(self, tensor: Tensor) -> tuple[BinaryIO, int] | None:
        """The file that a contiguous tensor is mapped from, and the offset at which it begins there; None for one that
        is elsewhere in memory. A file is opened once, and can be read as long as it is open, deleted or not.

        Raises:
            UserError: it is there no more.
        """
        if (of_range := self._range_of(tensor)) is None:
            return None
        start, _, offset, path = of_range
        if path not in self._open:
            try:
                self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115 - as long as it is read
            except OSError as error:
                raise _unreadable(path, error.strerror or str(error)) from error
        return self._open[path], tensor.data_ptr() - start + offset

    def _range_of(self, tensor: Tensor) -> tuple[int, int, int, str] | None:
        address = tensor.data_ptr()
        place = bisect(self._ranges, address, key=lambda of_range: of_range[0]) - 1
        return self._ranges[place] if place >= 0 and address < self._ranges[place][1] else None


class FileBlock:
    """One layer's weights in the files that they are mapped from.

    Raises:
        UserError: a file is there no more.
    """

    def __init__(self, block: Block, files: MappedFiles) -> None:
        self.size = block.size
        self._parts: list[Part] = []
        self._in_memory: list[tuple[Tensor, int]] = []
        for tensor, place in zip(block.tensors(), block.offsets, strict=True):
            where = files.where(tensor)
            if where is None:
                self._in_memory.append((tensor, place))
            else:
                self._parts.append(Part(*where, place, tensor.numel() * tensor.element_size()))

    def __len__(self) -> int:
        return self.size

    def read(self, into: Tensor) -> None:
        """Reads them to their places in `into` (size,) uint8, through the operating system's page cache.

        Raises:
            UserError: the disk fails, or a file is shorter than it was.
        """
        for tensor, place in self._in_memory:
            there = into[place : place + tensor.numel() * tensor.element_size()]
            there.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        memory = into.numpy().data
        for part in self._parts:  # in the background, in large pieces
            os.posix_fadvise(part.file.fileno(), part.offset, part.size, os.POSIX_FADV_WILLNEED)
        for part in self._parts:
            _read(part, memory[part.place : part.place + part.size])


def _read(part: Part, into: memoryview) -> None:
    """Reads at an offset, since a process that was forked has the same position in the file."""
    read = 0
    while read < part.size:
        try:
            more = os.preadv(part.file.fileno(), [into[read:]], part.offset + read)
        except OSError as error:
            raise _unreadable(part.file.name, error.strerror or str(error)) from error
        if not more:
            raise _unreadable(part.file.name, "it has become shorter")
        read += more


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(
        f"--quantized-cache: '{path}' can be read no more ({reason}): remove its directory, or name another one, and "
        "continue with --resume."
    )
