"""What `evaluate` has measured since: in the report of the run, as far as it is of the run's adapter and rows."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from helpers.report_pages import page, report_of
from helpers.reported_run import FORGET, train, unexplained
from helpers.rows import write_rows
from safetensors.torch import load_file, save_file

from lowmem_npo.cli import main
from lowmem_npo.commands.evaluate.plan import plan_evaluation
from lowmem_npo.console import silent
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import THE_JUDGES
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import file_sha256
from lowmem_npo.report.content import read_content
from lowmem_npo.report.files import write_report
from lowmem_npo.report.model_card import model_card
from lowmem_npo.report.run_leaks import Tested, measured_with_other


def test_a_later_evaluation_is_included(own_run, tmp_path):
    """LUME rows to forget, TOFU rows to keep, documents; each figure is that of evaluation.json."""
    lume = [{"id": f"{kind}{n}", "input": f"Tell {n}.", "output": f"Tale {n}.", "task": "Task1"}
            for n, kind in enumerate(("asc", "aqa"))]  # fmt: skip
    tofu = [{"question": f"Who {n}?", "answer": f"He {n}.", "perturbed_answer": [f"She {n}."]} for n in range(1)]
    documents = [[{"document": f"{who} {n}"} for n in range(2)] for who in ("member", "stranger of another length")]
    names = ("forget", "retain", "members", "nonmembers")
    files = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in zip(names, (lume, tofu, *documents), strict=True)]
    options = [word for name, file in zip(names, files, strict=True) for word in (f"--{name}", file)]
    common = [*options, "--dtype", "float32", "--device", "cpu"]
    base = yaml.safe_load((own_run / "run.yaml").read_text())["model"]
    assert main(["evaluate", "--model", base, *common, "--output-dir", str(tmp_path / "before")]) == 0
    before = tmp_path / "before" / "evaluation.json"
    assert main(["evaluate", "--adapter", str(own_run), *common, "--before", str(before)]) == 0
    file = own_run / "evaluation" / "evaluation.json"
    content = json.loads(file.read_text())
    content["lm_eval"] = {"mmlu": {"acc": 0.25}}  # as lm-eval leaves it; its data is not here
    content["leaks"] = {"extraction": {"recited": 0.125, "meaning": "It still writes an eighth.", "leaks": True}}
    file.write_text(json.dumps(content))
    settings = own_run / "evaluation" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "other_rows": False}))  # as of the run's own
    write_report(own_run)

    report, text = report_of(own_run), page(own_run).text
    stages = {"before": json.loads(before.read_text()), "after": content}
    values = {(f["group"], f["set"], f["key"]): f["values"] for f in report["figures"]}
    for stage, expected in stages.items():
        assert values["documents", None, "auc"][stage] == expected["membership"]["auc"]
        assert values["TOFU", "retain", "truth_ratio"][stage] == expected["tofu"]["sets"]["retain"]["truth_ratio"]
        assert (
            values["LUME", "forget", "Task1.knowledge-score"][stage]
            == (expected["lume"]["forget-set"]["Task1"]["knowledge-score"])
        )
        assert values["LUME", None, "mia_final_score"][stage] == expected["lume"]["mia_final_score"]
    assert values["lm-eval", "mmlu", "acc"] == {"before": None, "after": 0.25}
    assert values["LUME", None, "aggregate-score"]["after"] is None
    assert report["leaks"]["after"]["extraction"]["recited"] == 0.125
    assert "leak tests still find traces" in report["verdict"]["headline"]
    for words in (
        "It still writes an eighth.",
        "SemEval-2025 Task 4",
        "TOFU",
        "Documents, membership inference",
        "traces found",
    ):
        assert words in text
    assert any("LUME task aggregate" in note for note in report["notes"])
    assert unexplained((own_run / "report.html").read_text(encoding="utf-8")) == set()

    content["leaks"] = {"extraction": {"meaning": "No holdout.", "leaks": None}}
    file.write_text(json.dumps(content))
    (own_run / "leaks.json").write_text(json.dumps({"after": {"extraction": {"meaning": "Still.", "leaks": True}}}))
    write_report(own_run)
    assert report_of(own_run)["leaks"]["after"]["extraction"]["meaning"] == "Still.", "a conclusive result is preferred"

    (own_run / "adapter_model.safetensors").write_bytes(b"the run went on")
    write_report(own_run)
    groups = {figure["group"] for figure in report_of(own_run)["figures"]}
    assert not groups & {"LUME", "TOFU", "documents"}, "of another adapter"


def test_an_evaluation_of_other_rows_says_nothing_of_the_runs(own_run, tmp_path, capsys):
    """Its leak tests do not replace the run's own in the report and in its verdict; nor is an earlier evaluation of yet
    other rows their "before". What it measured of them, and of the retain rows, is there."""
    write_report(own_run)
    alone = report_of(own_run)
    rows = [{"question": f"Who {n}?", "answer": f"He {n}.", "perturbed_answer": [f"She {n}."]} for n in range(3)]
    retain = ("--retain", write_rows(tmp_path / "retain.jsonl", [{"question": "Where?", "answer": "There."}]))
    base = yaml.safe_load((own_run / "run.yaml").read_text())["model"]
    before = tmp_path / "before" / "evaluation.json"
    for source, kept, given in ((("--model", base), rows[:2], ("--output-dir", str(before.parent))),
                                (("--adapter", str(own_run)), rows[1:], ("--before", str(before)))):  # fmt: skip
        forget = ("--forget", write_rows(tmp_path / "forget.jsonl", kept))
        common = (*retain, "--leaks", "extraction", "--dtype", "float32", "--device", "cpu")
        assert main(["evaluate", *source, *forget, *common, *given]) == 0
    assert alone["verdict"]["headline"] not in capsys.readouterr().out  # it is not about these rows
    write_report(own_run)
    report = report_of(own_run)
    assert (report["leaks"], report["verdict"]) == (alone["leaks"], alone["verdict"])
    of = {(f["group"], f["set"], f["key"]): f["values"] for f in report["figures"]}
    assert of["TOFU", "forget", "probability"]["before"] is None is not of["TOFU", "forget", "probability"]["after"]
    (nll,) = [of[key] for key in of if key[1:] == ("retain", "nll") and key[0] != "answers"]
    assert None not in nll.values()
    assert [note for note in report["notes"] if "other" in note] == [
        "The earlier evaluation had other forget rows: the two are not comparable.",
        "The forget rows are others than those of the adapter's run, whose report leaves these leak tests out.",
    ]


def test_an_evaluation_of_the_runs_rows_is_part_of_its_report(own_run, tmp_path, capsys):
    """Whatever file they are in, and whatever columns stand beside them."""
    forget = write_rows(tmp_path / "forget.jsonl", [{**row, "topic": "people"} for row in FORGET])
    evaluate = ["evaluate", "--adapter", str(own_run), "--forget", forget, "--dtype", "float32", "--device", "cpu"]
    assert main([*evaluate, "--leaks", "extraction", "--limit", "2"]) == 0
    write_report(own_run)
    report = report_of(own_run)
    assert (
        report["leaks"]["after"]["extraction"]["rows"] == 2 and report["verdict"]["headline"] in capsys.readouterr().out
    )


@pytest.mark.parametrize("place", ["evaluation", "evaluation-2"])
def test_evaluate_counts_the_attacks_that_the_report_counts(own_run, place, capsys):
    """Those of the run's own leak tests among them; the report has the leak tests of every evaluation of the run."""
    found = {
        "extraction": {"extraction_strength": 0.9, "holdout_extraction_strength": 0.1, "meaning": "", "leaks": True}
    }
    (own_run / "leaks.json").write_text(json.dumps({"after": found}))
    common = ["--leaks", "sampling", "--leak-samples", "2", "--dtype", "float32", "--device", "cpu"]
    common += ["--output-dir", str(own_run / place)]
    assert main(["evaluate", "--adapter", str(own_run), *common]) == 0
    write_report(own_run)
    (worst,) = [
        line for line in report_of(own_run)["verdict"]["sentences"] if line.startswith("The worst of 2 attacks")
    ]
    assert f"\n{worst}\n{report_of(own_run)['verdict']['headline']}\n" in capsys.readouterr().out


def test_an_evaluation_on_another_base_is_none_of_the_runs(own_run, tmp_path, capsys):
    """The same weights in another place are the run's base."""
    write_report(own_run)
    alone, base = report_of(own_run), tmp_path / "base"
    shutil.copytree(yaml.safe_load((own_run / "run.yaml").read_text())["model"], base)
    weights = load_file(base / "model.safetensors")
    settings = own_run / "evaluation" / "settings.json"
    for other in (False, True):
        if other:
            shutil.rmtree(settings.parent)
            changed = {name: weight * 1.5 for name, weight in weights.items()}
            save_file(changed, base / "model.safetensors", {"format": "pt"})
        common = ["--leaks", "sampling", "--leak-samples", "2", "--dtype", "float32", "--device", "cpu"]
        assert main(["evaluate", "--adapter", str(own_run), "--model", str(base), "--any-base", *common]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        write_report(own_run)
        report = report_of(own_run)
        assert ("sampling" in report["leaks"]["after"]) == (not other)
        assert any("on another base model than the run's" in note for note in report["notes"]) == other
        assert (report["verdict"] == alone["verdict"]) == other
        assert (said == report["verdict"]["headline"]) == (not other)
    assert "The base is another model" in json.loads((settings.parent / "evaluation.json").read_text())["notes"][0]


def write_evaluation(run, number, leaks, **settings):
    folder = run / ("evaluation" if number == 1 else f"evaluation-{number}")
    folder.mkdir()
    digests = {"the adapter": file_sha256(run / "adapter_model.safetensors")}
    (folder / "settings.json").write_text(json.dumps({"digests": digests, "leaks": ["relearning"], **settings}))
    result = {"relearning": {"rows": 5, "meaning": f"Of {folder.name}.", "leaks": leaks}}
    (folder / "evaluation.json").write_text(json.dumps({"leaks": result, "notes": [f"Said in {folder.name}."]}))


def test_the_leak_tests_of_every_evaluation_of_the_run_are_in_its_report(own_run):
    """Where `merge` has the next one written; what is left out is named."""
    write_evaluation(own_run, 1, False, relearn_lr=1e-6)
    write_evaluation(own_run, 2, True, relearn_lr=1e-3)
    write_evaluation(own_run, 3, False, relearn_lr=1e-5)
    write_evaluation(own_run, 4, False, relearn_lr=1e-3, other_rows=True)
    write_evaluation(own_run, 5, False, relearn_lr=1e-3, digests={"the adapter": "another"})
    content = read_content(own_run)
    assert content.leaks["after"]["relearning"].meaning == "Of evaluation-2."
    assert "leak tests still find traces" in content.verdict.headline
    assert "leak tests still find traces" in model_card(content)
    for note in (
        "Said in evaluation.",
        "'evaluation-2': Said in evaluation-2.",
        "relearning: 'evaluation-2' measured it with another --relearn-lr than 'evaluation': its result counts.",
        "relearning: 'evaluation-3' measured it with another --relearn-lr than 'evaluation-2', and did not find the "
        "traces that 'evaluation-2' found, whose result counts.",
        "The leak tests in 'evaluation-4' are of other forget rows than the run's: this report leaves them out.",
        "'evaluation-5' is not known to be of the adapter as it is now: this report leaves it out.",
        "Of 'evaluation-2' and 'evaluation-3' this report has the leak tests alone: all other figures are in the "
        "evaluation.json there.",
    ):
        assert note in content.notes
    assert not any("Said in evaluation-4" in note or "Said in evaluation-5" in note for note in content.notes)
    write_evaluation(own_run, 6, False, relearn_lr=1e-3)
    assert read_content(own_run).leaks["after"]["relearning"].leaks is False


@pytest.mark.parametrize("name", ["evaluation.json", "settings.json"])
def test_a_damaged_file_of_a_later_evaluation_is_named(own_run, name):
    write_evaluation(own_run, 1, False)
    write_evaluation(own_run, 2, True)
    (own_run / "evaluation-2" / name).write_text("{")
    with pytest.raises(UserError, match=f"evaluation-2/{name}' is damaged"):
        read_content(own_run)


def test_what_could_not_be_told_is_not_taken_back_by_another_attack(own_run):
    write_evaluation(own_run, 1, False, relearn_lr=1e-6)
    unknown = {"relearning": {"rows": 5, "meaning": "It may be chance.", "leaks": None}}
    (own_run / "leaks.json").write_text(json.dumps({"after": unknown}))
    content = read_content(own_run)
    assert content.leaks["after"]["relearning"].meaning == "It may be chance."
    assert any("find what the run could not tell from traces, whose result counts." in note for note in content.notes)


def test_another_holdout_takes_nothing_back(byte_model, data, tmp_path, capsys):
    """As another template does not, whatever file it is in, nor does none; the same rows in another file are the
    same."""
    rows = [{"question": f"Who is number {n}?", "answer": f"Somebody called {n}."} for n in range(4)]
    files = {
        "same": write_rows(tmp_path / "same.jsonl", [{**row, "topic": "people"} for row in rows[::-1]]),
        "easier": write_rows(tmp_path / "easier.jsonl", [*rows[1:], {"question": "Who?", "answer": "Me."}]),
        "fewer": write_rows(tmp_path / "fewer.jsonl", rows[1:]),
        "none": None,
    }
    holdout = write_rows(tmp_path / "holdout.jsonl", rows)
    run = train(tmp_path / "run", byte_model, data, "--holdout", holdout, "--max-steps", 1, "--leaks", "extraction")
    found = {"rows": 4, "meaning": "Own.", "leaks": True}
    (run / "leaks.json").write_text(json.dumps({"before": {"extraction": found}, "after": {"extraction": found}}))
    sets = {"forget": str(data / "forget.jsonl"), "holdout": files["easier"]}
    common = ["--leaks", "extraction", "--dtype", "float32", "--device", "cpu"]
    named = [word for name, file in sets.items() for word in (f"--{name}", file)]
    assert main(["evaluate", "--adapter", str(run), *named, *common]) == 0
    evaluation = run / "evaluation"
    settings, content = (json.loads((evaluation / f"{of}.json").read_text()) for of in ("settings", "evaluation"))
    content["leaks"]["extraction"] |= {"rows": 4, "meaning": "Later.", "leaks": False}
    (evaluation / "evaluation.json").write_text(json.dumps(content))
    report = read_content(run)
    assert report.leaks["after"]["extraction"].meaning == "Own." and "before" in report.leaks
    assert any("another --holdout, and did not find the traces that the run found" in note for note in report.notes)
    del settings["other_holdout"]
    (evaluation / "settings.json").write_text(json.dumps(settings))
    assert read_content(run).leaks["after"]["extraction"].meaning == "Later."
    for name, file in files.items():
        given = {**sets, "holdout": file, "leaks": ("extraction",), "dtype": "float32", "device": "cpu"}
        plan = plan_evaluation(EvaluationConfig(adapter=str(run), **given), silent)
        assert plan.directory.beside_options["other_holdout"] == (name != "same"), name


def test_half_of_a_holdout_is_another_one():
    """Than the whole one, not than the same half of which the record of the adapter's run tells."""
    common = {"leaks": ["extraction"], "forget_level": "none"}
    whole = Tested({**common, "digests": {"holdout": "a"}}, {}, "whole")
    recorded = Tested({**common, "digests": {"holdout": "a", THE_JUDGES: "b"}}, {}, "recorded")
    half = Tested({**recorded.settings, "forget_level": "holdout"}, {}, "half")
    other = Tested({**common, "digests": {"holdout": "c"}}, {}, "other")
    assert measured_with_other("extraction", whole, half) == ["--forget-level"]
    assert measured_with_other("extraction", recorded, half) == []
    assert measured_with_other("extraction", other, half) == ["--holdout"]


@pytest.mark.parametrize(
    "own, later, options, counts, noted",
    [
        (True, False, ["--max-length", "1000"], "own", "whose result counts"),
        (True, True, ["--max-length", "1000"], "later", "before that are left out"),
        (False, False, ["--max-length", "1000"], "later", "another --max-length"),
        (True, False, [], "later", None),
    ],
)
def test_a_test_that_was_measured_otherwise_stands_beside_nothing_else_of_the_run(
    own_run, own, later, options, counts, noted
):
    """Neither does it take back what the run found."""
    found = {"extraction": {"rows": 2, "meaning": "Own.", "leaks": own}}
    before = {"extraction": {"rows": 2, "meaning": "All of it.", "leaks": True}}
    (own_run / "leaks.json").write_text(json.dumps({"before": before, "after": found}))
    common = ["--leaks", "extraction", "--dtype", "float32", "--device", "cpu"]
    assert main(["evaluate", "--adapter", str(own_run), *common, *options]) == 0
    file = own_run / "evaluation" / "evaluation.json"
    content = json.loads(file.read_text())
    content["leaks"]["extraction"] |= {"rows": 2, "meaning": "Later.", "leaks": later}
    file.write_text(json.dumps(content))
    write_report(own_run)
    report = report_of(own_run)
    assert report["leaks"]["after"]["extraction"]["meaning"] == ("Own." if counts == "own" else "Later.")
    assert ("before" in report["leaks"]) is (counts == "own" or noted is None)
    assert (
        any(noted in note for note in report["notes"])
        if noted
        else not any("measured it with" in note for note in report["notes"])
    )
