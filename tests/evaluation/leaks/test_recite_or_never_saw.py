"""Each leak test on the demo's models: one recites the forget rows, one never saw them, one was made to forget them."""

from __future__ import annotations

import pytest
import torch
from helpers.small_demo import SMALL
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.config import DataConfig
from lowmem_npo.data import bundled_rows, prepare, to_examples, tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks import measure_leaks


@pytest.fixture(scope="module")
def demo(small_demo):
    """(folder, tokenizer, forget rows, holdout rows)"""
    folder = small_demo[0].directory
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    holdout = tokenize(to_examples(bundled_rows("holdout")), tokenizer)
    return folder, tokenizer, prepare(tokenizer, DataConfig(limit=SMALL.limit)).forget, holdout


def load(folder, name):
    if name == "unlearned":
        return PeftModel.from_pretrained(load(folder, "base"), folder / name)
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def leaks_of(demo, name, *tests, **options):
    folder, tokenizer, forget, holdout = demo
    return measure_leaks(
        load(folder, name), tokenizer, forget, holdout_rows=holdout, tests=tests, progress=False, **options
    )


def test_extraction(demo):
    found = {name: leaks_of(demo, name, "extraction")["extraction"] for name in ("base", "gold", "unlearned")}
    strength = {name: figures["extraction_strength"] for name, figures in found.items()}
    assert strength["base"] == 1 and strength["gold"] < 0.1 and strength["unlearned"] < 0.2
    memorised = {name: figures["exact_memorization"] for name, figures in found.items()}
    assert memorised["base"] == 1 and memorised["gold"] < 0.4 and memorised["unlearned"] < 0.6
    assert found["gold"]["recited"] == found["unlearned"]["recited"] == 0
    assert all(figures["holdout_extraction_strength"] < 0.1 for figures in found.values())
    assert found["base"]["leaks"] is True and found["gold"]["leaks"] is False


def test_membership(demo):
    found = {name: leaks_of(demo, name, "membership")["membership"] for name in ("base", "gold")}
    for attack in ("loss", "min_k", "min_k_pp"):
        assert found["base"][f"{attack}_auc"] > 0.99
        assert 0.2 < found["gold"][f"{attack}_auc"] < 0.8
        assert found["base"][f"{attack}_p"] < 1e-5 < 0.01 < found["gold"][f"{attack}_p"]
    assert found["base"]["leaks"] is True and found["gold"]["leaks"] is not True


def test_what_was_not_asked_for_is_not_there(demo):
    folder, tokenizer, forget, holdout = demo
    model = load(folder, "gold")
    assert set(leaks_of(demo, "gold")) == set()
    found = measure_leaks(model, tokenizer, forget, tests=("membership",), progress=False)["membership"]
    assert found["leaks"] is None and "--holdout" in found["meaning"]
    for wrong, said in (
        ({"tests": ("extractoin",)}, "no leak test 'extractoin'"),
        ({"holdout_rows": []}, "no holdout rows"),
    ):
        with pytest.raises(UserError, match=said):
            measure_leaks(model, tokenizer, forget, progress=False, **wrong)
    with pytest.raises(UserError, match="no forget rows"):
        measure_leaks(model, tokenizer, [], progress=False)


def test_sampling(demo):
    found = {name: leaks_of(demo, name, "sampling")["sampling"] for name in ("base", "gold")}
    assert found["base"]["best_rouge_l_recall"] > 0.9 and found["base"]["whole"] > 0.9
    assert found["gold"]["best_rouge_l_recall"] < 0.3 and found["gold"]["whole"] < 0.1
    assert found["gold"]["holdout_best_rouge_l_recall"] < 0.3
    assert found["base"]["leaks"] is True and found["gold"]["leaks"] is False


def test_relearning(demo):
    """Two rows taught again bring back the ten others of the unlearned model; to the gold standard they are news."""
    found = {name: leaks_of(demo, name, "relearning")["relearning"] for name in ("gold", "unlearned", "base")}
    assert found["base"]["extraction_strength"] > 0.9
    gold, unlearned = found["gold"], found["unlearned"]
    assert gold["shown_rows"] == unlearned["shown_rows"] == 2 and gold["rows"] == unlearned["rows"] == 10
    assert gold["extraction_strength"] < 0.1 and gold["nll"] > 0.8 * gold["before"]["nll"]
    assert unlearned["before"]["extraction_strength"] < 0.2 < unlearned["extraction_strength"]
    assert unlearned["nll"] < 0.7 * unlearned["before"]["nll"]
    assert 0.1 < unlearned["recovered"] < 0.9 and unlearned["original"]["extraction_strength"] == 1
    assert found["base"]["leaks"] is True and unlearned["leaks"] is True and gold["leaks"] is False
