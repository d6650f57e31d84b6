"""`lowmem-npo env`: what a bug report should include."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_npo.commands.arguments import parse_options
from lowmem_npo.environment import PACKAGES, package_version
from lowmem_npo.libraries import hub_problem
from lowmem_npo.sizes import amount


@dataclass
class Env:
    """Print versions, GPU and memory."""


def main(arguments: Sequence[str]) -> None:
    parse_options(Env, arguments, "env")
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, package_version(name) or "not installed") for name in PACKAGES]
    rows += [*_gpus(), *_memory()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _gpus() -> list[tuple[str, str]]:
    import torch  # late: --help need not load it

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        return [("cuda", f"no GPU visible (PyTorch built for {build})")]
    rows = [("cuda", str(torch.version.cuda))]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16"
        memory = f"{amount(free)} of {amount(total)} free"
        rows.append((f"gpu {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {bf16}, {memory}"))
    return rows


def _memory() -> list[tuple[str, str]]:
    import psutil
    import torch

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.getcwd())
    return [
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("host memory", f"{amount(memory.available)} of {amount(memory.total)} available"),
        ("disk here", f"{amount(disk.free)} of {amount(disk.total)} free"),
        ("hub", f"cannot be reached ({problem})" if (problem := hub_problem()) else "can be reached"),
    ]
