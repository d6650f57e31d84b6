"""What results depend on besides data and code: the versions of packages, and the machine's processors."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress
from itertools import accumulate
from operator import truediv
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


# By the controller as /proc/self/cgroup names it (version 2: not at all): where its control groups are, and what a
# group's limit and use are called there and, in memory.stat, what of that use the system gives up when memory is short.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that a process can still take, within the limits of its container or job if it has one."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_by_cgroups(root)]))


def _left_by_cgroups(root: Path) -> list[int]:
    """What is left of each limit: a control group has its own, and those of all that it is nested in."""
    paths, left = dict.fromkeys(CGROUPS, "/"), list[int]()
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    for controller, (mount, *names) in CGROUPS.items():
        for group in accumulate(paths[controller].strip("/").split("/"), truediv, initial=root / mount):
            with suppress(OSError, ValueError):  # no such file, as where a container is its own root, or "max"
                left.append(_left(group, *names))
    return left


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int:
    """Files that were read count as used, until something else needs their place."""
    left = int((group / limit).read_text()) - int((group / used).read_text())
    with suppress(OSError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left += int(stat.get(reclaimable, 0))
    return left
