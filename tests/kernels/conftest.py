"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lowmem_kernels import chunks_engine, row_kernel  # noqa: E402


@pytest.fixture(params=["torch", "chunks"])
def engine(request) -> str:
    """Every engine in turn."""
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, so that small cases have many of them."""
    use_blocks(monkeypatch, rows=8, columns=128)


@pytest.fixture
def large_blocks(small_blocks, monkeypatch):
    """Large blocks, for large cases: the interpreter's time is per operation, not per entry."""
    use_blocks(monkeypatch, rows=8, columns=8192)


def use_blocks(monkeypatch, rows: int, columns: int) -> None:
    config = row_kernel.RowConfig(ROWS=rows, BLOCK=columns, num_warps=4)
    monkeypatch.setattr(chunks_engine, "row_config", lambda capability: config)


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """The interpreter computes with NumPy, which warns of the overflows and 0 / 0 that `tl.where` then leaves out."""
    with np.errstate(all="ignore"):
        yield
