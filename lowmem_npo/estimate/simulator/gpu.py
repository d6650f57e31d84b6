"""A GPU without memory: code runs on it as on CUDA, on any machine, and every byte it would allocate is counted.

Tensors are PyTorch's fake tensors (shapes and dtypes, no data) on the device `cuda:0`. Three things are added, so that
CUDA's allocations are what is counted:

- PyTorch built for CPUs cannot index or differentiate fake CUDA tensors, because its C++ core has no CUDA device to
  switch to. Where Python sees `cuda:0`, the core sees `cpu:0`, to which it never needs to switch; autocast casts as
  CUDA's does.
- The values of small integer and boolean tensors are tracked, so that operations whose shapes depend on values
  (selecting the answer tokens) have the shapes of the batch.
- Operators whose CUDA implementation differs from the portable one: attention, 4-bit matrix products.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from bitsandbytes.functional import dequantize_4bit
from lowmem_kernels.launch import Recording, recording
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator import attention as cuda_attention
from lowmem_npo.estimate.simulator.autocast import cuda_autocast
from lowmem_npo.estimate.simulator.operators import FakeOperators
from lowmem_npo.estimate.simulator.optimizers import fake_optimizers
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.estimate.simulator.work import ARRIVAL, VIEW, Operation, WorkCounter, describe, launch, product
from lowmem_npo.memory.streaming.bus import SynchronousBus

GPU = torch.device("cuda", 0)
STAND_IN = torch.device("cpu", 0)  # tensors on the host are on torch.device("cpu"), without an index
CAPABILITY = (8, 6)  # of the GPU where nothing else is said: a card of 24 GB
aten, prim = torch.ops.aten, torch.ops.prim


class FakeGPU(StorageCounter):
    """Counts storages on the fake GPU; enter it with `fake_gpu()`."""

    operators: FakeOperators

    def __init__(self, device_type: str = "cuda", kind: str = "other") -> None:
        super().__init__(device_type, kind)
        self.work = WorkCounter()
        self._described: dict[tuple, Operation | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is prim.device.default:  # called more often than all others together
            return _device_for_core(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is _gemm_4bit:
            with self:  # dequantises, then multiplies, as bitsandbytes does on CUDA for more than 1536 rows
                return _gemm_4bit_of_many_rows(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], self._positions(args[1]), *args[2:])
        known = _known(func, args, kwargs)
        if isinstance(known, (bool, int)):
            self._count(func, args, kwargs, known)
            return known
        if func is aten.nonzero.default and known is not None:
            result = args[0].new_empty(known.shape, dtype=torch.int64)
        elif func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:  # on CUDA, not only bf16 does
            result = args[0].new_empty(_grouped_shape(*args, **kwargs))
        else:
            result = self.operators(func, args, kwargs)
        if known is not None:
            for part, values in zip(tree_leaves(result), tree_leaves(known), strict=True):
                part.known = values
        if func is aten.topk.default:
            result[1].known = _evenly(result[1].shape, choices=args[0].shape[-1])
        if size := cuda_attention.backward_workspace(func, args):
            for leaf in result:
                if leaf is not None:  # the gradient of a bias that there is not
                    self._see(leaf)
            self.transient(size)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        if self.operators.is_view(func):
            self.work.add(VIEW)
            return
        key = self.operators.key(func, args, kwargs)
        operation = self._described.get(key, ...) if key is not None else ...
        if operation is ...:
            operation = describe(func, args, kwargs, result, self.operators.here)
            if key is not None:
                self._described[key] = operation
        if operation is not None:
            self.work.add(operation)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """The chunks engine's product, in whose form only CUDA has it."""
        self.work.add(product(a, b, out))

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Boolean indices as the positions where they are true, as CUDA's own indexing converts them."""
        result: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                with self:
                    result += index.nonzero().unbind(1)
            else:
                result.append(index)
        return result


class _Launches(Recording):
    """Counts the launches of our own kernels, and keeps none of their tensors."""

    def __init__(self, capability: tuple[int, int], work: WorkCounter) -> None:
        super().__init__(capability, [])
        self._work = work

    def add(self, kernel: object, arguments: dict) -> None:
        self._work.add(launch(arguments.values()))


@contextlib.contextmanager
def fake_gpu(kind: str = "other", capability: tuple[int, int] = CAPABILITY) -> Iterator[FakeGPU]:
    """Inside, `cuda` is a GPU without memory whose use is counted, and new tensors have no data."""
    counter = FakeGPU("cuda", kind)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
            (FakeTensor, "to", _to),
            (torch.cuda, "_initialized", False),  # no random state of a real GPU to save and restore
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.nn.Module, "_apply", _apply),
            (SynchronousBus, "wait", lambda *_: counter.work.add(ARRIVAL)),
            (torch.nn.functional, "scaled_dot_product_attention", cuda_attention.scaled_dot_product_attention),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", lambda tensor=None: False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer")  # as the copy of a fake tensor does
        stack.enter_context(mock.patch("peft.tuners.lora.dora.dequantize_module_weight", _whole_weight))
        stack.enter_context(fake_optimizers())
        stack.enter_context(_kernels_of_a_cuda_build())
        stack.enter_context(recording(capability, _Launches(capability, counter.work)))
        if find_spec("triton") is not None:
            stack.enter_context(mock.patch("lowmem_kernels.chunks_engine.product", counter.product))
        stack.enter_context(cuda_autocast())
        counter.operators = FakeOperators(stack.enter_context(_FakeCuda()), GPU)
        try:
            yield stack.enter_context(counter)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                "The memory of a step of this architecture cannot be estimated: it depends on what the model computes "
                f"({error.func})."
            ) from error


def _whole_weight(layer: Any) -> Tensor:
    """The weight of a layer as DoRA needs it. PEFT knows one in 4 bits by its class, which no fake tensor can have."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight if state is None else dequantize_4bit(layer.weight.data, state)


def with_values(tensor: Tensor) -> FakeTensor:
    """A fake copy, on the host, of a real integer tensor; the fake GPU knows its values."""
    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
    fake.known = tensor
    return fake


class _FakeCuda(FakeTensorMode):
    """Fake tensors that C++ sees as `cpu:0` tensors, and Python as `cuda:0` tensors."""

    def __deepcopy__(self, memo: dict) -> _FakeCuda:
        """The copy of a tensor is of the same mode."""
        return self

    def dispatch(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is prim.device.default:
            return _device_for_core(args[0])
        if kwargs and kwargs.get("device") == STAND_IN:  # C++ made it "on the same device"
            kwargs = {**kwargs, "device": GPU}
        return super().dispatch(func, types, args, kwargs or {})


def _device_for_core(tensor: FakeTensor) -> torch.device:
    if tensor.fake_mode.in_kernel_invocation:
        return torch.device("meta")
    return STAND_IN if tensor.fake_device.type == "cuda" else tensor.fake_device


def _to(tensor: FakeTensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which would copy what is already on the GPU: the core sees another device."""
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options: dict[str, Any] = {"dtype": dtype or tensor.dtype, "non_blocking": non_blocking, "copy": copy}
    if device is not None and (device.type == "cuda" or device == STAND_IN):
        device = GPU
    if device is not None and device != tensor.device:
        options["device"] = device
    if memory_format is not None:
        options["memory_format"] = memory_format
    return Tensor.to(tensor, **options)


class _Moves:
    """The `fn` of `Module._apply`, on its way through all modules: each parameter is moved once, with its attributes.
    What several modules hold stays one, and a 4-bit weight keeps its statistics."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._moved = WeakTensorKeyDictionary()  # by the old one, which is gone when no module holds it any more

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.fn(tensor)

    def parameter(self, old: Any) -> Any:
        new: Any = self._moved.get(old)
        if new is None:
            values = old.detach()
            moved = self.fn(values)
            new = old if moved is values else torch.nn.Parameter(moved, old.requires_grad)
            vars(new).update({name: value for name, value in vars(old).items() if name not in vars(new)})
            if hasattr(new, "quant_state"):
                new.quant_state.to(new.device)
            self._moved[old] = new
        return new


def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` with new parameters: the original swaps the contents of fake tensors, which fails."""
    moves = fn if isinstance(fn, _Moves) else _Moves(fn)
    for child in module.children() if recurse else ():
        child._apply(moves)
    module._parameters.update({name: moves.parameter(p) for name, p in module._parameters.items() if p is not None})
    module._buffers.update({name: moves(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


@contextlib.contextmanager
def _kernels_of_a_cuda_build() -> Iterator[None]:
    """Keeps operators whole that have a kernel of their own on CUDA, but are decomposed where PyTorch has none."""
    library = torch.library.Library("aten", "IMPL")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
        library.impl("silu_backward", lambda *_: None, "CUDA")  # never called: fake tensors are caught above
    try:
        yield
    finally:
        library._destroy()


def _known(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of `func` on known values: tensors, a number, or None where not everything is known."""
    if func in _FACTORIES:
        wanted = kwargs.get("dtype")
        if wanted is not None and (wanted.is_floating_point or wanted.is_complex):
            return None
        if wanted is None and any(isinstance(x, float) for x in tree_leaves(args)):
            return None
        if wanted is None and func not in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return None
    else:
        first = args[0][0] if args and isinstance(args[0], (list, tuple)) and args[0] else args[0] if args else None
        if not isinstance(first, Tensor) or first.is_floating_point():
            return None
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not all(hasattr(t, "known") for t in tensors):
            if func._schema.is_mutable:
                _forget(args)
            return None
        if kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point:
            return None
    with _disable_current_modes():
        args, kwargs = tree_map_only(Tensor, lambda t: t.known, (args, dict(kwargs)))
        for name in ("device", "pin_memory"):
            kwargs.pop(name, None)
        try:
            known = func(*args, **kwargs)
        except NotImplementedError:  # on a CPU, histc counts no integers; on CUDA it does
            return None
    whole = all(
        isinstance(x, (bool, int)) or isinstance(x, Tensor) and not x.is_floating_point() for x in tree_leaves(known)
    )
    return known if whole else None


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> tuple[int, ...]:
    """Of a product for each group: `offs` are the ends of the groups in a dimension that is not stacked."""
    shape = a.shape[-2], b.shape[-1]
    if a.ndim != b.ndim:
        return shape
    return (len(a) if offs is None else len(offs), *shape)


def _evenly(shape: torch.Size, choices: int) -> Tensor:
    """(..., k) int64: what a router would choose that uses its experts evenly. How many tokens each has to compute
    decides how large its tensors are."""
    with _disable_current_modes():
        return torch.arange(shape.numel()).remainder(choices).view(shape)


def _forget(args: tuple) -> None:
    if isinstance(args[0], FakeTensor) and hasattr(args[0], "known"):
        del args[0].known


_FACTORIES = {
    aten.arange.default, aten.arange.start, aten.arange.start_step,
    aten.zeros.default, aten.ones.default, aten.full.default,
}  # fmt: skip

_gemm_4bit: Any = None
_gemm_4bit_of_many_rows: Any = None
with contextlib.suppress(
    ImportError, AttributeError
):  # bitsandbytes before 0.50 dequantises in Python, where it is seen
    from bitsandbytes.backends.default import ops as default_ops

    _gemm_4bit_of_many_rows = default_ops._gemm_4bit_default_impl
    _gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
