"""What a GPU really held: PyTorch's allocator, and the driver's figure for the whole process."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import torch

from lowmem_npo.sizes import gib

APART = 0.05  # a prediction further off than this is worth a word


@dataclass(frozen=True)
class Measurement:
    """Bytes on the GPU."""

    allocated: int  # most that tensors took at once
    reserved: int  # most that PyTorch's allocator had taken from the driver
    process: int | None  # what the driver says the process holds now: `reserved` and the CUDA context; None if unknown


def restart_peak(device: torch.device) -> None:
    """What is measured from now on is of what follows."""
    torch.cuda.reset_peak_memory_stats(device)


def measure(device: torch.device) -> Measurement:
    """The peak since `restart_peak`."""
    return Measurement(
        torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), process_bytes(os.getpid())
    )


def process_bytes(pid: int) -> int | None:
    """What the driver (NVML, as nvidia-smi reads it) says process `pid` holds on its GPUs; None if it does not tell."""
    query = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        found = [line.split(",") for line in lines if line.strip()]
        # In a container the driver's process numbers are the host's; a process alone on the GPU is known anyhow.
        own = [used for number, used in found if int(number) == pid] or ([found[0][1]] if len(found) == 1 else [])
        return sum(int(used) for used in own) * 2**20 or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def told(predicted: int, measured: Measurement) -> list[str]:
    """Predicted against measured, for people; a warning if they are more than 5% apart."""
    process = "unknown" if measured.process is None else gib(measured.process)
    off = measured.allocated / predicted - 1
    lines = [
        f"GPU memory: peak {gib(measured.allocated)}, predicted {gib(predicted)} ({off:+.1%}); "
        f"reserved {gib(measured.reserved)}, the whole process {process}."
    ]
    if abs(off) > APART:
        lines.append(
            "Warning: prediction and measurement are more than 5% apart; please report it, with `lowmem-npo env`."
        )
    return lines
