"""Rows as a user has them, in files, and as a tokenizer leaves them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lowmem_kernels import IGNORE_INDEX

from lowmem_npo.data.tokenized_rows import TokenizedRow

DEEP = '{"a":' + "[" * 100_000  # what no reader of JSON takes


def write(path: Path, content: str | bytes) -> str:
    """Writes a file, and returns the path as a command line takes it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_rows(path: Path, rows: Iterable[dict]) -> str:
    """Writes `rows` as JSON lines, and returns the path as a command line takes it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(length: int, prompt: int = 1) -> TokenizedRow:
    """Tokens that count up from 10, of which the first `prompt` are not predicted."""
    ids = list(range(10, 10 + length))
    return TokenizedRow(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:], prompt_length=prompt)
