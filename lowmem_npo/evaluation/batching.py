"""Which rows are scored together."""

from collections.abc import Iterator, Sequence

BATCH_SIZE = 8
# Bounds the KV cache, whatever the rows' length: 0.5 MiB per token for OLMo-7B in bf16, so 1 GiB.
MAX_BATCH_TOKENS = 2048


def batches(
    lengths: Sequence[tuple[int, int]], batch_size: int = BATCH_SIZE, max_batch_tokens: int = MAX_BATCH_TOKENS
) -> Iterator[list[int]]:
    """Indices of rows, every row once, those of like length together so that little padding is paid for.

    `lengths` holds each row's (prompt tokens, further tokens); both are padded to the longest of the batch. A batch has
    at most `batch_size` rows and, unless it is a single row, at most `max_batch_tokens` tokens, padding included.
    """
    batch: list[int] = []
    prompt = further = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i][::-1]):
        prompt, further = max(prompt, lengths[i][0]), max(further, lengths[i][1])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (prompt + further) > max_batch_tokens):
            yield batch
            batch, (prompt, further) = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch
