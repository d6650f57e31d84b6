"""A model's files: which tensor is in which of them, read when it is asked for. A checkpoint in OLMo's original format
is seen as its native form."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from lowmem_npo.endings import lacks_memory
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded, load_json
from lowmem_npo.model.kept_types import kept_in_float32
from lowmem_npo.model.original_olmo import Rows, is_original, is_original_tensor, native_config, native_tensors
from lowmem_npo.sources import check_model_name

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BEFORE_1_6 = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # with which PyTorch's files began
OLD_WHOLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BESIDE_WEIGHTS = (  # by patterns
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Shard:
    """One file of a checkpoint; a tensor is read when it is asked for."""

    def __init__(self, path: Path, rows: Mapping[str, Rows] | None = None) -> None:
        """rows: tensors that are rows of a stored one.

        Raises UserError for a file that cannot be read.
        """
        self._rows = rows or {}
        self._safe: Any = None
        self._loaded: dict[str, Tensor] = {}
        is_safe = path.suffix == ".safetensors"
        mapped = is_safe or zipfile.is_zipfile(path)  # the format of PyTorch before 1.6 cannot be
        try:
            if is_safe:
                self._safe = safe_open(path, framework="pt")
            else:
                self._loaded = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            if mapped and lacks_memory(error):  # a damaged file of the other format may ask for any amount
                raise
            reason = one_line(error, 200)
            raise UserError(f"The weights in '{path}' are damaged: {reason}.") from error

    def stored_names(self) -> list[str]:
        return list(self._loaded if self._safe is None else self._safe.keys())

    def tensor(self, name: str) -> Tensor:
        if (rows := self._rows.get(name)) is None:
            return self._loaded[name] if self._safe is None else self._safe.get_tensor(name)
        if self._safe is None:
            return self._loaded[rows.stored][rows.start : rows.stop].clone()
        return self._safe.get_slice(rows.stored)[rows.start : rows.stop]

    def stored(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type, without reading it."""
        rows = self._rows.get(name)
        whole = name if rows is None else rows.stored
        if self._safe is None:
            shape, dtype = tuple(self._loaded[whole].shape), self._loaded[whole].dtype
        else:
            part = self._safe.get_slice(whole)
            shape, dtype = tuple(part.get_shape()), _TYPES[part.get_dtype()]
        return (shape if rows is None else (rows.stop - rows.start, *shape[1:])), dtype


@dataclass(frozen=True)
class Unread:
    """A tensor of a shard, to be read with `[...]`, as transformers does."""

    shard: Shard
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.shard.tensor(self.name)[index]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: its folder, and which tensor is in which shard."""

    folder: Path
    shards: dict[str, list[str]]  # file -> tensors
    rows: Mapping[str, Rows] = field(default_factory=dict)  # tensors that are rows of a stored one
    converted: PretrainedConfig | None = None  # its configuration, where config.json is in OLMo's original format

    def tensors(self) -> Iterator[str]:
        return (name for names in self.shards.values() for name in names)

    def tensor(self, name: str) -> Tensor:
        return self.shard(next(file for file, names in self.shards.items() if name in names)).tensor(name)

    def shard(self, file: str) -> Shard:
        return Shard(self.folder / file, self.rows)

    def unread(self) -> dict[str, Unread]:
        """All tensors, none of them read."""
        shards = {file: self.shard(file) for file in self.shards}
        return {name: Unread(shards[file], name) for file, names in self.shards.items() for name in names}

    def name_of(self, parameter: str) -> str | None:
        """A parameter's name here: some checkpoints leave out a prefix, such as GPT-2's "transformer.", or have it
        twice. transformers loads both."""
        prefix, _, rest = parameter.partition(".")
        return next((name for name in (parameter, rest, f"{prefix}.{parameter}") if name in self._names), None)

    @cached_property
    def _names(self) -> set[str]:
        return set(self.tensors())

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensor -> shape and type."""
        return {name: tensor.shard.stored(name) for name, tensor in self.unread().items()}

    def type_in(self, dtype: torch.dtype | None, name: str, stored: torch.dtype) -> torch.dtype:
        """The type of a tensor that is `stored` so where the weights are in `dtype` (None: as they are stored)."""
        if dtype is None or not stored.is_floating_point or name in self._kept_in_float32:
            return stored
        return dtype

    def is_in(self, dtype: torch.dtype) -> bool:
        """Whether a model that is loaded in `dtype` holds the weights as they are stored, none of another type."""
        return all(self.type_in(dtype, name, stored) == stored for name, (_, stored) in self.stored().items())

    @cached_property
    def _kept_in_float32(self) -> set[str]:
        return kept_in_float32(self.configuration(), self.tensors())

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """What its weights take on disk in `dtype` (None: as they are stored)."""
        types = self.stored().items()
        return sum(math.prod(shape) * self.type_in(dtype, name, stored).itemsize for name, (shape, stored) in types)

    def configuration(self) -> PretrainedConfig:
        return self.converted or AutoConfig.from_pretrained(self.folder)


def find_checkpoint(name: str, revision: str | None = None, local: bool = False) -> Checkpoint:
    """The weights in a directory, or in a hub repository, which is downloaded unless it is in the cache.

    local: download nothing.

    Raises UserError if there are none, or they are quantised.
    """
    folder = expanded(name)
    if not check_model_name(name):
        folder = _download(name, revision, ["*.safetensors", INDEX], local)
        if not any((folder / file).is_file() for file in (INDEX, WHOLE)):
            folder = _download(name, revision, ["pytorch_model*.bin", OLD_INDEX], local)
    content = read_json(folder / "config.json")
    if content.get("quantization_config"):
        raise UserError(
            f"The weights of '{name}' are quantised: give --model the model they were made from, with --any-base."
        )
    checkpoint = Checkpoint(
        folder,
        {file: Shard(folder / file).stored_names() for file in weight_files(folder, name)},
        converted=native_config(content, name) if is_original(content) else None,
    )
    may_be_original = content.get("model_type") in ("hf_olmo", "olmo")
    if may_be_original and any(is_original_tensor(tensor) for tensor in checkpoint.tensors()):
        return _in_native_form(checkpoint, name)
    return checkpoint


def lists_tensors(folder: Path) -> bool:
    """Whether it holds weights whose names and shapes can be read without them, as they can since PyTorch 1.6.

    Raises UserError for a file in neither format of PyTorch.
    """
    if any((folder / file).is_file() for file in (WHOLE, INDEX)):
        return True
    old = list(folder.glob("pytorch_model*.bin*"))
    before = [file for file in old if file.suffix == ".bin" and not zipfile.is_zipfile(file)]
    for file in before:
        with file.open("rb") as content:
            if content.read(len(BEFORE_1_6)) != BEFORE_1_6:
                raise UserError(f"The weights in '{file}' are damaged: it is in none of PyTorch's formats.")
    return bool(old) and not before


def weight_files(folder: Path, name: str) -> list[str]:
    """The files that hold the weights; where there are several kinds, the kind that transformers takes.

    Raises UserError if there are none, or not all that an index lists.
    """
    for whole, index in ((WHOLE, INDEX), (OLD_WHOLE, OLD_INDEX)):
        if (folder / whole).is_file():
            return [whole]
        if (folder / index).is_file():
            content = read_json(folder / index)
            if not isinstance(tensors := content.get("weight_map"), dict):
                raise UserError(f"'{folder / index}' is damaged: it has no weight_map, which names each tensor's file.")
            files = sorted(set(tensors.values()))
            if missing := [file for file in files if not (folder / file).is_file()]:
                raise UserError(f"'{name}' is incomplete: {missing[0]} is missing.")
            return files
    raise UserError(f"'{name}' has no weights in safetensors or pytorch_model.bin.")


def _in_native_form(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """A checkpoint in OLMo's original format, each tensor with its native name and in the file that it is in."""
    shapes = {tensor: shape for tensor, (shape, _) in checkpoint.stored().items()}
    rows = native_tensors(shapes, checkpoint.configuration(), name)
    shards = {
        file: [native for native, part in rows.items() if part.stored in tensors]
        for file, names in checkpoint.shards.items()
        if (tensors := set(names))
    }
    return replace(checkpoint, shards=shards, rows=rows)


def _download(name: str, revision: str | None, patterns: list[str], local: bool = False) -> Path:
    wanted = [*patterns, *BESIDE_WEIGHTS]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=local))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"The weights of '{name}' are not here and cannot be downloaded ({reason}).") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is damaged: it holds no JSON object.")
    return content
