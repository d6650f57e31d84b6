"""What makes a model another one."""

from __future__ import annotations

import torch
from helpers.tiny_models import tiny_model

from lowmem_npo.config import AdapterConfig
from lowmem_npo.model import attach_lora
from lowmem_npo.training.reference.identity import weights_fingerprint


def test_one_changed_weight_is_another_model():
    model = attach_lora(tiny_model(), AdapterConfig())
    before = weights_fingerprint(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).normal_()
    assert weights_fingerprint(model) == before  # the adapter is not the reference
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.weight[7, 5] += 1e-6
    assert weights_fingerprint(model) != before
