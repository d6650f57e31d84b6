"""What `lowmem-npo estimate` does."""

from __future__ import annotations

from lowmem_npo.config import RunConfig
from lowmem_npo.estimate.report import Report, architecture_of, report
from lowmem_npo.estimate.step import StepRows


def estimate_run(config: RunConfig) -> Report:
    """The estimate of `config`, or of the fastest settings that fit its memory budget.

    Raises:
        UserError: an unknown model, data that cannot be read, a budget that cannot be kept.
    """
    architecture = architecture_of(config.model)
    return report(config, architecture, _rows(config))


def _rows(config: RunConfig) -> StepRows:
    if config.data.forget is None:
        return StepRows.of_length(config)
    from lowmem_npo.model import load_tokenizer
    from lowmem_npo.run import prepare_data  # brings with it all that a run needs

    data = prepare_data(config, load_tokenizer(config.model))
    return StepRows.of_data(config, data.forget_targets, data.retain)
