"""Help as tyro prints it, its prose as wide as the terminal: tyro wraps what is in its boxes, and nothing else."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, TextIO

EDGES = "│╭╰├─ \x1b"  # with which a line of a box begins, or one in colours


class Wrapped:
    """A stream that writes to another one, longer lines in several."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        width = shutil.get_terminal_size().columns
        for line in text.splitlines(keepends=True):
            prose = len(line.rstrip("\n")) > width and line[0] not in EDGES
            end = "\n" if line.endswith("\n") else ""
            self._stream.write(textwrap.fill(line, width, break_on_hyphens=False) + end if prose else line)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
