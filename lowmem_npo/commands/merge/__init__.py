"""`lowmem-npo merge`: an adapter becomes part of the weights, which plain transformers then loads."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_npo.commands.arguments import check_inputs, parse
from lowmem_npo.commands.help_texts import with_help
from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.sources import check_adapter_name


def main(arguments: Sequence[str]) -> None:
    parsed = parse(with_help(MergeConfig), arguments, "merge")
    config = MergeConfig(**vars(parsed))
    check_adapter_name(config.adapter)
    check_inputs(config.model, revision=config.revision)
    quiet_libraries()
    from lowmem_npo.commands.merge.run import merge  # late: --help need not load transformers

    merge(config)
