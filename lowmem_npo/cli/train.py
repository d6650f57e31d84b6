"""`lowmem-npo train`."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_npo.cli.arguments import parse_run


def main(arguments: Sequence[str]) -> None:
    config = parse_run(arguments, "train")
    from lowmem_npo.run import train  # after parsing: --help need not load transformers

    train(config)
