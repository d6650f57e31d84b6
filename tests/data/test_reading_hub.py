"""Hub names, read by a real process from a hub on this machine, then without any network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = """---
configs:
- config_name: forget05
  data_files: forget05.json
- config_name: retain95
  data_files:
  - split: first
    path: retain95.json
  - split: second
    path: retain95.json
- config_name: usual
  data_files:
  - split: test
    path: retain95.json
  - split: train
    path: forget05.json
---
"""
FILES = {
    "README.md": README,
    "forget05.json": '{"question": "q1", "answer": "a1"}\n{"question": "q2", "answer": "a2"}\n',
    "retain95.json": '{"question": "q3", "answer": "a3"}\n',
}
READ = """
import json, sys
from lowmem_npo.data.reading import read_rows
from lowmem_npo.errors import UserError
answers = {}
for name in sys.argv[1:]:
    try:
        rows = read_rows(name)
        answers[name] = [[row["answer"] for row in rows.rows], rows.where(0)]
    except UserError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


def read_in_a_process(names, **variables) -> dict[str, list | str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **variables}
    done = subprocess.run(
        [sys.executable, "-c", READ, *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serve_hub):
    """What each name gives: while the hub is there, and afterwards without network."""
    home = str(tmp_path_factory.mktemp("home"))
    names = ["a/b:forget05", "a/b:forget05/train@main", "a/b:retain95/second", "a/b:retain95", "a/b:retain95/third"]
    names += ["a/b:usual", "a/b", "a/b:none", "no/such"]
    with serve_hub("a/b", FILES) as address:
        online = read_in_a_process(names, HF_ENDPOINT=address, HF_HOME=home, HF_HUB_OFFLINE="0")
    offline = read_in_a_process(["a/b:forget05", "no/copy:x"], HF_ENDPOINT=address, HF_HOME=home, HF_HUB_OFFLINE="1")
    return online, offline


def test_configuration_split_and_revision(answers):
    online, _ = answers
    assert online["a/b:forget05"] == [["a1", "a2"], "a/b:forget05, row 1"]
    assert online["a/b:forget05/train@main"][0] == ["a1", "a2"]
    assert online["a/b:retain95/second"][0] == ["a3"]
    assert online["a/b:usual"][0] == ["a1", "a2"], "the split is train unless named"


def test_mistakes_list_what_there_is(answers):
    online, _ = answers
    assert "has several splits; it has first, second: name one as a/b:retain95/SPLIT" in online["a/b:retain95"]
    assert "has no split third; it has first, second" in online["a/b:retain95/third"]
    for name in ("a/b", "a/b:none"):
        assert "forget05" in online[name]
        assert "name it as owner/name:configuration" in online[name]
    assert "neither a file no/such nor a dataset no/such on the hub" in online["no/such"]


def test_without_network_a_local_copy_does(answers):
    _, offline = answers
    assert offline["a/b:forget05"][0] == ["a1", "a2"]
    assert "the hub cannot be reached, and there is no local copy of no/copy" in offline["no/copy:x"]
