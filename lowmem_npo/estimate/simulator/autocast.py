"""CUDA's autocast on the fake GPU: matrix products in 16 bits, norms and softmax in float32.

PyTorch's own kernels for it ask its C++ core whether a tensor is on a GPU, and to the core a fake one is not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Of PyTorch's lists (`autocast_mode.h`), what language models use.
HALF = (
    "linear", "matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "addbmm", "conv1d", "conv2d", "conv3d",
    "conv1d.padding", "prelu",
)  # fmt: skip
FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "exp", "log", "rsqrt", "reciprocal", "softplus",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "norm.ScalarOpt_dim", "cosine_similarity",
)  # fmt: skip
FLOAT32_RESULT = ("softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList")
KEY = "AutocastCUDA"


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, `torch.autocast("cuda")` casts fake tensors, and keeps its copies of weights as long as CUDA's does."""
    library, copies = torch.library.Library("aten", "IMPL"), dict[int, tuple[Tensor, Tensor]]()
    clear = torch.clear_autocast_cache

    def cleared() -> None:
        copies.clear()
        clear()

    def to_half(x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        if not _eligible(x) or x.dtype == dtype:
            return x
        kept = x.requires_grad and x.is_leaf and x.dtype == torch.float32 and torch.is_autocast_cache_enabled()
        if not kept:
            return x.to(dtype)
        if id(x) not in copies:
            copies[id(x)] = x, x.to(dtype)
        return copies[id(x)][1]

    def to_float32(x: Tensor) -> Tensor:
        return x.float() if _eligible(x) else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these kernels replace others
        for names, cast in ((HALF, to_half), (FLOAT32, to_float32), (FLOAT32_RESULT, None)):
            for name in names:
                library.impl(name, _kernel(name, cast), KEY, allow_override=True)
    try:
        with mock.patch.object(torch, "clear_autocast_cache", cleared):
            yield
    finally:
        library._destroy()


def _eligible(x: Tensor) -> bool:
    return x.is_cuda and x.is_floating_point() and x.dtype != torch.float64


def _kernel(name: str, cast: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    dtype_at = next((i for i, a in enumerate(operator._schema.arguments) if a.name == "dtype"), None)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))):
            if cast is not None:
                args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            elif _eligible(args[0]) and kwargs.get("dtype") is None and not isinstance(args[-1], torch.dtype):
                args, kwargs = args[:dtype_at], {**kwargs, "dtype": torch.float32}
            return operator(*args, **kwargs)

    return run
