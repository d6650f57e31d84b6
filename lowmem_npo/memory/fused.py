"""Which norm or activation of a model is one that a fused kernel computes: recognised by its numbers.

A module is copied with small random parameters and run on a few random rows on the CPU, small ones and some so large
that any clamp shows, and so is each form that `lowmem_kernels` knows. The form that gives its bits is the one. No list
of classes to keep, none that is outdated by a new version of transformers, and a model without values (the estimate's)
is recognised like a real one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from lowmem_kernels import act, glu, layer_norm, packed_glu, rms_norm
from lowmem_kernels.gated_activation import ACTIVATIONS, Gate
from lowmem_kernels.norm import LONGEST_ROW
from lowmem_kernels.rowwise import RowEngine, fused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lowmem_npo.endings import tried

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

Form = TypeVar("Form")

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
            return layer_norm(x, weight, bias, eps=self.eps, offset=self.offset, engine=engine)
        return rms_norm(x, weight, eps=self.eps, offset=self.offset, round_first=self.round_first, engine=engine)


@dataclass(frozen=True)
class GatedForm:
    """down(act(gate(x)) * up(x)), by the names of the linear layers: see GATED."""

    names: tuple[str, ...]
    gate: Gate

    def __call__(self, x: Tensor, mlp: nn.Module, engine: RowEngine | None = None) -> Tensor:
        """What `mlp` makes of x."""
        *first, down = (mlp._modules[name] for name in self.names)
        wide = [layer(x) for layer in first if layer is not None]
        assert down is not None
        how, engine = self.gate._asdict(), engine or ENGINE
        return down(glu(*wide, **how, engine=engine) if len(wide) == 2 else packed_glu(*wide, **how, engine=engine))


@dataclass(frozen=True)
class PackedForm:
    """act(gate) * up of the two parts of one tensor, as a mixture of experts has it."""

    interleaved: bool
    gate: Gate

    def __call__(self, gate_up: Tensor, engine: RowEngine | None = None) -> Tensor:
        return packed_glu(gate_up, interleaved=self.interleaved, **self.gate._asdict(), engine=engine or ENGINE)


@dataclass(frozen=True)
class ActivationForm:
    """An activation by itself."""

    gate: Gate

    def __call__(self, x: Tensor, engine: RowEngine | None = None) -> Tensor:
        return act(x, self.gate.activation, alpha=self.gate.alpha, engine=engine or ENGINE)


def norm_form(norm: nn.Module) -> NormForm | None:
    """The form of a module that treats rows alike and each by itself, if the kernels have it."""
    parameters = {name: p for name, p in norm._parameters.items() if p is not None}
    if not parameters.keys() <= {"weight", "bias"} or any(p.ndim != 1 for p in parameters.values()):
        return None
    shapes = tuple((name, p.shape[0], p.dtype) for name, p in parameters.items())
    return _remembered(_find_norm, norm, shapes)


def gated_form(mlp: nn.Module) -> GatedForm | None:
    """The form of a gated MLP, whatever its linear layers are (in 4 bits, with adapters), if the kernels have it."""
    names = next((n for n in GATED if all(isinstance(mlp._modules.get(name), nn.Module) for name in n)), None)
    if names is None or mlp._parameters or mlp._buffers or len(inspect.signature(mlp.forward).parameters) != 1:
        return None
    return _remembered(_find_gated, mlp, names)


def packed_form(experts: nn.Module) -> PackedForm | None:
    """The form of `experts._apply_gate`, with which transformers' experts gate one tensor, if the kernels have it."""
    return _remembered(_find_packed, experts, ())


def activation_form(module: nn.Module) -> ActivationForm | None:
    """The form of an activation of several operators, if the kernels have it; PyTorch's own are fused already."""
    if module._parameters or module._buffers or module._modules:
        return None
    return _remembered(_find_activation, module, ())


_known: dict[Any, Any] = {}


def _remembered(find: Callable[..., Any], module: nn.Module, shapes: tuple) -> Any:
    """`find` for the first of all modules of the same class, settings and shapes."""
    key = (find, shapes, _settings(module), *((name, _settings(child)) for name, child in module._modules.items()
                                              if child is not None and name not in shapes))  # fmt: skip
    if key not in _known:
        with apart() as random:
            _known[key] = find(module, random, shapes)
    return _known[key]


def _settings(module: nn.Module) -> tuple:
    """Its class, and the simple ones of its attributes and of its configuration's."""
    simple = (str, int, float, tuple, list, type(None))
    read = {**getattr(vars(module).get("config"), "__dict__", {}), **vars(module)}
    settings = {name: repr(value) for name, value in read.items() if isinstance(value, simple)}
    return type(module), *sorted(settings.items() - {("training", "True"), ("training", "False")})


@contextlib.contextmanager
def apart() -> Iterator[torch.Generator]:
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
    rows = torch.randn(6, width, generator=random)
    each = (torch.logspace(-4, 1, 6)[:, None] * rows + 1e-3, 1e-6 * (rows + 1), 1e3 * rows)  # of the size of any eps
    probes = [rows.to(dtype) for rows in each]
    probe = _twin(norm)
    probe._parameters = {
        name: None if old is None else nn.Parameter(torch.randn(width, generator=random).to(dtype), False)
        for name, old in norm._parameters.items()
    }
    probe._buffers = {  # which no form has: they must not matter (FalconMamba)
        name: None if old is None else torch.rand(old.shape, generator=random) for name, old in norm._buffers.items()
    }
    own_eps = [value for value in vars(norm).values() if type(value) is float and 0 <= value < 0.1]
    forms: list[NormForm] = []
    for eps in dict.fromkeys((*own_eps, *COMMON_EPS, torch.finfo(dtype).eps)):
        known_dtype = dtype if shapes else None
        forms += [NormForm(True, eps, offset, dtype=known_dtype) for offset in ((0.0, 1.0) if shapes else (0.0,))]
        if "bias" not in (part[0] for part in shapes):
            ways = itertools.product((0.0, 1.0), (True, False)) if shapes else [(0.0, False)]
            forms += [NormForm(False, eps, offset, first, known_dtype) for offset, first in ways]
    return _first_alike(forms, lambda form, rows: form(rows, probe, "torch"), partial(_result, probe), probes)


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
    probes = [scale * torch.randn(1, 16, 8, generator=random) for scale in _scales(mlp)]
    forms = (GatedForm(names, gate) for gate in _gates(mlp))
    return _first_alike(forms, lambda form, rows: form(rows, probe, "torch"), partial(_result, probe), probes)


def _find_packed(experts: Any, random: torch.Generator, shapes: tuple) -> PackedForm | None:
    probes = [scale * torch.randn(64, 32, generator=random) for scale in _scales(experts)]
    forms = (PackedForm(interleaved, gate) for interleaved in (False, True) for gate in _gates(experts))

    def theirs(rows: Tensor) -> Tensor | None:
        with tried():
            return type(experts)._apply_gate(_twin(experts), rows.clone())
        return None

    return _first_alike(forms, lambda form, rows: form(rows, "torch"), theirs, probes)


def _find_activation(module: nn.Module, random: torch.Generator, shapes: tuple) -> ActivationForm | None:
    probes = [scale * torch.randn(16, 32, generator=random) for scale in _scales(module)]
    with _Counting() as operators:
        _result(_twin(module), probes[0])
    if operators.count < 3:  # a copy of the rows is one
        return None
    forms = (ActivationForm(gate) for gate in _gates(module) if gate.limit is None and not gate.up_offset)
    return _first_alike(forms, lambda form, rows: form(rows, "torch"), partial(_result, _twin(module)), probes)


def _scales(module: nn.Module) -> tuple[float, ...]:
    """Of the rows to try: ordinary values, their tails, and some beyond any limit, which need not be an attribute."""
    read = {**getattr(vars(module).get("config"), "__dict__", {}), **vars(module)}
    numbers = [abs(value) for value in read.values() if type(value) in (int, float)]
    return 1.0, 4.0, min(4 * max((1e3, *numbers)), 1e8)


def _gates(module: nn.Module) -> Iterable[Gate]:
    """All that it may compute, the simplest first; numbers are those it has as attributes."""
    numbers = [float(value) for value in vars(module).values() if type(value) in (int, float) and value > 0]
    for limit, up_offset in itertools.product((None, *numbers), (0.0, 1.0)):
        yield from (Gate(activation, 1.0, limit, up_offset) for activation in ACTIVATIONS)
        yield from (Gate("silu", alpha, limit, up_offset) for alpha in (*numbers, 1.702) if alpha != 1.0)


class _Counting(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy, in eval mode, as the frozen base always is."""
    twin = copy.copy(module)
    twin.training = False
    return twin


def _result(probe: nn.Module, rows: Tensor) -> Tensor | None:
    with tried():  # a module that needs more than rows is not one of the forms
        result = inspect.unwrap(type(probe).forward)(probe, rows.clone())
        return result if isinstance(result, Tensor) else None
    return None


def _first_alike(
    forms: Iterable[Form],
    ours: Callable[[Form, Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor | None],
    probes: Sequence[Tensor],
) -> Form | None:
    """The first of `forms` that is alike on each probe by itself: in one, the largest would hide the others."""
    expected = [values for rows in probes if (values := theirs(rows)) is not None]
    if len(expected) < len(probes):
        return None
    pairs = list(zip(probes, expected, strict=True))
    return next((form for form in forms if all(alike(ours(form, rows), values) for rows, values in pairs)), None)


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """In 16 bits the same but for one entry in a hundred, which may be one unit in the last place off; in float32,
    where the order of a sum shows, to a few units."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    low = ours.dtype != torch.float32
    if low and (ours == theirs).double().mean() < 0.99:
        return False
    tolerance = 1.01 * torch.finfo(ours.dtype).eps if low else 1e-5
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=1e-6 * float(theirs.abs().max()))
