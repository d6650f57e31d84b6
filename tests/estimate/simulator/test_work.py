"""What operators are counted as: by hand, on shapes that could be confused."""

from __future__ import annotations

import pytest
import torch
from lowmem_kernels import FrozenHead, retain_loss, token_logprobs
from torch.nn import functional

from lowmem_npo.estimate.simulator.gpu import GPU, FakeGPU, fake_gpu
from lowmem_npo.estimate.simulator.work import Operation


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU, requires_grad=grad)


def kernels(gpu: FakeGPU) -> list[Operation]:
    return [operation for _, some in gpu.work.sections for operation in some if operation.kind == "kernel"]


def counted(function) -> list[Operation]:
    with fake_gpu() as gpu:
        run = function()
        gpu.work.restart()
        run()
        return [operation for _, some in gpu.work.sections for operation in some]


def test_a_product_moves_its_operands_and_its_result():
    for dtype in (torch.bfloat16, torch.float32):
        size, half = dtype.itemsize, dtype == torch.bfloat16

        def product(dtype=dtype):
            a, b = empty(64, 128, dtype=dtype), empty(32, 128, dtype=dtype)
            return lambda: a @ b.T

        view, operation = counted(product)
        assert view.kind == "view"
        moved = size * (64 * 128 + 32 * 128 + 64 * 32)
        assert operation == Operation("kernel", 2 * 64 * 128 * 32, moved, half, part="product")


def test_an_expanded_operand_is_read_once_and_a_table_where_it_is_looked_up():
    def add():
        x, row = empty(1000, 64), empty(1, 64).expand(1000, 64)
        return lambda: x + row

    (operation,) = counted(add)
    assert operation.bytes == 2 * (1000 * 64 + 64 + 1000 * 64) and operation.flops == 0

    def look_up():
        table, ids = empty(50_000, 64), torch.zeros(10, dtype=torch.int64, device=GPU)
        return lambda: functional.embedding(ids, table)

    (operation,) = counted(look_up)
    assert operation.bytes == 2 * 2 * 10 * 64 + 8 * 10


@pytest.mark.parametrize("key_heads", [4, 2])
def test_causal_attention_is_half_of_the_whole(key_heads):
    def attention(causal: bool):
        def make():
            q, k, v = (empty(2, heads, 256, 64, grad=True) for heads in (4, key_heads, key_heads))
            how = {"is_causal": causal, "enable_gqa": key_heads < 4}
            return lambda: functional.scaled_dot_product_attention(q, k, v, **how).sum().backward()

        return sum(operation.flops for operation in counted(make))

    forward = 2 * 2 * 2 * 4 * 256 * 256 * 64
    assert attention(causal=False) == forward * (1 + 2.5) == 2 * attention(causal=True)


def test_copies_wait_unless_they_need_not():
    def copies():
        on_host, on_gpu = torch.zeros(100, device="cpu"), empty(50)
        return lambda: (on_host.to(GPU), on_host.to(GPU, non_blocking=True), on_gpu.cpu(), on_gpu.float())

    *moved, cast = counted(copies)
    assert [(o.kind, o.bytes, o.waits, o.part) for o in moved] == [
        ("copy", 400, True, "to GPU"), ("copy", 400, False, "to GPU"), ("copy", 100, True, "to host"),
    ]  # fmt: skip
    assert cast.kind == "kernel" and not cast.waits


def test_values_that_the_host_asks_for_make_it_wait():
    def asks():
        mask = torch.ones(8, dtype=torch.bool, device=GPU)
        return lambda: (mask.nonzero(), bool(mask.all()))

    assert sum(operation.waits for operation in counted(asks)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_experts_has_the_shape_and_the_work_of_its_groups(dtype):
    """Forms of the forward pass and of both gradients, and a product for each pair: three groups of 32 rows in all."""
    forms = {
        ((32, 16), (3, 16, 8)): ((32, 8), 32), ((16, 32), (32, 8)): ((3, 16, 8), 32),
        ((3, 8, 16), (16, 32)): ((8, 32), 32), ((3, 16, 32), (3, 32, 8)): ((3, 16, 8), 3 * 32),
    }  # fmt: skip
    for (a, b), (shape, rows) in forms.items():
        with fake_gpu() as gpu:
            x, w = (torch.empty(size, dtype=dtype, device=GPU) for size in (a, b))
            ends = None if len(a) == len(b) == 3 else torch.empty(3, dtype=torch.int32, device=GPU)
            gpu.work.restart()
            result = torch._grouped_mm(x, w, ends)
            (operation,) = gpu.work.sections[0][1]
        assert (result.shape, result.dtype, result.device) == (shape, dtype, GPU)
        assert operation.part == "product" and operation.half == (dtype is torch.bfloat16)
        assert operation.flops == 2 * rows * 16 * 8


@pytest.mark.parametrize(("kl", "products"), [(False, 2), (True, 3)], ids=["log-probs", "joint"])
def test_the_heads_products_and_kernels_are_counted(kl, products):
    n, d, v = 256, 64, 5000

    def head():
        hidden, targets = empty(n, d, grad=True), torch.zeros(n, dtype=torch.int64, device=GPU)
        frozen = FrozenHead(empty(v, d))
        if kl:
            return lambda: retain_loss(hidden, empty(n, d), frozen, targets, 1.0, 0.5)
        return lambda: token_logprobs(hidden, frozen, targets)

    operations = counted(head)
    assert sum(operation.flops for operation in operations) == products * 2 * n * d * v
    assert max(operation.bytes for operation in operations) >= 4 * n * v  # the logits
