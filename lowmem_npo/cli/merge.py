"""`lowmem-npo merge`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from lowmem_npo.cli.quiet import quiet_libraries


def main(arguments: Sequence[str]) -> None:
    from lowmem_npo.merge import MergeConfig, merge

    config = tyro.cli(MergeConfig, args=list(arguments), prog="lowmem-npo merge")
    quiet_libraries()
    merge(config)
