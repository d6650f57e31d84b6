"""Passes without padding: rows of unequal length one after the other, each of which attends to itself alone.

Everything in a decoder but attention treats tokens one by one, and needs to know no more of a row than its positions.
Attention is computed row by row (`by_rows`): the model's own function, fused SDPA or eager, on slices of the packed
queries, keys and values. That is as much work as the rows by themselves would be. One call with a block-diagonal mask,
which transformers makes when it finds rows in `position_ids`, computes every row against every other, without the
kernels that need no mask, and not every architecture heeds it. Flash attention has kernels for packed rows, which
transformers uses if it is given their boundaries.

`by_rows` is an attention implementation as transformers lets them be registered, with a mask of its own, as that of
flex attention is: a `RowMask` goes through the model in place of a tensor, and tells each layer, also when it is
recomputed, where rows end. `lowmem_npo.model.packable` tries whether an architecture's numbers stay the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.model.layers import decoder

BY_ROWS = {"sdpa": "rows_sdpa", "eager": "rows_eager"}
"""An attention implementation of transformers, and its name here."""

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths of packed rows", default=None)


class RowMask(NamedTuple):
    """What attention to packed rows needs to know, in place of a (1, 1, T, T) mask."""

    lengths: tuple[int, ...]  # of the rows, T together
    mask: Tensor | None  # (1, 1, S, S) of the longest row, whose corner is that of a shorter one; None: just causal


def final_states(lm: PreTrainedModel, batch: RowBatch) -> Tensor:
    """One pass through the decoder, without its head: (R, C, d), as the ids of `batch`.

    Padded rows get no mask: in causal attention no token sees the padding to its right, and without a mask attention
    takes its fused causal path and no (B, 1, S, S) mask is made.

    Raises:
        ValueError: the batch is packed, and `lm` cannot take packed rows (`take_rows`).
    """
    if not batch.packed:
        with _no_search():
            return decoder(lm)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    if not take_rows(lm):
        raise ValueError(f"{type(lm).__name__} cannot take packed rows")
    options: dict[str, Any]
    if _is_flash(lm):
        assert batch.boundaries is not None
        ends, longest = batch.boundaries.to(torch.int32), max(batch.lengths)
        options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    else:  # with a mask, transformers does not look for rows in the positions, which waits for the GPU
        options = {"attention_mask": torch.ones_like(batch.input_ids, dtype=torch.bool)}
    with _packed(batch.lengths):
        return decoder(lm)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options
        ).last_hidden_state


def take_rows(lm: PreTrainedModel) -> bool:
    """Makes the attention of `lm` take packed rows; all else is computed as before. False, and nothing is changed,
    where it is not transformers' to replace."""
    implementation = lm.config._attn_implementation
    if _is_flash(lm) or implementation in BY_ROWS.values():
        return True
    if implementation not in BY_ROWS or not lm._can_set_attn_implementation():
        return False
    lm.set_attn_implementation(BY_ROWS[implementation])
    return True


def _is_flash(lm: PreTrainedModel) -> bool:
    return "flash" in str(lm.config._attn_implementation)


@contextmanager
def _no_search() -> Iterator[None]:
    """Inside, transformers does not look for packed rows in the positions, which waits for the GPU: there are none."""
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextmanager
def _packed(lengths: tuple[int, ...]) -> Iterator[None]:
    """Inside, masks are made for rows of these lengths."""
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def _masks_by_rows(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, a mask function of transformers, except where rows are packed."""

    def mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **how: Any) -> Any:
        lengths = _lengths.get()
        if lengths is None:
            return make(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **how)
        return RowMask(lengths, make(q_length=max(lengths), kv_length=max(lengths), **how))

    return mask


def by_rows(attend_with: Callable[[nn.Module], Callable[..., Any]]) -> Callable[..., Any]:
    """The attention function that `attend_with` gives for a module, row by row where they are packed."""

    def attend(
        module: nn.Module,
        query: Tensor,  # (1, H, T, D); or (B, H, S, D)
        key: Tensor,
        value: Tensor,
        attention_mask: RowMask | Tensor | None,
        **how: Any,
    ) -> tuple[Tensor, Any]:  # (1, T, H, D); or (B, S, H, D)
        attention = attend_with(module)
        if not isinstance(attention_mask, RowMask):
            return attention(module, query, key, value, attention_mask, **how)
        lengths, mask = attention_mask
        rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        masks = [mask if mask is None else mask[..., :length, :length] for length in lengths]
        done = [attention(module, *row, own, **how)[0] for row, own in zip(rows, masks, strict=True)]
        return torch.cat(done, dim=1), None

    return attend


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Every architecture has an eager attention of its own."""
    return sys.modules[type(module).__module__].eager_attention_forward


for _name, _attention, _mask in (("sdpa", lambda _: sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(BY_ROWS[_name], by_rows(_attention))
    AttentionMaskInterface.register(BY_ROWS[_name], _masks_by_rows(_mask))
