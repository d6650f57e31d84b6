"""Batches of rows, packed and padded: where tokens and answers are, and parts without rows."""

import pickle

import pytest
import torch
from helpers.rows import row

from lowmem_npo.data.batching import ForgetRetain, Pick, RowBatch, collator
from lowmem_npo.data.tokenized_rows import TokenizedRow


def test_packed_rows_stand_one_after_the_other():
    batch = RowBatch.of([row(5, prompt=2), row(1), row(3)], pack=True, pad_token_id=99)
    assert batch.packed and len(batch) == 3 and batch.lengths == (5, 1, 3) and batch.answers == (3, 0, 2)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 10, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    assert batch.boundaries.tolist() == [0, 5, 6, 9]
    assert batch.answer_index.tolist() == [1, 2, 3, 6, 7]
    assert batch.targets.tolist() == [12, 13, 14, 11, 12] and batch.sequence.tolist() == [0, 0, 0, 2, 2]


def test_padding_is_on_the_right_and_never_labelled():
    batch = RowBatch.of([row(5, prompt=2), row(1), row(3)], pack=False, pad_token_id=99)
    assert not batch.packed and batch.position_ids is None and batch.boundaries is None
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [10, 99, 99, 99, 99], [10, 11, 12, 99, 99]]
    assert batch.answer_index.tolist() == [1, 2, 3, 10, 11]
    assert batch.targets.tolist() == [12, 13, 14, 11, 12] and batch.sequence.tolist() == [0, 0, 0, 2, 2]


def test_rows_of_one_length_are_never_packed():
    for rows in ([row(4), row(4, prompt=3)], [row(4)]):
        batch = RowBatch.of(rows, pack=True)
        assert not batch.packed and batch.input_ids.shape == (len(rows), 4)


def test_a_label_on_the_first_token_has_nothing_to_predict_it():
    everything = TokenizedRow(input_ids=[7, 8, 9], labels=[7, 8, 9], prompt_length=0)
    for pack in (True, False):
        batch = RowBatch.of([everything, row(2)], pack=pack)
        assert batch.answers == (2, 1) and batch.targets.tolist() == [8, 9, 11]
        predicts = batch.input_ids.flatten()[batch.answer_index]
        assert predicts.tolist() == [7, 8, 10]


def test_whole_rows_are_those_that_label_every_token():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    rows = [TokenizedRow(input_ids=row, labels=row, prompt_length=0) for row in ids.tolist()]
    batch, whole = RowBatch.of(rows, pack=True), RowBatch.whole(ids)
    assert torch.equal(batch.data, whole.data)
    assert (batch.lengths, batch.answers, batch.packed) == (whole.lengths, whole.answers, whole.packed)


@pytest.mark.parametrize("pack", [True, False])
def test_one_copy_takes_a_batch_to_a_device_or_process(pack):
    batch = RowBatch.of([row(5, prompt=2), row(3)], pack=pack, indices=[8, 2])
    assert batch.data.dtype == torch.int64 and batch.rows == (8, 2)
    meta = batch.to(torch.device("meta"))
    copied = pickle.loads(pickle.dumps(batch))
    for name in ("input_ids", "position_ids", "boundaries", "answer_index", "targets", "sequence"):
        own, there = getattr(batch, name), getattr(meta, name)
        assert (own is None and there is None) or (there.is_meta and there.shape == own.shape)
        assert own is None or torch.equal(getattr(copied, name), own)
        assert own is None or own.untyped_storage().data_ptr() == batch.data.untyped_storage().data_ptr()


def test_the_collator_keeps_the_parts_apart():
    dataset = ForgetRetain([row(3), row(5, prompt=2)], [row(2)])
    assert len(dataset) == 2
    picks = [Pick("forget", 1), Pick("retain", 0), Pick("forget", 0)]
    batch = pickle.loads(pickle.dumps(collator(99)))([dataset[pick] for pick in picks])
    assert batch["forget"].rows == (1, 0) and batch["forget"].input_ids.tolist()[1] == [10, 11, 12, 99, 99]
    assert batch["retain"].rows == (0,) and batch["retain"].input_ids.tolist() == [[10, 11]]
    assert collator(99, pack=True)([dataset[pick] for pick in picks])["forget"].packed


def test_a_part_without_rows_is_empty_or_none():
    items = [ForgetRetain([row(3), row(2)])[Pick("forget", i)] for i in (0, 1)]
    for pack in (True, False):
        empty = collator(None, pack=pack)(items)["retain"]
        assert not empty and empty.num_answers == 0 and empty.input_ids.shape == (0, 0)
        assert empty.answer_index.tolist() == empty.targets.tolist() == empty.sequence.tolist() == []
        assert collator(0, with_retain=False, pack=pack)(items)["retain"] is None
        assert not collator(0, pack=pack)([])["forget"]
