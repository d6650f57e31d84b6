"""`lowmem-npo demo`: the whole job on a small model, compared with a gold standard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_npo.commands.arguments import parse
from lowmem_npo.commands.demo.recipe import Device
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.ranges import Seed, check_fields


@dataclass
class Demo:
    """Teach a small model invented biographies, make it forget some, and compare it with a model that never saw them.

    Needs no GPU, no network and no data. Writes the models, the figures, a picture and a report into --output-dir; a
    second run there reuses the taught models and only unlearns again. The exit code is 1 if a check fails.
    """

    output_dir: str = "lowmem-npo-demo"
    """Directory of the models, the figures, the picture and the report."""
    seed: Seed = 0
    """Seed of the models' weights, of the adapter, and of the order of the rows."""
    device: Device = "auto"
    """auto is the GPU if there is one, else the CPU."""


def main(arguments: Sequence[str]) -> None:
    options = parse(Demo, arguments, "demo")
    check_fields(options)
    quiet_libraries()
    from lowmem_npo.commands.demo.run import run_demo  # late: --help need not load transformers

    if not run_demo(options.output_dir, seed=options.seed, device=options.device).passed:
        raise SystemExit(1)
