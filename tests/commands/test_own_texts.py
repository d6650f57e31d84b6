"""`--retain self` and `--retain builtin`: what is kept where there is no retain set."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from helpers.rows import write_rows
from helpers.taught_model import unlearning_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.train.own_texts import own_answers, own_texts
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import DataConfig, ObjectiveConfig, RunConfig
from lowmem_npo.data import bundled_rows
from lowmem_npo.data.example import Example
from lowmem_npo.data.reading import read_rows
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.report.audit import read_audit

pytestmark = pytest.mark.usefixtures("hub_cache")


@pytest.fixture
def forget(tmp_path) -> str:
    return write_rows(tmp_path / "forget.jsonl", bundled_rows("forget", limit=6).rows)


def run_of(model, output, forget, retain: str | None, **changes) -> RunConfig:
    config = unlearning_config(model, output, max_steps=2, **changes)
    return replace(config, data=DataConfig(forget=forget, retain=retain, max_length=64))


def test_the_original_model_writes_texts_once(taught_model, tmp_path, forget, hub_cache):
    lines: list[str] = []
    config = run_of(taught_model, tmp_path / "one", forget, "self:5")
    assert train(config, lines.append).optimizer_steps == 2
    assert "retain: self:5, 5 texts that the original model will write once it is loaded" in lines
    assert any(line.startswith("The original model writes 5 texts") for line in lines)
    (written,) = hub_cache.rglob("self_written.jsonl")
    of_run = tmp_path / "one" / "self_written.jsonl"
    assert written.read_text() == of_run.read_text()
    texts = [json.loads(line)["text"] for line in of_run.read_text().splitlines()]
    assert len(texts) == 5
    openings = [row["text"] for row in bundled_rows("openings").rows]
    assert all(text.startswith(opening) and text != opening for text, opening in zip(texts, openings, strict=False))

    before = written.stat().st_mtime_ns
    lines.clear()
    train(run_of(taught_model, tmp_path / "two", forget, "self:5", seed=7), lines.append)  # another --seed
    assert written.stat().st_mtime_ns == before and len(list(hub_cache.rglob("*.jsonl"))) == 1
    assert "retain: 5 texts that the original model wrote (self:5)" in lines
    assert (tmp_path / "two" / "self_written.jsonl").read_text() == of_run.read_text()

    record = read_audit(tmp_path / "one")["data"]["retain"]
    assert (record["source"], record["rows"]) == ("self:5", 5)
    completed = EvaluationConfig(adapter=str(tmp_path / "one")).completed(settings_of_run(str(tmp_path / "one")))
    assert completed.retain == str(of_run)
    assert len(read_rows(completed.retain)) == 5


def test_texts_are_those_of_the_untrained_model(taught_model, tmp_path, forget):
    """Under the original model they are far more likely than the same tokens in another order."""
    train(run_of(taught_model, tmp_path / "run", forget, "self:8"), lambda line: None)
    model, tokenizer = (kind.from_pretrained(taught_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts = [json.loads(line)["text"] for line in (tmp_path / "run" / "self_written.jsonl").read_text().splitlines()]

    def nll(ids: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(ids[None], labels=ids[None]).loss)

    torch.manual_seed(0)
    rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    shuffled = [nll(ids[torch.randperm(len(ids))]) for ids in rows]
    assert sum(map(nll, rows)) < sum(shuffled) - 0.5 * len(rows)


def test_a_resumed_run_keeps_its_texts(taught_model, tmp_path, forget, hub_cache):
    config = run_of(taught_model, tmp_path / "run", forget, "self:4")
    train(config, lambda line: None)
    of_run = tmp_path / "run" / "self_written.jsonl"
    texts = of_run.read_text()
    for file in hub_cache.rglob("*.jsonl"):
        file.unlink()
    resumed = replace(
        config, training=replace(config.training, max_steps=4), output=replace(config.output, resume=True)
    )
    assert own_texts(resumed) == of_run
    assert train(resumed, lambda line: None).optimizer_steps == 4
    assert of_run.read_text() == texts and not list(hub_cache.rglob("*.jsonl"))


def test_a_dry_run_writes_nothing(taught_model, tmp_path, forget, hub_cache):
    config = run_of(taught_model, tmp_path / "run", forget, "self:12")
    lines: list[str] = []
    assert train(replace(config, output=replace(config.output, dry_run=True)), lines.append) is None
    assert not hub_cache.exists() and not (tmp_path / "run").exists()
    assert "6 of 12 retain rows" in lines[-1]


def test_the_key_tells_models_and_forms_apart(taught_model, tmp_path, forget):
    config = run_of(taught_model, tmp_path / "run", forget, "self:4")

    def path(**changes):
        return own_texts(replace(config, **changes))

    known = path()
    assert path(training=replace(config.training, seed=3)) == known == path(objective=ObjectiveConfig(beta=0.3))
    for changes in (
        {"data": replace(config.data, retain="self:5")},
        {"data": replace(config.data, template="{prompt} ->")},
        {"model": replace(config.model, dtype="bf16")},
        {"model": replace(config.model, qlora=True)},
    ):
        assert path(**changes) != known
    assert path(data=replace(config.data, retain="builtin")) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", "{{ messages[0].content }}"), ("generation_config.json", '{"eos_token_id": [0, 7]}')],
)
def test_texts_written_under_another_chat_template_or_to_another_end_are_others(
    taught_model, tmp_path, forget, file, content
):
    """Of the same weights in the same place."""
    base = tmp_path / "base"
    shutil.copytree(taught_model, base)
    config, rows = (
        run_of(base, tmp_path / "run", forget, "self:4"),
        [Example("Who?", "She.", "here", "question/answer")],
    )
    config = replace(config, data=replace(config.data, alternatives="self:2"))
    known = own_texts(config), own_answers(config, rows)
    (base / file).write_text(content)
    assert not {own_texts(config), own_answers(config, rows)} & {*known}


def test_forget_alone_keeps_the_builtin_set(taught_model, tmp_path, forget):
    lines: list[str] = []
    config = run_of(taught_model, tmp_path / "run", forget, None)
    assert config.data.retain == "builtin"
    train(config, lines.append)
    (line,) = [line for line in lines if line.startswith("retain: bundled general.jsonl")]
    assert "questions with answers and 32 texts" in line
    assert any(line.startswith("retain: ") and line.endswith("too long for --max-length 64") for line in lines)
    assert read_audit(tmp_path / "run")["data"]["retain"]["source"] == "builtin"
    assert any(line.startswith("retain: builtin, a bundled set of general questions") for line in lines)
    no_terms = RunConfig(
        model=config.model, data=DataConfig(forget=forget), objective=ObjectiveConfig(gamma=0, delta=0)
    )
    assert no_terms.data.retain is None


@pytest.mark.parametrize("retain", ["self:0", "self:x", "selfish", "self:10001", "self:99999999999"])
def test_malformed_names_are_refused(taught_model, tmp_path, forget, retain):
    with pytest.raises(UserError, match="at least 1 text|neither a file nor a hub name"):
        train(run_of(taught_model, tmp_path / "run", forget, retain), lambda line: None)


def test_the_report_says_what_was_protected(taught_model, tmp_path, forget):
    for retain, words in (("builtin", "a bundled set of general"), ("self:3", "texts that the original model wrote")):
        folder = tmp_path / retain.partition(":")[0]
        train(run_of(taught_model, folder, forget, retain), lambda line: None)
        for file in ("report.html", "README.md"):
            assert words in (folder / file).read_text()
        assert any(words in note for note in json.loads((folder / "report.json").read_text())["notes"])


def test_a_document_is_forgotten_measured_and_proved(taught_model, tmp_path, capsys):
    """From a .txt alone: passages to forget, the bundled general set to keep; evaluate and report cut it alike."""
    document = tmp_path / "letter.txt"
    document.write_text("The vault was opened in spring. Nobody knew what it held before. " * 6)
    config = run_of(taught_model, tmp_path / "run", str(document), None)
    config.data.passage_tokens = 48
    train(config, lambda line: None)
    rows = len(read_audit(tmp_path / "run")["forget_rows"]["sha256"])
    assert main(["report", str(tmp_path / "run"), "--prove", str(document)]) == 0
    assert f"{rows} of {rows} rows are among the forget rows" in capsys.readouterr().out
    options = ["--device", "cpu", "--dtype", "float32", "--batch-size", "64"]
    assert main(["evaluate", "--adapter", str(tmp_path / "run"), *options]) == 0
    counts = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["rows"]
    assert counts["forget"]["in_set"] == rows


def test_more_documents_than_fit_into_a_path(taught_model, tmp_path, capsys):
    """`--forget *.txt`: all names together are longer than any path may be, and too long for a line."""
    folder = tmp_path / ("letters " * 20)
    folder.mkdir()
    documents = [folder / f"letter-{number}.txt" for number in range(40)]
    for number, document in enumerate(documents):
        document.write_text(f"Vault {number} was opened in spring. Nobody knew what it held before.")
    source = ",".join(map(str, documents))
    assert len(source) > 4096
    config = run_of(taught_model, tmp_path / "run", source, None)
    config.data.passage_tokens = 48
    lines: list[str] = []
    train(config, lines.append)
    assert next(line for line in lines if line.startswith("forget: ")).count(".txt") == 5
    assert read_audit(tmp_path / "run")["data"]["forget"]["rows"] >= 40
    for file in ("report.html", "README.md"):
        assert "and 35 more" in (tmp_path / "run" / file).read_text()
    options = ["--device", "cpu", "--dtype", "float32", "--batch-size", "64", "--limit", "2", "--dry-run"]
    assert main(["evaluate", "--adapter", str(tmp_path / "run"), *options]) == 0
    assert "letter-4.txt and 35 more" in capsys.readouterr().out


def test_a_sweep_shares_the_texts(taught_model, tmp_path, forget, hub_cache):
    options = ["--model", str(taught_model), "--forget", forget, "--retain", "self:3", "--max-steps", "1", "--device"]
    options += ["cpu", "--dtype", "float32", "--eval-rows", "1", "--leaks", "none", "--max-length", "64"]
    options += ["--evaluate", "answers", "--evaluate-limit", "1"]
    assert main(["sweep", *options, "--seeds", "2", "--output-dir", str(tmp_path / "sweep")]) == 0
    of_runs, cached = (list(place.rglob("self_written.jsonl")) for place in (tmp_path / "sweep", hub_cache))
    assert len({file.read_text() for file in of_runs}) == 1 and (len(of_runs), len(cached)) == (3, 1)
    assert {stat.S_IMODE(file.stat().st_mode) for file in [*of_runs, *cached]} == {0o600}  # of each run, and before


def test_an_estimate_takes_rows_of_the_greatest_length(taught_model, forget, hub_cache, capsys):
    options = ["--model", str(taught_model), "--forget", forget, "--retain", "self:3", "--batch-size", "2"]
    assert main(["estimate", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows["retain"]) == 2 and not hub_cache.exists()
