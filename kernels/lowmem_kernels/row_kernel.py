"""The row kernel of the `chunks` engine: a row of logits becomes log-prob, KL and, in place, the gradient's row.

A program takes ROWS tokens. Its first walk over their rows collects the statistics (device_math.py), target left out
and merged last; the second writes ce_weight * d(-logp)/d(product) + kl_weight * d kl/d(product) in the dtype of the
head's weight, which the next product reads. It goes into the bytes of the row itself: entry i of a 16-bit row lies at
byte 2i, and the float32 logits up to byte 4i have been read by then; a barrier makes that true for all the threads.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from lowmem_kernels.device_math import MASKED, largest_slope, logits, loss_slope, merge, rounded, softplus, statistics


@dataclass(frozen=True)
class RowConfig:
    ROWS: int
    BLOCK: int
    num_warps: int
    num_stages: int = 1


def row_config(capability: tuple[int, int]) -> RowConfig:
    """The configuration for this GPU. With 16 warps on sm_100, ptxas takes but 64 registers and spills some."""
    return RowConfig(ROWS=1, BLOCK=4096, num_warps=8 if capability[0] == 10 else 16)


@triton.jit(do_not_specialize=["num_rows"])  # compiled once, however many tokens a batch has
def row_kernel(
    z_ptr,  # (r, stride) float32: h W^T; on return its first V entries of dtype GRAD_DTYPE are the gradient
    ref_z_ptr,  # (r, stride) float32: h_ref W^T, or None
    bias_ptr,  # (V,) or None
    targets_ptr,  # (r,) int64 or None
    ce_weight_ptr,  # (r,) float32 or None
    kl_weight_ptr,  # (r,) float32 or None
    logprobs_ptr,  # (r,) float32, written; or None
    kl_ptr,  # (r,) float32, written; or None
    magnitude_ptr,  # (r,) float32, written; or None. If given, the gradient's row is divided by it
    num_rows,  # r
    stride,
    V,
    softcap,  # a number or None
    logit_scale,
    POLICY_FIRST: tl.constexpr,  # KL(policy || reference)
    NEED_GRAD: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WITH_REF: tl.constexpr = ref_z_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    z_row = z_ptr + (row * stride)[:, None]
    ref_z_row = None
    if WITH_REF:
        ref_z_row = ref_z_ptr + (row * stride)[:, None]
    zero = tl.zeros((ROWS,), tl.float32)
    nowhere = tl.full((ROWS,), -1, tl.int64)
    target = nowhere
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=is_row, other=-1)

    # First walk: the statistics of all entries but the target.
    whole = (zero + MASKED, zero, zero + MASKED, zero, zero)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        z, _ = load_logits(z_row, bias_ptr, column, is_row, V, target, softcap, logit_scale)
        ref_z = z
        if WITH_REF:
            ref_z, _ = load_logits(ref_z_row, bias_ptr, column, is_row, V, target, softcap, logit_scale)
        whole = merge(whole, statistics(z, ref_z, WITH_REF, POLICY_FIRST), WITH_REF, POLICY_FIRST)

    # The target. Its log-probability, and 1 - p(target), are exact also where p(target) is nearly 1.
    others = zero
    if targets_ptr is not None:
        at = target[:, None]
        z_target = tl.sum(load_logits(z_row, bias_ptr, at, is_row, V, nowhere, softcap, logit_scale)[0], 1)
        ref_z_target = zero
        if WITH_REF:
            ref_z_target = tl.sum(load_logits(ref_z_row, bias_ptr, at, is_row, V, nowhere, softcap, logit_scale)[0], 1)
        odds = (z_target - whole[0]) - whole[1]
        others = tl.exp(-softplus(odds))
        tl.store(logprobs_ptr + row, -softplus(-odds), mask=is_row)
        whole = merge(whole, (z_target, zero, ref_z_target, zero, zero), WITH_REF, POLICY_FIRST)
    if WITH_REF:
        tl.store(kl_ptr + row, whole[4], mask=is_row)

    # Second walk: the gradient.
    if NEED_GRAD:
        ce_weight, kl_weight = None, None
        if ce_weight_ptr is not None:
            ce_weight = tl.load(ce_weight_ptr + row, mask=is_row, other=0.0)
        if kl_weight_ptr is not None:
            kl_weight = tl.load(kl_weight_ptr + row, mask=is_row, other=0.0)
        magnitude = zero + 1.0
        if magnitude_ptr is not None:
            magnitude = largest_slope(others, whole[4], ce_weight, kl_weight, logit_scale) / 1024.0
            tl.store(magnitude_ptr + row, magnitude, mask=is_row)
        grad_row = z_row.to(tl.pointer_type(GRAD_DTYPE), bitcast=True)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            z, slope = load_logits(z_row, bias_ptr, column, is_row, V, nowhere, softcap, logit_scale)
            ref_z = z
            if kl_weight is not None:
                ref_z, _ = load_logits(ref_z_row, bias_ptr, column, is_row, V, nowhere, softcap, logit_scale)
            is_target = column == target[:, None]
            grad = slope * loss_slope(z, ref_z, is_target, whole, others, ce_weight, kl_weight, POLICY_FIRST)
            grad = rounded(grad / magnitude[:, None], GRAD_DTYPE)
            tl.debug_barrier()  # every thread has read its logits before any thread overwrites them
            tl.store(grad_row + column, grad, mask=is_row[:, None] & (column < V))


@triton.jit
def load_logits(row_ptr, bias_ptr, column, is_row, V, left_out, softcap, logit_scale):
    """Logits (rows, columns) and their slopes; MASKED beyond the vocabulary and in each row's column left_out."""
    inside = column < V
    product = tl.load(row_ptr + column, mask=is_row[:, None] & inside, other=0.0)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + column, mask=inside & (column >= 0), other=0.0).to(tl.float32)
    z, slope = logits(product, softcap, logit_scale)
    return tl.where(inside & (column != left_out[:, None]), z, MASKED), slope
