"""An adapter merged into its base model's weights, one shard of the checkpoint at a time, on the CPU.

    W' = W + scale * B A        scale = alpha / r  (rank-stabilised LoRA: alpha / sqrt(r))

PEFT computes the product from the factors, on a model without weights; transformers renames and splits it as it does
the model's own weights (a layer's experts are one parameter, but many tensors of a checkpoint). Product and sum are
float32 and rounded once, to the type the weights are stored in; PEFT's `merge_and_unload` needs the whole model in
memory, and rounds twice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowmem_npo.errors import UserError
from lowmem_npo.model.checkpoint import BESIDE_WEIGHTS, INDEX, OLD_INDEX, Checkpoint, Shard, read_json
from lowmem_npo.run_directory import AdapterFiles

# What an adapter may also hold, so that W + scale * B A would be only a part: configuration field -> description.
MORE_THAN_LORA = {
    "use_dora": "DoRA magnitudes",
    "modules_to_save": "whole modules (modules_to_save)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "trained embedding rows (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    "arrow_config": "a routing between adapters (Arrow)",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one tensor of a checkpoint."""

    model: PreTrainedModel  # without weights
    layer: LoraLayer  # with its factors
    parameter: str  # of the model, to which the layer's product is added
    part: str | None  # the tensor as transformers names it, if it is a part of the parameter

    def added_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` + scale * B A, rounded once, to `dtype`."""
        update = (
            _product(self.layer) if self.part is None else _parts(self.model, self.parameter, self.layer)[self.part]
        )
        return (update + weight).to(dtype)


@torch.no_grad()
def _product(layer: LoraLayer) -> Tensor:
    own: Any = layer
    with mock.patch.object(own, "get_param", lambda: torch.empty(0), create=True):  # experts ask for device and type
        return own.get_delta_weight("default")


@lru_cache(maxsize=2)  # the two parameters of a layer's experts, whose tensors alternate in the checkpoint
def _parts(model: PreTrainedModel, parameter: str, layer: LoraLayer) -> dict[str, Tensor]:
    return revert_weight_conversion(model, {parameter: _product(layer)})


def find_updates(adapter: str, checkpoint: Checkpoint) -> dict[str, Update]:
    """Tensor of the checkpoint -> what the adapter in the directory `adapter` adds to it.

    Raises UserError for an adapter that holds more than the two factors of its layers, or does not fit.
    """
    config, stored = _lora_config(adapter), checkpoint.stored()
    misfit = f"The adapter in '{adapter}' does not fit"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.configuration(), dtype=torch.float32)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        places = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # no layer of its names
            raise UserError(f"{misfit}: {' '.join(str(error).split())[:200]}.") from error
    layers: dict[str, Any] = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if places[id(_weight(layer))] > 1:  # a tied embedding; Zamba's attention, which several layers have in common
            module = name.removeprefix("base_model.model.")
            raise UserError(f"The adapter in '{adapter}' changes {module}, which the base shares with another layer.")
    _give_factors(adapted, adapter, checkpoint, misfit)
    updates: dict[str, Update] = {}
    for layer in layers.values():
        weight = _weight(layer)
        parameter = names[id(weight)]
        whole = checkpoint.name_of(parameter)
        parts = {parameter: weight} if whole else revert_weight_conversion(model, {parameter: weight})
        for part, like in parts.items():
            tensor = checkpoint.name_of(part)
            if tensor is None:
                raise UserError(f"The adapter in '{adapter}' changes {parameter}, but the base has no {part}.")
            if stored[tensor][0] != like.shape:
                raise UserError(f"{misfit}: {tensor} is {stored[tensor][0]} in the base, not {tuple(like.shape)}.")
            updates[tensor] = Update(model, layer, parameter, None if whole else part)
    return updates


def _weight(layer: Any) -> torch.nn.Parameter:
    """What the factors of `layer` are added to."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def _give_factors(adapted: PeftModel, adapter: str, checkpoint: Checkpoint, misfit: str) -> None:
    """Puts the adapter's weights in place of those without data."""
    with safe_open(AdapterFiles(Path(adapter).expanduser()).weights, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    factors = {
        re.sub(r"(\.lora_(embedding_)?[AB])(\.weight)?$", r"\1.default\3", name): weights.pop(name).float()
        for name in list(weights)
        if ".lora_" in name
    }
    for name, copied in weights.items():  # PEFT stores an embedding beside the adapter on it
        base = checkpoint.name_of(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if base is None or not torch.equal(checkpoint.tensor(base).to(copied.dtype), copied):
            raise UserError(f"The adapter in '{adapter}' holds {name}, which is not a factor of a linear layer.")
    try:
        result = adapted.load_state_dict(factors, strict=False, assign=True)
    except RuntimeError as error:  # other shapes
        raise UserError(f"{misfit}: {' '.join(str(error).split())[:200]}.") from error
    for name in result.unexpected_keys:
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        raise UserError(f"The adapter in '{adapter}' changes {module}, but the base has no {module}.weight.")
    for name in (name for name in result.missing_keys if ".lora_" in name):
        raise UserError(f"The adapter in '{adapter}' is not whole: it lacks {name}.")


def check_space(out: Path, needed: int) -> None:
    """Raises UserError if the disk of `out` cannot hold `needed` bytes of weights, and 64 MiB of everything else."""
    path = out.absolute()
    free = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free
    needed += 64 * 2**20
    if free < needed:
        raise UserError(
            f"The disk of '{out}' has {free / 2**30:.1f} GiB free, the merged model takes {needed / 2**30:.1f} GiB: "
            "free some, or choose a directory on another disk."
        )


def write_merged(
    checkpoint: Checkpoint, updates: dict[str, Update], out: Path, dtype: torch.dtype | None, *, progress: bool = True
) -> None:
    """Writes the merged model into the existing directory `out`: the same shards, index, configuration, tokenizer.

    dtype: of the floating-point tensors; None keeps what is stored. At most one shard is in memory.
    """
    total = 0
    bar = tqdm(total=sum(1 for _ in checkpoint.tensors()), desc="merging", unit="tensor", leave=False,
               disable=None if progress else True)  # fmt: skip
    with bar:
        for file, names in checkpoint.shards.items():
            merged = dict(_merged(checkpoint.shard(file), names, updates, dtype, bar))
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
    for name in BESIDE_WEIGHTS:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, out / name)
    if checkpoint.converted is not None:
        _write_native(checkpoint.converted, out)
    if dtype is not None:
        config = read_json(out / "config.json")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merged(
    shard: Shard, names: Iterable[str], updates: dict[str, Update], dtype: torch.dtype | None, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        stored = shard.tensor(name)
        kept = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
        merged = updates[name].added_to(stored, kept) if name in updates else stored.to(kept, copy=True)
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
    folder = Path(adapter).expanduser()
    content = read_json(AdapterFiles(folder).adapter_config)
    if content.get("peft_type") != "LORA":
        raise UserError(f"The adapter in '{adapter}' is {content.get('peft_type')}, not LoRA: it cannot be merged so.")
    extras = [description for field, description in MORE_THAN_LORA.items() if content.get(field)]
    if content.get("bias", "none") != "none":
        extras.append(f"biases (bias: {content['bias']})")
    if str(start := content.get("init_lora_weights")).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        extras.append(f"a base that its start has changed (init_lora_weights: {start})")
    if extras:
        raise UserError(
            f"The adapter in '{adapter}' has {extras[0]}, which cannot be merged here: use PEFT's merge_and_unload."
        )
    return LoraConfig.from_pretrained(str(folder))
