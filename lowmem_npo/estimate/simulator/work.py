"""What a step has to do: its operators in order, each with the arithmetic and the bytes that it moves.

FLOPs are those of matrix products and attention (a multiplication and an addition are two), as PyTorch's own counter
has them, but for causal attention, whose fused kernels skip the half above the diagonal. Bytes are those that a kernel
reads and writes at least: every operand once; of an expanded one what is stored, of a lookup what is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Operation(NamedTuple):
    """One operator call."""

    kind: str  # "kernel": runs on the GPU; "copy": between host and GPU; "view": on the host alone;
    # "arrival": kernels that follow need what was copied to the GPU so far
    flops: int = 0
    bytes: int = 0  # in GPU memory; of a copy, over the bus
    half: bool = True  # its products have operands of 16 bits
    waits: bool = False  # the host goes on when the GPU has done all that came before
    part: str = ""  # "product", "attention" or "dequantisation"


VIEW = Operation("view")
ARRIVAL = Operation("arrival")


class WorkCounter:
    """The operations of a step in order, in sections: "policy", "reference", "adversary", "optimizer"."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, list[Operation]]] = []
        self.begin("policy")

    def begin(self, section: str) -> None:
        """The operations that follow are of `section`."""
        self._operations: list[Operation] = []
        self.sections.append((section, self._operations))

    def restart(self, section: str = "policy") -> None:
        """Forgets all operations so far."""
        self.sections.clear()
        self.begin(section)

    def add(self, operation: Operation) -> None:
        self._operations.append(operation)


def describe(func: Any, args: tuple, kwargs: dict, result: Any, on_gpu: Any) -> Operation | None:
    """What the operator did; None if it did nothing on the GPU, which `on_gpu` says of a tensor."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    here = [on_gpu(x) for x in (*tensors, *results)]
    if not any(here):
        return None
    if func in _COPIES and not all(here[: 2 if func is aten.copy_.default else None]):
        source = args[1] if func is aten.copy_.default else args[0]
        to_host, non_blocking = on_gpu(source), _argument(func, args, kwargs, "non_blocking")
        return Operation("copy", bytes=_bytes(source), waits=not non_blocking, part="to host" if to_host else "to GPU")
    if func._overloadpacket in _ALLOCATIONS:
        return VIEW
    if func._overloadpacket in _LOOKUPS:
        moved = 2 * sum(map(_bytes, results)) + sum(_bytes(x) for x in tensors if not x.is_floating_point())
    else:
        read = tensors[1:] if func._overloadpacket in _FILLS else tensors
        moved = sum(map(_bytes, read)) + sum(map(_bytes, results))
        if func._schema.is_mutable and not results:  # writes what it is given, and returns nothing
            moved *= 2
    flops, part = _flops(func, args, kwargs, result)
    half = part == "" or all(x.dtype.itemsize <= 2 for x in tensors[:2] if x.is_floating_point())
    return Operation("kernel", flops, moved, half, waits=func._overloadpacket in _WAITS, part=part)


def product(a: Tensor, b: Tensor, out: Tensor) -> Operation:
    """The matrix product out = a b."""
    moved = _bytes(a) + _bytes(b) + _bytes(out)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return Operation("kernel", flops, moved, half=a.dtype.itemsize <= 2, part="product")


def launch(arguments: Iterable[Any]) -> Operation:
    """A kernel of `lowmem_kernels` with these arguments."""
    return Operation("kernel", bytes=sum(_bytes(x) for x in arguments if isinstance(x, Tensor)))


def _flops(func: Any, args: tuple, kwargs: dict, result: Any) -> tuple[int, str]:
    if func is aten.linear.default:
        return 2 * args[0].numel() * args[1].shape[0], "product"
    if func is aten._grouped_mm.default:  # of experts, which PyTorch's counter does not know
        a, b = args[:2]
        batch = len(a) if a.ndim == b.ndim == 3 else 1
        return 2 * batch * a.shape[-2:].numel() * b.shape[-1], "product"
    name = func._schema.name
    if name.startswith("bitsandbytes::dequantize"):
        return 0, "dequantisation"
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0, ""
    if "attention" not in name:
        return formula(*args, **kwargs, out_val=result), "product"
    flops = _attention_flops(*(args[1:4] if "backward" in name else args[:3]), backward="backward" in name)
    causal = _argument(func, args, kwargs, "is_causal")
    return flops // 2 if causal else flops, "attention"


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *, backward: bool) -> int:
    """As PyTorch counts them, also where there are fewer key heads than query heads, which its counter before 2.12
    refuses: two products or, backward, five, of which one is the forward pass's once more."""
    size, value_size = query.shape[-1], value.shape[-1]
    products = 3 * size + 2 * value_size if backward else size + value_size
    return 2 * query.shape[:-1].numel() * key.shape[-2] * products


def _argument(func: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """The value of an operator's argument, given or default; None if it has none of this name."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return kwargs.get(name, args[place] if place < len(args) else argument.default_value)
    return None


def _bytes(x: Tensor) -> int:
    """Of the elements that are stored: those of an expanded dimension are one."""
    stored = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) if x.numel() else 0
    return stored * x.dtype.itemsize


_COPIES = {aten._to_copy.default, aten.copy_.default}
_WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}
_ALLOCATIONS = {
    aten.empty, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.empty_like, aten._unsafe_view,
}  # fmt: skip
_FILLS = {aten.zero_, aten.fill_, aten.copy_, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros,
          aten.new_ones, aten.new_full}  # fmt: skip
_LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
