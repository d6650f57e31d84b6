"""Layered unlearning: the rows to forget are divided into folds, and each stage forgets one fold more.

Qian et al. 2025, "Layered Unlearning for Adversarial Relearning", section 3: stage i of K forgets folds 1 to i and
still retains folds i+1 to K. Each stage must find a way to forget that spares the later folds, so teaching the model a
few of the rows again undoes one of the ways, and not all. It costs no pass and no memory of its own.

Here a fold's rows are shown as often as they count: earlier folds at `weight` times the rate of the newest one, until
the last stage shows all rows alike; later folds are retain rows, each of them twice.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lowmem_npo.errors import UserError
from lowmem_npo.training.step_rows import StepBatches

FOLDS, FORGET, EARLIER, SLOTS, RETAIN = 2, 3, 4, 5, 6  # streams of random numbers, beside those of step_rows
LATER_COPIES = 2  # of a later fold's row among the retain rows
RETAIN_PER_FORGET = 2  # retain rows that stand beside them at most, so that a large retain set does not drown them


def divide(num_forget: int, folds: int, seed: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """`folds` lists of rows, as even as can be: each row in one of them, the rows of a group all in the same.

    groups: of each row, such as the person it is about. None: every row by itself. A row whose group is None, too.

    Raises:
        UserError: more folds than rows or than groups.
    """
    if folds > num_forget:
        raise UserError(f"--layered {folds} needs at least as many rows to forget; there are {num_forget}.")
    named = [("row", row) if groups is None or groups[row] is None else groups[row] for row in range(num_forget)]
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(named):
        members.setdefault(group, []).append(row)
    if len(members) < folds:
        number = "one group" if len(members) == 1 else f"{len(members)} groups"
        raise UserError(f"--layered {folds} divides the rows to forget by --group-column, which names {number}.")
    order = np.random.default_rng([seed, FOLDS]).permutation(len(members))
    parts = [list(members.values())[place] for place in order]
    result: list[list[int]] = [[] for _ in range(folds)]
    for part in sorted(parts, key=len, reverse=True):  # the largest first, each to the smallest fold
        min(result, key=len).extend(part)
    return [sorted(fold) for fold in result]


def check_folds(folds: Sequence[Sequence[int]], batch_size: int, steps: int) -> None:
    """Raises a UserError where a fold does not fill a batch, or a stage would have no step."""
    if (least := min(map(len, folds))) < batch_size:
        raise UserError(
            f"--layered {len(folds)} leaves a fold of {least} rows, and a step takes --batch-size {batch_size}: lower "
            "one of them."
        )
    if steps < len(folds):
        raise UserError(f"--layered {len(folds)} needs a step for every stage; this run has {steps}.")


class LayeredBatches(StepBatches):
    """As `StepBatches`, in stages. A retain row from `num_retain` on is a row to forget whose fold has not come yet.

    An epoch is as many steps as ever, the stages have equal shares of `steps`, and every step is full.

    folds: of `divide`, in the order in which they are forgotten.
    steps: of the whole run.
    weight: from 0 to 1, how often an earlier fold's row is shown for one showing of the newest fold's rows.
    """

    def __init__(self, folds: Sequence[Sequence[int]], steps: int, weight: float, **sizes: Any):
        super().__init__(sum(map(len, folds)), **sizes)
        self.folds, self.steps, self.weight = [list(fold) for fold in folds], steps, weight
        self.starts = [stage * steps // len(folds) for stage in range(len(folds))]
        """The first step of each stage."""

    def stage(self, step: int) -> int:
        """The stage, from 0, that global step `step` (from 0) belongs to."""
        return bisect_right(self.starts, step) - 1

    def end_stage(self, stage: int, step: int) -> None:
        """Ends `stage` with the epoch in which `step` steps are done, before its time; but for the last one, those
        after it keep their lengths."""
        first = (
            math.ceil(step / self.steps_per_epoch) * self.steps_per_epoch
        )  # the rows of this epoch may be on the way
        for later in range(stage + 1, len(self.folds)):
            begin = first + (later - stage - 1) * (self.steps // len(self.folds))
            self.starts[later] = min(self.starts[later], begin)

    def forgotten(self, step: int) -> list[int]:
        """Those of the folds whose turn has come."""
        return sorted(row for fold in self.folds[: self.stage(step) + 1] for row in fold)

    def step_rows(self, step: int) -> tuple[list[int], list[int]]:
        stage = self.stage(step)
        first = step - self.starts[stage]
        drawn = range(first * self.batch_size, (first + 1) * self.batch_size)
        held = range(first * self.retain_batch_size, (first + 1) * self.retain_batch_size if self.num_retain else 0)
        return [self._forget(stage, draw) for draw in drawn], [self._retain(stage, draw) for draw in held]

    def _forget(self, stage: int, draw: int) -> int:
        """The `draw`-th row to forget of a stage: passes over the newest fold, with some of the earlier ones' rows."""
        last = stage == len(self.folds) - 1
        newest = [row for fold in self.folds for row in fold] if last else self.folds[stage]
        earlier = [] if last else [row for fold in self.folds[:stage] for row in fold]
        shown = self.weight * len(earlier)  # in a pass, on average

        def before(turn: int) -> int:
            return turn * len(newest) + int(turn * shown)

        turn = int(draw / (len(newest) + shown))
        while before(turn + 1) <= draw:
            turn += 1
        while before(turn) > draw:
            turn -= 1
        also = [earlier[self._cycled(EARLIER, stage, n, len(earlier))] for n in self._shown(turn, shown)]
        rows = [*newest, *also]
        return rows[_order(self.seed, FORGET, stage, turn, len(rows))[draw - before(turn)]]

    @staticmethod
    def _shown(turn: int, shown: float) -> range:
        return range(int(turn * shown), int((turn + 1) * shown))

    def _retain(self, stage: int, draw: int) -> int:
        """The `draw`-th retain row of a stage: passes over the later folds, with some retain rows among them."""
        later = [self.num_retain + row for fold in self.folds[stage + 1 :] for row in fold] * LATER_COPIES
        others = min(self.num_retain, RETAIN_PER_FORGET * self.num_forget) if later else self.num_retain
        turn, place = divmod(draw, len(later) + others)
        slot = int(_order(self.seed, SLOTS, stage, turn, len(later) + others)[place])
        if slot < len(later):
            return later[slot]
        return self._cycled(RETAIN, stage, turn * others + slot - len(later), self.num_retain)

    def _cycled(self, stream: int, stage: int, draw: int, rows: int) -> int:
        """The `draw`-th of `rows`, which come in a new order each time that all have come."""
        turn, place = divmod(draw, rows)
        return int(_order(self.seed, stream, stage, turn, rows)[place])


@lru_cache(maxsize=64)
def _order(seed: int, stream: int, stage: int, turn: int, rows: int) -> np.ndarray:
    """(rows,) int64: the order of a stream's rows in its `turn`-th pass of a stage."""
    return np.random.default_rng([seed, stream, stage, turn]).permutation(rows)
