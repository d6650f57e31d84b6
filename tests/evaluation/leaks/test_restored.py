"""A leak test gives the model back as it came: every bit of it, and every random number."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.data import Rows, Template, to_examples, tokenize
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.leaks import fine_tuning
from lowmem_npo.evaluation.leaks.measure import measure_leaks, time_of_tuning
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, LeakOptions
from lowmem_npo.memory.checkpointing import enable_checkpointing

OPTIONS = LeakOptions(leak_samples=2, relearn_steps=2, retune_steps=2)


def rows_of(tokenizer, who, words=True):
    rows = [{"question": f"Who is {who} {n}?", "answer": f"Number {n}.", "other": f"Wer ist {n}?"} for n in range(4)]
    examples = to_examples(Rows(who, rows), paraphrase_column="other" if words else None)
    return tokenize(examples, tokenizer)


@pytest.fixture(scope="module")
def subject(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    sets = {name: rows_of(tokenizer, name) for name in ("forget", "holdout", "retain", "general")}
    wording = Wording({name: sets[name].examples for name in ("forget", "holdout")}, Template(), 128)
    return tokenizer, sets, wording


def model_of(byte_model):
    """An adapter with dropout in training mode, checkpointed, one of its weights frozen: much that could be lost."""
    base = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1)).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    enable_checkpointing(base)
    return model


def everything(model):
    bits = {
        name: tensor.detach().clone().contiguous().view(torch.uint8)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    modules = {
        name: (module.training, type(module), "forward" in vars(module)) for name, module in model.named_modules()
    }
    adapters = {"active": model.active_adapters, "known": sorted(model.peft_config)}
    settings = adapters | {"generation": model.generation_config.to_dict()}
    randomness = (torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    return bits, flags, modules, settings, randomness


def measured(model, subject, test, **options):
    tokenizer, sets, wording = subject
    return measure_leaks(
        model, tokenizer, sets["forget"], holdout_rows=sets["holdout"], retain_rows=sets["retain"],
        general_rows=sets["general"], wording=wording, tests=(test,), options=OPTIONS, max_new_tokens=8,
        progress=False, **options,
    )[test]  # fmt: skip


@pytest.mark.parametrize("test", WHILE_TRAINING)
def test_every_bit_is_restored(test, subject, byte_model):
    model = model_of(byte_model)
    before = everything(model)
    result = measured(model, subject, test)
    assert result.figures, result.meaning
    after = everything(model)
    assert before[0].keys() == after[0].keys()
    assert [name for name in before[0] if not torch.equal(before[0][name], after[0][name])] == []
    for was, now in zip(before[1:4], after[1:4], strict=True):
        assert [key for key in was if was[key] != now[key]] == [] and was.keys() == now.keys()
    assert torch.equal(before[4][0], after[4][0]) and before[4][1:] == after[4][1:]
    # The same again, whatever was drawn in between; other samples, other rows with another seed.
    torch.rand(3), random.random()
    assert measured(model, subject, test).to_json() == result.to_json()


def test_a_bit_that_is_not_restored_would_be_noticed(subject, byte_model, monkeypatch):
    from lowmem_npo.model import adapters

    monkeypatch.setattr(adapters, "_unwrap", lambda lm: None)
    model = model_of(byte_model)
    before = everything(model)
    measured(model, subject, "retuning")
    assert everything(model)[0].keys() != before[0].keys()


def test_a_step_is_timed_between_two_moments_at_which_the_gpu_has_nothing_to_do(subject, byte_model, monkeypatch):
    done: list[str] = []

    def recorded(what, function):
        def call(*args, **options):
            done.append(what)
            return function(*args, **options)

        return call

    waits = partial(fine_tuning.finish, torch.device("cuda"))  # whatever the model is on
    monkeypatch.setattr(torch.cuda, "synchronize", recorded("wait", lambda device: None))
    monkeypatch.setattr(fine_tuning, "finish", lambda device: waits())
    monkeypatch.setattr(fine_tuning, "monotonic", recorded("clock", fine_tuning.monotonic))
    monkeypatch.setattr(fine_tuning, "as_fits", recorded("step", fine_tuning.as_fits))
    assert fine_tuning.seconds_per_step(model_of(byte_model), subject[1]["forget"]) > 0
    assert done == ["step", "wait", "clock", "step", "wait", "clock"]


def test_the_time_is_said_beforehand_and_what_it_took_to_know_leaves_nothing(subject, byte_model, tmp_path):
    from lowmem_npo.config import ModelConfig
    from lowmem_npo.evaluation.leaks.contract import SavedModel, Subject
    from lowmem_npo.evaluation.leaks.registry import leak_tests
    from lowmem_npo.evaluation.scoring.journal import Journal
    from lowmem_npo.evaluation.scoring.scorer import Scorer

    tokenizer, sets, _ = subject
    model = model_of(byte_model)
    before = everything(model)
    scorer = Scorer(model, tokenizer, Journal(None, progress=False), 4)
    options = LeakOptions(relearn_attacks=("family",))
    whole = Subject(scorer, sets["forget"], None, options, retain=sets["retain"], general=sets["general"])
    (line,) = time_of_tuning(leak_tests(["relearning", "retuning"]), whole)
    assert line.startswith("Leak tests: 660 steps of fine-tuning, about ") and " here" in line
    both = leak_tests(["relearning", "quantization"])
    (line,) = time_of_tuning(both, whole)
    assert " 460 steps" in line  # nothing that could be merged
    stored = replace(whole, saved=SavedModel(ModelConfig(str(byte_model)), "an adapter", tmp_path))
    (line,) = time_of_tuning(both, stored)
    assert "1840 steps" in line  # on the evaluated model and in three further forms
    assert time_of_tuning(both, replace(stored, forget=sets["forget"][:1])) == []  # no other row to ask for
    assert time_of_tuning(leak_tests(["extraction", "jailbreak"]), whole) == []
    after = everything(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and before[1:4] == after[1:4]
    assert torch.equal(before[4][0], after[4][0])
