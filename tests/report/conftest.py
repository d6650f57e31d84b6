"""A real run, made once for all tests of its report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.reported_run import FORGET, RETAIN, train
from helpers.rows import write_rows


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with forget.jsonl and retain.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    return folder


@pytest.fixture(scope="session")
def run(byte_model, data, tmp_path_factory) -> Path:
    """The directory of a finished run, as `lowmem-npo train` leaves it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("run") / "forgotten"
    return train(folder, byte_model, data, "--max-steps", 3, "--lr", 0.01, "--report-examples", 5)


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "forgotten"))
