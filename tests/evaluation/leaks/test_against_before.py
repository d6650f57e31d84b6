"""Leak tests without a holdout: compared with the model before it forgot, in smaller words."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare
from lowmem_npo.evaluation.leaks import extraction, membership
from lowmem_npo.evaluation.leaks.attack import Attack
from lowmem_npo.evaluation.leaks.contract import beside_holdout
from lowmem_npo.evaluation.leaks.measure import measure_leaks
from lowmem_npo.evaluation.leaks.registry import LeakOptions
from lowmem_npo.evaluation.scoring.token_scores import TokenScores

TESTS = ("extraction", "sampling", "membership", "relearning")


ONE = LeakOptions(relearn_attacks=("one",))


@pytest.fixture(scope="module")
def demo(small_demo):
    from helpers.small_demo import SMALL

    folder = small_demo[0].directory
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return folder, tokenizer, prepare(tokenizer, DataConfig(limit=SMALL.limit))


def load(folder, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if name == "unlearned":
        return PeftModel.from_pretrained(base, folder / name)
    return get_peft_model(base, LoraConfig(target_modules="all-linear")) if name == "untouched" else base


def leaks_of(demo, name, *tests, **options):
    folder, tokenizer, data = demo
    return measure_leaks(
        load(folder, name), tokenizer, data.forget, tests=tests, options=ONE, progress=False, **options
    )


def test_a_model_that_forgot_and_one_that_did_not(demo):
    forgot, untouched = (leaks_of(demo, name, *TESTS) for name in ("unlearned", "untouched"))
    assert {name: result.leaks for name, result in untouched.items()} == dict.fromkeys(TESTS, True)
    assert {name: forgot[name].leaks for name in ("extraction", "sampling", "membership")} == dict.fromkeys(
        ("extraction", "sampling", "membership"), False
    )
    for results in (forgot, untouched):
        assert all(result.against_before and "--holdout" in result.meaning for result in results.values())
    assert forgot["extraction"].verdict.words == "much less than before"
    assert untouched["extraction"].verdict.words == "much is left"
    assert "before it forgot, 100%" in forgot["extraction"].meaning
    assert (
        untouched["membership"].figures["loss_fell"] == pytest.approx(0.5)
        and forgot["membership"].figures["loss_fell"] == 1
    )


def test_a_comparison_with_itself_would_be_noticed(demo, monkeypatch):
    monkeypatch.setattr("lowmem_npo.model.adapters.original_model", nullcontext)
    result = leaks_of(demo, "unlearned", "membership")["membership"]
    assert result.leaks is not False and result.figures["loss_fell"] == pytest.approx(0.5)


def test_the_model_before_is_not_compared_with_itself(demo):
    results = leaks_of(demo, "untouched", "extraction", "membership", unlearned=False)
    assert results["membership"].leaks is None and "Not measured" in results["membership"].meaning
    assert results["extraction"].leaks is True and not results["extraction"].against_before


def test_a_model_without_an_adapter_is_compared_with_earlier_results(demo):
    earlier = leaks_of(demo, "base", "extraction", "sampling")
    results = leaks_of(demo, "base", "extraction", "sampling", earlier=earlier)
    assert all(result.leaks and result.against_before for result in results.values())
    shorter = leaks_of(demo, "base", "sampling", earlier=earlier, max_new_tokens=8)["sampling"]
    assert not shorter.against_before  # the earlier samples were longer


@pytest.mark.parametrize(
    ("value", "level", "before", "p", "leaks"),
    [
        (0.3, 0.25, 0.9, 0.0, False),  # a holdout says more than the model before
        (0.3, 0.1, 0.9, 0.04, True),
        (0.3, 0.1, 0.9, 0.05, None),  # which chance explains
        (0.3, 0.1, 0.9, None, True),  # where it is not known
        (0.5, None, 0.9, None, True),  # more than half
        (0.45, None, 0.9, None, False),
        (0.09, None, 0.12, None, None),  # little, but not much less than before
        (0.05, None, 0.12, None, False),
        (0.05, None, 0.1, None, None),  # there was nothing to lose
        (0.6, None, 0.1, None, True),
        (0.6, None, None, None, True),
        (0.5, None, None, None, None),
    ],
)
def test_each_yardstick(value, level, before, p, leaks):
    assert Attack("", value, level, p).leaks(before) is leaks
    own, beside = beside_holdout(value, level, before)
    assert beside_holdout(value, level, before, others=[value + 0.004])[:2] == (f"{value:.1%}", f"{value + 0.004:.1%}")
    assert own == f"{value:.0%}" and ("--holdout" in beside) == (level is None)


def test_the_score_that_changed_least_decides():
    def rows(level, standard):
        return membership.scored([TokenScores([level - n], [standard - n], [True], [1.0]) for n in range(4)], [8] * 4)

    result = membership.judge_against_before(rows(-50.0, 0.0), rows(-1.0, 0.0), recited=1.0)
    assert result.figures["loss_fell"] == 1 and result.figures["min_k_pp_fell"] == pytest.approx(0.5)
    assert result.leaks is True and "(min_k_pp)" in result.meaning and "50% of pairs" in result.meaning
    assert membership.judge_against_before(rows(-50.0, -50.0), rows(-1.0, 0.0), recited=1.0).leaks is False


def test_little_that_could_have_fallen():
    """Where the model hardly wrote the answers before, nothing says that much is left."""
    rows = membership.scored([TokenScores([-1.0 - n] * 9, [0.0] * 9, [False] * 9, [1.0] * 9) for n in range(2)], [8, 8])
    result = membership.judge_against_before(rows, rows, recited=0.0)
    assert result.leaks is None and "hardly wrote these answers" in result.meaning
    assert membership.judge_against_before(rows, rows, recited=1.0).leaks is True


def test_its_words():
    row = TokenScores([-0.5] * 4, [0.0] * 4, [False, True, True, True], [1.0] * 4)
    result = extraction.judge([row], None, before=1.0)
    assert "the last 75% of a forgotten answer" in result.meaning and "before it forgot, 100%" in result.meaning
    assert result.leaks is True and not math.isnan(result.figures["nll"])
