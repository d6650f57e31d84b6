"""One output directory, one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.dense_step import make_trainer, random_rows
from helpers.tiny_models import tiny_model

from lowmem_npo.claim import LOCK, check_unclaimed, claimed, make_directory, workspace
from lowmem_npo.cli import main
from lowmem_npo.errors import UserError, Vanished
from lowmem_npo.training.trainer import NPOTrainer

ROOT = Path(__file__).resolve().parents[1]
HOLDS = """
import sys
from pathlib import Path
from lowmem_npo.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()  # until it is killed, however long that takes
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "out"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_first_ones_id_and_start(holder, tmp_path):
    (tmp_path / "link").symlink_to("out")
    for name in ("out", "link", "../" + tmp_path.name + "/out"):
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .+, begun 20\d\d-\d\d-\d\d \d\d:"):  # noqa: SIM117
            with claimed(tmp_path / name):
                pass
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            check_unclaimed(tmp_path / name)
    assert (tmp_path / "out" / LOCK).exists()


def test_what_a_killed_process_leaves_is_no_claim(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    check_unclaimed(tmp_path / "out")
    with claimed(tmp_path / "out"):
        assert re.search(f'"pid": {os.getpid()},', (tmp_path / "out" / LOCK).read_text())


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1, 2]", b'{"pid": "x"}'])
def test_a_garbled_lock_is_no_claim(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    check_unclaimed(tmp_path)
    with claimed(tmp_path):
        pass


def test_a_refusal_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="mine"), claimed(tmp_path / "a" / "b"):
        raise UserError("mine")
    assert not any(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with claimed(tmp_path / "kept"), claimed(tmp_path / "kept" / "seed"):  # as a sweep and its run
        (tmp_path / "kept" / "seed" / "run.yaml").write_text("")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "kept", "kept/seed", "kept/seed/run.yaml"
    ]  # fmt: skip


def test_a_directory_that_vanishes_is_not_made_again(tmp_path):
    """Else the command would go on in one that holds no run, or in that of the next command."""
    with claimed(tmp_path / "out"):
        make_directory(tmp_path / "out" / "a" / "b")
        (tmp_path / "out").rename(tmp_path / "away")
        with pytest.raises(OSError, match=f"^'{tmp_path}/out' has been removed or renamed since the command began$"):
            make_directory(tmp_path / "out" / "c")
        with (
            pytest.raises(UserError, match="c' cannot be written: .* has been removed"),
            claimed(tmp_path / "out" / "c"),
        ):
            pass
        assert not (tmp_path / "out").exists()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK).write_text("of another")
        with pytest.raises(OSError, match="has been removed or renamed"):
            make_directory(tmp_path / "out" / "c")
    assert (tmp_path / "out" / LOCK).read_text() == "of another"


@pytest.mark.parametrize("command", ["train", "evaluate", "merge"])
def test_what_fails_in_a_directory_that_is_gone_says_so(command, byte_model, tmp_path, monkeypatch, capsys):
    """Not that a file of it is missing, nor that nothing was written: its owner has moved it away."""
    data, out = ["--limit", "2", "--device", "cpu", "--dtype", "float32"], tmp_path / "out"
    train = ["train", "--model", str(byte_model), *data, "--eval-rows", "0", "--max-steps", "1"]
    if command == "merge":
        assert main([*train, "--output-dir", str(tmp_path / "run")]) == 0
    module, at, arguments = {
        "train": ("train.run", "_train", train),
        "evaluate": ("evaluate.run", "measure", ["evaluate", "--model", str(byte_model), "--forget", "builtin", *data]),
        "merge": ("merge.run", "merged_card", ["merge", "--adapter", str(tmp_path / "run")]),
    }[command]

    def moves_away(*_, **__):
        place = tmp_path / ("out.partial" if command == "merge" else "out")
        (place / "written").write_text("")
        place.rename(tmp_path / "away")
        (place / "next").write_text("")

    monkeypatch.setattr(f"lowmem_npo.commands.{module}.{at}", moves_away)
    assert main([*arguments, "--output-dir", str(out)]) == 2
    place = f"{out}.partial" if command == "merge" else out
    expected = f"lowmem-npo {command}: '{place}' has been removed or renamed since the command began.\n"
    assert capsys.readouterr().err.endswith(expected)
    assert (tmp_path / "away" / "written").exists() and not out.exists()


def test_an_interrupted_run_whose_directory_is_gone_says_so(byte_model, tmp_path, monkeypatch, capsys):
    """As it has done when its metrics could no longer be written: not that nothing was."""
    out, step = tmp_path / "out", NPOTrainer.training_step

    def moves_away(self, *arguments):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        if out.exists():
            out.rename(tmp_path / "away")
        return step(self, *arguments)

    monkeypatch.setattr(NPOTrainer, "training_step", moves_away)
    run = ["train", "--model", str(byte_model), "--limit", "2", "--device", "cpu", "--dtype", "float32"]
    run += ["--eval-rows", "0", "--max-steps", "2", "--reference", "live", "--save-strategy", "no"]
    assert main([*run, "--output-dir", str(out)]) == 130
    printed, gone = capsys.readouterr(), f"'{out}' has been removed or renamed since the command began"
    assert f"metrics.jsonl cannot be written ({gone}), so no more of its lines are; training goes on." in printed.out
    assert printed.err.endswith(f"lowmem-npo train: interrupted; {gone}.\n")


def test_a_file_in_the_place_of_a_directory_above_it(tmp_path):
    with pytest.raises(Vanished), claimed(tmp_path / "runs" / "out"):
        (tmp_path / "runs").rename(tmp_path / "away")
        (tmp_path / "runs").write_text("")
        (tmp_path / "runs" / "out" / "next").write_text("")


def test_a_path_that_goes_up_from_nothing(tmp_path):
    with pytest.raises(UserError, match="none' to go up from"), claimed(tmp_path / "none" / ".." / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_nor_by_the_trainer_it_is_made_of(tmp_path):
    rows = random_rows(4, seed=1), random_rows(4, seed=2)
    with claimed(tmp_path / "out"):
        (tmp_path / "out").rename(tmp_path / "away")
        with pytest.raises(OSError, match="has been removed or renamed since the command began$"):
            make_trainer(tiny_model("olmo"), tmp_path / "out", *rows)
        assert not (tmp_path / "out").exists()


def test_nothing_else_makes_directories_above_its_own():
    """It would make one again that has been removed."""
    makes = re.compile(r"mkdir\([^)]*parents=True|makedirs\(")
    rooms = [path for path in (ROOT / "lowmem_npo").rglob("*.py") if makes.search(path.read_text(encoding="utf-8"))]
    assert not rooms


def test_a_directory_without_its_lock_is_the_same(tmp_path, monkeypatch):
    """Whoever tidies up may take it for a leftover. The directory is known by any spelling."""
    monkeypatch.chdir(tmp_path)
    with claimed(Path("out")):
        (tmp_path / "out" / LOCK).unlink()
        make_directory(tmp_path / "out" / "a")
        (tmp_path / "out").rename(tmp_path / "away")
        with pytest.raises(OSError, match="has been removed or renamed"):
            make_directory(tmp_path / "out" / "b")
    assert (tmp_path / "away" / "a").is_dir()


def test_what_is_no_directory_cannot_be_claimed(tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    cases = ("other", "is a file"), ("other/out", "cannot be written: Not a directory"), ("loop", "is a file")
    for place, message in cases:
        with pytest.raises(UserError, match=message), claimed(tmp_path / place):
            pass


def test_a_workspace_is_empty_and_leaves_nothing(tmp_path):
    place = tmp_path / "out.partial"
    (place / "nested").mkdir(parents=True)
    with pytest.raises(UserError, match="in the way"), workspace(place):
        pass
    (place / LOCK).write_text("")  # now it is what a killed process left
    with workspace(place):
        assert [path.name for path in place.iterdir()] == [LOCK]
        (place / "file").write_text("")
        with pytest.raises(UserError, match="in use by process"), workspace(place):
            pass
        assert (place / "file").exists()
    with pytest.raises(ZeroDivisionError), workspace(place):
        (place / "file").write_text(str(1 / 0))
    assert not any(tmp_path.iterdir())


def test_of_many_at_once_one_is_let_in(tmp_path):
    """Also while holders come and go: the file that is locked is the one that is there."""
    inside, most, entered = [0], [0], [0]

    def worker():
        for _ in range(100):
            try:
                with claimed(tmp_path / "out"):
                    inside[0] += 1
                    most[0], entered[0] = max(most[0], inside[0]), entered[0] + 1
                    inside[0] -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and entered[0] >= 4


@pytest.mark.parametrize("command", ["train", "train --dry-run", "train --resume", "sweep --seeds 1", "demo"])
def test_every_command_that_writes_refuses(command, holder, byte_model, tmp_path, capsys):  # merge: merge/test_files.py
    name, *options = command.split()
    out, model = tmp_path / "out", [] if name == "demo" else ["--model", str(byte_model)]
    kept = {LOCK}
    if "--resume" in options:
        (out / "run.yaml").write_text("")
        kept.add("run.yaml")
    assert main([name, *model, *options, "--output-dir", str(out)]) == 2
    assert f"in use by process {holder.pid}" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == kept
