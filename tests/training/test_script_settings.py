"""What a script sets: its arguments, its adapter, its model; what cannot be meant is refused in its own words."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from helpers.dense_step import step_gradients
from helpers.script import FORGET, RETAIN, equal, trainer_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from lowmem_npo.config import AdapterConfig
from lowmem_npo.data import Rows, to_examples, tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.memory.checkpointing import is_checkpointed
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import decoder_layers
from lowmem_npo.training import passes
from lowmem_npo.training.script_words import in_script_words
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer


def test_the_head_is_read_where_the_model_computes(byte_model, tmp_path, monkeypatch):
    """Recorded: a model that is loaded elsewhere is moved before its head is taken, which would stay behind."""
    done = []
    to, read = PeftModel.to, passes.frozen_head
    monkeypatch.setattr(PeftModel, "to", lambda model, *where: done.append(where) or to(model, *where))
    monkeypatch.setattr(passes, "frozen_head", lambda model: done.append("head") or read(model))
    trainer_of(byte_model, tmp_path)
    assert done.index("head") > done.index((torch.device("cpu"),))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layered": 0}, "layered must be at least 2, not 0"),
        ({"layered": 2.0}, "layered must be a whole number, not 2.0"),
        ({"layered": 2, "layered_weight": 5}, "layered_weight must be at most 1, not 5"),
        ({"layered": 2, "layered_weight": float("nan")}, "layered_weight must be a finite number, not nan"),
        ({"step_batch_size": 0}, "step_batch_size must be at least 1, not 0"),
        ({"retain_batch_size": 1.5}, "retain_batch_size must be a whole number, not 1.5"),
        ({"max_length": -3}, "max_length must be at least 2, not -3"),
        ({"group_column": ["person"]}, "group_column must be text"),
        ({"joint_pass_tokens": -1}, "joint_pass_tokens must be at least 0, not -1"),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs must be a positive number, not 0"),
        ({"num_train_epochs": float("nan"), "max_steps": -1}, "num_train_epochs must be a finite number, not nan"),
        ({"max_steps": -5}, "max_steps must be at least -1, not -5"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, not 2.5"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, not '1e-4'"),
        ({"learning_rate": -1e-4}, "learning_rate must be 0 or a positive number, not -0.0001"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or a positive number, not -1"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, not 0"),
    ],
)
def test_values_that_a_field_cannot_have_are_refused_as_by_the_command_line(settings, message, byte_model, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer_of(byte_model, tmp_path, **settings)


def test_a_scripts_checkpointing_and_clipping_are_done(byte_model, tmp_path):
    """transformers' own checkpointing acts in training mode alone, and its clipping knows no None."""
    trainer = trainer_of(byte_model, tmp_path, gradient_checkpointing=True, max_grad_norm=None)
    assert all(map(is_checkpointed, decoder_layers(trainer.model.get_base_model())))
    plain = step_gradients(trainer_of(byte_model, tmp_path))
    assert equal(step_gradients(trainer), plain, rtol=1e-4)


def test_a_configuration_beside_an_adapter_is_said_to_be_unused(byte_model, tmp_path):
    model = attach_lora(AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32), AdapterConfig())
    args = NPOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    given = {"processing_class": AutoTokenizer.from_pretrained(byte_model), "peft_config": AdapterConfig(lora_r=4)}
    lines = []
    trainer = NPOTrainer(model, args, FORGET, RETAIN, **given, say=lines.append)
    assert trainer.model.peft_config["default"].r == AdapterConfig().lora_r
    assert [line for line in lines if "peft_config" in line] == [
        "The model has an adapter, which is trained; peft_config, which would make a new one, is not used."
    ]


def test_a_base_that_trains_beside_its_adapter_is_refused(byte_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    norm = next(name for name, _ in model.named_parameters() if "norm" in name or "embed" in name)
    model.get_parameter(norm).requires_grad_(True)
    args = NPOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(UserError, match=f"'{re.escape(norm)}' is trained and is not the adapter's"):
        NPOTrainer(model, args, FORGET, RETAIN, processing_class=AutoTokenizer.from_pretrained(byte_model))


def test_what_is_no_option_is_left_as_it_is():
    text = "'my--col' of /data/a--b/c and '--gamma' are not --stop-when 3, but --batch-size 4 and (--lr 1e-4) are"
    with pytest.raises(UserError) as error, in_script_words(NPOConfig):
        raise UserError(text)
    changed = text.replace("--batch-size 4", "step_batch_size=4").replace("--lr 1e-4", "learning_rate=1e-4")
    assert str(error.value) == changed


def test_targets_that_match_nothing_are_named_as_a_script_names_them(byte_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    args = NPOConfig(output_dir=str(tmp_path), use_cpu=True)
    tokenizer, targets = AutoTokenizer.from_pretrained(byte_model), AdapterConfig(lora_targets=("x_proj",))
    with pytest.raises(UserError, match="^lora_targets x_proj"):
        NPOTrainer(model, args, FORGET, RETAIN, processing_class=tokenizer, peft_config=targets)


def test_steps_are_not_looked_at_beside_another_strategy(tmp_path):
    settings = {"logging_strategy": "no", "logging_steps": 0, "save_strategy": "epoch", "save_steps": -1}
    assert NPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).save_steps == -1
    for name in ("logging_steps", "save_steps"):
        with pytest.raises(UserError, match=f"{name} must be a positive number"):
            NPOConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="steps", **{name: 0})


def test_epochs_are_not_looked_at_beside_a_number_of_steps(tmp_path):
    args = NPOConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=-1, max_steps=3, max_grad_norm=None)
    assert args.max_steps == 3


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = {"step_batch_size": np.int64(4), "max_length": np.int32(64), "padding_free": np.True_}
    args = NPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert (args.step_batch_size, args.max_length, args.padding_free) == (4, 64, True)
    assert type(args.max_length) is int and NPOConfig(output_dir=str(tmp_path), padding_free=0).padding_free is False


def test_a_script_may_parse_its_arguments(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--layered", "2", "--adversary", "1"]
    (args,) = HfArgumentParser(NPOConfig).parse_args_into_dataclasses(words)
    assert (args.layered, args.adversary, args.layered_weight) == (2, 1.0, NPOConfig.layered_weight)


def test_a_frozen_adapter_is_refused(byte_model, tmp_path):
    """As PEFT loads one unless it is told that it is to be trained."""
    trainer_of(byte_model, tmp_path).save_model()
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    args = NPOConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = {"forget_dataset": FORGET, "retain_dataset": RETAIN}
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    with pytest.raises(UserError, match="adapter is frozen, so nothing is trained: load it with is_trainable=True"):
        NPOTrainer(PeftModel.from_pretrained(model, tmp_path), args, **rows, processing_class=tokenizer)


def test_the_seed_of_a_script_is_that_of_its_adapter(byte_model, tmp_path):
    def trained(seed, before):
        model = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(byte_model)
        args = NPOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", seed=seed)
        torch.manual_seed(before)
        adapter = AdapterConfig(lora_r=2)
        trainer = NPOTrainer(model, args, FORGET, RETAIN, processing_class=tokenizer, peft_config=adapter)
        trainer.train()
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    assert equal(trained(1, before=2), trained(1, before=3)) and not equal(trained(1, before=2), trained(2, before=2))


@pytest.mark.parametrize(
    "settings, more, message",
    [
        ({"forget_term": "jensun", "layered": 2}, {}, "layered holds the true answers, and jensun has refusals"),
        (
            {"layered": 2, "gamma": 0.0, "delta": 0.0},
            {},
            "layered holds what is not yet forgotten with the retain terms",
        ),
        ({"forget_term": "dpo"}, {}, "dpo prefers another answer to the forgotten one: give alternative_dataset"),
        (
            {"forget_term": "dpo"},
            {"alternative_dataset": FORGET[:3]},
            "alternative_dataset has 3 rows: give one for each",
        ),
        ({}, {"alternative_dataset": FORGET}, "npo has no use for alternative_dataset"),
        ({}, {"forget_levels": [1.0]}, "There are 1 forget_levels for 4 rows to forget"),
        ({"forget_level": "holdout"}, {}, "forget_level holdout needs forget_levels"),
        ({}, {"forget_levels": [1.0, 2.0, math.nan, 2.0]}, "forget_levels has nan: give a mean NLL per token"),
        ({}, {"forget_levels": ["much"] * 4}, "forget_levels has 'much'"),
        ({"forget_term": "idk"}, {"forget_levels": [1.0] * 4}, "answers, but idk trains on a refusal"),
        (
            {"forget_term": "dpo"},
            {"alternative_dataset": [*FORGET, *FORGET[::-1]]},
            "alternative_dataset, row 5, has another prompt than forget_dataset, row 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, more, message, byte_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    forget, retain = (tokenize(to_examples(Rows("rows", rows)), tokenizer) for rows in (FORGET, RETAIN))
    with pytest.raises(UserError, match=message):
        trainer_of(byte_model, tmp_path, forget, retain, more=more, **settings).train()
