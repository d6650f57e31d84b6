"""Regular expressions that would not end on a layer's name are refused, whoever brings them."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import attach_lora, patterns
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.continued import continued
from lowmem_npo.model.merging import find_updates
from lowmem_npo.model.patterns import check_patterns
from lowmem_npo.model.saved_adapter import load_adapter

ENDLESS = [r"(([\w.]+)+)+!", r"((a|[\w.])*)*(b|!)$", r"(.*)*(.*)*(.*)*(.*)*x!"]
LONG = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_does_not_end(pattern):
    with pytest.raises(UserError, match="takes too long on the names of this model's layers"):
        check_patterns([pattern], [LONG * 2], "--lora-targets")


def test_others_do(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 60.0)
    check_patterns([r".*layers\.[0-7]\..*_proj", "q_proj", "(a|b)+"], [LONG], "--lora-targets")
    monkeypatch.setattr(patterns.subprocess, "run", None)
    check_patterns(["q_proj", "model.layers.0.mlp", ""], [LONG], "--lora-targets")  # no process for a plain name


@pytest.mark.parametrize("pattern", ["(" * 3000 + "a" + ")" * 3000, "a{99999999999999999999}", "(a", r".*(?P<x"])
def test_what_is_no_pattern(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 60.0)
    with pytest.raises(UserError, match="is no regular expression"):
        AdapterConfig(lora_targets=(pattern,))
    with pytest.raises(UserError, match="is no regular expression"):
        check_patterns([pattern], [LONG], "--lora-targets")


def test_of_a_user_in_the_dry_run(byte_model, tmp_path, capsys):
    arguments = ["train", "--model", str(byte_model), "--output-dir", str(tmp_path / "o"), "--dry-run"]
    assert main([*arguments, "--lora-targets", ENDLESS[0]]) == 2
    assert f"--lora-targets {ENDLESS[0]}: the regular expression takes too long" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"target_modules": ENDLESS[0]}, {"rank_pattern": {ENDLESS[0]: 3}},
                                    {"exclude_modules": ENDLESS[0]}], ids=["layers", "ranks", "but for"])  # fmt: skip
def test_of_an_adapter(change, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    folder = str(tmp_path / "adapter")
    for use in (
        lambda: load_adapter(tiny_model("llama"), folder),
        lambda: continued(tiny_model("llama"), folder, LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM")),
        lambda: find_updates(folder, find_checkpoint(str(tmp_path / "base"))),
        lambda: attach_lora(tiny_model("llama"), AdapterConfig(adapter=folder)),
    ):
        with pytest.raises(UserError, match="The adapter in '.*' has the pattern .* takes too long"):
            use()
