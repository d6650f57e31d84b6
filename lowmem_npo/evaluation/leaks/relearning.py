"""Whether what was forgotten comes back when a small part of it is taught again (Hu et al. 2024, Lynch et al. 2024).

Some forget rows are shown to the model for a few steps of fine-tuning, through an adapter of its own that is thrown
away afterwards; the model's weights and its adapter are not touched. Then the REST of the forget rows is measured.
What such steps teach anyhow, the manner of the answers, they teach about the holdout as well: only what the rest gains
beyond it was still there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Interval

from lowmem_npo.evaluation.leaks.contract import (
    HOLDOUT,
    LeakResult,
    LeakTest,
    Meaning,
    Need,
    Subject,
    above_holdout,
    as_holdout,
    beside_holdout,
)
from lowmem_npo.evaluation.leaks.extraction import FIGURES, extraction_figures
from lowmem_npo.evaluation.options import Options
from lowmem_npo.ranges import Count, Positive

MEASUREMENTS = 4  # how often the rest is measured on the way
BATCH_SIZE = 4
RANK = 16

TWO_ROWS = Need(
    lambda subject: len(subject.forget) < 2,
    "it teaches one part of the forget rows again and asks for the rest, and there is only one row",
)

Figures = dict[str, float]


@dataclass
class RelearningOptions(Options):
    """How much is taught again, and how. Few steps at a high rate: what is new to a model is not learnt by them."""

    relearn_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of the forget rows that --leaks relearning teaches again before it asks for the others."""
    relearn_steps: Count = 20
    """Fine-tuning steps of --leaks relearning, each on four rows."""
    relearn_lr: Positive = 1e-3
    """Learning rate of --leaks relearning."""


class Relearning(LeakTest[RelearningOptions]):
    name = "relearning"
    summary = "`extraction` of the other rows after some steps of fine-tuning on a part of them"
    in_words = "teaching the model some of the examples again, and letting it complete the others"
    needs = (TWO_ROWS,)
    options = RelearningOptions
    counts = ("rows", "holdout_rows", "shown_rows", "steps")
    unlisted = ("curve",)
    main = "extraction_strength"
    figures = FIGURES | {
        "recovered": Meaning(
            "recovered",
            "How much of the way back to the original model's extraction strength was covered. Near 0 is good.",
            "lower",
        )
    }
    after_only = True

    def run(self, subject: Subject, options: RelearningOptions) -> LeakResult:
        journal = subject.scorer.journal
        part = "leaks: relearning, with a holdout" if subject.holdout else "leaks: relearning"
        if 0 not in journal.known(part):
            journal.write(part, [0], [relearn(subject, options).to_json()])
        return LeakResult.from_json(journal.known(part)[0])


RELEARNING = Relearning()


def relearn(subject: Subject, options: RelearningOptions) -> LeakResult:
    """Figures of the rest of the forget rows (and of the holdout) after 0, some, and all steps.

    `recovered` is how much of the way from the forgotten state back to the original model's extraction strength was
    covered; only for a model with an adapter, which can be switched off.
    """
    from peft import PeftModel

    from lowmem_npo.evaluation.leaks.fine_tuning import fine_tune
    from lowmem_npo.evaluation.scoring.token_scores import token_scores
    from lowmem_npo.model.adapters import extra_adapter, original_model

    scorer, seed = subject.scorer, subject.seed
    model = scorer.loaded_model
    shown, rest = split(len(subject.forget), options.relearn_share, seed)
    rest_rows = [subject.forget[i] for i in rest]

    def figures_of(rows: Any) -> Figures:
        return extraction_figures(token_scores(model, rows, batch_size=scorer.batch_size, progress=False))

    def measure() -> Figures:
        return figures_of(rest_rows) | (as_holdout(figures_of(subject.holdout)) if subject.holdout else {})

    original = None
    if isinstance(model, PeftModel):
        with original_model(model):
            original = figures_of(rest_rows)
    curve = {0: measure()}
    measured_after = {max(1, round(options.relearn_steps * (n + 1) / MEASUREMENTS)) for n in range(MEASUREMENTS)}
    with extra_adapter(model, RANK, seed):
        for step in fine_tune(
            model,
            [subject.forget[i] for i in shown],
            steps=options.relearn_steps,
            lr=options.relearn_lr,
            batch_size=BATCH_SIZE,
            seed=seed,
            progress=scorer.journal.progress,
        ):
            if step in measured_after:
                curve[step] = measure()
    return judge(len(shown), curve, original)


def split(rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which rows are shown again (one at least), and which are the rest (one at least)."""
    count = min(rows - 1, max(1, round(share * rows)))
    shown = sorted(random.Random(seed).sample(range(rows), count))
    return shown, [i for i in range(rows) if i not in set(shown)]


def judge(shown: int, curve: dict[int, Figures], original: Figures | None) -> LeakResult:
    """curve: steps -> figures of the rows that were not shown. original: those of the model before it forgot."""
    steps = max(curve)
    before, after = curve[0], curve[steps]
    figures: dict[str, Any] = {"shown_rows": shown, "steps": steps, "before": before, **after}
    if original is not None:
        figures["original"] = original
        lost = original["extraction_strength"] - before["extraction_strength"]
        if lost > 0:
            figures["recovered"] = (after["extraction_strength"] - before["extraction_strength"]) / lost
    figures["curve"] = {str(step): at_step for step, at_step in curve.items()}
    strength, level = after["extraction_strength"], after.get(HOLDOUT + "extraction_strength")
    taught = None if level is not None or original is None else original["extraction_strength"]
    own, beside = beside_holdout(strength, level, taught)
    meaning = (
        f"After {steps} steps on {shown} of the forgotten rows the model writes the last {own} of the other "
        f"{after['rows']} answers by itself, before them {before['extraction_strength']:.0%}; {beside}."
    )
    leaks = above_holdout(strength, level, taught)
    return LeakResult(figures, meaning, leaks, against_before=taught is not None)
