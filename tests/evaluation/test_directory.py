"""What a directory of an evaluation lets in that is resumed there."""

from __future__ import annotations

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import THE_JUDGES, EvaluationDirectory, kept_options
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


@pytest.mark.parametrize(
    ("first", "later", "changed"),
    [
        ({"leaks": ("extraction",)}, {"leaks": ("extraction", "sampling"), "leak_samples": 2}, None),
        ({"leaks": ("sampling",)}, {"leaks": ("sampling",), "leak_samples": 2}, "leak_samples was 8, is 2"),
        ({"leaks": ("sampling",)}, {"leaks": ("sampling", "relearning"), "relearn_steps": 9}, None),
        ({}, {"lm_eval": ("mmlu",), "lm_eval_shots": 3}, None),
        ({"lm_eval": ("mmlu",)}, {"lm_eval": ("mmlu",), "lm_eval_shots": 3}, "lm_eval_shots was None, is 3"),
        ({}, {"muse_knowmem": "q", "muse_examples": "e", "muse_retrained_auc": 0.4}, None),
    ],
)
def test_what_has_measured_nothing_may_have_other_options(first, later, changed, measure):
    for leaks in (first.get("leaks", ()), ()):  # whose measurements stay, though they are left out
        measure(**{**first, "leaks": leaks})
    if changed is None:
        measure(**later)
    else:
        with pytest.raises(UserError, match=changed):
            measure(**later)


def test_the_options_of_a_benchmark_are_known_by_its_rows(measure):
    measure({"MUSE privleak": "a"}, muse_privleak="t", muse_privleak_holdout="u")
    with pytest.raises(UserError, match="muse_retrained_auc was 0.5, is 0.4"):
        measure({"MUSE privleak": "a"}, muse_privleak="t", muse_privleak_holdout="u", muse_retrained_auc=0.4)


def test_leaving_lm_eval_out_names_no_data(tmp_path):
    """So that the rows are those of the adapter's run once more."""
    config = EvaluationConfig(model="m", forget="f", output_dir=str(tmp_path / "out"))
    EvaluationDirectory(config, {"forget": "of forget"}, data_named=False).begin()
    typed = EvaluationConfig(model="m", output_dir=config.output_dir, resume=True)
    typed.lm_eval = ("none",)
    assert "forget" not in kept_options(typed)
