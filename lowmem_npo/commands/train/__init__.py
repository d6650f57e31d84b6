"""`lowmem-npo train`."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_npo.commands.arguments import check_inputs, check_names, parse_run
from lowmem_npo.commands.small_tables import check_small_tables
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.run_directory import RunDirectory


def main(arguments: Sequence[str]) -> None:
    config = parse_run(arguments, "train")
    if config.output.preview is None:
        RunDirectory(config).check_place()
    data = (config.data.forget, config.data.retain, config.data.holdout)
    check_names(config.model.model, *data)
    check_small_tables(config.data)
    check_inputs(config.model.model, *data, revision=config.model.revision)
    quiet_libraries()
    from lowmem_npo.commands.train.run import train  # late: --help need not load transformers

    train(config)
