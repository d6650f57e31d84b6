"""The accuracy checks notice bugs: each test plants one in a copy of the package.

A copy, since Triton reads kernels from their files. The checks are those that all other tests call, on cases that the
copy without a bug passes.
"""

import itertools
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import lowmem_kernels
import pytest
import torch

from tests.kernels.conftest import use_blocks
from tests.kernels.reference import check, check_jointly, make_case
from tests.kernels.rowwise_reference import GPT_OSS, check_norms, check_packed, check_rotary

numbers = itertools.count()


class Bug(NamedTuple):
    """In `file` of the package, `right`, which is there once, becomes `wrong`."""

    engine: str
    name: str
    file: str
    right: str
    wrong: str
    kl: float = 1e-2


BUGS = [
    Bug("torch", "a chunk of the vocabulary dropped", "torch_engine.py",
        "range(0, head.vocabulary, VOCABULARY)", "range(VOCABULARY, head.vocabulary, VOCABULARY)"),
    Bug("torch", "bfloat16 logits", "torch_engine.py",
        "z, slope = _logits(product(hidden, weight), bias, head)",
        "z, slope = _logits(product(hidden, weight).bfloat16().float(), bias, head)"),
    Bug("chunks", "a block dropped from the statistics", "row_kernel.py",
        "\n    for start in range(0, V, BLOCK):", "\n    for start in range(BLOCK, V, BLOCK):"),
    Bug("chunks", "a block of the gradient not written", "row_kernel.py",
        "\n        for start in range(0, V, BLOCK):", "\n        for start in range(0, V - BLOCK, BLOCK):"),
    Bug("chunks", "the last entry lost", "row_kernel.py", "inside = column < V", "inside = column < V - 1"),
    Bug("chunks", "blocks not merged", "row_kernel.py",
        "whole = merge(whole, statistics(z, ref_z, WITH_REF, POLICY_FIRST), WITH_REF, POLICY_FIRST)",
        "whole = statistics(z, ref_z, WITH_REF, POLICY_FIRST)"),
    Bug("chunks", "the target counted twice", "row_kernel.py", " & (column != left_out[:, None])", ""),
    Bug("chunks", "bfloat16 logits", "row_kernel.py", "    z, slope = logits(product",
        "    product = rounded(product, tl.bfloat16).to(tl.float32)\n    z, slope = logits(product"),
    Bug("chunks", "the reference's logits are the policy's", "chunks_engine.py",
        "logits[rows : 2 * rows]", "logits[:rows]"),
    Bug("tiles", "a tile dropped from the statistics", "tile_statistics.py",
        "tl.cdiv(V, COLUMNS))", "tl.cdiv(V, COLUMNS) - 1)"),
    Bug("tiles", "a share not merged", "tile_statistics.py", "range(1, shares)", "range(2, shares)"),
    Bug("tiles", "tiles not merged", "tile_statistics.py",
        "whole = merge(whole, statistics(z, ref_z, WITH_REF, POLICY_FIRST), WITH_REF, POLICY_FIRST)",
        "whole = statistics(z, ref_z, WITH_REF, POLICY_FIRST)"),
    Bug("tiles", "bfloat16 logits", "tile_statistics.py",
        "    z, slope = logits(product",
        "    product = product.to(tl.bfloat16).to(tl.float32)\n    z, slope = logits(product"),
    Bug("tiles", "the last step of d lost", "tile_statistics.py",
        "range(0, D, DEPTH):\n        is_d", "range(0, D - DEPTH, DEPTH):\n        is_d"),
    Bug("tiles", "a chunk of the gradient not added", "tile_gradient.py", "if not IS_FIRST:", "if False:"),
    Bug("tiles", "a step of the gradient lost", "tile_gradient.py",
        "range(0, tl.minimum(slope_stride, V - first_column), DEPTH)",
        "range(DEPTH, tl.minimum(slope_stride, V - first_column), DEPTH)"),
    Bug("tiles", "the target's slope beside the target", "tile_gradient.py",
        "== target[:, None]", "== target[:, None] + 1"),
    Bug("tiles", "the KL as a difference of large numbers", "device_math.py",
        "        return tl.where(near, p * phi(-ell), q - p + p * ell)", "        return p * ell", kl=1e-6),
    Bug("chunks", "the KL between blocks left out", "device_math.py",
        "kl = kl_term(p_a, q_a, ell_a, POLICY_FIRST) + kl_term(p_b, q_b, ell_b, POLICY_FIRST)",
        "kl = tl.zeros_like(kl_a)"),
]  # fmt: skip
BUGS_OF_ROWS = [  # of norms, rotary embeddings and gated activations
    Bug("torch", "no eps", "norm.py", "keepdim=True) + norm.eps)", "keepdim=True))"),
    Bug("torch", "the mean of the gradient is kept", "norm.py",
        "grad = grad - grad.mean(-1, keepdim=True)", "grad = grad + 0"),
    Bug("triton", "the last entry of a row lost", "norm_kernel.py",
        "inside = (row < num_rows)[:, None] & (column < D)", "inside = (row < num_rows)[:, None] & (column < D - 1)"),
    Bug("triton", "the mean over the block, not the row", "norm_kernel.py",
        "tl.sum(x * x, 1) / D", "tl.sum(x * x, 1) / BLOCK"),
    Bug("triton", "the mean's padding counted", "norm_kernel.py",
        "x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)", "x = x - (tl.sum(x, 1) / D)[:, None]"),
    Bug("triton", "rounded once, not twice", "norm_kernel.py", "        if ROUND_FIRST:", "        if False:"),
    Bug("triton", "Gemma's offset left out", "norm_kernel.py", ".to(tl.float32) + offset", ".to(tl.float32)"),
    Bug("triton", "the gradient is not projected", "norm_kernel.py", "(grad - y * along) * scale", "grad * scale"),
    Bug("triton", "the gradient without the weight", "norm_kernel.py", "grad *= weight", "grad *= 1"),
    Bug("triton", "only the first rows written", "norm.py",
        "(-(-rows // config.ROWS),)", "(rows // config.ROWS,)"),
    Bug("torch", "the angle is not negated", "rotary_embedding.py",
        "turned = -partner(", "turned = partner("),
    Bug("triton", "the angle is not negated", "rotary_embedding_kernel.py",
        "sin_1, sin_2 = -sin_2, -sin_1", "sin_1, sin_2 = sin_2, sin_1"),
    Bug("triton", "the last pair lost", "rotary_embedding_kernel.py",
        "is_pair = pair < R // 2", "is_pair = pair < R // 2 - 1"),
    Bug("triton", "rows share the first one's positions", "rotary_embedding_kernel.py",
        "table = batch * table_batch + position * table_token", "table = position * table_token"),
    Bug("triton", "pairs are written where they were read", "rotary_embedding_kernel.py",
        "out_row + first_out[None, :]", "out_row + first[None, :]"),
    Bug("triton", "a pair has two entries in its table", "rotary_embedding_kernel.py",
        "at_first, at_second = pair, pair\n", "at_first, at_second = pair, pair + R // 4\n"),
    Bug("torch", "pairs stay together", "rotary_embedding.py",
        "torch.stack(y.chunk(2, -1), -1).flatten(-2)", "y + 0"),
    Bug("triton", "products not rounded", "rotary_embedding_kernel.py", "        if ROUND_EACH:", "        if False:"),
    Bug("triton", "the rest is not copied", "rotary_embedding_kernel.py", "        if REST > 0:", "        if False:"),
    Bug("triton", "keys are turned as often as there are queries", "rotary_embedding_kernel.py",
        "turn(k_ptr, k_out_ptr, k_heads, ", "turn(k_ptr, k_out_ptr, k_heads - 1, "),
    Bug("torch", "up's gradient with the gate", "gated_activation.py",
        "up_grad = grad * activated(gate if", "up_grad = grad * activated(up if"),
    Bug("torch", "up's gradient beyond its limit", "gated_activation.py", "(up.abs() <= how.limit)", "(up == up)"),
    Bug("triton", "the last entries lost", "gated_activation_kernel.py",
        "inside = column < D", "inside = column < D - 1"),
    Bug("triton", "a wrong slope", "gated_activation_kernel.py",
        "share * (1.0 + alpha * x * (1.0 - share))", "share * (1.0 + alpha * (1.0 - share))"),
    Bug("triton", "alpha left out", "gated_activation_kernel.py", "tl.exp(-alpha * x)", "tl.exp(-x)"),
    Bug("triton", "the gate's gradient beyond its limit", "gated_activation_kernel.py", "slope *= gate_moves", "pass"),
    Bug("triton", "up has no limit", "gated_activation_kernel.py",
        "tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))", "up * 1.0"),
    Bug("triton", "the offset of up left out", "gated_activation_kernel.py",
        "rounded(up + up_offset, ", "rounded(up, "),
    Bug("triton", "gate and up not interleaved", "gated_activation_kernel.py", "column * up_entry", "column"),
    Bug("triton", "the activation is not rounded", "gated_activation_kernel.py",
        "value = rounded(value, dtype).to(tl.float32)", "value = value * 1.0"),
    Bug("triton", "the gradients are exchanged", "gated_activation.py",
        "_launch(gate, up, grad, ctx.how, *into)", "_launch(gate, up, grad, ctx.how, *into[::-1])"),
]  # fmt: skip
DISTANCE = {1e-2: 0.14, 1e-6: 1.5e-3}  # of the logits, for a KL


@pytest.fixture
def package_with(tmp_path, monkeypatch):
    """package_with(bug) imports a copy of lowmem_kernels, with small blocks and, unless it is None, with the bug."""

    def make(bug: Bug | None) -> ModuleType:
        name = f"planted_{next(numbers)}"
        shutil.copytree(Path(lowmem_kernels.__file__).parent, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
        if bug is not None:
            file = tmp_path / name / bug.file
            assert file.read_text().count(bug.right) == 1
            file.write_text(file.read_text().replace(bug.right, bug.wrong))
        for file in (tmp_path / name).glob("*.py"):  # imports, and the name of the custom operator
            file.write_text(file.read_text().replace("lowmem_kernels", name))
        monkeypatch.syspath_prepend(tmp_path)
        package = import_module(name)
        use_blocks(monkeypatch, rows=16, columns=256, depth=64, chunk=384, package=name)
        return package

    yield make
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def check_everything(engine: str, package: ModuleType, kl: float = 1e-2) -> None:
    case = make_case(5, 96, 700, distance=DISTANCE[kl], sharpness=1.5)
    check(case, engine, package)
    check_jointly(case, engine, package)


@pytest.mark.parametrize("engine", ["torch", "chunks", "tiles"])
@pytest.mark.parametrize("kl", DISTANCE)
def test_a_copy_without_a_bug_passes(engine, kl, package_with):
    check_everything(engine, package_with(None), kl)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.engine}: {bug.name}")
def test_a_planted_bug_is_noticed(bug, package_with):
    package = package_with(bug)
    with pytest.raises(AssertionError):
        check_everything(bug.engine, package, bug.kl)


def check_rows(engine: str, package: ModuleType) -> None:
    check_norms(engine, package, n=3, d=70)
    check_rotary(engine, package, heads=(3, 2), tokens=2)
    check_rotary(engine, package, layout="pairs-to-halves", by_pair=True, table=torch.float32)
    check_packed(engine, package, n=3, d=70)
    check_packed(engine, package, n=3, d=70, interleaved=True, **GPT_OSS)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_rows_of_a_copy_without_a_bug_pass(engine, package_with):
    check_rows(engine, package_with(None))


@pytest.mark.parametrize("bug", BUGS_OF_ROWS, ids=lambda bug: f"{bug.engine}: {bug.name}")
def test_a_planted_bug_in_rows_is_noticed(bug, package_with):
    package = package_with(bug)
    with pytest.raises(AssertionError):
        check_rows(bug.engine, package)
