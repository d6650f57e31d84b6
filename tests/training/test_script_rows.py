"""What a script gives the trainer: raw rows as the command line reads them, and forget terms of its own."""

from __future__ import annotations

import json
import os
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
from helpers.script import FORGET, RETAIN, equal, trainer_of
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lowmem_npo.cli import main
from lowmem_npo.data import Rows, bundled_rows, to_examples, tokenize
from lowmem_npo.data.targets import forget_targets
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.training.reference.cached import check_cache_space


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


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (FORGET, {"layered": 3}, "layered=3 leaves a fold of 1 row, and a step takes step_batch_size=4: lower one"),
        (
            FORGET,
            {"adversary": 1.0},
            "adversary teaches .*: step_batch_size=4, forget rows: 4. Lower step_batch_size to 3 or less, or",
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


def test_raw_rows_beyond_the_models_positions_are_named(byte_model, tmp_path):
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path / "model")
    short, long = ({"question": "Who?", "answer": "She. " * times} for times in (1, 20))
    for rows, place in (([short, long], "forget_dataset, row 2"), ([short], "retain_dataset, row 1")):
        with pytest.raises(UserError, match=f"{place} has .* tokens, but .* only 64 positions: give max_length=64, or"):
            trainer_of(tmp_path / "model", tmp_path, rows, [long])


LONG = {"question": "Who is it?", "answer": "It is she who " + "never " * 8 + "came."}
TOKENS = {"question": "How does it end?", "answer": "With <eos> or with <pad>, they say."}


def test_what_tokenising_did_to_raw_rows_is_said(byte_model, tmp_path):
    """As on the command line, of every part, in a script's words; what came tokenised is its maker's matter."""
    lines, tokenizer = [], AutoTokenizer.from_pretrained(byte_model)
    others, kept = [{**row, "answer": "No idea."} for row in (LONG, TOKENS)], tokenize(
        to_examples(Rows("rows", RETAIN)), tokenizer, max_length=72)  # fmt: skip
    given = {"say": lines.append, "alternative_dataset": others}
    trainer_of(byte_model, tmp_path, [LONG, TOKENS], kept, max_length=72, forget_term="dpo", more=given)
    forget = tokenize(to_examples(Rows("rows", [LONG, TOKENS])), tokenizer, max_length=72)
    expected = forget.report("forget_dataset")
    assert len(expected) == 3 and "--max-length" in expected[1] and "special tokens inside" in expected[2]
    expected[1] = expected[1].replace(f"--max-length {72 + forget.cut[0]}", f"max_length={72 + forget.cut[0]}")
    assert lines[:3] == expected and "--" not in "".join(lines)
    assert [line.partition(":")[0] for line in lines[3:]] == ["alternative_dataset"]
    del lines[:]
    refusing = {"forget_term": "idk", "layered": 2, "refusal": "No idea, " * 9, "max_length": 72, "max_steps": 2}
    settings = {"per_device_train_batch_size": 1, **refusing}
    trainer_of(byte_model, tmp_path, [LONG, TOKENS], RETAIN, more={"say": lines.append}, **settings)
    parts = dict.fromkeys(line.partition(":")[0] for line in lines)
    assert [*parts] == ["forget_dataset", "forget_dataset, refusing", "retain_dataset"]
    assert sum("rows, " in line for line in lines) == 3  # the true answers, which layered holds, once


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_raw_rows_both_to_forget_and_to_keep_are_refused(kind, byte_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    rows = [dict(row) for row in FORGET]
    whole = (
        "^1 row to forget is also in the rows to retain: {}, row 2 is retain_dataset, row 1.*; remove them from either"
    )
    same = {"question": rows[1]["question"].upper(), "answer": rows[1]["answer"]}
    with pytest.raises(UserError, match=f"{whole.format('forget_dataset')}, or give allow_overlap"):
        trainer_of(byte_model, tmp_path, kind(rows), kind([same, *RETAIN]))
    made = tokenize(to_examples(Rows("forget_dataset", rows)), tokenizer)
    with pytest.raises(UserError, match=whole.format("forget_dataset")):
        trainer_of(byte_model, tmp_path, made, kind([same]))
    plain = [*map(dict, made)]  # whose text is not known
    refusing = {"forget_term": "idk", "layered": 2, "per_device_train_batch_size": 1, "max_steps": 2}
    with pytest.raises(UserError, match=whole.format("true_dataset")):
        trainer_of(byte_model, tmp_path, plain, kind([same]), more={"true_dataset": kind(rows)}, **refusing)
    for forget, retain, settings in (
        (kind(rows), kind([same, *RETAIN]), {"allow_overlap": True}),
        (kind(rows), kind([same, *RETAIN]), {"gamma": 0.0, "delta": 0.0}),  # no term looks at any
        (plain, kind([same]), {}),
        (made, tokenize(to_examples(Rows("retain_dataset", [same])), tokenizer), {}),
    ):
        trainer_of(byte_model, tmp_path, forget, retain, **settings)


def test_another_answer_is_not_the_forgotten_one(byte_model, tmp_path):
    others = [*FORGET[:2], {**FORGET[2], "answer": f" {FORGET[2]['answer'].upper()}"}, FORGET[3]]
    others[:2] = [{**row, "answer": "No."} for row in others[:2]]
    with pytest.raises(UserError, match="alternative_dataset, row 3 holds the answer itself; write another one"):
        trainer_of(byte_model, tmp_path, forget_term="dpo", more={"alternative_dataset": others})


def test_rows_that_the_model_was_not_made_for_are_remarked(byte_model, tmp_path):
    """Whether raw or a script's tokens, once for all parts."""
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.save_pretrained(tmp_path / "model")
    made = tokenize(to_examples(Rows("rows", [LONG])), tokenizer)
    for forget, retain in (([LONG], RETAIN), (FORGET, [LONG]), ([dict(made[0])], [RETAIN[0]])):
        lines = []
        trainer_of(tmp_path / "model", tmp_path, forget, retain, more={"say": lines.append})
        remark = f"The longest row has {made.longest} tokens, and the model was made for texts of up to 64 "
        assert [line.startswith(remark) for line in lines].count(True) == 1
    lines = []
    trainer_of(tmp_path / "model", tmp_path, made, made, more={"say": lines.append})  # of which `check_fit` has said so
    assert lines == []


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


@pytest.mark.slow
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


@pytest.mark.parametrize("form", ["numpy", "torch", "arrays"])
def test_arrays_may_have_a_cached_reference(form, byte_model, tmp_path):
    tokenizer, cache = AutoTokenizer.from_pretrained(byte_model), tmp_path / "cache"
    lists = [[*map(dict, tokenize(to_examples(Rows("rows", rows)), tokenizer))] for rows in (FORGET, RETAIN)]
    if form == "arrays":
        rows = [[{name: np.array(value) for name, value in row.items()} for row in part] for part in lists]
    else:
        rows = [Dataset.from_list(part).with_format(form) for part in lists]
    trainer = trainer_of(byte_model, tmp_path, *rows, reference_dir=cache)
    objective, config = trainer.args.objective, causal_lm(trainer.model).config
    lines = [check_cache_space(objective, *parts, config, torch.float32, cache) for parts in (rows, lists)]
    assert lines[0] == lines[1] and lines[0].startswith(f"Reference cache in {cache}: forget ")
    trainer.train()
    assert sorted(path.name for path in cache.iterdir()) == ["forget.safetensors", "retain.safetensors"]
    of_lists = step_gradients(trainer_of(byte_model, tmp_path, *lists, reference_dir=cache))  # the same cache
    assert equal(step_gradients(trainer_of(byte_model, tmp_path, *rows)), of_lists, rtol=1e-4)


def test_padding_that_the_model_does_not_have_is_seen_by_nobody(byte_model, tmp_path):
    """A token that a script adds to the tokenizer without resizing the embedding, which has no place for it."""
    ours, grown = (AutoTokenizer.from_pretrained(byte_model) for _ in range(2))
    grown.add_special_tokens({"pad_token": "[PAD]"})
    trainers = [
        trainer_of(byte_model, tmp_path, padding_free=False, max_steps=2, more={"processing_class": tokenizer})
        for tokenizer in (ours, grown)
    ]
    assert grown.pad_token_id >= trainers[0].model.get_input_embeddings().num_embeddings
    assert equal(*map(step_gradients, trainers), rtol=1e-5)
    trainers[1].train()
    prompts = [Prompt(ours(text).input_ids, 6) for text in ("Who guards the vault?", "Why?")]
    assert greedy_answers(trainers[1].model, grown, prompts) == greedy_answers(trainers[1].model, ours, prompts)


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
