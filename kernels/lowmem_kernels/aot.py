"""Which kernels the engines would start on a given GPU, ready for ahead-of-time compilation: no GPU is needed.

    for specimen in specimens((8, 6)):
        compiled = specimen.compile()
        compiled.metadata.shared, compiled.n_regs ...

The engines themselves are run, on meta tensors, and their launches recorded: what is compiled is what would be started.
Needs a process without TRITON_INTERPRET (there are no kernels to compile in the interpreter).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowmem_kernels import FrozenHead, retain_loss, token_kl, token_logprobs
from lowmem_kernels.launch import recording

POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Specimen:
    """One kernel with everything its compilation depends on."""

    name: str  # the kernel and the problem that starts it
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    num_warps: int
    num_stages: int
    capability: tuple[int, int]

    def compile(self):
        """The CompiledKernel: `metadata.shared` is its shared memory in bytes, `asm["cubin"]` its machine code."""
        major, minor = self.capability
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)


def specimens(capability: tuple[int, int], *, every_option: bool = True) -> Iterator[Specimen]:
    """Every distinct kernel for this capability; with every_option=False only those of a plain bfloat16 head."""
    seen = set()
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if every_option else (torch.bfloat16,)
    options = itertools.product((False, True), (None, 30.0), (50304, 50277)) if every_option else [(False, None, 50304)]
    for dtype, (bias, softcap, vocabulary) in itertools.product(dtypes, options):
        for problem, launches in _launches(capability, dtype, bias, softcap, vocabulary):
            for kernel, arguments in launches:
                name = f"{kernel.fn.__name__}: {problem}, {dtype}, V {vocabulary}"
                name += f"{', bias' if bias else ''}{', softcap' if softcap else ''}"
                specimen = _specimen(name, kernel, dict(arguments), capability)
                key = str((kernel.fn.__name__, specimen.signature, specimen.constexprs, specimen.attrs))
                if key not in seen:
                    seen.add(key)
                    yield specimen


def _launches(capability, dtype, bias, softcap, vocabulary) -> Iterator[tuple[str, list]]:
    """What each public function starts, by the name of the problem."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, d = 300, 4096
    head = FrozenHead(meta(vocabulary, d), meta(vocabulary) if bias else None, softcap)
    targets = meta(n, dtype=torch.int64)
    for engine, need_grad in itertools.product(("chunks", "tiles"), (True, False)):
        hidden, ref_hidden = meta(n, d).requires_grad_(need_grad), meta(n, d)
        where = f"{engine} {'with' if need_grad else 'without'} gradient"
        with recording(capability) as record:
            token_logprobs(hidden, head, targets, engine=engine)
        yield f"logprobs, {where}", record.launches
        for direction in ("policy-reference", "reference-policy"):
            with recording(capability) as record:
                token_kl(hidden, ref_hidden, head, direction=direction, engine=engine)
            yield f"kl {direction}, {where}", record.launches
            with recording(capability) as record:
                retain_loss(hidden, ref_hidden, head, targets, 1.0, 1.0, direction=direction, engine=engine)
            yield f"both {direction}, {where}", record.launches


def _specimen(name: str, kernel, arguments: dict, capability: tuple[int, int]) -> Specimen:
    """Types and constants as Triton's launcher chooses them: None and 1 are constants, and it notes what 16 divides."""
    num_warps, num_stages = arguments.pop("num_warps"), arguments.pop("num_stages")
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return Specimen(name, kernel, signature, constexprs, attrs, num_warps, num_stages, capability)
