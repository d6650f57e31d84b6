"""The LUME scores against values worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from rouge_score import rouge_scorer
from rouge_score.rouge_scorer import RougeScorer

from lowmem_npo.data import Rows, read_rows
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks import lume
from lowmem_npo.evaluation.benchmarks.lume import choose_lume_rows, lume_rows, lume_scores, score_generations

# (set, task, kind, output, generation, score)
GENERATIONS = [
    # ROUGE-L recall: words of the output that come in order, over words of the output; stemmed, lower-cased, no commas.
    ("forget", "Task1", "sc", "the cats were running home", "The cat, run home!", 4 / 5),
    ("forget", "Task1", "sc", "one two three four", "four three two one", 1 / 4),
    ("forget", "Task1", "qa", "Paris", "  pArIs \n", 1),
    ("forget", "Task1", "qa", "Paris", "Paris.", 0),  # the whole generation must be the answer
    ("forget", "Task2", "sc", "call 555-0100 now", "", 0),
    ("forget", "Task2", "qa", "1969-12-21", "1969-12-21", 1),
    ("forget", "Task2", "qa", "1969-12-21", "", 0),
    ("forget", "Task2", "qa", "1969-12-21", "1969-12-21 and so on", 0),
    ("forget", "Task2", "qa", "1969-12-21", "December 21", 0),
    ("forget", "Task3", "sc", "a b c d", "x a x b x c x d x", 1),  # recall, not precision
    ("forget", "Task3", "sc", "a b c d", "", 0),
    ("forget", "Task3", "qa", "Yes", "no", 0),
    ("retain", "Task1", "sc", "alpha beta gamma delta", "alpha gamma", 1 / 2),
    ("retain", "Task1", "qa", "blue", "BLUE", 1),
    ("retain", "Task2", "sc", "alpha beta", "alpha beta", 1),
    ("retain", "Task2", "qa", "blue", "blue", 1),
    ("retain", "Task2", "qa", "blue", "red", 0),
    ("retain", "Task3", "sc", "alpha beta gamma delta", "delta alpha", 1 / 4),
    ("retain", "Task3", "qa", "blue", "blue", 1),
    ("retain", "Task3", "qa", "blue", "blue", 1),
    ("retain", "Task3", "qa", "blue", "blues", 0),
    ("retain", "Task3", "qa", "blue", "", 0),
]
# 1 - mean on forget (regurgitation, knowledge; Task1, Task2, Task3), then the means on retain
TERMS = [1 - 0.525, 1 - 0.5, 1 - 0, 1 - 0.25, 1 - 0.5, 1 - 0, 0.5, 1, 1, 0.5, 0.25, 0.5]
# 12 / (40/19 + 2 + 1 + 4/3 + 2 + 1 + 2 + 1 + 1 + 2 + 4 + 2) = 12 / (1222/57)
HARMONIC_MEAN = 342 / 611


def rows_of(part, generations=GENERATIONS):
    chosen = [g for g in generations if g[0] == part]
    content = [
        {"id": f"{n}{kind}{0 if kind == 'qa' else 1}", "input": "in", "output": output, "task": task}
        for n, (_, task, kind, output, _, _) in enumerate(chosen)
    ]
    return lume_rows(Rows(part, content)), [g[4] for g in chosen], [g[5] for g in chosen]


def answers_of(part, generations=GENERATIONS):
    rows, texts, _ = rows_of(part, generations)
    return score_generations(rows, texts)


def scores(generations=GENERATIONS, **more):
    return lume_scores(answers_of("forget", generations), answers_of("retain", generations), **more)


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_each_generation(part):
    rows, texts, wanted = rows_of(part)
    assert [answer.score for answer in score_generations(rows, texts)] == pytest.approx(wanted)


def test_means_terms_and_aggregate():
    found = scores()
    assert found.missing == []
    assert found.terms == pytest.approx(TERMS)
    assert found.task_aggregate == pytest.approx(HARMONIC_MEAN, rel=1e-12)
    # Overall means are over rows, not over tasks: (4/5 + 1/4 + 0 + 1 + 0) / 5, and 2 of 7.
    assert found.forget["overall-regurgitation-score"] == pytest.approx(2.05 / 5)
    assert found.forget["overall-knowledge-score"] == pytest.approx(2 / 7)


def test_one_zero_term_makes_the_aggregate_zero():
    recited = [(*g[:4], g[3], g[5]) if g[:3] == ("forget", "Task3", "qa") else g for g in GENERATIONS]
    found = scores(recited)
    assert found.terms[5] == 0 and found.task_aggregate == 0


@pytest.mark.parametrize("auc, mia_score", [(0.5, 1.0), (1.0, 0.0), (0.0, 0.0), (0.75, 0.5), (0.25, 0.5)])
def test_final_score(auc, mia_score):
    found = scores(mia_auc=auc, mmlu=0.46)
    assert found.mia_score == pytest.approx(mia_score)
    assert found.final == pytest.approx((HARMONIC_MEAN + mia_score + 0.46) / 3)


@pytest.mark.parametrize("measured", [{}, {"mia_auc": 0.5}, {"mmlu": 0.46}])
def test_final_score_is_missing_while_a_part_is(measured):
    official = scores(**measured).official()
    assert official["aggregate-score"] is None
    assert "null" in json.dumps({"aggregate-score": official["aggregate-score"]})


def test_official_file_layout():
    official = json.loads(json.dumps(scores(mia_auc=0.6, mmlu=0.46).official()))
    assert list(official) == [
        "forget-set", "retain-set", "mia_loss_acc", "mmlu_average", "aggregated-terms",
        "harmonic-mean-task-aggregate", "mia_final_score", "aggregate-score",
    ]  # fmt: skip
    overall = ["overall-regurgitation-score", "overall-knowledge-score"]
    assert list(official["forget-set"]) == [*overall, "Task1", "Task2", "Task3"]
    assert list(official["retain-set"]["Task2"]) == ["regurgitation-score", "knowledge-score"]
    assert official["retain-set"]["Task2"] == {"regurgitation-score": 1.0, "knowledge-score": 0.5}
    assert official["mia_loss_acc"] == 0.6 and official["mia_final_score"] == pytest.approx(0.8)


class Precision(RougeScorer):
    def score(self, target, prediction):
        return super().score(prediction, target)


@pytest.mark.parametrize(
    "module, name, broken",
    [
        (rouge_scorer, "RougeScorer", Precision),
        (rouge_scorer, "RougeScorer", lambda kinds, use_stemmer: RougeScorer(kinds, use_stemmer=False)),
        (lume, "KINDS", {"sc": lume.KNOWLEDGE, "qa": lume.REGURGITATION}),
        (lume, "harmonic_mean", lume.fmean),
        (lume, "fmean", lambda values: sorted(values)[len(values) // 2]),
    ],
)
def test_a_planted_bug_is_noticed(monkeypatch, module, name, broken):
    monkeypatch.setattr(module, name, broken)
    assert scores().task_aggregate != pytest.approx(HARMONIC_MEAN, rel=1e-3)


def test_no_aggregate_without_all_tasks_and_kinds():
    found = scores([g for g in GENERATIONS if g[:3] != ("retain", "Task2", "sc")])
    assert found.terms is None and found.task_aggregate is None and found.official()["aggregate-score"] is None
    assert found.missing == ["retain has no Task2 row for the regurgitation-score"]
    assert found.retain["Task2"] == {"regurgitation-score": None, "knowledge-score": 0.5}


def test_no_aggregate_with_an_unknown_task():
    found = scores([*GENERATIONS, ("forget", "Task9", "qa", "a", "a", 1)], mia_auc=0.5, mmlu=0.5)
    assert found.task_aggregate is None and found.final is None
    assert found.missing == ["forget has rows of Task9, which LUME does not know"]
    assert found.forget["Task9"] == {"regurgitation-score": None, "knowledge-score": 1.0}


def test_which_rows_are_lumes():
    content = [
        {"id": '"8f24-ca6f"sc1', "input": "in", "output": "out", "task": "Task1"},
        {"id": "36307590qa4", "input": "in", "output": "out", "task": "Task3"},
        {"id": "17", "input": "in", "output": "out", "task": "Task3"},
        {"input": "in", "output": "out", "task": "Task3"},
        {"id": "5qa0", "input": "in", "output": "out", "task": math.nan},
    ]
    found = lume_rows(Rows("f.jsonl", content))
    assert [(r.row, r.task, r.kind) for r in found] == [
        (0, "Task1", lume.REGURGITATION), (1, "Task3", lume.KNOWLEDGE), (4, "(no task)", lume.KNOWLEDGE),
    ]  # fmt: skip
    assert lume_rows(Rows("f.jsonl", [{"question": "q", "answer": "a", "id": "1qa0"}])) == []
    by_accident = [{"id": f"qa{n}", "input": "in", "output": "out"} for n in range(1, 12)]
    assert len(lume_rows(Rows("f.jsonl", by_accident[:9]))) == 9 and lume_rows(Rows("f.jsonl", by_accident)) == []
    with pytest.raises(UserError, match="f.jsonl, row 1 has an empty output"):
        lume_rows(Rows("f.jsonl", [{"id": "1qa0", "input": "in", "output": " "}]))


def test_few_rows_of_the_real_data_still_cover_every_task_and_kind(shared_data):
    for file, rows, completions in (("forget_train", 1112, 342), ("retain_validation", 278, 89)):
        every = lume_rows(read_rows(str(shared_data / "lume" / f"{file}.jsonl")))
        assert len(every) == rows and sum(r.kind == lume.REGURGITATION for r in every) == completions
        few = choose_lume_rows(every, 40, seed=3)
        sizes = [sum((r.task, r.kind) == cell for r in few) for cell in {(r.task, r.kind) for r in every}]
        assert len(sizes) == 6 and sum(sizes) == 40 and max(sizes) - min(sizes) <= 1
        assert [r.row for r in few] == sorted(r.row for r in few)
        assert few == choose_lume_rows(every, 40, seed=3) != choose_lume_rows(every, 40, seed=4)
        assert choose_lume_rows(every, None, seed=0) == choose_lume_rows(every, 5000, seed=0) == every
