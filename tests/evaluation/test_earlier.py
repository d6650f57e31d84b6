"""What of an earlier evaluation is compared, by the settings of both."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import CONFIGS

from lowmem_npo.evaluation.earlier import Earlier
from lowmem_npo.evaluation.gold import Gold
from lowmem_npo.model.size import size_of

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


SMALL, LARGE = "llama, 16 layers, 2048 wide", "llama, 32 layers, 4096 wide"


def beside(tmp_path, earlier, now):
    """The notes on --before and on --retained-log, and what of either is compared. Of sizes of one family the tokenizer
    is the same."""
    digests = {**DIGESTS, "the tokenizer": "t"}
    content = {"rows": {}, "notes": [], "leaks": CONTENT["leaks"]}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (tmp_path / "settings.json").write_text(
        json.dumps({**SETTINGS, "model": "Llama-1B", "digests": {**digests, **earlier}})
    )
    settings = {**SETTINGS, "model": "Llama-8B", "digests": {**digests, **now}}
    settings |= dict.fromkeys(("before", "retained_log"), str(tmp_path / "evaluation.json"))
    before, gold = Earlier.of(settings), Gold.of(settings)
    return [*before.notes], bool(before.content.get("leaks")), [*gold.notes], bool(gold.leaks)


@pytest.mark.parametrize(
    ("earlier", "now", "compared"),
    [
        ({"the base": "a"}, {"the base": "a"}, True),
        ({"the base": "a"}, {"the base": "b"}, False),
        ({"the base": "a", "the architecture and size": SMALL}, {"the base": "b"}, False),
        ({"the architecture and size": SMALL}, {"the architecture and size": LARGE}, False),  # the weights unknown
        ({}, {"the base": "b", "the architecture and size": LARGE}, True),  # neither is known
    ],
)
def test_an_adapter_is_not_compared_with_another_base(tmp_path, earlier, now, compared):
    notes, beside_before, *_ = beside(tmp_path, earlier, {**now, "the adapter": "c"})
    assert beside_before == compared == (not notes)
    assert compared or "'Llama-1B'" in notes[0] and "'Llama-8B'" in notes[0] and "nothing is compared" in notes[0]


def test_a_merged_model_has_other_weights_than_before_and_is_named_where_its_size_is_another(tmp_path):
    size, of_old = "the architecture and size", {"the base": "a"}
    assert beside(tmp_path, {**of_old, size: SMALL}, {"the base": "b", size: SMALL})[:2] == ([], True)
    (note,), compared, *_ = beside(tmp_path, {**of_old, size: SMALL}, {"the base": "b", size: LARGE})
    assert compared and note == (
        "The earlier evaluation is of a model of another architecture or size, 'Llama-1B' (llama, 16 layers, 2048 "
        "wide), and here it is 'Llama-8B' (llama, 32 layers, 4096 wide)."
    )
    assert beside(tmp_path, of_old, {"the base": "b", size: LARGE})[:2] == ([], True)


def test_a_gold_model_has_the_same_architecture_and_size(tmp_path):
    size = "the architecture and size"
    for adapter in ({}, {"the adapter": "c"}):
        (note,), compared = beside(tmp_path, {size: SMALL}, {size: LARGE, **adapter})[2:]
        assert not compared and note.startswith("--retained-log is of another model, 'Llama-1B' (llama, 16 layers")
        for was in ({size: LARGE, "the base": "a"}, {"the base": "a"}):  # its weights are others
            assert beside(tmp_path, was, {size: LARGE, "the base": "b", **adapter})[2:] == ([], True)


@pytest.mark.parametrize("architecture", ["olmo", "llama"])
def test_the_size_is_told_by_the_configuration(architecture):
    config = CONFIGS[architecture](97)
    assert size_of(config) == f"{architecture}, 2 layers, 32 wide, 48 in an MLP"
    assert size_of(CONFIGS[architecture](128)) == size_of(config), "a vocabulary is padded"
