"""Which rotary embedding of a model is one that the fused kernel computes: recognised by numbers, as in fused.py."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lowmem_kernels import rotary
from lowmem_kernels.rotary_embedding import LAYOUTS, Layout
from lowmem_kernels.rowwise import RowEngine
from torch import Tensor

from lowmem_npo.endings import tried
from lowmem_npo.memory import fused


@dataclass(frozen=True)
class RotaryForm:
    """A rotary embedding as `rotary` computes it."""

    layout: Layout
    by_pair: bool
    first_half: bool  # of the tables' entries is read
    turns_back: bool  # by the negative angle (NanoChat)
    round_once: bool
    tokens_first: bool  # (B, S, heads, D) instead of (B, heads, S, D)

    def __call__(
        self, states: Sequence[Tensor], cos: Tensor, sin: Tensor, engine: RowEngine | None = None
    ) -> tuple[Tensor, ...]:
        """`states`, queries and keys or one of them, rotated."""
        if self.first_half:
            cos, sin = (table[..., : table.shape[-1] // 2] for table in (cos, sin))
        if self.turns_back:
            sin = -sin
        if self.tokens_first:
            states = [x.transpose(1, 2) for x in states]
        q, k = states[0], states[1] if len(states) == 2 else None
        how: dict[str, Any] = {"layout": self.layout, "by_pair": self.by_pair, "round_once": self.round_once}
        rotated = [x for x in rotary(q, k, cos, sin, **how, engine=engine or fused.ENGINE) if x is not None]
        return tuple(x.transpose(1, 2) if self.tokens_first else x for x in rotated)


ROTARY_FORMS = [
    (layout, by_pair, first_half, turns_back, round_once)
    for turns_back, round_once, layout, (by_pair, first_half) in itertools.product(
        (False, True), (False, True), LAYOUTS, ((False, False), (True, False), (True, True))
    )
]


def _by_complex_numbers(q: Tensor, k: Tensor, angles: Tensor) -> RotaryArguments:
    cos, sin = torch.view_as_real(angles).unbind(-1)
    return (q, k), cos, sin


RotaryArguments = tuple[tuple[Tensor, ...], Tensor, Tensor]  # states, cosines, sines
ROTARY_ARGUMENTS: dict[tuple[str, ...], Callable[..., RotaryArguments]] = {
    ("q", "k", "cos", "sin"): lambda q, k, cos, sin: ((q, k), cos, sin),
    ("x", "cos", "sin"): lambda x, cos, sin: ((x,), cos, sin),
    ("tensor", "sin", "cos"): lambda x, sin, cos: ((x,), cos, sin),
    ("xq", "xk", "freqs_cis"): _by_complex_numbers,
}
"""The first parameters of transformers' functions, and what they stand for."""


def rotary_arguments(function: Any) -> tuple[str, ...] | None:
    """Which of ROTARY_ARGUMENTS it takes; None: none of them, or nothing that could be remembered of it."""
    return _rotary_arguments(function) if callable(function) and _has_hash(function) else None


def _has_hash(x: Any) -> bool:
    with contextlib.suppress(TypeError):
        hash(x)
        return True
    return False


# Every layer asks in every pass, and an inspection takes as long as a dozen operators. A model has one or two of them.
@functools.lru_cache(maxsize=64)
def _rotary_arguments(function: Callable[..., Any]) -> tuple[str, ...] | None:
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return next((first for first in ROTARY_ARGUMENTS if names[: len(first)] == first), None)


def fused_rotary(function: Callable[..., Any], args: tuple, options: Mapping[str, Any]) -> Any:
    """What `function`, a model's rotary embedding, makes of these arguments; None if no kernel does the same."""
    first = rotary_arguments(function)
    if first is None or len(args) < len(first) or not all(isinstance(x, Tensor) for x in args[: len(first)]):
        return None
    states, cos, sin = ROTARY_ARGUMENTS[first](*args[: len(first)])
    if not fused.fuses(states[0]):
        return None
    form = rotary_form(function, states, cos, sin, args[len(first) :], options)
    if form is None:
        return None
    rotated = form(states, cos, sin)
    return rotated if len(rotated) > 1 else rotated[0]


def rotary_form(
    function: Callable[..., Any],
    states: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    others: tuple = (),
    options: Mapping[str, Any] | None = None,
) -> RotaryForm | None:
    """The form of `function` on tensors such as these, if the kernels have it.

    others, options: its further arguments.
    """
    q, options = states[0], options or {}
    if any(x.ndim != 4 or x.dtype != q.dtype for x in states) or cos.ndim != 3 or cos.shape[0] not in (1, q.shape[0]):
        return None
    if not all(value is None or isinstance(value, int) for value in (*others, *options.values())):
        return None
    sizes = q.dtype, q.shape[-1], cos.dtype, cos.shape[-1]
    key = (function, *sizes, others, *sorted(options.items()))
    if key not in _known:
        with fused.apart() as random:
            _known[key] = _find_rotary(function, random, sizes, others, options) if sin.dtype == cos.dtype else None
    return _known[key]


_known: dict[Any, RotaryForm | None] = {}


def _find_rotary(
    function: Callable[..., Any],
    random: torch.Generator,
    sizes: tuple[torch.dtype, int, torch.dtype, int],
    others: tuple,
    options: Mapping[str, Any],
) -> RotaryForm | None:
    dtype, size, table, width = sizes
    first = rotary_arguments(function)
    assert first is not None
    cos, sin = (torch.randn(2, 3, width, generator=random).to(table) for _ in range(2))
    by_name = {"cos": cos, "sin": sin}
    if "freqs_cis" in first:
        by_name = {"freqs_cis": torch.complex(cos, sin)}
    names = [name for name in first if name not in by_name]
    for tokens_first in (False, True):
        states = [torch.randn(2, heads, 3, size, generator=random).to(dtype) for heads in (4, 2)][: len(names)]
        if tokens_first:
            states = [x.transpose(1, 2).contiguous() for x in states]
        probes = []  # states, and what becomes of them: small ones, and some beyond a limit
        with tried():  # a function that takes something else is not one of the forms
            for scaled in (states, [1e3 * x for x in states]):
                arguments = {**dict(zip(names, scaled, strict=True)), **by_name}
                theirs = function(*(arguments[name] for name in first), *others, **options)
                probes.append((scaled, theirs if isinstance(theirs, tuple) else (theirs,)))
            for how in ROTARY_FORMS:
                form = RotaryForm(*how, tokens_first)
                with contextlib.suppress(ValueError):  # more entries than a head has
                    if all(all(map(fused.alike, form(x, cos, sin, "torch"), theirs)) for x, theirs in probes):
                        return form
    return None
