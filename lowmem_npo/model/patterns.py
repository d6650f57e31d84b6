"""Regular expressions for the names of layers, from users and from adapters of others: tried before PEFT applies them.

One such as (a+)+b may take years to find that a name does not match. Python cannot stop it, but another process can be
stopped.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable

from lowmem_npo.errors import UserError

SECONDS = 5.0  # of the processor: on a machine that is busy with others nothing takes too long for that
# As PEFT applies target_modules, and the patterns of ranks. The alarm ends the process, even within a match.
PROGRAM = r"""
import json, re, signal, sys
seconds, patterns, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name), re.match(rf"(.*\.)?({pattern})$", name)
"""


def check_patterns(patterns: Iterable[str], names: Iterable[str], whose: str) -> None:
    """Raises UserError if any of `patterns` is no regular expression, or takes too long for the `names` of layers.

    whose: how the message begins.
    """
    written = [pattern for pattern in patterns if not re.fullmatch(r"[\w.-]*", pattern)]
    if not written:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([SECONDS, written, list(names)]), text=True, capture_output=True, check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGVTALRM:
            raise UserError(
                f"{whose} {', '.join(written)}: the regular expression takes too long on the names of this model's "
                "layers; do not repeat what repeats itself, as (a+)+ does."
            ) from error
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise UserError(f"{whose} {', '.join(written)}: that is no regular expression ({reason}).") from error
