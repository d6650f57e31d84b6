"""`train` runs the requested leak tests, and only those, before and after, and saves their results."""

from __future__ import annotations

import json
from functools import partial

import yaml
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.evaluation.leaks.registry import LeakOptions


def test_the_demo_saves_its_leaks(small_demo):
    result, printed = small_demo
    leaks = json.loads((result.directory / "unlearned" / "leaks.json").read_text())
    assert list(leaks["before"]) == ["extraction", "membership"]
    assert list(leaks["after"]) == list(leaks["gold"]) == ["extraction", "membership", "relearning"]
    before, after = leaks["before"], leaks["after"]
    assert before["extraction"]["extraction_strength"] == 1 and before["extraction"]["leaks"] is True
    assert after["extraction"]["extraction_strength"] < 0.2
    assert before["membership"]["loss_auc"] > 0.99 and before["membership"]["rows"] == 12
    assert after["extraction"]["nll"] > 20 * before["extraction"]["nll"]
    assert "(before: traces found)" in printed
    worst = leaks["worst_attack"]
    assert (worst["before"]["test"], worst["before"]["value"], worst["after"]["test"]) == (
        "extraction",
        1,
        "relearning",
    )
    assert worst["after"]["gold"] < 0.1 < worst["after"]["value"] and worst["gold"]["value"] < 0.1
    page = (result.directory / "unlearned" / "report.html").read_text()
    assert "Worst attack" in page and "<small>gold 0.0" in page and "The most comes back by teaching" in page


def train(model, folder, *more):
    return main(["train", "--model", str(model), "--dtype", "float32", "--device", "cpu", "--max-steps", "1",
                 "--limit", "4", "--eval-rows", "3", "--output-dir", str(folder), *more])  # fmt: skip


def test_only_what_was_requested(byte_model, tmp_path, capsys, monkeypatch):
    few = partial(LeakOptions, relearn_steps=1, retune_steps=1)
    monkeypatch.setattr("lowmem_npo.evaluation.leaks.measure.LeakOptions", few)
    assert train(byte_model, tmp_path / "none", "--leaks", "none") == 0
    assert not (tmp_path / "none" / "leaks.json").exists()
    config = tmp_path / "none" / "run.yaml"
    assert yaml.safe_load(config.read_text())["leaks"] == ["none"]
    assert main(["train", "--config", str(config), "--dry-run", "--output-dir", str(tmp_path / "x")]) == 0
    capsys.readouterr()
    assert train(byte_model, tmp_path / "two", "--leaks", "relearning", "extraction") == 0
    leaks = json.loads((tmp_path / "two" / "leaks.json").read_text())
    assert set(leaks["after"]) == {"extraction", "relearning"} and set(leaks["before"]) == {"extraction"}
    assert leaks["after"]["extraction"]["rows"] == 3 and leaks["after"]["relearning"]["shown_rows"] in (1, 2)
    other = ("--leaks", "retuning", "jailbreak", "rewording", "--max-new-tokens", "4")
    assert train(byte_model, tmp_path / "other", *other) == 0
    leaks = json.loads((tmp_path / "other" / "leaks.json").read_text())
    assert set(leaks["before"]) == {"jailbreak", "rewording"} and leaks["after"]["jailbreak"]["ways"] == 8
    assert {"1 steps on the retain rows, lr 0.001", "1 steps on general texts, lr 0.001"} <= set(
        leaks["after"]["retuning"]
    )
    assert "--paraphrase-column" in leaks["after"]["rewording"]["meaning"]
    assert train(byte_model, tmp_path / "bad", "--leaks", "extractoin") == 2
    assert "no leak test 'extractoin'" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_the_holdout_is_asked_in_its_own_paraphrases(byte_model, tmp_path, capsys):
    """Where it has the column that is named, in whatever case, in `train` as in `evaluate`."""
    rows = {"forget": "other", "retain": "more", "holdout": "Other"}
    for part, column in rows.items():
        lines = [{"question": f"Who is {part} {n}?", "answer": f"{n}.", column: f"Wer ist {n}?"} for n in range(4)]
        write_rows(tmp_path / f"{part}.jsonl", lines)
    data = [word for part in rows for word in (f"--{part}", str(tmp_path / f"{part}.jsonl"))]
    asked = ("--leaks", "rewording", "--paraphrase-column", "other", "--max-new-tokens", "2")
    assert train(byte_model, tmp_path / "run", *data, *asked) == 0
    assert "holdout.jsonl, columns question/answer, written as" in (printed := capsys.readouterr().out)
    assert "not read: more" in printed and "Other" not in printed
    evaluated = ["evaluate", "--adapter", str(tmp_path / "run"), "--device", "cpu", "--leaks", "rewording"]
    assert main(evaluated) == 0
    results = [
        json.loads((tmp_path / "run" / file).read_text()) for file in ("leaks.json", "evaluation/evaluation.json")
    ]
    for result in (results[0]["after"], results[1]["leaks"]):
        assert "holdout_best_rouge_l_recall" in result["rewording"]["reworded"]
