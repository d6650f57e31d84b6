"""The rows that a script gives to the trainer: tokenised, or raw as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lowmem_kernels import IGNORE_INDEX
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import Rows, Template, TokenizedRow, to_examples, tokenize
from lowmem_npo.data.fit import Fit
from lowmem_npo.data.targets import forget_targets
from lowmem_npo.data.tokenized_rows import num_predicted
from lowmem_npo.errors import UserError
from lowmem_npo.model.stop_tokens import end_ids


def script_rows(
    rows: Any,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    term: str = "",
    refusal: str = "",
    group_column: str | None = None,
) -> Sequence[TokenizedRow]:
    """`rows` as they are if they are tokenised; raw ones, of any schema that files may have, are tokenised.

    Args:
        rows: a `datasets.Dataset`, or another sequence of dictionaries.
        name: the argument that they came as, for messages.
        max_length: tokens per raw row.
        term, refusal: of rows to forget, the forget term that trains on them, and the refusal that it may teach.
        group_column: of raw rows, the column that says what each is about.

    Raises:
        UserError: no rows, rows that cannot be read, have no label that is predicted or are longer than the model has
            positions, or ids that the model does not have.
    """
    is_rows = not isinstance(rows, str | bytes | Mapping) and hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    try:
        first = rows[0] if is_rows and len(rows) else None
    except (KeyError, TypeError):  # a table that is not indexed by rows, such as a DataFrame
        first = None
    if not isinstance(first, Mapping):
        raise UserError(
            f"{name} is {_described(rows)}: give a datasets.Dataset, a list of dictionaries, or what "
            "lowmem_npo.data.tokenize returns."
        )
    if {"input_ids", "labels"} <= set(first):
        _check(rows, name, model, tokenizer)
        return rows
    if "input_ids" in first:
        raise UserError(f"{name} has input_ids without labels, so nothing says what is the answer: give raw rows.")
    examples = to_examples(Rows(name, [dict(rows[i]) for i in range(len(rows))]), group_column=group_column)
    stops = frozenset(end_ids(getattr(model.generation_config, "eos_token_id", None)))
    tokenized = partial(tokenize, tokenizer=tokenizer, max_length=max_length, template=Template(stops=stops))
    result, fit = forget_targets(term, tokenized(examples), refusal, tokenized), Fit.of(model)
    for row, example in zip(result, result.examples, strict=True):
        fit.check(example.where, row["input_ids"], tokenizer)
    return result


def _check(rows: Sequence[TokenizedRow], name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a row that teaches nothing, and for ids that the model's tables do not have: on a GPU they
    would end the process, or be read from beside them, for in a step nobody looks."""
    fit, answers = Fit.of(model), len(model.get_output_embeddings().weight)
    for at in range(len(rows)):
        row, where = rows[at], f"{name}, row {at + 1},"
        ids, labels = ([int(i) for i in row[part]] for part in ("input_ids", "labels"))
        if not ids or len(ids) != len(labels):
            raise UserError(
                f"{where} has {len(ids)} input_ids and {len(labels)} labels: give a label for each, or -100."
            )
        fit.check(where, ids, tokenizer)
        counted = [label for label in labels if label != IGNORE_INDEX]
        wrong = [i for i in ids if i < 0] + [label for label in counted if not 0 <= label < answers]
        if wrong:
            raise UserError(
                f"{where} has the id {wrong[0]}, but the model's are 0 to {answers - 1}, and -100 of a label."
            )
        if not num_predicted({**row, "labels": labels}):
            raise UserError(f"{where} has no label behind its first token, so none of it is an answer: leave it out.")


def _described(rows: Any) -> str:
    empty = hasattr(rows, "__len__") and len(rows) == 0
    return "empty" if empty else f"of type {type(rows).__name__}"
