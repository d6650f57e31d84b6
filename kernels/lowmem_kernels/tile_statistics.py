"""The first sweep of the `tiles` engine: log-probabilities and KL, with the logits never outside the chip.

`sweep_kernel`: a program takes ROWS tokens and one of several equal shares of the vocabulary, which it walks in tiles
of COLUMNS entries: policy and reference logits of a tile are computed from one reading of W, reduced to five numbers
per token (device_math.py; two without a reference) and merged with those of the tiles before. `finalise_kernel` merges
the shares, always in the same order, adds the target, and writes the results.
"""

import triton
import triton.language as tl

from lowmem_kernels.device_math import MASKED, dot, largest_slope, logits, merge, softplus, statistics


@triton.jit(do_not_specialize=["N", "tiles_per_share"])  # compiled once, however many tokens a batch has
def sweep_kernel(
    hidden_ptr,  # (N, D)
    ref_hidden_ptr,  # (N, D) or None
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,) int64 or None; left out of the statistics
    statistics_ptr,  # (shares, 5 or 2, N) float32, written
    N,
    V,
    D,
    hidden_stride_n,
    hidden_stride_d,
    ref_hidden_stride_n,
    ref_hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    tiles_per_share,
    softcap,  # a number or None
    logit_scale,
    POLICY_FIRST: tl.constexpr,
    EVEN_D: tl.constexpr,  # DEPTH divides D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    WITH_REF: tl.constexpr = ref_hidden_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    is_row = row < N
    hidden_row = hidden_ptr + row[:, None] * hidden_stride_n
    ref_hidden_row = None
    if WITH_REF:
        ref_hidden_row = ref_hidden_ptr + row[:, None] * ref_hidden_stride_n
    target = tl.full((ROWS,), -1, tl.int32)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=is_row, other=-1).to(tl.int32)

    zero = tl.zeros((ROWS,), tl.float32)
    whole = (zero + MASKED, zero, zero + MASKED, zero, zero)
    first_tile = share * tiles_per_share
    last_tile = tl.minimum(first_tile + tiles_per_share, tl.cdiv(V, COLUMNS))
    for tile in range(first_tile, last_tile):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        z, _, ref_z = tile_logits(
            hidden_row, ref_hidden_row, weight_ptr, bias_ptr, is_row, column, V, D,
            hidden_stride_d, ref_hidden_stride_d, weight_stride_v, weight_stride_d, softcap, logit_scale,
            EVEN_D, DEPTH,
        )  # fmt: skip
        counts = (column < V)[None, :] & (column[None, :] != target[:, None])
        z = tl.where(counts, z, MASKED)
        if WITH_REF:
            ref_z = tl.where(counts, ref_z, MASKED)
        whole = merge(whole, statistics(z, ref_z, WITH_REF, POLICY_FIRST), WITH_REF, POLICY_FIRST)
    count = 5 if WITH_REF else 2
    store_statistics(statistics_ptr + share.to(tl.int64) * count * N + row, N, is_row, whole, WITH_REF)


@triton.jit(do_not_specialize=["N", "shares"])
def finalise_kernel(
    hidden_ptr,  # (N, D)
    ref_hidden_ptr,  # (N, D) or None
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,) int64 or None
    ce_weight_ptr,  # (N,) float32 or None; for magnitude only
    kl_weight_ptr,  # (N,) float32 or None; for magnitude only
    statistics_ptr,  # (shares, 5 or 2, N) float32; on return the first share's are those of the whole vocabulary
    logprobs_ptr,  # (N,) float32, written; or None
    kl_ptr,  # (N,) float32, written; or None
    others_ptr,  # (N,) float32, written: the policy's mass on everything but the target; or None
    magnitude_ptr,  # (N,) float32, written: largest_slope / 1024; or None
    N,
    D,
    hidden_stride_n,
    hidden_stride_d,
    ref_hidden_stride_n,
    ref_hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    shares,
    softcap,
    logit_scale,
    POLICY_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    WITH_REF: tl.constexpr = ref_hidden_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    zero = tl.zeros((ROWS,), tl.float32)

    whole = load_statistics(statistics_ptr + row, N, is_row, WITH_REF)
    share_ptr = statistics_ptr + row
    for _ in range(1, shares):
        share_ptr += (5 if WITH_REF else 2) * N
        whole = merge(whole, load_statistics(share_ptr, N, is_row, WITH_REF), WITH_REF, POLICY_FIRST)

    # The target. Its log-probability, and 1 - p(target), are exact also where p(target) is nearly 1.
    others = zero
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=is_row, other=0)
        product, ref_product = zero, zero
        for start in range(0, D, DEPTH):
            d = (start + tl.arange(0, DEPTH)[None, :]).to(tl.int64)
            inside = is_row[:, None] & (d < D)
            w = tl.load(weight_ptr + target[:, None] * weight_stride_v + d * weight_stride_d, mask=inside, other=0.0)
            h = tl.load(hidden_ptr + row[:, None] * hidden_stride_n + d * hidden_stride_d, mask=inside, other=0.0)
            product += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
            if WITH_REF:
                h = ref_hidden_ptr + row[:, None] * ref_hidden_stride_n + d * ref_hidden_stride_d
                ref_product += tl.sum(tl.load(h, mask=inside, other=0.0).to(tl.float32) * w.to(tl.float32), 1)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + target, mask=is_row, other=0.0).to(tl.float32)
            product, ref_product = product + bias, ref_product + bias
        z, _ = logits(product, softcap, logit_scale)
        ref_z, _ = logits(ref_product, softcap, logit_scale)
        odds = (z - whole[0]) - whole[1]
        others = tl.exp(-softplus(odds))
        tl.store(logprobs_ptr + row, -softplus(-odds), mask=is_row)
        whole = merge(whole, (z, zero, ref_z, zero, zero), WITH_REF, POLICY_FIRST)
    if WITH_REF:
        tl.store(kl_ptr + row, whole[4], mask=is_row)

    # What the gradient's sweep needs.
    if others_ptr is not None:
        tl.store(others_ptr + row, others, mask=is_row)
        store_statistics(statistics_ptr + row, N, is_row, whole, WITH_REF)
    if magnitude_ptr is not None:
        ce_weight, kl_weight = None, None
        if ce_weight_ptr is not None:
            ce_weight = tl.load(ce_weight_ptr + row, mask=is_row, other=0.0)
        if kl_weight_ptr is not None:
            kl_weight = tl.load(kl_weight_ptr + row, mask=is_row, other=0.0)
        magnitude = largest_slope(others, whole[4], ce_weight, kl_weight, logit_scale) / 1024.0
        tl.store(magnitude_ptr + row, magnitude, mask=is_row)


@triton.jit
def tile_logits(
    hidden_row, ref_hidden_row, weight_ptr, bias_ptr, is_row, column, V, D,
    hidden_stride_d, ref_hidden_stride_d, weight_stride_v, weight_stride_d, softcap, logit_scale,
    EVEN_D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(z, dz / d product, the reference's z or again z) for the tokens at the (rows, 1) pointers hidden_row."""
    d = tl.arange(0, DEPTH)
    is_column = column < V
    h_ptr = hidden_row + d[None, :] * hidden_stride_d
    w_ptr = weight_ptr + column.to(tl.int64)[None, :] * weight_stride_v + d[:, None] * weight_stride_d
    product = tl.zeros((is_row.shape[0], column.shape[0]), tl.float32)
    ref_product = product
    ref_h_ptr = h_ptr
    if ref_hidden_row is not None:
        ref_h_ptr = ref_hidden_row + d[None, :] * ref_hidden_stride_d
    for start in range(0, D, DEPTH):
        is_d = d < D - start
        h_mask, w_mask = is_row[:, None], is_column[None, :]
        if not EVEN_D:
            h_mask, w_mask = h_mask & is_d[None, :], w_mask & is_d[:, None]
        w = tl.load(w_ptr, mask=w_mask, other=0.0)
        product = dot(tl.load(h_ptr, mask=h_mask, other=0.0), w, product)
        if ref_hidden_row is not None:
            ref_product = dot(tl.load(ref_h_ptr, mask=h_mask, other=0.0), w, ref_product)
            ref_h_ptr += DEPTH * ref_hidden_stride_d
        h_ptr += DEPTH * hidden_stride_d
        w_ptr += DEPTH * weight_stride_d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        product, ref_product = product + bias, ref_product + bias
    z, slope = logits(product, softcap, logit_scale)
    ref_z = z
    if ref_hidden_row is not None:
        ref_z, _ = logits(ref_product, softcap, logit_scale)
    return z, slope, ref_z


@triton.jit
def store_statistics(row_ptr, N, is_row, whole, WITH_REF: tl.constexpr):
    tl.store(row_ptr, whole[0], mask=is_row)
    tl.store(row_ptr + N, whole[1], mask=is_row)
    if WITH_REF:
        tl.store(row_ptr + 2 * N, whole[2], mask=is_row)
        tl.store(row_ptr + 3 * N, whole[3], mask=is_row)
        tl.store(row_ptr + 4 * N, whole[4], mask=is_row)


@triton.jit
def load_statistics(row_ptr, N, is_row, WITH_REF: tl.constexpr):
    top = tl.load(row_ptr, mask=is_row, other=0.0)
    rest = tl.load(row_ptr + N, mask=is_row, other=0.0)
    ref_top, shift, kl = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    if WITH_REF:
        ref_top = tl.load(row_ptr + 2 * N, mask=is_row, other=0.0)
        shift = tl.load(row_ptr + 3 * N, mask=is_row, other=0.0)
        kl = tl.load(row_ptr + 4 * N, mask=is_row, other=0.0)
    return top, rest, ref_top, shift, kl
