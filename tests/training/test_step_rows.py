"""Which rows a step trains on: every split the same rows, every epoch all of them, resumed as if never stopped."""

from __future__ import annotations

from collections import Counter

import pytest
from accelerate import skip_first_batches
from helpers.rows import row
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lowmem_npo.data.batching import ForgetRetain, Pick, collator
from lowmem_npo.training.step_rows import StepBatches

sizes = st.fixed_dictionaries(
    {
        "num_forget": st.integers(1, 23),
        "num_retain": st.integers(0, 17),
        "batch_size": st.integers(1, 9),
        "retain_batch_size": st.integers(0, 9),
        "seed": st.integers(0, 3),
    }
)


def epoch_of(sampler: StepBatches, epoch: int) -> list[list[Pick]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def rows_of(picks, part: str) -> list[int]:
    return [pick.row for pick in picks if pick.part == part]


def check_split(kind, sizes, micro_batches, world_size, epoch):
    """The micro-batches of all ranks hold each step's rows once, in shares that differ by one row at most."""
    whole = epoch_of(kind(**sizes), epoch)
    split = {"micro_batches": micro_batches, "world_size": world_size}
    ranks = [epoch_of(kind(**sizes, **split, rank=rank), epoch) for rank in range(world_size)]
    for rank in ranks:
        assert len(rank) == len(whole) * micro_batches
    for step, picks in enumerate(whole):
        shares = [share for rank in ranks for share in rank[step * micro_batches : (step + 1) * micro_batches]]
        assert Counter(pick for share in shares for pick in share) == Counter(picks)
        for part in ("forget", "retain"):
            counts = [len(rows_of(share, part)) for share in shares]
            assert max(counts) - min(counts) <= 1


def check_epoch(kind, sizes, epoch):
    """An epoch is the forget set once, in full steps but for the last."""
    sampler = kind(**sizes)
    batches = epoch_of(sampler, epoch)
    forget = [rows_of(batch, "forget") for batch in batches]
    assert sorted(index for rows in forget for index in rows) == list(range(sizes["num_forget"]))
    assert all(len(rows) == sizes["batch_size"] for rows in forget[:-1])
    assert 1 <= len(forget[-1]) <= sizes["batch_size"]
    assert len(batches) == len(sampler) == sampler.steps_per_epoch


def check_retain(kind, sizes):
    """Retain rows come without repetition until all have come, across steps and epochs."""
    sampler, wanted = kind(**sizes), sizes["retain_batch_size"] if sizes["num_retain"] else 0
    batches = [batch for epoch in range(4) for batch in epoch_of(sampler, epoch)]
    assert all(len(rows_of(batch, "retain")) == wanted for batch in batches)
    drawn = [index for batch in batches for index in rows_of(batch, "retain")]
    for start in range(0, len(drawn), sizes["num_retain"] or 1):
        turn = drawn[start : start + sizes["num_retain"]]
        assert len(set(turn)) == len(turn)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, micro_batches=st.integers(1, 4), world_size=st.integers(1, 3), epoch=st.integers(0, 4))
def test_a_step_has_the_same_rows_however_it_is_split(sizes, micro_batches, world_size, epoch):
    check_split(StepBatches, sizes, micro_batches, world_size, epoch)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, epoch=st.integers(0, 4))
def test_an_epoch_is_the_forget_set_once(sizes, epoch):
    check_epoch(StepBatches, sizes, epoch)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_retain_rows_are_drawn_until_exhausted(sizes):
    check_retain(StepBatches, sizes)


class DropsRemainder(StepBatches):
    """Floor division, as a data loader with drop_last."""

    def micro_batch(self, step, index):
        forget, retain = self.step_rows(step)
        size = len(forget) // (self.micro_batches * self.world_size)
        share = index * self.world_size + self.rank
        picks = [Pick("forget", row) for row in forget[share * size : (share + 1) * size]]
        return picks + [Pick("retain", row) for row in retain]


class RestartsRetain(StepBatches):
    """Retain rows from the beginning of a new order in every epoch."""

    def step_rows(self, step):
        forget, _ = super().step_rows(step)
        return forget, super().step_rows(step % self.steps_per_epoch)[1]


SIZES = {"num_forget": 10, "num_retain": 7, "batch_size": 4, "retain_batch_size": 3, "seed": 0}


@pytest.mark.parametrize(
    ("check", "broken", "arguments"),
    [
        (check_split, DropsRemainder, (3, 1, 0)),
        (check_split, DropsRemainder, (1, 3, 0)),
        (check_epoch, type("Short", (StepBatches,), {"steps_per_epoch": property(lambda self: 2)}), (0,)),
        (check_retain, RestartsRetain, ()),
    ],
)
def test_the_checks_see_broken_samplers(check, broken, arguments):
    check(StepBatches, SIZES, *arguments)
    with pytest.raises(AssertionError):
        check(broken, SIZES, *arguments)


def test_every_turn_and_every_seed_has_an_order_of_its_own():
    def orders(seed):
        sampler = StepBatches(20, 20, 20, 20, seed=seed)
        batches = [epoch_of(sampler, epoch)[0] for epoch in range(3)]
        return [tuple(rows_of(batch, part)) for batch in batches for part in ("forget", "retain")]

    assert len(set(orders(0) + orders(1))) == 12
    assert orders(0) == orders(0)


def test_the_rows_of_any_step_are_known():
    sampler = StepBatches(10, 7, 4, 3, micro_batches=2, seed=5)
    batches = [batch for epoch in range(3) for batch in epoch_of(sampler, epoch)]
    for step in range(9):
        both = batches[2 * step] + batches[2 * step + 1]
        assert sampler.step_rows(step) == (rows_of(both, "forget"), rows_of(both, "retain"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_continues_where_it_stopped(workers):
    """With the function by which `transformers.Trainer` skips what a checkpoint has seen."""
    forget, retain = [row(2 + index % 5) for index in range(10)], [row(2 + index % 3) for index in range(7)]

    def loader(sampler):
        return DataLoader(
            ForgetRetain(forget, retain), batch_sampler=sampler, collate_fn=collator(0), num_workers=workers
        )

    def rows_in(batches):
        return [(batch["forget"].rows, batch["retain"].rows) for batch in batches]

    sampler = StepBatches(10, 7, 4, 3, micro_batches=2, seed=5)
    sampler.set_epoch(2)
    whole = rows_in(loader(sampler))
    fresh = StepBatches(10, 7, 4, 3, micro_batches=2, seed=5)
    rest = skip_first_batches(loader(fresh), 4)
    fresh.set_epoch(2)  # the Trainer announces the epoch after skipping
    assert len(rest) == len(whole) - 4
    assert rows_in(rest) == whole[4:]
    fresh.set_epoch(1)
    assert rows_in(rest) != whole[4:], "another epoch has another order"


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_forget", 0), ("batch_size", 0), ("retain_batch_size", -1), ("micro_batches", 0), ("seed", -1), ("rank", 2)],
)
def test_impossible_sizes_are_named(name, value):
    sizes = {"num_forget": 4, "num_retain": 4, "batch_size": 2, "retain_batch_size": 2, "world_size": 2, name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        StepBatches(**sizes)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_row_is_followed_by_another_answer_in_every_epoch(micro_batches):
    plain = StepBatches(5, 3, 2, 2, micro_batches, seed=4)
    sampler = StepBatches(5, 3, 2, 2, micro_batches, seed=4, alternatives=3)
    for epoch in range(4):
        for alone, both in zip(epoch_of(plain, epoch), epoch_of(sampler, epoch), strict=True):
            rows, pairs = rows_of(alone, "forget"), rows_of(both, "forget")
            assert pairs[::2] == rows and rows_of(alone, "retain") == rows_of(both, "retain")
            offset = 5 * (1 + epoch % 3)
            assert pairs[1::2] == [row + offset for row in rows]
