"""Names, the adapter, the reference it hides, the head, and 4-bit loading."""

import dataclasses

import bitsandbytes
import pytest
import torch
from helpers.tiny_models import CONFIGS, tiny_model

from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import (
    answer_hidden,
    attach_lora,
    check_head,
    compute_autocast,
    load_model,
    reference_mode,
    resolve_name,
)  # fmt: skip
from lowmem_npo.model import head as head_module
from lowmem_npo.model.adapters import linear_layer_names


@pytest.mark.parametrize(
    "typed, loaded",
    [
        ("allenai/OLMo-7B", "allenai/OLMo-7B-hf"),
        ("allenai/OLMo-1B", "allenai/OLMo-1B-hf"),
        ("allenai/OLMo-7B-0424", "allenai/OLMo-7B-0424-hf"),
        ("allenai/OLMo-7B-0724", "allenai/OLMo-7B-0724-hf"),
        ("allenai/OLMo-1B-0724", "allenai/OLMo-1B-0724-hf"),
        ("ALLENAI/olmo-7b/", "allenai/OLMo-7B-hf"),
    ],
)
def test_original_olmo_names(typed, loaded):
    name, line = resolve_name(typed)
    assert name == loaded and loaded in line and "\n" not in line


@pytest.mark.parametrize("typed", ["allenai/OLMo-7B-hf", "allenai/OLMo-2-1124-7B", "./OLMo-7B", "me/OLMo-7B"])
def test_other_names_stay(typed):
    assert resolve_name(typed) == (typed, None)


def adapted(architecture="olmo", **settings):
    model = attach_lora(tiny_model(architecture), AdapterConfig(**settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def states(model):
    ids = torch.arange(3, 15)[None]
    return answer_hidden(model, ids, torch.ones_like(ids), ids).hidden


def test_reference_mode_is_the_original_and_restores_everything():
    plain = states(tiny_model()).detach()
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
    assert torch.equal(states(model).detach(), plain)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_answer_hidden_gives_what_predicts_labelled_tokens():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 11, 12, -100, -100]])
    found = answer_hidden(model, ids, mask, labels)
    assert found.targets.tolist() == [7, 8, 9, 11, 12] and found.sequence.tolist() == [0, 0, 0, 1, 1]
    alone = model.model(ids[1:, :3]).last_hidden_state[0, :2]
    torch.testing.assert_close(found.hidden[3:], alone)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_head_is_known(architecture):
    check_head(tiny_model(architecture))
    check_head(tiny_model(architecture, dtype=torch.bfloat16))


@pytest.mark.parametrize("architecture, change", [("gemma2", {"softcap": None}), ("granite", {"logit_scale": 1.0})])
def test_an_unknown_head_is_refused(architecture, change, monkeypatch):
    right = head_module.frozen_head
    monkeypatch.setattr(head_module, "frozen_head", lambda model: dataclasses.replace(right(model), **change))
    with pytest.raises(UserError, match="logits"):
        check_head(tiny_model(architecture))


def test_linear_layers_without_the_head():
    assert linear_layer_names(tiny_model()) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    everywhere = attach_lora(tiny_model(), AdapterConfig(lora_targets=("all-linear",)))
    assert not any("lm_head" in n for n, p in everywhere.named_parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(vocabulary=130, dtype=torch.bfloat16).save_pretrained(folder)
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
    expected = tiny_model(vocabulary=130, dtype=torch.bfloat16)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_compute_autocast_follows_the_model():
    with compute_autocast(tiny_model()):
        assert not torch.is_autocast_enabled("cpu")
    with compute_autocast(tiny_model(dtype=torch.bfloat16)):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
