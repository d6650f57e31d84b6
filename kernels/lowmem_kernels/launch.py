"""Launches Triton kernels; records, without a GPU, what would be launched."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""What `launch` takes for the compiler, beside a kernel's own arguments."""

_recordings: list["Recording"] = []


@dataclass
class Recording:
    """The launches made while recording, and the CUDA capability, such as (8, 6), for which they were configured."""

    capability: tuple[int, int]
    launches: list[tuple[object, dict]]  # (kernel, arguments by name, with those of OPTIONS)

    def add(self, kernel: object, arguments: dict) -> None:
        """Called with every launch; a subclass may keep less of it than the tensors themselves."""
        self.launches.append((kernel, arguments))


@contextlib.contextmanager
def recording(capability: tuple[int, int], into: Recording | None = None) -> Iterator[Recording]:
    """Collects launches. Give the engines meta tensors: then nothing is computed, and no GPU is needed."""
    _recordings.append(into or Recording(capability, []))
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """kernel[grid](**arguments), unless the tensors have no values or the grid is empty.

    `enable_fp_fusion`, by default true: a product that is added to something need not be rounded first. It is always
    given, since Triton's own default is to change.
    """
    arguments.setdefault("enable_fp_fusion", True)
    if _recordings:
        _recordings[-1].add(kernel, arguments)
    if all(has_values(x) for x in arguments.values() if isinstance(x, Tensor)) and 0 not in grid:
        kernel[grid](**arguments)


def capability(device: torch.device) -> tuple[int, int]:
    """The capability to configure kernels for; that of a 24 GB Ampere card where there is no GPU to ask."""
    if _recordings:
        return _recordings[-1].capability
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return (8, 6)


def has_values(tensor: Tensor) -> bool:
    """False for fake and meta tensors."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)
