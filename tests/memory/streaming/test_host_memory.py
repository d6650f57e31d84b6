"""Loading for streamed weights: the host holds a block for each layer and one layer beside them, never two copies."""

from __future__ import annotations

import mmap
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.tiny_models import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.memory import streaming
from lowmem_npo.memory.streaming import into_blocks, stream_weights, weight_stream
from lowmem_npo.memory.streaming.stream import WeightStream
from lowmem_npo.model import load_model

CPU = torch.device("cpu")
LARGE = {**SIZES, "hidden_size": 128, "intermediate_size": 512, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 3, **LARGE, "intermediate_size": 128}
MODELS = {  # how it is stored, and whether it is quantised
    "float32 in bf16": (partial(LlamaConfig, tie_word_embeddings=False, **LARGE), "float32", False),
    "bf16": (partial(LlamaConfig, tie_word_embeddings=False, **LARGE), "bfloat16", False),
    "4 bits, tied": (partial(LlamaConfig, tie_word_embeddings=True, **LARGE), "float32", True),
    "4 bits, experts": (partial(MixtralConfig, **EXPERTS), "bfloat16", True),
}
FEW, MORE = 3, 8  # layers


class Host(StorageCounter):
    """Counts what operators allocate. Blocks and mapped files, which no operator makes, are not among it."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def run(self, func, args, kwargs):
        result = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        parts = result if isinstance(result, (tuple, list)) else (result,)
        self.old = given | {x.untyped_storage()._cdata for x in parts if func.is_view and isinstance(x, torch.Tensor)}
        return result

    def _see(self, tensor):
        if tensor.untyped_storage()._cdata not in self.old:
            super()._see(tensor)


class Loaded(NamedTuple):
    """Bytes, and what streams the weights."""

    peak: int  # beside blocks, staging buffers and mapped files
    blocks: int
    made: int  # what `host_memory` gave
    stream: WeightStream


@pytest.fixture(params=MODELS, ids=list(MODELS))
def sizes(request, tmp_path) -> tuple[list[Path], bool, bool]:
    """The same model of few and of more layers, each in several shards."""
    config, dtype, qlora = MODELS[request.param]
    folders = [tmp_path / str(layers) for layers in (FEW, MORE)]
    for folder, layers in zip(folders, (FEW, MORE), strict=True):
        sized = {**config.keywords, "num_hidden_layers": layers}
        model = AutoModelForCausalLM.from_config(config.func(vocab_size=97, **sized), dtype=dtype)
        model.save_pretrained(folder, max_shard_size="300KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return folders, qlora, dtype == "bfloat16"


def loaded(folder: Path, qlora: bool, monkeypatch, how: str = "blocks", cache: Path | None = None) -> Loaded:
    make, made = streaming.host_memory, []

    def counted(size, pinned):
        made.append(size)
        return make(size, pinned)

    in_file = how == "in file"
    config = ModelConfig(str(folder), qlora=qlora, device="cpu", quantized_cache=cache and str(cache))
    with monkeypatch.context() as patch, Host() as host:
        patch.setattr(streaming, "host_memory", counted)
        model = load_model(config, lambda line: None, True, into_blocks(CPU) if how == "blocks" else None, in_file)
        stream_weights(model, CPU, in_file=in_file)
    stream = weight_stream(model)
    return Loaded(host.peak, sum(map(len, stream.blocks)), sum(made), stream)


def test_beside_the_blocks_the_peak_does_not_grow_with_the_number_of_layers(sizes, monkeypatch, tmp_path):
    """But for norms and the tables of 4 bits. The other way, all of it loaded and then moved, is recognised."""
    folders, qlora, bf16 = sizes
    few, more = (loaded(folder, qlora, monkeypatch) for folder in folders)
    grown = more.blocks - few.blocks
    assert more.made == more.blocks and more.peak - few.peak < 0.15 * grown
    if not (bf16 and not qlora):  # which is mapped until it is moved
        few, more = (loaded(folder, qlora, monkeypatch, how="separately") for folder in folders)
        assert more.peak - few.peak > 0.9 * grown
    for _ in ("first run", "second run") if qlora else ():
        few, more = (loaded(f, qlora, monkeypatch, "in file", tmp_path / "cache") for f in folders)
        assert more.peak - few.peak < 0.15 * grown and more.made == 2 * max(map(len, more.stream.blocks))


def test_blocks_begin_with_a_page_and_go_back_to_the_operating_system(monkeypatch):
    """Of two blocks that share a page, the second could not be pinned; `malloc` would place small ones so."""
    blocks = [streaming.host_memory(5000, False) for _ in range(3)]
    assert all(block.data_ptr() % mmap.PAGESIZE == 0 and len(block) == 5000 for block in blocks)
    address, part = blocks[0].data_ptr(), blocks.pop(0)[100:200].view(torch.float32)
    assert mapped(address)  # a view keeps it
    del part
    assert not mapped(address) and streaming.host_memory(0, False).numel() == 0
    with pytest.raises(UserError, match="--stream-weights: the operating system gives or pins no more host memory"):
        streaming.host_memory(2**60, False)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")  # as on systems other than Linux
    assert len(streaming.host_memory(5000, False)) == 5000


def mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


class FakeCuda:
    """The two functions that pin, and the order in which memory is unpinned and unmapped."""

    def __init__(self, monkeypatch) -> None:
        self.pinned: dict[int, int] = {}
        self.still_mapped: list[bool] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def cudaHostRegister(self, address, size, flags):
        first, last = address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE
        taken = {page for at, n in self.pinned.items() for page in range(at // 4096, (at + n - 1) // 4096 + 1)}
        if taken & set(range(first, last + 1)):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):
        self.still_mapped.append(mapped(address))
        del self.pinned[address]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_is_forked_has_no_pinned_pages(monkeypatch):
    """With them, what is written to a page later would go to a copy of it, and a GPU would read the pinned one."""
    FakeCuda(monkeypatch)
    memory = streaming.host_memory(5000, True)
    if not (child := os.fork()):
        os._exit(mapped(memory.data_ptr()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and mapped(memory.data_ptr())


def test_pinned_blocks_are_unpinned_while_they_are_there(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    blocks = [streaming.host_memory(size, True) for size in (3000, 5000, 100)]
    assert cuda.pinned == {block.data_ptr(): len(block) for block in blocks}
    views = [block[8:16] for block in blocks]
    del blocks
    assert len(cuda.pinned) == 3
    del views
    assert not cuda.pinned and cuda.still_mapped == [True] * 3
