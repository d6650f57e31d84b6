"""Rows that the model cannot take are named before its weights are loaded."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers.rows import write_rows
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.data.example import Example
from lowmem_npo.data.fit import Fit, check_fit, positions_of
from lowmem_npo.data.tokenizing import tokenize
from lowmem_npo.errors import UserError

SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32},
    **{"num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 8, "word_embed_proj_dim": 32, "pad_token_id": None},
    **{"attention_types": [[["global"], 1]], "attention_layers": ["global"]},
}
POSITIONS = 24
LEARNT = ["gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "opt", "biogpt", "gptj", "codegen", "mpt", "ctrl"]
ENDLESS = ["llama", "bloom", "gpt_neox"]


def architecture(kind, vocabulary):
    longest = {"mpt": "max_seq_len", "ctrl": "n_positions"}.get(kind, "max_position_embeddings")
    config = CONFIG_MAPPING[kind](vocab_size=vocabulary, **{longest: POSITIONS})
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def row_of(length, tokenizer):
    return tokenize([Example(None, "a" * (length + 50), "f.jsonl, line 3", "text")], tokenizer, max_length=length)


@pytest.mark.parametrize("kind", [*LEARNT, *ENDLESS])
def test_positions_are_those_learnt_or_made_for(kind):
    assert positions_of(architecture(kind, 50))() == (None if kind == "bloom" else POSITIONS)


@pytest.mark.parametrize("kind", LEARNT + ENDLESS)
def test_rows_are_as_long_as_the_positions_at_most(bpe_tokenizer, kind):
    config = architecture(kind, len(bpe_tokenizer))
    model = AutoModelForCausalLM.from_config(config).eval()
    fits, exceeds = (row_of(length, bpe_tokenizer) for length in (POSITIONS, POSITIONS + 1))
    check_fit(config, bpe_tokenizer, [fits, None])
    model(input_ids=torch.tensor([fits[0]["input_ids"]]))
    if kind in ENDLESS:
        check_fit(config, bpe_tokenizer, [fits, exceeds])
        model(input_ids=torch.tensor([exceeds[0]["input_ids"]]))
        return
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([exceeds[0]["input_ids"]]))
    with pytest.raises(
        UserError, match=f"line 3 has 25 tokens, but .* only 24 positions: give --max-length {POSITIONS}"
    ):
        check_fit(config, bpe_tokenizer, [fits, exceeds])


def test_rows_longer_than_those_that_rotary_positions_are_made_for_are_remarked_on(bpe_tokenizer):
    def remark(length, kind="llama", **options):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        longest = {"vocab_size": len(bpe_tokenizer), "max_position_embeddings": POSITIONS}
        config = CONFIG_MAPPING[kind](**sizes, **longest, **options)
        lines = []
        check_fit(config, bpe_tokenizer, [row_of(3, bpe_tokenizer), row_of(length, bpe_tokenizer), None], lines.append)
        return next(iter(lines), None)

    def scaled(kind, **more):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}

    assert remark(POSITIONS) is None
    assert "has 25 tokens, and the model was made for texts of up to 24 (its max_pos" in remark(POSITIONS + 1)
    yarn = scaled("yarn", factor=4.0, original_max_position_embeddings=12)
    for options in (scaled("linear", factor=2.0), yarn):
        assert remark(48, **options) is None and "up to 48" in remark(49, **options)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 6}
    assert "up to 24" in remark(25, **scaled("llama3", factor=2.0, **llama3))  # scaled to fewer
    assert "up to 24" in remark(25, "falcon") and remark(25, "falcon", alibi=True) is None


def test_every_command_that_reads_rows_makes_that_remark_once(byte_model, tmp_path, capsys):
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(byte_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    rows.write_text(json.dumps({"input": "Who wrote this, and where?", "output": "She."}) + "\n")
    forget = ["--model", str(model), "--forget", str(rows), "--device", "cpu"]
    run = [*forget, "--gamma", "0", "--delta", "0", "--output-dir", str(tmp_path / "run")]
    for command in (
        ["train", *run, "--dry-run"],
        ["estimate", *run],
        ["evaluate", *forget, "--dry-run"],
        ["data", str(rows), "--model", str(model), "--device", "cpu"],
    ):
        assert main(command) == 0
        assert capsys.readouterr().out.count("the model was made for texts of up to 24") == 1, command


def test_tokens_beyond_the_embedding_are_named(bpe_tokenizer):
    config, grown = architecture("llama", len(bpe_tokenizer)), copy.deepcopy(bpe_tokenizer)
    grown.add_tokens(["<unlearn>"])
    plain, special = (
        tokenize([Example(text, "a", "f.jsonl, line 3", "input/output")], grown) for text in ("b", "<unlearn> b")
    )
    check_fit(config, grown, [plain])
    with pytest.raises(
        UserError, match=r"line 3 has the token '<unlearn>' of id \d+, but the model's embedding has only"
    ):
        check_fit(config, grown, [plain, special])
    grown.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"the padding token '\[PAD\]' of id"):
        check_fit(config, grown, [plain])


def test_the_estimate_of_rows_that_the_model_cannot_take(byte_model, tmp_path, capsys):
    config = architecture("gpt2", 512)
    config.save_pretrained(tmp_path)
    run = ["estimate", "--model", str(tmp_path), "--lora-targets", "c_attn", "--max-length"]
    assert main([*run, "25"]) == 2
    assert "--max-length is 25, but the model has learnt only 24 positions" in capsys.readouterr().err
    assert main([*run, "24"]) == 0


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_other_answers_and_rows_that_set_levels_are_named_before_the_weights(command, byte_model, tmp_path, capsys):
    model = tmp_path / "model"
    config = architecture("gpt2", 512)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(model)

    def file(name, *rows):
        return write_rows(tmp_path / f"{name}.jsonl", [{"input": f"{n}?", **row} for n, row in enumerate(rows)])

    long, short = {"output": "No." * 20}, {"output": "No."}
    forget = file("forget", {"output": "Yes.", "other": "No."}, {"output": "Yes.", "other": "No." * 20})
    run = [command, "--model", str(model), "--lora-targets", "c_attn", "--forget", forget]
    run += ["--gamma", "0", "--delta", "0", *(["--dry-run"] if command == "train" else [])]
    run += ["--output-dir", str(tmp_path / "run")]
    for options, place in (
        (["--forget-term", "dpo", "--alternative-column", "other"], "forget.jsonl, line 2 has 64 tokens"),
        (["--forget-term", "dpo", "--alternatives", "self:1"], "forget.jsonl, line 1 and the request for another"),
        # of four rows the halves are always the same two each
        (["--forget-level", "holdout", "--holdout", file("one", long, short, long, short)], "one.jsonl, line"),
        (["--forget-level", "holdout", "--holdout", file("two", short, long, short, long)], "two.jsonl, line"),
    ):
        if command == "estimate" and "--alternatives" in options:  # which takes them to be as long as they may be
            continue
        assert main([*run, *options]) == 2
        error = capsys.readouterr().err
        assert place in error and "only 24 positions" in error
    assert main([*run, "--alternative-column", "other"]) == 0  # which npo does not read


def test_every_benchmark_says_so_before_weights_load(byte_model, tmp_path, capsys):
    model = tmp_path / "model"
    architecture("gpt2", 512).save_pretrained(model)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(model)
    question, file = "Who wrote these words, and where?", tmp_path / "rows.jsonl"
    brief = {"question": "?", "answer": "A", "perturbed_answer": ["B"]}
    cut, whole = "give --max-length 24, or remove the row", "shorten the row, or remove it"
    rows = [
        ("--forget", {"id": "x-qa0", "input": question, "output": "She.", "task": "Task1"}, whole),
        ("--forget", {"question": question, "answer": "She.", "perturbed_answer": ["He.", "It."]}, cut),
        ("--forget", {**brief, "perturbed_answer": ["B", question]}, cut),
        ("--forget", {**brief, "paraphrased_answer": question}, cut),
        ("--members", {"document": question}, whole),
        ("--muse-verbmem", {"prompt": question, "gt": "She."}, whole),
        ("--muse-privleak", {"text": question}, whole),
        ("--forget", {"input": question, "output": "She."}, cut),
    ]
    others = {"--members": "--nonmembers", "--muse-privleak": "--muse-privleak-holdout"}
    for flag, row, advice in rows:
        write_rows(file, [row])
        sets = [flag, str(file), *((others[flag], str(file)) if flag in others else ())]
        assert main(["evaluate", "--model", str(model), *sets]) == 2
        error = capsys.readouterr().err
        assert "rows.jsonl, line 1 has" in error and f"only 24 positions: {advice}." in error, row
    write_rows(file, [brief])
    assert main(["evaluate", "--model", str(model), "--forget", str(file), "--dry-run"]) == 0


def test_the_dry_run_says_so(byte_model, tmp_path, capsys):
    grown = tmp_path / "grown"
    shutil.copytree(byte_model, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["<unlearn>"])
    tokenizer.save_pretrained(grown)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "<unlearn> Who?", "output": "She."}\n')
    data = ["--forget", str(rows), "--gamma", "0", "--delta", "0", "--output-dir", str(tmp_path / "run")]
    assert main(["train", "--model", str(grown), *data, "--dry-run"]) == 2
    assert "rows.jsonl, line 1 has the token '<unlearn>'" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(grown), "--forget", str(rows)]) == 2
    assert "rows.jsonl, line 1 has the token '<unlearn>'" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3]}])
def test_an_embedding_is_known_through_an_adapter(adapter):
    model = AutoModelForCausalLM.from_config(architecture("llama", 97))
    assert Fit.of(get_peft_model(model, LoraConfig(**adapter)).get_base_model()) == Fit(97, None, POSITIONS)
