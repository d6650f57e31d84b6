"""From files, hub names or the bundled set to micro-batches of forget and retain rows.

documents, tables -> reading -> schemas -> templates -> tokenizing -> batching; `prepare` runs all but the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_npo.data.example import Example
from lowmem_npo.data.prepare import PreparedData, prepare
from lowmem_npo.data.preview import preview
from lowmem_npo.data.reading import bundled_rows, read_rows
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.schemas import to_examples, with_answer
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenized_rows import TokenizedRow, TokenizedRows
from lowmem_npo.data.tokenizing import Encoder, tokenize

if TYPE_CHECKING:
    from lowmem_npo.data.batching import ForgetRetain, Pick, RowBatch, collator

__all__ = [
    "Encoder",
    "Example",
    "ForgetRetain",
    "Pick",
    "PreparedData",
    "RowBatch",
    "Rows",
    "Template",
    "TokenizedRow",
    "TokenizedRows",
    "bundled_rows",
    "collator",
    "prepare",
    "preview",
    "read_rows",
    "to_examples",
    "tokenize",
    "with_answer",
]


def __getattr__(name: str) -> Any:
    """Batches are tensors: PyTorch is imported when they are made, not when a command prints its help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowmem_npo.data import batching

    return getattr(batching, name)
