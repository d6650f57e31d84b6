"""What `speed.py --cpu` measured, as a table: each way against the first, the padded and checkpointed one."""

from __future__ import annotations

from typing import Any

EPOCHS = ("first", "second")


def markdown(result: dict[str, Any]) -> str:
    """CPU seconds (medians) and FLOPs of a step; those of the first way as they are, of the others as a ratio."""
    (first, plain), *others = result["ways"].items()
    seconds = [f"{plain[epoch]['median']:.2f} s" for epoch in EPOCHS]
    flops = [f"{plain[epoch]['flops'] / 1e12:.2f} T" for epoch in EPOCHS]
    rows = [[first, *seconds, *flops]]
    for name, way in others:
        ratios = [f"{way[e][what] / plain[e][what]:.2f}" for what in ("median", "flops") for e in EPOCHS]
        rows.append([name, *ratios])
    header = ["", *(f"{what}, {epoch} epoch" for what in ("time", "FLOPs") for epoch in EPOCHS)]
    lines = [header, ["---", *["---:"] * 4], *rows]
    tokens = result["tokens"]
    note = f"{tokens['padded'] / tokens['real']:.2f} padded tokens per real one; {tokens['real']:.0f} real ones a step."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])
