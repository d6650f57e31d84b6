"""Passes without padding: rows of unequal length one after the other, each of which attends to itself alone.

Everything in a decoder but attention treats tokens one by one, and needs to know no more of a row than its positions.
Attention is computed row by row (`by_rows`): the model's own function, fused SDPA or eager, on slices of the packed
queries, keys and values. That is as much work as the rows by themselves would be. One call with a block-diagonal mask,
which transformers makes when it finds rows in `position_ids`, computes every row against every other, without the
kernels that need no mask, and not every architecture heeds it. Flash attention has kernels for packed rows: PyTorch's
own, which does the work of `by_rows` in one call where attention is just causal, and that of the package, which
transformers uses if it is given their boundaries.

`by_rows` is an attention implementation as transformers lets them be registered, with a mask of its own, as that of
flex attention is: a `RowMask` goes through the model in place of a tensor, and tells each layer, also when it is
recomputed, where rows end. `lowmem_npo.model.packable` tries whether an architecture's numbers stay the same.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import torch
from lowmem_kernels.launch import capability, has_values
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.model.layers import decoder

flash: Any = None  # PyTorch's flash attention to rows of any length; None before 2.11, or if it has other arguments
SHARES_HEADS = False  # whether it is known to take fewer key heads than query heads
with suppress(ImportError, AttributeError):
    from torch.nn.attention.varlen import varlen_attn

    # The operator itself, with PyTorch's own derivative: `varlen_attn`, the public way to it, wraps both into custom
    # operators written in Python, for whose calls a fast GPU waits.
    _operator = torch.ops.aten._flash_attention_forward.default
    _takes = "query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale"
    if ", ".join(a.name for a in _operator._schema.arguments).startswith(
        f"{_takes}, window_size_left, window_size_right"
    ):
        flash = _operator
    SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters

BY_ROWS = {"sdpa": "rows_sdpa", "eager": "rows_eager"}
"""An attention implementation of transformers, and its name here."""


class Rows(NamedTuple):
    """The rows of a pass."""

    lengths: tuple[int, ...]  # T together
    ends: Tensor  # (B + 1,) int32: where they begin, and the last one ends


_rows: ContextVar[Rows | None] = ContextVar("packed rows", default=None)


class RowMask(NamedTuple):
    """What attention to packed rows needs to know, in place of a (1, 1, T, T) mask."""

    rows: Rows
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
    assert batch.boundaries is not None
    ends, longest = batch.boundaries.to(torch.int32), max(batch.lengths)
    if _is_flash(lm):
        options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    else:  # with a mask, transformers does not look for rows in the positions, which waits for the GPU
        options = {"attention_mask": torch.ones_like(batch.input_ids, dtype=torch.bool)}
    with _packed(Rows(batch.lengths, ends)):
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
def _packed(rows: Rows) -> Iterator[None]:
    """Inside, masks are made for these rows."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def _masks_by_rows(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, a mask function of transformers, except where rows are packed."""

    def mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **how: Any) -> Any:
        rows = _rows.get()
        if rows is None:
            return make(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **how)
        longest = max(rows.lengths)
        return RowMask(rows, make(q_length=longest, kv_length=longest, **how))

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
        (lengths, ends), mask = attention_mask
        if mask is None and attention is sdpa_attention_forward and _in_one_call(module, query, value, how):
            if key.shape[1] != query.shape[1] and not SHARES_HEADS:
                key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
            if has_values(query):  # the estimate counts what row by row takes, which is no less
                return _attend_at_once(query, key, value, ends, max(lengths), how.get("scaling")), None
        rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        masks = [mask if mask is None else mask[..., :length, :length] for length in lengths]
        done = [attention(module, *row, own, **how)[0] for row, own in zip(rows, masks, strict=True)]
        return torch.cat(done, dim=1), None

    return attend


def _in_one_call(module: nn.Module, query: Tensor, value: Tensor, how: dict[str, Any]) -> bool:
    """Whether PyTorch's flash attention to rows of any length does what fused SDPA would."""
    return (
        flash is not None
        and query.is_cuda
        and (not has_values(query) or capability(query.device) >= (8, 0))
        and query.dtype == value.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and how.get("dropout", 0.0) == 0.0
        and (getattr(module, "is_causal", True) if (causal := how.get("is_causal")) is None else causal)
        and all(how.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
    )


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float | None
) -> Tensor:
    """(1, H, T, D) queries, and keys and values of as many heads, or where it SHARES_HEADS of some that divide them;
    (1, T, H, D)."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    causal: dict[str, Any] = {"scale": scale, "window_size_left": -1, "window_size_right": 0}
    attended, *_ = flash(query, key, value, ends, ends, longest, longest, 0.0, True, False, **causal)
    return attended.unsqueeze(0)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Every architecture has an eager attention of its own."""
    return sys.modules[type(module).__module__].eager_attention_forward


for _name, _attention, _mask in (("sdpa", lambda _: sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(BY_ROWS[_name], by_rows(_attention))
    AttentionMaskInterface.register(BY_ROWS[_name], _masks_by_rows(_mask))
