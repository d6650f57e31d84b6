"""What results depend on besides data and code: the versions of packages, and the machine's processors."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

import lowmem_npo

PACKAGES = ("lowmem-npo", "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
            "tokenizers", "safetensors", "flash-attn")  # fmt: skip


def package_version(package: str) -> str | None:
    """The installed version; None: not installed."""
    if package == "lowmem-npo":
        return lowmem_npo.__version__  # also when it runs from its source
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python, CUDA (where PyTorch has it) and each of PACKAGES that is installed."""
    import torch  # late: help and mistakes need not load it

    known = {"python": platform.python_version(), "cuda": torch.version.cuda}
    known |= {package: package_version(package) for package in PACKAGES}
    return {name: version for name, version in known.items() if version is not None}


def processors() -> list[str]:
    """The GPUs that PyTorch sees, as in "NVIDIA L4, sm_89, 22.0 GiB", or the CPU's architecture."""
    import torch

    if not torch.cuda.is_available():
        return [f"CPU, {platform.machine()}"]
    gpus = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB" for p in gpus]


def available_memory() -> int:
    """Bytes of host memory that a process can still take, within the limit of its container if it has one."""
    import psutil

    available = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(available, 0)
