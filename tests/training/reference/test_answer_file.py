"""The file that the cached reference fills row by row."""

from __future__ import annotations

import pytest
import torch

from lowmem_npo.training.reference.answer_file import AnswerFile


def test_a_disk_that_fills_up_later_leaves_valid_rows(files_no_larger_than, tmp_path):
    values = torch.randn(10, 8)
    file = AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {})
    file.write([0], values[:4])
    with files_no_larger_than(file.nbytes - 100), pytest.raises(OSError):
        file.write([1], values[4:])
    again = AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {})
    assert torch.equal(again.read([0]), values[:4]) and again.read([1]) is None
    again.write([0, 1], values)
    assert torch.equal(AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {}).read([1, 0]),
                       torch.cat([values[4:], values[:4]]))  # fmt: skip
