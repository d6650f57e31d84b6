"""Whether what was forgotten comes back when a small part of it is taught again (Hu et al. 2024, Lynch et al. 2024).

Some forget rows are shown to the model for a few steps of fine-tuning, through an adapter of its own that is thrown
away afterwards; the model's weights and its adapter are not touched. Then the REST of the forget rows is asked for.
What such steps teach anyhow, the manner of the answers, they teach about the holdout as well: only what the rest gains
beyond it was still there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lowmem_kernels import token_logprobs
from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.leaks.extraction import extraction_figures
from lowmem_npo.evaluation.leaks.verdict import above_holdout, beside_holdout
from lowmem_npo.evaluation.scoring.eval_mode import progress_bar
from lowmem_npo.evaluation.scoring.likelihood import right_padded
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.adapters import extra_adapter

LOOKS = 4  # how often the rest is asked for on the way


@dataclass(frozen=True)
class Relearning:
    """How much is taught again, and how. Few steps at a high rate: what is new to a model is not learnt by them."""

    share: float = 0.2
    steps: int = 20
    lr: float = 1e-3
    batch_size: int = 4
    rank: int = 16


def relearning(
    model: PreTrainedModel | PeftModel,
    forget: Sequence[TokenizedRow],
    holdout: Sequence[TokenizedRow] | None,
    settings: Relearning,
    *,
    seed: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Figures of the rest of the forget rows (and of the holdout) after 0, some, and all steps.

    `recovered` is how much of the way from the forgotten state back to the original model's extraction strength was
    covered; only for a model with an adapter, which can be switched off. `forget` must hold two rows at least.
    """
    shown, rest = split(len(forget), settings.share, seed)
    rest_rows = [forget[i] for i in rest]

    def look() -> dict[str, float]:
        def figures(rows: Sequence[TokenizedRow]) -> dict[str, float]:
            return extraction_figures(token_scores(model, rows, batch_size=batch_size, progress=False))

        found = figures(rest_rows)
        if holdout:
            found |= {f"holdout_{name}": value for name, value in figures(holdout).items() if name != "rows"}
        return found

    original = None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            original = extraction_figures(token_scores(model, rest_rows, batch_size=batch_size, progress=False))
    curve = {0: look()}
    looks = {max(1, round(settings.steps * (n + 1) / LOOKS)) for n in range(LOOKS)}
    with extra_adapter(model, settings.rank, seed):
        for step in _fine_tune(model, [forget[i] for i in shown], settings, seed, progress):
            if step in looks:
                curve[step] = look()
    return _told(len(shown), curve, original)


def split(rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which rows are shown again (one at least), and which are the rest (one at least)."""
    count = min(rows - 1, max(1, round(share * rows)))
    shown = sorted(random.Random(seed).sample(range(rows), count))
    return shown, [i for i in range(rows) if i not in set(shown)]


def _told(shown: int, curve: dict[int, dict[str, float]], original: dict[str, float] | None) -> dict[str, Any]:
    steps, before, after = max(curve), curve[0], curve[max(curve)]
    found: dict[str, Any] = {"shown_rows": shown, "steps": steps, "before": before, **after}
    if original is not None:
        found["original"] = original
        lost = original["extraction_strength"] - before["extraction_strength"]
        if lost > 0:
            found["recovered"] = (after["extraction_strength"] - before["extraction_strength"]) / lost
    found["curve"] = {str(step): figures for step, figures in curve.items()}
    strength, level = after["extraction_strength"], after.get("holdout_extraction_strength")
    meaning = (
        f"After {steps} steps on {shown} of the forgotten rows the model writes the last {strength:.0%} of the other "
        f"{after['rows']} answers by itself, before them {before['extraction_strength']:.0%}; {beside_holdout(level)}."
    )
    return {**found, "meaning": meaning, "leaks": above_holdout(strength, level)}


def _fine_tune(
    model: PreTrainedModel | PeftModel, rows: Sequence[TokenizedRow], settings: Relearning, seed: int, progress: bool
) -> Iterator[int]:
    """Minimises the mean NLL of the answers' tokens; yields the number of steps done after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    head, order = frozen_head(model), _shuffled(len(rows), random.Random(seed))
    with progress_bar(settings.steps, "leaks: relearning, steps", progress) as bar:
        for step in range(1, settings.steps + 1):
            batch = [rows[next(order)] for _ in range(min(settings.batch_size, len(rows)))]
            with _recomputing(model):
                answers = answer_hidden(model, *(tensor.to(model.device) for tensor in right_padded(batch)))
                loss = -token_logprobs(answers.hidden, head, answers.targets).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            yield step


def _shuffled(rows: int, shuffle: random.Random) -> Iterator[int]:
    while True:
        yield from shuffle.sample(range(rows), rows)


@contextmanager
def _recomputing(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Activation checkpointing, where the architecture has it, with dropout off."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    was_on = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    training = [module for module in model.modules() if module.training]
    model.eval()
    if lm.supports_gradient_checkpointing and not was_on:
        enable_checkpointing(lm)
    for module in lm.modules():  # transformers checkpoints only what is in training mode
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
    try:
        yield
    finally:
        if lm.supports_gradient_checkpointing and not was_on:
            _switch_off(lm)
        model.eval()
        for module in training:
            module.training = True


def _switch_off(lm: PreTrainedModel) -> None:
    switch: Callable[[], None] = getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)
    switch()
