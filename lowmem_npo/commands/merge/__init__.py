"""`lowmem-npo merge`: an adapter becomes part of the weights, which plain transformers then loads."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from lowmem_npo.commands.arguments import with_help
from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.libraries import quiet_libraries


def main(arguments: Sequence[str]) -> None:
    parsed = tyro.cli(with_help(MergeConfig), args=list(arguments), prog="lowmem-npo merge")
    config = MergeConfig(**vars(parsed))
    quiet_libraries()
    from lowmem_npo.commands.merge.run import merge  # late: --help need not load transformers

    merge(config)
