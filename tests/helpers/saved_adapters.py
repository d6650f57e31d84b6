"""Adapters as runs leave them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowmem_npo.run_directory import AdapterFiles


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(AdapterFiles(folder).weights)


def same_adapter(one: Path, other: Path, **tolerance: float) -> bool:
    """Whether the adapters in two folders are the same: to the bit or, with a `tolerance`, as torch.allclose has it."""
    a, b = weights(one), weights(other)
    assert a and a.keys() == b.keys(), "adapters of other layers"
    close = partial(torch.allclose, **tolerance) if tolerance else torch.equal
    return all(close(a[name], b[name]) for name in a)
