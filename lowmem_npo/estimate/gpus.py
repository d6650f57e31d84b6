"""The GPUs whose time can be predicted: what their vendor says of them, and what of that matrix products reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_npo.errors import UserError
from lowmem_npo.sizes import UNITS


@dataclass(frozen=True)
class GPUModel:
    """One model of GPU, by its data sheet: without sparsity, at boost clock."""

    name: str  # of --gpu
    device_name: str  # regular expression of all that `torch.cuda.get_device_name` may call it
    capability: tuple[int, int]
    memory: int  # GiB, as sold
    half: float  # TFLOP/s of bf16 tensor cores that sum in float32; 0: it has no bf16
    single: float  # TFLOP/s of float32, without tensor cores
    bandwidth: float  # GB/s of its memory
    bus: float  # GB/s of PCIe, in one direction
    reached: float  # of `half`, by the best matrix products that were measured

    @property
    def memory_bytes(self) -> int:
        return self.memory * UNITS["gib"]


# Sources. NVIDIA's data sheets and architecture white papers (GA102, Ada, Blackwell RTX, A100, H100, H200, L4, T4): all
# but the last column. That: Bekman, ML Engineering, table of Maximum Achievable Matmul FLOPS (A100, H100, H200); cuBLAS
# on an Ada card reaches 0.88-0.96 (LeetCUDA, HGEMM on the L20), taken for the GeForce cards, too; the L4, of 72 W, and
# the H100 of 350 W are held back by their power, and are guesses.
GPUS = (
    GPUModel("rtx-3090", "GeForce RTX 3090", (8, 6), 24, 71.0, 35.6, 936, 32, 0.90),
    GPUModel("rtx-4090", "GeForce RTX 4090", (8, 9), 24, 165.2, 82.6, 1008, 32, 0.90),
    GPUModel("rtx-5090", "GeForce RTX 5090", (12, 0), 32, 209.5, 104.8, 1792, 64, 0.90),
    GPUModel("a100-40gb", "A100-(SXM4|PCIE)-40GB", (8, 0), 40, 312.0, 19.5, 1555, 32, 0.84),
    GPUModel("a100-80gb", "A100(-SXM4-80GB|-PCIE-80GB| 80GB PCIe)", (8, 0), 80, 312.0, 19.5, 1935, 32, 0.84),
    GPUModel("h100-sxm", "H100( 80GB HBM3|-SXM5-80GB)", (9, 0), 80, 989.4, 66.9, 3350, 64, 0.80),
    GPUModel("h100-pcie", "H100 PCIe", (9, 0), 80, 756.0, 51.2, 2000, 64, 0.65),
    GPUModel("h200", "H200", (9, 0), 141, 989.4, 66.9, 4800, 64, 0.80),
    GPUModel("l4", "L4", (8, 9), 24, 121.0, 30.3, 300, 32, 0.60),
    GPUModel("t4", "(Tesla )?T4", (7, 5), 16, 0.0, 8.1, 320, 16, 0.90),
)  # fmt: skip
SPELLINGS = {"h100": "h100-sxm", "a100": "a100-40gb", "a100-40": "a100-40gb", "a100-80": "a100-80gb"}


@dataclass(frozen=True)
class Device:
    """A GPU to estimate for: this machine's, or one that is only named."""

    capability: tuple[int, int]
    name: str  # as PyTorch or --gpu calls it
    model: GPUModel | None  # None: its time cannot be predicted
    available: int | None = None  # bytes that a run may take of it; None: not known


def named(name: str) -> Device:
    """The GPU of --gpu `name`: one of the table's, in any usual spelling, or a device name.

    Raises:
        UserError: the table has no such GPU.
    """
    model = of_device_name(name)
    if model is None:
        plain = re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|geforce|tesla", "", name.lower())).strip("-")
        plain = SPELLINGS.get(plain, plain)
        model = next((gpu for gpu in GPUS if plain in (gpu.name, gpu.name.removeprefix("rtx-"))), None)
    if model is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise UserError(f"--gpu {name}: nothing is known of this GPU, so its time cannot be predicted; known: {known}.")
    return Device(model.capability, model.name, model, model.memory_bytes)


def of_device_name(name: str) -> GPUModel | None:
    """The model that PyTorch calls `name`; None for one that is not in the table, a laptop's or a part of one (MIG)."""
    return next((gpu for gpu in GPUS if re.fullmatch(f"(NVIDIA )?{gpu.device_name}", name)), None)


def own_device() -> Device | None:
    """This process's GPU; None if it sees none. What other processes hold of it is not available."""
    import torch  # late: a name is looked up without it

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    available = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return Device(torch.cuda.get_device_capability(), name, of_device_name(name), available)


def check_number_type(device: Device, dtype: str) -> None:
    """Raises UserError if `device` cannot compute in `dtype`, of --dtype."""
    if dtype == "bf16" and device.capability < (8, 0):
        raise UserError(f"{device.name} has no bf16 arithmetic (it needs compute capability 8.0): use --dtype float32.")
