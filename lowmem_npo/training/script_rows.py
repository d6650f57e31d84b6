"""The rows that a script gives to the trainer: tokenised, or raw as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lowmem_kernels import IGNORE_INDEX
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.console import Say, silent
from lowmem_npo.data import Example, Rows, Template, TokenizedRow, TokenizedRows, to_examples, tokenize
from lowmem_npo.data.fit import Fit
from lowmem_npo.data.other_columns import words
from lowmem_npo.data.overlap import refuse_overlap
from lowmem_npo.data.targets import forget_targets
from lowmem_npo.data.tokenized_rows import num_predicted
from lowmem_npo.errors import UserError
from lowmem_npo.model.stop_tokens import end_ids
from lowmem_npo.training.script_words import in_script_words, script_words
from lowmem_npo.training.training_rows import TrainingRows, training_rows

if TYPE_CHECKING:
    from lowmem_npo.training.npo_config import NPOConfig

FORGET, RETAIN, OTHERS, TRUE = (f"{part}_dataset" for part in ("forget", "retain", "alternative", "true"))


def rows_of_script(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: NPOConfig,
    forget: Any,
    retain: Any,
    alternatives: Any,
    true: Any,
    say: Say,
) -> TrainingRows:
    """The rows of `NPOTrainer`'s arguments. Of raw ones, what the command line reports of its rows is said.

    Raises:
        UserError: as `training_rows`; and for raw rows as the command line does.
    """
    say = say if args.process_index == 0 else silent
    parts = _Parts(model, tokenizer, args.max_length, args.allow_overlap, lambda line: say(script_words(line, args)))
    with in_script_words(args):
        rows = training_rows(
            forget,
            retain,
            alternatives,
            true,
            parts.tokenized,
            term=args.forget_term,
            layered=args.layered,
            adversary=args.adversary is not None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            teaching={"term": args.forget_term, "refusal": args.refusal, "group_column": args.group_column},
        )
        parts.check_others()
    if (remark := parts.fit.remark(parts.longest)) is not None:
        parts.say(remark)
    return rows


@dataclass
class _Parts:
    """The parts that a script gives, read one after the other.

    max_length: tokens per raw row. allow_overlap: whether a raw row to keep may be one to forget.
    examples: what the rows of each part say, with their true answers, where that is known. raw: the parts that came so.
    longest: tokens of the longest row, but for what `lowmem_npo.data.tokenize` made: whoever has that has been told.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    allow_overlap: bool
    say: Say
    examples: dict[str, list[Example]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    longest: int = 0

    def __post_init__(self) -> None:
        self.fit = Fit.of(self.model)

    def tokenized(
        self, rows: Any, name: str, *, term: str = "", refusal: str = "", group_column: str | None = None
    ) -> Sequence[TokenizedRow]:
        """`rows` as they are if they are tokenised; raw ones, of any schema that files may have, are tokenised.

        Args:
            rows: a `datasets.Dataset`, or another sequence of dictionaries.
            name: the argument that they came as, for messages.
            term, refusal: of rows to forget, the forget term that trains on them, and the refusal that it may teach.
            group_column: of raw rows, the column that says what each is about.

        Raises:
            UserError: no rows, rows that cannot be read, have no label that is predicted or are longer than the model
                has positions, ids that the model does not have, or raw rows both to forget and to keep.
        """
        first = _first(rows, name)
        if {"input_ids", "labels"} <= set(first):
            longest = _check(rows, name, self.fit, self.model, self.tokenizer)
            if isinstance(rows, TokenizedRows):
                self._compare(name, rows.examples)
            else:
                self.longest = max(self.longest, longest)
            return rows
        if "input_ids" in first:
            raise UserError(f"{name} has input_ids without labels, so nothing says what is the answer: give raw rows.")
        examples = to_examples(Rows(name, [dict(rows[i]) for i in range(len(rows))]), group_column=group_column)
        is_known = name == TRUE and rows is self.raw.get(FORGET)
        self.raw[name] = rows
        self._compare(name, examples)
        tokenized = partial(self._of_raw, say=silent if is_known else self.say)
        result = forget_targets(term, tokenized(name, examples), refusal, partial(tokenized, f"{name}, refusing"))
        for row, example in zip(result, result.examples, strict=True):
            self.fit.check(example.where, row["input_ids"], self.tokenizer)
        self.longest = max(self.longest, result.longest)
        return result

    def _of_raw(self, part: str, examples: Sequence[Example], say: Say) -> TokenizedRows:
        """Tokenised, with a line on what that did to them."""
        most = min(filter(None, (self.fit.positions, self.fit.made_for)), default=None)
        stops = frozenset(end_ids(getattr(self.model.generation_config, "eos_token_id", None)))
        result = tokenize(
            examples, self.tokenizer, max_length=self.max_length, template=Template(stops=stops), positions=lambda: most
        )
        for line in result.report(part):
            say(line)
        return result

    def _compare(self, name: str, examples: Sequence[Example]) -> None:
        """Raises UserError for raw rows that are both to forget and to keep."""
        self.examples[name] = [*examples]
        for part in (FORGET, TRUE) if name == RETAIN else (name,) if name in (FORGET, TRUE) else ():
            both = {part, RETAIN}
            if not self.allow_overlap and both <= self.examples.keys() and both & self.raw.keys():
                refuse_overlap(self.examples[part], self.examples[RETAIN])

    def check_others(self) -> None:
        """Raises UserError for another answer that is the forgotten one: preferred to itself, it teaches nothing."""
        if not {FORGET, OTHERS} <= self.examples.keys() or not {FORGET, OTHERS} & self.raw.keys():
            return
        forget, others = self.examples[FORGET], self.examples[OTHERS]
        for place, other in enumerate(others):
            if words(other.answer) == words(forget[place % len(forget)].answer):
                raise UserError(f"{other.where} holds the answer itself; write another one into it.")


def _first(rows: Any, name: str) -> Mapping[str, Any]:
    """The first row. Raises UserError for what is no rows."""
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
    return first


def _check(
    rows: Sequence[TokenizedRow], name: str, fit: Fit, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The tokens of the longest row. Raises UserError for a row that teaches nothing, and for ids that the model's
    tables do not have: on a GPU they would end the process, or be read from beside them, for in a step nobody looks."""
    answers, longest = len(model.get_output_embeddings().weight), 0
    for at in range(len(rows)):
        row, where = rows[at], f"{name}, row {at + 1},"
        ids, labels = ([int(i) for i in row[part]] for part in ("input_ids", "labels"))
        if not ids or len(ids) != len(labels):
            raise UserError(
                f"{where} has {len(ids)} input_ids and {len(labels)} labels: give a label for each, or -100."
            )
        fit.check(where, ids, tokenizer)
        longest = max(longest, len(ids))
        counted = [label for label in labels if label != IGNORE_INDEX]
        wrong = [i for i in ids if i < 0] + [label for label in counted if not 0 <= label < answers]
        if wrong:
            raise UserError(
                f"{where} has the id {wrong[0]}, but the model's are 0 to {answers - 1}, and -100 of a label."
            )
        if not num_predicted({**row, "labels": labels}):
            raise UserError(f"{where} has no label behind its first token, so none of it is an answer: leave it out.")
    return longest


def _described(rows: Any) -> str:
    empty = hasattr(rows, "__len__") and len(rows) == 0
    return "empty" if empty else f"of type {type(rows).__name__}"
