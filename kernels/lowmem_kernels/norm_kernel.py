"""RMSNorm and LayerNorm of rows, forward or backward, in one reading of them.

A program takes ROWS rows, whole, into registers: statistics and result come from there, and the backward pass, which
gets the same rows, needs no statistics to be kept.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from lowmem_kernels.device_math import rounded


@dataclass(frozen=True)
class NormConfig:
    ROWS: int
    BLOCK: int
    num_warps: int
    num_stages: int = 1


def norm_config(capability: tuple[int, int], d: int) -> NormConfig:
    """For rows of d entries: short ones (a head's) several at a time, 16 entries a thread where that is possible.

    With 16 warps on sm_100, ptxas takes but 64 registers and spills some.
    """
    block = triton.next_power_of_2(d)
    rows = max(1, 1024 // block)
    warps = rows * block // 512
    return NormConfig(rows, block, num_warps=max(4, min(warps, 8 if capability[0] == 10 else 16)))


@triton.jit(do_not_specialize=["num_rows"])  # compiled once, however many tokens a batch has
def norm_kernel(
    x_ptr,  # (n, D)
    grad_ptr,  # (n, D) d loss / d y, or None: forward
    weight_ptr,  # (D,) or None
    bias_ptr,  # (D,) or None
    out_ptr,  # (n, D) written: y, or d loss / d x
    num_rows,  # n
    D,
    eps,
    offset,  # added to the weight
    CENTER: tl.constexpr,  # LayerNorm
    ROUND_FIRST: tl.constexpr,  # the normalised rows are rounded before the weight multiplies them
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < D)
    at = (row * D)[:, None] + column
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    y = x * scale
    weight = None
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
        if CENTER:
            weight = rounded(weight, weight_ptr.dtype.element_ty).to(tl.float32)
    if grad_ptr is None:
        if ROUND_FIRST:
            y = rounded(y, dtype).to(tl.float32)
        if weight is not None:
            y *= weight
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, rounded(y, dtype), mask=inside)
    else:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= weight
        along = (tl.sum(grad * y, 1) / D)[:, None]
        if CENTER:
            grad -= (tl.sum(grad, 1) / D)[:, None]
        tl.store(out_ptr + at, rounded((grad - y * along) * scale, dtype), mask=inside)
