"""How much memory a call takes beyond its inputs and outputs, at 8192 tokens and the vocabulary of Qwen, without a GPU.

The engines run on a GPU that has no memory and counts every byte they would allocate.
"""

import pytest
import torch
from lowmem_kernels import FrozenHead, chunks_engine, retain_loss, tiles_engine, token_kl, token_logprobs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_npo.estimate.simulator.gpu import fake_gpu

MIB = 2**20
N, V, D = 8192, 151936, 4096
FUNCTIONS = ("logprobs", "kl", "both")


@pytest.fixture(autouse=True)
def small_blocks():
    """None here: the sizes are those of a GPU."""


def workspace(engine: str, function: str, need_grad: bool, n: int = N, v: int = V, d: int = D) -> int:
    """Bytes at the peak of one call, forward and backward, less its inputs, values and gradient."""
    with fake_gpu() as gpu:
        hidden, ref_hidden, weight = (torch.empty(k, d, dtype=torch.bfloat16, device="cuda") for k in (n, n, v))
        targets = torch.empty(n, dtype=torch.int64, device="cuda")
        head, hidden = FrozenHead(weight), hidden.requires_grad_(need_grad)
        gpu.restart_peak()
        before = gpu.live
        if function == "logprobs":
            values = (token_logprobs(hidden, head, targets, engine=engine),)
        elif function == "kl":
            values = (token_kl(hidden, ref_hidden, head, engine=engine),)
        else:
            values = retain_loss(hidden, ref_hidden, head, targets, 1.0 / n, 0.5 / n, engine=engine)
        kept = sum(x.untyped_storage().nbytes() for x in values)
        if need_grad:
            kept += torch.autograd.grad(values[0].sum(), hidden)[0].untyped_storage().nbytes()
        return gpu.peak - before - kept


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_chunks_stay_within_their_budget(function, need_grad):
    used = workspace("chunks", function, need_grad)
    assert chunks_engine.WORKSPACE_BYTES / 2 < used <= chunks_engine.WORKSPACE_BYTES == 256 * MIB


@pytest.mark.parametrize("v", [32000, 50304, 128256, 131072, 262144])
def test_chunks_stay_within_their_budget_at_any_vocabulary(v):
    assert workspace("chunks", "both", True, v=v) <= 256 * MIB


def test_a_chunk_too_large_would_be_noticed(monkeypatch):
    monkeypatch.setattr(chunks_engine, "FEWEST_TOKENS", 256)
    assert workspace("chunks", "both", True) > 256 * MIB


@pytest.mark.parametrize("function, limit", [("logprobs", 1), ("kl", 2), ("both", 2)])
@pytest.mark.parametrize("processors", [82, 132])
def test_tiles_without_gradient_take_almost_nothing(function, limit, processors, monkeypatch):
    monkeypatch.setattr(tiles_engine, "_processors", lambda device: processors)
    assert workspace("tiles", function, need_grad=False) <= limit * MIB


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tiles_with_gradient(function):
    """bfloat16 slopes of 2048 tokens x 4096 entries, and float32 rows of d hidden for these tokens."""
    expected = 2048 * 4096 * 2 + 2048 * 1024 * 4
    assert expected < workspace("tiles", function, need_grad=True, d=1024) <= expected + MIB


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("n, v", [(30, 50304), (600, 50304), (300, 512)])
def test_a_simulation_sees_the_workspace(engine, device, n, v):
    with FakeTensorMode():
        hidden = torch.randn(n, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        ref_hidden = torch.randn(n, 64, dtype=torch.bfloat16, device=device)
        head = FrozenHead(torch.randn(v, 64, dtype=torch.bfloat16, device=device))
        targets = torch.zeros(n, dtype=torch.int64, device=device)
        with LargestTensor() as largest:
            loss, logprobs, kl = retain_loss(hidden, ref_hidden, head, targets, 1.0, 1.0, engine=engine)
            loss.backward()
    assert loss.shape == () and logprobs.shape == kl.shape == (n,) and hidden.grad.shape == (n, 64)
    if engine == "torch":
        assert max(n * 64, v) < largest.numel < n * v  # it saw logits, never all of them
