"""An adapter merged into its base model's weights, one shard of the checkpoint at a time, on the CPU.

    W' = W + scale * B A        scale = alpha / r  (rank-stabilised LoRA: alpha / sqrt(r))

The product and the sum are float32 and rounded once, to the type the weights are stored in. PEFT's `merge_and_unload`
needs the whole model in memory, and rounds twice: the product to the weights' type, then the sum.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowmem_npo.errors import UserError
from lowmem_npo.run_directory import AdapterFiles

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# What an adapter may also hold, so that W + scale * B A would be only a part: configuration field -> description.
MORE_THAN_LORA = {
    "use_dora": "DoRA magnitudes",
    "modules_to_save": "whole modules (modules_to_save)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "trained embedding rows (trainable_token_indices)",
    "target_parameters": "parameters that are no linear layer (target_parameters)",
    "layer_replication": "repeated layers (layer_replication)",
    "rank_pattern": "ranks that differ by layer (rank_pattern)",
    "alpha_pattern": "scales that differ by layer (alpha_pattern)",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    "arrow_config": "a routing between adapters (Arrow)",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
}


@dataclass(frozen=True)
class Update:
    """scale * B A of one linear layer."""

    a: Tensor  # (r, inputs)
    b: Tensor  # (outputs, r)
    scale: float
    transposed: bool  # the layer stores (inputs, outputs), as GPT-2's does

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def added_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` + scale * B A, rounded once, to `dtype`."""
        product = (self.b.float() @ self.a.float()).mul_(self.scale)
        product = product.T.contiguous() if self.transposed else product
        return product.add_(weight).to(dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: its folder, and which tensor is in which shard."""

    folder: Path
    shards: dict[str, list[str]]  # file -> tensors

    def tensors(self) -> Iterator[str]:
        return (name for names in self.shards.values() for name in names)

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """What its weights take on disk in `dtype` (None: as they are stored)."""
        total = 0
        for file in self.shards:
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in self.shards[file]:
                    part = shard.get_slice(name)
                    stored = _TYPES[part.get_dtype()]
                    kept = dtype if dtype is not None and stored.is_floating_point else stored
                    total += math.prod(part.get_shape()) * kept.itemsize
        return total


_TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """The safetensors files of a directory, or of a hub repository, which is downloaded unless it is in the cache.

    Raises UserError if there are none, or the weights in them are quantised.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            patterns = ["*.safetensors", INDEX, *BESIDE_WEIGHTS]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The weights of '{name}' are not here and cannot be downloaded ({reason}).") from error
    if _read_json(folder / "config.json").get("quantization_config"):
        raise UserError(f"The weights of '{name}' are quantised: merge into the model they were made from.")
    if (folder / INDEX).is_file():
        shards: dict[str, list[str]] = {}
        for tensor, file in _read_json(folder / INDEX)["weight_map"].items():
            shards.setdefault(file, []).append(tensor)
        if missing := [file for file in shards if not (folder / file).is_file()]:
            raise UserError(f"'{name}' is incomplete: {missing[0]} is missing.")
    elif (folder / WHOLE).is_file():
        with safe_open(folder / WHOLE, framework="pt") as file:
            shards = {WHOLE: list(file.keys())}
    else:
        raise UserError(f"'{name}' has no safetensors weights: load it with transformers, save_pretrained, use that.")
    return Checkpoint(folder, shards)


def find_updates(adapter: str, checkpoint: Checkpoint) -> dict[str, Update]:
    """Tensor of the checkpoint -> what the adapter in the directory `adapter` adds to it.

    Raises UserError for an adapter that holds more than the two factors of linear layers, or does not fit.
    """
    config = _lora_config(adapter)
    folder = Path(adapter).expanduser()
    with safe_open(AdapterFiles(folder).weights, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    named = set(checkpoint.tensors())
    prefix = _inner_name(checkpoint.folder)
    tied = _read_json(checkpoint.folder / "config.json").get("tie_word_embeddings", False)
    updates = {}
    for name, a in weights.items():
        module, mark, _ = name.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        if not mark:
            if not name.endswith(".lora_B.weight"):
                raise UserError(f"The adapter in '{adapter}' holds {name}, which is not a factor of a linear layer.")
            continue
        tensor = next((n for n in (f"{module}.weight", f"{module}.weight".removeprefix(prefix)) if n in named), None)
        b = weights.get(name.replace(".lora_A.", ".lora_B."))
        if tensor is None or b is None:
            raise UserError(f"The adapter in '{adapter}' changes {module}, but the base has no {module}.weight.")
        if tied and module.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte"):
            raise UserError(f"The adapter in '{adapter}' changes {module}, which this base shares with another layer.")
        rank = math.sqrt(config.r) if config.use_rslora else config.r
        updates[tensor] = Update(a, b, config.lora_alpha / rank, bool(config.fan_in_fan_out))
    for file, names in checkpoint.shards.items():
        with safe_open(checkpoint.folder / file, framework="pt") as shard:
            for name in set(names) & set(updates):
                stored = tuple(shard.get_slice(name).get_shape())
                if stored != updates[name].shape:
                    raise UserError(
                        f"The adapter in '{adapter}' does not fit: {name} is {stored} in the base, and "
                        f"{updates[name].shape} in the adapter."
                    )
    return updates


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
            with safe_open(checkpoint.folder / file, framework="pt") as shard:
                merged = dict(_merged(shard, names, updates, dtype, bar))
            total += sum(tensor.numel() * tensor.itemsize for tensor in merged.values())
            save_file(merged, out / file, metadata={"format": "pt"})
            del merged
    if (checkpoint.folder / INDEX).is_file():
        index = _read_json(checkpoint.folder / INDEX)
        index.setdefault("metadata", {})["total_size"] = total
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in BESIDE_WEIGHTS:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, out / name)
    if dtype is not None:
        config = _read_json(out / "config.json")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merged(
    shard: Any, names: Iterable[str], updates: dict[str, Update], dtype: torch.dtype | None, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        stored = shard.get_tensor(name)
        kept = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
        yield name, updates[name].added_to(stored, kept) if name in updates else stored.to(kept)
        bar.update()


def _lora_config(adapter: str) -> LoraConfig:
    folder = Path(adapter).expanduser()
    content = _read_json(AdapterFiles(folder).adapter_config)
    if content.get("peft_type") != "LORA":
        raise UserError(f"The adapter in '{adapter}' is {content.get('peft_type')}, not LoRA: it cannot be merged so.")
    extras = [description for field, description in MORE_THAN_LORA.items() if content.get(field)]
    if content.get("bias", "none") != "none":
        extras.append(f"biases (bias: {content['bias']})")
    if extras:
        raise UserError(
            f"The adapter in '{adapter}' has {extras[0]}, which cannot be merged here: use PEFT's merge_and_unload."
        )
    return LoraConfig.from_pretrained(str(folder))


def _inner_name(folder: Path) -> str:
    """The prefix that some checkpoints leave out of their tensors' names, such as GPT-2's "transformer."."""
    config = AutoConfig.from_pretrained(folder)
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).base_model_prefix + "."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as JSON.") from error
