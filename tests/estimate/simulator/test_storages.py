"""Live storages are counted once each, by kind, at their peak; checked on real CPU tensors of known sizes."""

from __future__ import annotations

import pytest
import torch

from lowmem_npo.estimate.simulator.storages import StorageCounter

KIB = 1024


@pytest.fixture
def counter():
    with StorageCounter("cpu") as counter:
        yield counter


def test_sizes_are_rounded_to_the_allocators_blocks(counter):
    kept = [torch.empty(size, dtype=torch.uint8) for size in (1, 512, 513)]
    assert counter.live == 512 + 512 + 1024
    del kept
    assert counter.live == 0 and counter.peak == 2048


def test_views_share_their_storage_and_keep_it_alive(counter):
    whole = torch.empty(4, KIB, dtype=torch.uint8)
    row = whole[1].view(2, 512).t()
    assert counter.live == 4 * KIB
    del whole
    assert counter.live == 4 * KIB
    del row
    assert counter.live == 0


def test_what_autograd_saves_lives_until_the_backward_pass(counter):
    x = torch.ones(KIB, requires_grad=True)  # 4 KiB
    loss = (x * 2).exp().sum()
    assert counter.live == 4 * KIB + 4 * KIB + 512  # x, the exponential, the sum
    loss.backward()
    assert counter.live == 4 * KIB + 4 * KIB + 512  # x, its gradient, the sum
    assert counter.peak >= 4 * KIB + 2 * 4 * KIB + 512


def test_kinds_follow_phases_and_marks(counter):
    counter.kind = "weights"
    weights = torch.empty(KIB, dtype=torch.uint8)
    counter.kind = "work"
    work = torch.empty(2 * KIB, dtype=torch.uint8)
    with counter.allocating("head"):
        head = torch.empty(512, dtype=torch.uint8)
    counter.mark([work[:10], {"again": work}], "batch")
    assert counter.by_kind == {"weights": KIB, "work": 0, "head": 512, "batch": 2 * KIB}
    assert sum(counter.at_peak.values()) == counter.peak == KIB * 3 + 512
    del weights, work, head
    assert not any(counter.by_kind.values())


def test_what_existed_before_counts_once_it_is_marked():
    before = torch.empty(KIB, dtype=torch.uint8)
    with StorageCounter("cpu") as counter:
        also = before[:5]
        counter.mark(before, "weights")
        assert counter.live == KIB
        del before
        assert counter.live == KIB
        del also
        assert counter.live == 0


def test_workspace_counts_only_at_the_peak(counter):
    kept = torch.empty(KIB, dtype=torch.uint8)
    counter.transient(4 * KIB)
    assert counter.live == KIB and counter.peak == 5 * KIB
    del kept


def test_other_devices_are_counted_apart():
    with StorageCounter("cuda") as counter:
        kept = torch.empty(KIB, dtype=torch.uint8)
        assert counter.live == counter.peak == 0 and counter.off_device == counter.off_device_peak == KIB
        del kept
        assert counter.off_device == 0 and counter.off_device_peak == KIB
