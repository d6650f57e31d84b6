"""Rows of a batch do not reach each other through a recurrent state, a convolution or padding."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import random_rows

from lowmem_npo.data import RowBatch
from lowmem_npo.model import answer_hidden, packs_rows

RECURRENT = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("architecture", RECURRENT)
@torch.no_grad()
def test_a_row_in_a_batch_is_the_row_alone(architecture):
    model = random_model(tiny_config(architecture, 97))
    rows = random_rows(5, seed=4)
    together = answer_hidden(model, RowBatch.of(rows, pack=packs_rows(model)))
    for index, row in enumerate(rows):
        alone = answer_hidden(model, RowBatch.of([row], pack=False)).hidden
        difference = together.hidden[together.sequence == index] - alone
        assert difference.norm() < 1e-5 * alone.norm()
