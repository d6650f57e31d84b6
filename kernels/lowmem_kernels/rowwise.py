"""What norms, rotary embeddings and gated activations have in common: engines, layouts in memory, checks of arguments.

None of them holds a float32 copy of a tensor: a kernel reads its rows, computes in float32 and writes the result in the
dtype of its input. Backward passes recompute from the inputs, which are all that is kept.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from lowmem_kernels.dispatch import check_triton
from lowmem_kernels.head import FLOAT_DTYPES

RowEngine = Literal["auto", "triton", "torch"]


def fused(like: Tensor, engine: RowEngine = "auto") -> bool:
    """Whether a Triton kernel does the work on tensors such as `like`: with "auto", on CUDA where there is Triton.

    Not in a function that torch.compile compiles: it fuses the plain form by itself.

    Raises:
        ValueError: the engine does not exist, or cannot run here.
    """
    if engine not in ("auto", "triton", "torch"):
        raise ValueError(f"engine must be 'auto', 'triton' or 'torch', not {engine!r}")
    if engine == "torch" or torch.compiler.is_compiling():
        return False
    if engine == "auto":
        return like.is_cuda and _has_triton()
    check_triton(engine, like)
    return True


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_dense(x: Tensor) -> bool:
    """Whether the rows (the last dimension) of x fill its memory without gaps, in any order.

    So does a (B, H, S, D) view of a contiguous (B, S, H, D) tensor. `torch.empty_like` has the same order.
    """
    expected = 1
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return False
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where its rows do not fill its memory."""
    return x if is_dense(x) else x.contiguous()


def laid_out_like(x: Tensor, pattern: Tensor) -> Tensor:
    """x, with the strides of `pattern`, which is dense and has its shape."""
    return x if x.stride() == pattern.stride() else torch.empty_like(pattern, dtype=x.dtype).copy_(x)


def check_floating(name: str, x: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """x has a dtype the kernels compute in and, if given, device, dtype of another argument."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
    if like is not None:
        check_device(name, x, like)
        if x.dtype != like[1].dtype:
            raise ValueError(f"{name} is {x.dtype}, but {like[0]} is {like[1].dtype}; cast one of them")


def check_device(name: str, x: Tensor, like: tuple[str, Tensor]) -> None:
    if x.device != like[1].device:
        raise ValueError(f"{name} is on {x.device}, but {like[0]} is on {like[1].device}")


def check_frozen(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but it is frozen here; pass {name}.detach() or freeze it")
