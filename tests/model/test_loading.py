"""A model from its directory, in 4 bits and as it was saved."""

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.model import answer_hidden, load_model


def states(model):
    ids = torch.arange(3, 15)[None]
    return answer_hidden(model, ids, torch.ones_like(ids), ids).hidden


def original():
    """Layers of whole blocks of 64 weights: bitsandbytes 0.50 dequantises narrower ones wrongly on AVX-512."""
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=130, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    original().save_pretrained(folder)
    return folder


def test_qlora_is_nf4_doubly_quantised_with_a_bf16_head(saved):
    model = load_model(ModelConfig(str(saved), qlora=True, device="cpu"))
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and layer.compute_dtype == torch.bfloat16
        assert layer.weight.dtype == torch.uint8
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not any(p.dtype == torch.float32 for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    exact = load_model(ModelConfig(str(saved), device="cpu"))
    with torch.no_grad():
        difference = (states(model) - states(exact)).float().norm() / states(exact).float().norm()
    assert 0.001 < difference < 0.3  # quantised, and still the same model


def test_without_qlora_weights_are_what_was_saved(saved):
    model = load_model(ModelConfig(str(saved), device="cpu"))
    expected = original()
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name
