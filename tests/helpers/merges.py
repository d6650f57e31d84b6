"""Bases, adapters and the merge that they go through, beside PEFT's own."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.tiny_models import tiny_model
from lowmem_npo.cli import main

IDS = torch.arange(2, 30)[None]


def saved_base(folder, architecture="olmo", dtype=torch.bfloat16, **options):
    model = tiny_model(architecture, dtype=dtype)
    model.save_pretrained(folder, **options)
    return model


def saved_adapter(base, folder, seed=0, scale=0.1, dtype=torch.float32, **options):
    """An adapter of random factors on the model in the directory `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_magnitude" in name or "modules_to_save" in name:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
            elif "lora_" in name:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    adapted.save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.double()(input_ids=IDS, use_cache=False).logits[0]


def merged_by_peft(base, adapter):
    """The base's stored weights with the adapter, merged by PEFT in float64."""
    model = AutoModelForCausalLM.from_pretrained(base).double()
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload()


def merge(adapter, out, *more):
    return main(["merge", "--adapter", str(adapter), "--output-dir", str(out), *more])


def fails(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2, out
    assert err.startswith("lowmem-npo merge: ") and len(err.splitlines()) == 1
    assert all(message in err for message in messages), err
