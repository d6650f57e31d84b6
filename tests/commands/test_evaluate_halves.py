"""The half of a holdout by which runs with --forget-level are judged: their adapters, and other models beside it."""

from __future__ import annotations

import json

import pytest
from helpers.evaluating import fails, result
from helpers.leaking import FORGET, HOLDOUT, evaluate, rows_in
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.evaluation.open_unlearning import privleak
from lowmem_npo.report.content import read_content
from lowmem_npo.training import forget_level


@pytest.fixture
def files(tmp_path):
    return rows_in(tmp_path)


def test_figures_of_a_holdout_of_which_a_part_set_levels_are_compared_with_those_of_that_part(
    byte_model, files, capsys, monkeypatch
):
    """Of the adapter what did not set its levels is measured; of the model before, and of a gold one, the whole
    holdout, or under --forget-level the same half: though all name the same file."""
    rows, tests = [str(files / "forget.jsonl"), "--holdout"], ["--leaks", "membership"]
    unseen = [*HOLDOUT, *({"question": f"Who is {n}?", "answer": f"The {n} of {n * 2}."} for n in range(10, 16))]
    write_rows(files / "holdout.jsonl", unseen)
    training = ["--forget-level", "holdout", "--max-steps", "1", "--eval-rows", "0", "--leaks", "none"]
    training += ["--retain", str(write_rows(files / "retain.jsonl", FORGET[:1])), "--allow-overlap"]
    run = ["--forget", *rows, str(files / "holdout.jsonl"), *training, "--output-dir", str(files / "run")]
    assert main(["train", "--model", str(byte_model), "--device", "cpu", "--dtype", "float32", *run]) == 0
    assert evaluate(byte_model, files, *tests, out="all") == 0

    def of_adapter(earlier):
        log = str(files / earlier / "evaluation.json")
        more = [*tests, "--adapter", str(files / "run"), "--before", log, "--retained-log", log]
        assert evaluate(byte_model, files, *more, out=f"beside-{earlier}") == 0
        printed, found = capsys.readouterr().out, result(files, f"beside-{earlier}")
        min_k = found["open_unlearning"]["mia_min_k"]
        found["beside"] = next(  # what privleak is compared with
            level
            for level in (result(files, earlier)["open_unlearning"]["mia_min_k"], 0.5)
            if found["open_unlearning"]["privleak"] == pytest.approx(privleak(min_k, level))
        )
        return found, printed

    beside_all, printed = of_adapter("all")
    judged = holdout_rows(files / "beside-all")
    assert 0 < len(judged) < len(unseen) == result(files, "all")["leaks"]["membership"]["holdout_rows"]
    assert result(files, "all")["open_unlearning"]["mia_min_k"] != 0.5, "else the two cannot be told apart"
    assert any("other holdout rows" in note for note in beside_all["notes"])
    assert "privleak is compared with 0.5: the evaluation of --retained-log had another holdout." in beside_all["notes"]
    assert beside_all["beside"] == 0.5 and "(before:" not in printed
    assert "mia_reference" in beside_all["open_unlearning"], "which goes row by row"
    halved = [*tests, "--forget-level", "holdout"]
    assert evaluate(byte_model, files, *halved, out="half") == 0
    assert holdout_rows(files / "half") == judged
    beside_half, printed = of_adapter("half")
    assert not any(f"{word} holdout" in note for note in beside_half["notes"] for word in ("other", "another"))
    assert beside_half["beside"] == result(files, "half")["open_unlearning"]["mia_min_k"] and "(before:" in printed
    monkeypatch.setattr(forget_level, "SEED", 1)  # other halves than those of training are other rows
    assert evaluate(byte_model, files, *halved, out="other") == 0
    beside_other, printed = of_adapter("other")
    assert any("other holdout rows" in note for note in beside_other["notes"])
    assert beside_other["beside"] == 0.5 and "(before:" not in printed


def test_an_adapter_without_levels_is_measured_beside_the_half_that_judges_others(byte_model, files, capsys):
    """That is another holdout than its run's."""
    training = ["--retain", str(write_rows(files / "retain.jsonl", FORGET[:1])), "--allow-overlap", "--max-steps", "1"]
    sets = ["--forget", str(files / "forget.jsonl"), "--holdout", str(files / "holdout.jsonl")]
    training += [*sets, "--leaks", "extraction", "--output-dir", str(files / "run")]
    assert main(["train", "--model", str(byte_model), "--device", "cpu", "--dtype", "float32", *training]) == 0
    halved = ["--leaks", "extraction", "--forget-level", "holdout"]
    assert evaluate(byte_model, files, *halved, out="half") == 0
    capsys.readouterr()
    of_run = [*halved, "--adapter", str(files / "run"), "--before", str(files / "half" / "evaluation.json")]
    assert evaluate(byte_model, files, *of_run, out="run/evaluation") == 0
    assert "(before:" in capsys.readouterr().out
    assert holdout_rows(files / "run" / "evaluation") == holdout_rows(files / "half")
    notes = result(files, "run/evaluation")["notes"]
    assert "2 of 5 holdout rows would set the levels of a run with --forget-level, and are left out." in notes
    notes = "\n".join(read_content(files / "run").notes)
    assert "extraction: 'evaluation' measured it with another --forget-level" in notes


def holdout_rows(place):
    rows = map(json.loads, (place / "rows.jsonl").read_text().splitlines())
    return [row["row"] for row in rows if row["set"] == "holdout"]


def test_half_of_a_holdout_is_asked_for_where_there_is_one_and_from_the_beginning(byte_model, files, capsys):
    half, tests = ["--forget-level", "holdout"], ["--leaks", "membership"]
    fails(capsys, evaluate(byte_model, files, *half), "which holdout rows the leak tests compare with: add --leaks.")
    fails(capsys, evaluate(byte_model, files, *half, *tests, holdout=False), "half of the holdout: name it with")
    assert evaluate(byte_model, files, *tests) == 0
    part = "the part of the holdout that is measured has changed"
    fails(capsys, evaluate(byte_model, files, *tests, *half, "--resume"), part)
    assert evaluate(byte_model, files, out="half") == 0
    assert evaluate(byte_model, files, *tests, *half, "--resume", out="half") == 0  # nothing else was measured
    fails(capsys, evaluate(byte_model, files, *tests, *half[:1], "none", "--resume", out="half"), part)
    assert evaluate(byte_model, files, "--resume", out="half") == 0  # what is not given stays as it began
    assert result(files, "half")["leaks"]["membership"]["holdout_rows"] == 3
    assert evaluate(byte_model, files, "--leaks", "none", "--resume", out="half") == 0
    write_rows(files / "holdout.jsonl", HOLDOUT[:1])
    fails(capsys, evaluate(byte_model, files, *tests, *half, out="few"), "others to be judged by; there is one.")
