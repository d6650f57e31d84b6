"""Fast operators on fake tensors: a step repeats each of them hundreds of times on tensors of the same shapes.

`FakeTensorMode` takes a few tenths of a millisecond per operator, which is most of an estimate's time. Here a view is
made by its C++ kernel alone, an in-place operator returns its tensor, and for every other operator the shapes of the
results are cached by those of its arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves


class Shape(NamedTuple):
    """The properties of a tensor without values that an operator's result depends on."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class FakeOperators:
    """Calls operators on the fake tensors of `mode`; those on other devices than `device` take the slow path."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self._categories: dict[Any, str] = {}
        self._results: dict[tuple, Shape | tuple[Shape | None, ...] | None] = {}
        self._attributes = dict(vars(torch.empty(0, device=device)))  # those of any fresh fake tensor

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        category = self._categories.get(func) or self._categories.setdefault(func, _category(func))
        if category == "in place" and self.here(args[0]):
            return args[0]
        if category in ("view", "views") and self.here(args[0]):
            with in_kernel_invocation_manager(self.mode):
                result = func(*args, **kwargs)
            if category == "views":
                return [self._fake(view) for view in result]
            return result if result is args[0] else self._fake(result)
        key = self.key(func, args, kwargs) if category == "function" else None
        if key is None:
            return func(*args, **kwargs)
        known = self._results.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if _shares_storage(result, args):  # a view whose schema does not say so: _unsafe_view
                self._categories[func] = "view"
            else:
                self._results[key] = self._shapes(result)
            return result
        if isinstance(known, Shape):
            return self._new(known)
        return tuple(None if shape is None else self._new(shape) for shape in known)

    def is_view(self, func: Any) -> bool:
        """Whether the operator gives views of its first argument."""
        return (self._categories.get(func) or _category(func)) in ("view", "views")

    def here(self, x: Any) -> bool:
        """Whether `x` is a fake tensor on the device."""
        return isinstance(x, FakeTensor) and x.fake_mode is self.mode and x.device == self.device

    def key(self, func: Any, args: tuple, kwargs: dict) -> tuple | None:
        """What the shapes of the result and the work depend on.

        None where shapes do not determine the result: tensors on other devices, or none at all."""
        parts: list[Any] = [func]
        any_tensor = False
        for x in (*args, *kwargs.items()):
            if isinstance(x, Tensor):
                if not self.here(x):
                    return None
                any_tensor = True
                parts.append(Shape(x.dtype, tuple(x.shape), x.stride()))
            elif isinstance(x, (list, tuple)):
                for y in x:
                    if isinstance(y, Tensor):
                        if not self.here(y):
                            return None
                        any_tensor = True
                        parts.append(Shape(y.dtype, tuple(y.shape), y.stride()))
                    elif isinstance(y, (list, tuple)):
                        parts.append(tuple(y))
                    else:
                        parts.append((type(y), y))
                parts.append(len(x))
            else:
                parts.append((type(x), x))
        return tuple(parts) if any_tensor else None

    def _shapes(self, result: Any) -> Shape | tuple[Shape | None, ...] | None:
        if isinstance(result, tuple):
            shapes = tuple(None if x is None else self._shape(x) for x in result)
            return None if any(s is None and x is not None for s, x in zip(shapes, result, strict=True)) else shapes
        return self._shape(result)

    def _shape(self, result: Any) -> Shape | None:
        if not self.here(result) or result.storage_offset():
            return None
        return Shape(result.dtype, tuple(result.shape), result.stride())

    def _new(self, shape: Shape) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            return self._fake(torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta"))

    def _fake(self, meta: Tensor) -> FakeTensor:
        fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=self.device)
        vars(fake).update(self._attributes)
        return fake


def _shares_storage(result: Any, args: tuple) -> bool:
    of_args = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    return any(x.untyped_storage()._cdata in of_args for x in tree_leaves(result) if isinstance(x, Tensor))


def _category(func: Any) -> str:
    """view, views: one result or a list of them, in its first argument's storage; in place: its first argument;
    function: only new tensors."""
    schema = func._schema
    aliases = [r.alias_info for r in schema.returns]
    if not schema.is_mutable and all(a is None for a in aliases):
        return "function"
    returned = str(schema.returns[0].type) if len(aliases) == 1 and aliases[0] is not None else ""
    if returned == "List[Tensor]" and not schema.is_mutable:
        return "views"
    if returned == "Tensor":
        if not schema.is_mutable:
            return "view"
        if schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
            return "in place"
    return "other"
