"""`lowmem-npo report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lowmem_npo.commands.arguments import check_names, parse_options
from lowmem_npo.commands.spellings import run_first
from lowmem_npo.files import expanded
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.ranges import Checked, CountOrNone
from lowmem_npo.run_directory import RunFiles, check_is_run


@dataclass
class Report(Checked):
    """Rewrite the report of a run: report.html (one page), report.json and README.md, the model card.

    A run writes its report when it ends. Rewritten, it includes what `lowmem-npo evaluate --adapter RUN`
    has measured since, if that is in the run's own `evaluation` directory, and leak tests in evaluation-2 and so on.
    """

    run: tyro.conf.Positional[str]
    """The --output-dir of the run, also given as --adapter."""
    examples: CountOrNone | None = None
    """Rows of each set whose text is in report.html; 0 for none. Default: the run's --report-examples."""
    prove: str | None = None
    """Write nothing; print which rows of this file (read as the run read its forget rows) were among those forgotten,
    by the salted hashes in audit.json. The exit code is 1 if any was not."""


def main(arguments: Sequence[str]) -> None:
    options = parse_options(Report, run_first(arguments), "report")
    run = expanded(options.run)
    check_is_run(run)
    if options.prove is not None:
        check_names(None, options.prove)
    quiet_libraries()
    if options.prove is not None:
        _prove(run, options.prove)
        return
    from lowmem_npo.report.files import write_report  # late: --help need not load transformers

    content = write_report(run, options.examples)
    print(content.verdict.headline)
    print("\n".join(content.verdict.sentences))
    files = RunFiles(run)
    print(
        f"\nReport: {files.report_html}; beside it {files.report_json.name} and the model card {files.model_card.name}."
    )


def _prove(run: Path, source: str) -> None:
    from lowmem_npo.report.audit import find_rows

    rows = find_rows(run, source)
    for where, place in rows:
        print(f"{where}: {'not among the forget rows' if place is None else f'forget row {place}'}")
    missing = sum(place is None for _, place in rows)
    print(f"{len(rows) - missing} of {len(rows)} rows are among the forget rows of the run in {run}.")
    if missing:
        raise SystemExit(1)
