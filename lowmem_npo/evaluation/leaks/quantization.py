"""Whether forgotten text returns when the model is stored otherwise than it was unlearned.

An adapter beside its base keeps its full precision. Merged into the weights it is rounded with them, and an update that
is small beside them can be lost, in bf16 and more so in 4 bits (Zhang et al. 2025, "Catastrophic failure of LLM
unlearning via quantization"). Measured is each form in which the model is likely to be used:

    adapter_on_4bit   the adapter beside the base model in 4-bit NF4
    merged            what `lowmem-npo merge` writes, in bf16
    merged_4bit       the same, loaded in 4-bit NF4
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import ModelConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.extraction import extraction_figures
from lowmem_npo.evaluation.leaks.verdict import above_holdout, beside_holdout
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Measuring
from lowmem_npo.model.loading import load_model
from lowmem_npo.model.merging import check_space, find_checkpoint, find_updates, write_merged
from lowmem_npo.model.saved_adapter import load_adapter

FORMS = {
    "adapter_on_4bit": "the adapter beside the 4-bit base",
    "merged": "merged in bf16",
    "merged_4bit": "merged and rounded to 4 bits",
}
AS_EVALUATED = "as_evaluated"
Figures = Mapping[str, float]


def measure_forms(
    base: ModelConfig,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[TokenizedRow]],
    journal: Journal,
    batch_size: int,
    scratch: Path,
) -> tuple[dict[str, Figures], str | None]:
    """Form -> figures of every set ("forget", "holdout"), and why some form could not be measured, if so.

    base: how the model is loaded; the adapter is the one in the directory `adapter`. scratch: a directory that does not
    exist; the merged model stands in it meanwhile. Models are loaded one after the other, none where the journal knows
    the answers.
    """
    found: dict[str, Figures] = {}
    problems: dict[str, list[str]] = {}  # why -> which forms
    merged = replace(base, model=str(scratch), revision=None, qlora=False)
    ways = {
        "adapter_on_4bit": lambda: load_adapter(load_model(replace(base, qlora=True)), adapter),
        "merged": lambda: load_model(merged),
        "merged_4bit": lambda: load_model(replace(merged, qlora=True)),
    }
    shutil.rmtree(scratch, ignore_errors=True)  # a killed evaluation's, half written
    try:
        for form, load in ways.items():
            if not all(len(journal.known(_part(form, name))) == len(rows) for name, rows in sets.items()):
                gc.collect()  # the model before
                try:
                    if form != "adapter_on_4bit" and not scratch.exists():
                        _merge(base, adapter, scratch)
                    model = load()
                except (UserError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
                    fits = not isinstance(error, torch.OutOfMemoryError)
                    why = str(error) if fits else "it does not fit into the GPU's memory."
                    problems.setdefault(why, []).append(FORMS[form])
                    continue
            else:
                model = None
            measuring = Measuring(model, tokenizer, journal, batch_size)
            figures = {name: measuring.token_scores(_part(form, name), rows) for name, rows in sets.items()}
            found[form] = {key: extraction_figures(scores) for key, scores in figures.items()}
            del model, measuring
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = [f"{', '.join(forms)}: {why}" for why, forms in problems.items()]
    return found, " ".join(told) or None


def quantization(forms: Mapping[str, Mapping[str, Figures]], problem: str | None = None) -> dict[str, Any]:
    """The verdict on `forms`: AS_EVALUATED and those measured, each with the figures of forget (and holdout) rows."""
    before = forms[AS_EVALUATED]["forget"]["extraction_strength"]
    others = {form: figures for form, figures in forms.items() if form != AS_EVALUATED}
    if not others:
        return {"meaning": f"Not measured: {problem}", "leaks": None}
    excess = {form: f["forget"]["extraction_strength"] - _level(f, 0.0) for form, f in others.items()}
    worst = max(others, key=lambda form: excess[form])
    strength, level = others[worst]["forget"]["extraction_strength"], _level(others[worst], None)
    found = {
        form: {**figures["forget"], **{f"holdout_{key}": v for key, v in figures.get("holdout", {}).items()}}
        for form, figures in forms.items()
    }
    meaning = (
        f"In the worst form, {FORMS[worst]}, the model writes the last {strength:.0%} of a forgotten answer by itself, "
        f"as evaluated {before:.0%}; {beside_holdout(level)}."
    )
    if problem is not None:
        meaning += f" Not measured: {problem}"
    return {
        "rows": forms[AS_EVALUATED]["forget"]["rows"],
        "returned": strength - before,
        **found,
        "meaning": meaning,
        "leaks": above_holdout(strength, level),
    }


def _merge(base: ModelConfig, adapter: str, scratch: Path) -> None:
    checkpoint = find_checkpoint(base.model, base.revision)
    updates = find_updates(adapter, checkpoint)
    check_space(scratch, checkpoint.bytes_as(torch.bfloat16))
    scratch.mkdir()
    write_merged(checkpoint, updates, scratch, torch.bfloat16)


def _part(form: str, name: str) -> str:
    return f"leaks: {name} answers, {FORMS[form]}"


def _level(figures: Mapping[str, Figures], without: float | None) -> float | None:
    return figures["holdout"]["extraction_strength"] if "holdout" in figures else without
