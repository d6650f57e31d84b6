"""scripts/gpu_evidence.sh: a failure is recorded and the rest goes on; without a GPU it says so and exits with 0."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.evidence import PIECES, ROOT, Piece, run_piece


@pytest.fixture
def script(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def piece(*commands: str, needs: tuple[str, ...] = ()) -> Piece:
    return Piece("a piece", needs, commands)


def status_of(folder: Path, piece: str) -> dict:
    return json.loads((folder / f"{piece}.status.json").read_text())


def test_a_failure_is_recorded_and_the_next_command_runs(tmp_path, script):
    commands = [script("bad.py", "print('half way'); raise SystemExit(3)"), script("good.py", "print('done')")]
    assert run_piece("x", piece(*commands), tmp_path, gpu=True) == "failed"
    status = status_of(tmp_path, "x")
    assert [entry["exit_code"] for entry in status["results"]["commands"]] == [3, 0]
    assert status["results"]["last_line"] == "done" and "half way" in (tmp_path / "x.log").read_text()
    assert {"gpu", "versions", "commit"} <= status["machine"].keys() and status["command"]


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path, script):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(6000)'])"
    assert run_piece("x", piece(script("slow.py", child)), tmp_path, gpu=True, limit=3) == "failed"
    assert status_of(tmp_path, "x")["results"]["seconds"] < 600
    assert "the time limit was reached" in (tmp_path / "x.log").read_text()


def test_a_benchmark_that_is_not_there_is_missing_not_failed(tmp_path, script):
    assert run_piece("x", piece(script("good.py", "print(1)"), "benchmarks/none.py"), tmp_path, gpu=True) == "missing"
    assert run_piece("y", piece(script("good.py", "print(1)")), tmp_path, gpu=True) == "ok"
    writes = script("writes.py", "import sys; open(sys.argv[1], 'w')") + " OUTDIR/a.json"
    assert run_piece("z", piece(writes), tmp_path, gpu=True) == "ok"
    assert (tmp_path / "a.json").exists()


def test_without_a_gpu_every_piece_is_skipped_in_one_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "gpu_evidence.sh"), "all", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{p}: skipped, there is no GPU here that PyTorch can use" for p in PIECES]
    assert {status_of(tmp_path / "out", piece)["results"]["status"] for piece in PIECES} == {"skipped"}


def test_a_piece_without_its_packages_is_skipped_and_names_them(tmp_path, script, capsys):
    good = script("good.py", "print(1)")
    assert run_piece("x", piece(good, needs=("torch", "no_such_1", "no_such_2")), tmp_path, gpu=True) == "skipped"
    assert capsys.readouterr().out == "x: skipped, it needs no_such_1, no_such_2: carry them along\n"
    assert status_of(tmp_path, "x")["results"]["commands"] == []


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    """Only the given packages, and what they require, can be imported by processes that are started."""

    def hide_others(*kept: str) -> None:
        of_module = importlib.metadata.packages_distributions()
        installed = {_plain(owner) for owners in of_module.values() for owner in owners}
        required = {_plain(d) for module in kept for d in of_module[module]}
        for name in (queue := list(required)):
            for line in importlib.metadata.requires(name) or ():
                other = _plain(re.match(r"[\w.-]+", line)[0])
                if "extra ==" not in line and other in installed - required:
                    required.add(other)
                    queue.append(other)
        required.add("lowmem-npo")  # the checkout itself
        hidden = [module for module, owners in of_module.items() if not required & set(map(_plain, owners))]
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "from importlib.machinery import PathFinder\n"
            f"hidden = {hidden!r}\n"
            "class Finder(PathFinder):\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n"
            "        return None if name.partition('.')[0] in hidden else super().find_spec(name, path, target)\n"
            "sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels"))))
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins may need what is hidden
        monkeypatch.setenv("TRITON_INTERPRET", "0")  # as on a GPU: the interpreter needs NumPy

    return hide_others


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_kernels_tests_need_nothing_but_what_they_name(bare_machine, tmp_path):
    """Without a GPU they are skipped, but collected all the same: nothing that they import is missing."""
    bare_machine(*PIECES["tests"].needs)
    assert run_piece("tests", PIECES["tests"], tmp_path, gpu=True) == "ok", (tmp_path / "tests.log").read_text()
    assert re.fullmatch(r"\d{2,} skipped.*", status_of(tmp_path, "tests")["results"]["last_line"])
    for module in ("numpy", "transformers", "peft"):
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
        assert f"No module named '{module}'" in done.stderr


@pytest.mark.parametrize(
    "name", ["kernels", "memory-512", *(pytest.param(name, marks=pytest.mark.slow) for name in ("speed", "quality"))]
)
def test_a_benchmark_can_be_imported_with_the_packages_that_its_piece_names(name, bare_machine):
    bare_machine(*PIECES[name].needs)
    command = [sys.executable, PIECES[name].commands[0].split()[0], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_script_says_its_pieces_and_what_they_need_without_pytorch(arguments, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts" / "gpu_evidence.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout and ", ".join(p.needs) in done.stdout for name, p in PIECES.items())


def test_a_piece_that_does_not_exist_is_refused(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_evidence.sh"), "everything", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "memory-2048" in done.stderr
