"""From the data settings to what a run trains on: rows read, recognised, checked for overlap and tokenised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import DataConfig, ForgetTerm, ObjectiveConfig
from lowmem_npo.data.overlap import refuse_overlap
from lowmem_npo.data.reading import Rows, read_rows
from lowmem_npo.data.schemas import Example, to_examples, with_answer
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenizing import TokenizedRows, tokenize
from lowmem_npo.errors import UserError


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    forget: the rows to forget, with their true answers.
    retain: the rows to keep, or None.
    forget_targets: what the forget term trains on: `forget`, or the same prompts answered by a refusal.
    report: lines for the user: what was read, and what was truncated.
    holdout: rows like those to forget that the model was never taught, or None: what forgotten rows are compared with.
    """

    forget: TokenizedRows
    retain: TokenizedRows | None
    forget_targets: TokenizedRows
    report: list[str]
    holdout: TokenizedRows | None = None


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    forget_term: ForgetTerm = ObjectiveConfig.forget_term,
    stops: frozenset[int] = frozenset(),
) -> PreparedData:
    """Reads, checks and tokenises the rows of a run. Nothing is written.

    Without `data.forget` and `data.retain` these are the bundled biographies and, unless `data.holdout` names others,
    their holdout. `forget_term` decides what `forget_targets` are: for `idk`, refusals. `stops` are ids at which the
    model stops generating, beside its tokenizer's own.

    Raises UserError for everything the user can fix.
    """
    if data.limit is not None and data.limit < 1:
        raise UserError(f"--limit is {data.limit}; it must be at least 1.")
    if data.max_length < 2:
        raise UserError(f"--max-length is {data.max_length}; it must be at least 2.")
    if data.forget is None and data.retain is not None:
        raise UserError(f"There are rows to retain ({data.retain}) but none to forget; name them with --forget.")
    template = Template.of(data, stops)
    report: list[str] = []

    def examples(part: str, source: str | None) -> list[Example]:
        if source is None:
            rows, columns = bundled_rows(part, limit=data.limit), {}
        else:
            rows = read_rows(source, limit=data.limit)
            columns = {"prompt_column": data.prompt_column, "answer_column": data.answer_column}
        result = to_examples(rows, **columns)
        report.append(_origin(part, rows, result, template.describe(result[0], tokenizer)))
        return result

    def tokenized(part: str, rows: list[Example]) -> TokenizedRows:
        result = tokenize(rows, tokenizer, max_length=data.max_length, template=template, tokens=data.tokens)
        report.extend(result.report(part))
        return result

    bundled = data.forget is None
    if bundled:
        report.append("No --forget and no --retain: using the bundled biographies of invented people.")
    to_forget = examples("forget", data.forget)
    to_retain = examples("retain", data.retain) if bundled or data.retain is not None else None
    if to_retain is not None and not data.allow_overlap:
        refuse_overlap(to_forget, to_retain)
    to_hold_out = examples("holdout", data.holdout) if bundled or data.holdout is not None else None
    if to_hold_out is not None and not data.allow_overlap:
        refuse_overlap(to_forget, to_hold_out, part="holdout")
        if to_retain is not None:
            refuse_overlap(to_retain, to_hold_out, part="holdout", of="retain")
    forget_rows = targets = tokenized("forget", to_forget)
    if forget_term == "idk":
        targets = tokenized("forget, refusing", with_answer(to_forget, data.refusal))
    retain_rows = None if to_retain is None else tokenized("retain", to_retain)
    holdout_rows = None if to_hold_out is None else tokenized("holdout", to_hold_out)
    return PreparedData(forget_rows, retain_rows, targets, report, holdout_rows)


def bundled_rows(part: str, *, limit: int | None = None) -> Rows:
    """The bundled biographies: part "forget", "retain", or "holdout", people whom nothing is trained on."""
    file = resources.files("lowmem_npo.data.bundled") / f"{part}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Rows(f"bundled {part}.jsonl", rows[:limit], list(range(1, len(rows) + 1))[:limit])


def _origin(part: str, rows: Rows, examples: list[Example], form: str) -> str:
    line = f"{part}: {rows.name}, columns {examples[0].schema}, {form}"
    read = set[str]().union(*(example.columns for example in examples))
    if unread := [column for column in rows.columns if column not in read]:
        line += f"; not read: {', '.join(unread)}"
    return line
