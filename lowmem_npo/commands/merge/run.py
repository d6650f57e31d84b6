"""One merge, from its configuration to the merged model. Reads from top to bottom."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import is_of_adapter
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.evaluation.leaks.quantization import MERGED, QUANTIZATION
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.merging import check_space, find_updates, write_merged
from lowmem_npo.model.saved_adapter import resolve_base, settings_of_run
from lowmem_npo.report.model_card import merged_card
from lowmem_npo.run_directory import RunFiles, check_empty

DTYPES = {"bf16": torch.bfloat16, "stored": None}


def merge(config: MergeConfig, say: Say = print) -> Path:
    """Writes the merged model, and reports what is known of forgotten text returning in it.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    name, revision = resolve_base(config.adapter, config.model, config.revision, config.any_base, say)
    out = Path(config.output_dir).expanduser().absolute()
    check_empty(out)
    checkpoint = find_checkpoint(name, revision)
    updates = find_updates(config.adapter, checkpoint)
    dtype = DTYPES[config.dtype]
    needed = checkpoint.bytes_as(dtype)
    check_space(out, needed)
    partial = out.with_name(out.name + ".partial")  # under another name until it is complete
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"'{partial}' is in the way, perhaps left by an interrupted merge: remove it.") from error
    except OSError as error:
        raise UserError(f"--output-dir '{out}' cannot be written: {error.strerror}.") from error
    try:
        write_merged(checkpoint, updates, partial, dtype)
        finding, weights = return_of_text(config.adapter), "as the base's" if dtype is None else config.dtype
        adapter = Path(config.adapter).expanduser()
        card = merged_card(adapter, name, revision, weights, finding.replace(config.adapter, adapter.resolve().name))
        RunFiles(partial).model_card.write_text(card, encoding="utf-8")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    changed = f"{len(updates)} of {sum(1 for _ in checkpoint.tensors())} weights"
    say(f"The adapter changes {changed}; the merged model ({needed / 2**20:,.1f} MiB) is in {out}.")
    say(finding)
    return out


def return_of_text(adapter: str) -> str:
    """What the adapter's evaluation says about forgotten text returning in merged weights, or how to find out.

    Rounding can undo an update that is small beside the weights (Zhang et al. 2025, "Catastrophic failure of LLM
    unlearning via quantization"); the adapter by itself is not rounded.
    """
    files = RunFiles(Path(adapter).expanduser())
    how = f"`lowmem-npo evaluate --adapter {adapter} --forget … --leaks quantization` checks it"
    if settings_of_run(adapter).get("qlora"):
        how += "; this adapter was trained on the 4-bit base, but is merged into the unquantised one"
    evaluation = files.evaluation
    try:
        leaks = json.loads(evaluation.result.read_text(encoding="utf-8"))["leaks"]
        result = LeakResult.from_json(leaks[QUANTIZATION.name])
        of_this_adapter = is_of_adapter(evaluation, files.weights)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"Not checked: whether forgotten text returns when the adapter is rounded with the weights. {how}."
    if not of_this_adapter:
        return f"Not checked: the evaluation in '{evaluation.path}' is of an earlier state of this adapter. {how}."
    if MERGED not in result.figures:
        return f"Not checked: the evaluation measured no merged weights. {how}."
    return f"{'WARNING' if result.leaks else 'Checked'}, {result.verdict.words}: {result.meaning}"
