"""Files that are complete or absent, and hashes that identify them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_npo.errors import UserError
from lowmem_npo.sizes import compared

CHUNK = 2**20  # bytes read at a time
PARTIAL = ".partial"  # at the end of a name: being written, or left by a process that was killed then


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Writes the whole file or none of it, whenever the process is killed or the machine goes down.

    private: nobody but its owner can read it.
    """
    with complete(path) as partial:
        partial.touch(mode=0o600 if private else 0o666)
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int | None = 1, private: bool = False, **how: Any) -> None:
    """`write_atomically` of `content` as JSON, written as `json.dumps` does by `indent` and `how`, for `load_json`."""
    write_atomically(path, json.dumps(content, indent=indent, **how) + "\n", private=private)


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Yields the name under which to write the file that is to be at `path`; it gets there once it is on the disk. If
    it cannot be written, nothing is left of it."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # of a killed process, perhaps with other permissions
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a complete file, or a directory of such, once all of it is on the disk: after a power cut it is still
    whole, or not there."""
    for written in [*partial.rglob("*"), partial]:
        _flush(written)
    partial.replace(path)
    _flush(path.parent)


def put_contents_in_place(partial: Path, directory: Path, last: str) -> None:
    """Moves the files in and below `partial` to the same places in `directory`, one by one, in place of those there.

    last: the name of the file that says that all are there.
    """
    paths = sorted(partial.rglob("*"))  # a directory before what is in it
    for path in paths:
        if path.is_dir():
            (directory / path.relative_to(partial)).mkdir(exist_ok=True)
    for file in sorted((path for path in paths if path.is_file()), key=lambda file: file == partial / last):
        put_in_place(file, directory / file.relative_to(partial))
    shutil.rmtree(partial)


def _flush(path: Path) -> None:
    """Has the disk hold what is written of a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(name: str | Path) -> Path:
    """A path whose `~` is a home directory; it stays where nobody is known whose home that would be."""
    return Path(os.path.expanduser(name))


def name_of(path: str | Path) -> str:
    """The last part of a path, however it is spelled: of ".", that of the working directory."""
    return Path(os.path.abspath(expanded(path))).name


def missing_below(path: Path) -> Path | None:
    """The directory that a `..` of `path` goes up from, if it is not there."""
    return next((up.parent for up in (path, *path.parents) if up.name == ".." and not up.parent.exists()), None)


def file_in_the_way(path: Path) -> Path | None:
    """The file that stands where `path`, or a directory above it, would be, or a link to itself; None if it is or can
    be a directory."""
    return next((p for p in (path, *path.parents) if os.path.lexists(os.path.realpath(p)) and not p.is_dir()), None)


class NotJSON(UserError, ValueError):
    """A file that is to hold JSON does not: damaged, or another one."""


def read_json_lines(path: Path) -> list[Any]:
    """What the lines of a JSONL file hold. A line ends with a line feed alone: a text may hold U+2028 and its like.

    Raises OSError, or ValueError for what is no JSON."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, and NotJSON for what is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        what = "it nests too deeply, or holds a number that is too long"
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg}, line {error.lineno}, column {error.colno}"
        elif isinstance(error, UnicodeDecodeError):
            what = "it is not UTF-8 text"
        raise NotJSON(f"'{path}' is not valid JSON: {what}.") from error


def read_at_most(path: Path, most: int) -> bytes:
    """The content of a file, a pipe or a device, and no more than one byte beyond `most`. A named pipe that nobody
    writes into is empty; it is not waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)  # for those who write into it now
        return file.read(most + 1)


def is_mount_point(path: Path) -> bool:
    """Whether nothing can be renamed onto this resolved path, as a disk or a directory is mounted there.

    `os.path.ismount` misses a directory of the same disk.
    """
    table = Path("/proc/self/mountinfo")
    mounts = table.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if table.exists() else []
    escaped = re.sub(r"[ \t\n\\]", lambda special: f"\\{ord(special[0]):03o}", str(path))
    return os.path.ismount(path) or any(mount.split(" ")[4:5] == [escaped] for mount in mounts)


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is, or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free


def shortage(place: Path, needed: int, decimals: int = 1) -> tuple[str, str] | None:
    """Where the disk of `place` has less room than is needed: how much that is and how much there is, for people."""
    if (free := free_bytes(place)) >= needed:
        return None
    takes, has = compared(needed, free, decimals=decimals)
    return takes, has


def json_sha256(content: Any) -> str:
    """SHA-256 of data that JSON can hold, in hexadecimal; what JSON cannot hold counts as its text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
