"""The block sizes of the `tiles` kernels, by GPU and problem; how many shares the vocabulary is split into.

Chosen so that nothing spills and, on the GPUs with 99 KiB of shared memory per program (sm_86, sm_89: the 24 GB cards),
everything fits; compilation for each GPU checks both.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """A program's tile of the result is ROWS x COLUMNS, summed over DEPTH entries at a time."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int


# kernel: GPU family: by the number of extras, each of which takes registers: a reference, a softcap
LOGITS = {
    "sweep": {
        "ampere": (TileConfig(128, 128, 32, 8, 4), TileConfig(128, 64, 32, 8, 4), TileConfig(64, 64, 32, 8, 4)),
        "hopper": (TileConfig(128, 256, 64, 8, 3), TileConfig(128, 64, 64, 8, 3), TileConfig(64, 64, 64, 8, 3)),
    },
    "slope": {
        "ampere": (TileConfig(128, 128, 32, 8, 4), TileConfig(128, 64, 64, 8, 3), TileConfig(128, 64, 32, 8, 4)),
        "hopper": (TileConfig(128, 128, 64, 8, 3), TileConfig(128, 64, 64, 8, 3), TileConfig(128, 64, 64, 8, 3)),
    },
}
PRODUCT = {"ampere": TileConfig(128, 128, 32, 8, 4), "hopper": TileConfig(128, 128, 64, 8, 3)}
FEW_TOKENS = TileConfig(16, 128, 32, 4, 5)  # W is read only once in any case: several programs at a time wait for it
# Float32 products are exact, without tensor cores. Rows that do not start at multiples of 16 bytes, as with an odd d,
# cannot be copied to shared memory in the background: they go through registers.
UNTUNED = TileConfig(32, 32, 32, 8, 2)
UNTUNED_SM_120 = TileConfig(16, 32, 32, 4, 2)  # there the larger one spills 16 bytes


def family(capability: tuple[int, int]) -> str:
    """hopper: sm_90 and sm_100, with asynchronous tensor cores and 227 KiB of shared memory; ampere: all others."""
    return "hopper" if capability[0] in (9, 10) else "ampere"


def tuned(dtype: torch.dtype, d: int) -> bool:
    return dtype != torch.float32 and d % 16 == 0


def untuned(capability: tuple[int, int]) -> TileConfig:
    return UNTUNED_SM_120 if capability[0] == 12 else UNTUNED


def logits_config(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, d: int, extras: int, num_tokens: int
) -> TileConfig:
    """For the kernels that compute logits, "sweep" and "slope"; extras: see LOGITS."""
    if not tuned(dtype, d):
        return untuned(capability)
    if num_tokens <= FEW_TOKENS.ROWS:
        return FEW_TOKENS
    return LOGITS[kernel][family(capability)][extras]


def product_config(capability: tuple[int, int], dtype: torch.dtype, d: int) -> TileConfig:
    """For the kernel that multiplies slopes by W."""
    return PRODUCT[family(capability)] if tuned(dtype, d) else untuned(capability)


def shares_of_vocabulary(row_blocks: int, tiles: int, processors: int) -> int:
    """The number that finishes first, with row_blocks x shares programs in rounds of `processors`; at most 4 rounds.

    More rounds would even out little more, and their statistics, of every share for every token, would add up.
    """

    def duration(shares: int) -> int:
        return -(-row_blocks * shares // processors) * -(-tiles // shares)

    most = max(1, min(tiles, 4 * processors // row_blocks))
    return min(range(1, most + 1), key=lambda shares: (duration(shares), shares))
