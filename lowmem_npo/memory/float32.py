"""Norms and rotary embeddings, which compute in float32: whole, they would be the largest tensors of a layer.

A norm converts the hidden states to float32 and keeps that copy for its backward pass: twice the size of the bf16
states, which are kept anyhow. The rotary embedding of the OLMo family makes several float32 copies of queries and keys.

On a GPU the fused kernels of `lowmem_kernels` do the work of those that they know (fused.py), without any copy, and
that of an MLP or of experts between their products, too. The others work on slices: a norm on rows, of which it keeps
only the states and recomputes each slice; a rotary embedding, which treats every head by itself, on a few heads at a
time. The arithmetic is the model's own, slice by slice, so the results are the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lowmem_npo.memory.fused import (
    ActivationForm,
    GatedForm,
    PackedForm,
    activation_form,
    fuses,
    gated_form,
    norm_form,
    packed_form,
)
from lowmem_npo.memory.fused_rotary import fused_rotary, rotary_arguments
from lowmem_npo.memory.tiling import TiledForward
from lowmem_npo.model.layers import decoder, decoder_layers

ROWS = 2048  # as float32, at hidden size 4096: 32 MiB
HEAD_SLICES = 4


def slice_float32(model: PreTrainedModel, rows: int = ROWS) -> None:
    """Makes every norm, every activation and every rotary embedding written in transformers' usual way run as a fused
    kernel or, norms and rotary embeddings that have none, on slices.

    Args:
        rows: tokens per slice; a smaller batch is not sliced on a CPU.
    """
    for module in decoder(model).modules():
        if "forward" in vars(module):  # another switch has replaced it
            continue
        if _is_norm(module):
            module.forward = LeanNorm(module, rows)
        elif (form := gated_form(module)) is not None:
            module.forward = LeanMLP(module, form)
        elif hasattr(module, GATE):
            if (gate := packed_form(module)) is not None:
                setattr(module, GATE, LeanActivation(getattr(module, GATE), gate))
        elif (activation := activation_form(module)) is not None:
            module.forward = LeanActivation(module.forward, activation)
    for module in decoder_layers(model).modules():
        namespace = _forward_globals(module)
        names = [name for name in _global_names(module) if "rotary" in name and rotary_arguments(namespace.get(name))]
        if names:
            module.forward = WithLeanRotary(module.forward, namespace, names, rows)


GATE = "_apply_gate"  # as transformers' experts call it


class LeanNorm:
    """Replaces the `forward` of a norm with frozen weights: fused on a GPU, else on slices of rows.

    A slice or less is whole on a CPU, where the time of one more operator is dearer than a copy of a few rows.
    """

    def __init__(self, norm: nn.Module, rows: int) -> None:
        self.norm, self.rows, self.form = norm, rows, norm_form(norm)
        self.plain = norm.forward
        self.tiled = TiledForward(norm, rows, width=next((p.numel() for p in norm.parameters()), None))

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        if args or options:
            return self.plain(x, *args, **options)
        if fuses(x):
            if self.form is not None and self.form.takes(x, self.norm):
                return self.form(x, self.norm)
            return self.tiled(x)
        return self.plain(x) if x.numel() <= self.rows * x.shape[-1] else self.tiled(x)


class LeanMLP:
    """Replaces the `forward` of a gated MLP: the activation and its product with `up` are fused on a GPU."""

    def __init__(self, mlp: nn.Module, form: GatedForm) -> None:
        self.mlp, self.form, self.plain = mlp, form, mlp.forward

    def __call__(self, x: Tensor) -> Tensor:
        eval_mode = not self.mlp.training  # the form is that of eval mode, without dropout
        return self.form(x, self.mlp) if eval_mode and fuses(x) else self.plain(x)


class LeanActivation:
    """Replaces the `forward` of an activation, or what experts do between their products: fused on a GPU."""

    def __init__(self, plain: Callable[[Tensor], Tensor], form: ActivationForm | PackedForm) -> None:
        self.plain, self.form = plain, form

    def __call__(self, x: Tensor) -> Tensor:
        return self.form(x) if fuses(x) else self.plain(x)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is called a norm, and treats rows alike and each by itself: one input, and one weight per column."""
    named = type(module).__name__.endswith("Norm") or isinstance(module, nn.LayerNorm)
    if not named or isinstance(module, nn.GroupNorm):
        return False
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    no_parts = next(module.children(), None) is None
    return no_parts and len(needed) == 1 and all(p.ndim == 1 for p in module.parameters())


def _forward_globals(module: nn.Module) -> dict[str, Any]:
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})


def _global_names(module: nn.Module) -> list[str]:
    """That methods of the module's class use."""
    methods = (inspect.unwrap(method) for _, method in inspect.getmembers(type(module), inspect.isfunction))
    return sorted({name for method in methods if inspect.isfunction(method) for name in method.__code__.co_names})


class WithLeanRotary:
    """Replaces an attention module's `forward`, which then calls a fused or sliced rotary embedding.

    A global name of the Python module is the only place where transformers' attention lets its rotary embedding be
    replaced; it is restored when the forward returns, so nothing else ever sees it.
    """

    def __init__(self, forward: Callable[..., Any], namespace: dict[str, Any], names: list[str], rows: int) -> None:
        self.forward, self.names, self.rows = forward, names, rows
        self._namespace = Shared(namespace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        namespace = self._namespace.value
        plain = {name: namespace[name] for name in self.names}
        namespace.update({name: partial(self._lean, function) for name, function in plain.items()})
        try:
            return self.forward(*args, **kwargs)
        finally:
            namespace.update(plain)

    def _lean(self, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if (rotated := fused_rotary(plain, args, options)) is not None:
            return rotated
        if rotary_arguments(plain) != ("q", "k", "cos", "sin") or len(args) != 4 or options:
            return plain(*args, **options)
        q, k, cos, sin = args
        slices = math.gcd(HEAD_SLICES, math.gcd(q.shape[1], k.shape[1]))
        if slices == 1 or q.ndim != 4 or q.shape[0] * q.shape[2] <= self.rows:
            return plain(*args)
        return SlicedRotary.apply(q, k, lambda q, k: plain(q, k, cos, sin), slices)


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
