"""`lowmem-npo evaluate --leaks` as a user runs it: files, tables, resuming, bad input."""

from __future__ import annotations

import json
import re
import shutil
from shutil import copy, copytree

import pytest
from helpers.evaluating import fails, result
from helpers.leaking import FORGET, HOLDOUT, evaluate, rows_in
from helpers.rows import write_rows
from helpers.tiny_models import tiny_model
from transformers import GPT2Config

from lowmem_npo.claim import claimed
from lowmem_npo.cli import main
from lowmem_npo.commands.evaluate.plan import plan_evaluation
from lowmem_npo.console import silent
from lowmem_npo.evaluation.comparing import other_options
from lowmem_npo.evaluation.gold import Gold
from lowmem_npo.evaluation.leaks.registry import NAMES, leak_tests
from lowmem_npo.evaluation.scoring import scorer as measuring
from lowmem_npo.evaluation.settings import EvaluationConfig


@pytest.fixture
def files(tmp_path):
    return rows_in(tmp_path)


QUICK = ("--leak-samples", "2", "--relearn-steps", "2", "--retune-steps", "2", "--max-new-tokens", "12", "--limit", "4")


def test_files_and_tables(byte_model, files, capsys):
    assert evaluate(byte_model, files, "--leaks", "all", *QUICK) == 0
    printed, leaks = capsys.readouterr().out, result(files)["leaks"]
    assert tuple(leaks) == NAMES and {"extraction", "relearning", "quantization"} <= set(NAMES)
    for test, figures in leaks.items():
        assert figures["leaks"] in (True, False, None) and figures["meaning"].endswith(".")
        assert f"{test}: " in printed
    assert "no --adapter" in leaks["quantization"]["meaning"]
    assert leaks["relearning"]["shown_rows"] + leaks["relearning"]["rows"] == 4
    assert "4 of 6 forget rows, 4 of 5 holdout rows" in printed
    worst, lessons = result(files)["worst_attack"], [v for k, v in leaks["relearning"].items() if " steps, " in k]
    lessons += [of for test in ("retuning", "jailbreak") for of in leaks[test].values() if isinstance(of, dict)]
    assert len(lessons) == 3 + 2 + 9 and worst["value"] - worst["holdout"] == max(
        of[key] - of["holdout_" + key]
        for of in (
            leaks["extraction"],
            leaks["sampling"],
            *[v for k, v in leaks["relearning"].items() if " steps" in k],
        )
        for key in ("extraction_strength", "best_rouge_l_recall")
        if key in of
    )
    assert f"\nThe worst of {worst['attacks']} attacks, {worst['test']}" in printed
    named = result(files)["open_unlearning"]
    assert list(named) == ["exact_memorization", "extraction_strength", "mia_loss", "mia_min_k", "mia_min_k_plus_plus",
                           "mia_zlib", "privleak"]  # fmt: skip
    assert named["mia_loss"] == leaks["membership"]["loss_auc"]
    assert named["mia_zlib"] == leaks["membership"]["zlib_auc"]
    rows = [json.loads(line) for line in (files / "out" / "rows.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "leaks" in row]
    assert [row["set"] for row in scored] == ["forget"] * 4 + ["holdout"] * 4
    assert [row["row"] for row in scored[:4]] == [row["row"] for row in rows if "prompt" in row]  # the same rows
    assert set(scored[0]["leaks"]) >= {
        "exact_memorization", "extraction_strength", "loss", "min_k", "min_k_pp", "best_rouge_l_recall", "best_sample"
    }  # fmt: skip
    assert "The 0 of 1" not in json.dumps(result(files))
    again = files / "again"
    earlier = str(files / "out" / "evaluation.json")
    before = ["--before", earlier, "--retained-log", earlier, "--leaks", "extraction"]
    assert evaluate(byte_model, files, *before, *QUICK, out=again.name) == 0
    assert "(before: " in (printed := capsys.readouterr().out)
    worst = result(files, "again")["worst_attack"]
    assert worst["gold"] == worst["value"] == leaks["extraction"]["extraction_strength"]
    assert "of a model that never saw the rows, " in printed.splitlines()[-2]


def test_without_a_holdout(byte_model, files, capsys):
    assert evaluate(byte_model, files, "--leaks", "extraction", "membership", *QUICK, holdout=False) == 0
    leaks = result(files)["leaks"]
    assert leaks["membership"]["leaks"] is None and "--holdout" in leaks["membership"]["meaning"]
    assert "rows" not in leaks["membership"] and leaks["extraction"]["leaks"] is None
    assert any("--holdout" in note for note in result(files)["notes"])
    # added later, without measuring the forget rows again
    assert evaluate(byte_model, files, "--leaks", "extraction", "membership", *QUICK, "--resume") == 0
    assert result(files)["leaks"]["membership"]["loss_auc"] >= 0


def test_an_interrupted_evaluation_continues(byte_model, files, monkeypatch):
    tests = ("--leaks", "extraction", "membership", "sampling", "relearning", *QUICK, "--batch-size", "2")
    assert evaluate(byte_model, files, *tests, out="whole") == 0
    real, calls = measuring.token_scores, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(measuring, "token_scores", killed)
    assert evaluate(byte_model, files, *tests) == 130
    assert not (files / "out" / "evaluation.json").exists()
    assert evaluate(byte_model, files, *tests, "--resume") == 0
    assert len(calls) == 3 + 2  # four batches, of which two were known
    for name in ("evaluation.json", "rows.jsonl"):
        assert (files / "out" / name).read_text() == (files / "whole" / name).read_text()
    monkeypatch.undo()
    assert evaluate(byte_model, files, *tests[:-2], "--relearn-lr", "0.5", "--resume") == 2


def test_a_dry_run_says_what_the_directory_would_refuse(byte_model, files, capsys):
    assert evaluate(byte_model, files, "--limit", "2") == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (files / "out").iterdir())
    dry = ("--limit", "2", "--dry-run")
    fails(capsys, evaluate(byte_model, files, *dry), "holds an evaluation: continue it with --resume")
    fails(capsys, evaluate(byte_model, files, "--limit", "3", *dry[2:], "--resume"), "limit was 2, is 3")
    fails(capsys, evaluate(byte_model, files, *dry, out="forget.jsonl"), "is a file")
    fails(capsys, evaluate(byte_model, files, *dry, "--resume", out="none"), "there is no evaluation in")
    assert evaluate(byte_model, files, *dry, "--resume") == 0
    with claimed(files / "out"):
        fails(capsys, evaluate(byte_model, files, *dry, "--resume"), "in use")
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (files / "out").iterdir())


def test_what_is_not_given_stays_as_the_evaluation_began(byte_model, files, capsys, monkeypatch):
    """Also where it is not the default, and from another directory."""
    shutil.copytree(byte_model, files / "model")
    monkeypatch.chdir(files)
    began = ("--leaks", "relearning", "--relearn-attacks", "one", *QUICK, "--seed", "3")
    assert main(["evaluate", "--model", "model", "--dtype", "float32", "--device", "cpu", "--forget", "forget.jsonl",
                 "--holdout", "holdout.jsonl", "--output-dir", "out", *began]) == 0  # fmt: skip
    settings = json.loads((files / "out" / "settings.json").read_text())
    (files / "yonder").mkdir()
    monkeypatch.chdir(files / "yonder")
    resumed = ["evaluate", "--output-dir", "../out", "--resume", "--device", "cpu", "--leaks", "relearning"]
    fails(capsys, main([*resumed, "--relearn-steps", "20"]), "other settings (relearn_steps was 2, is 20): use those")
    assert main([*resumed, "extraction", "sampling", "--leak-samples", "3"]) == 0  # options of what is added
    fails(capsys, main([*resumed, "--leak-samples", "2"]), "other settings (leak_samples was 3, is 2): use those")
    now = json.loads((files / "out" / "settings.json").read_text())
    changed = {name for name in settings if settings[name] != now[name]}
    of_tests, places = {"leaks", "leaks_in_journal", "leak_samples"}, {"output_dir", "model", "forget", "holdout"}
    assert changed == {*of_tests, *places, "resume"} and now["relearn_steps"] == 2
    assert {*result(files)["leaks"]} == {"relearning", "extraction", "sampling"}
    fails(capsys, main(["evaluate", "--output-dir", "none", "--resume"]), "there is no evaluation in 'none'")
    for edited in ({"relearn_steps": "two"}, {"seed": -1}, {"forget": ["forget.jsonl"]}):
        (files / "out" / "settings.json").write_text(json.dumps({**now, **edited}))
        fails(capsys, main(resumed), "settings.json' is damaged")


def test_what_stands_beside_the_figures_stays_as_well(byte_model, files, monkeypatch):
    """And leak tests that are named join those that it began with."""
    assert evaluate(byte_model, files, *QUICK, "--leaks", "membership", out="before") == 0
    monkeypatch.chdir(files)
    beside = ["--before", "before/evaluation.json", "--retained-log", "before/evaluation.json"]
    other = ["--forms", "trained", "--leaks", "membership", "--mia-gradnorm", "--any-base"]
    assert evaluate(byte_model, files, *QUICK, *beside, *other) == 0
    settings, found = (json.loads((files / "out" / f"{name}.json").read_text()) for name in ("settings", "evaluation"))
    (files / "yonder").mkdir()
    monkeypatch.chdir(files / "yonder")

    def resumed(*more):
        assert main(["evaluate", "--output-dir", "../out", "--resume", "--device", "cpu", *more]) == 0
        return json.loads((files / "out" / "settings.json").read_text())

    now = resumed()
    assert {name for name in settings if settings[name] != now[name]} == {
        "before", "retained_log", "output_dir", "resume"
    }  # fmt: skip
    assert result(files) == found and {"mia_gradnorm", "mia_reference"} <= found["open_unlearning"].keys()
    assert resumed("--leaks", "extraction")["leaks"] == ["membership", "extraction"]
    assert result(files)["leaks"].keys() == {"membership", "extraction"}
    assert resumed("--leaks", "none")["mia_gradnorm"] and result(files)["leaks"] == {}
    assert resumed("--leaks", "membership", "--before", str(files / "out" / "evaluation.json"))["forms"] == "trained"
    assert result(files)["leaks"] == found["leaks"]


def test_a_resumed_evaluation_goes_on_without_what_is_gone(byte_model, files, capsys):
    """Another model's figures, and a task that lm-eval does not have, or no more."""
    brief, others = ("--limit", "1", "--max-new-tokens", "1"), files / "before"
    assert evaluate(byte_model, files, *brief, out="before") == 0
    (others / "gold.json").write_text('{"tofu": {"sets": {"forget": {"truth_ratios": [0.1, 0.2]}}}}')
    both = ("--before", str(others / "evaluation.json"), "--retained-log", str(others / "gold.json"))
    assert evaluate(byte_model, files, *brief, *both) == 0
    shutil.rmtree(others)
    settings = files / "out" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lm_eval": ["gone"]}))
    resumed = ["evaluate", "--output-dir", str(files / "out"), "--resume", "--device", "cpu"]
    fails(capsys, main(resumed), "--before: there is no file", "; --before none goes on without it")
    fails(capsys, main([*resumed, "--before", "none"]), "; --retained-log none goes on without it")
    fails(capsys, main([*resumed, "--before", "none", "--retained-log", "none"]), "--lm-eval")
    assert main([*resumed, "--before", "none", "--retained-log", "none", "--lm-eval", "none"]) == 0
    assert main(resumed) == 0
    now = json.loads(settings.read_text())
    assert (now["before"], now["retained_log"], now["lm_eval"]) == (None, None, [])


def test_bad_input(byte_model, files, capsys):
    leaks = ("--leaks", "membership")
    fails(capsys, evaluate(byte_model, files, "--leaks", "extractoin"), "no leak test 'extractoin'", "relearning")
    members = ["--members", str(files / "forget.jsonl"), "--nonmembers", str(files / "holdout.jsonl")]
    fails(capsys, main(["evaluate", "--model", str(byte_model), *members, *leaks]), "--forget")
    (files / "holdout.jsonl").write_text("")
    fails(capsys, evaluate(byte_model, files, *leaks), "holdout.jsonl", "holds no rows")
    write_rows(files / "holdout.jsonl", [*HOLDOUT, FORGET[2]])
    fails(capsys, evaluate(byte_model, files, *leaks), "forget.jsonl, line 3", "in the holdout")
    for flag, value in (("--relearn-share", "1"), ("--relearn-lr", "nan"), ("--leak-temperature", "0"),
                        ("--leak-samples", "0"), ("--relearn-steps", "0"), ("--relearn-attacks", "hard"),
                        ("--retune-steps", "0"), ("--retune-lr", "0")):  # fmt: skip
        fails(capsys, evaluate(byte_model, files, *leaks, flag, value), flag)
    write_rows(files / "holdout.jsonl", HOLDOUT)
    many = ("--leaks", "relearning", "--relearn-attacks", "4:20:1e-3", "--limit", "4")
    fails(capsys, evaluate(byte_model, files, *many), "4 rows are to be shown again", "only 4")
    assert not (files / "out").exists()


def test_a_dry_run_checks_all_and_writes_nothing(byte_model, files, capsys):
    longer = ("--leaks", "relearning", "jailbreak", *QUICK, "--relearn-steps", "3")
    assert evaluate(byte_model, files, *longer, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "Leak test jailbreak, on 4 forget rows and 4 holdout rows: ROUGE-L recall" in printed
    assert "Would measure 4 forget rows: likelihoods and answers" in printed and "Measured" not in printed
    assert "Would write 4 answers of up to 12 tokens, besides what leak tests ask" in printed
    steps = re.search(r"Would take (\d+) steps of fine-tuning\n", printed)[1]
    assert printed.rstrip().endswith("Dry run: nothing was measured or written.") and not (files / "out").exists()
    assert evaluate(byte_model, files, *longer, out="measured") == 0
    assert f"Leak tests: {steps} steps of fine-tuning, about" in capsys.readouterr().out
    for bad in (("--relearn-attacks", "4:20:1e-3"), ("--retune-lr", "0"), ("--leak-samples", "0")):
        assert evaluate(byte_model, files, "--leaks", "relearning", *QUICK, "--dry-run", *bad) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_membership_beside_a_reference_model_and_by_gradients(byte_model, files, capsys):
    """The model is its own reference here: no row differs, an AUC of 0.5. Other rows are not compared."""
    write_rows(files / "forget.jsonl", [{**FORGET[0], "answer": "The 0\u2028of 1."}, *FORGET[1:]])  # which ends no line
    membership = ("--leaks", "membership")
    assert evaluate(byte_model, files, *membership, out="gold") == 0
    log = ("--retained-log", str(files / "gold" / "evaluation.json"))
    assert evaluate(byte_model, files, *membership, *log, "--mia-gradnorm") == 0
    named = result(files)["open_unlearning"]
    assert named["mia_reference"] == 0.5 and 0 <= named["mia_gradnorm"] <= 1
    assert evaluate(byte_model, files, *membership, *log, "--limit", "4", out="fewer") == 0
    assert "mia_reference" not in result(files, "fewer")["open_unlearning"]
    (note,) = [note for note in result(files, "fewer")["notes"] if "--retained-log" in note]
    assert note.endswith("so nothing is compared with it.")
    began = (files / "gold" / "settings.json").read_text()
    (files / "gold" / "settings.json").unlink()
    missing = "mia_reference is not measured: the evaluation of --retained-log has no --leaks membership of these "
    assert evaluate(byte_model, files, *membership, *log, out="unknown") == 0
    unknown = "mia_reference is not measured: the settings of --retained-log are not beside it."
    assert unknown in result(files, "unknown")["notes"]
    (files / "gold" / "settings.json").write_text(began)
    write_rows(files / "holdout.jsonl", HOLDOUT[:3])
    assert evaluate(byte_model, files, *membership, *log, out="other") == 0
    assert missing + "holdout rows." in result(files, "other")["notes"]
    write_rows(files / "holdout.jsonl", HOLDOUT)
    (files / "gold" / "rows.jsonl").write_text('{"set": "forget", "row": 0}\n')
    assert evaluate(byte_model, files, *membership, *log, out="without") == 0
    assert missing + "forget and holdout rows." in result(files, "without")["notes"]
    fails(capsys, evaluate(byte_model, files, "--mia-gradnorm", out="none"), "--mia-gradnorm", "--leaks membership")


def test_a_gold_model_is_compared_on_the_same_rows_alone(byte_model, files):
    leaks = ("--leaks", "extraction", "sampling", "--leak-samples", "2", "--max-new-tokens", "8")
    assert evaluate(byte_model, files, *leaks, out="gold") == 0
    log = ("--retained-log", str(files / "gold" / "evaluation.json"))
    assert evaluate(byte_model, files, *leaks, *log) == 0
    of, gold = result(files), result(files, "gold")
    assert of["worst_attack"]["gold"] == of["worst_attack"]["value"] and of["open_unlearning"]["privleak"] == 0
    assert not any("--retained-log" in note for note in of["notes"] if "mia_reference" not in note)
    assert evaluate(byte_model, files, *leaks, *log, "--leak-samples", "3", out="more") == 0
    (note,) = [note for note in result(files, "more")["notes"] if "--leak-samples" in note]
    assert note == "sampling: not compared with --retained-log, which had another --leak-samples."
    settings = files / "gold" / "settings.json"
    began = json.loads(settings.read_text())
    settings.write_text(json.dumps({**began, "qlora": True, "mia_gradnorm": True}))  # no matter of what is asked
    assert evaluate(byte_model, files, *leaks, *log, out="stored") == 0
    assert result(files, "stored")["worst_attack"] == of["worst_attack"] and not any(
        "compared" in note for note in result(files, "stored")["notes"]
    )
    settings.write_text(json.dumps({**began, "seed": 7}))
    assert evaluate(byte_model, files, *leaks, *log, out="seed") == 0
    assert result(files, "seed")["worst_attack"]["gold"] is None
    settings.write_text(json.dumps({name: began[name] for name in ("retained_log", "limit", "digests")}))
    now = {name: value for name, value in began.items() if name not in ("system", "double_quant", "digests")}
    assert set(Gold.of({**now, "retained_log": log[1]}).leaks) == {"extraction", "sampling"}  # none is another's
    settings.write_text(json.dumps(began))
    write_rows(files / "holdout.jsonl", HOLDOUT[:3])
    assert evaluate(byte_model, files, *leaks, *log, out="holdout") == 0
    assert any(note.startswith("privleak is compared with 0.5") for note in result(files, "holdout")["notes"])
    write_rows(files / "forget.jsonl", FORGET[:4])
    assert evaluate(byte_model, files, *leaks, *log, out="other") == 0
    other = result(files, "other")
    assert other["worst_attack"]["gold"] is None and gold["open_unlearning"]["mia_min_k"] not in (0, 0.5)
    min_k = other["open_unlearning"]["mia_min_k"]
    assert other["open_unlearning"]["privleak"] == pytest.approx(100 * ((1 - min_k) / 0.5 - 1), abs=1e-6)
    (note,) = [note for note in other["notes"] if note.startswith("--retained-log")]
    assert note.endswith("had other forget rows, or asked for them otherwise, so nothing is compared with it.")


def test_a_gold_model_that_was_evaluated_without_a_holdout_is_compared_on_what_both_have(byte_model, files):
    leaks = ("--leaks", "sampling", "--leak-samples", "2", "--max-new-tokens", "8")
    assert evaluate(byte_model, files, *leaks, out="gold", holdout=False) == 0
    log = ("--retained-log", str(files / "gold" / "evaluation.json"))
    assert evaluate(byte_model, files, *leaks, *log) == 0
    worst = result(files)["worst_attack"]
    assert worst["figure"] == "ROUGE-L recall" and worst["gold"] == worst["value"] > 0
    notes = "\n".join(result(files)["notes"])
    assert "privleak is compared with 0.5: the evaluation of --retained-log had no holdout." in notes
    assert "has no figure of the model that never saw the rows" not in notes
    longer = (*leaks[:-1], "9", *log)
    assert evaluate(byte_model, files, *longer, out="longer") == 0
    assert result(files, "longer")["worst_attack"]["gold"] is None
    assert "has no figure of the model that never saw the rows" in "\n".join(result(files, "longer")["notes"])


def test_a_model_of_another_tokenizer_is_compared_with_nothing(byte_model, files):
    """Nor is one with another chat template; further special tokens are no matter."""
    for name in ("chat", "spaced", "special"):
        copytree(byte_model, files / name)
    (files / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    of = json.loads((files / "spaced" / "tokenizer.json").read_text())
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [*of["added_tokens"], {"id": 2, "content": "!", "special": True, **no}]
    (files / "special" / "tokenizer.json").write_text(json.dumps({**of, "added_tokens": special}))
    of["pre_tokenizer"]["add_prefix_space"] = True
    (files / "spaced" / "tokenizer.json").write_text(json.dumps(of))
    why = [
        "The earlier evaluation had another tokenizer or chat template: the two are not comparable.",
        "--retained-log: its evaluation had another tokenizer or chat template, so nothing is compared with it.",
    ]
    for name, notes in (("chat", why), ("spaced", why), ("special", [])):
        assert evaluate(files / name, files, "--leaks", "extraction", out=f"of-{name}") == 0
        log = str(files / f"of-{name}" / "evaluation.json")
        compared = ("--retained-log", log, "--before", log)
        assert evaluate(byte_model, files, "--leaks", "extraction", *compared, out=f"beside-{name}") == 0
        beside = result(files, f"beside-{name}")
        assert [note for note in beside["notes"] if "tokenizer" in note] == notes
        assert (beside["worst_attack"]["gold"] is None) == bool(notes)


def test_rows_to_keep_that_are_others_too(byte_model, files, capsys):
    """Of the forget rows: they are not taught to see what comes back. Of the holdout: it is to be unknown."""
    path = write_rows(files / "retain.jsonl", [*FORGET, {"question": "Where?", "answer": "There."}])
    given = {"forget": str(files / "forget.jsonl"), "retain": path, "leaks": ("retuning",)}
    plan = plan_evaluation(EvaluationConfig(model=str(byte_model), **given), silent)
    (row,) = plan.attacker.retain
    assert "There." in plan.context.tokenizer.decode(row["input_ids"])
    write_rows(files / "retain.jsonl", [HOLDOUT[3]])
    code = evaluate(byte_model, files, "--leaks", "extraction", "--retain", path)
    fails(capsys, code, "1 of the retain rows are in the holdout as well")


def test_one_row_and_identical_rows(byte_model, files):
    write_rows(files / "forget.jsonl", FORGET[:1])
    assert evaluate(byte_model, files, "--leaks", "relearning", holdout=False) == 0
    relearning = result(files)["leaks"]["relearning"]
    assert relearning["leaks"] is None and "only one row" in relearning["meaning"]
    write_rows(files / "forget.jsonl", [FORGET[0]] * 3)
    write_rows(files / "holdout.jsonl", [{**FORGET[0], "question": "Who is numbre 0?"}])
    assert evaluate(byte_model, files, "--leaks", "membership", out="alike") == 0
    assert result(files, "alike")["leaks"]["membership"]["leaks"] is None


def test_what_is_taught_fits_into_the_positions(byte_model, files):
    """General texts are shortened to what the model has learnt to take, here and in training."""
    model = files / "short"
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=80)
    tiny_model(config).save_pretrained(model)
    for file in byte_model.glob("tokenizer*"):
        copy(file, model)
    data = ["--forget", write_rows(files / "f.jsonl", FORGET[:2]), "--dtype", "float32", "--device", "cpu"]
    data += ["--leaks", "retuning", "--model", str(model), "--output-dir", str(files / "out")]
    config = EvaluationConfig(model=str(model), forget=data[1], device="cpu", leaks=("retuning",))
    assert max(len(row["input_ids"]) for row in plan_evaluation(config, silent).attacker.general) == 80
    assert main(["evaluate", *data, "--retune-steps", "2"]) == 0
    assert "steps on general texts" in result(files)["leaks"]["retuning"]["meaning"]
    run = ["--retain", write_rows(files / "r.jsonl", HOLDOUT[:2]), "--max-steps", "1", "--batch-size", "2"]
    run += ["--eval-rows", "2", "--max-new-tokens", "4"]
    assert main(["train", *data[:-1], str(files / "run"), *run, "--lora-targets", "c_attn"]) == 0
    leaks = json.loads((files / "run" / "leaks.json").read_text())
    assert any("general texts" in name for name in leaks["after"]["retuning"])


def test_before_is_compared_test_by_test(byte_model, files, capsys):
    """An option of one test says nothing of the others."""
    leaks = ("--leaks", "extraction", "sampling", "--max-new-tokens", "4", "--limit", "4", "--leak-samples")
    assert evaluate(byte_model, files, *leaks, "1", "--relearn-steps", "3", out="before") == 0
    before = ("--before", str(files / "before" / "evaluation.json"))
    capsys.readouterr()
    assert evaluate(byte_model, files, *leaks, "2", *before) == 0
    assert result(files)["notes"] == ["sampling: not compared with --before, which had another --leak-samples."]
    printed = capsys.readouterr().out
    assert "extraction: no traces found (before: " in printed and "sampling: no traces found\n" in printed
    assert evaluate(byte_model, files, *leaks, "1", *before, out="same") == 0 and not result(files, "same")["notes"]
    assert "sampling: no traces found (before: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("test", "earlier", "now", "others", "flags"),
    [
        ("extraction", {"relearn_steps": 1}, {"relearn_steps": 2}, [], []),
        ("relearning", {"relearn_steps": 1}, {"relearn_steps": 2}, [], ["--relearn-steps"]),
        ("sampling", {"max_new_tokens": 4}, {"max_new_tokens": 8}, [], ["--max-new-tokens"]),
        ("extraction", {"max_new_tokens": 4}, {"max_new_tokens": 8}, [], []),
        ("retuning", {}, {}, ["retain"], ["--retain"]),
        ("relearning", {}, {}, ["retain"], []),
        ("quantization", {"relearn_steps": 1}, {"relearn_steps": 2}, [], []),  # which neither repeated
        (
            "quantization",
            {"leaks": ["relearning", "quantization"], "relearn_steps": 1},
            {"leaks": ["all"], "relearn_steps": 2},
            [],
            ["--relearn-steps", "--leaks"],
        ),
    ],
)
def test_what_makes_a_leak_test_another(test, earlier, now, others, flags):
    (tested,) = leak_tests([test])
    assert other_options(earlier, now, tested, others) == flags
