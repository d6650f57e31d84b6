"""Whether what a model says in place of a forgotten answer is still language: how likely the original model finds it.

The answers are greedy ones of the model that has forgotten; their NLL is the original's, the adapter off. Gibberish is
what the original would never write. The same figure of answers to retain rows is what to compare with, and no figure
says whether an answer is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from peft import PeftModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.fit import Fit
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.model.adapters import original_model
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.sizes import counted

Said = tuple[Sequence[int], Sequence[int]]
"""A prompt and what the model wrote after it, as ids: a text does not tell of what tokens it was."""


def fluency(scorer: Scorer, name: str, said: Sequence[Said]) -> dict[str, Any] | None:
    """The figures of the set `name`; None for a model without an adapter, whose original is not at hand.

    rows: answers that were measured. silent: answers without a token. nll: the mean over rows of the mean NLL per token
    under the original model, in nats, the end of the answer not counted; None where all are silent.
    """
    if not said or not isinstance(scorer.model, PeftModel):
        return None
    positions = Fit.of(causal_lm(scorer.model)).positions
    rows = []
    for prompt, answer in said:
        ids = [*prompt, *answer][:positions]  # the last token is written beyond them where a model has learnt so many
        if len(ids) > max(1, len(prompt)):
            rows.append(TokenizedRow(input_ids=ids, labels=ids, prompt_length=len(prompt)))
    with original_model(scorer.model):
        nll = scorer.nll(f"{name}: what was written, to the original model", rows)
    silent = sum(not answer for _, answer in said)
    return {"rows": len(rows), "silent": silent, "nll": fmean(nll) if nll else None}


def fluency_text(figures: dict[str, dict[str, Any]]) -> str:
    """A line for each set."""
    lines = []
    for name, of_set in figures.items():
        silent = f", {of_set['silent']} empty" if of_set["silent"] else ""
        nll = "–" if of_set["nll"] is None else f"{of_set['nll']:.3f}"
        lines.append(f"{name}: NLL {nll} per token ({counted(of_set['rows'], 'answer')}{silent})")
    return "\n".join(lines)
