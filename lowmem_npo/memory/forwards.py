"""Modules whose `forward` is replaced: one replacement calls the other, and each goes when it is no longer wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules may be given other `forward`s; afterwards they have those of before."""
    before = {module: vars(module).get("forward") for module in modules}
    try:
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)


@contextmanager
def in_place(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules have other `forward`s; afterwards those of before."""
    with restored(forwards):
        for module, forward in forwards.items():
            module.forward = forward
        yield


def replacement(module: nn.Module, kind: type[T]) -> T | None:
    """Which of the objects that replace the module's `forward`, each calling its own `forward`, is of this kind."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, kind):
        forward = getattr(forward, "forward", None)
    return forward
