"""One merge, from its configuration to the merged model. Reads from top to bottom."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowmem_npo.claim import LOCK, check_unclaimed, workspace
from lowmem_npo.commands.merge.findings import findings
from lowmem_npo.commands.merge.measuring import (
    MERGED_INTO,
    RowFigures,
    RunRows,
    as_text,
    better,
    measure,
    rows_of_run,
    still_held,
    survival,
    table,
)
from lowmem_npo.commands.merge.options import AUTO, DEQUANTIZED, WHOLE, MergeConfig
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL, expanded, is_mount_point, put_contents_in_place, put_in_place
from lowmem_npo.model.checkpoint import Checkpoint, find_checkpoint
from lowmem_npo.model.dequantized import DequantizedBase
from lowmem_npo.model.loading import DTYPES as COMPUTE_TYPES
from lowmem_npo.model.merging import Updates, check_space, find_updates, write_merged
from lowmem_npo.model.names import Base
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.report.as_audited import of_another_adapter, of_another_base, recorded_base
from lowmem_npo.report.model_card import Measurements, merged_card
from lowmem_npo.run_directory import RunFiles, check_empty
from lowmem_npo.sizes import amount

DTYPES = {"bf16": torch.bfloat16, "stored": None}


def merge(config: MergeConfig, say: Say = print) -> Path:
    """Writes the merged model, measures it if that is asked for, and reports what is known of forgotten text returning.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    name, revision = recorded_base(config.adapter, config.model, config.revision, config.any_base, say)
    out = Path(os.path.realpath(expanded(config.output_dir)))  # the merged model is not renamed onto a link
    mounted = is_mount_point(out)
    partial = out / f"merged{PARTIAL}" if mounted else out.with_name(out.name + PARTIAL)  # until it is complete
    if partial.exists():
        with workspace(partial, say):  # removes what a killed merge has left, be it of one that was complete
            pass
    check_empty(out)
    check_unclaimed(out)
    (out / LOCK).unlink(missing_ok=True)  # of a killed process; nothing can be renamed onto a directory that holds it
    checkpoint = find_checkpoint(name, revision)
    updates = find_updates(config.adapter, checkpoint)
    dtype = DTYPES[config.dtype]
    plan = _plan(config, name, revision)
    needed = checkpoint.bytes_as(dtype)
    check_space(out, needed * len(plan.bases))
    if plan.choose:
        say(
            "The adapter was trained on the 4-bit base: it is merged into the whole and into the dequantised weights, "
            "and both are measured. --base-weights whole, or dequantized, leaves that out."
        )
    with workspace(partial, say):
        for base in plan.bases:
            (partial / base).mkdir()
            _write(config, checkpoint, updates, partial / base, base)
        chosen = _measure(plan, partial)
        adapter = expanded(config.adapter)
        onto = Base.here(name, revision, of_adapter=not config.any_base)
        other = of_another_adapter(adapter) or of_another_base(adapter, onto)
        known, published = findings(
            config.adapter, chosen, onto, lasts=other is None, rounded=plan.rounded, base=_base_named(config)
        )
        kind = "as the base's" if dtype is None else config.dtype
        weights = f"{kind}, on the base's NF4 weights, dequantised" if chosen == DEQUANTIZED else kind
        card = merged_card(adapter, name, revision, weights, published, other, plan.measurements)
        RunFiles(partial / chosen).model_card.write_text(card, encoding="utf-8")
        if mounted:
            put_contents_in_place(partial / chosen, out, last="config.json")  # without which it is no model
        else:
            put_in_place(partial / chosen, out)
    changed = f"{len(updates)} of {sum(1 for _ in checkpoint.tensors())} weights"
    say(f"The adapter changes {changed}; the merged model ({amount(needed)}) is in {out}.")
    if plan.rows is not None and plan.measured:
        say("\n" + as_text(plan.rows, plan.measured))
    for sentence in filter(None, [other, *plan.sentences, *known]):
        say(sentence)
    return out


@dataclass
class Plan:
    """What is merged into which base weights, and what is measured of it.

    bases: the last of them is kept unless a measurement says otherwise. rows: those measured, if any. measured: what
    weights are called -> their figures. rounded: whether those in 4 bits are among them. sentences: what these say.
    """

    bases: list[str]
    rows: RunRows | None = None
    choose: bool = False
    four_bits: bool = False
    measured: dict[str, RowFigures] = field(default_factory=dict)
    rounded: bool = False
    sentences: list[str] = field(default_factory=list)

    @property
    def measurements(self) -> Measurements | None:
        """For the model card."""
        if self.rows is None or not self.measured:
            return None
        counts = ", ".join(f"{len(rows)} {part} rows" for part, rows in self.rows.sets.items())
        return Measurements(*table(self.rows, self.measured), counts, self.sentences)


def _plan(config: MergeConfig, name: str, revision: str | None) -> Plan:
    """Raises UserError for base weights that the adapter was not fitted to, and where --quantize-check lacks rows."""
    run = settings_of_run(config.adapter)
    qlora = bool(run.get("qlora"))
    if config.base_weights == DEQUANTIZED and run and not qlora:
        raise UserError("--base-weights dequantized: the adapter was trained on whole weights, not with --qlora.")
    kept = WHOLE if config.base_weights == AUTO else config.base_weights
    compared = qlora and (config.base_weights == AUTO or config.quantize_check)
    if not (compared or config.quantize_check):
        return Plan([kept])
    try:
        rows = rows_of_run(config, name, revision)
    except UserError as error:
        if config.quantize_check:
            raise UserError(f"--quantize-check measures the rows of the adapter's run: {error}") from error
        return Plan([kept], sentences=[_not_compared(str(error))])
    bases = [base for base in MERGED_INTO if base != kept] if compared else []
    return Plan(
        [*bases, kept], rows, choose=bool(bases) and config.base_weights == AUTO, four_bits=config.quantize_check
    )


def _write(config: MergeConfig, checkpoint: Checkpoint, updates: Updates, out: Path, base: str) -> None:
    if base == WHOLE:
        return write_merged(checkpoint, updates, out, DTYPES[config.dtype])
    run = settings_of_run(config.adapter)
    compute, double_quant = COMPUTE_TYPES[run.get("dtype", "bf16")], run.get("double_quant") != "off"
    rounded = DequantizedBase.of(checkpoint, compute, double_quant)
    write_merged(checkpoint, updates, out, DTYPES[config.dtype], rounded)


def _measure(plan: Plan, partial: Path) -> str:
    """Measures what the plan says, and returns which base weights are kept."""
    kept = plan.bases[-1]
    if plan.rows is None:
        return kept
    try:
        forms = {base: measure(partial / base, plan.rows) for base in plan.bases}
        plan.measured |= {MERGED_INTO[base]: forms[base] for base in MERGED_INTO if base in forms}
        if len(forms) > 1:
            best, sentence = better(forms, plan.rows.before)
            kept = best if plan.choose else kept
            plan.sentences.append(sentence + (" That is what was written." if kept == best else ""))
        if (warning := still_held(forms[kept], plan.rows.before, plan.rows.after)) is not None:
            plan.sentences.append(warning)
    except UserError as error:
        why = str(error).rstrip(".")
        plan.sentences.append(_not_compared(why) if plan.choose and kept == WHOLE else f"Not measured: {why}.")
        return kept
    if plan.four_bits:
        try:
            rounded = measure(partial / kept, plan.rows, four_bits=True)
            plan.measured[f"{MERGED_INTO[kept]}, then 4-bit"] = rounded
            plan.rounded = True
            plan.sentences.append(survival(forms[kept], rounded, plan.rows.before, plan.rows.after))
        except UserError as error:
            plan.sentences.append(f"Not measured in 4 bits: {str(error).rstrip('.')}.")
    return kept


def _base_named(config: MergeConfig) -> list[str]:
    """The options that name the base, as `evaluate` takes them, too."""
    named = {"--model": config.model, "--revision": config.revision}
    words = [word for option, value in named.items() if value is not None for word in (option, value)]
    return [*words, *(["--any-base"] if config.any_base else [])]


def _not_compared(why: str) -> str:
    return f"Not measured, so merged into the whole weights, although it was trained on 4-bit ones: {why.rstrip('.')}."
