"""Norms and rotary embeddings in slices: they compute in float32, and whole would be the largest tensors of a layer.

A norm converts the hidden states to float32 and keeps that copy for its backward pass: twice the size of the bf16
states, which are kept anyhow. In slices of rows it keeps only those, and recomputes each slice. The rotary embedding of
the OLMo family makes several float32 copies of queries and keys; it treats every head by itself, so it is done a few
heads at a time. The arithmetic is the model's own, slice by slice, so the results are the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lowmem_npo.memory.tiling import tile
from lowmem_npo.model.layers import decoder, decoder_layers

ROWS = 2048  # as float32, at hidden size 4096: 32 MiB
HEAD_SLICES = 4


def slice_float32(model: PreTrainedModel, rows: int = ROWS) -> None:
    """Makes every norm, and every rotary embedding written in transformers' usual way, work on slices.

    Args:
        rows: tokens per slice; a smaller batch is not sliced.
    """
    for module in decoder(model).modules():
        if _is_norm(module) and "forward" not in vars(module):  # not already in a tiled MLP
            tile(module, rows, width=next((p.numel() for p in module.parameters()), None))
    for layer in decoder_layers(model):
        for module in layer.children():
            namespace = _forward_globals(module)
            rotary = namespace.get("apply_rotary_pos_emb")
            if rotary is not None and list(inspect.signature(rotary).parameters)[:4] == ["q", "k", "cos", "sin"]:
                module.forward = WithSlicedRotary(module.forward, namespace, rows)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is called a norm, and treats rows alike and each by itself: one input, and one weight per column."""
    if not type(module).__name__.endswith("Norm") or isinstance(module, nn.GroupNorm):
        return False
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    no_parts = next(module.children(), None) is None
    return no_parts and len(needed) == 1 and all(p.ndim == 1 for p in module.parameters())


def _forward_globals(module: nn.Module) -> dict[str, Any]:
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})


class WithSlicedRotary:
    """Replaces an attention module's `forward`, which then calls a sliced `apply_rotary_pos_emb`.

    A global name of the Python module is the only place where transformers' attention lets its rotary embedding be
    replaced; it is restored when the forward returns, so nothing else ever sees it.
    """

    def __init__(self, forward: Callable[..., Any], namespace: dict[str, Any], rows: int) -> None:
        self.forward, self.rows = forward, rows
        self._namespace = Shared(namespace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        namespace = self._namespace.value
        plain = namespace["apply_rotary_pos_emb"]

        def sliced(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
            slices = math.gcd(HEAD_SLICES, math.gcd(q.shape[1], k.shape[1]))
            if slices == 1 or q.ndim != 4 or q.shape[0] * q.shape[2] <= self.rows:
                return plain(q, k, cos, sin, *others, **options)
            return SlicedRotary.apply(q, k, lambda q, k: plain(q, k, cos, sin, *others, **options), slices)

        namespace["apply_rotary_pos_emb"] = sliced
        try:
            return self.forward(*args, **kwargs)
        finally:
            namespace["apply_rotary_pos_emb"] = plain


class Shared:
    """A value that a deep copy of its owner shares instead of copying."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> Shared:
        return self


class SlicedRotary(torch.autograd.Function):
    """`rotate(q, k)` on (B, heads, S, head size) tensors, a few heads at a time.

    It is linear, so its backward pass needs no values: each slice is differentiated at zero.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], slices: int):
        ctx.rotate, ctx.slices = rotate, slices
        return _by_heads(rotate, q, k, slices)

    @staticmethod
    @once_differentiable
    def backward(ctx, q_grad: Tensor, k_grad: Tensor):
        def pull_back(q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                q, k = (torch.zeros_like(grad).requires_grad_() for grad in (q_grad, k_grad))
                rotated = ctx.rotate(q, k)
            return torch.autograd.grad(rotated, (q, k), (q_grad, k_grad))

        return *_by_heads(pull_back, q_grad, k_grad, ctx.slices), None, None


def _by_heads(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], q: Tensor, k: Tensor, slices: int
) -> tuple[Tensor, Tensor]:
    results = torch.empty_like(q), torch.empty_like(k)
    for parts in zip(*(tensor.chunk(slices, dim=1) for tensor in (q, k, *results)), strict=True):
        for part, done in zip(parts[2:], function(*parts[:2]), strict=True):
            part.copy_(done)
    return results
