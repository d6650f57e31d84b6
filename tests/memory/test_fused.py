"""The fused kernels in a model: which modules they replace, that they compute the same, and that they keep less."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import CONFIGS, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconH1Config, LlamaConfig, SeedOssConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.memory import float32, fused, fused_rotary
from lowmem_npo.memory.float32 import LeanActivation, LeanMLP, LeanNorm, slice_float32
from lowmem_npo.memory.fused import ActivationForm, NormForm, PackedForm, gated_form, norm_form
from lowmem_npo.memory.fused_rotary import RotaryForm
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import decoder

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)

# Architecture: its norms (LayerNorm or RMSNorm, eps, offset, whether they round first), its activations (with "act" if
# without a gate, "experts" if theirs), its layout of pairs
FORMS = {
    "llama": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "qwen3": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "mistral": ("rms 1e-06 +0 rounds first", "silu", "halves"),
    "glm": ("rms 1.5625e-07 +0 rounds first", "silu", "pairs by_pair first_half"),
    "phi3": ("rms 1e-05 +0 rounds first", "silu", "halves"),
    "gemma2": ("rms 1e-06 +1", "gelu-tanh", "halves"),
    "olmo": ("layer 1e-05 +0", "silu", "halves"),
    "olmo2": ("rms 1e-05 +0", "silu", "halves"),
    "cohere": ("layer 1e-05 +0", "silu", "pairs round_once"),
    "gpt_neox": ("layer 1e-05 +0", None, "halves"),  # its GELU is one operator
    "bitnet": ("rms 1e-05 +0 rounds first", "act relu2", "halves"),  # a norm inside of its MLP
    "nanochat": ("rms 1e-06 +0", "act relu2", "halves turns_back"),
    "nemotron": ("layer 1e-05 +1", "act relu2", "halves"),
    "gptj": ("layer 1e-05 +0", "act gelu-tanh", "pairs by_pair tokens_first"),
    "gemma3n_text": ("rms 1e-06 +0", "gelu-tanh", "halves tokens_first"),
    "seed_oss": ("rms 1e-06 +0 rounds first", "silu", "halves"),  # dropout in its MLP
    "mixtral": ("rms 1e-05 +0 rounds first", "experts silu", "halves"),
    "gpt_oss": ("rms 1e-05 +0", "experts silu 1.702 7.0 1.0", "halves by_pair"),
    "dbrx": ("layer 1e-05 +0", None, "halves"),  # experts that multiply by themselves
    "llama4_text": ("rms 1e-05 +0 rounds first, rms 1e-05 +0", "silu", "pairs by_pair tokens_first"),
    "deepseek_v2": ("rms 1e-06 +0 rounds first", "silu, experts silu", "pairs by_pair"),
    "deepseek_v3": ("rms 1e-06 +0 rounds first", "silu, experts silu", "pairs-to-halves by_pair first_half"),
}
IN_OTHER_VERSIONS = {"deepseek_v3": "pairs-to-halves"}  # of transformers, which read both halves of the tables


def describe(form) -> str:
    """What of a form is not as usual."""
    if isinstance(form, NormForm):
        kind = "layer" if form.centered else "rms"
        return f"{kind} {form.eps:g} +{form.offset:g}{' rounds first' * form.round_first}"
    if isinstance(form, RotaryForm):
        names = ("by_pair", "first_half", "turns_back", "round_once", "tokens_first")
        return " ".join([form.layout, *(name for name in names if getattr(form, name))])
    kind = {ActivationForm: "act ", PackedForm: "experts "}.get(type(form), "")
    activation, *numbers = form.gate
    return " ".join([kind + activation, *(map(str, numbers) if numbers != [1.0, None, 0.0] else ())])


@pytest.fixture
def everywhere(monkeypatch):
    """The kernels' plain forms at work on the CPU, as the kernels are on a GPU."""
    monkeypatch.setattr(fused, "ENGINE", "torch")


@pytest.mark.parametrize("architecture", FORMS)
def test_modules_are_recognised_by_their_numbers(architecture, everywhere, monkeypatch):
    model = random_model(tiny_config(architecture, 258)).bfloat16().requires_grad_(False)
    plain = copy.deepcopy(model)
    layouts = []
    find = fused_rotary.rotary_form
    monkeypatch.setattr(fused_rotary, "rotary_form", lambda *x: layouts.append(find(*x)) or layouts[-1])
    slice_float32(model)
    replaced = [
        value
        for module in decoder(model).modules()
        for value in (vars(module).get("forward"), vars(module).get("_apply_gate"))
    ]
    norms = {describe(lean.form) for lean in replaced if isinstance(lean, LeanNorm)}
    activations = {describe(lean.form) for lean in replaced if isinstance(lean, (LeanMLP, LeanActivation))}
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    expected_norm, activation, layout = FORMS[architecture]
    assert norms == set(expected_norm.split(", "))
    assert activations == set((activation or "").split(", ")) - {""}
    assert {describe(form) for form in layouts} in ({layout}, {IN_OTHER_VERSIONS.get(architecture)})
    if activation is not None and ("act" in activation or "1.702" in activation):  # theirs rounds in between
        with torch.no_grad():
            exact = plain.float()(ids).logits
        ours, theirs = (relative_error({"": logits}, {"": exact}) for logits in (ours, theirs))
        assert ours < 1.2 * theirs
    else:
        assert relative_error({"": ours}, {"": theirs}) < 2e-3  # a few bits of bfloat16 here and there


def test_a_model_without_values_is_recognised_like_a_real_one():
    with fake_gpu():
        model = fake_model(LlamaConfig(num_hidden_layers=1), ModelConfig("tiny", qlora=True))
        slice_float32(model)
        norm, mlp = model.model.norm.forward, model.model.layers[0].mlp.forward
        assert describe(norm.form) == "rms 1e-06 +0 rounds first" and describe(mlp.form) == "silu"


class OddNorm(nn.Module):
    """An RMSNorm with one thing that no kernel does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.ones(32, dtype=torch.bfloat16), requires_grad=False), what

    def forward(self, x):
        eps = 3e-4 if self.what == "eps" else 1e-6
        y = x if self.what == "low" else x.float()
        square = y.square().mean(-1, keepdim=True)
        y = y * torch.rsqrt(square.clamp(min=1e-9) if self.what == "clamp" else square + eps)
        scale = 2 + self.weight.float() if self.what == "offset" else self.weight.float()
        y = (scale * y + (self.what == "shift")).to(x.dtype)
        if self.what == "clip":
            y = torch.where(x.abs() > 1e2, x, y)
        return y.float() if self.what == "dtype" else y


@pytest.mark.parametrize("what", ["", "eps", "clamp", "clip", "low", "offset", "shift", "dtype"])
def test_a_norm_that_no_kernel_computes_is_not_taken_for_one(what):
    form = norm_form(OddNorm(what))
    assert (form is None) == bool(what)


def test_an_mlp_that_no_kernel_computes_is_not_taken_for_one():
    class Scaled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class TwoInputs(LlamaMLP):
        def forward(self, x, scale=1):
            return super().forward(x) * scale

    sizes = dict(hidden_size=32, intermediate_size=48)
    for activation in ("silu", "gelu", "relu", "relu2"):
        assert describe(gated_form(LlamaMLP(LlamaConfig(**sizes, hidden_act=activation)))) == activation
    assert gated_form(LlamaMLP(LlamaConfig(**sizes, hidden_act="mish"))) is None
    for kind in (Scaled, TwoInputs):
        assert gated_form(kind(LlamaConfig(**sizes))) is None
    falcon = [FalconH1Config(**sizes, mlp_multipliers=[m, 1.0]) for m in (1.0, 0.5)]
    assert [gated_form(FalconH1MLP(config)) is None for config in falcon] == [False, True]


def test_a_limit_that_ordinary_values_do_not_reach_is_heeded():
    """Under a name of the module, of its configuration, or under none; of an MLP, of experts, of an activation."""

    class Clamped(LlamaMLP):
        def forward(self, x):
            limit = self.limit() if callable(self.limit) else self.limit
            gate, up = self.gate_proj(x).clamp(max=limit), self.up_proj(x).clamp(-limit, limit)
            return self.down_proj(self.act_fn(gate) * up)

    class Experts(nn.Module):
        limit = 200.0

        def _apply_gate(self, gate_up):
            gate, up = gate_up.clamp(-self.limit, self.limit).chunk(2, -1)
            return nn.functional.silu(gate) * up

    config = LlamaConfig(hidden_size=32, intermediate_size=48)
    for limit in (12.0, 16.0, 500.0):
        mlp = Clamped(config)
        mlp.limit = limit
        assert describe(gated_form(mlp)) == f"silu 1.0 {limit} 0.0"
        config.swiglu_limit = limit
        mlp = Clamped(config)
        mlp.limit = lambda: config.swiglu_limit  # noqa: B023
        assert gated_form(mlp) is None
    config.swiglu_limit = torch.inf  # of the same class, and nothing of its own is otherwise
    assert describe(gated_form(mlp)) == "silu"
    assert gated_form(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="gelu_10"))) is None
    assert fused.packed_form(Experts()) is None
    experts = Experts()
    experts.limit = 200.0
    assert fused.packed_form(experts) is not None and fused.packed_form(experts).gate.limit == 200.0

    def clipped(q, k, cos, sin):
        return tuple(apply_rotary_pos_emb(x, x, cos, sin)[0].clamp(-50, 50) for x in (q, k))

    states, tables = [torch.randn(1, 2, 3, 8) for _ in range(2)], [torch.randn(1, 3, 8) for _ in range(2)]
    assert fused_rotary.rotary_form(apply_rotary_pos_emb, states, *tables) is not None
    assert fused_rotary.rotary_form(clipped, states, *tables) is None


def test_dropout_of_an_mlp_is_heeded_where_it_trains(everywhere):
    mlp = SeedOssMLP(SeedOssConfig(hidden_size=8, intermediate_size=12, residual_dropout=0.5)).eval()
    mlp.forward, x = LeanMLP(mlp, gated_form(mlp)), torch.randn(64, 8)
    assert (mlp(x) != 0).all()
    mlp.train()
    assert (mlp(x) == 0).float().mean() > 0.3


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


PLAIN, TILED = {"gradient_checkpointing": False}, {"tile_mlp": 5}
STEPS = [("olmo2", PLAIN), ("llama", PLAIN), ("llama", TILED), ("gemma2", TILED), ("gpt_oss", PLAIN), ("gptj", TILED)]
STEPS += [("nemotron", PLAIN), ("deepseek_v3", PLAIN)]


@pytest.mark.parametrize("architecture, memory", STEPS, ids=str)
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
    model = tiny_model(architecture if architecture in CONFIGS else tiny_config(architecture, VOCABULARY))
    model = attach_lora(model, AdapterConfig(lora_r=3, lora_targets=("all-linear",)))
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


def test_rotary_functions_are_known_by_their_parameters_and_not_kept():
    """Of a callable without a hash nothing can be remembered: it computes by itself."""

    class Unhashable(list):
        def __call__(self, q, k, cos, sin):
            return q, k

    assert fused_rotary.rotary_arguments(apply_rotary_pos_emb) == ("q", "k", "cos", "sin")
    assert fused_rotary.rotary_arguments(Unhashable()) is None and fused_rotary.rotary_arguments("rotary") is None
    assert fused_rotary.fused_rotary(Unhashable(), tuple(torch.zeros(4, 1, 2, 3, 8)), {}) is None
    functions = [lambda x, cos, sin: x for _ in range(200)]
    kept, first = weakref.ref(functions[0]), fused_rotary.rotary_arguments(functions[0])
    assert (
        [fused_rotary.rotary_arguments(function) for function in functions]
        == [first] * 200
        == [("x", "cos", "sin")] * 200
    )
    del functions
    assert kept() is None
