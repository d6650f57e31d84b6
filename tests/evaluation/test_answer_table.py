"""The before/after table: right numbers in the right cells, in a terminal's width, and back from JSON."""

from __future__ import annotations

import json

import pytest

from lowmem_npo.evaluation.answer_table import markdown_table, save_table, stages_to_json, table_rows, text_table
from lowmem_npo.evaluation.answers import AnswerSummary


def summary(nll, probability, rouge, exact, rows=64, of=1112):
    return AnswerSummary(rows, of, 5120, nll, probability, rouge, exact, appears=exact, max_new_tokens=64)


@pytest.fixture
def stages():
    return {
        "before": {"forget": summary(0.0042, 0.9958, 1.0, 1.0), "retain": summary(0.01, 0.99, 0.98, 0.97, 132, 132)},
        "after": {"forget": summary(12.5, 0.0, 0.1234, 0.0), "retain": summary(0.02, 0.98, 0.97, 0.96, 132, 132)},
    }


def test_each_number_stands_in_its_cell(stages):
    assert table_rows(stages) == [
        ["set", "measure", "before", "after", "change", "wished"],
        ["forget", "NLL per answer token", "0.004", "12.500", "+12.496", "higher"],
        ["forget", "answer probability", "0.996", "0.000", "-0.996", "lower"],
        ["forget", "ROUGE-L recall", "1.000", "0.123", "-0.877", "lower"],
        ["forget", "answer appears", "1.000", "0.000", "-1.000", "lower"],
        ["forget", "exact match", "1.000", "0.000", "-1.000", "lower"],
        ["retain", "NLL per answer token", "0.010", "0.020", "+0.010", "as before"],
        ["retain", "answer probability", "0.990", "0.980", "-0.010", "as before"],
        ["retain", "ROUGE-L recall", "0.980", "0.970", "-0.010", "as before"],
        ["retain", "answer appears", "0.970", "0.960", "-0.010", "as before"],
        ["retain", "exact match", "0.970", "0.960", "-0.010", "as before"],
    ]


def test_a_gold_standard_takes_the_place_of_the_change(stages):
    stages["gold"] = {"forget": summary(11.0, 0.01, 0.2, 0.0), "retain": summary(0.01, 0.99, 0.99, 0.98)}
    header, forget_nll, *_ = table_rows(stages)
    assert header == ["set", "measure", "before", "after", "gold", "wished"]
    assert forget_nll == ["forget", "NLL per answer token", "0.004", "12.500", "11.000", "as gold"]


def test_a_terminal_can_show_it(stages):
    for extra in ((), ("gold",), ("gold", "merged")):
        text = text_table(stages | {name: stages["after"] for name in extra})
        assert max(map(len, text.splitlines())) <= 80
    lines = text_table(stages).splitlines()
    ends = {line.index("before") + len("before") for line in lines[:1]}
    assert {line.index("0.004") + 5 for line in lines if "0.004" in line} == ends  # numbers end under their heading
    assert sum(line.startswith("forget") for line in lines) == 1  # a set is named once
    assert " ".join(lines[-2:]) == (
        "Measured on 64 of 1112 forget rows (5,120 answer tokens) and all 132 retain rows (5,120 answer tokens), "
        "greedy answers of up to 64 tokens."
    )


def test_a_run_without_retain_rows(stages):
    forget_only = {stage: {"forget": sets["forget"]} for stage, sets in stages.items()}
    assert {row[0] for row in table_rows(forget_only)[1:]} == {"forget"}
    assert "retain" not in text_table(forget_only)


def test_markdown_has_a_cell_for_every_heading(stages):
    lines = markdown_table(stages).splitlines()
    assert lines[0] == "| set | measure | before | after | change | wished |"
    assert {line.count("|") for line in lines[:10]} == {7}


def test_the_files_hold_full_precision(stages, tmp_path):
    paths = save_table(stages, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["before_after.json", "before_after.md"]
    assert json.loads(paths[0].read_text()) == stages_to_json(stages)
    assert paths[1].read_text() == markdown_table(stages)


def test_figures_that_differ_are_not_printed_equal(stages):
    close = {"before": {"forget": summary(0.00812, 0.99123, 1.0, 1.0)}}
    close["after"] = {"forget": summary(0.00813, 0.99124, 1.0, 1.0)}
    (_, nll, probability, recall, *_) = table_rows(close)
    assert nll[2:5] == ["0.00812", "0.00813", "+1.0e-05"] and probability[2:4] == ["0.99123", "0.99124"]
    assert recall[2:5] == ["1.000", "1.000", "+0.000"]
    tiny = {"before": {"forget": summary(9, 3e-9, 0, 0)}, "after": {"forget": summary(9, 1e-8, 0, 0)}}
    assert table_rows(tiny)[2][2:4] == ["3.0e-09", "1.0e-08"]


def test_other_forms_stand_beside_the_trained_one(stages):
    """A stage that was not asked in a form has a dash there."""
    for stage in ("before", "after"):
        forms = {"forget": stages[stage]["forget"], "forget, plain": summary(1.0, 0.5, 0.5, 0.25)}
        stages[stage] = {**forms, "retain": stages[stage]["retain"]}
    stages["gold"] = {"forget": summary(11.0, 0.01, 0.2, 0.0), "retain": summary(0.01, 0.99, 0.99, 0.98)}
    rows = {tuple(row[:2]): row[2:] for row in table_rows(stages)}
    assert rows["forget, plain", "answer probability"] == ["0.500", "0.500", "–", "as gold"]
    text = text_table(stages)
    assert text.count("forget, plain") == 1 and max(map(len, text.splitlines())) <= 80
    assert "forget, plain rows" not in " ".join(text.splitlines()[-3:])  # the same rows are not counted twice
