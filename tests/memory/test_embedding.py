"""The input embedding in host memory, with an adapter on it."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from lowmem_npo.data.fit import Fit
from lowmem_npo.errors import UserError
from lowmem_npo.memory.embedding import embedding_to_host

IDS = torch.arange(3, 40).view(1, -1)


def scaled_embedding():
    """Gemma's embedding multiplies its rows by a number, the adapter's included."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3TextConfig(vocab_size=97, head_dim=16, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def adapted(model, **settings):
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_model, scaled_embedding])
def test_an_adapter_on_the_embedding_is_trained_all_the_same(make):
    expected = gradients(adapted(make()))
    model = adapted(make())
    size = sum(parameter.numel() for parameter in model.parameters())
    embedding_to_host(model.get_base_model())
    assert size - sum(parameter.numel() for parameter in model.parameters()) == 97 * 32
    assert Fit.of(model.get_base_model()).vocabulary == 97
    actual = gradients(model)
    assert actual.keys() == expected.keys() and sum("embedding" in name for name in actual) == 2
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient) and gradient.any(), name


def test_a_trained_embedding_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match="this one is trained"):
        embedding_to_host(model.get_base_model())
