"""`python benchmarks/kernels.py --layers`: norms, rotary embeddings and gated activations beside their plain forms.

On a GPU: time of forward and backward, the memory in use between them and at the peak, and the error against float64.
Without one nothing is timed: both forms run on the simulated GPU, which counts bytes and operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lowmem_kernels import glu, layer_norm, rms_norm, rotary
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels_parts.tasks import relative
from benchmarks.kernels_parts.timing import take_turns
from benchmarks.shared import record
from benchmarks.shared.record import reason

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, HEAD_SIZE = 4096, 11008, 32, 8, 128  # about those of a 7B model
FULL, QUICK = 8192, 512  # tokens


@dataclass(frozen=True)
class Part:
    """`shapes` of the inputs that get a gradient, and of the constants behind them; `moved`: how often a tensor of the
    inputs' size must be read or written in forward and backward, if nothing is done twice."""

    name: str
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    constants: Callable[[int], tuple[tuple[int, ...], ...]]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    moved: float


def _plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    """As LlamaRMSNorm."""
    y = x if x.dtype == torch.float64 else x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _plain_layer_norm(x: Tensor) -> Tensor:
    """As OlmoLayerNorm."""
    return F.layer_norm(x if x.dtype == torch.float64 else x.float(), x.shape[-1:], None, None, 1e-5).to(x.dtype)


def _plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As apply_rotary_pos_emb of Llama."""
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        x_1, x_2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x_2, x_1), -1) * sin

    return turn(q), turn(k)


def _heads(tokens: int) -> tuple[tuple[int, ...], ...]:
    return (1, HEADS, tokens, HEAD_SIZE), (1, KEY_HEADS, tokens, HEAD_SIZE)


PARTS = (
    Part("RMSNorm", lambda n: ((1, n, HIDDEN),), lambda n: ((HIDDEN,),), partial(rms_norm, eps=1e-5, round_first=True),
         _plain_rms, 5),
    Part("LayerNorm", lambda n: ((1, n, HIDDEN),), lambda n: (), partial(layer_norm, eps=1e-5), _plain_layer_norm, 5),
    Part("rotary", _heads, lambda n: ((1, n, HEAD_SIZE),) * 2, rotary, _plain_rotary, 4),
    Part("SwiGLU", lambda n: ((1, n, INTERMEDIATE),) * 2, lambda n: (), glu, lambda gate, up: F.silu(gate) * up, 4),
)  # fmt: skip


def main(path: Path, tokens: int, seconds: float) -> int:
    """Prints the table and writes it to `path`."""
    gpu = torch.cuda.is_available()
    print(f"{tokens} tokens, bfloat16, forward and backward{'' if gpu else ': simulated, nothing is timed'}")
    rows = []
    for part in PARTS:
        found = measure(part, tokens, seconds) if gpu else [simulate(part, tokens, form) for form in ("ours", "plain")]
        for row in found:
            rows.append(row)
            print("  " + "  ".join(_cell(name, value) for name, value in row.items()), flush=True)
    record.write(path, "kernels --layers", rows, tokens=tokens)
    print(f"Written to {path}")
    return 0


def make_inputs(part: Part, tokens: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in part.shapes(tokens)]
    constants = [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in part.constants(tokens)]
    return [x.requires_grad_() for x in inputs], constants


def both_ways(function: Callable[..., Any], inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    results = function(*inputs, *constants)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [_upstream(y.shape, y.device).to(y.dtype) for y in results]
    return [*results, *torch.autograd.grad(results, inputs, upstream)]


@lru_cache
def _upstream(shape: torch.Size, device: torch.device) -> Tensor:
    """Unlike inputs and results, along which a norm has no slope. In the number type of most of them."""
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def measure(part: Part, tokens: int, seconds: float) -> list[dict]:
    """On the GPU: a row for our form, the plain one, and torch.compile's of the latter."""
    sets = [make_inputs(part, tokens, "cuda") for _ in range(4)]  # taken in turn, so that none is still in the cache
    forms = {"ours": part.ours, "plain": part.plain, "compiled": torch.compile(part.plain)}
    exact = both_ways(part.plain, *([x.detach().double().requires_grad_() for x in xs] for xs in sets[0]))
    moved = part.moved * sum(x.nbytes for x in sets[0][0])
    rows: list[dict] = []
    ready: dict[str, Callable[[Any], Any]] = {}
    for name, function in forms.items():
        row: dict[str, Any] = {"part": part.name, "form": name}
        rows.append(row)
        try:
            torch.cuda.synchronize()
            begin = time.monotonic()
            values = both_ways(function, *sets[0])
            torch.cuda.synchronize()
            row["first_call_seconds"] = time.monotonic() - begin
            row["error"] = max(relative(x.double(), true) for x, true in zip(values, exact, strict=True))
            del values
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            held = function(*sets[0][0], *sets[0][1])
            row["kept_bytes"] = torch.cuda.memory_allocated() - before
            del held
            both_ways(function, *sets[0])
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            ready[name] = partial(_taking_a_pair, function)
        except Exception as error:
            row["missing"] = reason(error)
    del exact
    for name, times in take_turns(ready, sets, seconds, "cuda").items():
        row = next(row for row in rows if row["form"] == name)
        row["missing" if isinstance(times, str) else "seconds"] = times
        if not isinstance(times, str):
            row["bytes_per_second"] = moved / times["median"]
    return rows


def _taking_a_pair(function: Callable[..., Any], pair: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return both_ways(function, *pair)


def simulate(part: Part, tokens: int, form: str) -> dict[str, Any]:
    """On the simulated GPU: bytes in use between forward and backward and at the peak, beyond the inputs; operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lowmem_npo.estimate.simulator.gpu import fake_gpu

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is not torch.ops.prim.device.default
            return func(*args, **(kwargs or {}))

    with fake_gpu() as gpu:
        inputs, constants = make_inputs(part, tokens, "cuda")
        gpu.restart_peak()
        before = gpu.live
        with Operators() as operators:
            results = getattr(part, form)(*inputs, *constants)
            kept = gpu.live - before
            results = results if isinstance(results, tuple) else (results,)
            torch.autograd.grad(results, inputs, [y.detach() for y in results])
        return {
            "part": part.name,
            "form": form,
            "kept_bytes": kept,
            "peak_bytes": gpu.peak - before,
            "operators": operators.count,
        }


def _cell(name: str, value: Any) -> str:
    if name == "seconds":
        return f"{1e3 * value['median']:.3f} ms ({1e3 * value['low']:.3f} to {1e3 * value['high']:.3f})"
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')} {value / 2**20:.0f} MiB"
    if name == "bytes_per_second":
        return f"{value / 1e9:.0f} GB/s"
    if isinstance(value, float):
        return f"{name} {value:.1e}"
    return f"{value:<10}" if name in ("part", "form") else f"{name} {value}"
