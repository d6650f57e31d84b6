"""What a run names by relative paths is found from other directories, and when the whole tree has been moved."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
from helpers.reported_run import FORGET, RETAIN
from helpers.rows import write_rows
from safetensors.torch import load_file, save_file

from lowmem_npo.cli import main
from lowmem_npo.errors import UserError
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.run_directory import RunFiles, check_empty, finishing, from_here

TRAINING = ("--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--max-steps", "1", "--eval-rows", "0")


@pytest.fixture(scope="module")
def second(byte_model, tmp_path_factory):
    """A run that went on from another one, all named by relative paths; the tree has been moved since."""
    start = tmp_path_factory.mktemp("start")
    shutil.copytree(byte_model, start / "model")
    write_rows(start / "forget.jsonl", FORGET[:2])
    write_rows(start / "more.jsonl", FORGET[2:3])
    write_rows(start / "retain.jsonl", RETAIN)
    data = ["--forget", "forget.jsonl,more.jsonl", "--retain", "retain.jsonl", *TRAINING]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(start)
        first = ["--sam", "0.05", "--output-dir", "runs/first"]
        assert main(["train", "--model", "model", *data, *first]) == 0
        assert main(["train", "--adapter", "runs/first", *data, "--output-dir", "./runs/second"]) == 0
    return shutil.move(start, tmp_path_factory.mktemp("moved") / "tree") / "runs" / "second"


def test_evaluate(second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for model in ((), ("--model", str(second.parents[1] / "model"))):
        assert main(["evaluate", "--adapter", str(second), "--device", "cpu", *model, "--dry-run"]) == 0
        assert "3 forget rows" in capsys.readouterr().out


def test_what_a_report_prints_runs_in_any_directory(second, tmp_path, monkeypatch):
    """Of a run in a directory whose name a shell would divide."""
    tree = Path(shutil.copytree(second.parents[1], tmp_path / "tree"))
    run = RunFiles(shutil.move(tree / "runs" / "second", tree / "runs" / "the second's"))
    (tmp_path / "yonder").mkdir()
    monkeypatch.chdir(tmp_path / "yonder")
    assert main(["report", "../tree/runs/the second's"]) == 0
    printed = re.findall("lowmem-npo [^<]*", unescape(run.report_html.read_text()).partition("<body")[2])
    commands = [shlex.split(command)[1:] for command in printed if "runs" in command]
    assert [command[0] for command in commands] == ["train", "report"]
    write_rows(Path("forget.jsonl"), RETAIN)  # none of the run's
    write_rows(Path("rows.jsonl"), FORGET[:2])
    assert [main(command) for command in commands] == [0, 0]
    again = RunFiles(Path("again"))
    then, now = (load_file(of.weights) for of in (run, again))
    assert then.keys() == now.keys() and all(torch.equal(now[name], then[name]) for name in then)


def test_a_run_is_resumed_from_any_directory(byte_model, tmp_path, monkeypatch, capsys):
    """It goes on with its own data; the command that began it still does, where that was typed."""
    start = tmp_path / "start"
    shutil.copytree(byte_model, start / "model")
    write_rows(start / "forget.jsonl", FORGET[:2])
    write_rows(start / "retain.jsonl", RETAIN)
    monkeypatch.chdir(start)
    began = ["train", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl", *TRAINING]
    began += ["--output-dir", "the run"]
    assert main([*began, "--reference", "cached", "--reference-dir", "kept"]) == 0
    (start / "yonder").mkdir()
    monkeypatch.chdir(start / "yonder")
    write_rows(Path("forget.jsonl"), FORGET[2:4])  # none of the run's
    finishes = re.search("`lowmem-npo (.*)`", finishing(RunFiles(Path("../the run"))))
    assert finishes is not None
    assert main([*shlex.split(finishes[1]), "--max-steps", "2"]) == 0
    assert not Path("kept").exists() and sorted(path.name for path in Path.cwd().iterdir()) == ["forget.jsonl"]
    monkeypatch.chdir(start)
    assert main([*began, "--resume", "--max-steps", "3"]) == 0
    monkeypatch.chdir(start / "yonder")
    others = [word if word != "the run" else "../the run" for word in began]
    others[others.index("model")] = "../model"
    others[others.index("retain.jsonl")] = "../retain.jsonl"
    assert main([*others, "--resume", "--max-steps", "4"]) == 2
    assert "began with other settings (forget was" in capsys.readouterr().err


def test_an_evaluation_goes_on_from_another_directory(second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    again = ["evaluate", "--adapter", str(second), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    assert main(again) == 0
    monkeypatch.chdir(second.parents[1])
    assert main([*again, "--resume"]) == 0
    shutil.copytree("model", "another")
    assert main([*again, "--resume", "--model", "another", "--any-base"]) == 2
    assert "model was" in capsys.readouterr().err


def test_a_report_finds_what_the_evaluation_was_compared_with(second, tmp_path, monkeypatch):
    tree = Path(shutil.copytree(second.parents[1], tmp_path / "tree"))
    monkeypatch.chdir(tree)
    write_rows(Path("holdout.jsonl"), RETAIN)
    data = ["--forget", "forget.jsonl", "--holdout", "holdout.jsonl", "--leaks", "extraction", "--device", "cpu"]
    assert main(["evaluate", "--model", "model", *data, "--output-dir", "gold"]) == 0
    log = "gold/evaluation.json"
    assert main(["evaluate", "--adapter", "runs/second", *data, "--before", log, "--retained-log", log]) == 0
    moved = shutil.move(tree, tmp_path / "moved")
    monkeypatch.chdir("/")
    assert main(["report", str(moved / "runs" / "second")]) == 0
    report = json.loads(RunFiles(moved / "runs" / "second").report_json.read_text())
    assert set(report["leaks"]) == {"before", "after", "gold"} and report["worst_attack"]["after"]["gold"] is not None
    shutil.rmtree(moved / "gold")
    assert main(["report", str(moved / "runs" / "second")]) == 0
    report = json.loads(RunFiles(moved / "runs" / "second").report_json.read_text())
    gone = [note for note in report["notes"] if "no longer there" in note]
    assert [flag in note for flag, note in zip(("--before", "--retained-log"), gone, strict=True)] == [True, True]
    assert set(report["leaks"]) == {"after"}


def test_merge(second, tmp_path, monkeypatch, capsys, recwarn):
    """Its rows are measured, and what the first run made last is known; PEFT does not tell that the base's path is
    another one."""
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--adapter", str(second), "--output-dir", "out", "--quantize-check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "merged into whole weights, then 4-bit" in printed and "What --sam made last is a property" in printed
    assert not [one for one in recwarn if "base_model_name_or_path" in str(one.message)]


def test_a_tilde_is_the_home_directory(second, tmp_path, monkeypatch):
    """A shell leaves it in --output-dir=~/run, and so does a settings file: no directory of that name is made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copytree(second.parents[1] / "model", tmp_path / "home" / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "run.yaml").write_text("model: ~/model\nreference_dir: ~/reference\nreference: cached\n")
    run = ["train", "--limit", "4", *TRAINING, "--config=~/run.yaml", "--output-dir=~/runs/it"]
    assert main(run) == 0
    monkeypatch.chdir(tmp_path / "home")  # as a path that begins elsewhere
    resumed = ["train", "--resume", "--max-steps", "2", "--output-dir=~/runs/it"]
    sweep = ["sweep", "--limit", "4", *TRAINING, "--config=~/run.yaml", "--seeds", "1"]
    assert main(resumed) == main(["report", "~/runs/it"]) == 0
    assert main([*sweep, "--eval-rows", "1", "--output-dir=~/swept"]) == 0
    assert main(["evaluate", "--adapter=~/runs/it", "--device", "cpu", "--limit", "1", "--leaks", "none"]) == 0
    assert main(["merge", "--adapter=~/runs/it", "--output-dir=~/merged"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    there = {"model", "run.yaml", "reference", "runs", "swept", "merged"}
    assert {path.name for path in (tmp_path / "home").iterdir()} == there


def test_a_directory_is_called_by_its_name_wherever_a_report_is_written(second, tmp_path, monkeypatch):
    """Of a base or an adapter named by a dot that is known where the run is; the base need not be there any more."""
    tree = second.parents[1]
    run = ["train", "--forget", str(tree / "forget.jsonl"), "--retain", str(tree / "retain.jsonl"), *TRAINING]
    shutil.copytree(tree / "model", tmp_path / "basis")
    monkeypatch.chdir(tmp_path / "basis")
    assert main([*run, "--model", ".", "--output-dir", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(second)
    assert main([*run, "--adapter", ".", "--model", str(tree / "model"), "--output-dir", str(tmp_path / "again")]) == 0
    (tmp_path / "yonder").mkdir()
    monkeypatch.chdir(tmp_path / "yonder")
    shutil.rmtree(tmp_path / "basis")
    assert main(["report", str(tmp_path / "run")]) == main(["report", str(tmp_path / "again")]) == 0
    card = RunFiles(tmp_path / "run").model_card.read_text()
    assert 'from_pretrained("path/to/basis")' in card and "base_model" not in card and "yonder" not in card
    assert "the adapter in second;" in RunFiles(tmp_path / "again").model_card.read_text()


def test_where_a_run_was_started_is_known_whatever_its_output_directory(byte_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "start").mkdir()
    shutil.copytree(byte_model, tmp_path / "start" / "model")
    monkeypatch.chdir(tmp_path / "start")
    write_rows(Path("forget.jsonl"), FORGET[:2])
    write_rows(Path("retain.jsonl"), RETAIN)
    data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", *TRAINING]
    for place in (str(tmp_path / "runs" / "it"), "../runs/beside"):
        assert main(["train", "--model", "model", *data, "--output-dir", place]) == 0
    files = RunFiles(tmp_path / "runs" / "it")
    assert files.started_in.read_text() == "../../start" and "started_in" not in files.model_card.read_text()
    (tmp_path / "moved").mkdir()
    for part in ("start", "runs"):
        shutil.move(tmp_path / part, tmp_path / "moved" / part)
    monkeypatch.chdir("/")
    for name in ("it", "beside"):
        run = str(tmp_path / "moved" / "runs" / name)
        assert settings_of_run(run)["forget"] == str(tmp_path / "moved" / "start" / "forget.jsonl")
        assert main(["evaluate", "--adapter", run, "--device", "cpu", "--dry-run"]) == 0
        assert main(["ask", run, "Who?", "--device", "cpu", "--max-new-tokens", "1"]) == 0
        assert main(["merge", "--adapter", run, "--output-dir", str(tmp_path / f"merged-{name}")]) == 0
    assert "2 forget rows" in capsys.readouterr().out
    assert "base_model" not in (tmp_path / "merged-it" / "README.md").read_text()


def test_a_run_begins_where_no_path_back_can_be_written(byte_model, tmp_path, monkeypatch):
    """From a directory whose name is not UTF-8; another drive has none either."""
    place = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(place)
    monkeypatch.chdir(place)
    write_rows(tmp_path / "forget.jsonl", FORGET[:2])
    write_rows(tmp_path / "retain.jsonl", RETAIN)
    data = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl"), *TRAINING]
    assert main(["train", "--model", str(byte_model), *data, "--output-dir", str(tmp_path / "run")]) == 0
    assert not RunFiles(tmp_path / "run").started_in.exists()


def test_a_run_that_was_moved_without_its_base_says_where_that_is_missed(second, tmp_path, monkeypatch, capsys):
    """With --model it is known by its weights, whatever it is called by now; other weights are refused."""
    alone = shutil.copytree(second, tmp_path / "far" / "away" / "alone")
    shutil.copytree(second.parents[1] / "model", tmp_path / "base")
    write_rows(tmp_path / "forget.jsonl", FORGET[:2])
    monkeypatch.chdir(tmp_path)
    run, data = "far/away/alone", ["--forget", "forget.jsonl"]
    commands = [
        ["evaluate", "--adapter", run, *data, "--device", "cpu", "--dry-run"],
        ["ask", run, "Who?", "--device", "cpu", "--max-new-tokens", "1"],
        ["train", "--adapter", run, *data, *TRAINING, "--output-dir", "more", "--dry-run"],
        ["merge", "--adapter", run, "--output-dir", "merged"],
    ]
    missed = (
        f"The adapter in '{run}' was trained on the model in the directory 'model', which is not there (not in "
        f"'{tmp_path / 'model'}' and not in '{tmp_path / 'far' / 'model'}'): say with --model where it is now."
    )
    capsys.readouterr()
    for command in commands:
        assert main(command) == 2
        assert missed in capsys.readouterr().err
    for command in commands:
        assert main([*command, "--model", "base"]) == 0
    name, weights = "model.safetensors", load_file(tmp_path / "base" / "model.safetensors")
    save_file({key: 2 * weight for key, weight in weights.items()}, tmp_path / "base" / name, {"format": "pt"})
    for command in commands[:-1]:
        assert main([*command, "--model", "base"]) == 2
        assert f"The adapter in '{run}' was trained on 'model', not on 'base'" in capsys.readouterr().err
        assert main([*command, "--model", "base", "--any-base"]) == 0
    RunFiles(alone).audit.write_text("[]")  # nothing is known of its base but the name
    assert main([*commands[0], "--model", "base"]) == 2


@pytest.mark.parametrize("started", [None, ".", "../../.."])
def test_what_shares_a_directory_with_a_run_moves_and_is_renamed_with_it(started, tmp_path, monkeypatch):
    """Whether it was named from the root or not; of a run that was moved alone nothing is guessed."""
    monkeypatch.chdir(tmp_path)
    run, (was, named) = RunFiles(Path("new/point/seed-1")), ("/gone/sweep", "sweep")
    run.path.mkdir(parents=True)
    if started:
        run.started_in.write_text(started)
    Path("new/taught").mkdir()
    (run.path / "texts.jsonl").write_text("")
    for root in (was, named, f"../{named}", f"./{named}"):
        settings = {"output_dir": f"{root}/point/seed-1"}
        assert from_here(run, settings, f"{root}/taught") == str(tmp_path / "new" / "taught")
        texts = f"{root}/point/seed-1/texts.jsonl"
        assert from_here(run, settings, texts) == str(tmp_path / run.path / "texts.jsonl")
        for output_dir, name in (
            (f"{root}/point/seed-2", f"{root}/taught"),
            (f"{root}/point/seed-1", f"{root}/other"),
            (f"{root}/point/seed-1", "/other/taught"),
            (f"{root}/point/seed-1", "taught"),
        ):
            assert from_here(run, {"output_dir": output_dir}, name) == name


def test_what_is_not_there_cannot_be_gone_up_from(tmp_path, monkeypatch):
    """It is no file that is in the way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    check_empty(Path("there/../out"))
    for place in ("none/../out", "none/.."):
        with pytest.raises(
            UserError, match=f"^--output-dir '{place}' cannot be made: there is no 'none' to go up from"
        ):
            check_empty(Path(place))


@pytest.mark.parametrize("content", ["", "..", "\0", "x" * 9999])
def test_a_damaged_record_of_where_a_run_was_started_finds_nothing(second, content, tmp_path):
    run = RunFiles(Path(shutil.copytree(second.parents[1], tmp_path / "tree")) / "runs" / "second")
    run.started_in.write_text(content)
    assert from_here(run, {"output_dir": "runs/second"}, "model") == "model"
    run.started_in.unlink()
    assert from_here(run, {"output_dir": "runs/second"}, "model") == "model"


def test_what_cannot_be_told_stays(second, tmp_path, monkeypatch):
    run, settings = RunFiles(second), settings_of_run(str(second))
    assert settings["model"] == str(second.parents[1] / "model")
    assert from_here(run, settings, "org/name") == "org/name"
    monkeypatch.chdir(second.parents[1])
    assert settings_of_run(str(second))["model"] == "model"  # as the run had it
    assert from_here(RunFiles(tmp_path), {"output_dir": "."}, "model") == "model"
    assert from_here(run, settings, "none, nowhere") == "none, nowhere"  # as it is spelled
    many = [f"{number}{'-' * 60}.txt" for number in range(100)]  # together too long for a path
    (tmp_path / many[7]).write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "started_in").write_text("..")
    found = from_here(RunFiles(tmp_path / "run"), {}, ",".join(many)).split(",")
    assert found == [*many[:7], str(tmp_path / many[7]), *many[8:]]
