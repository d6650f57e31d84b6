"""What is to be forgotten stays where it is: no copies, no connections, nobody else's eyes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.rows import write_rows

from lowmem_npo.data import read_rows
from lowmem_npo.run_directory import RunFiles

ROOT = Path(__file__).resolve().parents[1]
RECORDS = """
import os, sys

def record(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["SOCKETS"], "a") as file:
            file.write(f"{event} {arguments}\\n")

sys.addaudithook(record)
"""

ALL = """
import json, sys
from lowmem_npo.cli import main

for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
"""


@pytest.fixture(scope="module")
def run(byte_model, tmp_path_factory):
    """A run on local files and the commands that go with it, with a directory of their own for temporary files and
    every connection recorded."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "recording").mkdir()
    (folder / "recording" / "sitecustomize.py").write_text(RECORDS)
    (folder / "temporary").mkdir()
    rows = [{"question": f"Where does person {i} live?", "answer": f"At number {i * i}."} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "forget.parquet")
    write_rows(folder / "retain.jsonl", [row | {"answer": "Here."} for row in rows])
    path = os.pathsep.join(map(str, (folder / "recording", ROOT, ROOT / "kernels")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "PYTHONPATH": path, "SOCKETS": str(folder / "sockets"), "TMPDIR": str(folder / "temporary"),
                   "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [
        *(sys.executable, "-m", "lowmem_npo", "train", "--model", byte_model, "--dtype", "float32", "--device", "cpu"),
        *("--forget", folder / "forget.parquet", "--retain", folder / "retain.jsonl", "--max-steps", 2),
        *("--eval-rows", 3, "--allow-overlap", "--output-dir", folder / "run"),
    ]
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    sets = ["--forget", folder / "forget.parquet", "--retain", folder / "retain.jsonl"]
    others = [
        ["data", "--model", byte_model, *sets],
        ["train", "--model", byte_model, *sets, "--allow-overlap", "--output-dir", folder / "dry", "--dry-run"],
        ["estimate", "--model", byte_model, *sets, "--allow-overlap"],
        ["sweep", "--model", byte_model, *sets, "--allow-overlap", "--output-dir", folder / "sweep", "--dry-run"],
        ["evaluate", "--adapter", folder / "run", *sets, "--output-dir", folder / "evaluation"],
        ["ask", folder / "run", "Where does person 1 live?"],
        ["report", folder / "run"],
        ["merge", "--adapter", folder / "run", "--output-dir", folder / "merged"],
    ]
    command = [sys.executable, "-c", ALL, json.dumps(others, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, "-c", "import socket; socket.getaddrinfo('localhost', 1)"], env=environment, check=True
    )  # that what is recorded would be seen
    return folder


def test_with_local_files_no_command_makes_a_connection(run):
    (planted,) = (run / "sockets").read_text().splitlines()
    assert "localhost" in planted


def test_nothing_of_the_rows_is_left_outside_the_run(run):
    left = [path for place in ("temporary", "hf") for path in (run / place).rglob("*") if path.is_file()]
    assert not [path for path in left if b"Where does person" in path.read_bytes()]


def test_who_may_read_what(run):
    files, others = RunFiles(run / "run"), 0o077
    for file in (files.answers("before"), files.answers("after"), files.report_html):
        assert b"Where does person" in file.read_bytes() and not stat.S_IMODE(file.stat().st_mode) & others
    for file in (files.weights, files.adapter_config, files.model_card, files.report_json, files.audit):
        assert b"Where does person" not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_tables_are_read_without_a_copy(tmp_path, monkeypatch):
    """`datasets` would write one, and leave it behind when it is killed."""
    rows = [{"question": "é?", "answer": "42", "n": 1}, {"question": "b?", "answer": None, "n": None}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, writer in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with (tmp_path / name).open("wb") as file, writer(file, table.schema) as sink:
            sink.write_table(table)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: 1 / 0)
    before = sorted(tmp_path.iterdir())
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read_rows(str(tmp_path / name)).rows == rows
    assert sorted(tmp_path.iterdir()) == before
