"""The second sweep of the `tiles` engine: d loss / d hidden, by computing the logits again.

The vocabulary is taken in chunks of a few thousand entries. `slope_kernel` computes a chunk's logits and writes
d loss / d product, in the dtype of W, into a buffer that is used again for every chunk; `product_kernel` multiplies it
by the chunk of W and adds that to float32 rows, which the last chunk rounds, once, to the dtype of the result. Every
element is written by one program, in the order of the chunks: the same bits every run.
"""

import triton
import triton.language as tl

from lowmem_kernels.device_math import dot, loss_slope, rounded
from lowmem_kernels.tile_statistics import load_statistics, tile_logits


@triton.jit(do_not_specialize=["N"])
def slope_kernel(
    hidden_ptr,  # (N, D)
    ref_hidden_ptr,  # (N, D) or None
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,) int64 or None
    ce_weight_ptr,  # (N,) float32 or None
    kl_weight_ptr,  # (N,) float32 or None
    statistics_ptr,  # (5 or 2, N) float32, of the whole vocabulary
    others_ptr,  # (N,) float32
    magnitude_ptr,  # (N,) float32 or None; if given, the rows are divided by it
    slope_ptr,  # (N, slope_stride), written: the entries first_column, first_column + 1, ...; 0 beyond V
    first_column,
    N,
    V,
    D,
    hidden_stride_n,
    hidden_stride_d,
    ref_hidden_stride_n,
    ref_hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    slope_stride,
    softcap,
    logit_scale,
    POLICY_FIRST: tl.constexpr,
    EVEN_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    WITH_REF: tl.constexpr = ref_hidden_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = first_column + place
    hidden_row = hidden_ptr + row[:, None] * hidden_stride_n
    ref_hidden_row = None
    if WITH_REF:
        ref_hidden_row = ref_hidden_ptr + row[:, None] * ref_hidden_stride_n
    z, slope, ref_z = tile_logits(
        hidden_row, ref_hidden_row, weight_ptr, bias_ptr, is_row, column, V, D,
        hidden_stride_d, ref_hidden_stride_d, weight_stride_v, weight_stride_d, softcap, logit_scale,
        EVEN_D, DEPTH,
    )  # fmt: skip

    target = tl.full((ROWS,), -1, tl.int32)
    ce_weight, kl_weight = None, None
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=is_row, other=-1).to(tl.int32)
    if ce_weight_ptr is not None:
        ce_weight = tl.load(ce_weight_ptr + row, mask=is_row, other=0.0)
    if kl_weight_ptr is not None:
        kl_weight = tl.load(kl_weight_ptr + row, mask=is_row, other=0.0)
    whole = load_statistics(statistics_ptr + row, N, is_row, WITH_REF)
    others = tl.load(others_ptr + row, mask=is_row, other=0.0)
    is_target = column[None, :] == target[:, None]
    slope *= loss_slope(z, ref_z, is_target, whole, others, ce_weight, kl_weight, POLICY_FIRST)
    if magnitude_ptr is not None:
        slope /= tl.load(magnitude_ptr + row, mask=is_row, other=1.0)[:, None]
    slope = tl.where((column < V)[None, :], slope, 0.0)
    slope = rounded(slope, slope_ptr.dtype.element_ty)
    mask = is_row[:, None] & (place < slope_stride)[None, :]
    tl.store(slope_ptr + row[:, None] * slope_stride + place[None, :], slope, mask=mask)


@triton.jit(do_not_specialize=["N"])
def product_kernel(
    slope_ptr,  # (N, slope_stride): d loss / d product of the entries first_column, first_column + 1, ...
    weight_ptr,  # (V, D)
    sum_ptr,  # (N, D) float32: the sum over the chunks so far
    magnitude_ptr,  # (N,) float32 or None; multiplies the result's rows
    grad_ptr,  # (N, D), written after the last chunk
    first_column,
    N,
    V,
    D,
    weight_stride_v,
    weight_stride_d,
    slope_stride,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_d = row < N, d < D
    here = row[:, None] * D + d[None, :]
    mask = is_row[:, None] & is_d[None, :]

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.minimum(slope_stride, V - first_column), DEPTH):
        place = start + tl.arange(0, DEPTH)
        column = first_column + place
        slope_here = slope_ptr + row[:, None] * slope_stride + place[None, :]
        slope = tl.load(slope_here, mask=is_row[:, None] & (place < slope_stride)[None, :], other=0.0)
        weight_here = weight_ptr + column.to(tl.int64)[:, None] * weight_stride_v + d[None, :] * weight_stride_d
        weight = tl.load(weight_here, mask=(column < V)[:, None] & is_d[None, :], other=0.0)
        total = dot(slope, weight, total)
    if not IS_FIRST:
        total += tl.load(sum_ptr + here, mask=mask, other=0.0)
    if IS_LAST:
        if magnitude_ptr is not None:
            total *= tl.load(magnitude_ptr + row, mask=is_row, other=1.0)[:, None]
        tl.store(grad_ptr + here, rounded(total, grad_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sum_ptr + here, total, mask=mask)
