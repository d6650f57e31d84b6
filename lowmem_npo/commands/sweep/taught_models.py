"""The models of --teach: one that was taught forget and retain rows, and the gold model, taught retain rows alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_npo.commands.sweep.figures import GOLD
from lowmem_npo.commands.sweep.options import TeachingOptions
from lowmem_npo.commands.train.plan import Inputs
from lowmem_npo.config import AdapterConfig, RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.self_written import self_rows
from lowmem_npo.errors import UserError
from lowmem_npo.files import shortage
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.memory.release import release_memory
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, load_tokenizer, resolve_name
from lowmem_npo.model.adapters import adapter_size, check_lora
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.loading import DTYPES, quantization_of, resolve_device
from lowmem_npo.model.merging import find_updates, write_merged
from lowmem_npo.model.names import Base
from lowmem_npo.sizes import amount, compared
from lowmem_npo.training.reference.identity import rows_fingerprint
from lowmem_npo.training.teaching import made_from, making, teach

TAUGHT = "taught"  # its directory in that of the sweep, beside GOLD
ADAPTER = AdapterConfig(lora_r=64, lora_alpha=64, lora_targets=("all-linear",))
FULL_BYTES = 16  # per weight, float32: the weight, its gradient, AdamW's two moments


def lessons(inputs: Inputs) -> dict[str, list[TokenizedRow]]:
    """Model -> the rows that it is taught; the holdout is in none."""
    data = inputs.data
    assert data.retain is not None, "checked by `check_teaching`"
    return {TAUGHT: [*data.forget, *data.retain], GOLD: [*data.retain]}


def check_teaching(config: RunConfig, how: TeachingOptions, inputs: Inputs, root: Path) -> str:
    """What will be taught and what that takes, in a sentence.

    Raises:
        UserError: nothing to teach the gold model, other models in `root`, or not enough memory or disk.
    """
    if inputs.data.retain is None or self_rows(config.data.retain) is not None:
        raise UserError("--teach teaches forget and retain rows: name those to keep with --retain.")
    weights, needed = _memory(config, how, inputs.model_config)
    sizes = {name: len(rows) for name, rows in lessons(inputs).items()}
    sentence = (
        f"{how.teach} fine-tuning, {how.teach_epochs} epochs: {TAUGHT} on {sizes[TAUGHT]} rows (forget and retain), "
        f"{GOLD} on {sizes[GOLD]} (retain). Takes at least {amount(needed)} of memory, activations not counted"
    )
    missing = [name for name in sizes if not _is_made(root / name, _recipe(config, how, inputs, name))]
    if not missing:
        return f"{sentence}; both are there already."
    device = resolve_device(config.model.device)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        other = "" if how.teach == "lora" else "; --teach lora takes less"
        where = "GPU" if device.type == "cuda" else "machine"
        takes, has = compared(needed, available)
        raise UserError(f"--teach {how.teach} takes at least {takes}, and the {where} has {has} free{other}.")
    on_disk = len(missing) * weights * DTYPES[config.model.dtype].itemsize + 64 * 2**20
    if short := shortage(root, on_disk):
        takes, has = short
        raise UserError(
            f"The disk of --output-dir '{root}' has {has} free, the models of --teach take {takes}: free some, or "
            "choose another --output-dir."
        )
    return sentence + "."


def teach_models(config: RunConfig, how: TeachingOptions, inputs: Inputs, root: Path, say: Say) -> None:
    """Makes both models, each unless it is there already.

    Raises:
        UserError: one of them was made from something else.
    """
    for name, rows in lessons(inputs).items():
        recipe = _recipe(config, how, inputs, name)
        if _is_made(root / name, recipe):
            say(f"{name}: taught before")
            continue
        say(f"{name}: {how.teach} fine-tuning on {len(rows)} rows, {how.teach_epochs} epochs")
        make = _taught_whole if how.teach == "full" else _taught_lora
        with making(root / name, recipe) as partial:
            nll = make(config, how, rows, partial, name)
        release_memory()  # of the model, before the next one is loaded
        say(f"    NLL {nll:.3f} in the last epoch; saved in {root / name}")


def _recipe(config: RunConfig, how: TeachingOptions, inputs: Inputs, name: str) -> dict[str, Any]:
    """All that the model depends on."""
    base = config.model
    here = Base.here(resolve_name(base.model, base.revision), base.revision)
    recipe: dict[str, Any] = {"model": here.name, "weights": here.weights, "revision": base.revision}
    recipe |= {"teach": how.teach, "epochs": how.teach_epochs, "lr": how.lr, "batch_size": how.teach_batch_size}
    recipe |= {"seed": config.training.seed, "dtype": base.dtype, "qlora": base.qlora and how.teach == "lora"}
    return recipe | {"rows": rows_fingerprint(lessons(inputs)[name])}


def _is_made(directory: Path, recipe: dict[str, Any]) -> bool:
    earlier = made_from(directory)
    if earlier is None:
        return False
    changed = [key for key, value in recipe.items() if earlier.get(key) != value and key not in ("model", "weights")]
    then, now = (Base(of.get("model"), of.get("weights")) for of in (earlier, recipe))
    if changed := (["model"] if now.is_other_than(then) else []) + changed:
        raise UserError(
            f"--teach: the model in '{directory}' was made with other settings ({', '.join(changed)}): use those, or "
            "another --output-dir."
        )
    return True


def _memory(config: RunConfig, how: TeachingOptions, architecture: PretrainedConfig) -> tuple[int, int]:
    """How many weights the model has, and the bytes that teaching takes at least: all but activations."""
    if how.teach == "full":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
        weights = sum(parameter.numel() for parameter in model.parameters())
        return weights, FULL_BYTES * weights
    quantized = quantization_of(architecture, config.model) is not None
    adapted = check_lora(architecture, ADAPTER, quantized)
    trained, _ = adapter_size(adapted)
    weights = sum(parameter.numel() for parameter in adapted.parameters()) - trained
    per_weight = 0.5 if quantized else DTYPES[config.model.dtype].itemsize
    return weights, int(per_weight * weights) + FULL_BYTES * trained


def _taught_whole(
    config: RunConfig, how: TeachingOptions, rows: Sequence[TokenizedRow], into: Path, name: str
) -> float:
    """All weights, in float32; saved in the type of the runs."""
    model: PreTrainedModel = load_model(
        replace(config.model, dtype="float32", qlora=False, quantized_cache=None), silent
    )
    model.requires_grad_(True)
    if config.memory.recomputes_layers:
        enable_checkpointing(model)
    nll = _teach(model, config, how, rows, name)
    cast(Any, model).to(DTYPES[config.model.dtype]).save_pretrained(into)
    load_tokenizer(config.model).save_pretrained(into)
    return nll


def _taught_lora(config: RunConfig, how: TeachingOptions, rows: Sequence[TokenizedRow], into: Path, name: str) -> float:
    """A LoRA on the base as the runs load it, merged into the unquantised weights."""
    model = attach_lora(load_model(config.model, silent), ADAPTER)
    apply_switches(model, config.memory)
    nll = _teach(model, config, how, rows, name)
    adapter = into / "adapter"
    model.save_pretrained(str(adapter))
    del model
    release_memory()
    checkpoint = find_checkpoint(resolve_name(config.model.model, config.model.revision), config.model.revision)
    write_merged(checkpoint, find_updates(str(adapter), checkpoint), into, DTYPES[config.model.dtype])
    shutil.rmtree(adapter)
    return nll


def _teach(model: Any, config: RunConfig, how: TeachingOptions, rows: Sequence[TokenizedRow], name: str) -> float:
    return teach(
        model,
        rows,
        epochs=how.teach_epochs,
        batch_size=how.teach_batch_size,
        lr=how.lr,
        seed=config.training.seed,
        description=f"    teaching {name}",
        micro_batch_size=config.training.micro_batch_size or config.training.batch_size,
        dtype=DTYPES[config.model.dtype],
    )
