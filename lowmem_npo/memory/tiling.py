"""Modules that treat every token by itself, run on slices of tokens: an MLP's wide activations never exist whole.

A layer's MLP multiplies the hidden size by three or four, several times over, so that under activation checkpointing
its activations are most of what one layer's recomputation holds. Its rows (tokens) are independent: a slice of them can
go forward, and backward, by itself (as in ALST, Bekman et al. 2025, and Liger's and Axolotl's TiledMLP).

Those implementations run every slice three times under checkpointing: in the forward pass, in the layer's
recomputation, whose result is never used, and again in the backward pass, with gradient. Here it is two. The input is
saved by a node of its own *before* anything is computed; non-reentrant checkpointing ends a recomputation as soon as
the last tensor that was saved has been saved again, and that is this input, unless something after the MLP needs its
output. In some architectures this is a norm between MLP and residual (OLMo 2, Gemma 2): it treats rows independently
too, so it is included in the slices. Anything else after the MLP costs the third pass, and stays exact.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lowmem_kernels.dispatch import has_values
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError
from lowmem_npo.model.layers import decoder_layers
from lowmem_npo.model.modes import draws_random_numbers, parts

MLP_NAMES = ("mlp", "feed_forward", "ffn")
POST_NORM_NAMES = ("post_feedforward_layernorm", "post_mlp_layernorm")


def tile_mlps(model: PreTrainedModel, rows: int) -> None:
    """Makes every decoder layer's MLP run `rows` tokens at a time. Exact up to rounding, with any adapters inside.

    Raises:
        UserError: the decoder layers have no MLP of their own that maps one tensor to one tensor.
    """
    mlps = [(mlp, layer) for layer in decoder_layers(model) if (mlp := _first_module(layer, MLP_NAMES)) is not None]
    for mlp, layer in mlps:
        own = getattr(mlp, "original_module", mlp)
        needed = [p for p in inspect.signature(own.forward).parameters.values() if p.default is p.empty]
        if len(needed) != 1:
            raise UserError(f"--tile-mlp: {type(mlp).__name__} takes more than hidden states; leave --tile-mlp out.")
        tile(mlp, rows, followed_by=_first_module(layer, POST_NORM_NAMES))
    if not mlps:
        raise UserError(f"--tile-mlp: the decoder layers of {type(model).__name__} have no MLP of their own to tile.")


def _first_module(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(layer, name, None), nn.Module)), None)


def tile(module: nn.Module, rows: int, followed_by: nn.Module | None = None) -> None:
    """Replaces `module.forward` with its tiled form, which includes `followed_by`, the module called on its output."""
    tiled = TiledForward(module, rows, followed_by)
    module.forward = tiled
    if followed_by is not None:
        followed_by.forward = tiled.already_done


class TiledForward:
    """Replaces the `forward` of a module that maps (..., d) to (..., e), each row by itself.

    Of a module that returns a tuple (an MLP with experts, and its router's scores), only the first element is computed;
    the others, which no decoder layer reads, are None. Called in any other way, the module runs as it is.

    Args:
        width: of a row, if it must be this one: inputs of another are not sliced.
    """

    def __init__(
        self, module: nn.Module, rows: int, followed_by: nn.Module | None = None, width: int | None = None
    ) -> None:
        self.modules = [module] if followed_by is None else [module, followed_by]
        self.forwards = [m.forward for m in self.modules]  # bound methods: a deep copy of the model is tiled by itself
        self.rows, self.width = rows, width
        self.others: tuple[None, ...] = ()  # in place of what a tuple holds beyond its first element
        self._last: Callable[[], Tensor | None] = lambda: None

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        if args or options or self.width not in (None, x.shape[-1]):
            return self._plain(x, *args, **options)
        own = ((part, *named) for m in self.modules for part in parts(m) for named in part._parameters.items())
        trained = {(part, name): p for part, name, p in own if p is not None and p.requires_grad}
        parameters = list(dict.fromkeys(trained.values()))
        slices = Slices(self, x, trained)
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            ticket = _Keep.apply(slices, x, *parameters)
            result = _Run.apply(slices, ticket, x)
        else:
            with torch.no_grad():
                result = slices.forward(x)
        self._last = weakref.ref(result)
        return (result, *self.others) if self.others else result

    def _plain(self, x: Tensor, *args: Any, **options: Any) -> Any:
        result = self.forwards[0](x, *args, **options)
        for forward in self.forwards[1:]:
            result = forward(result)
            self._last = weakref.ref(result)
        return result

    def already_done(self, x: Tensor) -> Tensor:
        """The `forward` of `followed_by`: `__call__` has already done its work."""
        if x is not self._last():
            outer, inner = (type(m).__name__ for m in reversed(self.modules))
            raise UserError(f"--tile-mlp: {outer} does not follow {inner} directly in this model; leave it out.")
        return x

    def rowwise(self, rows: Tensor) -> Tensor:
        """The untiled computation, on some rows: (1, n, d) -> (1, n, e)."""
        result: Any = rows
        if next(self.modules[0].children(), None) is not None:
            result = rows.clone()  # an MLP may write to its input
        for forward in self.forwards:
            result = forward(result)
            if isinstance(result, tuple):
                result, *others = result
                self.others = (None,) * len(others)
        return result.reshape(*rows.shape[:-1], -1)


class Slices:
    """One call: how the rows are sliced, and the autocast and random state in which both passes over them run.

    trained: (module, name) -> the parameters that require a gradient, as they are in this call: those of a trained copy
        are rounded for it (`saved_modules.RoundedForward`), and are others by the time of the backward pass.
    """

    def __init__(self, tiled: TiledForward, x: Tensor, trained: Mapping[tuple[nn.Module, str], Tensor]) -> None:
        self.rowwise, self.trained = tiled.rowwise, trained
        count = x.numel() // x.shape[-1]
        self.size = math.ceil(count / max(1, math.ceil(count / tiled.rows)))  # equal slices, no small remainder
        self.grad: Tensor | None = None
        self._autocast = _autocast_now(x.device.type)
        random = has_values(x) and any(draws_random_numbers(module) for module in tiled.modules)
        self._random = (torch.get_rng_state(), *get_device_states(x)) if random else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., e), without a graph."""
        result: Tensor | None = None
        count = x.numel() // x.shape[-1]
        with self._autocast():
            for at, part in self._cut(x):
                done = self.rowwise(part)
                if part.shape[1] == count:
                    result = done
                    break
                if result is None:
                    result = done.new_empty(1, count, done.shape[-1])
                result[:, at] = done
        assert result is not None
        # Not a view for autograd, so that the layer may add to it in place.
        return torch.ops.aten._unsafe_view(result, [*x.shape[:-1], result.shape[-1]])

    def backward(
        self, x: Tensor, wanted: Sequence[Tensor], x_wanted: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of the parameters `wanted`, slice by slice: forward again, with a graph, and back."""
        assert self.grad is not None
        upstream, self.grad = self.grad.reshape(1, -1, self.grad.shape[-1]), None
        x_grad = x.new_empty(1, upstream.shape[1], x.shape[-1]) if x_wanted else None
        sums: list[Tensor | None] = [None] * len(wanted)
        with torch.enable_grad(), self._autocast(), self._same_randomness(x.device), self._same_parameters():
            for at, part in self._cut(x.detach()):
                part = part.detach().requires_grad_(x_wanted)
                sources = [part, *wanted] if x_wanted else list(wanted)
                done = self.rowwise(part)
                grads = list(torch.autograd.grad(done, sources, upstream[:, at], allow_unused=True))
                del done
                if x_grad is not None:
                    x_grad[:, at] = grads.pop(0)
                sums = [g if s is None else s if g is None else s.add_(g) for s, g in zip(sums, grads, strict=True)]
        return None if x_grad is None else x_grad.view_as(x), sums

    def _cut(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        rows = x.reshape(1, -1, x.shape[-1])
        for start in range(0, rows.shape[1], self.size):
            at = slice(start, start + self.size)
            yield at, rows[:, at]

    @contextlib.contextmanager
    def _same_parameters(self) -> Iterator[None]:
        """Those of the forward pass, of which the gradient is asked."""
        now = {(part, name): part._parameters[name] for part, name in self.trained}
        try:
            for (part, name), parameter in self.trained.items():
                part._parameters[name] = cast(nn.Parameter, parameter)
            yield
        finally:
            for (part, name), own in now.items():
                part._parameters[name] = own

    @contextlib.contextmanager
    def _same_randomness(self, device: torch.device) -> Iterator[None]:
        """Dropout inside draws the same numbers as in the forward pass."""
        if self._random is None:
            yield
            return
        host, devices, states = self._random
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.set_rng_state(host)
            set_device_states(devices, states, device_type=device.type)
            yield


class _Keep(torch.autograd.Function):
    """Saves x before anything is computed. Its output, without elements, represents the result in the graph."""

    @staticmethod
    def forward(ctx, slices: Slices, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.slices, ctx.parameters = slices, parameters
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor):
        (x,) = ctx.saved_tensors
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        x_grad, grads = ctx.slices.backward(x, wanted, ctx.needs_input_grad[1])
        remaining = iter(grads)
        return None, x_grad, *(next(remaining) if needed else None for needed in ctx.needs_input_grad[2:])


class _Run(torch.autograd.Function):
    """The computation itself, without a graph. In the backward pass it hands the gradient on to `_Keep`."""

    @staticmethod
    def forward(ctx, slices: Slices, ticket: Tensor, x: Tensor) -> Tensor:
        ctx.slices, ctx.like = slices, (ticket.dtype, ticket.device)
        return slices.forward(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.slices.grad = grad
        dtype, device = ctx.like
        return None, torch.empty(0, dtype=dtype, device=device), None


def _autocast_now(device_type: str) -> Callable[[], contextlib.AbstractContextManager]:
    """The current autocast state, to be entered again. Without its cache: weights cast without a graph must not be
    reused where a graph is needed."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
