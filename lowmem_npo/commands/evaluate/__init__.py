"""`lowmem-npo evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem_npo.commands.arguments import check_inputs, check_names, join_sources, parse, with_help
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.sources import check_adapter_name


def main(arguments: Sequence[str]) -> None:
    command_line = with_help(EvaluationConfig, LEAK_TESTS)
    benchmarks = "; ".join(benchmark.summary for benchmark in BENCHMARKS)
    command_line.__doc__ = f"{EvaluationConfig.__doc__}\n\n{benchmarks}."
    parsed = parse(command_line, join_sources(arguments), "evaluate")
    config = EvaluationConfig(**vars(parsed))
    if config.adapter is not None:
        check_adapter_name(config.adapter)
    check_names(config.model, *config.named_data.values())
    if config.before is not None and not Path(config.before).expanduser().is_file():
        raise UserError(f"--before: there is no file '{config.before}'.")
    check_inputs(config.model, *config.named_data.values(), revision=config.revision)
    quiet_libraries()
    from lowmem_npo.commands.evaluate.run import evaluate  # late: --help need not load transformers

    evaluate(config)
