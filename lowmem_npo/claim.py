"""One output directory, one process: a lock that the kernel drops when its holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lowmem_npo.console import Say
from lowmem_npo.endings import Interrupted, failure, interrupted
from lowmem_npo.errors import UserError, Vanished
from lowmem_npo.files import missing_below

LOCK = "lowmem-npo.lock"  # in the directory: two names of one directory are one
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems
CLAIMED: dict[Path, os.stat_result] = {}  # resolved directory -> its status when this process claimed it
LINGER = 10.0  # seconds in which the data loaders of a killed process end, which hold its lock until then


class InUse(UserError):
    """Another process holds the directory."""


@contextmanager
def claimed(directory: Path, say: Say = print) -> Iterator[None]:
    """Makes `directory`, if there is none, and holds it for this process alone. What was made and is still empty in the
    end is removed.

    Raises InUse if another process holds it (with that one's id and start), UserError if it cannot be written. A later
    failure to read or write becomes Vanished if the directory is gone by then; an interruption says that it is.
    """
    made = [path for path in [directory, *directory.parents] if not path.exists()]
    try:
        make_directory(directory)
        place, status = Path(os.path.realpath(directory)), directory.stat()
        lock = _locked(directory, say)
    except FileExistsError as error:
        raise UserError(f"--output-dir '{directory}' is a file: choose a directory.") from error
    except OSError as error:
        raise UserError(f"--output-dir '{directory}' cannot be written: {error.strerror or error}.") from error
    CLAIMED[place] = status
    try:
        yield
    except Exception as error:
        if failure(error) is None or _is_at(status, place):
            raise
        raise Vanished(place) from error
    except (KeyboardInterrupt, Interrupted) as error:
        if _is_at(status, place):
            raise
        raise interrupted(error, str(Vanished(place))) from None
    finally:
        del CLAIMED[place]
        with suppress(OSError):
            if _is_at(os.fstat(lock), directory / LOCK):  # else the directory is gone by now, or another's
                (directory / LOCK).unlink()  # before it is released: who waits for it sees that it is another's no more
        os.close(lock)
        with suppress(OSError):  # of one that is not empty
            for path in made:
                path.rmdir()


def gone() -> Vanished | None:
    """What to say of a claimed directory that is no longer where it was; None while all are."""
    return next((Vanished(place) for place, status in CLAIMED.items() if not _is_at(status, place)), None)


def make_directory(directory: Path) -> None:
    """Makes `directory` and those above it, where there are none, but for those that this process has claimed.

    Raises OSError if it cannot be made; Vanished if it is in a claimed directory that somebody has removed since, or
    renamed.
    """
    if (missing := missing_below(directory)) is not None:
        raise OSError(f"there is no '{missing}' to go up from")
    directory = Path(os.path.realpath(directory))  # which goes into no loop of links
    around = [directory, *directory.parents]
    for place, status in CLAIMED.items():
        if place in around:
            if not _is_at(status, place):
                raise Vanished(place)
            around = around[: around.index(place)]
    for path in reversed(around):
        if path == directory or not path.exists():
            path.mkdir(exist_ok=True)


@contextmanager
def workspace(directory: Path, say: Say = print) -> Iterator[None]:
    """`directory`, claimed and empty, to make something in that is renamed when it is complete. What a killed process
    has left there is removed first, and the directory itself in the end.

    Raises UserError as `claimed` does, and if the directory holds what no such process has left.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / LOCK).exists():
        raise UserError(f"'{directory}' is in the way, and no interrupted command has left it: rename it.")

    def clear() -> None:
        for path in directory.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    with claimed(directory, say):
        try:
            clear()
            yield
        finally:
            with suppress(OSError):
                clear()
    with suppress(OSError):
        directory.rmdir()


def check_unclaimed(directory: Path) -> None:
    """Raises InUse if another process holds `directory`; writes nothing."""
    with suppress(OSError):
        lock = os.open(directory / LOCK, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held(directory) from error
        finally:
            os.close(lock)


def _locked(directory: Path, say: Say) -> int:
    """The descriptor of the lock's file, locked."""
    path, deadline = directory / LOCK, time.monotonic() + LINGER
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(os.fstat(lock), path):  # its holder has ended, and removed it, since it was opened
                os.close(lock)
                continue
        except OSError as error:
            if error.errno in NO_LOCKS:
                say(f"The file system of '{directory}' has no locks: start nothing else there.")
            else:
                os.close(lock)
                if not isinstance(error, BlockingIOError):
                    raise
                if _may_live(_holder(directory)) or time.monotonic() > deadline:
                    raise _held(directory) from error
                time.sleep(0.1)
                continue
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "began": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder).encode(), 0)
        return lock


def _is_at(status: os.stat_result, path: Path) -> bool:
    """Whether the file of this status is the one at `path`."""
    try:
        return os.path.samestat(status, path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _holder(directory: Path) -> dict[str, Any]:
    """Who wrote the lock last: pid, host, began; empty if it cannot be read (it is just being written)."""
    try:
        holder = json.loads((directory / LOCK).read_bytes())
        return holder if holder.keys() >= {"pid", "host", "began"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether the process may still run; of one on another host that is not known."""
    return not holder or holder["host"] != socket.gethostname() or os.path.exists(f"/proc/{holder['pid']}")


def _held(directory: Path) -> InUse:
    holder = _holder(directory)
    by = "another process"
    if holder:
        by = f"process {holder['pid']} on {holder['host']}, begun {holder['began']}"
    return InUse(f"--output-dir '{directory}' is in use by {by}: wait until it has ended, or choose another directory.")
