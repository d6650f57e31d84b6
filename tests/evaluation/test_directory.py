"""What a directory of an evaluation lets in that is resumed there."""

from __future__ import annotations

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import THE_JUDGES, EvaluationDirectory
from lowmem_npo.evaluation.settings import EvaluationConfig


@pytest.fixture
def measure(tmp_path):
    """Begins an evaluation, or resumes it, with rows of these digests."""

    def begin(digests=None, **options):
        files = {"model": "m", "forget": "f", "output_dir": str(tmp_path / "out")}
        config = EvaluationConfig(**files, resume=(tmp_path / "out").exists(), **options)
        EvaluationDirectory(config, {"forget": "of forget", **(digests or {})}).begin()

    return begin


@pytest.mark.parametrize(
    ("first", "later", "changed"),
    [
        ({"holdout": "a"}, {"holdout": "b"}, "holdout"),
        ({"holdout": "a"}, {"holdout": "a", THE_JUDGES: "half"}, THE_JUDGES),
        ({"holdout": "a", THE_JUDGES: "half"}, {"holdout": "a"}, THE_JUDGES),
        ({"holdout": "a"}, {"holdout": "a"}, None),
        ({}, {"holdout": "a", THE_JUDGES: "half"}, None),
    ],
)
@pytest.mark.parametrize("between", [[], [()], [(), ()]])
def test_the_journal_goes_on_with_the_rows_that_it_knows(first, later, changed, between, measure):
    """Also where leak tests, and with them a run's holdout, were left out meanwhile."""
    measure(first, leaks=("extraction",))
    for leaks in between:
        measure(leaks=leaks)
    if changed is None:
        measure(later, leaks=("extraction",))
    else:
        with pytest.raises(UserError, match=f"--resume: {changed} has changed"):
            measure(later, leaks=("extraction",))
