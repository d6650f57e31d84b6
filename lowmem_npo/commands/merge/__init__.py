"""`lowmem-npo merge`: an adapter becomes part of the weights, which plain transformers then loads."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_npo.commands.arguments import check_inputs, parse_options
from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.sources import check_adapter_name


def main(arguments: Sequence[str]) -> None:
    config = parse_options(MergeConfig, arguments, "merge")
    check_adapter_name(config.adapter)
    check_inputs(config.model, revision=config.revision)
    quiet_libraries()
    from lowmem_npo.commands.merge.run import merge  # late: --help need not load transformers

    merge(config)
