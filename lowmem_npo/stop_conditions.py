"""What `--stop-when` means: conditions on a run's evaluations, and which of the evaluated adapters is the best.

There are two kinds. A goal says that enough is forgotten; a limit says that too much is lost. Each is a gap that
shrinks from above: at or below 0 the condition holds, and the run stops. It also holds when the gap is not a number,
since the run will not recover from that.

A goal that holds before training says nothing of what training does: it neither ends the run nor chooses its adapter.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem_npo.errors import UserError

Words = tuple[str, tuple[float, ...]]
"""Why a condition holds, with a gap for each of its figures."""

SYNTAX = "forget-at-holdout, mia-crosses, retain-loss+10% or retain-loss+0.05"


@dataclass(frozen=True)
class StopEvaluation:
    """One measurement of a run, at `step` (0: before training). NLLs are means over answer tokens, in nats."""

    step: int
    epoch: float
    forget_nll: float
    retain_nll: float | None = None
    holdout_nll: float | None = None
    membership_auc: float | None = None
    """Chance that a forget row's answer is likelier than a holdout row's: the LOSS attack (Yeom et al. 2018)."""
    stage: int | None = None
    """Under --layered, the stage in which it was made, from 1: until the last one, of its newest fold's rows alone."""


@dataclass(frozen=True)
class ForgetAtHoldout:
    """Goal: the forget answers are as unlikely as never-taught answers are to the original model.

    The original, since training moves the holdout's level too: a collapsing model would never reach its own.
    """

    kind: Literal["goal"] = "goal"
    needs: Literal["holdout"] = "holdout"
    text: str = "forget-at-holdout"

    def gap(self, now: StopEvaluation, start: StopEvaluation) -> float:
        return measured(start.holdout_nll) - now.forget_nll

    def describe(self, now: StopEvaluation, start: StopEvaluation) -> Words:
        return "forget NLL {}, the holdout's was {} before", (now.forget_nll, measured(start.holdout_nll))


@dataclass(frozen=True)
class MembershipCrosses:
    """Goal: the loss no longer tells forget rows from rows that were never taught."""

    kind: Literal["goal"] = "goal"
    needs: Literal["holdout"] = "holdout"
    text: str = "mia-crosses"

    def gap(self, now: StopEvaluation, start: StopEvaluation) -> float:
        return measured(now.membership_auc) - 0.5

    def describe(self, now: StopEvaluation, start: StopEvaluation) -> Words:
        return "membership AUC {}", (measured(now.membership_auc),)


@dataclass(frozen=True)
class RetainLoss:
    """Limit: the retain answers' NLL is up by `rise`, a share of what it was before, or nats per token."""

    text: str
    rise: float
    relative: bool
    kind: Literal["limit"] = "limit"
    needs: Literal["retain"] = "retain"

    def gap(self, now: StopEvaluation, start: StopEvaluation) -> float:
        return self._bound(start) - measured(now.retain_nll)

    def describe(self, now: StopEvaluation, start: StopEvaluation) -> Words:
        figures = measured(now.retain_nll), measured(start.retain_nll), self._bound(start)
        return "retain NLL {}, before {}, limit {}", figures

    def _bound(self, start: StopEvaluation) -> float:
        before = measured(start.retain_nll)
        return before + self.rise * (before if self.relative else 1)


def measured(value: float | None) -> float:
    """A figure that the condition needs, and that was therefore measured."""
    assert value is not None
    return value


Condition = ForgetAtHoldout | MembershipCrosses | RetainLoss


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """The conditions of `--stop-when`. Raises UserError for one that does not exist or is given twice."""
    conditions = tuple(_parsed(text) for text in texts)
    if len({type(condition) for condition in conditions}) < len(conditions):
        raise UserError(f"--stop-when {' '.join(texts)}: give each condition once.")
    return conditions


def _parsed(text: str) -> Condition:
    for simple in (ForgetAtHoldout(), MembershipCrosses()):
        if text == simple.text:
            return simple
    if (match := re.fullmatch(r"retain-loss\+(\d+\.?\d*|\.\d+)(%?)", text)) and 0 < float(match[1]) < 1e6:
        relative = match[2] == "%"
        return RetainLoss(text, float(match[1]) / (100 if relative else 1), relative)
    near = difflib.get_close_matches(text, ["forget-at-holdout", "mia-crosses", "retain-loss+10%"], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--stop-when {text}: {hint}Conditions are {SYNTAX} (a share, or nats per token, above 0).")


def holds(condition: Condition, now: StopEvaluation, start: StopEvaluation) -> bool:
    """Whether `condition` is met at `now`; `start` is the evaluation before training."""
    return not condition.gap(now, start) > 0


def held_before(conditions: Sequence[Condition], begun: StopEvaluation, start: StopEvaluation) -> list[Condition]:
    """The goals that were reached before anything was forgotten. begun: what the run, or a stage of it, begins with;
    `start` is the evaluation before training."""
    return [c for c in conditions if c.kind == "goal" and c.gap(begun, start) <= 0]


def held(evaluations: Sequence[StopEvaluation], conditions: Sequence[Condition], patience: int = 1) -> list[Condition]:
    """The conditions for which the run stops now: they hold at each of the last `patience` evaluations."""
    start, *trained = evaluations
    recent = trained[-patience:]
    return [c for c in conditions if len(recent) == patience and all(holds(c, now, start) for now in recent)]


def best(evaluations: Sequence[StopEvaluation], conditions: Sequence[Condition]) -> StopEvaluation | None:
    """The evaluation whose adapter is kept; None while nothing was evaluated after training began.

    Of the adapters within all limits: the one nearest to the goal (the earliest of equally near ones; of two goals the
    first counts), or without a goal the last one. If none is within the limits, the one that lost least.

    evaluations: in the order of their steps; the first is that of step 0.
    """
    start, *trained = evaluations
    if not trained:
        return None
    limits = [condition for condition in conditions if condition.kind == "limit"]
    goals = [condition for condition in conditions if condition.kind == "goal"]
    kept = [now for now in trained if not any(holds(limit, now, start) for limit in limits)]
    if not kept:
        return min(trained, key=lambda now: _or_infinite(-limits[0].gap(now, start)))
    if not goals:
        return kept[-1]
    return min(kept, key=lambda now: _or_infinite(abs(goals[0].gap(now, start))))


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
