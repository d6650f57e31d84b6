"""Most of an estimate's time is spent importing libraries: here without what it never uses of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a process that estimates and then ends.

    bitsandbytes asks for compiled functions when it is imported, which loads PyTorch's whole compiler; they stay as
    they are written, since on fake tensors nothing is compiled. Nor is garbage looked for among what is imported.
    """
    import torch

    gc.disable()
    try:
        with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda function: function)):
            yield
    finally:
        gc.enable()
