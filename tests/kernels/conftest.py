"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lowmem_kernels import chunks_engine, row_kernel, tile_config, tiles_engine  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--all-gpus", action="store_true", help="compile every kernel for every GPU: about an hour")


@pytest.fixture(params=["torch", "chunks", "tiles"])
def engine(request) -> str:
    """Every engine in turn."""
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, so that small cases have many of them: of tokens, vocabulary and hidden size."""
    use_blocks(monkeypatch, rows=16, columns=256, depth=64, chunk=384)
    monkeypatch.setattr(tiles_engine, "TOKENS", 32)


@pytest.fixture
def large_blocks(small_blocks, monkeypatch):
    """Large blocks, for large cases: the interpreter's time is per operation, not per entry."""
    use_blocks(monkeypatch, rows=16, columns=8192, depth=64, chunk=16384)


def use_blocks(monkeypatch, rows: int, columns: int, depth: int, chunk: int) -> None:
    tile, product = (tile_config.TileConfig(rows, *size, 4, 1) for size in ((columns, depth), (depth, columns)))
    monkeypatch.setattr(chunks_engine, "row_config", lambda *_: row_kernel.RowConfig(rows, columns, num_warps=4))
    monkeypatch.setattr(tiles_engine, "logits_config", lambda *_: tile)
    monkeypatch.setattr(tiles_engine, "product_config", lambda *_: product)
    monkeypatch.setattr(tiles_engine, "VOCABULARY", chunk)
    monkeypatch.setattr(tiles_engine, "_processors", lambda device: 2)


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """The interpreter computes with NumPy, which warns of the overflows and 0 / 0 that `tl.where` then leaves out."""
    with np.errstate(all="ignore"):
        yield
