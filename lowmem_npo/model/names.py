"""From the names people type to the repositories that current transformers can load.

The first OLMo releases were published in AllenAI's own format (`hf_olmo`). Each has a native conversion whose name ends
in `-hf`, to which the original name is resolved. A revision of the original (an intermediate checkpoint) is none of the
conversion's: it is loaded from the original (original_olmo.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lowmem_npo.console import Say, silent
from lowmem_npo.files import expanded

WEIGHTS = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")  # the files of a directory that make a model
LOADED = ("model*.safetensors", "pytorch_model*.bin", "model.pt")  # those of its weights alone
# Those that decide how it is asked, and where it stops.
ASKING = ("chat_template*", "additional_chat_templates/*", "*_config.json", "special_tokens_map.json")
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file

ORIGINAL_FORMAT_OLMO = (
    "allenai/OLMo-1B",
    "allenai/OLMo-1B-0724",
    "allenai/OLMo-7B",
    "allenai/OLMo-7B-0424",
    "allenai/OLMo-7B-0724",
    "allenai/OLMo-7B-0724-Instruct",
    "allenai/OLMo-7B-0724-SFT",
    "allenai/OLMo-7B-Instruct",
    "allenai/OLMo-7B-SFT",
    "allenai/OLMo-7B-Twin-2T",
)


def resolve_name(name: str, revision: str | None = None, say: Say = silent) -> str:
    """The repository or directory to load for `name` at `revision`; says so if that is another."""
    original = {repo.lower(): repo for repo in ORIGINAL_FORMAT_OLMO}.get(name.strip().rstrip("/").lower())
    if original is None or revision not in (None, "main"):
        return os.path.expanduser(name)
    native = f"{original}-hf"
    say(f"{name} is in OLMo's original format; using its native conversion {native}.")
    return native


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit of the hub whose files of `name` this machine has; None of a directory, or where it has none."""
    snapshot = None if Path(name).is_dir() else _snapshot(name, revision)
    return snapshot.name if snapshot else None


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Where this machine has the files of a name on the hub."""
    with suppress(ValueError):  # not a name that the hub could have
        file = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(file).parent if isinstance(file, str) else None
    return None


@dataclass(frozen=True)
class Base:
    """The base model of an adapter, as far as it is known. name: None for the one that the adapter names. weights: a
    hash of what is sampled of their files."""

    name: str | None = None
    weights: str | None = None

    @classmethod
    def here(cls, name: str, revision: str | None = None, of_adapter: bool = False) -> Base:
        """A directory, or what this machine has of a name on the hub. of_adapter: whether the adapter names it."""
        folder = expanded(name) if expanded(name).is_dir() else _snapshot(name, revision)
        there = folder is not None and any(True for pattern in LOADED for _ in folder.glob(pattern))
        return cls(None if of_adapter else name, digest_of(str(folder), patterns=LOADED) if there else None)

    def is_other_than(self, base: Base) -> bool:
        """By the weights, wherever they lie; where those are not known, by what was named."""
        if self.weights and base.weights:
            return self.weights != base.weights
        places = [os.path.realpath(expanded(name)) for name in (self.name, base.name) if name is not None]
        return len(set(places)) > 1


def digest_of(name: str, revision: str | None = None, patterns: Sequence[str] = WEIGHTS) -> str:
    """A hash of a hub name and its commit here, or of what is sampled of a directory's weights, or of its files of
    other `patterns`: enough to tell that others have taken their place, at no more than a glance at each file."""
    folder, digest = expanded(name), hashlib.sha256()
    if not folder.is_dir():
        digest.update(f"{name} {commit_of(name, revision)}".encode())
    for path in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for at in range(0, size, max(1, size // SAMPLES)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
