"""A run that loses what it should keep: said once while it trains, since nothing else would stop it.

The rule: the retain rows of the last ten logged steps, of at least three, have a mean NLL per token more than 1 nat
above what it was before training. Answers differ by more than that, so the steps must have shown `ENOUGH` rows, or as
many as there are; if ten have not, more count. Without a measurement from before, as many of the first rows stand for
it, at least the first logged step, whose weights are the original's. Rows that are still to be forgotten (layered
unlearning) do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.console import Say
from lowmem_npo.training.training_rows import Shown

RISE = 1.0  # nats per token
FEWEST, MOST = 3, 10  # logged steps
ENOUGH = 100  # rows


class Mean(NamedTuple):
    """Of so many logged steps the mean NLL per token."""

    lines: int
    nll: float


class Divergence(TrainerCallback):
    """before: mean NLL of the retain rows before training, in nats per answer token, if it was measured.
    shown: what a global step, from 0, shows of the rows to retain. num_retain: how many there are.
    """

    def __init__(self, before: float | None, shown: Callable[[int], Shown], num_retain: int, say: Say = print) -> None:
        self.before, self.say = before, say
        self._shown, self._enough = shown, min(ENOUGH, num_retain)
        self._of_line: dict[tuple[int, int], tuple[int, int]] = {}
        self._warned = False
        self._last: tuple[int, float, float] | None = None  # step, mean NLL, the same before

    @property
    def sentence(self) -> str | None:
        """What the end of the run shows; None if nothing is lost beyond the rule."""
        if self._last is None or not self._last[1] > self._last[2] + RISE:
            return None
        step, now, before = self._last
        return (
            f"The model loses what it should keep: at step {step} the retain NLL is {now:.2f} nats per token, and was "
            f"{before:.2f} before: try a lower --lr, or --stop-when retain-loss+10%."
        )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        lines = [line for line in state.log_history if "loss" in line]
        ends = [int(line["step"]) for line in lines]
        logged = [*zip([0, *ends], ends, lines, strict=False)]
        if self.before is not None and math.isfinite(self.before):
            before, first = self.before, 1
        else:
            begun = self._mean(logged, 1, 1)
            if begun is None:
                return
            before, first = begun.nll, begun.lines
        if (recent := self._mean(reversed(logged[first:]), FEWEST, MOST)) is None:
            return
        self._last = state.global_step, recent.nll, before
        if not self._warned and (sentence := self.sentence) is not None:
            self._warned = True
            if state.is_world_process_zero:
                self.say(sentence)

    def _mean(self, logged: Iterable[tuple[int, int, dict[str, float]]], fewest: int, most: int) -> Mean | None:
        """Of the first `most` of `logged`, each with its first step and the one after its last, or of as many as have
        rows enough; None if they have not, or are fewer than `fewest`."""
        lines = with_rows = rows = tokens = 0
        nll = 0.0
        for begin, end, line in logged:
            lines += 1
            value = line.get("retain_nll")
            if value is None or not math.isfinite(value):
                continue
            number, of_line = self._counts(begin, end)
            with_rows, rows, tokens, nll = with_rows + 1, rows + number, tokens + of_line, nll + value * of_line
            if with_rows >= most and rows >= self._enough:
                break
        return Mean(lines, nll / tokens) if with_rows >= fewest and rows >= self._enough and tokens else None

    def _counts(self, begin: int, end: int) -> tuple[int, int]:
        """The rows to retain of some steps, and their tokens."""
        if (begin, end) not in self._of_line:
            shown = [self._shown(step) for step in range(begin, end)]
            self._of_line[begin, end] = sum(one.rows for one in shown), sum(one.tokens for one in shown)
        return self._of_line[begin, end]
