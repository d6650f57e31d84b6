"""Steps that need more than shapes: sliding windows, and experts chosen by a router."""

from __future__ import annotations

import pytest
import torch
import transformers

from lowmem_npo.config import AdapterConfig, DataConfig, ModelConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu
from lowmem_npo.estimate.step import estimate

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {**SIZES, "num_local_experts": 8}
ARCHITECTURES = {
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 16, "sliding_window": 64}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "olmoe": ("OlmoeConfig", {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": 1}),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": 128,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
}


def peak(architecture: str, settings: dict, length: int = 128) -> int:
    data, adapter = DataConfig(max_length=length), AdapterConfig(lora_targets=("all-linear",))
    config = getattr(transformers, architecture)(**settings)
    return estimate(RunConfig(model=ModelConfig("x"), data=data, adapter=adapter), config).peak_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_estimated(architecture):
    assert peak(*ARCHITECTURES[architecture], length=64) < peak(*ARCHITECTURES[architecture], length=256) < 2**26


def test_a_router_uses_its_experts_evenly():
    with fake_gpu():
        chosen = torch.empty(32, 8, device=GPU).topk(2).indices
        sizes = [len(torch.where(chosen == expert)[0]) for expert in range(8)]
    assert sizes == [8] * 8


def test_an_architecture_whose_memory_depends_on_values_is_refused():
    with pytest.raises(UserError, match="cannot be estimated: it depends on what the model computes"):
        peak("JetMoeConfig", {**EXPERTS, "kv_channels": 16})
