"""The file that the cached reference fills row by row."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lowmem_npo.training.reference.answer_file import HOST, AnswerFile


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


def test_what_is_stored_is_not_written_again(tmp_path):
    """Nor by a process that has not read it: the row before it was not stored."""
    first, again = torch.randn(6, 8), torch.randn(10, 8)
    AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {}).write([1], first)
    later = AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {})
    assert later.read([0, 1]) is None
    later.write([0, 1], again)
    assert torch.equal(later.read([0, 1]), torch.cat([again[:4], first]))


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path):
    """Nothing of one that runs, and nothing else."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    processes = (ended.pid, os.getpid(), os.getppid())
    left, own, others = (tmp_path / f"x.safetensors.{HOST}-{process}.partial" for process in processes)
    beside, elsewhere = tmp_path / "y.safetensors.1.partial", tmp_path / f"x.safetensors.other-{ended.pid}.partial"
    for file in (left, own, others, beside, elsewhere):
        file.write_bytes(b"half")
    AnswerFile(tmp_path / "x.safetensors", [4, 6], 8, torch.float32, {})
    assert sorted(tmp_path.iterdir()) == sorted([others, beside, elsewhere])
