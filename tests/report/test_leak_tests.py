"""The leak tests of a report: every figure once, beside its holdout's, with a meaning."""

from __future__ import annotations

import pytest

from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.report.leak_tests import leak_sections

STAGES = {
    "before": {"membership": {"rows": 4, "loss_auc": 1.0, "loss_all_equal": False, "meaning": "Known.", "leaks": True}},
    "after": {
        "membership": {"rows": 4, "loss_auc": 0.5, "loss_all_equal": False, "meaning": "A coin.", "leaks": False},
        "relearning": {
            "steps": 20,
            "extraction_strength": 0.25,
            "holdout_extraction_strength": 0.125,
            "before": {"extraction_strength": 0.0, "holdout_extraction_strength": 0.0625},
            "meaning": "A quarter came back.",
            "leaks": None,
        },
    },
}


def results(stages):
    return {stage: {n: LeakResult.from_json(r) for n, r in tests.items()} for stage, tests in stages.items()}


def test_each_figure_is_listed_once_beside_its_holdouts():
    membership, relearning = leak_sections(results(STAGES))
    assert membership.verdicts == {"before": ("traces found", "bad"), "after": ("no traces found", "good")}
    assert membership.meaning == "A coin." and membership.counts == "4 rows"
    assert [(f.title, f.values) for f in membership.figures] == [("loss AUC", {"before": 1.0, "after": 0.5})]
    assert relearning.verdicts == {"after": ("cannot tell", "unknown")} and relearning.counts == "20 steps"
    assert [(f.key, f.values, f.never_seen) for f in relearning.figures] == [
        ("extraction_strength", {"after": 0.25}, {"after": 0.125}),
        ("before.extraction_strength", {"after": 0.0}, {"after": 0.0625}),
    ]
    assert all(test.figures[0].meaning for test in (membership, relearning))
    assert relearning.figures[1].meaning == "", "once is enough"


def test_no_traces_as_before_is_no_good_news():
    """Beside a holdout both times; else it is."""
    coin = STAGES["after"]["membership"]
    (same,) = leak_sections(results({"before": {"membership": coin}, "after": {"membership": coin}}))
    assert same.verdicts == {"before": ("no traces found", "good"), "after": ("no traces found, as before", "unknown")}
    assert same.meaning == "A coin. It found no traces before the model forgot either, so it tells nothing of that."
    for before in ({**coin, "leaks": None}, {**coin, "against_before": True}):
        (other,) = leak_sections(results({"before": {"membership": before}, "after": {"membership": coin}}))
        assert other.verdicts["after"] == ("no traces found", "good") and other.meaning == "A coin."
    (gold,) = leak_sections(results({"before": {"membership": coin}, "gold": {"membership": coin}}))
    assert gold.verdicts["gold"] == ("no traces found", "good")


def test_no_tests_no_lines():
    assert leak_sections({}) == []


def test_undeclared_tests_and_figures_are_errors():
    unknown = {"membership": {"rows": 4, "surprise": 1.0, "meaning": "Known.", "leaks": True}}
    with pytest.raises(ValueError, match="'surprise' is no figure of the leak test 'membership'"):
        leak_sections(results({"after": unknown}))
    with pytest.raises(ValueError, match="no leak test 'telepathy'"):
        leak_sections(results({"after": {"telepathy": {"meaning": "", "leaks": None}}}))


def test_every_figure_of_the_real_tests_has_a_meaning(byte_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem_npo.data import Example, Template, tokenize
    from lowmem_npo.evaluation.asking import Wording
    from lowmem_npo.evaluation.leaks.measure import measure_leaks
    from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, LeakOptions

    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    rows = [
        tokenize([Example(f"{who} {n}?", f"Yes {n}.", "here", "question/answer") for n in range(2)], tokenizer)
        for who in ("Known", "Unknown")
    ]
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    wording = Wording({"forget": rows[0].examples, "holdout": rows[1].examples}, Template(), 128)
    measured = measure_leaks(
        model, tokenizer, rows[0], holdout_rows=rows[1], retain_rows=rows[1], general_rows=rows[1], wording=wording,
        tests=WHILE_TRAINING, options=LeakOptions(relearn_steps=1, retune_steps=1), max_new_tokens=8, progress=False,
    )  # fmt: skip
    tests = leak_sections({"after": measured})
    assert [test.name for test in tests] == list(measured)
    for test in tests:
        known: set[str] = set()
        for figure in test.figures:
            key = figure.key.rpartition(".")[2]
            alike = key.rpartition("_")[2] if key.endswith(("_auc", "_p")) else key
            assert figure.meaning or alike in known, f"{test.name}: {figure.key} is not explained"
            known.add(alike)
