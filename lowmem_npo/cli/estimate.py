"""`lowmem-npo estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lowmem_npo.cli.arguments import parse_run
from lowmem_npo.cli.imports import quick_imports
from lowmem_npo.cli.quiet import quiet_libraries

USAGE = """usage: lowmem-npo estimate --model NAME_OR_DIR [the options of `lowmem-npo train`] [--budget 24GiB] [--json]

Runs one training step on a GPU that has no memory but counts it, and prints what the step takes. Needs no GPU and no
weights, and for well-known models no network. Rows have --max-length tokens; with --forget and --retain they are as
long as the longest of the data. With --budget, finds the fastest switches that fit and prints them as flags.

`lowmem-npo train --help` explains the options."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        return
    as_json = "--json" in arguments
    config = parse_run([a for a in arguments if a != "--json"], "estimate")
    with quick_imports():  # after parsing: mistakes are told at once
        quiet_libraries()
        from lowmem_npo.estimate.command import estimate_run

    found = estimate_run(config)
    print(json.dumps(found.as_json(), indent=1) if as_json else found.text())
