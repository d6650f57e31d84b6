"""Layers below the adapters, run once for policy and reference, where the layers above read or change more than that.

tests/test_architectures.py compares the gradients above a shared prefix in every architecture.
"""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import tiny_config
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model

from lowmem_npo.config import AdapterConfig, MemoryConfig
from lowmem_npo.memory.prefix import SharedPrefix
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora

FORGET, RETAIN = random_rows(2, seed=1), random_rows(2, seed=2)


def adapted(architecture: str, layer: str):
    adapter = AdapterConfig(lora_r=3, lora_targets=("all-linear",), lora_layers=(layer,))
    model = attach_lora(tiny_model(tiny_config(architecture, VOCABULARY)), adapter)
    apply_switches(model, MemoryConfig())
    return model


def test_upper_layers_that_read_the_embedding_again_share_nothing(tmp_path, caplog):
    run = make_trainer(adapted("zamba", layer="2"), tmp_path, FORGET, RETAIN)
    assert run.passes.prefix.modules == []
    loss, expected = dense_step(run, FORGET, RETAIN)
    assert relative_error(step_gradients(run), expected) < 2e-5
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("lowmem_npo")]
    assert message.endswith("in ZambaForCausalLM the layers above them read more than their result.")


class WritesInPlace(torch.nn.Module):
    """Changes what it is given, as a residual added in place would."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden.add_(self.layer(hidden, *args, **kwargs))


@pytest.mark.parametrize("layer, shared", [(0, 2), (1, 0)], ids=["below the adapters", "above"])
def test_an_upper_layer_that_changes_its_input_shares_nothing(layer, shared):
    model = adapted("llama", layer="1")
    layers = model.get_base_model().model.layers
    layers[layer] = WritesInPlace(layers[layer])
    assert len(SharedPrefix(model).modules) == shared
