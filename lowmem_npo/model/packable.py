"""Which models can take packed rows: judged by their numbers, not by a list."""

from __future__ import annotations

import functools
import logging
import weakref

import torch
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.endings import tried
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.modes import eval_mode
from lowmem_npo.model.packing import BY_ROWS, final_states, take_rows
from lowmem_npo.model.precision import compute_autocast
from lowmem_npo.model.trial import trial_model

logger = logging.getLogger(__name__)

LENGTHS = 7, 3, 12  # of the rows that are tried
EXACT = 1e-4  # of a state's size, in float32; what reaches a row from another changes it by a tenth and more

_judged: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def packs_rows(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `model` can take packed rows. If so, its attention can from now on (`take_rows`).

    A small random copy of its architecture is tried, in float32, and then the model itself. Not every architecture
    keeps rows apart: a state runs on from token to token (Mamba, linear attention, short convolutions), or positions
    are counted elsewhere (ALiBi). Of a simulated model there are no numbers to judge: ask `packable` before.
    """
    lm = causal_lm(model)
    if not has_values(lm.get_output_embeddings().weight):
        return take_rows(lm)
    if lm not in _judged:
        attention = plain_attention(str(lm.config._attn_implementation))
        _judged[lm] = packable(lm.config, attention) and take_rows(lm) and _keeps_rows_apart(lm)
        if not _judged[lm]:
            lm.config._attn_implementation = attention
            logger.info(padding_note(lm.config.model_type))
    return _judged[lm]


def packable(architecture: PretrainedConfig, attention: str) -> bool:
    """The same of an architecture, as far as it can be known before there is a model; attention: --attn."""
    return _packable(Hashed(architecture), attention)


def padding_note(kind: str) -> str:
    return f"Rows of unequal length are padded: a {kind} would not keep them apart in a packed pass."


class Hashed:
    """A configuration, equal to others of the same content."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.content = {**config.to_dict(), "name_or_path": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.config.model_type)


@functools.lru_cache(maxsize=64)
def _packable(architecture: Hashed, attention: str) -> bool:
    model = trial_model(architecture.config, attention)
    return model is not None and take_rows(model) and _keeps_rows_apart(model)


@torch.no_grad()
def _keeps_rows_apart(lm: PreTrainedModel) -> bool:
    """Whether the states of packed rows are those of the rows alone, but for rounding."""
    head = lm.get_output_embeddings().weight
    ids = torch.arange(1, sum(LENGTHS) + 1, device=lm.device) % lm.config.get_text_config().vocab_size
    rows = [row.tolist() for row in ids.split(LENGTHS)]
    with eval_mode(lm), compute_autocast(lm):
        alone = torch.cat([_states(lm, [row]) for row in rows])
        packed = None
        with tried():  # whatever an architecture's own code raises for a mask that it does not know
            packed = _states(lm, rows)
    if packed is None:
        return False
    size = alone.norm(dim=-1)  # 0 of OLMo's padding token at the start of a row, whose embedding is 0
    changed = (packed - alone).norm(dim=-1) / torch.maximum(size, size.median())
    if head.dtype == torch.float32:
        return bool(changed.max() < EXACT)
    return bool(changed.mean() < 8 * torch.finfo(head.dtype).eps)


def _states(lm: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(tokens, d) float32."""
    batch = RowBatch.of([{"input_ids": row, "labels": row, "prompt_length": 0} for row in rows], pack=True)
    return final_states(lm, batch.to(lm.device)).flatten(0, 1).float()


def plain_attention(implementation: str) -> str:
    """transformers' name of an attention implementation."""
    return next((name for name, own in BY_ROWS.items() if own == implementation), implementation)
