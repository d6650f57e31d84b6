"""`lowmem-npo estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_npo.commands.arguments import check_names, parse_run
from lowmem_npo.config import RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quick_imports, quiet_libraries

if TYPE_CHECKING:
    from lowmem_npo.estimate.step import StepRows

USAGE = """usage: lowmem-npo estimate --model NAME_OR_DIR [the options of `lowmem-npo train`] [--budget 24GiB] [--json]

Simulates one training step, counting every allocation, and prints what is allocated at its peak and the GPU memory that
this needs. Needs no GPU, no weights and, for well-known models, no network. Rows have --max-length tokens; with
--forget and --retain they are as long as the longest rows of the data. With --budget, finds the fastest switches that
fit and prints them as flags.

`lowmem-npo train --help-all` explains the options."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        return
    as_json = "--json" in arguments
    config = parse_run([a for a in arguments if a != "--json"], "estimate")
    check_names(config.model.model, config.data.forget, config.data.retain, config.data.holdout)
    with quick_imports():  # late: mistakes in the options are reported at once
        quiet_libraries()
        from lowmem_npo.estimate.report import report
        from lowmem_npo.training.arguments import honoured_args

    honoured_args(config)
    estimated = report(config, rows_of_step(config))
    print(json.dumps(estimated.as_json(), indent=1) if as_json else estimated.text())


def rows_of_step(config: RunConfig) -> StepRows:
    """The longest rows that a step can have: those of the data, or rows of --max-length tokens if no data is named.

    Raises:
        UserError: data that cannot be read, rows that the model cannot take.
    """
    from lowmem_npo.data.fit import check_fit, known_fit
    from lowmem_npo.estimate.report import architecture_of
    from lowmem_npo.estimate.step import StepRows

    architecture = architecture_of(config.model)
    if config.data.forget is None:
        fit, length = known_fit(architecture), config.data.max_length
        if fit and fit.positions and length > fit.positions:
            raise UserError(
                f"--max-length is {length}, but the model has learnt only {fit.positions} positions: give "
                f"--max-length {fit.positions}."
            )
        return StepRows.of_length(config)
    from lowmem_npo.data import prepare
    from lowmem_npo.model import load_tokenizer
    from lowmem_npo.model.stop_tokens import stop_tokens
    from lowmem_npo.training.training_rows import planned_rows

    tokenizer = load_tokenizer(config.model)
    data = prepare(tokenizer, config.data, config.objective.forget_term, stop_tokens(config.model, architecture))
    check_fit(architecture, tokenizer, [data.forget_targets, data.retain])
    return StepRows.of_data(config, *planned_rows(config, data).parts)
