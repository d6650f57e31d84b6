"""What an evaluation benchmark is: one object in one file of this folder, and one line in registry.py.

`lowmem-npo evaluate` hands every set of rows to the first benchmark that recognises it. Help
texts, tables, result files and reports are made from these objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from lowmem_npo.data import tokenize
from lowmem_npo.data.tokenized_rows import UNTHINKING
from lowmem_npo.evaluation import figures
from lowmem_npo.evaluation.answers import choose_rows
from lowmem_npo.evaluation.figures import Figure
from lowmem_npo.evaluation.options import Options, check_declared
from lowmem_npo.run_directory import EvaluationFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data import Example, Rows, Template, TokenizedRows
    from lowmem_npo.data.fit import Fit
    from lowmem_npo.evaluation.scoring.scorer import Scorer


class Settings(Protocol):
    """What every benchmark may ask of the configuration, which holds its own options as well."""

    limit: int | None
    seed: int
    batch_size: int
    max_new_tokens: int | None
    forms: str

    @property
    def lets_write(self) -> bool: ...

    @property
    def columns(self) -> dict[str, Any]: ...

    @property
    def tokens_per_row(self) -> int: ...

    def columns_of(self, name: str, rows: Rows) -> dict[str, Any]: ...


@dataclass
class Context:
    """What a benchmark has at hand. before: an earlier evaluation.json, or nothing. notes: remarks to print beside the
    figures. fit: what the model can take, where it is known. incomparable: sets that the earlier evaluation measured
    on other rows or otherwise, so that `before` has no figures of them. retained_log: evaluation.json of a model that
    was never taught these forget rows. longest: tokens of the longest row that was checked. groups: set of documents ->
    that of each row (`pieces_of_evidence`)."""

    config: Settings
    tokenizer: PreTrainedTokenizerBase
    template: Template
    before: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fit: Fit | None = None
    incomparable: Sequence[str] = ()
    retained_log: str | None = None
    longest: int = 0
    groups: dict[str, list[int]] = field(default_factory=dict)

    def check(self, where: str, ids: Sequence[int], whole: bool = False) -> None:
        """Raises UserError for a row, from the place `where`, that the model cannot take. whole: the row is measured as
        long as it is, whatever --max-length says."""
        self.longest = max(self.longest, len(ids))
        if self.fit is not None:
            self.fit.check(where, ids, self.tokenizer, "shorten the row, or remove it" if whole else None)

    def tokenized(self, name: str, examples: Sequence[Example]) -> TokenizedRows:
        """The rows of `examples`, with notes, under this name, of what was cut, and of what they do not ask for.

        Raises UserError for one that the model cannot take."""
        rows = tokenize(
            examples,
            self.tokenizer,
            max_length=self.config.tokens_per_row,
            template=self.template,
            positions=lambda: self.fit.positions if self.fit else None,
        )
        for example, row in zip(rows.examples, rows, strict=True):
            self.check(example.where, row["input_ids"])
        notes = [*(f"{name}: {note}." for note in rows.notes), *([UNTHINKING] if rows.unthinking else [])]
        self.notes += [note for note in notes if note not in self.notes]  # of rows that leak tests ask for as well
        return rows

    def choose(self, total: int) -> list[int]:
        """Which of `total` rows are measured, under --limit and --seed."""
        return choose_rows(total, self.config.limit, self.config.seed)


@dataclass(frozen=True)
class Selection:
    """The rows of a set that are measured, as the benchmark has them; how many the set has; their places in it."""

    rows: Sequence[Any]
    rows_in_set: int
    places: Sequence[int] = ()


MeasuredT = TypeVar("MeasuredT")
ScoresT = TypeVar("ScoresT")
Measured = Mapping[str, Mapping[str, list[Any]]]
"""Name of the benchmark -> set -> what was measured of its rows."""


class Benchmark(ABC, Generic[MeasuredT, ScoresT]):
    """One benchmark. Adding one: its file with one instance, its line in registry.py, its test."""

    name: ClassVar[str]
    """Its key in evaluation.json."""
    group: ClassVar[str]
    """Its figures' group in report.json."""
    title: ClassVar[str]
    summary: ClassVar[str]
    """Which rows are its own and what they get, for help texts."""
    note: ClassVar[str] = ""
    """A sentence below the title in the report."""
    sets: ClassVar[tuple[str, ...]] = ()
    """Sets of rows that it may recognise."""
    takes_in: ClassVar[tuple[str, ...]] = ()
    """Sets of other benchmarks of which its scores are made, too."""
    options: ClassVar[type[Options]] = Options
    uses_template: ClassVar[bool] = False
    """Whether its rows are written as the prompt template says, not in a form of the benchmark's own."""
    reads_likelihoods: ClassVar[bool] = False
    """Whether it reads answers off the likelihoods where the model is not to write."""
    empty: ClassVar[Any] = None
    """What evaluation.json holds where nothing was measured."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_declared(Benchmark, cls)

    def check(self, options: Any) -> None:
        """Raises UserError for what can be known to be wrong before weights are loaded."""

    def select(self, name: str, rows: Rows, context: Context) -> Selection | None:
        """The rows of the set `name` that are measured; None: they are not this benchmark's."""
        return None

    def read_beside(self, name: str, options: Any) -> str:
        """What is read from other files than that of the set `name` and decides how its rows are asked."""
        return ""

    def own_sets(self, options: Any) -> dict[str, Selection]:
        """What is measured although no rows were named."""
        return {}

    def written(self, name: str, selection: Selection, context: Context) -> list[tuple[int, int]]:
        """Tokens of each prompt that the model is to go on from, and of what it writes at most; `measure` lets it."""
        return []

    @abstractmethod
    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[MeasuredT]:
        """Asks the model, row by row."""

    @abstractmethod
    def score(self, measured: Measured, context: Context) -> ScoresT | None:
        """The scores of everything that was measured, by other benchmarks too; None: nothing of this one was."""

    def own(self, measured: Measured) -> Mapping[str, list[MeasuredT]]:
        """What was measured for this benchmark, by set."""
        return cast(Mapping[str, list[MeasuredT]], measured.get(self.name, {}))

    @abstractmethod
    def to_json(self, scores: ScoresT) -> Any:
        """As evaluation.json holds the scores; no text of any row."""

    def said(
        self, selection: Selection, measured: Sequence[MeasuredT], context: Context
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """The prompt and the greedy answer, both as ids, of each row that was asked as it was trained; for
        `fluency`."""
        return []

    def rows_to_json(self, name: str, measured: Sequence[MeasuredT]) -> list[dict[str, Any]]:
        """For rows.jsonl: each row's prompt, the model's answer, its score."""
        return []

    @abstractmethod
    def figures(self, content: Any) -> list[Figure]:
        """Every figure of what `to_json` gave, in reading order. Raises ValueError for one that it does not know: who
        reads a file names it."""

    def refuse_unknown(self, names: Iterable[str], known: Iterable[str]) -> None:
        """Raises ValueError for a figure that the benchmark does not declare: a file of another version holds it."""
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"'{unknown[0]}' is no figure of {self.title} in this version of lowmem-npo")

    def text(self, content: Any, before: Any) -> str:
        """The figures for a terminal. before: the same of an earlier evaluation; None where there is none."""
        return figures.table(self.figures(content), None if before is None else self.figures(before) if before else [])

    def save(self, scores: ScoresT, files: EvaluationFiles) -> None:
        """Writes files of its own, if it has any."""
