"""The leak tests, in the order in which they are run and reported."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.contract import LeakTest
from lowmem_npo.evaluation.leaks.extraction import EXTRACTION
from lowmem_npo.evaluation.leaks.jailbreak import JAILBREAK
from lowmem_npo.evaluation.leaks.membership import MEMBERSHIP
from lowmem_npo.evaluation.leaks.quantization import QUANTIZATION
from lowmem_npo.evaluation.leaks.relearning import RELEARNING
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.leaks.rewording import REWORDING
from lowmem_npo.evaluation.leaks.sampling import SAMPLING
from lowmem_npo.evaluation.options import combined

LEAK_TESTS: tuple[LeakTest, ...] = (
    EXTRACTION,
    SAMPLING,
    MEMBERSHIP,
    REWORDING,
    JAILBREAK,
    RELEARNING,
    RETUNING,
    QUANTIZATION,
)
NAMES = tuple(test.name for test in LEAK_TESTS)
WHILE_TRAINING = tuple(test.name for test in LEAK_TESTS if not test.loads_models)

# The options of all tests; what `lowmem-npo evaluate` has of them, and what `train` measures with.
LeakOptions = combined("LeakOptions", (test.options for test in LEAK_TESTS))


def leak_tests(names: Sequence[str], known: Sequence[str] = NAMES) -> list[LeakTest]:
    """The tests of these names (all: those in `known`), in the order of the registry. Raises UserError for one that is
    not in `known`."""
    names = known if "all" in names else names
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f": did you mean {near[0]}? There" if near else "; there"
        raise UserError(f"There is no leak test '{unknown[0]}' here{hint} are {', '.join(known)}, and all.")
    return [test for test in LEAK_TESTS if test.name in names]


def by_name(name: str) -> LeakTest:
    """Raises ValueError for a test that this version does not have: who reads a file names it."""
    for test in LEAK_TESTS:
        if test.name == name:
            return test
    raise ValueError(f"there is no leak test '{name}' in this version of lowmem-npo")
