"""What PyTorch's caching allocator takes of a GPU to serve a sequence of allocations: more than is in use at the peak,
since not all that is free then lies together.

A model of `CUDACachingAllocator.cpp`, with one stream: every tensor of a run is allocated and freed on the stream that
computes, those that are copied on another one included. Sizes are rounded to 512 bytes; blocks of up to 1 MiB come from
one pool, larger ones from another. The smallest free block that is large enough serves a request; the rest of it is
split off, and merged with its neighbours where they are free. Where none is large enough, the driver is asked for more:

- segments: 2 MiB for small blocks, 20 MiB for those below 10 MiB, and one of its own, rounded to 2 MiB, for any that is
  larger. The rest of a block in the large pool is split off only if it has more than 1 MiB;
- expandable segments: each pool is one range of addresses, to whose end, or wherever pages have been released, pages of
  2 MiB (small pool) or 20 MiB (large pool) are mapped.

When the GPU is full, segments without a block in use, or such pages, are released before the request fails.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from lowmem_npo.estimate.simulator.storages import BLOCK, Event, up

MIB = 2**20
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT = 10 * MIB, 20 * MIB
ADDRESSES = 2**56  # of an expandable segment: more than it will map


class OutOfDeviceMemory(Exception):
    """The limit is too low for an allocation, whatever is released."""


class Block:
    """A range of addresses: in use, free, or without memory."""

    __slots__ = ("start", "size", "state", "before", "after")

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size, self.state = start, size, "used"  # or "free", or "unmapped"
        self.before: Block | None = None
        self.after: Block | None = None

    def split(self, size: int) -> Block:
        """Keeps the first `size` bytes; the rest is a new block."""
        rest = Block(self.start + size, self.size - size)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def join_next(self) -> None:
        """Takes the addresses of the block after it."""
        taken = self.after
        assert taken is not None
        self.size += taken.size
        self.after = taken.after
        if self.after is not None:
            self.after.before = self


class Pool:
    """The blocks of one range of sizes."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.free: list[tuple[int, int, Block]] = []  # by size, then address
        self.unmapped: list[tuple[int, Block]] = []  # by address

    def add(self, block: Block, state: str) -> Block:
        """Puts `block` among the free or unmapped ones, merged with neighbours of that state. Returns the result."""
        if block.before is not None and block.before.state == state:
            block = block.before
            self.remove(block)
            block.join_next()
        if block.after is not None and block.after.state == state:
            self.remove(block.after)
            block.join_next()
        block.state = state
        if state == "free":
            insort(self.free, (block.size, block.start, block))
        else:
            insort(self.unmapped, (block.start, block))
        return block

    def remove(self, block: Block) -> None:
        """Takes `block` from the free or unmapped ones."""
        if block.state == "free":
            del self.free[bisect_left(self.free, (block.size, block.start))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.start,))]
        block.state = "used"

    def best_fit(self, size: int) -> Block | None:
        """The smallest free block of at least `size` bytes. One that can grow counts as large as it can become."""
        at = bisect_left(self.free, (size,))
        if at == len(self.free):
            return None
        while at + 1 < len(self.free) and _can_become(self.free[at + 1][2]) < _can_become(self.free[at][2]):
            at += 1
        return self.free[at][2]


def _can_become(block: Block) -> int:
    growth = block.after.size if block.after is not None and block.after.state == "unmapped" else 0
    return block.size + growth


class CachingAllocator:
    """Serves allocations; `reserved` and `peak` are the bytes that it holds of the GPU now, and has held at most.

    Args:
        expandable: with expandable segments, as this project sets PyTorch up.
        limit: the bytes that there are.
    """

    def __init__(self, expandable: bool = True, limit: float = math.inf) -> None:
        self.expandable, self.limit = expandable, limit
        self.reserved = self.peak = 0
        self.small, self.large = Pool(SMALL_SEGMENT), Pool(LARGE_SEGMENT)
        self._next_address = 0
        for pool in (self.small, self.large) if expandable else ():
            pool.add(Block(self._addresses(ADDRESSES), ADDRESSES), "unmapped")

    def allocate(self, size: int) -> Block:
        """Raises OutOfDeviceMemory if `limit` does not allow it."""
        size = up(max(size, 1), BLOCK)
        pool = self._pool(size)
        block = pool.best_fit(size) or self._grow(pool, size)
        if block is None:
            self.release()
            block = self._grow(pool, size)
        if block is None:
            raise OutOfDeviceMemory(f"{size} bytes; {self.reserved} of {self.limit} are taken")
        pool.remove(block)
        rest = block.size - size
        if rest and (self.expandable or pool is self.small or rest > SMALL):
            pool.add(block.split(size), "free")
        return block

    def free(self, block: Block) -> None:
        self._pool(block.size).add(block, "free")

    def release(self) -> None:
        """Gives back what holds nothing in use: whole segments, or pages."""
        for pool in (self.large, self.small):
            for _, _, block in list(pool.free):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _pool(self, size: int) -> Pool:
        return self.small if size <= SMALL else self.large

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """A free block of at least `size` bytes, made with more memory; None where the limit does not allow it."""
        if self.expandable:
            return self._expand(pool, size)
        segment = pool.page if size < LARGE else up(size, SMALL_SEGMENT)
        if not self._reserve(segment):
            return None
        return pool.add(Block(self._addresses(segment), segment), "free")

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Maps pages at the lowest addresses where free and unmapped blocks in a row have `size` bytes."""
        block = next(start for _, b in pool.unmapped if _room(start := _row(b)) >= size)
        while block.state == "unmapped" or block.size < size:
            target = block if block.state == "unmapped" else block.after
            assert target is not None
            missing = size if target is block else size - block.size
            pages = min(up(missing, pool.page), target.size)
            if not self._reserve(pages):
                return None
            pool.remove(target)
            if pages < target.size:
                pool.add(target.split(pages), "unmapped")
            block = pool.add(target, "free")
        return block

    def _unmap(self, pool: Pool, block: Block) -> None:
        """Releases the pages that lie in a free block whole."""
        begin, end = up(block.start, pool.page), (block.start + block.size) // pool.page * pool.page
        if begin >= end:
            return
        pool.remove(block)
        if end < block.start + block.size:
            pool.add(block.split(end - block.start), "free")
        if begin > block.start:
            middle = block.split(begin - block.start)
            pool.add(block, "free")
            block = middle
        self.reserved -= block.size
        pool.add(block, "unmapped")

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self.limit:
            return False
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        return True

    def _addresses(self, size: int) -> int:
        """A range of `size` that has not been used."""
        start = self._next_address
        self._next_address += up(size, LARGE_SEGMENT)
        return start


def needed(trace: Sequence[Event], in_use: int, expandable: bool = True) -> int:
    """The least memory, to within 1%, with which the allocations and frees of `trace` succeed; `in_use`, the peak of
    what they use, is too little."""
    too_little, enough = in_use, replay(trace, expandable).peak
    while enough > too_little * 1.01:
        middle = (too_little + enough) // 2
        try:
            enough = replay(trace, expandable, middle).peak
        except OutOfDeviceMemory:
            too_little = middle
    return enough


def replay(trace: Iterable[Event], expandable: bool = True, limit: float = math.inf) -> CachingAllocator:
    """The allocator after the allocations and frees that a `StorageCounter` has seen.

    Raises:
        OutOfDeviceMemory: `limit` does not allow them.
    """
    allocator = CachingAllocator(expandable, limit)
    blocks: dict[int, Block] = {}
    for storage, size in trace:
        if size is None:
            allocator.free(blocks.pop(storage))
        else:
            blocks[storage] = allocator.allocate(size)
    return allocator


def _row(block: Block) -> Block:
    """Where the free and unmapped blocks begin that end with `block`: PyTorch looks at one block before it."""
    return block.before if block.before is not None and block.before.state == "free" else block


def _room(block: Block | None) -> int:
    """The bytes of the free and unmapped blocks from here on."""
    room = 0
    while block is not None and block.state != "used":
        room, block = room + block.size, block.after
    return room
