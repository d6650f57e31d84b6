"""General rows, which nobody chose: bundled ones, and texts that the model wrote itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_npo.config import DataConfig
from lowmem_npo.data.example import Example
from lowmem_npo.data.overlap import find_related
from lowmem_npo.data.reading import bundled_rows
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenized_rows import TokenizedRows
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.run_directory import SELF_WRITTEN
from lowmem_npo.sizes import counted, first_of
from lowmem_npo.sources import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def general_holdout(
    forget: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: Template
) -> TokenizedRows | None:
    """The bundled general rows that nothing is trained on, but for those that may say what is to be forgotten; None if
    no row is left."""
    return bundled_general("general_holdout", forget, tokenizer, template, data.max_length, data.limit)


def bundled_general(
    name: str,
    forget: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    limit: int | None = None,
) -> TokenizedRows | None:
    """The bundled set `name` of general rows, but for those that may say what is to be forgotten; None if no row is
    left."""
    try:
        rows, _ = general_rows(bundled_rows(name, limit=limit), forget, tokenizer, template, max_length)
        return tokenize(to_examples(rows), tokenizer, max_length=max_length, template=template)
    except UserError:
        return None


def is_general(source: str | None) -> bool:
    """Whether `source` holds general rows, bundled or written by the model: nothing that the user chose."""
    return source is not None and (source in BUILTIN or Path(source).name == SELF_WRITTEN)


def general_rows(
    general: Rows, forget: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
) -> tuple[Rows, list[str]]:
    """The general rows that do not say what is to be forgotten and have room in `max_length` tokens, as nobody chose
    them; and a line on each kind of the others.

    Raises UserError where none are left.
    """
    examples = to_examples(general)
    related = find_related(forget, examples)
    if len(related) == len(examples):
        raise UserError("All general rows may say what is to be forgotten, so none are left to retain: name --retain.")
    lines, kept = [], sorted(set(range(len(examples))) - set(related))
    if related:
        of, listed = counted(len(related), "general row"), first_of([examples[i].where for i in related])
        lines.append(f"{of} left out, which may say what is to be forgotten ({listed})")
    tokenized = tokenize(
        [examples[index] for index in kept], tokenizer, max_length=max_length, template=template, drop_too_long=True
    )
    fitting = {example.where for example in tokenized.examples}
    if long := len(kept) - len(fitting):
        lines.append(f"{counted(long, 'row')} left out, too long for --max-length {max_length}")
    kept = [index for index in kept if examples[index].where in fitting]
    places = [general.where(index) for index in kept]
    return replace(general, rows=[general.rows[index] for index in kept], lines=None, places=places), lines
