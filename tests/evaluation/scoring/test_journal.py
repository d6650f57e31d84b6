"""What a long evaluation has measured is read back; what is damaged is measured again."""

from __future__ import annotations

import json

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import EvaluationDirectory
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.settings import EvaluationConfig


@pytest.mark.parametrize(
    "line", [b"{", b"3", b"\xff\xfe", b'{"part": "a"}', b'{"part": "a", "rows": [1], "values": []}', b""]
)
def test_a_damaged_line_costs_only_itself(line, tmp_path):
    path = tmp_path / "measured.jsonl"
    journal = Journal(path, progress=False)
    journal.write("a", [0, 1], [0.5, 1.5])
    with path.open("ab") as file:
        file.write(line + b"\n")
    journal.write("a", [2], [2.5])
    with path.open("ab") as file:
        file.write(b'{"part": "a", "rows": [3], "val')  # killed while it wrote
    assert Journal(path, progress=False).known("a") == {0: 0.5, 1: 1.5, 2: 2.5}
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("content", ["", "{", "3", "{}", '{"digests": 3}', "[" * 100_000])
def test_damaged_settings_are_named(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    config = EvaluationConfig(model="m", output_dir=str(tmp_path), resume=True)
    with pytest.raises(UserError, match="settings.json' is damaged: start the evaluation anew"):
        EvaluationDirectory(config, {}).begin()
    (tmp_path / "settings.json").write_text(json.dumps({"digests": {}}))
    assert EvaluationDirectory(config, {}).begin().known("a") == {}
