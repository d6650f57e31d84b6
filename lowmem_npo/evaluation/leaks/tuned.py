"""Fine-tuning as an attack: what is taught, what that did to a model's answers, and which of several is the worst."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lowmem_npo.evaluation.leaks.attack import (
    BY_MAX_LENGTH,
    CUT,
    EVIDENCE,
    HOLDOUT,
    WHOLE_ROWS,
    Attack,
    cut_words,
    of_tries,
)
from lowmem_npo.evaluation.leaks.contract import (
    DIVERGED,
    TOO_LARGE,
    LeakResult,
    LeakTest,
    Meaning,
    OptionsT,
    Subject,
    beside_holdout,
    groups_in,
)
from lowmem_npo.evaluation.leaks.extraction import FIGURES as OF_ANSWERS
from lowmem_npo.evaluation.leaks.extraction import attack_of

if TYPE_CHECKING:
    from lowmem_npo.data import TokenizedRow

STRENGTH = "extraction_strength"
COMPARED = ("rows", "nll", STRENGTH, "recited", CUT, WHOLE_ROWS)  # of each attack
FIGURES = OF_ANSWERS | {
    "recovered": Meaning(
        "recovered",
        "How much of the way back to the original model's extraction strength was covered. Near 0 is good.",
        "lower",
    )
}
NOT_ATTACKS = ("before", "original")  # groups of figures

Figures = dict[str, float]


class Tuning(NamedTuple):
    """One run of fine-tuning. part: its name in the journal. taught, asked: rows that are shown, and rows that are
    asked for after each of so many `steps`, in their order. lr: learning rate. groups: of the rows that are asked for
    (`Subject.groups`); None: each row is one piece of evidence."""

    part: str
    taught: Sequence[TokenizedRow]
    asked: Sequence[TokenizedRow]
    steps: Sequence[int]
    lr: float
    groups: Sequence[int] | None = None

    def key(self, subject: Subject) -> str:
        """What the journal calls its outcome on the model of `subject`."""
        return subject.part(f"{self.part}, lr {self.lr:g}, {'+'.join(map(str, self.steps))} steps")

    def steps_left(self, subject: Subject) -> int:
        """How many steps there are still to take: none where the journal knows the outcome."""
        return 0 if 0 in subject.scorer.journal.known(self.key(subject)) else max(self.steps)


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning did to the rows that were asked for.

    taught: rows shown. steps: on some of them each. before, after: `beside_each_other` of forget (and holdout) rows,
    without any step and after all. original: of the model before it forgot, where it can be asked.
    """

    taught: int
    steps: int
    before: Figures
    after: Figures
    original: Figures | None

    @property
    def written(self) -> Attack:
        """The extraction strength afterwards, as what the attack brought back."""
        attack = attack_of(self.after)
        assert attack is not None
        return attack

    @property
    def strength(self) -> float:
        """The extraction strength afterwards."""
        return self.after[STRENGTH]

    @property
    def level(self) -> float | None:
        """That of the holdout."""
        return self.after.get(HOLDOUT + STRENGTH)

    @property
    def strength_before(self) -> float | None:
        """That of the model before it forgot, of the same rows; None with a holdout, which says more."""
        return self.original[STRENGTH] if self.original is not None and self.level is None else None

    @property
    def severity(self) -> tuple[int, float]:
        """Orders attacks as they are judged: what tells of traces, what cannot tell, what found none; then by how much
        came back beyond the holdout. Without one, each is judged by what there was before of its own rows."""
        leaks = self.written.leaks(self.strength_before)
        return (False, None, True).index(leaks), self.strength - (self.level or 0.0)

    def one_of(self, tries: int) -> Tuned:
        """The same as one of so many attacks, of which the worst counts."""
        return replace(self, after=of_tries(self.after, tries))


@dataclass(frozen=True)
class Outcome:
    """What one run of fine-tuning did, after each number of its steps that it came to. too_large: whether memory ran
    out before the last."""

    after: Mapping[int, Tuned]
    too_large: bool = False


class TuningTest(LeakTest[OptionsT], abstract=True):
    """A test that fine-tunes the model as `tunings` says, and asks it afterwards."""

    counts = ("rows", "holdout_rows", "shown_rows", "steps")
    main = STRENGTH
    figures = FIGURES
    after_only = True
    named_by_options = True

    @abstractmethod
    def tunings(self, subject: Subject, options: OptionsT) -> Mapping[Any, Tuning]:
        """What is taught and asked for."""

    def tuning_steps(self, subject: Subject, options: OptionsT) -> int:
        return sum(tuning.steps_left(subject) for tuning in self.tunings(subject, options).values())

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        tried = {name: attack_of(of) for name, of in groups_in(figures).items() if name not in NOT_ATTACKS}
        return {name: attack for name, attack in tried.items() if attack is not None}


def judge(attacks: Mapping[str, Tuned], told: Callable[[str, Tuned, str], str]) -> LeakResult:
    """What the worst of the attacks brings back. told: what it did, of its name, its outcome and its share of an
    answer."""
    attacks = {name: tuned.one_of(len(attacks)) for name, tuned in attacks.items()}
    name = max(attacks, key=lambda name: attacks[name].severity)
    worst = attacks[name]
    figures: dict[str, Any] = {"shown_rows": worst.taught, "steps": worst.steps, "before": worst.before, **worst.after}
    before = worst.before[STRENGTH]
    if worst.original is not None:
        figures["original"] = worst.original
        original = worst.original[STRENGTH]
        if original > before:
            figures["recovered"] = (worst.strength - before) / (original - before)
    kept = {*COMPARED, *(HOLDOUT + key for key in COMPARED), *EVIDENCE}
    figures |= {of: {k: v for k, v in tuned.after.items() if k in kept} for of, tuned in attacks.items()}
    own, earlier, beside = beside_holdout(worst.strength, worst.level, worst.strength_before, others=[before])
    meaning = (
        f"{told(name, worst, own)} by itself, before them {earlier}; {beside}.{cut_words(worst.after, BY_MAX_LENGTH)}"
    )
    return LeakResult.judged(figures, meaning, worst.written, worst.strength_before)


def judge_made(
    judge: Callable[[Mapping[str, Tuned]], LeakResult], steps: Mapping[str, int], tried: Mapping[str, Outcome]
) -> LeakResult:
    """`judge` of the attacks that were tried, each of so many steps of its run of fine-tuning, but for those whose run
    did not come so far: memory ran out, or the model diverged, which says nothing of what it knew."""
    made = {name: of.after[steps[name]] for name, of in tried.items() if steps[name] in of.after}
    missing = {name: TOO_LARGE if of.too_large else DIVERGED for name, of in tried.items() if name not in made}
    why = {
        reason: "; ".join(name for name, of in missing.items() if of == reason)
        for reason in (DIVERGED, TOO_LARGE)
        if reason in missing.values()
    }
    diverged, too_large = DIVERGED in why, TOO_LARGE in why
    if not made:
        reasons = "; ".join(f"{reason} ({names})" for reason, names in why.items())
        return LeakResult.not_measured(reasons, diverged=diverged, too_large=too_large)
    result = judge(made)
    for reason, names in why.items():
        result.add(f"Not counted, since {reason}: {names}.", gap=True)
    result.diverged, result.too_large = diverged, too_large
    if result.too_large and result.leaks is False:  # the others may bring more back
        result.leaks = None
    return result
