"""`lowmem-npo evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from lowmem_npo.cli.quiet import quiet_libraries


def main(arguments: Sequence[str]) -> None:
    from lowmem_npo.evaluation.config import EvaluationConfig

    config = tyro.cli(EvaluationConfig, args=list(arguments), prog="lowmem-npo evaluate")
    quiet_libraries()
    from lowmem_npo.evaluate import evaluate

    evaluate(config)
