"""Weights kept as they were quantised, so that the next run reads a quarter of the bytes and quantises nothing.

An entry of the cache is a directory of its own, named after what it was made from: the files of the weights, the recipe
and the versions of what applied it. Other weights, or another recipe, have another entry. It is a 4-bit model that
transformers reads, a file for each decoder layer, under the names that the model itself gives its tensors: so they are
used as they lie in the mapped files. It is there under its name only once all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_npo.claim import InUse, workspace
from lowmem_npo.console import Say, silent
from lowmem_npo.environment import package_version
from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL, expanded, file_in_the_way, json_sha256, load_json, put_in_place, shortage
from lowmem_npo.model.checkpoint import INDEX, find_checkpoint
from lowmem_npo.model.layers import decoder_layers
from lowmem_npo.sizes import gib

IDENTITY = "made_from.json"
VERSION = 2  # of an entry's files
TRIED, PIECE = 2**28, 2**22  # bytes that are read to know how fast a disk is, and at a time


class CacheEntry:
    """Where the weights of `name`, quantised by `recipe`, are kept in `directory`."""

    def __init__(self, directory: Path, name: str, revision: str | None, recipe: Mapping[str, Any]) -> None:
        checkpoint = find_checkpoint(name, revision)
        files = [(checkpoint.folder / file).resolve() for file in sorted(checkpoint.shards)]
        stats = [(file.name, file.stat()) for file in files]
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        how = {key: value for key, value in content.items() if key[0] != "_" and key != "transformers_version"}
        self.identity = {
            "version": VERSION,
            "config": json_sha256(how),
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "recipe": {key: str(value) for key, value in sorted(recipe.items())},
            "versions": {package: package_version(package) for package in ("bitsandbytes", "transformers")},
        }
        self.path = directory / json_sha256(self.identity)[:16]

    def exists(self) -> bool:
        """Whether it can be read.

        Raises:
            UserError: it is that of other weights, moved here, or not whole.
        """
        if not self.path.exists():
            return False
        try:
            content = load_json(self.path / IDENTITY)
            if content["made_from"] == self.identity and content["sizes"] == _sizes(self.path):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"--quantized-cache: '{self.path}' was made from other weights or another quantisation, or is damaged: "
            "remove it."
        )

    def clear_up(self) -> None:
        """Removes what a process has left beside it that was killed once it was in its place."""
        if self._partial.exists():
            with suppress(UserError, OSError), workspace(self._partial, silent):  # unless it is still in use
                pass

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    @staticmethod
    def folder(cache: str) -> Path:
        """The directory that --quantized-cache names.

        Raises:
            UserError: it is a file.
        """
        folder = expanded(cache)
        if file := file_in_the_way(folder.absolute()):
            raise UserError(f"--quantized-cache '{cache}': '{file}' is a file: choose a directory.")
        return folder

    def check_writable(self) -> None:
        """Raises UserError if it is not there and cannot be made."""
        if self.path.exists():
            return
        above = next(path for path in self.path.absolute().parents if path.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(
                f"--quantized-cache: '{above}' cannot be written, and does not hold these weights: choose another "
                "directory, or leave the option out."
            )

    def read_rate(self) -> float:
        """Bytes a second at which the disk reads a part of it that the operating system does not keep in memory."""
        largest = max(self.path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        file = os.open(largest, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            begin, read = time.perf_counter(), 0
            while read < TRIED and (piece := os.read(file, PIECE)):
                read += len(piece)
            return max(read, 1) / (time.perf_counter() - begin)
        finally:
            os.close(file)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(_sizes(self.path).values())

    def keep(self, model: PreTrainedModel, say: Say) -> None:
        """Saves `model`; says so, or why it cannot be saved. Only one process does."""
        if not PartialState().is_main_process:
            return
        if short := shortage(self.path, model.get_memory_footprint(), decimals=2):
            takes, has = short
            say(f"--quantized-cache: the weights are not kept, they take {takes} and {has} are free.")
            return
        try:
            with self.being_written(say) as writer:
                for layer in decoder_layers(model):
                    writer.add_layer(model, layer)
                writer.finish(model)
        except UserError as error:
            say(str(error))

    @contextmanager
    def being_written(self, say: Say) -> Iterator[Writer]:
        """What writes it. If that fails, nothing is left of it.

        Raises:
            UserError: it cannot be written, or another process is writing it.
        """
        try:
            with workspace(self._partial, silent):
                yield Writer(self._partial / "entry", self, say)
        except InUse:
            raise UserError(
                f"--quantized-cache: the weights are not kept: another run is writing '{self.path}'."
            ) from None
        except (OSError, SafetensorError) as error:
            raise _not_kept(error) from error


class Writer:
    """Writes an entry, layer by layer, where nobody looks for it, and puts it in its place when it is whole."""

    def __init__(self, folder: Path, entry: CacheEntry, say: Say) -> None:
        self.folder, self.entry, self.say = folder, entry, say
        self._files: dict[str, str] = {}  # tensor -> file
        folder.mkdir()

    def add_layer(self, model: PreTrainedModel, layer: nn.Module) -> Path:
        """Writes the tensors of a decoder layer but for those that it shares with another one."""
        return self._write(_tensors(model, _name_of(model, layer)))

    def map_layer(self, model: PreTrainedModel, layer: nn.Module) -> None:
        """Writes a layer, and leaves it mapped from its file: it takes no memory any more."""
        name = _name_of(model, layer)
        try:
            path = self.add_layer(model, layer)
        except (OSError, SafetensorError) as error:  # which transformers would make one of loading
            raise _not_kept(error) from error
        with safe_open(path, framework="pt") as file:
            for key, parameter in layer.named_parameters(name):
                parameter.data = file.get_tensor(key)
                state: Any = getattr(parameter, "quant_state", None)
                if state is not None:
                    state.absmax = file.get_tensor(f"{key}.absmax")
                    if state.state2 is not None:
                        state.state2.absmax = file.get_tensor(f"{key}.nested_absmax")

    def finish(self, model: PreTrainedModel) -> None:
        """Writes the rest, and puts the entry in its place, unless another run has done so."""
        rest = {name: tensor for name, tensor in _tensors(model).items() if name not in self._files}
        self._write(rest)
        index = {"metadata": {}, "weight_map": self._files}
        (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(self.folder)
        content = {"made_from": self.entry.identity, "sizes": _sizes(self.folder)}
        (self.folder / IDENTITY).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if not self.entry.path.exists():
            put_in_place(self.folder, self.entry.path)
        self.say(f"--quantized-cache: the 4-bit weights ({gib(self.entry.size)}) are kept in {self.entry.path}.")

    def _write(self, tensors: Mapping[str, Tensor]) -> Path:
        path = self.folder / f"model-{len(set(self._files.values())):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        self._files |= dict.fromkeys(tensors, path.name)
        return path


def _not_kept(error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"--quantized-cache: the weights are not kept ({reason}).")


def _name_of(model: PreTrainedModel, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def _tensors(model: PreTrainedModel, of: str = "") -> dict[str, Tensor]:
    """What a checkpoint holds of the module `of`, statistics of 4-bit weights included, under the model's own names;
    of several names of one tensor, the one that transformers ties the others to."""
    own: Any = model
    module = model.get_submodule(of)
    tensors = module.state_dict(prefix=f"{of}." if of else "")
    return {n: t for n, t in tensors.items() if n not in own.all_tied_weights_keys and not t.is_meta}


def _sizes(folder: Path) -> dict[str, int]:
    """File -> bytes, without IDENTITY."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != IDENTITY}


def check_cached(architecture: PretrainedConfig, stored: object) -> None:
    """Raises UserError for a model whose weights are stored in 4 bits already."""
    if stored is not None:
        raise UserError(
            f"--quantized-cache: the weights of '{architecture.name_or_path}' are stored in 4 bits already: leave it "
            "out."
        )
