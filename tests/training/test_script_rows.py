"""What a script gives the trainer: raw rows as the command line reads them, and forget terms of its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from helpers.dense_step import step_gradients
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, HfArgumentParser

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig
from lowmem_npo.data import Rows, bundled_rows, to_examples, tokenize
from lowmem_npo.data.targets import forget_targets
from lowmem_npo.errors import UserError
from lowmem_npo.memory.checkpointing import is_checkpointed
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import decoder_layers
from lowmem_npo.training import trainer as trainer_module
from lowmem_npo.training.script_words import in_script_words
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
        processing_class=AutoTokenizer.from_pretrained(byte_model),
        forget_term=own,
        **{"peft_config": AdapterConfig(lora_r=2), **(more or {})},
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


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
@pytest.mark.parametrize("term", ["npo", "idk", "jensun"])
def test_raw_rows_are_those_of_the_command_line(kind, term, byte_model, tmp_path):
    settings = {"forget_term": term, "max_length": 72, "refusal": "No idea."}
    raw = trainer_of(byte_model, tmp_path, kind(FORGET), kind(RETAIN), **settings)
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    forget, retain = (to_examples(Rows("rows", rows)) for rows in (FORGET, RETAIN))
    cut = partial(tokenize, tokenizer=tokenizer, max_length=72)
    tokenized = [forget_targets(term, cut(forget), "No idea.", cut), cut(retain)]
    expected = step_gradients(trainer_of(byte_model, tmp_path, *tokenized, **settings))
    assert equal(step_gradients(raw), expected)
    whole = step_gradients(trainer_of(byte_model, tmp_path, **{**settings, "max_length": 66}))
    assert not equal(whole, expected)  # the length counts


@pytest.mark.parametrize(
    "rows, message",
    [
        ("forget.jsonl", "forget_dataset is of type str"),
        (DatasetDict(train=Dataset.from_list(FORGET)), "forget_dataset is of type DatasetDict"),
        (Dataset.from_list(FORGET).to_iterable_dataset(), "forget_dataset is of type IterableDataset"),
        (["Who?"], "forget_dataset is of type list"),
        ([], "forget_dataset is empty"),
        ([{"who": "a", "what": "b"}], "forget_dataset has the columns who, what"),
        ([{"question": "a", "answer": ""}], "forget_dataset, row 1 has an empty answer"),
        ([{"input_ids": [1, 2]}], "input_ids without labels"),
        (pandas.DataFrame(FORGET), "forget_dataset is of type DataFrame"),
    ],
)
def test_what_is_no_rows_is_refused_at_once(rows, message, byte_model, tmp_path):
    with pytest.raises(UserError) as error:
        trainer_of(byte_model, tmp_path, rows)
    assert message in str(error.value)


def test_what_is_no_retain_set_or_no_adapter_of_ours_is_refused(byte_model, tmp_path):
    for retain, message in (
        (pandas.DataFrame(RETAIN), "retain_dataset is of type DataFrame"),
        ([], "retain_dataset"),
        (None, "there are no retain rows"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_of(byte_model, tmp_path, FORGET, retain)
    with pytest.raises(UserError, match="not a LoraConfig"):
        trainer_of(byte_model, tmp_path, more={"peft_config": LoraConfig()})


def test_the_head_is_read_where_the_model_computes(byte_model, tmp_path, monkeypatch):
    """Recorded: a model that is loaded elsewhere is moved before its head is taken, which would stay behind."""
    done = []
    to, read = PeftModel.to, trainer_module.frozen_head
    monkeypatch.setattr(PeftModel, "to", lambda model, *where: done.append(where) or to(model, *where))
    monkeypatch.setattr(trainer_module, "frozen_head", lambda model: done.append("head") or read(model))
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


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (FORGET, {"layered": 3}, "layered=3 leaves a fold of 1 row, and a step takes step_batch_size=4: lower one"),
        (
            FORGET,
            {"adversary": 1.0},
            "adversary teaches .*: step_batch_size=4, forget rows: 4. Lower step_batch_size, or",
        ),
        (
            FORGET,
            {"max_length": 12},
            r"With max_length=12 nothing of the answer is left in .*; give max_length=\d+ or more",
        ),
        (
            [{"frage": "Who?", "antwort": "She."}],
            {},
            "name yours with prompt_column and answer_column; lowmem_npo.data.to",
        ),
        (FORGET, {"gamma": -1.0}, "gamma must be"),
        (FORGET, {"bf16": True}, "bf16=True would have no effect: load the model in the type that it is to compute in"),
        (FORGET, {"eval_strategy": "steps"}, "this trainer measures nothing while it trains; `lowmem-npo evaluate`"),
        (FORGET, {"per_device_eval_batch_size": 3}, "this trainer measures nothing while it trains"),
        (FORGET, {"sam": -1.0}, "sam must be a positive number, not -1"),
        (FORGET, {"forget_term": "idk", "forget_level": "holdout"}, "forget_level is a level of the forgotten answers"),
    ],
)
def test_errors_name_what_a_script_gives(rows, settings, message, byte_model, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        trainer_of(byte_model, tmp_path, rows, **settings)
    assert "--" not in str(error.value)


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


def test_raw_rows_beyond_the_models_positions_are_named(byte_model, tmp_path):
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path / "model")
    short, long = ({"question": "Who?", "answer": "She. " * times} for times in (1, 20))
    for rows, place in (([short, long], "forget_dataset, row 2"), ([short], "retain_dataset, row 1")):
        with pytest.raises(UserError, match=f"{place} has .* tokens, but .* only 64 positions: give max_length=64, or"):
            trainer_of(tmp_path / "model", tmp_path, rows, [long])


def by_hand(objective, policy, reference, totals):
    """NPO with beta 0.5, as its paper writes it."""
    ratio = (policy.sums() - reference).exp()
    return (2 / 0.5 * (1 + ratio**0.5).log()).sum() / totals.forget_sequences


def token_by_hand(objective, policy, reference, totals):
    return (4 * F.softplus(0.5 * (policy.token_logprobs - reference))).sum() / totals.forget_tokens


token_by_hand.needs_reference = "token"


def ascent(objective, policy, reference, totals):
    assert reference is None
    return policy.token_logprobs.sum() / totals.forget_tokens


ascent.needs_reference = None


@pytest.mark.parametrize(
    "own, built_in",
    [(by_hand, {}), (token_by_hand, {"normalization": "token"}), (ascent, {"forget_term": "ga"})],
    ids=["sequence", "token", "none"],
)
@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_a_term_of_a_script_is_a_term_like_others(own, built_in, split, byte_model, tmp_path):
    expected = step_gradients(trainer_of(byte_model, tmp_path, **built_in))
    trainer = trainer_of(byte_model, tmp_path, own=own, **split)
    assert equal(step_gradients(trainer), expected, rtol=1e-4)
    assert trainer.args.forget_term == own.__name__


def test_terms_that_cannot_be_used(byte_model, tmp_path):
    def nothing(objective, policy, reference, totals):
        return policy.token_logprobs

    def strange(objective, policy, reference, totals):
        return policy.sums().sum()

    strange.needs_reference = "logits"
    for term, message in ((lambda *_: None, "a name of its own"), (strange, "needs_reference is 'logits'")):
        with pytest.raises(UserError, match=message):
            trainer_of(byte_model, tmp_path, own=term)
    with pytest.raises(UserError, match="The forget term nothing returned"):
        trainer_of(byte_model, tmp_path, own=nothing).train()


def test_an_installed_package_brings_a_term_by_name(byte_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def half(objective, policy, reference, totals):\n"
        "    return 0.5 * policy.token_logprobs.sum() / totals.forget_tokens\n"
        "half.needs_reference = None\n"
    )
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[lowmem_npo.forget_terms]\nhalf = mine:half\nbroken = nowhere:term\n")
    options = ["--device", "cpu", "--dtype", "float32", "--max-steps", "1", "--limit", "4", "--eval-rows", "0"]
    command = ["train", "--model", str(byte_model), *options, "--forget-term"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    half = [sys.executable, "-m", "lowmem_npo", *command, "half", "--output-dir", str(tmp_path / "half")]
    subprocess.run(half, check=True, env=environment, capture_output=True)
    assert main([*command, "ga", "--output-dir", str(tmp_path / "ga")]) == 0
    losses = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["forget_loss"]
        for name in ("half", "ga")
    }
    assert losses["half"] == pytest.approx(losses["ga"] / 2, rel=1e-6)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*command, "broken"]) == 2
    assert "--forget-term broken: nowhere:term cannot be imported" in capsys.readouterr().err
    assert main(["train", "--model", str(byte_model), "--forget-term", "nposs"]) == 2
    assert "--forget-term must be one of npo, ga, simnpo, idk" in capsys.readouterr().err


def test_a_script_can_forget_in_stages(byte_model, tmp_path):
    """Raw rows, divided by person; what is held has the true answers, also where a refusal is taught."""
    rows = bundled_rows("forget", limit=12).rows  # of two people, six each
    settings = {"layered": 2, "group_column": "person", "max_steps": 4, "per_device_train_batch_size": 4}
    trainer = trainer_of(byte_model, tmp_path, rows, forget_term="jensun", save_strategy="no", **settings)
    assert sorted(trainer.step_batches.folds) == [list(range(6)), list(range(6, 12))]
    held = trainer.train_dataset.retain[len(RETAIN) :]
    assert all(row["labels"][-3:] == row["input_ids"][-3:] for row in held) and len(held) == 12
    assert any(row["labels"][-3:] != row["input_ids"][-3:] for row in trainer.train_dataset.forget)
    trainer.train()
    assert [line["stage"] for line in trainer.state.log_history if "stage" in line] == [1, 1, 2, 2]


@pytest.mark.parametrize("form", ["numpy", "torch", None])
def test_tokenised_rows_may_be_arrays(form, byte_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    forget, retain = (tokenize(to_examples(Rows("rows", rows)), tokenizer) for rows in (FORGET, RETAIN))
    datasets = [Dataset.from_list([*map(dict, rows)]).with_format(form) for rows in (forget, retain)]
    for settings in ({}, {"adversary": 1.0, "per_device_train_batch_size": 2}):
        of_arrays = step_gradients(trainer_of(byte_model, tmp_path, *datasets, **settings))
        assert equal(of_arrays, step_gradients(trainer_of(byte_model, tmp_path, forget, retain, **settings)), rtol=1e-5)


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


@pytest.mark.parametrize("settings", [{"layered": 2}, {"adversary": 1.0, "adversary_steps": 2}])
def test_a_resumed_script_keeps_the_length_of_its_stages(settings, byte_model, tmp_path):
    """Longer stages would hold again what has been forgotten."""
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, **settings}
    trainer_of(byte_model, tmp_path, max_steps=4, **settings).train()
    for steps in (8, 3):
        said = f"began with 4 steps, over which its stages and attackers are laid out, and now has {steps}: resume it "
        with pytest.raises(UserError, match=said):
            trainer_of(byte_model, tmp_path, max_steps=steps, **settings).train(resume_from_checkpoint=True)
    again = trainer_of(byte_model, tmp_path, max_steps=4, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 4


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [1, 2, 10**6], "labels": [-100, 2, 3]}, "row 2, has the token .* of id 1000000, but the model"),
        ({"input_ids": [1, -2, 3], "labels": [-100, 2, 3]}, "row 2, has the id -2, but the model's are 0 to"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 10**6]}, "row 2, has the id 1000000, but the model's are 0 to"),
        ({"input_ids": [1, 2, 3], "labels": [-100, -1, 3]}, "row 2, has the id -1, but"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3]}, "row 2, has 3 input_ids and 2 labels"),
        ({"input_ids": [], "labels": []}, "row 2, has 0 input_ids and 0 labels"),
        ({"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}, "row 2, has no label behind its first token"),
        ({"input_ids": [1], "labels": [1]}, "row 2, has no label behind its first token"),
    ],
)
@pytest.mark.parametrize("part", ["forget", "retain"])
def test_rows_that_no_step_can_take_are_refused(part, change, message, byte_model, tmp_path):
    """Nothing looks at them in a step (`checked=True`)."""
    right = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_length": 1}
    rows = {name: [right, right] for name in ("forget", "retain")} | {part: [right, {**right, **change}]}
    with pytest.raises(UserError, match=f"{part}_dataset, {message}"):
        trainer_of(byte_model, tmp_path, rows["forget"], rows["retain"])
