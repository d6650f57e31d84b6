"""The model card of a run: what the hub reads, what was measured and with which settings, and code that runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.idle_options import OF_TERMS
from lowmem_npo.report.content import read_content
from lowmem_npo.report.model_card import merged_card, model_card
from lowmem_npo.report.page import render_page
from lowmem_npo.report.plain_words import first_page


def test_the_hub_can_read_the_card(run, byte_model):
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "peft" and "unlearning" in card.data.tags
    assert card.data.base_model is None, "a local directory is no name on the hub"
    assert byte_model.name in card.text and str(byte_model) not in card.text
    table = json.loads((run / "before_after.json").read_text())
    for value in (table["before"]["forget"]["nll"], table["after"]["retain"]["probability"]):
        assert f"{value:.3f}" in card.text
    audit = json.loads((run / "audit.json").read_text())
    for words in (audit["data"]["forget"]["sha256"], audit["adapter"]["sha256"], "lora_r", "PeftModel", "forget.jsonl"):
        assert words in card.text
    assert "not a certificate" in card.text
    assert not re.search(r"\n\n\n", card.text) and re.search(r"\n\n\| part \|.*\n\|---\|.*\n\| forget \|", card.text)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, "beta normalization kl_direction"),
        ({"delta": 0.0, "retain_batch_size": 2}, "beta normalization retain_batch_size"),
        ({"delta": 0.0, "gamma": 0.0, "retain_batch_size": 2}, "beta normalization"),
        ({"adversary": 1.0}, "beta normalization kl_direction adversary"),
        ({"forget_term": "wga"}, "wga_beta kl_direction"),
        ({"forget_term": "satimp"}, "satimp_beta1 satimp_beta2 kl_direction"),
        ({"forget_term": "simnpo"}, "beta simnpo_margin kl_direction"),
        ({"forget_term": "dpo", "alternatives": "self:2"}, "beta alternatives kl_direction"),
        (
            {"forget_term": "wga", "layered": 3, "group_column": "who"},
            "wga_beta kl_direction layered layered_weight group_column",
        ),
    ],
)
def test_the_card_has_the_settings_that_made_the_adapter(changed, shown, run):
    """Those in use; with their defaults, too, which others may not know."""
    content = read_content(run)
    card = model_card(dataclasses.replace(content, settings=content.settings | changed))
    listed = re.findall(r"^\| (\w+) \| `", card, re.MULTILINE)
    optional = {*OF_TERMS, "layered", "layered_weight", "group_column", "adversary", "adversary_steps", "kl_direction"}
    optional.add("retain_batch_size")
    assert {name for name in listed if name in optional} == set(shown.split())
    assert {"forget_term", "gamma", "delta", "batch_size", "lr"} <= set(listed)


@pytest.mark.parametrize(
    ("changed", "forget", "keep"),
    [
        ({}, "makes chosen answers (forget) less", "with their cross-entropy and the KL to the original over"),
        ({"gamma": 0.0}, "makes chosen answers (forget) less", "keeps others (retain) with the KL to the original"),
        ({"gamma": 0.0, "delta": 0.0}, "less likely than they were", "original model. Nothing was trained to keep"),
        ({"forget_term": "idk", "delta": 0.0}, "a refusal in the place of chosen", "with their cross-entropy, w"),
        ({"forget_term": "dpo"}, "less likely beside others", "with their cross-entropy and the KL"),
    ],
)
def test_the_card_says_what_the_objective_asked_for(changed, forget, keep, run):
    """So does the first page of the report."""
    content = read_content(run)
    content = dataclasses.replace(content, settings=content.settings | changed)
    (what,) = re.findall("## What it is\n(.*)## Use it", model_card(content), re.DOTALL)
    assert forget in what and keep in what
    unused = "the training did not use the 2 examples of that (“retain.jsonl”)"
    assert (unused in first_page(content, "Tiny")[0].sentences[1]) == ("Nothing was trained" in keep)
    assert ("no others" in render_page(content, 1)) == ("forget_term" not in changed)


def test_the_title_says_what_the_adapter_was_trained_for_and_not_that_it_does_so(run, byte_model, tmp_path):
    """After three steps it does not; what an adapter of no run was trained for is not known."""

    def title(card):
        return next(line for line in card.splitlines() if line.startswith("# "))

    assert "no longer says" not in read_content(run).verdict.headline
    assert title(model_card(read_content(run))) == f"# An adapter trained to make `{byte_model.name}` forget"
    merged = f"# `{byte_model.name}`, with an adapter merged into it"
    assert title(merged_card(run, str(byte_model), None, "bf16", [])) == f"{merged} that was trained to make it forget"
    shutil.copy(run / "adapter_model.safetensors", tmp_path)
    assert title(merged_card(tmp_path, str(byte_model), None, "bf16", [])) == merged


def test_the_card_says_of_a_leak_test_that_passed_before_that_it_tells_nothing(run):
    none = LeakResult({"rows": 9}, "Nothing comes.", False)
    content = read_content(run)
    for before, told in ({"extraction": none}, True), ({}, False):
        card = model_card(dataclasses.replace(content, leaks={"before": before, "after": {"extraction": none}}))
        assert "- extraction: Nothing comes." in card and ("tells nothing of that" in card) == told


def test_a_base_model_on_the_hub_is_in_the_header(run):
    content = read_content(run)
    named = {
        **content.audit,
        "model": {
            **content.audit["model"],
            "name": "allenai/OLMo-7B",
            "loaded": "allenai/OLMo-7B-hf",
            "directory": None,
        },
    }
    card = ModelCard(model_card(dataclasses.replace(content, audit=named)))
    assert card.data.base_model == "allenai/OLMo-7B-hf" and 'from_pretrained("allenai/OLMo-7B-hf")' in card.text


def test_a_card_names_folders_and_several_files_without_their_places(run, tmp_path, monkeypatch):
    """Relative ones are known by what is there; names on the hub are whole."""
    (tmp_path / "quentin" / "papers").mkdir(parents=True)
    (tmp_path / "quentin" / "c.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    audit = read_content(run).audit
    sources = {
        "forget": "/home/quentin/a.jsonl,~/b.txt,quentin/c.jsonl",
        "retain": "quentin/papers",
        "holdout": "org/rows",
    }
    data = {part: {**audit["data"]["forget"], "source": source, "sha256": None} for part, source in sources.items()}
    card = model_card(dataclasses.replace(read_content(run), audit={**audit, "data": data}))
    assert "`a.jsonl, b.txt, c.jsonl`" in card and "`papers`" in card and "`org/rows`" in card and "quentin" not in card


def test_the_cards_code_loads_the_adapter(run, byte_model):
    code = (run / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = code.replace(f'"path/to/{byte_model.name}"', repr(str(byte_model))).replace('"."', repr(str(run)))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].peft_config["default"].r == 5 and names["tokenizer"]("a").input_ids


def test_the_card_of_a_merged_model_says_why_nothing_is_known(own_run):
    """A checkpoint that is the adapter which the run measured has its verdict."""
    headline, checkpoint = read_content(own_run).verdict.headline, own_run / "checkpoint-3"
    if not checkpoint.exists():
        checkpoint.mkdir()
        shutil.copy(own_run / "adapter_model.safetensors", checkpoint)

    def card(adapter):
        return merged_card(adapter, "the/base", None, "bf16", [])

    assert headline in card(own_run) and headline in card(checkpoint)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"of an earlier step")
    assert "this adapter forgets. It is a checkpoint of a run of `lowmem-npo train`, and not" in card(checkpoint)
    with open(own_run / "metrics.jsonl", "a") as metrics:
        metrics.write("{\n")
    assert "this adapter forgets. The files of the run that trained it are damaged" in card(own_run)
    (own_run / "run.yaml").unlink()
    assert "this adapter forgets. It is not in the directory of a run of `lowmem-npo train`." in card(own_run)
