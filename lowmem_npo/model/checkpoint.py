"""A model's files: which tensor is in which of them, read when it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from lowmem_npo.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WHOLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Shard:
    """One file of a checkpoint; a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._safe: Any = safe_open(path, framework="pt") if path.suffix == ".safetensors" else None
        self._loaded: dict[str, Tensor] = {}
        if self._safe is None:
            self._loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def names(self) -> list[str]:
        return list(self._loaded if self._safe is None else self._safe.keys())

    def tensor(self, name: str) -> Tensor:
        return self._loaded[name] if self._safe is None else self._safe.get_tensor(name)

    def stored(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type, without reading it."""
        if self._safe is None:
            return tuple(self._loaded[name].shape), self._loaded[name].dtype
        part = self._safe.get_slice(name)
        return tuple(part.get_shape()), _TYPES[part.get_dtype()]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: its folder, and which tensor is in which shard."""

    folder: Path
    shards: dict[str, list[str]]  # file -> tensors

    def tensors(self) -> Iterator[str]:
        return (name for names in self.shards.values() for name in names)

    def tensor(self, name: str) -> Tensor:
        return self.shard(next(file for file, names in self.shards.items() if name in names)).tensor(name)

    def shard(self, file: str) -> Shard:
        return Shard(self.folder / file)

    def name_of(self, parameter: str) -> str | None:
        """A parameter's name here: some checkpoints leave out a prefix, such as GPT-2's "transformer."."""
        return next((name for name in (parameter, parameter.partition(".")[2]) if name in self._names), None)

    @cached_property
    def _names(self) -> set[str]:
        return set(self.tensors())

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensor -> shape and type."""
        shards = {file: self.shard(file) for file in self.shards}
        return {name: shards[file].stored(name) for file, names in self.shards.items() for name in names}

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """What its weights take on disk in `dtype` (None: as they are stored)."""
        total = 0
        for shape, stored in self.stored().values():
            kept = dtype if dtype is not None and stored.is_floating_point else stored
            total += math.prod(shape) * kept.itemsize
        return total


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """The weights in a directory, or in a hub repository, which is downloaded unless it is in the cache.

    Raises UserError if there are none, or they are quantised.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name, revision, ["*.safetensors", INDEX])
        if not any((folder / file).is_file() for file in (INDEX, WHOLE)):
            folder = _download(name, revision, ["pytorch_model*.bin", OLD_INDEX])
    if read_json(folder / "config.json").get("quantization_config"):
        raise UserError(
            f"The weights of '{name}' are quantised: give --model the model they were made from, with --any-base."
        )
    for index, whole in ((INDEX, WHOLE), (OLD_INDEX, OLD_WHOLE)):
        if (folder / index).is_file():
            shards: dict[str, list[str]] = {}
            for tensor, file in read_json(folder / index)["weight_map"].items():
                shards.setdefault(file, []).append(tensor)
            if missing := [file for file in shards if not (folder / file).is_file()]:
                raise UserError(f"'{name}' is incomplete: {missing[0]} is missing.")
            return Checkpoint(folder, shards)
        if (folder / whole).is_file():
            return Checkpoint(folder, {whole: Shard(folder / whole).names()})
    raise UserError(f"'{name}' has no weights in safetensors or pytorch_model.bin.")


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *BESIDE_WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The weights of '{name}' are not here and cannot be downloaded ({reason}).") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as JSON.") from error
