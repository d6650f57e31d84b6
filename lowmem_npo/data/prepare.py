"""From the data settings to what a run trains on: rows read, recognised, checked for overlap and tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowmem_npo.config import DataConfig, ObjectiveConfig, may_prefer
from lowmem_npo.data.conversations import differing_prompts, earlier_answers
from lowmem_npo.data.example import PASSAGE, Example
from lowmem_npo.data.general_rows import general_holdout, general_rows, is_general
from lowmem_npo.data.overlap import refuse_overlap
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.reading import bundled_rows, described, read_rows
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.schemas import (
    canonical,
    check_some_have,
    having,
    listed_columns,
    spelled_like,
    to_examples,
    with_alternatives,
)
from lowmem_npo.data.self_answered import answers_number, with_own_answers
from lowmem_npo.data.self_answered import stand_in as stand_in_answers
from lowmem_npo.data.self_written import beginnings, self_rows, stand_in
from lowmem_npo.data.targets import forget_targets
from lowmem_npo.data.templates import BOTH, Template
from lowmem_npo.data.tokenized_rows import UNTHINKING, TokenizedRows
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.sources import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a row of a mixed source is, and what several are, by their columns.
SCHEMAS = {
    "question/answer": ("question with its answer", "questions with answers"),
    PASSAGE: ("completion", "completions"),
    "text": ("text", "texts"),
}


class Note(NamedTuple):
    """What was met in a part of the data; "" is all of it."""

    part: str
    text: str

    def __str__(self) -> str:
        return f"{self.part}: {self.text}" if self.part else self.text


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    forget: the rows to forget, with their true answers, as they are measured.
    forget_trained: the same in every form in which they are trained: `forget`, but under --template both.
    retain: the rows to keep, or None.
    forget_targets: what the forget term trains on: `forget_trained`, or the same prompts with a refusal (`targets`).
    notes: for the user: what was read, and what was truncated.
    holdout: rows like those to forget that the model was never taught, or None: what forgotten rows are compared with.
    general: general rows that nothing is trained on, by which utility is measured where the user names no rows to keep.
    alternatives: other answers to the forget rows' prompts (`with_alternatives`), where a column has them.
    level_rows: rows of the holdout that set how far the forget rows are pushed, where any do, in every form in which
        those are trained; not among `holdout`.
    forget_in_forms, holdout_in_forms: under --template both, `forget` and `holdout` with their second forms after them.
    retain_is_unwritten: whether `retain` only stands in, by rows of the greatest length, for texts that the original
        model is yet to write. alternatives_are_unwritten: the same of `alternatives`.
    """

    forget: TokenizedRows
    retain: TokenizedRows | None
    forget_targets: TokenizedRows
    notes: list[Note]
    holdout: TokenizedRows | None = None
    retain_is_unwritten: bool = False
    general: TokenizedRows | None = None
    alternatives: TokenizedRows | None = None
    level_rows: TokenizedRows | None = None
    forget_in_forms: TokenizedRows | None = None
    alternatives_are_unwritten: bool = False
    holdout_in_forms: TokenizedRows | None = None

    @property
    def report(self) -> list[str]:
        """The notes as lines."""
        return [*map(str, self.notes)]

    @property
    def forget_trained(self) -> TokenizedRows:
        return self.forget if self.forget_in_forms is None else self.forget_in_forms


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    forget_term: str = ObjectiveConfig.forget_term,
    stops: frozenset[int] = frozenset(),
    own_texts: Path | None = None,
    own_answers: Callable[[Sequence[Example]], Path] | None = None,
    positions: Callable[[], int | None] | None = None,
) -> PreparedData:
    """Reads, checks and tokenises the rows of a run. Nothing is written.

    Without `data.forget` and `data.retain` these are the bundled biographies and, unless `data.holdout` names others,
    their holdout. `forget_term` decides what `forget_targets` are. `stops` are ids at which the model stops generating,
    beside its tokenizer's own. `own_texts` is where the texts of `--retain self` are, or will be; `own_answers` says so
    of the answers of `--alternatives self` to some rows, if `forget_term` may look at any. `positions` says for how
    many tokens the model has any, for advice. Of general rows, bundled or self-written, those that say what is to be
    forgotten are left out.

    Raises UserError for everything the user can fix.
    """
    if data.forget is None and data.retain is not None:
        raise UserError(f"There are rows to retain ({data.retain}) but none to forget; name them with --forget.")
    reader = _Reader(tokenizer, data, Template.of(data, stops), Passages.of(data, tokenizer), positions)
    bundled = data.forget is None
    if bundled:
        reader.note("", "No --forget and no --retain: using the bundled biographies of invented people.")
    to_forget = reader.examples("forget", data.forget)
    to_retain, unwritten = reader.to_retain(to_forget, own_texts)
    to_hold_out = reader.examples("holdout", data.holdout) if bundled or data.holdout is not None else None
    if not bundled:
        check_some_have(reader.columns, data.prompt_column, data.answer_column)
    if not data.allow_overlap:
        _refuse_overlaps(to_forget, to_retain, to_hold_out)
    number = answers_number(data.alternatives)
    if not may_prefer(forget_term):
        number = None
    answered = None if number is None or own_answers is None else own_answers(to_forget)
    unanswered = number is not None and (answered is None or not answered.exists())
    if answered is not None and not unanswered:
        to_forget = with_own_answers(answered, to_forget)

    forget_rows, in_forms = reader.tokenized("forget", to_forget), None
    if reader.template.text == BOTH:
        if len(both := reader.in_both_forms(to_forget)) == len(to_forget):
            raise UserError("--template both: the chat template writes none of the rows to forget; leave it out.")
        in_forms, to_forget = reader.tokenized("forget, in both forms", both), both
        to_retain = to_retain and reader.in_both_forms(to_retain)
    trained = in_forms or forget_rows
    targets = forget_targets(forget_term, trained, data.refusal, partial(reader.tokenized, "forget, refusing"))
    alternatives = None
    if number is not None and unanswered:
        alternatives = stand_in_answers(trained, number, data.max_length)
        reader.note("forget, alternatives", f"{data.alternatives}, which the original model will write")
    elif number is not None or data.alternative_column is not None:
        alternatives = reader.tokenized("forget, alternatives", with_alternatives(to_forget))
    nobodys = is_general(data.retain) or self_rows(data.retain) is not None  # of whose rows one form may have no room
    retain_rows = unwritten if to_retain is None else reader.tokenized("retain", to_retain, drop_too_long=nobodys)
    if forget_rows.unthinking:
        reader.note("", UNTHINKING)
    if retain_rows is not None:
        reader.note(
            "forget", *differing_prompts(forget_rows.examples, retain_rows.examples, reader.template, tokenizer)
        )
    holdout_rows = None if to_hold_out is None else reader.tokenized("holdout", to_hold_out)
    holdout_in_forms = None
    if to_hold_out is not None and reader.template.text == BOTH:
        holdout_in_forms = reader.encoded(reader.in_both_forms(to_hold_out))
    held_out = None
    if nobodys or (data.retain is None and not bundled):
        held_out = general_holdout(to_forget, tokenizer, data, reader.template)
    return PreparedData(
        forget=forget_rows,
        retain=retain_rows,
        forget_targets=targets,
        notes=reader.notes,
        holdout=holdout_rows,
        retain_is_unwritten=unwritten is not None,
        general=held_out,
        alternatives=alternatives,
        forget_in_forms=in_forms,
        alternatives_are_unwritten=unanswered,
        holdout_in_forms=holdout_in_forms,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads and tokenises the parts of a run ("forget", "retain", "holdout"), and reports what it met, among it the
    columns of tables."""

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    template: Template
    passages: Passages
    positions: Callable[[], int | None] | None = None
    notes: list[Note] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)

    def note(self, part: str, *texts: str) -> None:
        self.notes.extend(Note(part, text) for text in texts)

    def examples(self, part: str, source: str | None, to_forget: Sequence[Example] = ()) -> list[Example]:
        """source: None for the bundled biographies. to_forget: what general rows must not say."""
        data = self.data
        if source is None:
            rows, columns = bundled_rows(part, limit=data.limit), dict[str, Any]()
        else:
            columns = {"prompt_column": data.prompt_column, "answer_column": data.answer_column}
            rows = read_rows(source, limit=data.limit, passages=self.passages, columns=columns.values())
            columns["or_recognised"] = True
            self.columns.update(dict.fromkeys(() if rows.mixed else rows.columns))
            if part == "retain" and is_general(source):
                rows, lines = general_rows(rows, to_forget, self.tokenizer, self.template, data.max_length)
                self.note(part, *lines)
        own: Collection[str] = ()  # columns that rows have beside those of prompt and answer
        if part == "forget":
            own = ("alternative_column", "group_column", "paraphrase_column")
        elif part == "holdout":  # so that leak tests can compare with it
            own = having({name: getattr(data, name) for name in ("group_column", "paraphrase_column")}, rows)
        columns |= {name: getattr(data, name) for name in own}
        result = to_examples(rows, **columns)
        forms = dict.fromkeys(self.template.describe(example, self.tokenizer) for example in kinds(result))
        read = {spelled for name in own if (column := columns[name]) for spelled in spelled_like(column, rows)}
        self.note(part, f"{rows.name}, {origin(rows, result, ', or '.join(forms), read)}")
        self.note(part, *rows.notes)
        if part == "forget" and data.group_column and (alone := sum(one.group is None for one in result)):
            have, grouped = ("have", "are grouped by their") if alone > 1 else ("has", "is grouped by its")
            self.note(part, f"{alone} of {len(result)} rows {have} no {data.group_column}, and {grouped} text alone")
        if part == "forget" and data.tokens == "answer":
            self.note(part, *earlier_answers(result))
        return result

    def to_retain(
        self, to_forget: Sequence[Example], own_texts: Path | None
    ) -> tuple[list[Example] | None, TokenizedRows | None]:
        """The rows to keep, or what stands in for those that the model is yet to write; two None if there are none."""
        data, result, unwritten = self.data, None, None
        if (own := self_rows(data.retain)) is not None:
            if own_texts is not None and own_texts.exists():
                result = self.examples("retain", str(own_texts), to_forget)
                self.note("retain", f"{len(result)} texts that the original model wrote ({data.retain})")
            else:
                begun = beginnings(min(own, data.limit or own), self.tokenizer, self.template)
                unwritten = stand_in(begun, self.tokenizer, self.template, data.max_length)
                self.note("retain", f"{data.retain}, {own} texts that the original model will write once it is loaded")
        elif data.forget is None or data.retain is not None:
            result = self.examples("retain", data.retain, to_forget)
        if data.retain is not None and (own is not None or data.retain in BUILTIN):
            near = "to hold what is near the forget rows, name rows like them"
            self.note("retain", f"{described(data.retain)}; {near}")
        return result, unwritten

    def in_both_forms(self, examples: Sequence[Example]) -> list[Example]:
        return self.template.in_both_forms(examples, self.tokenizer)

    def encoded(self, examples: Sequence[Example], drop_too_long: bool = False) -> TokenizedRows:
        return tokenize(
            examples,
            self.tokenizer,
            max_length=self.data.max_length,
            template=self.template,
            tokens=self.data.tokens,
            drop_too_long=drop_too_long,
            positions=self.positions,
        )

    def tokenized(self, part: str, examples: Sequence[Example], drop_too_long: bool = False) -> TokenizedRows:
        """The same, and reports what was cut."""
        result = self.encoded(examples, drop_too_long)
        self.note(part, result.counts, *result.notes)
        return result


def _refuse_overlaps(
    forget: Sequence[Example], retain: Sequence[Example] | None, holdout: Sequence[Example] | None
) -> None:
    """Raises UserError where one set has rows of another."""
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    for (of, one), (part, other) in combinations(sets.items(), 2):
        if one is not None and other is not None:
            refuse_overlap(one, other, of=of, part=part)


def kinds(examples: list[Example]) -> list[Example]:
    """One example of each schema."""
    return list({example.schema: example for example in reversed(examples)}.values())[::-1]


def origin(rows: Rows, examples: Sequence[Example], form: str, also: Collection[str] = ()) -> str:
    """What was recognised in the rows, and the form in which they are written ("" if not known). also: columns that
    are read beside those of the schema."""
    if rows.mixed:
        counts = Counter(example.schema for example in examples)
        kinds = [f"{number} {SCHEMAS.get(name, (name, name))[number > 1]}" for name, number in counts.items()]
        return "; ".join(filter(None, [" and ".join(kinds), form]))
    schemas, unread, files = list[str](), list[str](), rows.by_file()
    for file, end in zip(files, accumulate(map(len, files)), strict=True):
        own = examples[end - len(file) : end]
        schemas.append(own[0].schema)
        read = set(also).union(*(example.columns for example in own))
        unread += [column for column in canonical(file).columns if column not in read]
    line = ", ".join(filter(None, [f"columns {' and '.join(dict.fromkeys(schemas))}", form]))
    if listed := listed_columns(list(dict.fromkeys(unread))):
        line += f"; not read: {listed}"
    return line
