"""Whether what was forgotten comes back when a part of it is taught again (Hu et al. 2024, Lynch et al. 2024).

Some forget rows are shown to the model for some steps of fine-tuning, and the REST of the forget rows is measured. What
such steps teach anyhow, the manner of the answers, they teach about the holdout as well: only what the rest gains
beyond it was still there. What shares text with a row that is shown, as passages of a document do, is not asked for: it
was taught. How much comes back depends on how hard an attacker tries, so there is a family of attacks,
and the worst counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Interval

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks import tuned
from lowmem_npo.evaluation.leaks.contract import LeakResult, Need, Subject
from lowmem_npo.evaluation.leaks.tuned import Tuned, Tuning, TuningTest
from lowmem_npo.evaluation.options import Options
from lowmem_npo.ranges import LARGEST, MOST, Count, Positive, shortened

TWO_ROWS = Need(
    lambda subject: len(subject.forget) < 2,
    "it teaches one part of the forget rows again and asks for the rest, and there is only one row",
)
NOTHING_LEFT = "every row that is not shown holds text of one that is"
HALF = 0.5
# What the words of --relearn-attacks stand for: share of the rows (None: --relearn-share), and multiples of
# --relearn-steps and --relearn-lr.
ONE = ((None, 1, 1),)
SHORT = (*ONE, (None, 5, 1), (HALF, 3, 1))
FAMILY = (*ONE, (None, 5, 1), (None, 5, 3), (HALF, 3, 1), (HALF, 10, 3))
FAMILIES: Mapping[str, tuple[tuple[float | None, int, int], ...]] = {"one": ONE, "short": SHORT, "family": FAMILY}


class Lesson(NamedTuple):
    """An attack: rows shown (a share of them, or how many if it is 1 or more), steps, learning rate."""

    share: float
    steps: int
    lr: float

    @property
    def name(self) -> str:
        shown = f"{self.share:.0f} rows" if self.share >= 1 else f"{100 * self.share:g}%"
        return f"{self.steps} steps, {shown} shown, lr {self.lr:g}"

    @classmethod
    def parse(cls, text: str) -> Lesson:
        """SHARE:STEPS:LR. Raises UserError for anything else."""
        shown = f"--relearn-attacks {shortened(text)}"
        try:
            share, steps, lr = text.split(":")
            lesson = cls(float(share), int(steps), float(lr))
        except ValueError:
            raise UserError(
                f"{shown} is no attack; write {', '.join(FAMILIES)}, or SHARE:STEPS:LR as in 0.5:60:1e-3."
            ) from None
        if not (0 < lesson.share < 1 or (1 <= lesson.share <= MOST and lesson.share == int(lesson.share))):
            raise UserError(f"{shown}: what is shown must be a share between 0 and 1, or a whole number of rows.")
        if not 1 <= lesson.steps <= MOST:
            raise UserError(f"{shown}: the number of steps must be at least 1, and at most {MOST:,}.")
        if not (math.isfinite(lesson.lr) and 0 < lesson.lr <= LARGEST):
            raise UserError(f"{shown}: the learning rate must be a positive number.")
        return lesson


@dataclass
class RelearningOptions(Options):
    """How much is taught again, and how. Few steps at a high rate: what is new to a model is not learnt by them."""

    relearn_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of the forget rows that --leaks relearning teaches again before it asks for the others."""
    relearn_steps: Count = 20
    """Fine-tuning steps of --leaks relearning, each on four rows."""
    relearn_lr: Positive = 1e-3
    """Learning rate of --leaks relearning."""
    relearn_attacks: tuple[str, ...] = ("short",)
    """Attacks of --leaks relearning, of which the worst counts: one, with these options; short, also five times the
    steps, and three times on half of the rows; family, also five times at three times the rate, and ten times on half
    of the rows at three times the rate; or any SHARE:STEPS:LR, as 0.5:60:1e-3 (12:60:1e-3 shows 12 rows)."""

    def check(self) -> None:
        lessons(self)


class Relearning(TuningTest[RelearningOptions]):
    name = "relearning"
    summary = "`extraction` of the other rows after fine-tuning on a part of them, by the worst of several attacks"
    in_words = "teaching the model some of the examples again, and letting it complete the others"
    needs = (TWO_ROWS,)
    options = RelearningOptions

    def check_rows(self, options: RelearningOptions, rows: Mapping[str, int]) -> None:
        for lesson in lessons(options):
            if lesson.share >= rows["forget"] > 1:
                raise UserError(
                    f"--relearn-attacks: {lesson.share:.0f} rows are to be shown again, and there are only "
                    f"{rows['forget']}; one at least must be left to ask for."
                )

    def run(self, subject: Subject, options: RelearningOptions) -> LeakResult:
        from lowmem_npo.evaluation.leaks.fine_tuning import tune

        wanted = lessons(options)
        tunings = self.tunings(subject, options)
        if not tunings:
            return LeakResult.not_measured(NOTHING_LEFT)
        outcomes = {run: tune(subject, tuning) for run, tuning in tunings.items()}
        tried = {of.name: outcomes[of.share, of.lr] for of in wanted if (of.share, of.lr) in outcomes}
        result = tuned.judge_made(judge, {of.name: of.steps for of in wanted}, tried)
        if left := [lesson.name for lesson in wanted if lesson.name not in tried]:
            result.add(f"Not tried, since {NOTHING_LEFT}: {'; '.join(left)}.", gap=True)
        return result

    def tunings(self, subject: Subject, options: RelearningOptions) -> dict[tuple[float, float], Tuning]:
        """(share, learning rate) -> what is taught and asked for, where anything is left to ask for."""
        near = subject.wording.sharing["forget"] if subject.wording else {}  # of token ids alone less is known
        tunings = {}
        for (share, lr), steps in _runs(lessons(options)).items():
            places = split(len(subject.forget), share, subject.seed, near)
            shown, rest = ([subject.forget[i] for i in part] for part in places)
            groups = [subject.groups["forget"][i] for i in places[1]]
            if rest:
                tunings[share, lr] = Tuning(f"relearning, {share:g} shown", shown, rest, steps, lr, groups)
        return tunings


RELEARNING = Relearning()


def lessons(options: RelearningOptions) -> list[Lesson]:
    """The attacks that the options name, each once. Raises UserError for none, and for one that cannot be read."""
    if not options.relearn_attacks:
        raise UserError(f"--relearn-attacks names no attack; write {', '.join(FAMILIES)}, or SHARE:STEPS:LR.")
    named: list[Lesson] = []
    for text in options.relearn_attacks:
        named += [
            Lesson(share or options.relearn_share, steps * options.relearn_steps, lr * options.relearn_lr)
            for share, steps, lr in FAMILIES.get(text, ())
        ] or [Lesson.parse(text)]
    return list(dict.fromkeys(named))


def _runs(wanted: list[Lesson]) -> dict[tuple[float, float], list[int]]:
    """(share, learning rate) -> the numbers of steps: a longer attack begins as a shorter one does."""
    runs: dict[tuple[float, float], list[int]] = {}
    for lesson in wanted:
        runs.setdefault((lesson.share, lesson.lr), []).append(lesson.steps)
    return {key: sorted(steps) for key, steps in runs.items()}


def split(
    rows: int, share: float, seed: int, near: Mapping[int, set[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Which rows are shown again (one at least), and which are asked for: the others (one at least).

    share: from 1 on, how many. near: row -> others that hold its text. Such rows are shown together, so that few are
    left which may not be asked for; there may be none that may.
    """
    near = near or {}
    count = min(rows - 1, max(1, int(share) if share >= 1 else round(share * rows)))
    drawn = random.Random(seed).sample(range(rows), count)
    shown: dict[int, None] = {}
    for first in drawn:
        together = [first]
        while together and len(shown) < count:
            row = together.pop(0)
            if row not in shown:
                shown[row] = None
                together += sorted(near.get(row, ()))
    held = {*shown}.union(*(near.get(row, set()) for row in shown))
    return sorted(shown), [i for i in range(rows) if i not in held]


def judge(attacks: Mapping[str, Tuned]) -> LeakResult:
    """What the rows that were not shown say, in the worst of the attacks."""

    def told(name: str, worst: Tuned, own: str) -> str:
        which = f", the worst of {len(attacks)} attacks ({name})," if len(attacks) > 1 else ""
        others = "other answer" if (rows := worst.after["rows"]) == 1 else f"other {rows} answers"
        return (
            f"After {worst.steps} steps on {worst.taught} of the forgotten rows{which} the model writes the last {own} "
            f"of the {others}"
        )

    return tuned.judge(attacks, told)
