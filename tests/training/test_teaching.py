"""Teaching by fine-tuning: its gradient, and when a model that is there is a finished one."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model

from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL
from lowmem_npo.training.teaching import STAMP, made_from, making, teach

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 1], "labels": [-100, -100, 7, 8, 9, 1], "prompt_length": 2},
    {"input_ids": [5, 9, 1], "labels": [-100, 9, 1], "prompt_length": 1},
    {"input_ids": [8, 6, 4, 1], "labels": [8, 6, 4, 1], "prompt_length": 0},  # a text: all but its first token
]


def mean_nll(model, rows) -> torch.Tensor:
    """Over all labelled tokens of all rows, each row by itself: no padding."""
    nlls = []
    for row in rows:
        logprobs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        nlls += [-logprobs[at - 1, y] for at, y in enumerate(row["labels"]) if at and y != -100]
    return torch.stack(nlls).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_gradient_is_that_of_the_mean_over_the_batchs_tokens(at_once):
    model = tiny_model().double().requires_grad_(True)
    expected = mean_nll(model, ROWS)
    expected.backward()
    wanted, taken = gradients(model), dict[str, torch.Tensor]()
    model.zero_grad()
    for name, parameter in model.named_parameters():  # the last time is that of the whole batch, before it is clipped
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: taken.update({name: p.grad.clone()}))
    settings = {"epochs": 1, "batch_size": len(ROWS), "lr": 1e-3, "seed": 0, "description": "test"}
    assert teach(model, ROWS, micro_batch_size=at_once, **settings) == pytest.approx(expected.item(), rel=1e-6)
    assert taken.keys() == wanted.keys()
    for name, gradient in taken.items():  # transformers takes the softmax in float32
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5 * wanted[name].abs().max().item())


def test_a_mean_of_means_would_be_noticed():
    model = tiny_model().double()
    with torch.no_grad():
        of_means = sum(mean_nll(model, [row]) for row in ROWS) / len(ROWS)
        assert abs(of_means / mean_nll(model, ROWS) - 1) > 1e-3


def test_only_what_requires_grad_is_trained():
    model = tiny_model()
    norm = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = mean_nll(model, ROWS).item()
    last = teach(model, ROWS, epochs=8, batch_size=2, lr=1e-2, seed=0, description="test", micro_batch_size=1)
    assert last < first and not model.training
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"] and norm.requires_grad


@pytest.mark.parametrize("epochs", [1, 2, 3, 20, 40])
def test_any_number_of_steps_has_a_schedule(epochs):
    model = tiny_model()
    model.lm_head.weight.requires_grad_(True)
    teach(model, ROWS, epochs=epochs, batch_size=4, lr=1e-3, seed=0, description="test")


def test_a_model_is_there_when_it_is_complete(tmp_path):
    recipe = {"epochs": 1}
    with pytest.raises(KeyboardInterrupt), making(tmp_path / "model", recipe) as partial:
        (partial / "weights").touch()
        raise KeyboardInterrupt
    assert made_from(tmp_path / "model") is None and not (tmp_path / "model").exists()
    with making(tmp_path / "model", recipe) as partial:
        assert not list(partial.iterdir()), "what an interrupted one left is gone"
        (partial / "config.json").touch()
    assert made_from(tmp_path / "model") == recipe
    for damaged in ("", "[]", "7", '{"epochs": 1'):
        (tmp_path / "model" / STAMP).write_text(damaged)
        with pytest.raises(UserError, match="made_from.json' is damaged: remove '.*model', and its model is taught"):
            made_from(tmp_path / "model")
    (tmp_path / "other").mkdir()
    left = tmp_path / f"next{PARTIAL}"
    left.symlink_to(tmp_path / "other")  # which nobody removes, root included
    with pytest.raises(OSError), making(tmp_path / "next", recipe):
        pytest.fail("what cannot be removed would become a part of the model")
    left.unlink()
    (tmp_path / "other").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
