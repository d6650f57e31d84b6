"""Which models are in memory when another one is loaded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


@contextmanager
def loads_watched(*modules: ModuleType) -> Iterator[list[int]]:
    """Yields, for each model that the `load_model` of one of `modules` loads, how many weights of those before it are
    still there. Python collects no cycles by itself meanwhile: memory that a GPU lacks does not make it do so."""
    loaded: list[weakref.ref[Tensor]] = []  # a 4-bit weight and its layer can outlive their model
    still_there: list[int] = []

    def watching(load: Any) -> Any:
        def load_model(*args: Any, **options: Any) -> Any:
            still_there.append(sum(weight() is not None for weight in loaded))
            model = load(*args, **options)
            loaded.extend(map(weakref.ref, model.parameters()))
            return model

        return load_model

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "load_model", watching(module.load_model))
        gc.disable()
        try:
            yield still_there
        finally:
            gc.enable()
