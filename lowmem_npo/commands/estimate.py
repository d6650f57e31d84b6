"""`lowmem-npo estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_npo.commands.arguments import check_names, parse_run, take_options
from lowmem_npo.commands.help_texts import flags_of
from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.gpus import check_number_type, named
from lowmem_npo.idle_options import remarks_on_idle_options
from lowmem_npo.libraries import quick_imports, quiet_libraries
from lowmem_npo.recipes import remark

if TYPE_CHECKING:
    from lowmem_npo.estimate.report import Workload

USAGE = """usage: lowmem-npo estimate --model NAME_OR_DIR [--gpu NAME] [--budget 24GiB] [--json] [options of train]

Simulates one training step, counting every allocation, and prints what is allocated at its peak and the GPU memory that
this needs. Needs no GPU, no weights and, for well-known models, no network. Rows have --max-length tokens; with
--forget and --retain they are as long as the longest rows of the data. With --budget, finds the fastest switches that
fit and prints them as flags.

--gpu NAME (default: the GPU of this machine) predicts the time as well, and decides by that GPU's memory what is left
to be decided: rtx-3090, rtx-4090, rtx-5090, a100-40gb, a100-80gb, h100-sxm, h100-pcie, h200, l4, t4.

`lowmem-npo train --help-all` explains the options."""


@dataclass
class EstimateOptions:
    """What an estimate has beside the options of a run."""

    gpu: str | None = None
    """The GPU whose time is predicted, such as rtx-4090."""
    json: bool = False
    """For programs."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        return
    own, others = take_options(EstimateOptions, arguments, "estimate")
    config = parse_run(others, "estimate", more_flags=flags_of(EstimateOptions))
    device = None if own.gpu is None else named(own.gpu)
    check_names(config.model.model, config.data.forget, config.data.retain, config.data.holdout)
    with quick_imports():  # late: mistakes in the options are reported at once
        quiet_libraries()
        from lowmem_npo.estimate.gpus import own_device
        from lowmem_npo.estimate.report import report
        from lowmem_npo.training.arguments import honoured_args

    honoured_args(config)
    device = device or own_device()
    if device is not None:
        check_number_type(device, config.model.dtype)
    notes = [*filter(None, [remark(config)]), *remarks_on_idle_options(config)]
    config, work = workload(config, notes.append)
    estimated = report(config, work, device)
    estimated.notes[:0] = notes
    print(json.dumps(estimated.as_json(), indent=1) if own.json else estimated.text())


def workload(config: RunConfig, say: Say) -> tuple[RunConfig, Workload]:
    """The run, and what its steps do: on the rows of the data, or on rows of --max-length tokens if no data is named.

    Raises:
        UserError: data that cannot be read, rows that the model cannot take, or that cannot be divided as asked.
    """
    from lowmem_npo.data.fit import check_fit, known_fit, positions_of
    from lowmem_npo.estimate.report import Workload, architecture_of

    architecture = architecture_of(config.model)
    if config.data.forget is None:
        fit, length = known_fit(architecture), config.data.max_length
        if fit and fit.positions and length > fit.positions:
            raise UserError(
                f"--max-length is {length}, but the model has learnt only {fit.positions} positions: give "
                f"--max-length {fit.positions}."
            )
        return config, Workload.of_length(config)
    from lowmem_npo.commands.train.plan import fitted
    from lowmem_npo.data import prepare
    from lowmem_npo.model import load_tokenizer
    from lowmem_npo.model.stop_tokens import stop_tokens
    from lowmem_npo.training.training_rows import planned_rows, rows_read

    tokenizer = load_tokenizer(config.model)
    stops, positions = stop_tokens(config.model, architecture), positions_of(architecture)
    data = prepare(tokenizer, config.data, config.objective.forget_term, stops, positions=positions)
    config, data = fitted(config, data, say)
    check_fit(architecture, tokenizer, rows_read(config, data), say)
    return config, Workload.of_data(config, planned_rows(config, data).parts)
