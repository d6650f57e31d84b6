"""The switches on norms and MLPs that are not as in Llama: the dense float64 gradients all the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model
from torch import nn

from lowmem_npo.config import AdapterConfig, MemoryConfig
from lowmem_npo.memory import float32, switches, tiling
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EXPERTS = {"num_key_value_heads": 2, "experts_implementation": "eager"}  # the other one has no float64
ARCHITECTURES = {
    "cohere, weights per head": ("CohereConfig", {**SIZES, "use_qk_norm": True, "num_key_value_heads": 2}),
    "dbrx, a norm with attention in it": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "gpt-oss, a tuple": ("GptOssConfig", {**SIZES, **EXPERTS, "head_dim": 8, "num_local_experts": 4}),
    "llama 4, a tuple": (
        "Llama4TextConfig",
        {**SIZES, **EXPERTS, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    ),
    "falcon, added to in place": ("FalconConfig", {**SIZES, "parallel_attn": True, "new_decoder_architecture": False}),
    "mixtral": ("MixtralConfig", {**SIZES, **EXPERTS, "num_local_experts": 4}),
}
TARGETS = {"Llama4TextConfig": ("q_proj", "up_proj")}  # its router is an nn.Linear that returns a tuple
FORGET, RETAIN = random_rows(3, seed=1), random_rows(3, seed=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_and_mlps_of_every_kind(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(switches, "slice_float32", partial(float32.slice_float32, rows=7))
    name, settings = ARCHITECTURES[architecture]

    def trainer(folder, **memory):
        model = tiny_model(getattr(transformers, name)(vocab_size=VOCABULARY, **settings))
        model = attach_lora(model, AdapterConfig(lora_r=3, lora_targets=TARGETS.get(name, ("all-linear",))))
        apply_switches(model, MemoryConfig(**memory))
        return make_trainer(model, tmp_path / folder, FORGET, RETAIN)

    plain = trainer("plain", sliced_float32=False, gradient_checkpointing=False)
    loss, expected = dense_step(plain, FORGET, RETAIN)
    run = trainer("tiled", tile_mlp=5)
    assert relative_error(step_gradients(run), expected) < 5e-5  # Cohere's norms compute in float32
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


class WritesToItsInput(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2)).view(*x.shape[:-1], -1)


def test_an_mlp_that_writes_to_its_input_and_to_whose_output_is_added_in_place():
    torch.manual_seed(0)
    mlp = WritesToItsInput(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(2, 6, 4, requires_grad=True)
    gradients = []
    for tiled in (False, True):
        if tiled:
            tiling.tile(mlp, 5)
        (mlp(x * 1).add_(x)).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in mlp.parameters())])
        x.grad = None
        mlp.zero_grad()
    torch.testing.assert_close(*gradients)


class NormOfHeads(nn.Module):
    """As in xLSTM: one weight per column of all heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x, scale=1.0):
        return (x / x.norm(dim=-1, keepdim=True)).reshape(*x.shape[:-2], 8) * self.weight * scale


def test_a_norm_called_otherwise_than_on_rows_runs_as_it_is():
    model = tiny_model("llama")
    heads, plain = NormOfHeads(), NormOfHeads()
    plain.load_state_dict(heads.state_dict())
    model.model.layers[0].heads = heads
    x = torch.randn(2, 20, 2, 4)
    float32.slice_float32(model, rows=7)
    torch.testing.assert_close(heads(x, scale=3.0), plain(x, scale=3.0))
    torch.testing.assert_close(heads(x), plain(x))
