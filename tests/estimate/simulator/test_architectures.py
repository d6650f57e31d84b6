"""Steps that need more than shapes: sliding windows, and experts chosen by a router."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.architectures import tiny_config

from lowmem_npo.config import AdapterConfig, DataConfig, ModelConfig, RunConfig
from lowmem_npo.data import RowBatch
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.estimate.step import estimate
from lowmem_npo.model import answer_hidden, compute_autocast
from lowmem_npo.model.layers import decoder

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
    "gpt_neox, nn.LayerNorm": ("GPTNeoXConfig", SIZES),
    "gpt2, nn.LayerNorm": (
        "GPT2Config",
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": 1, "bos_token_id": 1},
    ),
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


WINDOWS = {  # each with a window, or chunks, of 16 tokens
    **{name: {} for name in ("cohere2", "gemma2", "gpt_oss", "llama4_text", "olmo3", "starcoder2")},
    "phi3": {"sliding_window": 16},
    "qwen2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_rows_as_long_as_the_window_and_longer_are_estimated(architecture):
    config, adapter = tiny_config(architecture, 128), AdapterConfig(lora_targets=("all-linear",))
    for name, value in WINDOWS[architecture].items():
        setattr(config, name, value)

    def peak(length: int, attn: str) -> int:
        model = ModelConfig("x", attn=attn, qlora=attn == "eager")
        return estimate(RunConfig(model, DataConfig(max_length=length), adapter=adapter), config).peak_bytes

    assert peak(16, "sdpa") < peak(96, "sdpa") and peak(17, "eager") > 0


def test_a_router_uses_its_experts_evenly():
    with fake_gpu():
        chosen = torch.empty(32, 8, device=GPU).topk(2).indices
        sizes = [len(torch.where(chosen == expert)[0]) for expert in range(8)]
    assert sizes == [8] * 8


def test_an_architecture_whose_memory_depends_on_values_is_refused():
    with pytest.raises(UserError, match="cannot be estimated: it depends on what the model computes"):
        peak("JetMoeConfig", {**EXPERTS, "kv_channels": 16})


def test_autocast_casts_as_on_cuda():
    functional, half = torch.nn.functional, torch.bfloat16
    before = torch._C._dispatch_dump("aten::linear")
    with fake_gpu() as gpu:
        x, wide = torch.empty(4, 8, device=GPU, dtype=half), torch.empty(8, 8, device=GPU).requires_grad_()
        with torch.autocast("cuda", dtype=half):
            for result in (functional.linear(wide, wide), x @ wide, torch.mm(wide, wide)):
                assert result.dtype == half
            for result in (functional.layer_norm(x, (8,)), x.softmax(-1), x.pow(2), x.sum(-1)):
                assert result.dtype == torch.float32
            for result in (functional.gelu(x), x + x, x.softmax(-1, dtype=half)):
                assert result.dtype == half
            attended = functional.scaled_dot_product_attention(*[wide[None, None]] * 3)
            assert attended.dtype == half
            live = gpu.live
            functional.linear(x, wide)  # the weight's copy is there already
            assert gpu.live == live
        assert gpu.live < live  # and gone now
        assert functional.layer_norm(x, (8,)).dtype == half
    assert torch._C._dispatch_dump("aten::linear") == before


def test_hidden_states_after_a_layer_norm_reach_the_head_in_its_own_type():
    config = transformers.GPTNeoXConfig(**SIZES)
    with fake_gpu():
        model = fake_model(config, ModelConfig("x"))
        ids = torch.zeros(1, 8, dtype=torch.int64, device=GPU)
        with compute_autocast(model):
            assert decoder(model)(ids).last_hidden_state.dtype == torch.float32
        assert answer_hidden(model, RowBatch.whole(ids)).hidden.dtype == torch.bfloat16
