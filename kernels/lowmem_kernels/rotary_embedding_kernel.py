"""Rotary position embedding of queries and keys at once, or its transpose.

A program takes the position of one token, reads its cosines and sines once, and turns every pair of entries of all the
heads. Entries beyond the rotated ones are copied.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from lowmem_kernels.device_math import rounded


@dataclass(frozen=True)
class RotaryConfig:
    HEADS: int  # at a time
    PAIRS: int
    REST: int  # 0: every entry is rotated
    num_warps: int
    num_stages: int = 1


def rotary_config(head_size: int, rotated: int, heads: int) -> RotaryConfig:
    """For heads of head_size entries, of which the first are rotated. At most 1024 pairs at a time."""
    pairs = triton.next_power_of_2(rotated // 2)
    rest = triton.next_power_of_2(head_size - rotated) if head_size > rotated else 0
    at_a_time = max(1, min(triton.next_power_of_2(heads), 1024 // max(pairs, rest)))
    return RotaryConfig(at_a_time, pairs, rest, num_warps=4)


@triton.jit(do_not_specialize=["S", "q_batch", "k_batch", "q_out_batch", "k_out_batch", "table_batch"])
def rotary_kernel(
    q_ptr,  # (B, q_heads, S, D), strides q_batch, q_head, q_token, 1
    k_ptr,  # (B, k_heads, S, D), likewise; or None
    cos_ptr,  # (B or 1, S, R or R/2), strides table_batch (0 for 1), table_token, table_entry
    sin_ptr,  # the same
    q_out_ptr,  # written, as q; strides q_out_...
    k_out_ptr,  # written, as k; strides k_out_...; or None
    S,
    D,
    R,
    q_heads,
    k_heads,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    table_batch,
    table_token,
    table_entry,
    PAIRS_IN: tl.constexpr,  # pairs are neighbours, not entries of the two halves, where they are read
    PAIRS_OUT: tl.constexpr,  # and where they are written
    BY_PAIR: tl.constexpr,  # pair i has entry i of the table; otherwise the entries of its two parts
    ROUND_EACH: tl.constexpr,  # products are rounded before they are added
    BACKWARD: tl.constexpr,  # the transpose
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0)
    batch, position = (token // S).to(tl.int64), (token % S).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    first, second = places(pair, R, PAIRS_IN)
    first_out, second_out = places(pair, R, PAIRS_OUT)
    if BY_PAIR:
        at_first, at_second = pair, pair
    else:  # as the forward pass has them outside
        at_first, at_second = places(pair, R, PAIRS_IN and PAIRS_OUT)
    table = batch * table_batch + position * table_token
    at_first, at_second = table + at_first * table_entry, table + at_second * table_entry
    is_pair = pair < R // 2
    cos_1 = tl.load(cos_ptr + at_first, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + at_second, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + at_first, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + at_second, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1
    q_ptr += batch * q_batch + position * q_token
    q_out_ptr += batch * q_out_batch + position * q_out_token
    turn(q_ptr, q_out_ptr, q_heads, q_head, q_out_head, first, second, first_out, second_out, is_pair,
         cos_1, cos_2, sin_1, sin_2, D, R, ROUND_EACH, HEADS, REST)  # fmt: skip
    if k_ptr is not None:
        k_ptr += batch * k_batch + position * k_token
        k_out_ptr += batch * k_out_batch + position * k_out_token
        turn(k_ptr, k_out_ptr, k_heads, k_head, k_out_head, first, second, first_out, second_out, is_pair,
             cos_1, cos_2, sin_1, sin_2, D, R, ROUND_EACH, HEADS, REST)  # fmt: skip


@triton.jit
def places(pair, R, PAIRS: tl.constexpr):
    """Of the two entries of each pair."""
    if PAIRS:
        return 2 * pair, 2 * pair + 1
    else:
        return pair, pair + R // 2


@triton.jit
def turn(
    x_ptr, out_ptr, heads, stride, out_stride, first, second, first_out, second_out, is_pair,
    cos_1, cos_2, sin_1, sin_2, D, R,
    ROUND_EACH: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token: (x_1 cos_1 - x_2 sin_1, x_2 cos_2 + x_1 sin_2)."""
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[:, None]
        row, out_row = x_ptr + head.to(tl.int64) * stride, out_ptr + head.to(tl.int64) * out_stride
        inside = (head < heads) & is_pair[None, :]
        x_1 = tl.load(row + first[None, :], mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(row + second[None, :], mask=inside, other=0.0).to(tl.float32)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        product_1, cross_1 = x_1 * cos_1, x_2 * sin_1
        product_2, cross_2 = x_2 * cos_2, x_1 * sin_2
        if ROUND_EACH:
            product_1, cross_1 = rounded(product_1, dtype).to(tl.float32), rounded(cross_1, dtype).to(tl.float32)
            product_2, cross_2 = rounded(product_2, dtype).to(tl.float32), rounded(cross_2, dtype).to(tl.float32)
        tl.store(out_row + first_out[None, :], rounded(product_1 - cross_1, dtype), mask=inside)
        tl.store(out_row + second_out[None, :], rounded(product_2 + cross_2, dtype), mask=inside)
        if REST > 0:
            rest = (R + tl.arange(0, REST))[None, :]
            copied = (head < heads) & (rest < D)
            tl.store(out_row + rest, tl.load(row + rest, mask=copied), mask=copied)
