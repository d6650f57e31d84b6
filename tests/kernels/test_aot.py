"""Every kernel compiles for every supported GPU, fits its shared memory and spills no register. Needs no GPU.

Compiled in a separate process, since in this one Triton may be interpreting. By default the kernels of a plain bfloat16
model, for one GPU of each family of configurations; with --all-gpus all of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = Path(__file__).parents[2] / "kernels"
KERNEL_NAMES = {
    "row_kernel", "sweep_kernel", "finalise_kernel", "slope_kernel", "product_kernel",
    "norm_kernel", "rotary_kernel", "glu_kernel",
}  # fmt: skip
# compute capability: bytes of shared memory a program may take. 8.6 and 8.9 are the 24 GB cards
LARGEST = {"8.0": 166_912, "8.6": 101_376, "8.9": 101_376, "9.0": 232_448, "10.0": 232_448, "12.0": 101_376}


def compile_in_another_process(*command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("gpu", LARGEST)
def test_every_kernel_fits(gpu, request):
    everything = request.config.getoption("--all-gpus", default=False)
    if gpu not in ("8.6", "9.0") and not everything:
        pytest.skip("run with --all-gpus")
    process = compile_in_another_process("-m", "lowmem_kernels.aot", gpu, *["--every-option"] * everything)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    lines = [line.split(None, 10) for line in process.stdout.splitlines()]
    assert {words[10].split(":")[0] for words in lines} == KERNEL_NAMES
    assert len(lines) >= (100 if everything else 20)
    for line_gpu, verdict, registers, _, spilled, _, _, shared, *_ in lines:
        assert (line_gpu, verdict, spilled) == (gpu, "ok", "0") and int(registers) <= 255
        assert int(shared) <= LARGEST[gpu]


def test_no_product_of_a_rotary_embedding_is_fused_with_the_sum():
    """Its rounding would be left out, on GPUs with bfloat16 arithmetic: the bits would not be the plain form's."""
    program = """
from dataclasses import replace
from lowmem_kernels import aot
specimen = next(s for s in aot.specimens((9, 0), every_option=False) if s.kernel.fn.__name__ == "rotary_kernel")
fusing = replace(specimen, options=specimen.options | {"enable_fp_fusion": True})
assert ["fma" in s.compile().asm["ptx"] for s in (specimen, fusing)] == [False, True]
"""
    process = compile_in_another_process("-c", program)
    assert process.returncode == 0, process.stderr[-2000:]


def test_a_kernel_that_does_not_fit_is_noticed():
    """Tiles of 128 x 256 entries with 4 warps: as many sums as there are registers."""
    program = """
from lowmem_kernels import aot, tile_config
tile_config.LOGITS["sweep"]["ampere"] = [tile_config.TileConfig(128, 256, 64, 4, 4)] * 2
specimen = next(s for s in aot.specimens((8, 6), every_option=False) if s.kernel.fn.__name__ == "sweep_kernel")
taken = specimen.resources()
assert taken.spilled > 0 and taken.shared > 101_376 and taken.exceed((8, 6)), taken
"""
    process = compile_in_another_process("-c", program)
    assert process.returncode == 0, process.stderr[-2000:]


def test_the_number_of_tokens_compiles_nothing_anew():
    """Batches of 300, 304 and 305 tokens, of which one is a multiple of 16, and chunks of a single token."""
    program = """
import torch
from lowmem_kernels import FrozenHead, aot, chunks_engine, retain_loss
from lowmem_kernels.launch import recording
meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
chunks_engine.tokens_per_chunk = lambda n, bytes_each: 304
for engine in ("chunks", "tiles"):
    compiled = set()
    for n in (300, 304, 305):
        with recording((8, 6)) as record:
            hidden, targets = meta(n, 256).requires_grad_(), meta(n, dtype=torch.int64)
            retain_loss(hidden, meta(n, 256), FrozenHead(meta(50304, 256)), targets, 1.0, 1.0, engine=engine)
        keys = [str(aot._specimen(k.fn.__name__, k, dict(a), (8, 6))) for k, a in record.launches]
        compiled.add(tuple(sorted(set(keys))))
    assert len(compiled) == 1, compiled
"""
    process = compile_in_another_process("-c", program)
    assert process.returncode == 0, process.stderr[-2000:]
