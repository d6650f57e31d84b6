"""How far something is and how long it will take: a bar on a terminal, and in a log file a plain line a minute."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from contextlib import suppress
from typing import Any, ClassVar

from tqdm import tqdm

SECONDS = 60  # between two lines, whatever they are about


class Progress(tqdm):
    """tqdm's bar, on standard error. Where that is no terminal, lines like "unlearning, step 40 of 200: loss 1.2, ETA
    03:10" instead. Of the processes that torchrun starts only the first shows anything."""

    printed: ClassVar[float] = time.monotonic()  # when the last line was, of any instance

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        *,
        initial: int = 0,
        leave: bool = False,
        wanted: bool = True,
        delay: float = 0,
    ) -> None:
        """delay: seconds in which nothing is shown, for what is mostly done by then."""
        wanted = wanted and ("LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0")
        self.in_lines = wanted and not sys.stderr.isatty()
        self._began, self._delay, self._line_of = time.monotonic(), delay, initial - 1
        instead: dict[str, Any] = {"file": io.StringIO(), "mininterval": math.inf} if self.in_lines else {}
        bar = {"total": total, "desc": description, "unit": unit, "initial": initial, "leave": leave, "delay": delay}
        super().__init__(disable=not wanted, **bar, **instead)

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        now = time.monotonic()
        if now - Progress.printed >= SECONDS and now - self._began >= self._delay:
            self.print_line()
        return shown

    def print_line(self) -> None:
        """Prints a line now, unless there has been one at this point."""
        if self.in_lines and self._line_of != self.n:
            self._line_of, Progress.printed = self.n, time.monotonic()
            with suppress(OSError):  # a full disk behind it ends nothing
                print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        done, left = self.n - self.initial, self.total - self.n
        known = [self.postfix] if self.postfix else []
        if done and left:
            known.append(f"ETA {self.format_interval((time.monotonic() - self._began) / done * left)}")
        return ": ".join(filter(None, (f"{self.desc}, {self.unit} {self.n} of {self.total}", ", ".join(known))))
