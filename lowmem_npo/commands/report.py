"""`lowmem-npo report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lowmem_npo.libraries import quiet_libraries


@dataclass
class Report:
    """Write the report of a run anew: report.html (one page), report.json and README.md, the model card.

    `lowmem-npo train` writes it at its end. Written again, it includes what `lowmem-npo evaluate --adapter RUN` has
    measured since, into the run's own `evaluation` directory.
    """

    run: tyro.conf.Positional[Path]
    """The --output-dir of `lowmem-npo train`."""
    examples: int | None = None
    """Rows of each set whose text report.html shows; 0 shows none. Default: the run's --report-examples."""
    prove: str | None = None
    """Write nothing; say which rows of this file (read as the run read its forget rows) were among those forgotten,
    from the salted hashes in audit.json. Ends with exit code 1 if one was not."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Report, args=list(arguments), prog="lowmem-npo report")
    quiet_libraries()
    if options.prove is not None:
        _prove(options.run, options.prove)
        return
    from lowmem_npo.report.files import write_report  # after parsing: --help need not load transformers

    content = write_report(options.run, options.examples)
    print(content.verdict.headline)
    print("\n".join(content.verdict.sentences))
    print(f"\nReport: {options.run / 'report.html'}, report.json and the model card README.md beside it.")


def _prove(run: Path, source: str) -> None:
    from lowmem_npo.report.audit import find_rows

    found = find_rows(run, source)
    for where, place in found:
        print(f"{where}: {'not among the forget rows' if place is None else f'forget row {place}'}")
    missing = sum(place is None for _, place in found)
    print(f"{len(found) - missing} of {len(found)} rows were among those that the run in {run} was to forget.")
    if missing:
        raise SystemExit(1)
