"""What of an earlier evaluation is compared, by the settings of both."""

from __future__ import annotations

import json

import pytest

from lowmem_npo.evaluation.earlier import Earlier

CONTENT = {
    "rows": {},
    "notes": [],
    "leaks": {"extraction": {"leaks": False, "meaning": "No."}, "sampling": {"leaks": False, "meaning": "No."}},
    "plain": {},
    "muse": {"verbatim": 0.5},
    "lume": {"mia_loss_acc": 0.5},
    "lm_eval": {"mmlu": {"acc": 0.5}},
}
DIGESTS = {"forget": "a", "MUSE verbmem": "b", "members": "d"}
ALL = {"extraction", "sampling", "muse", "lume", "lm_eval"}
SETTINGS = {"limit": 4, "lm_eval_shots": None, "muse_retrained_auc": 0.5, "template": "auto", "leaks": ["all"]}


@pytest.mark.parametrize(
    "other, compared",
    [
        ({}, ALL),
        ({"limit": 5}, set()),
        ({"template": "plain"}, {"lm_eval"}),
        ({"lm_eval_shots": 3}, ALL - {"lm_eval"}),
        ({"muse_retrained_auc": 0.4772}, ALL - {"muse"}),
        ({"leak_samples": 2}, ALL - {"sampling"}),
        ({"digests": DIGESTS | {"MUSE verbmem": "c"}}, ALL - {"muse"}),
        ({"digests": DIGESTS | {"members": "c"}}, ALL - {"lume"}),
        ({"digests": DIGESTS | {"forget": "c"}}, {"muse", "lm_eval"}),
    ],
)
def test_what_is_compared(tmp_path, other, compared):
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS, "leak_samples": 8, "digests": DIGESTS, **other}))
    settings = {**SETTINGS, "leak_samples": 8, "digests": DIGESTS, "before": str(tmp_path / "evaluation.json")}
    earlier = Earlier.of(settings, CONTENT)
    found = {*earlier.content["leaks"], *({"muse", "lume", "lm_eval"} & set(earlier.content))}
    assert found == compared and bool(earlier.notes) == (other != {})
