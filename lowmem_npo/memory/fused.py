"""Which norm, rotary embedding or gated MLP of a model is one that a fused kernel computes: recognised by its numbers.

A module is copied with small random parameters and run on a few random rows on the CPU, and so is each form that
`lowmem_kernels` knows. The form that gives its bits is the one. No list of classes to keep, none that is outdated by a
new version of transformers, and a model without values (the estimate's) is recognised like a real one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lowmem_kernels import glu, layer_norm, rms_norm, rotary
from lowmem_kernels.gated_activation import ACTIVATIONS, Activation
from lowmem_kernels.norm import LONGEST_ROW
from lowmem_kernels.rotary_embedding import LAYOUTS, Layout
from lowmem_kernels.rowwise import RowEngine, fused
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

ENGINE: RowEngine = "auto"
"""By which engine the kernels work: "auto" is on CUDA where there is Triton, elsewhere they do not; any other is
everywhere, for tests."""

GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
)
"""What the linear layers of a gated MLP are called: gate, up and down, or the first two in one, and down."""

COMMON_EPS = (1e-5, 1e-6)  # of norms that name theirs in the code


def fuses(x: Tensor) -> bool:
    """Whether the kernels work on tensors such as x."""
    return fused(x) if ENGINE == "auto" else True


@dataclass(frozen=True)
class NormForm:
    """A norm as `rms_norm` or `layer_norm` computes it."""

    centered: bool  # LayerNorm
    eps: float
    offset: float = 0.0
    round_first: bool = False
    dtype: torch.dtype | None = None  # of its rows; None, without parameters: any

    def takes(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether these rows are such as it was recognised with, and the norm's parameters frozen."""
        return (
            (x.dtype == self.dtype or self.dtype is None)
            and x.shape[-1] <= LONGEST_ROW
            and not any(p is not None and p.requires_grad for p in norm._parameters.values())
        )

    def __call__(self, x: Tensor, norm: nn.Module, engine: RowEngine | None = None) -> Tensor:
        """What `norm` makes of x."""
        weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        engine = engine or ENGINE
        if self.centered:
            return layer_norm(x, weight, bias, eps=self.eps, engine=engine)
        return rms_norm(x, weight, eps=self.eps, offset=self.offset, round_first=self.round_first, engine=engine)


@dataclass(frozen=True)
class RotaryForm:
    """A rotary embedding as `rotary` computes it."""

    layout: Layout
    round_once: bool

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, engine: RowEngine | None = None) -> Any:
        return rotary(q, k, cos, sin, layout=self.layout, round_once=self.round_once, engine=engine or ENGINE)


@dataclass(frozen=True)
class GatedForm:
    """down(act(gate(x)) * up(x)), by the names of the linear layers: see GATED."""

    names: tuple[str, ...]
    activation: Activation

    def __call__(self, x: Tensor, mlp: nn.Module, engine: RowEngine | None = None) -> Tensor:
        """What `mlp` makes of x."""
        *first, down = (mlp._modules[name] for name in self.names)
        wide = [layer(x) for layer in first if layer is not None]
        gate, up = wide if len(wide) == 2 else wide[0].chunk(2, dim=-1)
        assert down is not None
        return down(glu(gate, up, self.activation, engine=engine or ENGINE))


def norm_form(norm: nn.Module) -> NormForm | None:
    """The form of a module that treats rows alike and each by itself, if the kernels have it."""
    parameters = {name: p for name, p in norm._parameters.items() if p is not None}
    if not parameters.keys() <= {"weight", "bias"} or norm._buffers or any(p.ndim != 1 for p in parameters.values()):
        return None
    shapes = tuple((name, p.shape[0], p.dtype) for name, p in parameters.items())
    return _remembered(_find_norm, norm, shapes)


def gated_form(mlp: nn.Module) -> GatedForm | None:
    """The form of a gated MLP, whatever its linear layers are (in 4 bits, with adapters), if the kernels have it."""
    names = next((n for n in GATED if all(isinstance(mlp._modules.get(name), nn.Module) for name in n)), None)
    if names is None or mlp._parameters or mlp._buffers or len(inspect.signature(mlp.forward).parameters) != 1:
        return None
    return _remembered(_find_gated, mlp, names)


def rotary_form(function: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> RotaryForm | None:
    """The form of `function(q, k, cos, sin)` on tensors such as these, if the kernels have it."""
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape[0] not in (1, q.shape[0]) or q.dtype != k.dtype:
        return None
    key = (function, q.dtype, cos.dtype, q.shape[-1], cos.shape[-1])
    if key not in _known:
        with _apart() as random:
            shapes = (q.dtype, q.shape[-1], cos.dtype, cos.shape[-1])
            _known[key] = _find_rotary(function, random, *shapes) if sin.dtype == cos.dtype else None
    return _known[key]


_known: dict[Any, Any] = {}


def _remembered(find: Callable[..., Any], module: nn.Module, shapes: tuple) -> Any:
    """`find` for the first of all modules of the same class, settings and shapes."""
    key = (find, shapes, _settings(module), *((name, _settings(child)) for name, child in module._modules.items()
                                              if child is not None and name not in shapes))  # fmt: skip
    if key not in _known:
        with _apart() as random:
            _known[key] = find(module, random, shapes)
    return _known[key]


def _settings(module: nn.Module) -> tuple:
    """Its class, and the simple ones of its attributes."""
    simple = (str, int, float, tuple, type(None))
    of_module = {name: repr(value) for name, value in vars(module).items() if isinstance(value, simple)}
    return type(module), *sorted(of_module.items() - {("training", "True"), ("training", "False")})


@contextlib.contextmanager
def _apart() -> Iterator[torch.Generator]:
    """Real values, without gradients, autocast or any effect on the random numbers of the run; some of its own."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        yield torch.Generator("cpu").manual_seed(0)


def _find_norm(norm: nn.Module, random: torch.Generator, shapes: tuple) -> NormForm | None:
    dtype = shapes[0][2] if shapes else torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or any(part[2] != dtype for part in shapes):
        return None
    width = shapes[0][1] if shapes else _width(norm)
    rows = torch.randn(6, width, generator=random) * torch.logspace(-4, 1, 6)[:, None] + 1e-3
    rows = rows.to(dtype)
    probe = _twin(norm)
    probe._parameters = {
        name: None if old is None else nn.Parameter(torch.randn(width, generator=random).to(dtype), False)
        for name, old in norm._parameters.items()
    }
    theirs = _result(probe, rows)
    if theirs is None:
        return None
    own_eps = [value for value in vars(norm).values() if type(value) is float and 0 <= value < 0.1]
    for eps in dict.fromkeys((*own_eps, *COMMON_EPS, torch.finfo(dtype).eps)):
        known_dtype = dtype if shapes else None
        forms = [NormForm(True, eps, dtype=known_dtype)]
        if "bias" not in (part[0] for part in shapes):
            ways = itertools.product((0.0, 1.0), (True, False)) if shapes else [(0.0, False)]
            forms += [NormForm(False, eps, offset, first, known_dtype) for offset, first in ways]
        for form in forms:
            if _alike(form(rows, probe, "torch"), theirs):
                return form
    return None


def _width(norm: nn.Module) -> int:
    """Of the rows of a norm without parameters; any will do where it does not say."""
    shape = getattr(norm, "normalized_shape", None)
    return int(shape[-1]) if shape else 64


def _find_gated(mlp: nn.Module, random: torch.Generator, names: tuple[str, ...]) -> GatedForm | None:
    probe = _twin(mlp)
    probe._modules = {name: None if child is None else _twin(child) for name, child in mlp._modules.items()}
    for name, sizes in zip(names, ((8, 12), (8, 12), (12, 8)) if len(names) == 3 else ((8, 24), (12, 8)), strict=True):
        layer = nn.Linear(*sizes, device="cpu", dtype=torch.float32)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=random))
        probe._modules[name] = layer
    rows = torch.randn(1, 16, 8, generator=random)
    theirs = _result(probe, rows)
    if theirs is None:
        return None
    forms = [GatedForm(names, activation) for activation in ACTIVATIONS]
    return next((form for form in forms if _alike(form(rows, probe, "torch"), theirs)), None)


def _find_rotary(
    function: Callable[..., Any],
    random: torch.Generator,
    dtype: torch.dtype,
    size: int,
    table: torch.dtype,
    rotated: int,
) -> RotaryForm | None:
    q, k = (torch.randn(2, heads, 3, size, generator=random).to(dtype) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, rotated, generator=random).to(table) for _ in range(2))
    with contextlib.suppress(Exception):  # a function that takes something else is not one of the forms
        theirs = function(q, k, cos, sin)
        for layout, round_once in itertools.product(LAYOUTS, (False, True)):
            form = RotaryForm(layout, round_once)
            if all(map(_alike, form(q, k, cos, sin, "torch"), theirs)):
                return form
    return None


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy, in training mode, where dropout shows."""
    twin = copy.copy(module)
    twin.training = True
    return twin


def _result(probe: nn.Module, rows: Tensor) -> Tensor | None:
    with contextlib.suppress(Exception):  # a module that needs more than rows is not one of the forms
        result = inspect.unwrap(type(probe).forward)(probe, rows.clone())
        return result if isinstance(result, Tensor) else None
    return None


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """In 16 bits the same but for one entry in a hundred, which may be one unit in the last place off; in float32,
    where the order of a sum shows, to a few units."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    low = ours.dtype != torch.float32
    if low and (ours == theirs).double().mean() < 0.99:
        return False
    tolerance = 1.01 * torch.finfo(ours.dtype).eps if low else 1e-5
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=1e-6 * float(theirs.abs().max()))
