"""Measured GPU memory: PyTorch's allocator, the driver's figure for the whole process, and prediction compared."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import torch

from lowmem_npo.estimate.step import Estimate
from lowmem_npo.sizes import gib

TOLERANCE = 0.05  # relative; a prediction that is further off is reported


@dataclass(frozen=True)
class Measurement:
    """Bytes on the GPU."""

    allocated: int  # the peak of all tensors
    reserved: int  # the peak of what PyTorch's allocator took from the driver
    process: int | None  # held by the process now, by the driver's count: `reserved` and CUDA context; None if unknown


def restart_peak(device: torch.device) -> None:
    """Starts a new measurement."""
    torch.cuda.reset_peak_memory_stats(device)


def measure(device: torch.device) -> Measurement:
    """The peak since `restart_peak`."""
    return Measurement(
        torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), process_bytes(os.getpid())
    )


def process_bytes(pid: int) -> int | None:
    """GPU memory of process `pid` by the driver's count (NVML, through nvidia-smi); None if it gives none."""
    query = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        processes = [line.split(",") for line in lines if line.strip()]
        own = [used for number, used in processes if int(number) == pid]
        if not own and len(processes) == 1:  # in a container: the driver knows the process by its number on the host
            own = [processes[0][1]]
        return sum(int(used) for used in own) * 2**20 or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def compare(predicted: Estimate, measured: Measurement) -> list[str]:
    """The measured peak beside the predicted one, as lines to print; a warning if they are more than 5% apart."""
    process = "unknown" if measured.process is None else gib(measured.process)
    error = measured.allocated / predicted.peak_bytes - 1
    lines = [
        f"GPU memory: peak {gib(measured.allocated)}, predicted {gib(predicted.peak_bytes)} ({error:+.1%}); "
        f"reserved {gib(measured.reserved)}, predicted to need {gib(predicted.needed_bytes)}; "
        f"the whole process {process}."
    ]
    if abs(error) > TOLERANCE:
        lines.append(
            "Warning: prediction and measurement differ by more than 5%; please report this with `lowmem-npo env`."
        )
    return lines
