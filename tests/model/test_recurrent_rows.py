"""Rows of a batch do not reach each other through a recurrent state, a convolution or padding."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import random_rows

from lowmem_npo.data import Pick, collator
from lowmem_npo.model import answer_hidden

RECURRENT = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("architecture", RECURRENT)
@torch.no_grad()
def test_a_row_in_a_batch_is_the_row_alone(architecture):
    model = random_model(tiny_config(architecture, 97))
    rows = random_rows(5, seed=4)
    batch = collator(0, with_retain=False)([(Pick("forget", i), row) for i, row in enumerate(rows)])["forget"]
    together = answer_hidden(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    for index, row in enumerate(rows):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        alone = answer_hidden(model, ids, torch.ones_like(ids), labels).hidden
        difference = together.hidden[together.sequence == index] - alone
        assert difference.norm() < 1e-5 * alone.norm()
