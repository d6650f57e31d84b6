"""The adapter, the reference that it hides, and an extra adapter for a while."""

import pytest
import torch
from helpers.tiny_models import states, tiny_model

from lowmem_npo.config import AdapterConfig
from lowmem_npo.model import attach_lora, reference_mode
from lowmem_npo.model.adapters import extra_adapter, linear_layer_names


def adapted(architecture="olmo", **settings):
    model = attach_lora(tiny_model(architecture), AdapterConfig(**settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_reference_mode_is_the_original_and_restores_everything():
    plain = states(tiny_model())
    model = adapted(lora_dropout=0.5).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with reference_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        original = states(model)
    assert torch.equal(original, plain)
    assert model.training and torch.is_grad_enabled()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained != set()
    assert not torch.allclose(states(model), plain)
    with pytest.raises(RuntimeError), reference_mode(model):
        raise RuntimeError
    assert model.training and {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_adapter_starts_as_the_identity_in_float32():
    base = tiny_model(dtype=torch.bfloat16)
    plain = states(base)
    model = attach_lora(base, AdapterConfig())
    assert torch.equal(states(model), plain)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("model", [tiny_model, adapted], ids=["plain", "with an adapter"])
def test_an_extra_adapter_learns_alone_and_leaves_no_trace(model):
    model = model()
    names, before = [name for name, _ in model.named_modules()], states(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with extra_adapter(model, rank=2, seed=0):
        assert torch.equal(states(model), before)
        extra = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(extra) == 2 * 2 * 7 and all(".extra." in name for name in extra)
        with torch.no_grad():
            for parameter in extra.values():
                parameter.fill_(0.1)
        assert not torch.allclose(states(model), before)
    assert torch.equal(states(model), before) and [name for name, _ in model.named_modules()] == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_linear_layers_without_the_head():
    assert linear_layer_names(tiny_model()) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    everywhere = attach_lora(tiny_model(), AdapterConfig(lora_targets=("all-linear",)))
    assert not any("lm_head" in n for n, p in everywhere.named_parameters() if p.requires_grad)
