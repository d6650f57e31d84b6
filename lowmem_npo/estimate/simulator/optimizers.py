"""bitsandbytes' optimisers on the fake GPU: what they do besides PyTorch's operators needs a GPU, or values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from bitsandbytes import functional
from bitsandbytes.optim import optimizer
from torch import Tensor


@contextlib.contextmanager
def fake_optimizers() -> Iterator[None]:
    """Inside, they allocate on the fake GPU what they would on a real one."""
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (optimizer.Optimizer8bit, "fill_qmap", _give_tables),
            (optimizer, "sync_gpu", _nothing),
            (functional, "get_paged", _paged),
            (functional, "fill", _nothing),
            (functional, "prefetch_tensor", _nothing),
            (functional.GlobalPageManager.get_instance(), "paged_tensors", []),  # which outlives every optimiser
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def _give_tables(owner: Any) -> None:
    """The values that 8 bits stand for, computed on the host."""
    owner.name2qmap.update(dynamic=torch.empty(256), udynamic=torch.empty(256))


def _paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Unified memory, whose pages CUDA moves to the host where PyTorch needs theirs: it counts as the host's."""
    pages: Any = torch.empty(shape, dtype=dtype, device="cpu")
    pages.is_paged, pages.page_deviceid = True, device.index
    return pages


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what has no effect on memory."""
