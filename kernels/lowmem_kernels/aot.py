"""Every kernel that the engines launch on a given GPU, compiled ahead of time: no GPU is needed.

    python -m lowmem_kernels.aot 8.6 9.0         registers, spills and shared memory on these compute capabilities
    python -m lowmem_kernels.aot --every-option  on all of GPUS, and with every dtype and option that changes the code

One line per kernel; the exit code is 1 if one spills registers or takes more shared memory than the GPU has.

The engines themselves run, on meta tensors, and their launches are recorded: exactly these kernels are compiled. Needs
a process without TRITON_INTERPRET (there are no kernels to compile in the interpreter).
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowmem_kernels import (
    FrozenHead,
    act,
    glu,
    layer_norm,
    packed_glu,
    retain_loss,
    rms_norm,
    rotary,
    token_kl,
    token_logprobs,
)
from lowmem_kernels.dispatch import Engine
from lowmem_kernels.gated_activation import ACTIVATIONS
from lowmem_kernels.launch import OPTIONS, recording
from lowmem_kernels.norm import LONGEST_ROW
from lowmem_kernels.problem import Direction
from lowmem_kernels.rotary_embedding import LAYOUTS

GPUS = {  # compute capability: the most shared memory of one program, in bytes
    (8, 0): 163 * 1024,  # A100
    (8, 6): 99 * 1024,  # RTX 3090, A10
    (8, 9): 99 * 1024,  # RTX 4090, L4
    (9, 0): 227 * 1024,  # H100
    (10, 0): 227 * 1024,  # B200
    (12, 0): 99 * 1024,  # RTX 5090
}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


class Resources(NamedTuple):
    """What a compiled kernel takes: registers, and bytes of spilled registers, per thread; bytes of shared memory."""

    registers: int
    spilled: int
    shared: int

    def exceed(self, capability: tuple[int, int]) -> bool:
        return self.spilled > 0 or self.shared > GPUS[capability]


class Variant(NamedTuple):
    """A head: V x d, its dtype, with or without bias and softcap."""

    dtype: torch.dtype
    options: bool
    v: int
    d: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {self.v} x {self.d}{', bias and softcap' * self.options}"


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = Variant(torch.bfloat16, False, 50304, 4096)
VARIANTS = (
    *(Variant(dtype, False, 50304, 4096) for dtype in DTYPES),
    *(Variant(dtype, True, 50277, 4048) for dtype in DTYPES),  # not multiples of the blocks
    Variant(torch.bfloat16, True, 50277, 4007),  # rows of W are not aligned
)


@dataclass(frozen=True)
class Specimen:
    """One kernel with everything its compilation depends on."""

    name: str  # the kernel and the problem that launches it
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    options: dict  # of the compiler
    capability: tuple[int, int]

    def compile(self):
        """The CompiledKernel; `asm["cubin"]` is its machine code."""
        major, minor = self.capability
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=self.options)

    def resources(self) -> Resources:
        """Compiles it and reads its resources from the machine code. Spilled registers are on the stack."""
        compiled = self.compile()
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
        registers, stack, local = map(int, usage)
        return Resources(registers, max(stack, local), compiled.metadata.shared)


def specimens(capability: tuple[int, int], *, every_option: bool = True) -> Iterator[Specimen]:
    """Every distinct kernel for this capability; with every_option=False those of a plain bfloat16 model only."""
    seen = set()
    for problem, launches in itertools.chain(
        *(_head_launches(capability, variant, every_option) for variant in (VARIANTS if every_option else (PLAIN,))),
        *(_rowwise_launches(capability, dtype, every_option) for dtype in (DTYPES if every_option else DTYPES[:1])),
    ):
        for kernel, arguments in launches:
            name = f"{kernel.fn.__name__}: {problem}"
            specimen = _specimen(name, kernel, dict(arguments), capability)
            key = str((kernel.fn.__name__, specimen.signature, specimen.constexprs, specimen.attrs, specimen.options))
            if key not in seen:
                seen.add(key)
                yield specimen


def _head_launches(capability, variant: Variant, both_directions: bool) -> Iterator[tuple[str, list]]:
    """The launches of each function of a head, by the name of the problem."""

    def meta(*shape: int, dtype: torch.dtype = variant.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    v, d = variant.v, variant.d
    head = FrozenHead(meta(v, d), meta(v) if variant.options else None, 30.0 if variant.options else None)
    directions: tuple[Direction, ...] = ("policy-reference", "reference-policy")
    engines: tuple[Engine, ...] = ("chunks", "tiles")
    for engine, n, need_grad in itertools.product(engines, (300, 8), (True, False)):
        hidden, ref_hidden = meta(n, d).requires_grad_(need_grad), meta(n, d)
        targets = meta(n, dtype=torch.int64)
        where = f"{engine} {'with' if need_grad else 'without'} gradient, {n} tokens"
        with recording(capability) as record:
            token_logprobs(hidden, head, targets, engine=engine)
        yield f"logprobs, {where}, {variant}", record.launches
        for direction in directions[: 1 + both_directions]:
            with recording(capability) as record:
                token_kl(hidden, ref_hidden, head, direction=direction, engine=engine)
            yield f"kl {direction}, {where}, {variant}", record.launches
            with recording(capability) as record:
                retain_loss(hidden, ref_hidden, head, targets, 1.0, 1.0, direction=direction, engine=engine)
            yield f"both {direction}, {where}, {variant}", record.launches


class Call(NamedTuple):
    """A function of the rows of some tensors, and what it is called."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


def _rowwise_launches(capability, dtype: torch.dtype, every_option: bool) -> Iterator[tuple[str, list]]:
    """The launches, forward and backward, of norms, rotary embeddings and gated activations."""
    for name, function, inputs in itertools.chain(
        _norms(dtype, every_option), _rotaries(dtype, every_option), _activations(dtype, every_option)
    ):
        with recording(capability) as record:
            outputs = function(*inputs, engine="triton")
            outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
            torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])
        yield f"{name}, {str(dtype).removeprefix('torch.')}", record.launches


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _norms(dtype: torch.dtype, every_option: bool) -> Iterator[Call]:
    for d in (128, 4096, LONGEST_ROW, 5000, 123) if every_option else (128, 4096, LONGEST_ROW):
        x, weight = _meta(dtype, 300, d), _meta(dtype, d).detach()
        for offset, first in ((0.0, True), (1.0, False))[: 1 + every_option]:
            norm = partial(rms_norm, weight=weight, eps=1e-5, offset=offset, round_first=first)
            yield Call(f"rms_norm, {d}", norm, (x,))
        parts = (None, None, 0.0), (weight, weight, 1.0), (weight, None, 0.0)
        for scale, bias, offset in parts[: 1 + 2 * every_option]:
            norm = partial(layer_norm, weight=scale, bias=bias, eps=1e-5, offset=offset)
            yield Call(f"layer_norm, {d}", norm, (x,))


def _rotaries(dtype: torch.dtype, every_option: bool) -> Iterator[Call]:
    for layout, size, rotated, table, by_pair in itertools.product(
        LAYOUTS if every_option else LAYOUTS[:1],
        (128, 256, 80) if every_option else (128,),
        (1.0, 0.25),
        (dtype, torch.float32) if every_option else (dtype,),
        (False, True) if every_option else (False,),
    ):
        rotates = int(size * rotated)
        cos = _meta(table, 1, 300, rotates // (1 + by_pair)).detach()
        yield Call(
            f"rotary {layout}{', by pair' * by_pair}, {rotates} of {size}",
            partial(rotary, cos=cos, sin=cos, layout=layout, by_pair=by_pair),
            tuple(_meta(dtype, 4, 300, heads, size).transpose(1, 2) for heads in (32, 8)),
        )
    cos = _meta(dtype, 1, 300, 64).detach()
    of_one = partial(rotary, k=None, cos=cos, sin=cos, by_pair=True)
    yield Call("rotary of one tensor, 128", of_one, (_meta(dtype, 4, 8, 300, 128),))


def _activations(dtype: torch.dtype, every_option: bool) -> Iterator[Call]:
    for activation, d in itertools.product(ACTIVATIONS if every_option else ("silu",), (11008, 123)):
        gate, up = _meta(dtype, 300, d), _meta(dtype, 300, d)
        yield Call(f"glu {activation}, {d}", partial(glu, activation=activation), (gate, up))
        if every_option:
            yield Call(f"act {activation}, {d}", partial(act, activation=activation), (gate,))
    as_in_gpt_oss = partial(packed_glu, interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0)
    yield Call("glu as in gpt-oss, 2880", as_in_gpt_oss, (_meta(dtype, 300, 5760),))


def _specimen(name: str, kernel, arguments: dict, capability: tuple[int, int]) -> Specimen:
    """Types and constants as Triton's launcher chooses them: None and 1 are constants, multiples of 16 are noted;
    neither where the kernel does not specialise on the parameter."""
    options = {name: arguments.pop(name) for name in OPTIONS}
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, fixed = arguments[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return Specimen(name, kernel, signature, constexprs, attrs, options, capability)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", default=[f"{a}.{b}" for a, b in GPUS], help="capabilities, such as 8.6")
    parser.add_argument("--every-option", action="store_true", help="every dtype and option, both directions of the KL")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter has no kernels to compile")
    too_much = 0
    for gpu in options.gpus:
        major, minor = map(int, gpu.split("."))
        capability = (major, minor)
        for specimen in specimens(capability, every_option=options.every_option):
            taken = specimen.resources()
            too_much += taken.exceed(capability)
            verdict = "TOO MUCH" if taken.exceed(capability) else "ok"
            size = f"{taken.registers:>3} registers  {taken.spilled:>4} B spilled  {taken.shared:>6} B shared"
            print(f"{gpu:<5} {verdict:<9} {size}  {specimen.name}", flush=True)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
