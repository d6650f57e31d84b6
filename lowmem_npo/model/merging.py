"""An adapter merged into its base model's weights, one shard of the checkpoint at a time, on the CPU.

    W' = W + scale * B A        scale = alpha / r  (rank-stabilised LoRA: alpha / sqrt(r))
    W' = m / ‖W + scale * B A‖ * (W + scale * B A)      DoRA, with a norm and a magnitude for each output
    W' = the trained weight                             of modules that were trained whole (modules_to_save)

PEFT computes the product from the factors, on a model without weights; transformers renames and splits it as it does
the model's own weights (a layer's experts are one parameter, but many tensors of a checkpoint). Product and sum are
float32 and rounded once, to the type the weights are stored in; PEFT's `merge_and_unload` needs the whole model in
memory, and rounds twice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded, shortage
from lowmem_npo.model.adapters import adapted_weight, shared_layers
from lowmem_npo.model.checkpoint import BESIDE_WEIGHTS, INDEX, OLD_INDEX, Checkpoint, read_json
from lowmem_npo.model.layers import PEFT_PREFIX, adapted_layer
from lowmem_npo.model.saved_adapter import check_finite, check_stored_patterns, more_than_lora, stored_lora
from lowmem_npo.progress import Progress
from lowmem_npo.run_directory import AdapterFiles


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one tensor of a checkpoint."""

    model: PreTrainedModel  # without weights
    layer: LoraLayer  # with its factors
    parameter: str  # of the model, to which the layer's product is added
    part: str | None  # the tensor as transformers names it, if it is a part of the parameter

    def applied_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` + scale * B A, rescaled by DoRA, rounded once, to `dtype`."""
        update = (
            _product(self.layer) if self.part is None else _parts(self.model, self.parameter, self.layer)[self.part]
        )
        return _rescaled(update + weight, self.layer).to(dtype)


@dataclass(frozen=True)
class Replacement:
    """What an adapter has in place of one tensor of a checkpoint."""

    model: PreTrainedModel  # without weights
    file: Path
    name: str  # of the trained weight in the file
    parameter: str  # of the model, whose value it is
    part: str | None  # the tensor as transformers names it, if it is a part of the parameter

    def applied_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The trained weight, in `dtype`, in place of `weight`."""
        with safe_open(self.file, framework="pt") as file:
            trained = file.get_tensor(self.name)
        if self.part is not None:
            trained = revert_weight_conversion(self.model, {self.parameter: trained})[self.part]
        return trained.to(dtype)


Updates = dict[str, Update | Replacement]


@torch.no_grad()
def _product(layer: LoraLayer) -> Tensor:
    own: Any = layer
    with mock.patch.object(own, "get_param", lambda: torch.empty(0), create=True):  # experts ask for device and type
        return own.get_delta_weight("default")


@torch.no_grad()
def _rescaled(merged: Tensor, layer: Any) -> Tensor:
    """DoRA's magnitudes in place of the norms of `merged`, if `layer` has any."""
    if not layer.lora_magnitude_vector:
        return merged
    magnitude = layer.lora_magnitude_vector["default"]
    norm = magnitude.get_weight_norm(merged, merged.new_zeros(()), scaling=1)
    outputs_last = isinstance(layer.get_base_layer(), nn.Embedding) or getattr(layer, "fan_in_fan_out", False)
    shape = [-1 if dim == (merged.ndim - 1 if outputs_last else 0) else 1 for dim in range(merged.ndim)]
    return merged * (magnitude.weight / norm).reshape(shape)


@lru_cache(maxsize=2)  # the two parameters of a layer's experts, whose tensors alternate in the checkpoint
def _parts(model: PreTrainedModel, parameter: str, layer: LoraLayer) -> dict[str, Tensor]:
    return revert_weight_conversion(model, {parameter: _product(layer)})


def find_updates(adapter: str, checkpoint: Checkpoint) -> Updates:
    """Tensor of the checkpoint -> what the adapter in the directory `adapter` does to it.

    Raises UserError for an adapter that holds what cannot be merged tensor by tensor, or does not fit.
    """
    config, stored = _lora_config(adapter), checkpoint.stored()
    check_finite(adapter)
    misfit = f"The adapter in '{adapter}' does not fit"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.configuration(), dtype=torch.float32)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        check_stored_patterns(adapter, model)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # no layer of its names
            raise UserError(f"{misfit}: {one_line(error, 200)}.") from error
    layers: dict[str, Any] = {}
    wholes: dict[str, Tensor] = {}
    for name, module in adapted.named_modules():
        own = name.removeprefix(PEFT_PREFIX)
        if isinstance(module, LoraLayer):
            layers[own] = module
        elif isinstance(module, ModulesToSaveWrapper):
            wholes |= {f"{own}.{part}": weight for part, weight in module.original_module.named_parameters()}
    if shared := shared_layers(adapted):
        raise UserError(f"The adapter in '{adapter}' changes {shared[0]}, which the base shares with another layer.")
    _give_factors(adapted, adapter, checkpoint, wholes, misfit)

    def stored_parts(parameter: str, like: Tensor) -> Iterator[tuple[str, str | None]]:
        """The tensors of the checkpoint that `parameter` is stored in, and which part of it each is."""
        whole = checkpoint.name_of(parameter)
        parts = {parameter: like} if whole else revert_weight_conversion(model, {parameter: like})
        for part, of_shape in parts.items():
            tensor = checkpoint.name_of(part)
            if tensor is None:
                raise UserError(f"The adapter in '{adapter}' changes {parameter}, but the base has no {part}.")
            if stored[tensor][0] != of_shape.shape:
                raise UserError(f"{misfit}: {tensor} is {stored[tensor][0]} in the base, not {tuple(of_shape.shape)}.")
            yield tensor, None if whole else part

    updates: Updates = {}
    for layer in layers.values():
        weight: Tensor = adapted_weight(layer)
        parts = dict(stored_parts(names[id(weight)], weight))
        if len(parts) > 1 and layer.lora_magnitude_vector:  # whose norms are of the whole
            raise UserError(
                f"The adapter in '{adapter}' has DoRA magnitudes of {names[id(weight)]}, which the base stores in "
                "parts: use PEFT's merge_and_unload."
            )
        updates |= {tensor: Update(model, layer, names[id(weight)], part) for tensor, part in parts.items()}
    file = AdapterFiles(expanded(adapter)).weights
    for parameter, weight in wholes.items():
        for tensor, part in stored_parts(parameter, weight):
            updates[tensor] = Replacement(model, file, f"{PEFT_PREFIX}{parameter}", parameter, part)
    return updates


def _give_factors(
    adapted: PeftModel, adapter: str, checkpoint: Checkpoint, wholes: Mapping[str, Tensor], misfit: str
) -> None:
    """Puts the adapter's factors in place of those without data; checks that all of `wholes` are there."""
    with safe_open(AdapterFiles(expanded(adapter)).weights, framework="pt") as file:
        stored = {name.removeprefix(PEFT_PREFIX): name for name in file.keys()}  # noqa: SIM118
        for parameter, like in wholes.items():
            if parameter not in stored:
                raise UserError(f"The adapter in '{adapter}' is not whole: it lacks {parameter}.")
            shape = tuple(file.get_slice(stored.pop(parameter)).get_shape())
            if shape != like.shape:
                raise UserError(f"{misfit}: {parameter} is {tuple(like.shape)} in the base, not {shape}.")
        weights = {name: file.get_tensor(name) for name in stored.values()}
    factors = {}
    for name in [name for name in weights if ".lora_" in name]:
        factor = re.sub(r"(\.lora_(embedding_)?[AB])(\.weight)?$", r"\1.default\3", name)
        factor = re.sub(r"\.lora_magnitude_vector$", ".lora_magnitude_vector.default.weight", factor)
        factors[factor] = weights.pop(name).float()
    for name, copied in weights.items():  # PEFT stores an embedding beside the adapter on it
        base = checkpoint.name_of(name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."))
        if base is None or not torch.equal(checkpoint.tensor(base).to(copied.dtype), copied):
            raise UserError(f"The adapter in '{adapter}' holds {name}, which is not a factor of a linear layer.")
    try:
        result = adapted.load_state_dict(factors, strict=False, assign=True)
    except RuntimeError as error:  # other shapes
        raise UserError(f"{misfit}: {one_line(error, 200)}.") from error
    for name in result.unexpected_keys:
        module = adapted_layer(name)
        raise UserError(f"The adapter in '{adapter}' changes {module}, but the base has no {module}.weight.")
    for name in (name for name in result.missing_keys if ".lora_" in name):
        raise UserError(f"The adapter in '{adapter}' is not whole: it lacks {name}.")


def check_space(out: Path, needed: int) -> None:
    """Raises UserError if the disk of `out` cannot hold `needed` bytes of weights, and 64 MiB of everything else."""
    needed += 64 * 2**20
    if short := shortage(out, needed):
        takes, has = short
        raise UserError(
            f"The disk of '{out}' has {has} free, the merged model takes {takes}: "
            "free some, or choose a directory on another disk."
        )


def write_merged(
    checkpoint: Checkpoint,
    updates: Updates,
    out: Path,
    dtype: torch.dtype | None,
    base: Callable[[str, Tensor], Tensor] = lambda name, stored: stored,
    *,
    progress: bool = True,
) -> None:
    """Writes the merged model into the existing directory `out`: the same shards, index, configuration, tokenizer.

    dtype: of the floating-point tensors, but for those that the model's class keeps in float32; None keeps what is
    stored. base: the tensor of that name to add to, of the one that is stored (`DequantizedBase`). At most one shard is
    in memory.
    """
    total = 0
    with Progress(sum(1 for _ in checkpoint.tensors()), "merging", "tensor", wanted=progress) as bar:
        for file in checkpoint.shards:
            merged = dict(_merged(checkpoint, file, updates, dtype, base, bar))
            total += sum(tensor.numel() * tensor.itemsize for tensor in merged.values())
            save_file(merged, out / _as_safetensors(file), metadata={"format": "pt"})
            del merged
    for name in (INDEX, OLD_INDEX):
        if (checkpoint.folder / name).is_file() and not (out / INDEX).exists():
            index = read_json(checkpoint.folder / name)
            index["weight_map"] = {
                tensor: _as_safetensors(file) for file, names in checkpoint.shards.items() for tensor in names
            }
            index.setdefault("metadata", {})["total_size"] = total
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for beside in (path for pattern in BESIDE_WEIGHTS for path in checkpoint.folder.glob(pattern)):
        copy = out / beside.relative_to(checkpoint.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(beside, copy)
    if checkpoint.converted is not None:
        _write_native(checkpoint.converted, out)
    if dtype is not None:
        config = read_json(out / "config.json")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in checkpoint.shards:  # safetensors lets nobody else read its files; a server may run as somebody else
        shutil.copymode(out / "config.json", out / _as_safetensors(file))


def _merged(
    checkpoint: Checkpoint,
    file: str,
    updates: Updates,
    dtype: torch.dtype | None,
    base: Callable[[str, Tensor], Tensor],
    bar: Progress,
) -> Iterator[tuple[str, Tensor]]:
    shard = checkpoint.shard(file)
    for name in checkpoint.shards[file]:
        stored = shard.tensor(name)
        kept = checkpoint.type_in(dtype, name, stored.dtype)
        weight = base(name, stored)
        merged = updates[name].applied_to(weight, kept) if name in updates else weight.to(kept, copy=True)
        if merged.is_floating_point() and not merged.isfinite().all():
            raise UserError(f"{name} would hold NaN or infinity in the merged model: base or adapter are damaged.")
        yield name, merged.contiguous()
        bar.update()


def _write_native(config: PretrainedConfig, out: Path) -> None:
    """The configuration of a base in OLMo's original format, and its tokenizer without the class of that format."""
    config.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        content = {**read_json(settings), "tokenizer_class": "PreTrainedTokenizerFast"}
        content.pop("auto_map", None)
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_safetensors(file: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return (
        file if file.endswith(".safetensors") else f"{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"
    )


def _lora_config(adapter: str) -> LoraConfig:
    config = stored_lora(adapter)
    if extras := more_than_lora(adapter, allowed=("use_dora", "modules_to_save")):
        raise UserError(
            f"The adapter in '{adapter}' has {extras[0]}, which cannot be merged here: use PEFT's merge_and_unload."
        )
    return config
