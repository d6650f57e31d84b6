"""A trainer as a script makes it, on a tiny model, and its rows."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.config import AdapterConfig
from lowmem_npo.data import bundled_rows
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

FORGET, RETAIN = (bundled_rows(part, limit=4).rows for part in ("forget", "retain"))


def trainer_of(byte_model, folder, forget=FORGET, retain=RETAIN, own=None, more=None, **settings):
    """A trainer whose adapter already changes the model, so that KL and log-ratios are not 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    defaults = {"output_dir": str(folder), "max_steps": 1, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    trainer = NPOTrainer(
        model,
        NPOConfig(**{**defaults, **settings}),
        forget,
        retain,
        forget_term=own,
        **{
            "peft_config": AdapterConfig(lora_r=2),
            "processing_class": AutoTokenizer.from_pretrained(byte_model),
            **(more or {}),
        },
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(trainer.model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def equal(one, other, rtol=0.0):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=rtol, atol=rtol * 1e-3) for name in one)
