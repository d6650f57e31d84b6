"""Which rows are scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

BATCH_SIZE = 16
MAX_BATCH_TOKENS = 2048  # bounds what one pass computes, whatever the rows' length
CACHE_BYTES = 2**30  # bounds the keys and values that generation keeps


def cache_tokens(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens' keys and values fit into `CACHE_BYTES`: 2048 of OLMo-7B in bf16, many more of small models."""
    return cached_at_once(model.config, model.get_output_embeddings().weight.element_size())


def cached_at_once(architecture: PretrainedConfig, itemsize: int) -> int:
    """The same of a model that is not loaded, whose keys and values have `itemsize` bytes each."""
    config = architecture.get_text_config()
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers  # Gemma 4's differ
    return CACHE_BYTES // max(1, 2 * sum(map(_cache_width, layers)) * itemsize) or 1


def _cache_width(layer: PretrainedConfig) -> int:
    """Keys per token; 0 of state space models, which keep as much of any number of tokens."""
    if (heads := getattr(layer, "num_attention_heads", None)) is None:
        return 0
    kept = getattr(layer, "num_key_value_heads", None) or heads
    return kept * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def at_once(batch_size: int, rows: int, streamed: bool) -> int:
    """Rows per batch: as configured, or all where every pass has to stream the weights. `batches` bounds their tokens
    in any case."""
    return max(batch_size, rows) if streamed else batch_size


def batches(
    lengths: Sequence[tuple[int, int]],
    batch_size: int = BATCH_SIZE,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    positions: int | None = None,
) -> Iterator[list[int]]:
    """Indices of rows, every row once, those of like length together so that little padding is paid for.

    `lengths` holds each row's (prompt tokens, further tokens); both are padded to the longest of the batch. A batch has
    at most `batch_size` rows and, unless it is a single row, at most `max_batch_tokens` tokens, padding included, and
    none that is longer than `positions`.
    """
    batch: list[int] = []
    prompt = further = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i][::-1]):
        prompt, further = max(prompt, lengths[i][0]), max(further, lengths[i][1])
        width = prompt + further
        full = len(batch) == batch_size or (len(batch) + 1) * width > max_batch_tokens
        if batch and (full or (positions is not None and width > positions)):
            yield batch
            batch, (prompt, further) = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch
