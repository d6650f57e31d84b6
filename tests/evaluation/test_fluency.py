"""How likely the original model finds what is said: dense float64 without the adapter, and who is not asked."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.config import AdapterConfig
from lowmem_npo.evaluation.fluency import fluency, fluency_text
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.model import attach_lora

SAID = [("Who is it?", " Somebody else"), ("Where?", ""), ("Why?", " zqxj zqxj")]


def test_it_is_the_original_models_nll_of_each_answer(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    base = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32).eval()
    said = [(tokenizer(prompt).input_ids, text) for prompt, text in SAID]
    expected = []
    for prompt, text in said:
        if text:
            answer = tokenizer(text, add_special_tokens=False).input_ids
            with torch.no_grad():
                logp = base(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
            at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            expected.append(-logp[at, torch.tensor(answer)].mean().item())
    model = attach_lora(base, AdapterConfig(lora_r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    ids = torch.tensor([said[0][0]])
    changed = model(ids).logits
    figures = fluency(Scorer(model, tokenizer, Journal(None, progress=False), 8), "forget", said)
    assert figures == {"rows": 2, "silent": 1, "nll": pytest.approx(sum(expected) / 2, rel=1e-5)}
    assert torch.equal(model(ids).logits, changed)  # the adapter is on again
    assert fluency_text({"forget": figures}).startswith(f"forget: NLL {figures['nll']:.3f}")


def test_without_an_adapter_there_is_no_original_to_ask(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    assert fluency(Scorer(model, tokenizer, Journal(None), 8), "forget", [([1, 2], "x")]) is None
    assert "NLL –" in fluency_text({"forget": {"rows": 0, "silent": 2, "nll": None}})
