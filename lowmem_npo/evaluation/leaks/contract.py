"""What a leak test is: one object in one file of this folder, and one line in registry.py.

A leak test looks for what a model may still give away of rows that it was made to forget, without a retrained model to
compare with: it compares with a holdout, rows like the forgotten ones that the model was never taught. Where there is
none it compares with the model before it forgot, which says less: how much is left, not whether that is more than a
model would give that never saw the rows. Help texts, tables and reports are made from these objects.

Nothing here loads PyTorch, so that `lowmem-npo train --help` can list the tests: a test imports what is heavy in `run`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, cast
from zlib import crc32

from lowmem_npo.config import ModelConfig, StreamOptions
from lowmem_npo.evaluation.answers import NotGenerated
from lowmem_npo.evaluation.figures import at, shares
from lowmem_npo.evaluation.leaks.attack import CUT, EVIDENCE, GROUPS, HOLDOUT, WHOLE_ROWS, Attack, of_groups
from lowmem_npo.evaluation.options import Options, check_declared
from lowmem_npo.ranges import shown
from lowmem_npo.records import check_record, check_value

if TYPE_CHECKING:
    from peft import PeftModel

    from lowmem_npo.data import TokenizedRow
    from lowmem_npo.evaluation.asking import Wording
    from lowmem_npo.evaluation.scoring.scorer import Scorer
    from lowmem_npo.evaluation.scoring.token_scores import TokenScores

UNKNOWN = "what the model gives for rows that it never saw is not known"
NO_HOLDOUT = f"{UNKNOWN} (--holdout names some)"


class Need(NamedTuple):
    """What a test cannot do without, and the reason that is given where it is missing."""

    missing: Callable[[Subject], bool]
    reason: str


A_YARDSTICK = Need(
    lambda subject: not subject.holdout and subject.original is None,
    "it compares with rows that the model never saw, and there are none (--holdout names some)",
)
AN_ADAPTER = Need(
    lambda subject: subject.saved is None or subject.saved.adapter is None,
    "there is no --adapter to merge, or to put on a 4-bit base",
)


class LeakVerdict(NamedTuple):
    """How an outcome is put: for a person, and as the tone of the report."""

    words: str
    tone: str


VERDICTS: Mapping[bool | None, LeakVerdict] = {
    True: LeakVerdict("traces found", "bad"),
    False: LeakVerdict("no traces found", "good"),
    None: LeakVerdict("cannot tell", "unknown"),
}
# The smaller claim, where there is no holdout.
VERDICTS_AGAINST_BEFORE: Mapping[bool | None, LeakVerdict] = {
    **VERDICTS,
    True: LeakVerdict("much is left", "bad"),
    False: LeakVerdict("much less than before", "good"),
}


# Beside the figures of a result in a file. The first two are always there.
JUDGED = {
    "meaning": str, "leaks": bool | None, "against_before": bool, "gap": str, "diverged": bool, "too_large": bool
}  # fmt: skip
DIVERGED = "the attacked model gave no finite likelihood"
TOO_LARGE = "it does not fit into the GPU's memory"


class Meaning(NamedTuple):
    """What a figure is called, what it says, and what it should be: "lower", "as holdout", ... ("": anything)."""

    title: str
    text: str
    wish: str


@dataclass
class LeakResult:
    """The outcome of a test.

    figures: numbers, or groups of numbers, by name; `holdout_X` is figure X on the holdout.
    meaning: one sentence.
    leaks: True, False, or None where that is unknown.
    against_before: whether that was judged by the model before it forgot, because there is no holdout.
    gap: what `meaning` says, from there to its end, of attacks that have no figures; "" where all have.
    diverged: whether the model diverged under one of those, which says nothing of what it knew.
    too_large: whether memory ran out for one of those.
    rows: set -> the scores of each of its rows, in order; for rows.jsonl, never for a report.
    """

    figures: dict[str, Any]
    meaning: str
    leaks: bool | None
    against_before: bool = False
    gap: str = ""
    diverged: bool = False
    too_large: bool = False
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def not_measured(cls, why: str, *, diverged: bool = False, too_large: bool = False) -> LeakResult:
        """The result of a test that could not be run."""
        meaning = f"Not measured: {why}."
        return cls({}, meaning, None, gap=meaning, diverged=diverged, too_large=too_large)

    @classmethod
    def judged(cls, figures: dict[str, Any], meaning: str, attack: Attack, before: float | None = None) -> LeakResult:
        """The result of a test that is judged by what one attack brought back, which is among the figures. before: the
        same of the model before it forgot, of a test that has no holdout."""
        evidence = GROUPS if GROUPS in figures else "rows"
        remark = attack.remark(figures[evidence], figures.get(HOLDOUT + evidence, 0), evidence)
        against_before = attack.level is None and before is not None
        words = " ".join(filter(None, [meaning, of_groups(figures), remark]))
        return cls(figures, words, attack.leaks(before), against_before)

    @property
    def verdict(self) -> LeakVerdict:
        return (VERDICTS_AGAINST_BEFORE if self.against_before else VERDICTS)[self.leaks]

    def add(self, sentence: str, gap: bool = False) -> None:
        """Ends `meaning` with the sentence. gap: whether it is of attacks that have no figures."""
        self.meaning += f" {sentence}"
        if gap or self.gap:
            self.gap = f"{self.gap} {sentence}".lstrip()

    def to_json(self) -> dict[str, Any]:
        """As leaks.json and evaluation.json hold it."""
        further = {name: value for name in [*JUDGED][2:] if (value := getattr(self, name))}
        return {**self.figures, "meaning": self.meaning, "leaks": self.leaks, **further}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LeakResult:
        """The inverse of `to_json`. Raises ValueError where `content` is no result."""
        check_record(content, JUDGED, optional=[*JUDGED][2:])
        figures = {k: v for k, v in content.items() if k not in JUDGED}
        _check_figures(figures)
        return cls(figures, **{k: v for k, v in content.items() if k in JUDGED})


LeakResults = dict[str, LeakResult]
"""Name of the test -> its result, in the order of the registry."""


def leak_results(content: Any) -> LeakResults:
    """What a file holds of the results of several tests. Raises ValueError where one of them is none."""
    check_value(content, dict[str, dict[str, Any]])
    results = {}
    for name, result in content.items():
        try:
            results[name] = LeakResult.from_json(result)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return results


def _check_figures(figures: Mapping[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            _check_figures(value)
        elif not (value is None or isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number, not {shown(value)}")


def groups_in(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The groups of figures in a result, or in a group of them."""
    return {name: of for name, of in figures.items() if isinstance(of, Mapping)}


class SavedModel(NamedTuple):
    """What a test loads models of its own from.

    base: how the base model is loaded. adapter: directory of the adapter, if there is one. scratch: a directory that a
    test may make and must remove. streaming: whether weights are streamed, and from where. adapter_sha256: of the
    weights that are evaluated, since those in the directory may be others by the time that a test reads them.
    """

    base: ModelConfig
    adapter: str | None
    scratch: Path
    streaming: StreamOptions = StreamOptions()
    adapter_sha256: str | None = None


@dataclass(frozen=True)
class Subject:
    """The model under test, in memory, with the rows of the tests.

    scorer: asks the model. forget, holdout: rows that were to be forgotten, and rows like them that the model was never
    taught. options: every test's. seed: of all that is random. saved: None while a model is being trained.
    max_new_tokens: of a generated answer, at most; None: `answer_length`. earlier: results of the model before it
    forgot, where they are known. unlearned: False for that model itself. retain, general: rows to keep, and general
    ones, that the model may be taught. wording: how the forget and holdout rows were written, where that is known.
    form: in which the model is stored, "" as it is evaluated. repeated: tests that are made in every form.
    """

    scorer: Scorer
    forget: Sequence[TokenizedRow]
    holdout: Sequence[TokenizedRow] | None
    options: Any
    seed: int = 0
    saved: SavedModel | None = None
    max_new_tokens: int | None = None
    earlier: LeakResults = field(default_factory=dict)
    unlearned: bool = True
    retain: Sequence[TokenizedRow] | None = None
    general: Sequence[TokenizedRow] | None = None
    wording: Wording | None = None
    form: str = ""
    repeated: Sequence[LeakTest] = ()

    def part(self, name: str) -> str:
        """What the journal calls a measurement of this model."""
        compared = ", with a holdout" if self.holdout else ""
        if self.holdout and any(len({*self.groups[name]}) < len(rows) for name, rows in self.sets.items()):
            compared += f" in groups {crc32(repr(self.groups).encode())}"  # by which its p-values are
        return self.named(f"leaks: {name}{compared}")

    def named(self, part: str) -> str:
        """The same of one that does not depend on the holdout."""
        return f"{part}, {self.form}" if self.form else part

    @property
    def original(self) -> PeftModel | None:
        """The model in memory if it can be asked without its adapter: what it was before it forgot."""
        from peft import PeftModel

        return self.scorer.model if self.unlearned and isinstance(self.scorer.model, PeftModel) else None

    def of_original(self, ask: Callable[[Scorer], T]) -> T | None:
        """What `ask` gives of the model before it forgot, for a test that has no holdout; None where it has one, and
        where that model cannot be asked. A merged model has no original; what that gave as evaluated stands for it."""
        from lowmem_npo.evaluation.scoring.scorer import NotAsked
        from lowmem_npo.model.adapters import original_model

        if self.holdout or not self.unlearned:
            return None
        if self.scorer.model is None:  # it has been asked in `prepare`
            return ask(self.scorer)
        if self.original is not None:
            with original_model(self.original):
                return ask(self.scorer)
        try:
            return ask(self.scorer.without_model()) if self.form else None
        except NotAsked:
            return None

    def earlier_figure(self, test: str, figure: str) -> float | None:
        """A figure of the model before it forgot, of a test that has no holdout; None where it is not known."""
        return None if self.holdout or test not in self.earlier else at(self.earlier[test].figures, figure)

    @property
    def sets(self) -> dict[str, Sequence[TokenizedRow]]:
        """The rows that there are, by set."""
        return {"forget": self.forget} | ({"holdout": self.holdout} if self.holdout else {})

    @cached_property
    def groups(self) -> dict[str, Sequence[int]]:
        """Set -> the group of each of its rows: of those that are one piece of evidence. Of token ids alone no more is
        known than that rows of the same ones are."""
        from lowmem_npo.data.tokenized_rows import KnownByIds

        known = self.wording.groups if self.wording else {}
        return {name: known[name] if name in known else KnownByIds(rows).facts for name, rows in self.sets.items()}

    @property
    def answer_parts(self) -> dict[str, str]:
        """Set -> what the journal calls its `token_scores`."""
        return {name: self.named(f"leaks: {name} answers") for name in self.sets}

    def token_scores(self) -> dict[str, list[TokenScores]]:
        """Set -> what the model thinks of every token of its answers. Measured once, whichever tests ask."""
        return {name: self.scorer.token_scores(part, self.sets[name]) for name, part in self.answer_parts.items()}


OptionsT = TypeVar("OptionsT", bound=Options)
T = TypeVar("T")


class LeakTest(ABC, Generic[OptionsT]):
    """One leak test. Adding one: its file with one instance, its line in registry.py, its test."""

    name: ClassVar[str]
    """As `--leaks` and the result files call it."""
    summary: ClassVar[str]
    """What it measures, for help texts and tables."""
    in_words: ClassVar[str] = ""
    """What it does to find traces, for a reader who is not an engineer: completes "Traces are found by …"."""
    needs: ClassVar[tuple[Need, ...]] = ()
    options: type[OptionsT]
    figures: ClassVar[Mapping[str, Meaning]]
    """Every figure's meaning, by the last part of its name."""
    main: ClassVar[str] = ""
    """The figure that pictures show."""
    counts: ClassVar[tuple[str, ...]] = ("rows", "holdout_rows")
    """Figures that say how much was measured; the report shows them in the heading."""
    unlisted: ClassVar[tuple[str, ...]] = (*EVIDENCE, CUT, WHOLE_ROWS)
    """Figures that only the result files hold."""
    after_only: ClassVar[bool] = False
    """Whether it makes no sense on a model that has forgotten nothing yet."""
    forms: ClassVar[tuple[str, ...]] = ()
    """In which further forms of the model, in words, it repeats the other tests."""
    named_by_options: ClassVar[bool] = False
    """Whether the name of an attack says all that the options do to it."""
    loads_models: ClassVar[bool] = False
    """Whether it loads models of its own: it is run last, when the model in memory is gone; never while training."""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:  # the ground of several tests
            check_declared(LeakTest, cls)

    @abstractmethod
    def run(self, subject: Subject, options: OptionsT) -> LeakResult:
        """Measures and judges. The model is left as it came."""

    def prepare(self, subject: Subject) -> None:
        """For a test that `loads_models`: asks the model in memory for what the others will be compared with."""

    def check_rows(self, options: OptionsT, rows: Mapping[str, int]) -> None:
        """Raises UserError for options that do not fit the number of rows of each set."""

    def tuning_steps(self, subject: Subject, options: OptionsT) -> int:
        """How many steps of fine-tuning it has still to take: what it costs beside asking."""
        return 0

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        """What each attack of the test brought back, by its name ("" if there is one only); figures: of a result, also
        of one that was not measured. A test that brings no answer back has none."""
        return {}

    def hindrance(self, subject: Subject) -> str | None:
        """Why it cannot be run; None where it can."""
        return next((need.reason for need in self.needs if need.missing(subject)), None)

    def measure(self, subject: Subject) -> LeakResult:
        """`run`, or why it was not run, or not to its end."""
        from lowmem_npo.memory.exhausted import if_fits

        if (why := self.hindrance(subject)) is not None:
            return LeakResult.not_measured(why)
        try:
            result = if_fits(lambda: self.run(subject, cast(OptionsT, subject.options)))
        except NotGenerated as error:
            return LeakResult.not_measured(str(error).rstrip("."))
        return result or LeakResult.not_measured(TOO_LARGE, too_large=True)

    def meaning_of(self, figure: str) -> Meaning:
        """Raises ValueError for a figure that the test does not declare: it comes from a file of another version."""
        if figure not in self.figures:
            raise ValueError(f"'{figure}' is no figure of the leak test '{self.name}' in this version of lowmem-npo")
        return self.figures[figure]


def beside_holdout(
    value: float,
    level: float | None,
    before: float | None = None,
    unknown: str = NO_HOLDOUT,
    others: Sequence[float] = (),
) -> tuple[str, ...]:
    """`value` in per cent, `others` that are read beside it, and the words that put the holdout's figure, or that of
    the model before it forgot, beside them. unknown: why the former is not there."""
    if level is not None:
        *own, never_seen = shares(value, *others, level)
        return *own, f"of answers that the model never saw, {never_seen}"
    if before is not None:
        *own, earlier = shares(value, *others, before)
        return *own, f"before it forgot, {earlier}; {unknown}"
    return *shares(value, *others), unknown


def as_holdout(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of the holdout under their names in a result."""
    return {HOLDOUT + name: value for name, value in figures.items()}
