"""How a command ends before its end: by a signal, or because the machine fails it. Each is a sentence."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lowmem_npo.errors import UserError, Vanished, one_line

MOST, MOST_OF_PATH = 200, 1000  # characters of an error's own text, and of a path in it
SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # what ends a job on a shared machine
UNWRITTEN = ("PytorchStreamWriter failed", "unexpected pos", "basic_ios::clear")  # of torch.save
UNALLOCATED = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
# Of libraries that allocate GPU memory by themselves, as PyTorch and Triton report it, and of PyTorch's own expandable
# segments.
UNALLOCATED_ON_GPU = (
    "_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "[CUDA]: out of memory",
)


class Interrupted(BaseException):
    """A signal ended the command. The message says what is left of it; `code` is the exit code."""

    def __init__(self, number: int, left: str = "") -> None:
        name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        super().__init__(f"{name}; {left}." if left else f"{name}.")
        self.number, self.left, self.code = number, left, 128 + number


def interrupted(error: KeyboardInterrupt | Interrupted, left: str) -> Interrupted:
    """The interruption `error`, with what is left; what it says of that already stays."""
    number, said = (error.number, error.left) if isinstance(error, Interrupted) else (signal.SIGINT, "")
    return Interrupted(number, said or left)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *more: signal.Signals) -> Iterator[None]:
    """Calls `handler` for each of SIGNALS and of `more`, but for those that the process was started to ignore, as by
    nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *more)}
    heard = [number for number in before if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def going_on(first: Path, resume: bool) -> Callable[[], str]:
    """What is left of a command that writes the file `first` before all others; with `resume`, it may have before."""

    def version() -> tuple[int, int] | None:
        status = first.stat() if first.exists() else None
        return status and (status.st_ino, status.st_mtime_ns)

    before = None if resume else version()
    return lambda: (
        "nothing was written"
        if version() in (None, before)
        else "the same command with --resume goes on from what it has written"
    )


@contextlib.contextmanager
def ended_with(left: Callable[[], str]) -> Iterator[None]:
    """Inside, an interruption and a failure of the machine say what is left, a clause; but for a directory that is
    gone, whose content is not known."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise interrupted(error, left()) from None
    except Vanished as error:
        raise UserError(f"{error}.") from error
    except Exception as error:
        if (what := failure(error)) is None:
            raise
        raise UserError(f"{what}; {left()}.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out: PyTorch's own error, or that of a library that allocates by itself."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in UNALLOCATED_ON_GPU)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether the machine's own memory ran out."""
    if isinstance(error, MemoryError):
        return True
    is_of_library = isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError"
    return is_of_library and any(text in str(error) for text in UNALLOCATED)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the machine's: nothing is wrong with what was being read, then."""
    return is_out_of_memory(error) or is_out_of_host_memory(error)


@contextlib.contextmanager
def tried(*errors: type[Exception]) -> Iterator[None]:
    """Suppresses `errors` (without any: whatever is raised) of code that is tried, of which an error says that it does
    not do what is asked. A lack of memory and a GPU that has failed say nothing about it: they are raised."""
    try:
        yield
    except Exception as error:
        of_machine = lacks_memory(error) or type(error).__name__ == "AcceleratorError"
        if of_machine or not isinstance(error, errors or Exception):
            raise


def failure(error: BaseException) -> str | None:
    """What of the machine failed, as a clause, if `error` is of that kind: its disk, its memory, its GPU's memory."""
    kind, text = type(error).__name__, one_line(error, MOST)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        reason = (os.strerror(error.errno) if error.errno else "") or text
        path = str(error.filename or "")
        return f"'{path[:MOST_OF_PATH]}{'…' * (len(path) > MOST_OF_PATH)}': {reason}" if path else reason
    if is_out_of_memory(error):
        return (
            "the GPU ran out of memory: give a smaller batch, --qlora or --stream-weights, or for a run "
            "--memory-budget, which finds what fits"
        )
    if is_out_of_host_memory(error):
        return "the machine ran out of memory"
    if kind == "SafetensorError" or (isinstance(error, RuntimeError) and any(t in text for t in UNWRITTEN)):
        return f"a file of weights could not be read or written ({text}), perhaps because the disk is full"
    return None
