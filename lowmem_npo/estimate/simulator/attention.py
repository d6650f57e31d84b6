"""Which attention kernel PyTorch would run on a CUDA GPU, and what this kernel allocates.

Without a GPU, `scaled_dot_product_attention` falls back to the form that materialises all scores, which no GPU would
run. The choice and the workspaces below are those of PyTorch's `sdp_utils.cpp`, `flash_api.cpp` (FlashAttention 2, Dao
2023) and `attention_backward.cu` (memory-efficient attention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_npo.estimate.simulator.storages import up

aten = torch.ops.aten


def scaled_dot_product_attention(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, H or fewer, S, D)
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as a GPU of compute capability 8.0 or more dispatches it."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    half = query.dtype in (torch.bfloat16, torch.float16)
    same_size = query.shape[-1] == value.shape[-1]  # not in multi-head latent attention
    if attn_mask is None and half and same_size and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:  # the other fused kernel has none
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, float("-inf"))
        bias = bias.expand(*query.shape[:3], key.shape[2])
    needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_lse, dropout_p, is_causal, scale=scale
    )[0]


def backward_workspace(func: Any, args: tuple) -> int:
    """Bytes that an attention backward allocates and frees before it returns; 0 for every other operator."""
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        query, key = args[1], args[2]
        batch, heads, length, size = query.shape
        rows = batch * heads * up(length, 128)
        workspace = 4 * rows * (up(size, 32 if size <= 128 else 64) + 1)  # dQ accumulates in float32; and row sums
        if key.shape[1] != heads:  # every query head has its own dK and dV until they are summed
            workspace += 2 * 2 * batch * heads * key.shape[2] * size
        return workspace
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        query, key, value = args[1:4]
        batch, heads, length, size = query.shape
        if query.dtype == torch.float32:
            return 4 * batch * heads * length
        keys_and_values = up(key.shape[2], 64) * (size + value.shape[-1])
        return 4 * batch * heads * (up(length, 64) * (size + 1) + keys_and_values)
    return 0
