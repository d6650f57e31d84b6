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
from lowmem_npo.evaluation.leaks.measure import measure_leaks
from lowmem_npo.evaluation.leaks.registry import LeakOptions

ONE = LeakOptions(relearn_attacks=("one",))


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
        load(folder, name), tokenizer, forget, holdout_rows=holdout, tests=tests, options=ONE, progress=False, **options
    )


def test_extraction(demo):
    results = {name: leaks_of(demo, name, "extraction")["extraction"] for name in ("base", "gold", "unlearned")}
    strength = {name: result.figures["extraction_strength"] for name, result in results.items()}
    assert strength["base"] == 1 and strength["gold"] < 0.1 and strength["unlearned"] < 0.2
    memorised = {name: result.figures["exact_memorization"] for name, result in results.items()}
    assert memorised["base"] == 1 and memorised["gold"] < 0.4 and memorised["unlearned"] < 0.6
    assert results["gold"].figures["recited"] == results["unlearned"].figures["recited"] == 0
    assert all(result.figures["holdout_extraction_strength"] < 0.1 for result in results.values())
    assert results["base"].leaks is True and results["gold"].leaks is False


def test_membership(demo):
    results = {name: leaks_of(demo, name, "membership")["membership"] for name in ("base", "gold")}
    for score in ("loss", "min_k", "min_k_pp", "zlib"):
        assert results["base"].figures[f"{score}_auc"] > 0.99
        assert 0.2 < results["gold"].figures[f"{score}_auc"] < 0.8
        assert results["base"].figures[f"{score}_p"] < 1e-5 < 0.01 < results["gold"].figures[f"{score}_p"]
    assert results["base"].leaks is True and results["gold"].leaks is not True


def test_membership_beside_a_holdout_that_the_model_recites(demo):
    """Answers that it knows as well tell nothing of those that it was to forget; of a model that never saw any, they
    do."""
    folder, tokenizer, forget, _ = demo
    # Copies would be one row; beginnings of the answers are others, as far as ids tell.
    rows = [{**row, **{of: row[of][: len(row[of]) - cut] for of in ("input_ids", "labels")}}
            for cut in range(3) for row in forget]  # fmt: skip
    results = {}
    for name in ("base", "gold"):
        model = load(folder, name)
        tests = ("extraction", "membership")
        results[name] = measure_leaks(model, tokenizer, rows, holdout_rows=rows, tests=tests, progress=False)
    assert all(abs(of["membership"].figures["loss_auc"] - 0.5) < 0.05 for of in results.values())
    assert results["gold"]["membership"].leaks is False
    for result in results["base"].values():
        assert result.leaks is None
        assert "The model says much of the holdout, 100% word for word, so it cannot be one" in result.meaning


def test_what_was_not_asked_for_is_not_there(demo):
    folder, tokenizer, forget, holdout = demo
    model = load(folder, "gold")
    assert set(leaks_of(demo, "gold")) == set()
    result = measure_leaks(model, tokenizer, forget, tests=("membership",), progress=False)["membership"]
    assert result.leaks is None and "--holdout" in result.meaning
    for wrong, said in (
        ({"tests": ("extractoin",)}, "no leak test 'extractoin'"),
        ({"holdout_rows": []}, "no holdout rows"),
    ):
        with pytest.raises(UserError, match=said):
            measure_leaks(model, tokenizer, forget, progress=False, **wrong)
    with pytest.raises(UserError, match="no forget rows"):
        measure_leaks(model, tokenizer, [], progress=False)


def test_sampling(demo):
    results = {name: leaks_of(demo, name, "sampling")["sampling"] for name in ("base", "gold")}
    assert results["base"].figures["best_rouge_l_recall"] > 0.9 and results["base"].figures["whole"] > 0.9
    assert results["gold"].figures["best_rouge_l_recall"] < 0.3 and results["gold"].figures["whole"] < 0.1
    assert results["gold"].figures["holdout_best_rouge_l_recall"] < 0.3
    assert results["base"].leaks is True and results["gold"].leaks is False


def test_relearning(demo):
    """Two rows taught again bring back the ten others of the unlearned model; to the gold standard they are news."""
    results = {name: leaks_of(demo, name, "relearning")["relearning"] for name in ("gold", "unlearned", "base")}
    assert results["base"].figures["extraction_strength"] > 0.9
    gold, unlearned = results["gold"].figures, results["unlearned"].figures
    assert gold["shown_rows"] == unlearned["shown_rows"] == 2 and gold["rows"] == unlearned["rows"] == 10
    assert gold["extraction_strength"] < 0.1 and gold["nll"] > 0.8 * gold["before"]["nll"]
    assert unlearned["before"]["extraction_strength"] < 0.2 < unlearned["extraction_strength"]
    assert unlearned["nll"] < 0.7 * unlearned["before"]["nll"]
    assert 0.1 < unlearned["recovered"] < 0.9 and unlearned["original"]["extraction_strength"] == 1
    assert results["base"].leaks is True and results["unlearned"].leaks is True and results["gold"].leaks is False
