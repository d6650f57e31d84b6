"""Layers below the adapters, run once for policy and reference, in architectures that pass more than one tensor up."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model

from lowmem_npo.config import AdapterConfig, MemoryConfig
from lowmem_npo.memory.prefix import SharedPrefix
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SHARING = {
    "falcon": ("FalconConfig", SIZES),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "opt, projected": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bamba": (
        "BambaConfig",
        {
            **SIZES,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
}
ZAMBA = (
    "ZambaConfig",
    {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
)
FORGET, RETAIN = random_rows(2, seed=1), random_rows(2, seed=2)


def adapted(architecture: str, settings: dict, layer: str):
    model = tiny_model(getattr(transformers, architecture)(vocab_size=VOCABULARY, **settings))
    model = attach_lora(model, AdapterConfig(lora_r=3, lora_targets=("all-linear",), lora_layers=(layer,)))
    apply_switches(model, MemoryConfig())
    return model


def check(model, folder):
    run = make_trainer(model, folder, FORGET, RETAIN)
    loss, expected = dense_step(run, FORGET, RETAIN)
    assert relative_error(step_gradients(run), expected) < 2e-5
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    return run.prefix.modules


@pytest.mark.parametrize("architecture", SHARING)
def test_a_shared_prefix_gives_the_dense_float64_gradients(architecture, tmp_path, caplog):
    assert len(check(adapted(*SHARING[architecture], layer="1"), tmp_path)) == 2
    assert not messages(caplog)


def test_upper_layers_that_read_the_embedding_again_share_nothing(tmp_path, caplog):
    assert check(adapted(*ZAMBA, layer="2"), tmp_path) == []
    (message,) = messages(caplog)
    assert message.endswith("in ZambaForCausalLM the layers above them read more than their result.")


class WritesInPlace(torch.nn.Module):
    """Changes what it is given, as a residual added in place would."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden.add_(self.layer(hidden, *args, **kwargs))


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lowmem_npo")]


@pytest.mark.parametrize("layer, shared", [(0, 2), (1, 0)], ids=["below the adapters", "above"])
def test_an_upper_layer_that_changes_its_input_shares_nothing(layer, shared):
    model = adapted("LlamaConfig", {**SIZES, "intermediate_size": 48}, layer="1")
    layers = model.get_base_model().model.layers
    layers[layer] = WritesInPlace(layers[layer])
    assert len(SharedPrefix(model).modules) == shared
