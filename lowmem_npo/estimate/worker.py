"""The process behind `background.Simulation`: reads a run and its rows from stdin, writes a report or an error."""

from __future__ import annotations

import contextlib
import pickle
import sys

from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quick_imports, quiet_libraries

with quick_imports():
    from lowmem_npo.estimate.report import Report, report


def report_or_error(pickled: bytes) -> Report | UserError:
    """The report on a pickled (RunConfig, Workload, Device or None)."""
    try:
        return report(*pickle.loads(pickled))
    except UserError as error:
        return error


if __name__ == "__main__":
    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints must not get into the result
        result = report_or_error(sys.stdin.buffer.read())
    sys.stdout.buffer.write(pickle.dumps(result))
