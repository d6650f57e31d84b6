"""The last lines of `lowmem-npo merge`, and its card, say what leak tests have found of exactly these weights."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse
from lowmem_npo.commands.merge.findings import findings
from lowmem_npo.evaluation.directory import EvaluationDirectory
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import file_sha256
from lowmem_npo.model.names import Base

BESIDE = "relearning test of the adapter beside its base, not of these weights:"
FOUND = {"leaks": True, "meaning": "It is back.", "merged": {}, "rows": 3}


def write_adapter(base, folder, seed=0):
    model = tiny_model()
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.active_peft_config.base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)


def write_evaluation(folder, tests, weights=None, name="evaluation", **settings):
    evaluation = folder / name
    evaluation.mkdir(exist_ok=True)
    digest = weights or file_sha256(folder / "adapter_model.safetensors")
    (evaluation / "settings.json").write_text(json.dumps({"digests": {"the adapter": digest}, **settings}))
    (evaluation / "evaluation.json").write_text(json.dumps({"leaks": tests}))


def write_run(folder, tests, weights=None, model=None):
    digest = weights or file_sha256(folder / "adapter_model.safetensors")
    rows = {"salt": "00", "sha256": [], "folds": None, "alternatives": None, "paraphrases": ""}
    record = {"configuration": {}, "model": model or {}, "data": {}, "forget_rows": rows, "sessions": []}
    record |= {"adapter": {"sha256": digest}, "level_rows": None, "holdout_rows": None}
    (folder / "audit.json").write_text(json.dumps(record))
    (folder / "leaks.json").write_text(json.dumps({"before": {}, "after": tests}))


@pytest.fixture
def adapter(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def last_lines(adapter, tmp_path, capsys):
    """Merges, and returns the last lines: of the quantisation test, and of the relearning test. The card has both."""
    count = iter(range(100))

    def merged():
        out = tmp_path / f"out{next(count)}"
        assert main(["merge", "--adapter", str(adapter), "--output-dir", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()[-2:]
        card = (out / "README.md").read_text()
        assert all(f"- {line.replace(str(adapter), 'adapter')}\n" in card for line in lines)
        assert str(tmp_path) not in card
        return lines

    return merged


def test_there_are_none(last_lines, adapter):
    rounding, relearning = last_lines()
    assert rounding.startswith("Not checked: whether forgotten text returns when the adapter is rounded")
    command = f"`lowmem-npo evaluate --adapter {adapter} --forget … --leaks quantization relearning` checks both."
    assert relearning.startswith("Not checked: whether forgotten text returns after a little fine-tuning")
    assert relearning.endswith(command) and "`" not in rounding  # one for both: it is not refused after itself


def test_the_command_measures_in_the_type_that_the_run_had(adapter):
    """Else evaluate would round a float32 base to bf16."""
    for dtype, more in (("float32", "--dtype float32 "), ("bf16", "")):
        (adapter / "run.yaml").write_text(f"model: {adapter.parent / 'base'}\nepochs: 1\ndtype: {dtype}\n")
        said, published = findings(str(adapter), "whole", Base())
        assert f"`lowmem-npo evaluate --adapter {adapter} {more}--leaks" in said[1]
        assert f"`lowmem-npo evaluate --adapter adapter {more}--leaks" in published[1]


def test_the_command_loads_the_model_as_the_run_did(adapter):
    """A model that only fits streamed would run out of memory without that; a card does not tell of this machine."""
    cache = adapter.parent / "the cache"
    needed = "qlora: true\nstream_weights: true\nstream_from: cache\nattn: eager\neval_batch_size: 1\ndevice: cuda\n"
    (adapter / "run.yaml").write_text(f"model: base\nepochs: 1\n{needed}quantized_cache: {cache}\n")
    for (_, line), with_place in zip(findings(str(adapter), "whole", Base()), (True, False), strict=True):
        _, command, *options = shlex.split(re.search("`(.*)`", line)[1])
        given = parse(EvaluationConfig, options, command)
        given.check_source(given)
        assert (given.qlora, given.stream_weights, given.attn, given.batch_size) == (True, True, "eager", 1)
        here = ("cuda", str(cache), "cache") if with_place else ("auto", None, "auto")
        assert (given.device, given.quantized_cache, given.stream_from) == here


def test_the_command_runs_where_another_evaluation_is_and_its_result_is_read(last_lines, adapter, tmp_path):
    """Also where the adapter's base is named, as it then must be for that command."""
    write_evaluation(adapter, {"extraction": FOUND})
    (_, relearning), _ = findings(str(adapter), "whole", Base(), base=["--model", "the base", "--any-base"])
    for number in (2, 3):
        line = relearning if number == 2 else last_lines()[1]
        _, command, *options = shlex.split(re.search("`(.*)`", line)[1].replace("…", "forget.jsonl"))
        given = parse(EvaluationConfig, options, command)
        assert (given.model, given.any_base) == (("the base", True) if number == 2 else (None, False))
        EvaluationDirectory(given, {}).check()
        assert given.path == adapter / f"evaluation-{number}" and set(given.leaks) == {"quantization", "relearning"}
        (adapter / "evaluation").rename(tmp_path / "first")
        write_evaluation(adapter, {"relearning": FOUND} if number == 2 else {"quantization": FOUND})
        (adapter / "evaluation").rename(given.path)
        (tmp_path / "first").rename(adapter / "evaluation")
        if number == 2:
            write_evaluation(adapter, {"extraction": FOUND}, weights="another")
            assert last_lines()[1].startswith(f"WARNING, {BESIDE} traces found. It is back.")
            (given.path / "evaluation.json").write_text(json.dumps({"leaks": {}}))
    assert last_lines()[0] == "WARNING, quantization test: traces found. It is back."


@pytest.mark.parametrize(
    "leaks, merged, words",
    [
        (True, {"merged": {}}, "WARNING, quantization test: traces found. It is back."),
        (False, {"merged": {}}, "Checked, quantization test: no traces found. It is back."),
        (None, {"merged": {}}, "Checked, quantization test: cannot tell. It is back."),
        (False, {"rows": 3}, "Not checked: the quantization test measured no merged weights."),
        (None, {}, "Not checked, quantization test: It is back."),
    ],
)
def test_of_the_evaluation(last_lines, adapter, leaks, merged, words):
    write_evaluation(adapter, {"quantization": {**merged, "leaks": leaks, "meaning": "It is back."}})
    rounding, relearning = last_lines()
    assert rounding.startswith(words)
    assert relearning.startswith("Not checked: whether")


def test_of_the_run(last_lines, adapter):
    write_run(adapter, {"relearning": FOUND})
    rounding, relearning = last_lines()
    assert rounding.startswith("Not checked: whether")
    assert relearning.startswith(f"WARNING, {BESIDE} traces found. It is back.")


def test_relearning_of_the_adapter_is_not_of_the_merged_weights(adapter):
    """Where the quantization test has repeated it on these, that one's sentence tells."""
    more = "`--leaks quantization relearning`, in one evaluation, attacks merged weights as well."
    tests = {"relearning": {"leaks": False, "meaning": "It is not.", "rows": 3}}
    for merged, weights, advised in (({}, "whole", True), ({"relearning: 20 steps": {}}, "whole", False),
                                     ({}, "dequantized", False)):  # fmt: skip
        write_evaluation(adapter, {**tests, "quantization": {**FOUND, "merged": merged}})
        (_, line), (_, published) = findings(str(adapter), weights, Base())
        assert line == published == f"Checked, {BESIDE} no traces found. It is not." + f" {more}" * advised


def test_of_both_the_evaluation_is_the_later(last_lines, adapter):
    write_run(adapter, {"relearning": FOUND})
    write_evaluation(adapter, {"relearning": {**FOUND, "leaks": False, "meaning": "It is not."}})
    assert last_lines()[1].startswith(f"Checked, {BESIDE} no traces found. It is not.")
    write_evaluation(adapter, {"relearning": {**FOUND, "leaks": False, "meaning": "It is not."}}, weights="another")
    assert last_lines()[1].startswith(f"WARNING, {BESIDE} traces found. It is back.")


@pytest.mark.parametrize("later", [{"leaks": None, "rows": 3}, {"leaks": False, "rows": 1}])
def test_a_later_evaluation_that_says_less_does_not_hide_the_runs(last_lines, adapter, later):
    write_run(adapter, {"relearning": FOUND})
    write_evaluation(adapter, {"relearning": {"merged": {}, "meaning": "It is not.", **later}})
    assert last_lines()[1].startswith(f"WARNING, {BESIDE} traces found. It is back.")


STRONG, WEAK = {"relearn_steps": 20, "relearn_lr": 1e-3}, {"relearn_steps": 1, "relearn_lr": 1e-6}


@pytest.mark.parametrize(
    "tried, words",
    [
        ([(True, STRONG), (False, WEAK)], "WARNING, {} traces found. First."),
        ([(True, STRONG), (False, STRONG)], "Checked, {} no traces found. Second."),
        ([(False, WEAK), (True, STRONG)], "WARNING, {} traces found. Second."),
        ([(None, STRONG), (False, WEAK)], "Checked, {} cannot tell. First."),
        ([(None, STRONG), (False, STRONG)], "Checked, {} no traces found. Second."),
        ([(True, STRONG), (True, WEAK), (False, WEAK)], "WARNING, {} traces found. First."),
        ([(True, STRONG), (False, {**STRONG, "seed": 7})], "WARNING, {} traces found. First."),
        ([(True, STRONG), (False, WEAK), (False, STRONG)], "Checked, {} no traces found. Third."),
    ],
)
def test_no_other_attack_takes_back_what_one_has_found(adapter, tried, words):
    """Neither where it could not tell."""
    for number, ((leaks, options), meaning) in enumerate(zip(tried, ("First.", "Second.", "Third."), strict=False), 1):
        name = "evaluation" if number == 1 else f"evaluation-{number}"
        found = {"relearning": {**FOUND, "leaks": leaks, "meaning": meaning}}
        write_evaluation(adapter, found, name=name, **{"leaks": ["relearning"], "seed": 42, **options})
    (_, line), _ = findings(str(adapter), "whole", Base())
    assert line.startswith(words.format(BESIDE))


def test_a_removed_evaluation_hides_none_of_those_after_it(adapter):
    for number in (2, 4):
        write_evaluation(adapter, {"relearning": FOUND} if number == 4 else {}, name=f"evaluation-{number}")
    (rounding, relearning), _ = findings(str(adapter), "whole", Base())
    assert relearning.startswith(f"WARNING, {BESIDE} traces found.")
    assert f"--output-dir {adapter}/evaluation-5" in rounding


def test_traces_that_an_evaluation_finds_in_fewer_rows_count(last_lines, adapter):
    write_run(adapter, {"relearning": {**FOUND, "leaks": False, "meaning": "It is not."}})
    write_evaluation(adapter, {"relearning": {**FOUND, "rows": 1}})
    assert last_lines()[1].startswith(f"WARNING, {BESIDE} traces found. It is back.")
    write_run(adapter, {"relearning": {**FOUND, "leaks": False, "against_before": True}})
    write_evaluation(adapter, {"relearning": {**FOUND, "leaks": False, "meaning": "It is not.", "rows": 1}})
    assert last_lines()[1].startswith(f"Checked, {BESIDE} no traces found. It is not.")  # against a holdout


def test_an_evaluation_of_other_rows_is_none_of_the_runs(last_lines, adapter):
    write_run(adapter, {"relearning": FOUND})
    write_evaluation(adapter, {"relearning": {**FOUND, "leaks": False, "meaning": "It is not."}}, other_rows=True)
    assert last_lines()[1].startswith(f"WARNING, {BESIDE} traces found. It is back.")


def test_of_another_state_of_the_adapter(last_lines, adapter, tmp_path):
    write_run(adapter, {"relearning": FOUND})
    write_evaluation(adapter, {"quantization": FOUND})
    write_adapter(tmp_path / "base", adapter, seed=1)
    rounding, relearning = last_lines()
    assert "evaluation.json' is of another state of this adapter" in rounding
    assert "leaks.json' is of another state of this adapter" in relearning


def test_of_this_adapter_on_another_base(adapter, tmp_path):
    """Which the run may have been trained on, or an evaluation have measured; the run's figures are not of this one."""
    weights = file_sha256(adapter / "adapter_model.safetensors")
    here = Base.here(str(tmp_path / "base"))
    for base, known in (("others", False), (here.weights, True)):
        digests = {"the adapter": weights, "the base": base}
        write_evaluation(adapter, {"quantization": {**FOUND, "leaks": False}}, digests=digests)
        write_run(adapter, {"relearning": FOUND}, model={"loaded": "gone", "files": base})
        (rounding, relearning), _ = findings(str(adapter), "whole", here)
        other = "is of this adapter on another base model."
        assert [other in line for line in (rounding, relearning)] == [not known] * 2
        assert ("on another base model. `lowmem-npo evaluate" in relearning) == (not known)
        assert rounding.startswith("Checked, quantization" if known else "Not checked: the quantization test in")
        out = tmp_path / f"out-{known}"
        assert main(["merge", "--adapter", str(adapter), "--any-base", "--output-dir", str(out)]) == 0
        assert ("The base is another model than the one" in (out / "README.md").read_text()) == (not known)


def test_the_card_of_an_adapter_that_its_run_did_not_write_has_no_verdict_of_the_run(adapter, tmp_path, capsys):
    """Which is said once, and not of a checkpoint, which the run has not measured."""
    write_run(adapter, {})
    write_adapter(tmp_path / "base", adapter / "checkpoint-3", seed=2)
    note = "adapter_model.safetensors is not the file that the run in its directory wrote"
    (adapter / "run.yaml").write_text("sam: 0.05\n")
    for number, (folder, said) in enumerate([(adapter, 0), (adapter / "checkpoint-3", 0), (adapter, 1)]):
        if said:
            write_adapter(tmp_path / "base", adapter, seed=1)
        out = tmp_path / str(number)
        assert main(["merge", "--adapter", str(folder), "--output-dir", str(out)]) == 0
        assert capsys.readouterr().out.count(note) == (out / "README.md").read_text().count(note) == said
        card = (out / "README.md").read_text()
        why = note if said else "It is a checkpoint" if folder.name == "checkpoint-3" else "The files of the run"
        assert f"Nothing is known of what this adapter forgets. {why}" in card
        assert ("What --sam made last" in card) != bool(said) and "Those figures" not in card


@pytest.mark.parametrize("damage", ["", "[]", '{"leaks": []}', '{"leaks": {"quantization": 7}}', "\xff"])
def test_damaged_files_hold_nothing(last_lines, adapter, damage):
    write_evaluation(adapter, {})
    for file in (adapter / "evaluation" / "evaluation.json", adapter / "leaks.json", adapter / "audit.json"):
        file.write_text(damage, encoding="latin-1")
    assert all(line.startswith("Not checked: whether") for line in last_lines())


def test_a_checkpoint_of_a_run(adapter, tmp_path, capsys):
    """The run's tests are of its last adapter, which a checkpoint may be or not."""
    write_run(adapter, {"relearning": FOUND})
    for number, seed in ((7, 0), (3, 1)):
        write_adapter(tmp_path / "base", adapter / f"checkpoint-{number}", seed)
        out = tmp_path / f"merged-{number}"
        assert main(["merge", "--adapter", str(adapter / f"checkpoint-{number}"), "--output-dir", str(out)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "relearning test" in line]
    assert printed[0].startswith(f"WARNING, {BESIDE}") and "is of another state" in printed[1]


def test_a_place_in_a_finding_is_not_published(adapter, tmp_path, capsys):
    meaning = f"Not measured: merged: The disk of '{adapter}/evaluation/merged' is full."
    write_evaluation(adapter, {"quantization": {"leaks": None, "meaning": meaning}})
    assert main(["merge", "--adapter", str(adapter), "--output-dir", str(tmp_path / "out")]) == 0
    assert meaning in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The disk of 'adapter/evaluation/merged' is full." in card and str(tmp_path) not in card


def test_the_adapter_is_named_as_a_shell_and_as_a_card_need_it(adapter, tmp_path, capsys, monkeypatch):
    """A command can be copied, and the card holds a name in the place of the path, however that is spelled."""
    adapter = adapter.rename(tmp_path / "my run")
    write_run(adapter, {"relearning": FOUND})
    write_adapter(tmp_path / "base", adapter / "checkpoint-3", seed=1)
    for place, given, name in (
        (tmp_path, "my run", "'my run'"),
        (adapter, ".", "'my run'"),
        (adapter, "checkpoint-3", "'my run/checkpoint-3'"),
    ):
        monkeypatch.chdir(place)
        out = tmp_path / f"merged-{given}"
        assert main(["merge", "--adapter", given, "--output-dir", str(out)]) == 0
        printed, card = capsys.readouterr().out, (out / "README.md").read_text()
        assert f"evaluate --adapter {shlex.quote(given)} --forget … --leaks quantization" in printed
        assert f". `lowmem-npo evaluate --adapter {name} --forget … --leaks" in card
        assert str(tmp_path) not in card
    assert "in 'my run/leaks.json' is of another state" in card
    monkeypatch.chdir(tmp_path / "base")
    model = ["--model", ".", "--any-base"]
    assert main(["merge", "--adapter", str(adapter), *model, "--output-dir", str(tmp_path / "out")]) == 0
    assert "`base`" in (tmp_path / "out" / "README.md").read_text()


LASTS = "made last is a property of these merged weights: publish them, and not the adapter"


@pytest.mark.parametrize(
    ("settings", "first", "how"),
    [
        ("recipe: lasting\nlayered: 2\nadversary: 1.0\n", "", "--recipe lasting"),
        ("recipe: lasting\nlayered: null\nadversary: null\n", "", None),  # both are switched off within it
        ("recipe: paper\nlayered: 2\nsam: 0.05\n", "", "--layered and --sam"),
        ("recipe: paper\nlayered: null\n", "", None),
        ("layered: null\nadapter: {}/first\n", "recipe: lasting\nadversary: 1.0\n", "--recipe lasting"),
        ("sam: 0.05\nadapter: {}/first/checkpoint-4\n", "layered: 3\n", "--sam and --layered"),
        ("sam: 0.05\nadapter: {}/adapter\n", "layered: 3\n", "--sam"),
        ("sam: 0.05\nadapter: {}/removed\n", "layered: 3\n", "--sam"),
        ("sam: 0.05\nadapter: [1]\n", "layered: 3\n", "--sam"),
    ],
)
def test_what_was_made_to_last_by_this_run_or_one_before(adapter, settings, first, how):
    (adapter / "run.yaml").write_text(settings.format(adapter.parent))
    (adapter.parent / "first" / "checkpoint-4").mkdir(parents=True)
    (adapter.parent / "first" / "run.yaml").write_text(first)
    lines = [line for line in findings(str(adapter), "whole", Base())[0] if LASTS in line]
    assert [line.split(f" {LASTS}")[0] for line in lines] == ([f"What {how}"] if how else [])
