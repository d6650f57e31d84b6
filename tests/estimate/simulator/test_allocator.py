"""The model of PyTorch's caching allocator, on traces whose outcome is worked out by hand from its rules."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_npo.estimate.simulator import allocator
from lowmem_npo.estimate.simulator.allocator import MIB, CachingAllocator, OutOfDeviceMemory, Pool, needed, replay

ROOT = Path(__file__).resolve().parents[3]
KIB = 1024


def reserved(*sizes_and_frees: int | tuple[int], expandable: bool) -> list[float]:
    """MiB reserved after each event: a size is allocated; a tuple (i,) frees the i-th allocation."""
    own, blocks, seen = CachingAllocator(expandable), [], []
    for event in sizes_and_frees:
        if isinstance(event, tuple):
            own.free(blocks[event[0]])
        else:
            blocks.append(own.allocate(event))
        seen.append(own.reserved / MIB)
    return seen


def test_segments_are_of_the_sizes_of_their_pools():
    small = reserved(1, MIB, 512 * KIB, 400 * KIB, 200 * KIB, expandable=False)
    assert small == [2, 2, 2, 2, 4]  # 512 bytes and 1936 KiB fit into one segment, 200 KiB more do not
    assert reserved(MIB + 1, 9 * MIB + 1, 10 * MIB - 512, expandable=False) == [20, 20, 40]
    assert reserved(10 * MIB, 10 * MIB + 1, 12 * MIB, expandable=False) == [10, 22, 34]


def test_the_rest_of_a_large_block_is_split_off_only_if_it_has_more_than_a_mebibyte():
    # 30 MiB are freed and 29 taken of them: the rest cannot be used. Of 28 MiB, it can.
    assert reserved(30 * MIB, (0,), 29 * MIB, MIB + 512, expandable=False) == [30, 30, 30, 50]
    assert reserved(30 * MIB, (0,), 28 * MIB, MIB + 512, expandable=False) == [30, 30, 30, 30]
    assert reserved(20 * MIB, (0,), 19 * MIB, MIB + 512, expandable=True) == [20, 20, 20, 40]
    assert reserved(20 * MIB, (0,), 18 * MIB, 2 * MIB, expandable=True) == [20, 20, 20, 20]


def test_the_smallest_block_that_fits_is_taken():
    holes = [40 * MIB, 24 * MIB, 32 * MIB]
    # 24 goes into 24 and 32 into 32, so that 40 is free for 40
    assert reserved(*holes, (0,), (1,), (2,), 24 * MIB, 32 * MIB, 40 * MIB, expandable=False)[-1] == 96


def test_neighbours_merge_and_segments_do_not():
    inside = reserved(6 * MIB, 6 * MIB, 6 * MIB, (0,), (2,), (1,), 20 * MIB, expandable=False)
    assert inside == [20] * 7
    assert reserved(12 * MIB, 12 * MIB, (0,), (1,), 24 * MIB, expandable=False)[-1] == 48
    assert reserved(12 * MIB, 12 * MIB, (0,), (1,), 24 * MIB, expandable=True)[-1] == 40  # two pages of 20


def test_an_expandable_segment_maps_pages_to_its_end():
    assert reserved(1, MIB, MIB, 30 * MIB, 30 * MIB, expandable=True) == [2, 2, 4, 44, 64]
    # 10 MiB lie free at the end: 50 more need only two pages
    assert reserved(30 * MIB, 50 * MIB, expandable=True) == [40, 80]
    assert reserved(30 * MIB, 50 * MIB, MIB + 512, expandable=True) == [40, 80, 100]


def test_the_end_that_can_grow_is_spared_where_a_hole_fits():
    own = CachingAllocator()
    first, _, last = own.allocate(36 * MIB), own.allocate(4 * MIB), own.allocate(20 * MIB)
    own.free(first)
    own.free(last)  # a hole of 36 MiB, and 20 MiB at the end, which count as more
    own.allocate(18 * MIB)
    assert [size // MIB for size, _, _ in own.large.free] == [18, 20]


def test_what_is_free_is_released_when_the_gpu_is_full():
    for expandable in (False, True):
        own = CachingAllocator(expandable, limit=60 * MIB)
        kept, freed = own.allocate(20 * MIB), own.allocate(40 * MIB)
        own.free(freed)
        own.allocate(20 * MIB)  # of the 40
        own.free(kept)
        assert own.reserved == 60 * MIB
        with pytest.raises(OutOfDeviceMemory):
            own.allocate(41 * MIB)
        assert own.reserved == (40 if not expandable else 20) * MIB  # half a segment is in use; pages are not
        own.allocate(20 * MIB)


def test_released_pages_are_mapped_again_where_they_were():
    own = CachingAllocator()
    blocks = [own.allocate(20 * MIB) for _ in range(4)]
    for block in blocks[1:3]:
        own.free(block)
    own.release()
    assert own.reserved == 40 * MIB
    assert own.allocate(30 * MIB).start == blocks[1].start and own.reserved == 80 * MIB
    assert own.allocate(25 * MIB).start > blocks[3].start and own.reserved == 120 * MIB


def test_a_page_that_is_partly_in_use_stays():
    own = CachingAllocator()
    first, second, third = own.allocate(30 * MIB), own.allocate(30 * MIB), own.allocate(20 * MIB)
    own.free(second)  # 30 to 60 MiB: one whole page, from 40 on
    own.release()
    assert own.reserved == 60 * MIB and [size // MIB for size, _, _ in own.large.free] == [10]
    own.free(first)
    own.free(third)
    own.release()
    assert own.reserved == 0


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_never_overlap_and_nothing_is_lost(expandable, seed):
    generator, own, live = random.Random(seed), CachingAllocator(expandable, limit=600 * MIB), []
    for _ in range(3000):
        if live and generator.random() < 0.5:
            own.free(live.pop(generator.randrange(len(live))))
        else:
            size = int(2 ** generator.uniform(0, 26))
            try:
                live.append(own.allocate(size))
                assert live[-1].size >= size
            except OutOfDeviceMemory:
                assert sum(b.size for b in live) + size > 200 * MIB
        free = [block for pool in (own.small, own.large) for _, _, block in pool.free]
        assert sum(b.size for b in live) + sum(b.size for b in free) == own.reserved <= own.limit
    ranges = sorted((b.start, b.start + b.size) for b in live)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    for block in live:
        own.free(block)
    own.release()
    assert own.reserved == 0


def fragmented() -> list[allocator.Event]:
    """Rows of growing lengths, one after the other, as a run has them: each is freed before the next."""
    return [event for i in range(1, 9) for event in ((i, (18 + 4 * i) * MIB), (i, None))]


def test_needed_is_the_least_with_which_the_trace_succeeds():
    trace = fragmented()  # 50 MiB at most
    assert replay(trace, expandable=False).peak == sum((18 + 4 * i) * MIB for i in range(1, 9))  # each in its own
    assert needed(trace, 50 * MIB, expandable=False) == 50 * MIB  # what is cached is released
    assert needed(trace, 50 * MIB) == 60 * MIB  # pages of 20
    kept = [(0, 22 * MIB), (1, 30 * MIB), (0, None), (2, 24 * MIB), (3, 20 * MIB)]
    assert needed(kept, 74 * MIB, expandable=False) == pytest.approx(74 * MIB, rel=0.01)
    replay(kept, False, 74 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        replay(kept, False, 73 * MIB)


def test_a_planted_bug_changes_what_is_reserved(monkeypatch):
    """Worst fit instead of best fit, and merging left out: the traces above notice."""
    monkeypatch.setattr(Pool, "best_fit", lambda self, size: self.free[-1][2] if self.free[-1:] > [(size,)] else None)
    with pytest.raises(AssertionError):
        test_the_smallest_block_that_fits_is_taken()
    monkeypatch.undo()
    monkeypatch.setattr(Pool, "add", lambda self, block, state: _unmerged(self, block, state))
    with pytest.raises(AssertionError):
        test_neighbours_merge_and_segments_do_not()


def _unmerged(pool: Pool, block: allocator.Block, state: str) -> allocator.Block:
    block.state = state
    allocator.insort(pool.free, (block.size, block.start, block))
    return block


# -- PyTorch's own setting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
    ],
    ids=["default", "the user's", "the user's, as it used to be spelled"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has expandable segments on Linux only")
def test_every_command_sets_pytorch_up_before_it_is_imported(users, expected):
    code = """
        import sys
        from lowmem_npo.cli import main
        assert "torch" not in sys.modules
        main(["--version"])
        import torch
        from lowmem_npo.libraries import segments_expand
        print(torch._C._accelerator_getAllocatorSettings(), segments_expand())
    """.replace("\n        ", "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": path, **users}
    )
    assert done.stdout.splitlines()[-1:] == [f"{expected} {expected.endswith('segments:True')}"], done.stderr
