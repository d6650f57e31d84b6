"""The report of a real run: correct figures, no text of a row that was not requested, and a page that loads nothing."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from xml.etree import ElementTree

import pytest
import torch
import yaml
from helpers.report_pages import Page, page, report_of
from helpers.reported_run import FORGET, RETAIN, TELLTALES, train
from safetensors.torch import load_file, save_file

from lowmem_npo.cli import main
from lowmem_npo.evaluation.answer_table import MEASURES
from lowmem_npo.model.saved_adapter import revision_of_adapter
from lowmem_npo.report.content import Content, read_content
from lowmem_npo.report.files import write_report


@pytest.fixture(autouse=True)
def empty_pictures():
    """Here they are drawn."""


def leaked(text: str) -> list[str]:
    """The telltales of rows that are in `text`, also as JSON spells them."""
    spelt = {tale: {tale, json.dumps(tale)[1:-1]} for tale in TELLTALES}
    return [tale for tale, ways in spelt.items() if any(way in text for way in ways)]


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_every_figure_is_that_of_the_table(run):
    table = json.loads((run / "before_after.json").read_text())
    figures = {(f["set"], f["key"]): f["values"] for f in report_of(run)["figures"] if f["group"] == "answers"}
    assert figures == {
        (part, measure.field): {stage: table[stage][part][measure.field] for stage in ("before", "after")}
        for part in ("forget", "retain")
        for measure in MEASURES
    }
    text = page(run).text
    for values in figures.values():
        for value in values.values():
            assert (f"{value:.3f}" if value == 0 or value >= 0.001 else f"{value:.1e}") in text
    assert all(len(f["meaning"]) > 20 and f["wished"] for f in report_of(run)["figures"])
    assert report_of(run)["rows"]["after"]["forget"] == {
        "rows": 5, "rows_in_set": 5, "answer_tokens": table["after"]["forget"]["tokens"]
    }  # fmt: skip


def test_a_wrong_number_would_be_noticed(own_run):
    """The test above, on a run whose table was changed after the report was written."""
    table = json.loads((own_run / "before_after.json").read_text())
    table["after"]["forget"]["nll"] += 0.01
    (own_run / "before_after.json").write_text(json.dumps(table))
    with pytest.raises(AssertionError):
        test_every_figure_is_that_of_the_table(own_run)


def test_training_and_audit_are_those_of_the_run(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = report_of(run)
    assert report["training"] == {"logged_steps": len(lines), "first": lines[0], "last": lines[-1]}
    assert report["audit"] == json.loads((run / "audit.json").read_text())
    text = page(run).text
    for value in (report["audit"]["adapter"]["sha256"], report["audit"]["forget_rows"]["salt"]):
        assert value in text and value in (run / "report.html").read_text()


def test_it_calls_itself_evidence_and_states_its_limits(run):
    report, text = report_of(run), page(run).text
    assert report["what_this_is"].startswith("This is evidence: ") and "not a certificate" in report["what_this_is"]
    for words in (
        "not a certificate",
        "original weights are as they were",
        "what can still be extracted is not known",
        "run.yaml",
    ):
        assert words in text
    assert report["verdict"]["headline"] in text and text.count("certificate") == text.count("not a certificate")


# -- the text of the rows ---------------------------------------------------------------------------------------------


def test_no_text_of_a_row_that_was_not_requested(run, own_run):
    assert leaked((run / "before.json").read_text(encoding="utf-8")), "the search works"
    for name in ("report.json", "audit.json", "README.md"):
        assert leaked((run / name).read_text(encoding="utf-8")) == [], name
    write_report(own_run, examples=0)
    html = (own_run / "report.html").read_text(encoding="utf-8")
    assert leaked(html) == [] and leaked(page(own_run).text) == []
    answers = [r["answer"] for e in json.loads((run / "after.json").read_text()).values() for r in e["records"]]
    assert not any(answer in html for answer in answers if len(answer) > 8), "nor any answer of the model"


def test_a_planted_leak_is_noticed(own_run, monkeypatch):
    """The same search, on a report.json that contains an example."""
    to_json = Content.to_json
    monkeypatch.setattr(
        Content, "to_json", lambda self: {**to_json(self), "prompts": [one.prompt for one in self.examples(5)]}
    )
    write_report(own_run)
    assert leaked((own_run / "report.json").read_text(encoding="utf-8"))


def test_texts_in_the_results_of_a_leak_test_are_refused(own_run, capsys):
    text = FORGET[0]["answer"]
    sampling = {"whole": 0.5, "nested": {"answer": text}, "meaning": "Half came.", "leaks": True}
    (own_run / "leaks.json").write_text(json.dumps({"after": {"sampling": sampling}}))
    assert main(["report", str(own_run)]) == 2
    assert "sampling: answer must be a number" in capsys.readouterr().err


def test_settings_of_other_types_are_named(own_run, capsys):
    settings = (own_run / "run.yaml").read_text()
    (own_run / "run.yaml").write_text(re.sub("report_examples: .*", "report_examples: three", settings))
    assert main(["report", str(own_run)]) == 2
    assert "run.yaml': report_examples must be a whole number, not 'three'" in capsys.readouterr().err


def test_figures_that_no_test_declares_are_not_reported(own_run, capsys):
    results = {"after": {"sampling": {"surprise": 0.5, "meaning": "Half of an answer came.", "leaks": True}}}
    (own_run / "leaks.json").write_text(json.dumps(results))
    assert main(["report", str(own_run)]) == 2
    said = capsys.readouterr().err
    assert "leaks.json' is damaged" in said and "'surprise' is no figure of the leak test 'sampling'" in said


def test_examples_show_prompt_truth_before_and_after(run):
    text = page(run).text
    records = {stage: json.loads((run / f"{stage}.json").read_text()) for stage in ("before", "after")}
    for part, rows in (("forget", FORGET), ("retain", RETAIN)):
        for row in rows[:1]:
            assert row["question"] in text and row["answer"] in text
        for stage in records:
            answer = records[stage][part]["records"][0]["answer"]
            printable = "".join(c for c in answer if c.isprintable())
            assert printable[:10] in text or printable != answer
    assert "These are texts of the data itself" in text and "--examples 0" in text


def test_the_worst_rows_come_first(own_run):
    """Examples speak against success: a report must not show only its best rows."""
    content = json.loads((own_run / "after.json").read_text())
    for record in content["forget"]["records"]:
        record["rouge_l_recall"] = record["row"] / 10
    (own_run / "after.json").write_text(json.dumps(content))
    examples = read_content(own_run).examples(2)
    assert [e.figures["after"].row for e in examples if e.set == "forget"] == [4, 3]
    assert len([e for e in examples if e.set == "retain"]) == 2


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(run):
    text, parsed = (run / "report.html").read_text(encoding="utf-8"), page(run)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{name}={value}"
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith("#"), f"{name}={value}"
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert re.findall(r"url\((?!#)", text) == []
    policy = next(m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_the_parser_notices_what_the_test_above_looks_for():
    for broken in ("<p><b>x</p></b>", "<div>", "<table><tr></table>"):
        with pytest.raises(AssertionError):
            Page(broken)


def test_rows_are_shown_as_text_whatever_they_contain(run):
    parsed, text = page(run), (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert('pwned')</script>" in parsed.text  # as text
    assert "<script" not in text and "evil.example" in parsed.text
    assert not any(attributes.get("src") for _, attributes in parsed.elements)
    assert "\x00" not in text and "\x07" not in text and "\x1b" not in text and "\N{REPLACEMENT CHARACTER}" in text
    assert "鐘が鳴る" in parsed.text and "more characters)" in parsed.text
    texts = [
        attributes for tag, attributes in parsed.elements if tag in ("dd", "p") and attributes.get("dir") == "auto"
    ]
    assert len(texts) == len(parsed.all("bdi")) == (5 + 2) * 4  # prompt, truth, before and after of every row


def test_pictures_and_tables_have_words_for_a_screen_reader(run):
    text, parsed = (run / "report.html").read_text(encoding="utf-8"), page(run)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 7 and parsed.all("html")[0]["lang"] == "en"
    table = json.loads((run / "before_after.json").read_text())
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)  # well-formed XML too
        labels = {child.get("id"): child.text for child in root if child.tag.endswith(("title", "desc"))}
        assert root.get("role") == "img" and root.get("aria-labelledby").split() == list(labels)
        assert all(len(label) > 5 for label in labels.values())
        assert sum(element.tag.endswith("path") for element in root.iter()) > 5, "it is drawn"
        assert not {element.tag.rpartition("}")[2] for element in root.iter()} & {"metadata", "script", "image", "a"}
    assert f"after {table['after']['forget']['nll']:.3f}" in drawings[0]
    headers = parsed.all("th")
    assert headers and all(header.get("scope") in ("col", "row", "rowgroup") for header in headers)
    assert {m["name"] for m in parsed.all("meta") if "name" in m} >= {"viewport"}


def test_the_same_run_gives_the_same_page(own_run):
    write_report(own_run)
    once = (own_run / "report.html").read_bytes()
    write_report(own_run)
    assert (own_run / "report.html").read_bytes() == once


# -- runs of other kinds ----------------------------------------------------------------------------------------------


def test_a_run_that_measured_nothing(byte_model, data, tmp_path):
    folder = train(tmp_path / "out", byte_model, data, "--max-steps", 1, "--eval-rows", 0)
    report, parsed = report_of(folder), page(folder)
    assert report["verdict"]["tone"] == "unknown" and report["figures"] == [] and report["rows"] == {}
    assert "was not measured" in parsed.text and "--eval-rows 0" in parsed.text and "--resume" not in parsed.text
    assert report["audit"]["adapter"]["sha256"] in parsed.text
    assert "Nothing was measured" in (folder / "README.md").read_text() and leaked(parsed.text) == []


def test_a_run_without_retain_rows(byte_model, data, tmp_path):
    arguments = ["--model", byte_model, "--forget", data / "forget.jsonl", "--gamma", 0, "--delta", 0, "--max-steps", 1,
                 "--dtype", "float32", "--device", "cpu", "--eval-rows", 2, "--report-examples", 0]  # fmt: skip
    assert main(["train", *map(str, arguments), "--output-dir", str(tmp_path / "out")]) == 0
    report = report_of(tmp_path / "out")
    assert {figure["set"] for figure in report["figures"]} == {"forget", "general"}
    assert "2 measured of 5" in report["verdict"]["sentences"][0]
    assert "general questions" in report["verdict"]["headline"] and leaked(page(tmp_path / "out").text) == []


def test_a_run_that_was_killed(own_run):
    for name in ("after.json", "adapter_model.safetensors", "report.json", "report.html"):
        (own_run / name).unlink()
    audit = json.loads((own_run / "audit.json").read_text())
    audit["sessions"][0]["ended"], audit["adapter"], audit["optimizer_steps"] = None, None, None
    (own_run / "audit.json").write_text(json.dumps(audit))
    write_report(own_run)
    assert "has not reached its end" in page(own_run).text and report_of(own_run)["verdict"]["tone"] == "unknown"
    for measures in (64, 0):
        settings = yaml.safe_load((own_run / "run.yaml").read_text()) | {"eval_rows": measures}
        (own_run / "run.yaml").write_text(yaml.safe_dump(settings))
        advice, *_ = read_content(own_run).verdict.sentences
        assert f"`lowmem-npo train --resume --output-dir {own_run}` finishes it" in advice
        assert "--eval-rows" not in advice and "--eval-rows" not in (own_run / "README.md").read_text()


def test_a_report_on_an_unfinished_run_does_not_finish_it(own_run, capsys):
    again = ["train", "--config", str(own_run / "run.yaml"), "--output-dir", str(own_run)]
    assert main(again) == 2 and "holds a finished run: choose another" in capsys.readouterr().err
    audit, settings = (own_run / "audit.json").read_text(), yaml.safe_load((own_run / "run.yaml").read_text())
    (own_run / "audit.json").write_text(json.dumps(json.loads(audit) | {"adapter": None}))  # killed as it measured
    assert main(["report", str(own_run)]) == 0 and (own_run / "report.json").exists()
    assert main(again) == 2 and "holds an unfinished run: choose another directory, continue" in capsys.readouterr().err
    (own_run / "audit.json").write_text(audit)  # or as it was begun again, to be longer
    (own_run / "run.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 100}))
    assert main(["report", str(own_run)]) == 0
    assert main(again) == 2 and "holds an unfinished run: choose another directory, continue" in capsys.readouterr().err


def test_a_run_that_was_killed_as_it_measured(own_run):
    (own_run / "after.json").unlink()
    assert "--resume" in read_content(own_run).verdict.sentences[0]


def test_an_unfinished_run_says_where_its_adapter_is(own_run, tmp_path, capsys):
    (own_run / "adapter_model.safetensors").unlink()
    newest = own_run / "checkpoint-3"
    merging = ["merge", "--output-dir", str(tmp_path / "merged"), "--adapter"]
    for command in (["evaluate", "--limit", "1", "--output-dir", str(tmp_path / "e"), "--adapter"], merging):
        assert main([*command, str(own_run)]) == 2
        error = capsys.readouterr().err
        assert "holds an unfinished run and no adapter yet" in error and f"'{newest}', holds one" in error
        assert f"`lowmem-npo train --resume --output-dir {own_run}` finishes it" in error
        assert main([*command, str(newest)]) == 0
    assert main(["ask", str(own_run), "Who?"]) == 2 and "an unfinished run" in capsys.readouterr().err
    assert main(["ask", str(newest), "Who?", "--max-new-tokens", "1"]) == 0
    (newest / "adapter_model.safetensors").unlink()
    assert main(["ask", str(own_run), "Who?"]) == 2 and "checkpoint" not in capsys.readouterr().err


def test_figures_that_are_not_finite(own_run):
    """NaN is no JSON, and no good verdict."""
    content = json.loads((own_run / "after.json").read_text())
    content["forget"]["summary"]["nll"] = float("nan")
    (own_run / "after.json").write_text(json.dumps(content))
    write_report(own_run)
    report = json.loads((own_run / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["verdict"]["tone"] == "bad" and "finite" in report["verdict"]["headline"]
    values = {f["key"]: f["values"] for f in report_of(own_run)["figures"] if f["set"] == "forget"}
    assert values["nll"]["after"] is None and values["nll"]["before"] > 0
    page(own_run)


def test_a_directory_without_a_run(tmp_path, own_run, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run.yaml" in capsys.readouterr().err
    assert main(["report", "--adapter", str(own_run)]) == 0  # as other commands name a run
    assert main(["report", str(own_run), "--examples", "-1"]) == 2
    (own_run / "after.json").write_text("{")
    assert main(["report", str(own_run)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_names_from_outside_are_shown_as_text(own_run):
    """Settings come from files that others may have written."""
    settings = yaml.safe_load((own_run / "run.yaml").read_text())
    settings |= {"forget": "</pre><script>alert(1)</script>|`x`", "lora_targets": ["a|b`c"]}
    (own_run / "run.yaml").write_text(yaml.safe_dump(settings))
    elsewhere = shutil.copytree(own_run, own_run.parent / "<i>&")
    write_report(elsewhere)
    assert page(elsewhere).all("script") == [] and "<i>&/run.yaml" in page(elsewhere).text
    assert len(page(elsewhere).all("i")) == len(page(own_run).all("i"))
    assert "`a/b'c`" in (elsewhere / "README.md").read_text()


# -- another adapter, and a diverged one -------------------------------------------------------------------------------


def test_another_adapter_in_the_place_of_the_runs_is_reported(own_run):
    note = "adapter_model.safetensors is not the file that the run in its directory wrote"
    write_report(own_run)
    assert note not in (own_run / "report.html").read_text(encoding="utf-8")
    file = own_run / "adapter_model.safetensors"
    weights = {name: torch.full_like(weight, torch.nan) for name, weight in load_file(file).items()}
    save_file(weights, file)
    write_report(own_run)
    assert note in (own_run / "report.html").read_text(encoding="utf-8")
    assert any(note in one for one in report_of(own_run)["notes"])


def test_commands_that_use_such_an_adapter_say_so(own_run, capsys):
    """What `evaluate` measures then is of it: its headline is not that of the run."""
    note, adapter = "is not the file that the run in its directory wrote", ["--device", "cpu", "--max-new-tokens", "1"]
    ask = ["ask", str(own_run), "Who?", *adapter]
    evaluate = ["evaluate", "--adapter", str(own_run), "--limit", "1", "--leaks", "none", *adapter]
    assert main(ask) == 0 and note not in capsys.readouterr().out
    headline = report_of(own_run)["verdict"]["headline"]
    assert main(evaluate) == 0 and headline in capsys.readouterr().out
    file = own_run / "adapter_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file)
    assert main(ask) == 0 and capsys.readouterr().out.count(note) == 1
    shutil.rmtree(own_run / "evaluation")
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert headline not in printed and printed.count(note) == 1


def test_a_diverged_run_is_reported_too(byte_model, data, tmp_path):
    huge = ("--lr", 1e6, "--lora-alpha", 1e6, "--use-rslora", "--lora-targets", "all-linear")
    run = train(tmp_path / "run", byte_model, data, "--max-steps", 2, *huge, "--revision", "v1")
    assert report_of(run)["verdict"]["tone"] == "bad"
    assert "no finite likelihood" in report_of(run)["leaks"]["after"]["extraction"]["meaning"]
    assert json.loads((run / "audit.json").read_text())["adapter"] is not None
    assert revision_of_adapter(str(run)) == json.loads((run / "adapter_config.json").read_text())["revision"] == "v1"


def test_a_refusal_that_is_taught_is_not_called_the_forget_answers(byte_model, data, tmp_path, capsys):
    folder = train(tmp_path / "run", byte_model, data, "--max-steps", 2, "--forget-term", "idk", "--eval-rows", 1)
    shown = capsys.readouterr().err
    assert "refusal NLL" in shown and "forget NLL" not in shown
    html = " ".join((folder / "report.html").read_text().split())
    assert "the refusal should fall" in html and "forget should rise" not in html
    assert "the refusal's NLL from" in unescape(html) and "forget answers' NLL from" not in unescape(html)
