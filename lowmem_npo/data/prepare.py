"""From what the user named to what a run trains on: read, recognised, checked for overlap, tokenised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import RunConfig
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
    report: lines on what was read and what truncation took, for people.
    holdout: rows like those to forget that the model was never taught, or None: what a forgotten row is held against.
    """

    forget: TokenizedRows
    retain: TokenizedRows | None
    forget_targets: TokenizedRows
    report: list[str]
    holdout: TokenizedRows | None = None


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    prompt_template: str | None = None,
    max_length: int = 1024,
    tokens: str = "answer",
    refusal: str | None = None,
    allow_overlap: bool = False,
    limit: int | None = None,
) -> PreparedData:
    """Read, check and tokenise the rows of a run. Nothing is written.

    forget, retain: files or hub names (`read_rows`); neither means the bundled biographies, no retain means none.
    holdout: the same; without it, bundled data has the bundled holdout, other data none.
    prompt_column, answer_column: columns, where they are not recognised (`to_examples`); not for bundled data.
    prompt_template: the text around a prompt (`Template`); None takes the default of each schema.
    max_length, tokens: as for `tokenize`.
    refusal: the answer that `forget_targets` carries in place of the true ones, for the forget term `idk`.
    allow_overlap: go on although rows stand in both parts.
    limit: use only the first so many rows of each part.

    Raises UserError for everything the user can mend.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1.")
    if max_length < 2:
        raise UserError(f"--max-length is {max_length}; it must be at least 2.")
    if forget is None and retain is not None:
        raise UserError(f"There are rows to retain ({retain}) but none to forget; name them with --forget.")
    template = Template(prompt_template)
    report: list[str] = []

    def examples(part: str, source: str | None) -> list[Example]:
        if source is None:
            rows, columns = bundled_rows(part, limit=limit), {}
        else:
            rows = read_rows(source, limit=limit)
            columns = {"prompt_column": prompt_column, "answer_column": answer_column}
        result = to_examples(rows, **columns)
        report.append(_origin(part, rows, result[0], template))
        return result

    def tokenized(part: str, rows: list[Example]) -> TokenizedRows:
        result = tokenize(rows, tokenizer, max_length=max_length, template=template, tokens=tokens)
        report.extend(result.report(part))
        return result

    if forget is None:
        report.append("No --forget and no --retain: using the bundled biographies of invented people.")
    to_forget = examples("forget", forget)
    to_retain = examples("retain", retain) if forget is None or retain is not None else None
    if to_retain is not None and not allow_overlap:
        refuse_overlap(to_forget, to_retain)
    to_hold_out = examples("holdout", holdout) if forget is None or holdout is not None else None
    if to_hold_out is not None and not allow_overlap:
        refuse_overlap(to_forget, to_hold_out, part="holdout")
        if to_retain is not None:
            refuse_overlap(to_retain, to_hold_out, part="holdout", of="retain")
    forget_rows = tokenized("forget", to_forget)
    targets = forget_rows if refusal is None else tokenized("forget, refusing", with_answer(to_forget, refusal))
    retain_rows = None if to_retain is None else tokenized("retain", to_retain)
    holdout_rows = None if to_hold_out is None else tokenized("holdout", to_hold_out)
    return PreparedData(forget_rows, retain_rows, targets, report, holdout_rows)


def prepare_run(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Reads, checks and tokenises what the run forgets and keeps."""
    data = config.data
    return prepare(
        tokenizer,
        forget=data.forget,
        retain=data.retain,
        holdout=data.holdout,
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        prompt_template=data.prompt_template,
        max_length=data.max_length,
        tokens=data.tokens,
        refusal=data.refusal if config.objective.forget_term == "idk" else None,
        allow_overlap=data.allow_overlap,
        limit=data.limit,
    )


def bundled_rows(part: str, *, limit: int | None = None) -> Rows:
    """The bundled biographies: part "forget", "retain", or "holdout", people that nothing is ever trained on."""
    file = resources.files("lowmem_npo.data.bundled") / f"{part}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Rows(f"bundled {part}.jsonl", rows[:limit], list(range(1, len(rows) + 1))[:limit])


def _origin(part: str, rows: Rows, first: Example, template: Template) -> str:
    line = f"{part}: {rows.name}, columns {first.schema}"
    if first.messages is None and first.prompt is not None:
        line += f", written as {template.for_schema(first.schema)!r}"
    return line
