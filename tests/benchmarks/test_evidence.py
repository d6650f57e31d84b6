"""scripts/gpu_evidence.sh: a failure is recorded and the rest goes on; without a GPU it says so and exits with 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.evidence import PIECES, ROOT, run_piece


@pytest.fixture
def script(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def status_of(folder: Path, piece: str) -> dict:
    return json.loads((folder / f"{piece}.status.json").read_text())


def test_a_failure_is_recorded_and_the_next_command_runs(tmp_path, script):
    commands = [script("bad.py", "print('half way'); raise SystemExit(3)"), script("good.py", "print('done')")]
    assert run_piece("x", commands, tmp_path, gpu=True) == "failed"
    status = status_of(tmp_path, "x")
    assert [entry["exit_code"] for entry in status["results"]["commands"]] == [3, 0]
    assert status["results"]["last_line"] == "done" and "half way" in (tmp_path / "x.log").read_text()
    assert {"gpu", "versions", "commit"} <= status["machine"].keys() and status["command"]


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path, script):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert run_piece("x", [script("slow.py", child)], tmp_path, gpu=True, limit=3) == "failed"
    assert status_of(tmp_path, "x")["results"]["seconds"] < 60
    assert "the time limit was reached" in (tmp_path / "x.log").read_text()


def test_a_benchmark_that_is_not_there_is_missing_not_failed(tmp_path, script):
    assert run_piece("x", [script("good.py", "print(1)"), "benchmarks/none.py"], tmp_path, gpu=True) == "missing"
    assert run_piece("y", [script("good.py", "print(1)")], tmp_path, gpu=True) == "ok"
    assert (
        run_piece("z", [script("writes.py", "import sys; open(sys.argv[1], 'w')") + " OUTDIR/a.json"], tmp_path, True)
        == "ok"
    )
    assert (tmp_path / "a.json").exists()


def test_without_a_gpu_every_piece_is_skipped_in_one_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "gpu_evidence.sh"), "all", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{p}: skipped, there is no GPU here that PyTorch can use" for p in PIECES]
    assert {status_of(tmp_path / "out", piece)["results"]["status"] for piece in PIECES} == {"skipped"}


def test_a_piece_that_does_not_exist_is_refused(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_evidence.sh"), "everything", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "memory-2048" in done.stderr
