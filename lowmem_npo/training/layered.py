"""Layered unlearning: the rows to forget are divided into folds, and each stage forgets one fold more.

Qian et al. 2025, "Layered Unlearning for Adversarial Relearning", section 3: stage i of K forgets folds 1 to i and
still retains folds i+1 to K. Each stage must find a way to forget that spares the later folds, so teaching the model a
few of the rows again undoes one of the ways, and not all. It costs no pass and no memory of its own.

Here a fold's rows are shown as often as they count: earlier folds at `weight` times the rate of the newest one, until
the last stage shows all rows alike; later folds are retain rows, each of them twice.

Where an attacker goes on for several steps (`--adversary-steps`), the steps in which it does take rows of one half of
each fold, and it is taught rows of the other; then the halves, which each stage draws anew, change places. Each half's
passes go on where its last attacker left them, so that rows are shown as evenly as without.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowmem_npo.errors import UserError
from lowmem_npo.sizes import counted
from lowmem_npo.training.step_rows import StepBatches, order_of

FOLDS, FORGET, EARLIER, SLOTS, RETAIN = 2, 3, 4, 5, 6  # streams of random numbers, beside those of step_rows
HALVES = 9  # another, beside those of adversary.py
LATER_COPIES = 2  # of a later fold's row among the retain rows
RETAIN_PER_FORGET = 2  # retain rows that stand beside them at most, so that a large retain set does not drown them


def divide(num_forget: int, folds: int, seed: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """`folds` lists of rows, as even as can be: each row in one of them, the rows of a group all in the same.

    groups: of each row, such as the person it is about. None: every row by itself. A row whose group is None, too.

    Raises:
        UserError: more folds than rows or than groups.
    """
    if folds > num_forget:
        raise UserError(f"--layered {folds} needs at least as many rows to forget; there {_number(num_forget)}.")
    named = [("row", row) if groups is None or groups[row] is None else groups[row] for row in range(num_forget)]
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(named):
        members.setdefault(group, []).append(row)
    if len(members) < folds:
        raise UserError(
            f"--layered {folds} needs at least as many groups of rows to forget, and there {_number(len(members))}: "
            "rows with the same value in --group-column stay together, and so do rows of the same text."
        )
    order = np.random.default_rng([seed, FOLDS]).permutation(len(members))
    parts = [list(members.values())[place] for place in order]
    result: list[list[int]] = [[] for _ in range(folds)]
    for part in sorted(parts, key=len, reverse=True):  # the largest first, each to the smallest fold
        min(result, key=len).extend(part)
    return [sorted(fold) for fold in result]


def _number(count: int) -> str:
    return "is one" if count == 1 else f"are {count}"


def check_folds(folds: Sequence[Sequence[int]], batch_size: int, steps: int) -> None:
    """Raises a UserError where a fold does not fill a batch, or a stage would have no step."""
    if (least := min(map(len, folds))) < batch_size:
        lowered = "one of them" if len(folds) > 2 else "the latter"
        raise UserError(
            f"--layered {len(folds)} leaves a fold of {counted(least, 'row')}, and a step takes --batch-size "
            f"{batch_size}: lower {lowered}."
        )
    if steps < len(folds):
        raise UserError(f"--layered {len(folds)} needs a step for every stage; this run has {steps}.")


def attack_length(attack_steps: int, steps: int, folds: int) -> int:
    """For how many steps an attacker goes on: for `attack_steps`, if each stage has room for two such."""
    return min(attack_steps, max(1, steps // folds // 2))


class Attack(NamedTuple):
    """What the attacker at work in a step meets."""

    began: int  # its first global step
    side: int  # the half that is forgotten, 0 or 1; 0 where each step has an attacker of its own, and there are none
    before: int  # steps of the stage before this one that forgot this half


class LayeredBatches(StepBatches):
    """As `StepBatches`, in stages. A retain row from `num_retain` on is a row to forget whose fold has not come yet.

    An epoch is as many steps as ever, the stages have equal shares of `steps`, and every step is full.

    folds: of `divide`, in the order in which they are forgotten.
    steps: of the whole run.
    weight: from 0 to 1, how often an earlier fold's row is shown for one showing of the newest fold's rows.
    attack_steps: for how many steps an attacker goes on; fewer in stages too short for two. A stage begins with a fresh
        one.
    """

    def __init__(
        self, folds: Sequence[Sequence[int]], steps: int, weight: float, *, attack_steps: int = 1, **sizes: Any
    ):
        super().__init__(sum(map(len, folds)), **sizes)
        self.attack_steps = attack_length(attack_steps, steps, len(folds))
        self.parts = 1 if self.attack_steps == 1 else 2  # into which what a stage forgets is divided
        self.folds, self.steps, self.weight = [list(fold) for fold in folds], steps, weight
        self.starts = [stage * steps // len(folds) for stage in range(len(folds))]
        """The first step of each stage."""
        self.ends = [*self.starts[1:], steps]
        """The step after each stage, as known when it began: its attackers are laid out by that."""
        self._alike: dict[int, tuple[list[int], list[int]]] = {}

    def stage(self, step: int) -> int:
        """The stage, from 0, that global step `step` (from 0) belongs to."""
        return bisect_right(self.starts, step) - 1

    def end_stage(self, stage: int, step: int) -> None:
        """Ends `stage` with the epoch in which `step` steps are done, before its time; but for the last one, those
        after it keep their lengths."""
        # the rows of this epoch may be on the way
        first = math.ceil(step / self.steps_per_epoch) * self.steps_per_epoch
        if stage + 1 == len(self.folds) or first >= self.starts[stage + 1]:
            return
        for later in range(stage + 1, len(self.folds)):
            begin = first + (later - stage - 1) * (self.steps // len(self.folds))
            self.starts[later] = min(self.starts[later], begin)
        self.ends[stage + 1 :] = [*self.starts[stage + 2 :], self.steps]

    def forgotten(self, step: int) -> list[int]:
        """Those of the folds whose turn has come."""
        return sorted(row for fold in self.folds[: self.stage(step) + 1] for row in fold)

    def attack_began(self, step: int) -> int:
        return self._attack(step).began

    def spared(self, step: int) -> Sequence[int]:
        """One half, and the odd one out."""
        if self.parts == 1:
            return super().spared(step)
        side, spared = self._attack(step).side, []
        for rows in self._shown_alike(self.stage(step)):
            spared += rows[side : len(rows) // 2 * 2 : 2] + rows[len(rows) // 2 * 2 :]
        return spared

    def step_rows(self, step: int) -> tuple[list[int], list[int]]:
        stage, attack = self.stage(step), self._attack(step)
        first = step - self.starts[stage]
        held = range(first * self.retain_batch_size, (first + 1) * self.retain_batch_size if self.num_retain else 0)
        drawn = range(attack.before * self.batch_size, (attack.before + 1) * self.batch_size)
        forget = [self._forget(stage, attack.side, draw) for draw in drawn]
        return forget, [self._retain(stage, draw) for draw in held]

    def _attack(self, step: int) -> Attack:
        """Attackers come in pairs, one for each half; those of a stage's last pair share the steps that are left."""
        stage, length = self.stage(step), self.attack_steps
        first = step - self.starts[stage]
        if self.parts == 1:
            return Attack(step, 0, first)
        pair, place = divmod(first, 2 * length)
        pairs, left = divmod(self.ends[stage] - self.starts[stage], 2 * length)
        of_first = (left + 1) // 2 if pair == pairs and left else length
        side, place = (0, place) if place < of_first else (1, place - of_first)
        return Attack(step - place, side, pair * length + place)

    def _shown_alike(self, stage: int) -> tuple[list[int], list[int]]:
        """The newest fold, and the earlier ones, whose rows a stage shows less often; all are new in the last stage.
        Every second row is of the same half."""
        if stage in self._alike:
            return self._alike[stage]
        folds = self.folds[: stage + 1]
        if self.parts > 1:
            orders = [order_of(len(fold), self.seed, HALVES, stage, number) for number, fold in enumerate(folds)]
            folds = [[fold[place] for place in order] for fold, order in zip(folds, orders, strict=True)]
        newest = folds if len(folds) == len(self.folds) else folds[-1:]
        earlier = folds[: len(folds) - len(newest)]
        self._alike[stage] = [row for fold in newest for row in fold], [row for fold in earlier for row in fold]
        return self._alike[stage]

    def _forget(self, stage: int, side: int, draw: int) -> int:
        """The `draw`-th row to forget of a stage, or of a half in it: passes over the newest fold, with some of the
        earlier ones' rows."""
        newest, earlier = self._shown_alike(stage)
        shown = self.weight * len(earlier) / self.parts  # in a pass, on average
        time = (stage,) if self.parts == 1 else (stage, side)

        def before(turn: int) -> int:
            return self._before(turn, newest, side) + int(turn * shown)

        turn = int(draw / (len(newest) / self.parts + shown))
        while before(turn + 1) <= draw:
            turn += 1
        while before(turn) > draw:
            turn -= 1
        also = range(int(turn * shown), int((turn + 1) * shown))
        rows = [*self._pass(turn, newest, side), *(self._earlier(n, earlier, side, time) for n in also)]
        return rows[order_of(len(rows), self.seed, FORGET, *time, turn)[draw - before(turn)]]

    def _earlier(self, draw: int, rows: Sequence[int], side: int, time: tuple[int, ...]) -> int:
        """The `draw`-th of the earlier folds' rows, or of their half, in a new order each time that all have come."""
        turn = (self.parts * draw + side) // len(rows)
        those = self._pass(turn, rows, side)
        return those[order_of(len(those), self.seed, EARLIER, *time, turn)[draw - self._before(turn, rows, side)]]

    def _pass(self, turn: int, rows: Sequence[int], side: int) -> list[int]:
        """The rows of a half in its `turn`-th pass; an odd one out comes in the passes of both, in every second one."""
        odd = len(rows) % self.parts
        half = rows[side : len(rows) - odd : self.parts]
        return [*half, *(rows[-1:] if odd and (turn + side) % 2 == 0 else ())]

    def _before(self, turn: int, rows: Sequence[int], side: int) -> int:
        """The number of rows in the passes before the `turn`-th."""
        return (turn * len(rows) + self.parts - 1 - side) // self.parts

    def _retain(self, stage: int, draw: int) -> int:
        """The `draw`-th retain row of a stage: passes over the later folds, with some retain rows among them."""
        later = [self.num_retain + row for fold in self.folds[stage + 1 :] for row in fold] * LATER_COPIES
        others = min(self.num_retain, RETAIN_PER_FORGET * self.num_forget) if later else self.num_retain
        turn, place = divmod(draw, len(later) + others)
        slot = int(order_of(len(later) + others, self.seed, SLOTS, stage, turn)[place])
        if slot < len(later):
            return later[slot]
        turn, place = divmod(turn * others + slot - len(later), self.num_retain)
        return int(order_of(self.num_retain, self.seed, RETAIN, stage, turn)[place])
