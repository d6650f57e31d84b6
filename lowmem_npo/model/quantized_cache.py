"""Weights kept as they were quantised, so that the next run reads a quarter of the bytes and quantises nothing.

An entry of the cache is a directory of its own, named after what it was made from: the files of the weights, the recipe
and the versions of what applied it. Other weights, or another recipe, have another entry. Its files are a 4-bit model
as transformers saves it; it is there under its name only once all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_npo.console import Say
from lowmem_npo.environment import package_version
from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL, free_bytes, put_in_place
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.sizes import gib

IDENTITY = "made_from.json"
SHARD = "4GB"  # of which one is in memory when a model is saved


class CacheEntry:
    """Where the weights of `name`, quantised by `recipe`, are kept in `directory`."""

    def __init__(self, directory: Path, name: str, revision: str | None, recipe: Mapping[str, Any]) -> None:
        checkpoint = find_checkpoint(name, revision)
        files = [(checkpoint.folder / file).resolve() for file in sorted(checkpoint.shards)]
        stats = [(file.name, file.stat()) for file in files]
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        how = {key: value for key, value in content.items() if key[0] != "_" and key != "transformers_version"}
        self.identity = {
            "config": hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest(),
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "recipe": {key: str(value) for key, value in sorted(recipe.items())},
            "versions": {package: package_version(package) for package in ("bitsandbytes", "transformers")},
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = directory / digest[:16]

    def exists(self) -> bool:
        """Whether it can be read.

        Raises:
            UserError: it is that of other weights, moved here, or not whole.
        """
        if not self.path.exists():
            return False
        try:
            if json.loads((self.path / IDENTITY).read_text(encoding="utf-8")) == self.identity:
                return True
        except (OSError, ValueError):
            pass
        raise UserError(
            f"--quantized-cache: '{self.path}' was made from other weights or another quantisation, or is damaged: "
            "remove it."
        )

    def keep(self, model: PreTrainedModel, say: Say) -> None:
        """Saves `model`; says so, or why it cannot be saved. Only one process does."""
        if not PartialState().is_main_process:
            return
        partial, size = self.path.with_name(self.path.name + PARTIAL), model.get_memory_footprint()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (free := free_bytes(self.path)) < size:
                say(f"--quantized-cache: the weights are not kept, they take {gib(size)} and {gib(free)} are free.")
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            model.save_pretrained(partial, max_shard_size=SHARD)
            (partial / IDENTITY).write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
            put_in_place(partial, self.path)
            say(f"--quantized-cache: the 4-bit weights ({gib(size)}) are kept in {self.path}.")
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            say(f"--quantized-cache: the weights are not kept ({reason}).")
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_cached(architecture: PretrainedConfig, stored: object) -> None:
    """Raises UserError for a model whose weights are stored in 4 bits already."""
    if stored is not None:
        raise UserError(
            f"--quantized-cache: the weights of '{architecture.name_or_path}' are stored in 4 bits already: leave it "
            "out."
        )
