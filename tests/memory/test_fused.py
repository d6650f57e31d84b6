"""The fused kernels in a model: which modules they replace, that they compute the same, and that they keep less."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import ARCHITECTURES, random_model, tiny_config
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconH1Config, LlamaConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.memory import float32, fused
from lowmem_npo.memory.float32 import LeanMLP, LeanNorm, slice_float32
from lowmem_npo.memory.fused import gated_form, norm_form
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import decoder

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)

# Architecture: its norms (LayerNorm or RMSNorm, eps, offset, whether they round first), activation, layout of pairs
FORMS = {
    "llama": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "qwen3": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "mistral": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "glm": ("rms 1.5625e-07 +0 rounds first", "silu", "pairs-first"),
    "phi3": ("rms 1e-05 +0 rounds first", "silu", "halves"),
    "gemma2": ("rms 1e-06 +1", "gelu-tanh", "halves"),
    "olmo": ("layer 1e-05", "silu", "halves"),
    "olmo2": ("rms 1e-05 +0", "silu", "halves"),
    "cohere": ("layer 1e-05", "silu", "pairs"),
    "gpt_neox": ("layer 1e-05", None, "halves"),
    "bitnet": ("rms 1e-05 +0 rounds first", None, "halves"),  # a norm inside of its MLP
    "nanochat": ("rms 1e-06 +0", None, None),  # turns the other way round
}


def describe(form) -> str:
    if form.centered:
        return f"layer {form.eps:g}"
    return f"rms {form.eps:g} +{form.offset:g}{' rounds first' * form.round_first}"


@pytest.fixture
def everywhere(monkeypatch):
    """The kernels' plain forms at work on the CPU, as the kernels are on a GPU."""
    monkeypatch.setattr(fused, "ENGINE", "torch")


@pytest.mark.parametrize("architecture", FORMS)
def test_modules_are_recognised_by_their_numbers(architecture, everywhere, monkeypatch):
    model = random_model(tiny_config(architecture, 258)).bfloat16().requires_grad_(False)
    plain = copy.deepcopy(model)
    layouts = []
    find = fused.rotary_form
    monkeypatch.setattr(float32, "rotary_form", lambda *x: layouts.append(find(*x)) or layouts[-1])
    slice_float32(model)
    lean = [module.forward for module in decoder(model).modules() if "forward" in vars(module)]
    norms = {describe(forward.form) for forward in lean if isinstance(forward, LeanNorm)}
    activations = {forward.form.activation for forward in lean if isinstance(forward, LeanMLP)}
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    expected_norm, activation, layout = FORMS[architecture]
    assert norms == {expected_norm}
    assert activations == ({activation} - {None})
    assert {form and form.layout for form in layouts} == {layout}
    assert relative_error({"": ours}, {"": theirs}) < 2e-3  # a few bits of bfloat16 here and there


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_the_same(architecture, everywhere):
    model = random_model(tiny_config(architecture, 258)).requires_grad_(False)
    plain = copy.deepcopy(model)
    slice_float32(model)
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_model_without_values_is_recognised_like_a_real_one():
    with fake_gpu():
        model = fake_model(LlamaConfig(num_hidden_layers=1), ModelConfig("tiny", qlora=True))
        slice_float32(model)
        norm, mlp = model.model.norm.forward, model.model.layers[0].mlp.forward
        assert describe(norm.form) == "rms 1e-06 +0 rounds first" and mlp.form.activation == "silu"


class OddNorm(nn.Module):
    """An RMSNorm with one thing that no kernel does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.ones(32, dtype=torch.bfloat16), requires_grad=False), what

    def forward(self, x):
        eps = 3e-4 if self.what == "eps" else 1e-6
        y = x if self.what == "low" else x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        scale = 2 + self.weight.float() if self.what == "offset" else self.weight.float()
        y = (scale * y + (self.what == "shift")).to(x.dtype)
        return y.float() if self.what == "dtype" else y


@pytest.mark.parametrize("what", ["", "eps", "low", "offset", "shift", "dtype"])
def test_a_norm_that_no_kernel_computes_is_not_taken_for_one(what):
    form = norm_form(OddNorm(what))
    assert (form is None) == bool(what)


def test_an_mlp_that_no_kernel_computes_is_not_taken_for_one():
    class Scaled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Random(LlamaMLP):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, self.training)

    class TwoInputs(LlamaMLP):
        def forward(self, x, scale=1):
            return super().forward(x) * scale

    sizes = dict(hidden_size=32, intermediate_size=48)
    assert gated_form(LlamaMLP(LlamaConfig(**sizes))).activation == "silu"
    assert gated_form(LlamaMLP(LlamaConfig(**sizes, hidden_act="gelu"))).activation == "gelu"
    assert gated_form(LlamaMLP(LlamaConfig(**sizes, hidden_act="relu"))) is None
    for kind in (Scaled, Random, TwoInputs):
        assert gated_form(kind(LlamaConfig(**sizes))) is None
        assert gated_form(kind(LlamaConfig(**sizes)).eval()) is None
    falcon = [FalconH1Config(**sizes, mlp_multipliers=[m, 1.0]) for m in (1.0, 0.5)]
    assert [gated_form(FalconH1MLP(config)) is None for config in falcon] == [False, True]


def test_recognising_draws_no_random_numbers():
    state = torch.get_rng_state()
    fused._known.clear()
    slice_float32(random_model(tiny_config("phi3", 258)))
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    fused._known.clear()
    model = nn.Module()
    assert norm_form(LlamaRMSNorm(32)) is not None and gated_form(model) is None
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(state)


@pytest.mark.parametrize("memory", [{"gradient_checkpointing": False}, {"tile_mlp": 5}], ids=["plain", "tiled"])
@pytest.mark.parametrize("architecture", ["olmo", "olmo2", "llama", "gemma2"])
def test_the_dense_float64_gradients(architecture, memory, everywhere, tmp_path):
    expected = _trainer(architecture, tmp_path / "a", {"sliced_float32": False, "gradient_checkpointing": False})
    run = _trainer(architecture, tmp_path / "b", memory)
    _, gradients = dense_step(expected, FORGET, RETAIN)
    assert relative_error(step_gradients(run), gradients) < 1e-5


def test_a_wrong_form_would_be_noticed(everywhere, tmp_path, monkeypatch):
    right = fused.NormForm.__call__
    monkeypatch.setattr(fused.NormForm, "__call__", lambda form, x, norm: right(form, 1.001 * x + 0.001, norm))
    expected = _trainer("llama", tmp_path / "a", {"sliced_float32": False, "gradient_checkpointing": False})
    _, gradients = dense_step(expected, FORGET, RETAIN)
    assert relative_error(step_gradients(_trainer("llama", tmp_path / "b", {})), gradients) > 1e-4


def _trainer(architecture: str, folder, memory: dict):
    model = attach_lora(tiny_model(architecture), AdapterConfig(lora_r=3, lora_targets=("all-linear",)))
    apply_switches(model, MemoryConfig(**memory))
    return make_trainer(model, folder, FORGET, RETAIN)


def test_a_norm_that_trains_is_not_fused(everywhere):
    norm = LlamaRMSNorm(32)
    norm.forward = LeanNorm(norm, rows=4)
    x = torch.randn(3, 32)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.weight.requires_grad_(False)
    x.requires_grad_()
    assert type(norm(x).grad_fn).__name__ == "_NormalisedBackward"


def test_on_a_cpu_only_more_rows_than_a_slice_are_sliced():
    norm = LlamaRMSNorm(32).requires_grad_(False)
    norm.forward = LeanNorm(norm, rows=4)
    nodes = [type(norm(torch.randn(1, rows, 32, requires_grad=True)).grad_fn).__name__ for rows in (4, 5)]
    assert nodes == ["MulBackward0", "_RunBackward"]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.prim.device.default:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_simulated_call_is_one_operator_and_one_launch():
    """Norm, rotary embedding (of two tensors) and MLP, forward and backward: as many allocations as results."""
    from lowmem_kernels.launch import recording

    with fake_gpu() as gpu:
        model = fake_model(LlamaConfig(num_hidden_layers=1), ModelConfig("tiny"))
        slice_float32(model)
        norm, x = model.model.norm, torch.empty(4, 512, 4096, dtype=torch.bfloat16, device=GPU, requires_grad=True)
        gpu.restart_peak()
        before = gpu.live
        with Calls() as calls, recording((8, 6)) as launches:
            y = norm(x)
        assert calls.names == ["aten::empty_like"] and len(launches.launches) == 1
        assert gpu.peak - before == x.nbytes  # nothing but the result
        upstream = torch.empty_like(y)
        before = gpu.live
        gpu.restart_peak()
        y.backward(upstream)
        assert gpu.peak - before <= 2 * x.nbytes  # the gradient, and what accumulates it


def test_the_simulated_step_takes_less_with_fused_kernels(monkeypatch):
    from lowmem_npo.config import DataConfig, RunConfig
    from lowmem_npo.estimate.step import estimate

    config = RunConfig(
        ModelConfig("tiny", qlora=True),
        data=DataConfig(max_length=256),
        memory=MemoryConfig(gradient_checkpointing=False),
    )
    architecture = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8)
    ours = estimate(config, architecture).peak_bytes
    monkeypatch.setattr(float32, "fuses", lambda x: False)
    monkeypatch.setattr(LeanNorm, "__call__", lambda norm, x: norm.tiled(x))
    assert ours < estimate(config, architecture).peak_bytes
