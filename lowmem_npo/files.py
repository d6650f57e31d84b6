"""Files that are complete or absent, and hashes that identify them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

CHUNK = 2**20  # bytes read at a time


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole file or none of it, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is, or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
