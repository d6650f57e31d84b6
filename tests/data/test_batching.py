"""Padding, and parts without rows."""

import torch
from lowmem_kernels import IGNORE_INDEX

from lowmem_npo.data.batching import ForgetRetain, Pick, collator
from lowmem_npo.data.tokenizing import TokenizedRow


def row(length: int, prompt: int = 1) -> TokenizedRow:
    ids = list(range(10, 10 + length))
    return TokenizedRow(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:], prompt_length=prompt)


def test_padding_is_on_the_right_and_never_labelled():
    dataset = ForgetRetain([row(3), row(5, prompt=2)], [row(2)])
    picks = [Pick("forget", 1), Pick("forget", 0), Pick("retain", 0)]
    batch = collator(99)([dataset[pick] for pick in picks])
    forget, retain = batch["forget"], batch["retain"]
    assert forget["input_ids"].tolist() == [[10, 11, 12, 13, 14], [10, 11, 12, 99, 99]]
    assert forget["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert forget["labels"].tolist() == [[-100, -100, 12, 13, 14], [-100, 11, 12, -100, -100]]
    assert forget["row"].tolist() == [1, 0]
    assert retain["input_ids"].tolist() == [[10, 11]]
    assert {tensor.dtype for part in batch.values() for tensor in part.values()} == {torch.int64}


def test_widths_can_be_rounded_up_and_pad_tokens_missing():
    batch = collator(None, pad_to_multiple_of=8)([(Pick("forget", 0), row(9))])
    assert batch["forget"]["input_ids"].tolist() == [[*range(10, 19), *[0] * 7]]
    assert batch["retain"]["labels"].shape == (0, 0)


def test_a_part_without_rows_is_empty_or_none():
    dataset = ForgetRetain([row(3)])
    assert len(dataset) == 1
    items = [dataset[Pick("forget", 0)]]
    assert {name: len(tensor) for name, tensor in collator(0)(items)["retain"].items()} == {
        "input_ids": 0, "attention_mask": 0, "labels": 0, "row": 0
    }  # fmt: skip
    assert collator(0, with_retain=False)(items)["retain"] is None
    assert collator(0)([])["forget"]["input_ids"].shape == (0, 0)
