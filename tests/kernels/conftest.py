"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os
from importlib import import_module

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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


@pytest.fixture
def large_blocks(small_blocks, monkeypatch):
    """Large blocks, for large cases: the interpreter's time is per operation, not per entry."""
    use_blocks(monkeypatch, rows=16, columns=8192, depth=64, chunk=16384)


def use_blocks(monkeypatch, rows: int, columns: int, depth: int, chunk: int, package: str = "lowmem_kernels") -> None:
    """In every engine of `package`: blocks of tokens, vocabulary and hidden size; entries in a chunk of `tiles`."""
    torch_engine, chunks, tiles = (import_module(f"{package}.{name}_engine") for name in ("torch", "chunks", "tiles"))
    monkeypatch.setattr(torch_engine, "TOKENS", rows)
    monkeypatch.setattr(torch_engine, "VOCABULARY", columns)
    row_config = import_module(f"{package}.row_kernel").RowConfig(rows, columns, num_warps=4)
    monkeypatch.setattr(chunks, "row_config", lambda *_: row_config)
    tile_config = import_module(f"{package}.tile_config").TileConfig
    tile, product = tile_config(rows, columns, depth, 4, 1), tile_config(rows, depth, columns, 4, 1)
    monkeypatch.setattr(tiles, "logits_config", lambda *_: tile)
    monkeypatch.setattr(tiles, "product_config", lambda *_: product)
    monkeypatch.setattr(tiles, "TOKENS", 2 * rows)
    monkeypatch.setattr(tiles, "VOCABULARY", chunk)
    monkeypatch.setattr(tiles, "_processors", lambda device: 2)


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """The interpreter computes with NumPy, which warns of the overflows and 0 / 0 that `tl.where` then leaves out."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # on a GPU, where NumPy may be missing
        yield
        return
    import numpy

    with numpy.errstate(all="ignore"):
        yield
