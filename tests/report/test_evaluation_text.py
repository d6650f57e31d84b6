"""The tables of `lowmem-npo evaluate`: every figure is in its place, and what was not measured is called missing."""

from __future__ import annotations

import json

import pytest

from lowmem_npo.evaluation.benchmarks.documents import MembershipScore
from lowmem_npo.evaluation.benchmarks.lume import KNOWLEDGE, REGURGITATION, TASKS, LumeAnswer, LumeRow, lume_scores
from lowmem_npo.evaluation.benchmarks.tofu import TofuScores, TofuSet
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.report.evaluation_text import evaluation_text, leaks_text


def answers(score):
    cells = [(task, kind) for task in TASKS for kind in (REGURGITATION, KNOWLEDGE)]
    return [LumeAnswer(LumeRow(n, str(n), *cell, "in", "out"), "text", score) for n, cell in enumerate(cells)]


def evaluation(forget, retain, auc, mmlu=None, utility=None):
    lm_eval = {} if mmlu is None else {"mmlu": {"acc": mmlu}}
    scores = {
        "lume": lume_scores(answers(forget), answers(retain), mia_auc=auc, mmlu=mmlu),
        "membership": MembershipScore(auc, 50, 50, False),
        "tofu": TofuScores({"forget": TofuSet(6, 0.125, 0.25, 0.0000123, [1.0])}, utility, None),
        "lm_eval": lm_eval,
    }
    rows = {"forget": {"scored": 6, "in_set": 60}, "retain": {"scored": 6, "in_set": 6}}
    return Evaluation(rows=rows, scores=scores, notes=["Something to know."]).to_json()


def line(text, *words):
    """The cells of the first line that begins with these words."""
    lines = (line.split() for line in text.splitlines())
    return next(cells for cells in lines if cells[: len(words)] == list(words))


def test_one_evaluation():
    text = evaluation_text(evaluation(forget=0.25, retain=0.5, auc=0.9), {})
    assert "LUME, SemEval-2025 Task 4 (6 of 60 forget rows, all 6 retain rows)" in text
    assert line(text, "forget", "regurgitation,", "all", "tasks")[4] == "0.250"
    assert line(text, "regurgitation,", "Task1")[2] == "0.250"
    assert line(text, "retain", "regurgitation,", "all", "tasks")[4] == "0.500"
    assert line(text, "task", "aggregate")[2] == "0.600"  # 12 / (6 / 0.75 + 6 / 0.5)
    assert line(text, "membership", "score")[2] == "0.200"
    assert line(text, "MMLU")[1:3] == ["missing", "needs"]
    assert line(text, "final", "score")[2:4] == ["missing", "needs"]
    assert line(text, "document", "membership", "AUC")[3] == "0.900" and "members are still more likely" in text
    assert line(text, "truth", "ratio")[2] == "1.2e-05"
    assert line(text, "model", "utility")[2] == "missing"
    assert text.startswith("Note: Something to know.\n\n")  # before the figures that it qualifies


def test_no_traces_as_before_tell_nothing():
    none, some = (LeakResult({"rows": 9}, "Nothing.", leaks) for leaks in (False, True))
    assert leaks_text({"extraction": none}, {"extraction": none}) == (
        "extraction: no traces found (before: no traces found)\n"
        "    Nothing. It found no traces before the model forgot either, so it tells nothing of that."
    )
    assert leaks_text({"extraction": none}, {"extraction": some}).endswith("\n    Nothing.")


def test_a_single_row():
    content = evaluation(forget=0.25, retain=0.5, auc=0.9)
    content["rows"]["forget"] = {"scored": 1, "in_set": 1}
    content["fluency"] = {"forget": {"rows": 1, "silent": 0, "nll": 2.0}}
    text = evaluation_text(content, {})
    assert "(the only forget row, all 6 retain rows)" in text and "(1 answer)" in text


def test_compared_with_an_earlier_one():
    before = json.loads(json.dumps(evaluation(forget=1.0, retain=0.5, auc=0.9, mmlu=0.5)))
    text = evaluation_text(evaluation(forget=0.25, retain=0.5, auc=0.3, mmlu=0.4, utility=0.7), before)
    assert line(text, "regurgitation,", "Task1")[2:4] == ["1.000", "0.250"]
    assert line(text, "task", "aggregate")[2:4] == ["0.000", "0.600"]
    assert line(text, "MMLU")[1:3] == ["0.500", "0.400"]
    assert line(text, "final", "score")[2:4] == ["0.233", "0.533"]  # (0 + 0.2 + 0.5) / 3, (0.6 + 0.6 + 0.4) / 3
    assert line(text, "document", "membership", "AUC")[3:5] == ["0.900", "0.300"]
    assert "members are now less likely" in text
    assert line(text, "model", "utility")[2:4] == ["missing", "0.700"]
    assert line(text, "mmlu", "mmlu,", "acc")[3:5] == ["0.500", "0.400"]


@pytest.mark.parametrize("benchmark", ["lume", "tofu", "membership"])
def test_figures_that_no_benchmark_declares_are_refused(benchmark):
    content = evaluation(forget=0.25, retain=0.5, auc=0.9)
    content[benchmark] = {**content[benchmark], "surprise": 0.5}
    with pytest.raises(ValueError, match="'surprise' is no figure of"):
        evaluation_text(content, {})
