"""Where the weights that --stream-weights copies to the GPU are kept on this host, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import get_int_from_env

from lowmem_npo.config import ModelConfig
from lowmem_npo.environment import available_memory
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.gpus import GPUS, GPUModel
from lowmem_npo.estimate.step import Estimate
from lowmem_npo.estimate.time import BUS
from lowmem_npo.files import shortage
from lowmem_npo.model.loading import local_cache_entry
from lowmem_npo.model.quantized_cache import CacheEntry
from lowmem_npo.sizes import compared, gib

LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
"""Where torchrun and the kinds of mpirun say how many processes this host has, as accelerate reads it."""
ASSUMED_RATE = 2e9  # bytes a second of a disk that has no file yet to try: an NVMe drive of PCIe 3


@dataclass(frozen=True)
class StreamingHost:
    """The decision of --stream-from, and the figures that it goes by."""

    in_file: bool  # read in every pass from the cache of quantised weights
    needed: int  # bytes of memory, for all processes on this host
    available: int
    copied: int  # bytes to the GPU in a step, or in a pass of a model that is only asked
    disk_rate: float = ASSUMED_RATE  # bytes a second
    measured: bool = False  # whether that was measured
    refused: UserError | None = None  # why the cache can be neither read nor written
    unit: str = "step"  # or "pass"

    @property
    def read_seconds(self) -> float:
        """How long a step reads, if the operating system keeps nothing of what it has read."""
        return self.copied / self.disk_rate if self.in_file else 0.0

    def pass_seconds(self, streamed: int, gpu: GPUModel | None) -> float:
        """How long one pass through all layers copies or reads the `streamed` bytes of their weights: those of PCIe 4
        where the GPU is not known."""
        rate = BUS * 1e9 * (gpu or GPUS[0]).bus
        return streamed / min(rate, self.disk_rate if self.in_file else rate)

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"Streamed weights: {gib(self.needed)} of host memory (available: {gib(self.available)}), and "
            f"{gib(self.copied)} copied to the GPU in a {self.unit}."
        ]
        return [*lines, f"This host reads {self.reads}."] if self.in_file else lines

    @property
    def reads(self) -> str:
        """What is read from the disk, and how long that takes; for people."""
        known = "measured" if self.measured else "assumed"
        return (
            f"the weights from --quantized-cache in every pass, {self.read_seconds:.1f} s of a {self.unit} at "
            f"{self.disk_rate / 1e9:.1f} GB/s ({known}), less where memory is left to keep them in"
        )

    def check(self) -> None:
        """Raises UserError if the memory or the cache's disk is too small, or the cache is damaged."""
        if self.refused is not None:
            raise self.refused
        if self.needed <= self.available:
            return
        takes, has = compared(self.needed, self.available, decimals=2)
        if self.in_file:
            raise UserError(
                f"--stream-weights from --quantized-cache takes {takes} of host memory, and {has} are available: free "
                "some, or take a smaller model."
            )
        raise UserError(
            f"--stream-weights keeps the weights in host memory, which takes {takes}, and {has} are available: free "
            "some, use --qlora if this run does not, read them from a disk (--qlora --quantized-cache DIR), or take a "
            "smaller model."
        )


def streaming_host(
    model: ModelConfig, source: str, estimate: Estimate, copied: int, unit: str = "step"
) -> StreamingHost:
    """Decides by the memory that this host has available, within the limit of its container.

    Args:
        source: --stream-from.
        copied: bytes to the GPU in a `unit`.
    """
    processes, available = get_int_from_env(LOCAL_PROCESSES, 1), available_memory()
    cache = model.quantized_cache
    in_memory = StreamingHost(False, estimate.host_bytes * processes, available, copied, unit=unit)
    if source == "memory" or cache is None or (source == "auto" and in_memory.needed <= available):
        return in_memory
    staged = estimate.host_bytes - estimate.streamed_bytes + 2 * estimate.largest_block_bytes
    in_file = StreamingHost(True, staged * processes, available, copied, unit=unit)
    try:
        entry = local_cache_entry(model)
        if entry is not None and entry.exists():
            return replace(in_file, disk_rate=entry.read_rate(), measured=True)
        _check_room(CacheEntry.folder(cache), estimate.weights_bytes)
    except UserError as error:
        return replace(in_file, refused=error)
    return in_file


def _check_room(folder: Path, size: int) -> None:
    if short := shortage(folder, size, decimals=2):
        takes, has = short
        raise UserError(
            f"--quantized-cache: the weights take {takes}, and {has} are free in '{folder}', from where they are to be "
            "read."
        )
