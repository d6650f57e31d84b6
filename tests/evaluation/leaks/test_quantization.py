"""The forms a model is stored in: on the demo's models, through the command, with real files and real 4-bit weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.loaded_models import loads_watched
from helpers.rows import write_rows
from helpers.small_demo import SMALL
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_npo.cli import main
from lowmem_npo.data import bundled_rows
from lowmem_npo.evaluation.leaks import quantization as module
from lowmem_npo.evaluation.leaks import relearning
from lowmem_npo.evaluation.leaks.contract import TOO_LARGE, LeakResult, leak_results
from lowmem_npo.evaluation.leaks.quantization import AS_EVALUATED, judge
from lowmem_npo.evaluation.leaks.relearning import RELEARNING, Relearning
from lowmem_npo.evaluation.leaks.rewording import REWORDING
from lowmem_npo.evaluation.leaks.tuned import Outcome, Tuned, judge_made
from lowmem_npo.memory import switches
from lowmem_npo.model import merging
from lowmem_npo.report.leak_sentence import leak_sentence
from lowmem_npo.report.leak_tests import leak_sections


@pytest.fixture(scope="module")
def work(small_demo, tmp_path_factory):
    """The demo's base and gold standard, each with an adapter that does nothing; the rows as files."""
    folder, demo = tmp_path_factory.mktemp("forms"), small_demo[0].directory
    for name in ("base", "gold"):
        model = AutoModelForCausalLM.from_pretrained(demo / name, dtype=torch.float32)
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).save_pretrained(
            folder / name
        )
    shutil.copytree(demo / "unlearned", folder / "unlearned")
    for part, limit in (("forget", SMALL.limit), ("holdout", 24)):
        rows = [{"question": row["question"], "answer": row["answer"]} for row in bundled_rows(part, limit=limit).rows]
        write_rows(folder / f"{part}.jsonl", rows)
    return folder


def evaluate(work, adapter, out, *more):
    code = main(["evaluate", "--adapter", str(work / adapter), "--forget", str(work / "forget.jsonl"),
                 "--holdout", str(work / "holdout.jsonl"), "--dtype", "float32", "--device", "cpu",
                 "--output-dir", str(out), "--leaks", *more])  # fmt: skip
    return code, json.loads((out / "evaluation.json").read_text())["leaks"] if code == 0 else None


def strengths(found):
    return {form: found[form]["extraction_strength"] for form in (AS_EVALUATED, *module.FORMS)}


@pytest.mark.parametrize(
    "adapter, leaks, low, high", [("base", True, 0.8, 1.0), ("gold", False, 0.0, 0.12), ("unlearned", False, 0.0, 0.2)]
)
def test_recites_never_saw_or_forgot(work, adapter, leaks, low, high, tmp_path):
    code, found = evaluate(work, adapter, tmp_path / "out", "quantization")
    assert code == 0 and list(found) == ["quantization"]
    each = strengths(found["quantization"])
    assert all(low <= strength <= high for strength in each.values()), each
    assert len({found["quantization"][form]["nll"] for form in each}) == 4  # four models, not one
    assert all(found["quantization"][form]["holdout_extraction_strength"] < 0.1 for form in each)
    if adapter != "unlearned":  # near the border for a model that forgot in part
        assert found["quantization"]["leaks"] is leaks
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json", "measured.jsonl", "rows.jsonl", "settings.json", "started_in"
    ]  # fmt: skip


def test_an_update_that_is_lost_in_merging_is_seen(work, tmp_path, monkeypatch, capsys):
    """The merged weights are the base's: it recites again; `merge` then warns."""
    real = merging.write_merged
    monkeypatch.setattr(merging, "write_merged", lambda checkpoint, updates, *rest: real(checkpoint, {}, *rest))
    shutil.copytree(work / "unlearned", work / "lost")
    code, found = evaluate(work, "lost", work / "lost" / "evaluation", "quantization")
    assert code == 0
    each, result = strengths(found["quantization"]), found["quantization"]
    assert each["merged"] > 0.9 and each["merged_4bit"] > 0.8 and each[AS_EVALUATED] < 0.2 > each["adapter_on_4bit"]
    assert result["leaks"] is True and result["returned"] > 0.7
    assert "quantization: traces found" in capsys.readouterr().out
    assert main(["merge", "--adapter", str(work / "lost"), "--output-dir", str(tmp_path / "merged")]) == 0
    assert (
        "WARNING, quantization test: traces found. In the form that is worst by extraction alone, merged"
        in capsys.readouterr().out
    )


def test_forms_that_cannot_be_measured_are_named(work, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    code, found = evaluate(work, "unlearned", tmp_path / "out", "quantization")
    assert code == 0 and "merged in bf16, merged and rounded to 4 bits: The disk of" in found["quantization"]["meaning"]
    assert "merged" not in found["quantization"] and "adapter_on_4bit" in found["quantization"]


def test_weights_that_are_replaced_meanwhile_are_not_measured(work, tmp_path, monkeypatch):
    shutil.copytree(work / "unlearned", work / "replaced")
    weights, real = work / "replaced" / "adapter_model.safetensors", merging.find_updates

    def find_updates(adapter, checkpoint):
        save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
        return real(adapter, checkpoint)

    monkeypatch.setattr(merging, "find_updates", find_updates)
    code, found = evaluate(work, "replaced", tmp_path / "out", "quantization")
    assert code == 0 and "has been replaced since the command began" in found["quantization"]["meaning"]
    assert "merged" not in found["quantization"] and "adapter_on_4bit" in found["quantization"]


def test_a_form_that_does_not_fit_does_not_end_the_others(work, tmp_path, monkeypatch):
    real = switches.load_model

    def load(config, *how):
        if config.model.endswith("merged") and not config.qlora:
            raise torch.OutOfMemoryError
        return real(config, *how)

    monkeypatch.setattr(switches, "load_model", load)
    code, found = evaluate(work, "unlearned", tmp_path / "out", "quantization")
    assert code == 0 and "merged in bf16: it does not fit" in found["quantization"]["meaning"]
    assert "merged" not in found["quantization"] and "merged_4bit" in found["quantization"]


def test_attacks_that_do_not_fit_end_neither_the_others_nor_the_evaluation(work, tmp_path, monkeypatch):
    """Memory runs out in a step of fine-tuning, on the model as it is evaluated, and in 4 bits when that is asked; what
    is missing is measured when there is room."""
    tests = ("relearning", "retuning", "quantization", "extraction", "--mia-gradnorm", "--limit", "8",
             "--relearn-attacks", "0.5:2:1e-3", "--retune-steps", "2")  # fmt: skip
    whole = evaluate(work, "unlearned", tmp_path / "whole", *tests)[1]
    real, four_bits = module._figures, list(module.FORMS)[2]

    def backward(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def figures(subject):
        if subject.form == module.FORMS[four_bits]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(subject)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(module, "_figures", figures)
        code, found = evaluate(work, "unlearned", tmp_path / "out", *tests)
    assert code == 0
    for test in ("relearning", "retuning"):
        assert found[test]["meaning"].startswith(f"Not measured: {TOO_LARGE} (") and found[test]["leaks"] is None
        assert f"{test}: not measured: {TOO_LARGE}" in found["quantization"]["meaning"]
    assert f"Not measured: {module.FORMS[four_bits]}: {TOO_LARGE}." in found["quantization"]["meaning"]
    assert found["quantization"]["leaks"] is None and four_bits not in found["quantization"]
    assert found["extraction"] == whole["extraction"]  # what was trained in vain is gone
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"mia_gradnorm is not measured: {TOO_LARGE}." in written["notes"]
    sentence = leak_sentence(leak_results(found), None, False)
    assert sentence.endswith("Not measured, since memory ran out: relearning, retuning, quantization (in part).")
    assert evaluate(work, "unlearned", tmp_path / "out", *tests, "--resume")[1] == whole


def test_one_form_at_a_time_is_in_memory(work, tmp_path):
    with loads_watched(switches) as still_there:
        assert evaluate(work, "unlearned", tmp_path / "out", "quantization")[0] == 0
    assert still_there == [0, 0, 0, 0]  # as evaluated, and three forms


def test_it_goes_on_where_it_was(work, tmp_path, monkeypatch):
    """Killed after the first form: the second run loads the evaluated model and the two forms that are missing."""
    real, loaded = switches.load_model, []

    def load(config, *how):
        loaded.append((config.model.endswith("merged"), config.qlora))
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return real(config, *how)

    monkeypatch.setattr(switches, "load_model", load)
    assert evaluate(work, "unlearned", tmp_path / "out", "quantization")[0] == 130
    assert not (tmp_path / "out" / "merged").exists()
    (tmp_path / "out" / "merged").mkdir()  # killed harder, it would have left this
    (tmp_path / "out" / "merged" / "model.safetensors").write_bytes(b"half")
    code, resumed = evaluate(work, "unlearned", tmp_path / "out", "quantization", "--resume")
    evaluated, on_4_bits, whole, rounded = (False, False), (False, True), (True, False), (True, True)
    assert code == 0 and loaded == [evaluated, on_4_bits, whole, evaluated, whole, rounded]
    assert evaluate(work, "unlearned", tmp_path / "whole", "quantization")[1] == resumed


def test_each_form_meets_the_attacks_named_beside(work, tmp_path, monkeypatch):
    """A killed evaluation goes on; files that were read are as they were; the worst attack is one of all forms."""
    tests = ("quantization", "relearning", "retuning", "jailbreak", "--limit", "8", "--max-new-tokens", "6",
             "--relearn-attacks", "0.5:16:5e-3", "--retune-steps", "2")  # fmt: skip
    read = [work / "unlearned" / "adapter_model.safetensors", work / "unlearned" / "adapter_config.json"]
    before = [file.read_bytes() for file in read]
    real, forms = Relearning.measure, []

    def measure(test, subject):
        forms.append(subject.form)
        if len(forms) == 3:
            raise KeyboardInterrupt
        return real(test, subject)

    monkeypatch.setattr(Relearning, "measure", measure)
    assert evaluate(work, "unlearned", tmp_path / "out", *tests)[0] == 130
    assert not (tmp_path / "out" / "merged").exists()
    code, found = evaluate(work, "unlearned", tmp_path / "out", *tests, "--resume")
    assert code == 0 and forms == ["", *list(module.FORMS.values())[:2], "", *list(module.FORMS.values())[1:]]
    assert before == [file.read_bytes() for file in read]
    attack = "16 steps, 50% shown, lr 0.005"
    strengths = {found["relearning"][attack]["extraction_strength"]}
    for form in module.FORMS:
        own = found["quantization"][form]
        assert {"retuning: 2 steps on general texts, lr 0.001", "jailbreak: oracle"} <= set(own)
        strengths.add(own[f"relearning: {attack}"]["extraction_strength"])
        assert "holdout_extraction_strength" in own[f"relearning: {attack}"]
        assert "holdout_best_rouge_l_recall" in own["jailbreak: oracle"]
    assert len(strengths) > 1
    names = module.QUANTIZATION.attacks(found["quantization"])
    assert {"merged in bf16", f"merged in bf16, relearning: {attack}"} <= set(names)
    worst = json.loads((tmp_path / "out" / "evaluation.json").read_text())["worst_attack"]
    assert worst["attacks"] == len(names) + 1 + 1 + 9  # extraction was not named; eight jailbreaks and the best of all


def test_an_attack_on_a_form_is_a_trace():
    forms = {AS_EVALUATED: figures(0.1), "merged": figures(0.1, 0.1)}
    lesson = {"2 steps, 50% shown, lr 1": {"extraction_strength": 0.6, "holdout_extraction_strength": 0.1}}
    for leaks in (True, False):
        result = judge(forms, None, None, {"merged": [(RELEARNING, LeakResult(lesson, "", leaks))]})
        assert result.leaks is leaks and ("relearning (merged in bf16)" in result.meaning) is leaks
        assert result.figures["merged"]["relearning: 2 steps, 50% shown, lr 1"]["extraction_strength"] == 0.6
        (section,) = leak_sections({"after": {"quantization": result}})
        assert any("relearning" in figure.title for figure in section.figures)


def test_the_worst_attack_on_merged_weights_is_named_beside_the_worst_form():
    """Which is worst by extraction alone, and may be another than that in which attacks bring back most."""
    forms = {AS_EVALUATED: figures(0.1, 0.1), "adapter_on_4bit": figures(0.3, 0.1), "merged": figures(0.2, 0.1),
             "merged_4bit": figures(0.1, 0.1)}  # fmt: skip
    strengths = {"adapter_on_4bit": (0.9, 0.1), "merged": (0.4, 0.35), "merged_4bit": (0.13, 0.03)}
    attacked = {
        form: [(RELEARNING, LeakResult({"2 steps": figures(*of), "1 step": figures(0.05, 0.05)}, "", None))]
        for form, of in strengths.items()
    }
    said = judge(forms, None, None, attacked).meaning
    assert said.startswith(
        "In the form that is worst by extraction alone, the adapter beside the 4-bit base, the model"
    )
    assert (
        " On merged weights, the worst of the other attacks is relearning: 2 steps (merged and rounded to 4 bits): it "
        "brings back 13%; of answers that the model never saw, 3%. Whether other attacks bring"
    ) in said
    no_holdout = {"merged": [(RELEARNING, LeakResult({"2 steps": figures(0.2)}, "", None))]}
    assert "(merged in bf16): it brings back 20%." in judge(forms, None, None, no_holdout).meaning
    assert "On merged weights" not in judge(forms).meaning


def test_without_a_holdout_an_attack_on_a_form_finds_what_its_verdict_says():
    forms = {AS_EVALUATED: figures(0.1), "merged": figures(0.1)}
    lesson = LeakResult({"2 steps, 50% shown, lr 1": {"extraction_strength": 0.6}}, "", True, against_before=True)
    result = judge(forms, None, 0.9, {"merged": [(RELEARNING, lesson)]})
    assert result.verdict.words == "much is left" and "traces" not in result.meaning
    assert result.meaning.endswith("By other attacks, much is left: relearning (merged in bf16).")


def test_attacks_that_were_not_made_on_a_form_are_named():
    """Under divergence nothing is known of the form; an attack that no model can be put to says nothing of it."""
    forms = dict.fromkeys((AS_EVALUATED, "merged", "merged_4bit"), figures(0.05, 0.05))
    diverged = judge_made(relearning.judge, {"2 steps": 2}, {"2 steps": Outcome({})})
    result = judge(forms, None, None, {form: [(RELEARNING, diverged)] for form in ("merged", "merged_4bit")})
    assert result.leaks is None
    assert result.meaning.endswith(
        "In every form, relearning: not measured: the attacked model gave no finite likelihood (2 steps)."
    )
    steps, made = {"2 steps": 2, "9 steps": 9}, {2: Tuned(1, 2, figures(0.1), figures(0.1, 0.1), None)}
    in_part = judge_made(relearning.judge, steps, dict.fromkeys(steps, Outcome(made)))
    result = judge(forms, None, None, {"merged": [(RELEARNING, in_part)]})
    assert result.leaks is False and "In merged in bf16, relearning: not counted, since" in result.meaning
    too_large = judge_made(relearning.judge, steps, dict.fromkeys(steps, Outcome(made, too_large=True)))
    assert in_part.leaks is False and too_large.leaks is None  # the other one may bring more back
    result = judge(forms, None, None, {"merged": [(RELEARNING, too_large)]})
    assert result.leaks is None and result.too_large and f"not counted, since {TOO_LARGE}: 9 steps" in result.meaning
    assert all(LeakResult.from_json(of.to_json()) == of for of in (diverged, in_part, too_large))
    result = judge(forms, None, None, {"merged": [(REWORDING, LeakResult.not_measured(REWORDING.none))]})
    assert result.leaks is False and "rewording: not measured: the rows bring no paraphrases" in result.meaning


def test_the_worst_form_is_one_chosen_among_them():
    """By itself each of the p-values would do; as one of two forms it does not."""
    forms = {AS_EVALUATED: figures(0.1, 0.1, 0.5), "adapter_on_4bit": figures(0.1, 0.1, 0.5)}
    result = judge({**forms, "merged": figures(0.4, 0.1, 0.03)})
    assert result.leaks is None and "4 of the forget set and 5 of the holdout (p = 0.06)" in result.meaning
    assert result.figures["merged"]["p_value"] == 0.06 and judge({AS_EVALUATED: forms[AS_EVALUATED],
                                                                  "merged": figures(0.4, 0.1, 0.03)}).leaks  # fmt: skip
    both = judge({**forms, "merged": figures(0.4, 0.1, 0.03), "merged_4bit": figures(0.3, 0.1, 0.01)})
    assert both.leaks is True and "merged and rounded to 4 bits" in both.meaning
    lesson = {"2 steps, 50% shown, lr 1": figures(0.6, 0.1, 0.03)}
    forms["merged"] = figures(0.1, 0.1, 0.5)
    attacked = judge(forms, None, None, {"merged": [(RELEARNING, LeakResult(lesson, "", True))]})
    assert attacked.leaks is None and "cannot be told: relearning (merged in bf16, 60%)" in attacked.meaning
    assert attacked.figures["merged"]["relearning: 2 steps, 50% shown, lr 1"]["p_value"] == 0.06


def test_rows_that_are_enough_for_one_form_can_be_too_few_for_two():
    """By themselves 3 + 4 rows could show something, which the test on the form says; as one of two they could not."""
    chance = {"p_value": 0.5, "least_p_value": 1 / 35}
    lesson = LeakResult({"2 steps": figures(0.0, 0.0) | chance}, "", False)
    forms = {AS_EVALUATED: figures(0.1, 0.1), "merged": figures(0.1, 0.1, 0.5)}
    assert judge(forms, None, None, {"merged": [(RELEARNING, lesson)]}).leaks is False
    two = judge(forms | {"merged_4bit": figures(0.1, 0.1, 0.5)}, None, None, {"merged": [(RELEARNING, lesson)]})
    assert two.leaks is None and "cannot be told: relearning (merged in bf16, 0%)" in two.meaning
    few = judge({**forms, "merged": figures(0.1, 0.1) | {"p_value": 0.5, "least_p_value": 0.05}})
    assert few.leaks is None and "With 4 + 5 rows chance explains any difference" in few.meaning
    assert few.figures["least_p_value"] == 0.05


def test_answers_that_come_whole_from_a_form_are_a_trace_though_the_mean_hides_them():
    def form(recited, p):
        return figures(0.1, 0.1, 0.5) | {"recited": recited, "holdout_recited": 0.0, "whole_p_value": p}

    forms = {AS_EVALUATED: form(0.0, 1.0), "merged": form(0.0, 1.0), "merged_4bit": form(0.2, 0.01)}
    result = judge(forms)
    assert result.leaks is True and "merged and rounded to 4 bits" in result.meaning
    assert "20% of the answers come whole, of the holdout's 0% (p = 0.02)." in result.meaning
    lesson = LeakResult({"2 steps": form(0.2, 0.001)}, "", True)
    attacked = judge(forms | {"merged_4bit": form(0.0, 1.0)}, None, None, {"merged": [(RELEARNING, lesson)]})
    assert attacked.leaks is True and "traces found: relearning (merged in bf16)" in attacked.meaning
    brought = module.QUANTIZATION.attacks(attacked.figures)["merged in bf16, relearning: 2 steps"]
    assert brought.stands_out is True and brought.whole.value == 0.2 and brought.whole.p == 0.002


def test_what_cannot_be_told_is_not_called_good():
    """An attack on a form between the thresholds, without a holdout; a form that could not be measured."""
    forms = {AS_EVALUATED: figures(0.05), "merged": figures(0.05)}
    lesson = {"2 steps, 50% shown, lr 1": {"extraction_strength": 0.49}}
    result = judge(forms, None, 0.9, {"merged": [(RELEARNING, LeakResult(lesson, "", None))]})
    assert result.leaks is None and "cannot be told: relearning (merged in bf16, 49%)" in result.meaning
    assert judge(forms, None, 0.9).leaks is False and judge(forms, "merged: too large.", 0.9).leaks is None


def figures(strength, holdout=None, p=None):
    own = {"rows": 4, "nll": 1.0, "exact_memorization": 0.5, "extraction_strength": strength, "recited": 0.0}
    beside = {} if holdout is None else {"holdout_rows": 5, "holdout_extraction_strength": holdout}
    return own | beside | ({} if p is None else {"p_value": p})


def test_the_worst_form_decides():
    def forms(merged, holdout):
        strengths = {AS_EVALUATED: 0.1, "adapter_on_4bit": 0.2, "merged": merged}
        return {form: figures(strength, holdout) for form, strength in strengths.items()}

    result = judge(forms(0.6, 0.05))
    assert result.leaks is True and result.figures["returned"] == pytest.approx(0.5) and result.figures["rows"] == 4
    assert "merged in bf16" in result.meaning and "the last 60%" in result.meaning
    assert result.figures["merged"]["holdout_extraction_strength"] == 0.05
    assert judge(forms(0.12, 0.15)).leaks is False
    assert judge(forms(0.6, None)).leaks is True and judge(forms(0.3, None)).leaks is None
    alone = judge({AS_EVALUATED: figures(0.1)}, "the reason.")
    said = "Not measured: the reason."
    assert alone.to_json() == {"meaning": said, "leaks": None, "gap": said}


def test_without_a_holdout_merged_forms_are_compared_with_the_original_as_evaluated(work, tmp_path):
    """A merged model has no original to ask; what that said before decides whether much is left all the same."""
    code = main(["evaluate", "--adapter", str(work / "unlearned"), "--forget", str(work / "forget.jsonl"),
                 "--dtype", "float32", "--device", "cpu", "--output-dir", str(tmp_path / "out"), "--leaks", "sampling",
                 "jailbreak", "quantization", "--leak-samples", "1", "--max-new-tokens", "12"])  # fmt: skip
    leaks = json.loads((tmp_path / "out" / "evaluation.json").read_text())["leaks"]
    assert code == 0 and all(of_test["leaks"] is False and of_test["against_before"] for of_test in leaks.values())
    assert "cannot be told" not in leaks["quantization"]["meaning"]
