"""`lowmem-npo evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lowmem_npo.commands.arguments import check_inputs, check_names, parse
from lowmem_npo.commands.help_texts import with_help
from lowmem_npo.commands.spellings import join_sources
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.benchmarks.tofu import TofuOptions
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.sources import check_adapter_name, check_file


def main(arguments: Sequence[str]) -> None:
    command_line = with_help(EvaluationConfig, LEAK_TESTS)
    benchmarks = "; ".join(benchmark.summary for benchmark in BENCHMARKS)
    command_line.__doc__ = f"{(EvaluationConfig.__doc__ or '').rstrip()}\n\n{benchmarks}."
    arguments = join_sources(arguments)
    parsed = parse(command_line, arguments, "evaluate")
    if parsed.resume:  # what is not given stays as it was
        quiet_libraries()
        from lowmem_npo.evaluation.directory import ADDED, joined, kept_options  # late, as below

        began = command_line(**kept_options(parsed))
        parsed = parse(command_line, arguments, "evaluate", default=began)
        for name in ADDED:
            setattr(parsed, name, joined(getattr(began, name), getattr(parsed, name)))
    config = EvaluationConfig(**vars(parsed))
    if config.adapter is not None:
        check_adapter_name(config.adapter)
    check_names(config.model, *config.named_data.values())
    check_file("--before", config.before, config.resume)
    check_file("--retained-log", cast(TofuOptions, config).retained_log, config.resume)
    check_inputs(config.model, *config.named_data.values(), revision=config.revision)
    quiet_libraries()
    from lowmem_npo.commands.evaluate.run import evaluate  # late: --help need not load transformers

    evaluate(config)
