"""Most of an estimate's time is spent importing libraries: here without what it never uses of them."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a process that estimates and then ends.

    bitsandbytes asks for compiled functions when it is imported, which loads PyTorch's whole compiler; they stay as
    they are written, since on fake tensors nothing is compiled. transformers loads scipy for the losses of image
    models, and `datasets` for its Trainer to recognise; nothing here needs either. Nor is garbage looked for among
    what is imported, now or later.
    """
    import torch
    import transformers.utils

    gc.disable()
    try:
        with (
            mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda function: function)),
            mock.patch.object(transformers.utils, "is_scipy_available", lambda: False),
            mock.patch.object(transformers.utils, "is_datasets_available", lambda: False),
        ):
            yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton, at the end, takes what is frozen for leaked
        gc.enable()
