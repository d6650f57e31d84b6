"""`lowmem-npo demo`: the whole job on a small model, with the gold standard to hold it against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from lowmem_npo.libraries import quiet_libraries


@dataclass
class Demo:
    """Teach a small model invented biographies, make it forget some, and compare with a model that never saw those.

    Needs no GPU, no hub and no data. Leaves the models, the numbers and a picture in --output-dir; a second run there
    finds the taught models and only unlearns again. Ends with exit code 1 if a check fails.
    """

    output_dir: str = "lowmem-npo-demo"
    """Where models, numbers and picture go."""
    seed: int = 0
    """Seed of the models' weights, of the adapter, and of the order of the rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU if there is one, else the CPU."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Demo, args=list(arguments), prog="lowmem-npo demo")
    quiet_libraries()
    from lowmem_npo.commands.demo.run import run_demo  # after parsing: --help need not load transformers

    outcome = run_demo(options.output_dir, seed=options.seed, device=options.device)
    if not outcome.passed:
        raise SystemExit(1)
