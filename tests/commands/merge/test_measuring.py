"""`lowmem-npo merge` measures what it writes: QLoRA's two bases side by side, and the weights rounded to 4 bits."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
import yaml
from helpers.rows import write_rows
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.merge import run as merging
from lowmem_npo.commands.merge.measuring import RowFigures, RunRows, better, figures_of_run, survival
from lowmem_npo.config import ModelConfig
from lowmem_npo.model import load_model
from lowmem_npo.run_directory import RunFiles

TRAINING = "--device cpu --dtype float32 --limit 8 --batch-size 4 --max-steps 12 --lr 8e-3 --beta 0.06 --lora-r 8"
FORGET = "forget.jsonl"


@pytest.fixture(scope="module")
def runs(taught_model, tmp_path_factory):
    """A folder with a run on the 4-bit base, `qlora`, and one on the whole base, `lora`."""
    from lowmem_npo.data import bundled_rows

    folder = tmp_path_factory.mktemp("runs")
    for part in ("forget", "retain"):
        rows = bundled_rows(part, limit=8).rows
        write_rows(folder / f"{part}.jsonl", rows)
    data = ["--forget", str(folder / FORGET), "--retain", str(folder / "retain.jsonl")]
    for name, more in {"qlora": ["--qlora"], "lora": []}.items():
        options = [*TRAINING.split(), *data, *more, "--lora-targets", "all-linear", "--eval-rows", "6"]
        assert main(["train", "--model", str(taught_model), *options, "--output-dir", str(folder / name)]) == 0
    return folder


def merge(folder, out, *more):
    return main(["merge", "--adapter", str(folder), "--output-dir", str(out), "--device", "cpu", *more])


def figures(printed):
    """What each line of the table says: name -> its numbers."""
    lines = re.findall(r"^(merged into .*?|before .*?|after.*?)((?:  +[\d.–]+){3})$", printed, re.MULTILINE)
    return {name.strip(): [float(value) for value in values.split()] for name, values in lines}


def nll_by_hand(folder, rows_file, run, part, **loading):
    """NLL per answer token of the rows that the run measured, in transformers' own forward pass."""
    model = load_model(ModelConfig(str(folder), dtype="float32", device="cpu", **loading), lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = json.loads((run / "before.json").read_text())[part]["records"]
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    total, tokens = 0.0, 0
    for record in records:
        row = rows[record["row"]]
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        ids = torch.tensor([[*prompt, *tokenizer(f" {row['answer']}").input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        own = logprobs[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, tokens = total - own.sum().item(), tokens + len(own)
    return total / tokens


def test_both_bases_are_measured_and_the_better_one_is_written(runs, tmp_path, capsys):
    assert merge(runs / "qlora", tmp_path / "out", "--quantize-check") == 0
    printed = capsys.readouterr().out
    measured = figures(printed)
    after = json.loads((runs / "qlora" / "after.json").read_text())
    whole, dequantized = (measured[f"merged into {base} weights"] for base in ("whole", "dequantised"))
    # The adapter was fitted to the dequantised weights: there it is what the run measured, but for bf16.
    assert math.isclose(dequantized[0], after["forget"]["summary"]["nll"], rel_tol=0.02)
    assert math.isclose(dequantized[2], after["retain"]["summary"]["nll"], rel_tol=0.02)
    assert not math.isclose(whole[0], dequantized[0], rel_tol=0.05)
    assert printed.startswith("The adapter was trained on the 4-bit base: it is merged into the whole and into the")
    assert measured["after, by the run"][0] == pytest.approx(after["forget"]["summary"]["nll"], abs=1e-3)
    kept = re.search(r"Advised: .*\(--base-weights (\w+)\).* That is what was written\.", printed)[1]
    for base in ("whole", "dequantized"):
        out = tmp_path / base
        assert merge(runs / "qlora", out, "--base-weights", base) == 0
        same = (out / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
        assert same is (base == kept)
        for part, column in (("forget", 0), ("retain", 2)):
            by_hand = nll_by_hand(out, runs / f"{part}.jsonl", runs / "qlora", part)
            line = measured[f"merged into {base.replace('zed', 'sed')} weights"]
            assert math.isclose(line[column], by_hand, rel_tol=2e-3)
    four_bits = nll_by_hand(tmp_path / "out", runs / FORGET, runs / "qlora", "forget", qlora=True)
    (rounded,) = (of for name, of in measured.items() if name.endswith("then 4-bit"))
    assert math.isclose(rounded[0], four_bits, rel_tol=2e-3)
    card = ModelCard.load(tmp_path / "out" / "README.md").content
    assert "## Measured when it was merged" in card and "6 forget rows, 6 retain rows" in card
    sentences = re.findall(r"^(?:Advised|WARNING: forg|Forgetting survives|It cannot).*$", printed, re.MULTILINE)
    assert len(sentences) == 2 and all(f"- {sentence}\n" in card for sentence in sentences)
    assert str(runs) not in card


def test_of_a_plain_adapter_nothing_is_measured_unless_that_is_asked_for(runs, tmp_path, capsys):
    assert merge(runs / "lora", tmp_path / "plain") == 0
    printed = capsys.readouterr().out
    assert not figures(printed) and "Not measured" not in printed and "Advised" not in printed
    assert "Measured when" not in (tmp_path / "plain" / "README.md").read_text()
    assert merge(runs / "lora", tmp_path / "checked", "--quantize-check") == 0
    measured = figures(printed := capsys.readouterr().out)
    assert list(measured) == ["before forgetting, by the run", "after, by the run", "merged into whole weights",
                              "merged into whole weights, then 4-bit"]  # fmt: skip
    assert measured["merged into whole weights"][0] == pytest.approx(measured["after, by the run"][0], rel=0.02)
    assert "Rounded to NF4, the merged model writes" in printed
    assert "Advised" not in printed and "4-bit base" not in printed
    assert "Of weights rounded to 4 bits the answers above were checked, not what" in printed
    assert "Not checked: whether forgotten text returns when the adapter is rounded" not in printed
    assert merge(runs / "lora", tmp_path / "no", "--base-weights", "dequantized") == 2
    assert "was trained on whole weights, not with --qlora" in capsys.readouterr().err


def test_weights_are_measured_as_they_are_written_whatever_the_run_computed_in(runs, tmp_path, capsys):
    """float32 as it is stored: a run in bf16 would round it, unrounded and before NF4."""
    shutil.copytree(runs / "lora", tmp_path / "bf16")
    settings = (runs / "lora" / "run.yaml").read_text()
    (tmp_path / "bf16" / "run.yaml").write_text(settings.replace("\ndtype: float32", "\ndtype: bf16"))
    tables = []
    for run in (runs / "lora", tmp_path / "bf16"):
        assert merge(run, tmp_path / f"{run.name}-merged", "--quantize-check", "--dtype", "stored") == 0
        tables.append(figures(capsys.readouterr().out))
    assert len(tables[0]) == 4 and tables[1] == tables[0]


def test_where_the_rows_are_gone(runs, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "qlora", moved)
    settings = (moved / "run.yaml").read_text()
    (moved / "run.yaml").write_text(settings.replace(str(runs / FORGET), str(tmp_path / "gone.jsonl")))
    assert merge(moved, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "Not measured, so merged into the whole weights, although it was trained on 4-bit ones:" in printed
    assert "gone.jsonl" in printed and not list(tmp_path.glob("*.partial"))
    assert merge(moved, tmp_path / "out2", "--quantize-check") == 2
    assert "--quantize-check measures the rows of the adapter's run: " in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()
    (moved / "run.yaml").unlink()
    assert merge(moved, tmp_path / "out2", "--quantize-check") == 2
    assert "there is no run.yaml" in capsys.readouterr().err


def test_where_the_rows_have_changed(runs, tmp_path, capsys):
    """What the run measured of them stands beside no other ones."""
    moved, rows = tmp_path / "moved", tmp_path / "more.jsonl"
    shutil.copytree(runs / "qlora", moved)
    first = json.dumps({"question": "Who?", "answer": "She."}) + "\n"
    rows.write_text(first + (runs / FORGET).read_text().partition("\n")[2])
    (moved / "run.yaml").write_text((moved / "run.yaml").read_text().replace(str(runs / FORGET), str(rows)))
    assert merge(moved, tmp_path / "out", "--quantize-check") == 2
    assert "the forget rows have changed since the run in" in capsys.readouterr().err


def test_a_holdout_of_which_half_sets_levels(runs, tmp_path, capsys):
    """The other half is what the run was judged by, and is measured here and by `evaluate`, whichever file names it."""
    rows = [{"question": f"Who is number {i}?", "answer": f"A person called {i}."} for i in range(9)]
    write_rows(tmp_path / "holdout.jsonl", rows)
    options = ["--forget", str(runs / FORGET), "--retain", str(runs / "retain.jsonl"), "--holdout"]
    training = ["--lora-targets", "all-linear", "--forget-level", "holdout", "--max-steps", "2", "--eval-rows", "6"]
    base = yaml.safe_load((runs / "lora" / "run.yaml").read_text())["model"]
    given = [*TRAINING.split(), *options, str(tmp_path / "holdout.jsonl"), *training]
    assert main(["train", "--model", base, *given, "--output-dir", str(tmp_path / "run")]) == 0
    assert merge(tmp_path / "run", tmp_path / "out", "--quantize-check") == 0
    write_rows(tmp_path / "other.jsonl", rows[::-1] + [{"question": "Who else?", "answer": "Nobody."}])
    for name, judged, note in (("holdout", 5, "4 of 9"), ("other", 6, "4 of 10")):
        named = [*options, str(tmp_path / f"{name}.jsonl"), "--device", "cpu", "--leaks", "extraction", "membership"]
        assert main(["evaluate", "--adapter", str(tmp_path / "run"), *named, "--output-dir", str(tmp_path / name)]) == 0
        found = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert found["leaks"]["membership"]["holdout_rows"] == judged
        assert any(f"{note} holdout rows set the levels" in said for said in found["notes"])
    in_run = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert in_run["data"]["holdout"]["rows"] == len(in_run["level_rows"]) == 4  # of the first eight


def test_what_does_not_fit_into_memory_is_not_measured(runs, tmp_path, capsys, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    assert merge(runs / "qlora", tmp_path / "out") == 0
    assert "of memory, and 1000 bytes are free." in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def forms(whole, dequantized):
    return {"whole": RowFigures(*whole), "dequantized": RowFigures(*dequantized)}


BEFORE = RowFigures(1.0, 0.9, 0.5)


@pytest.mark.parametrize(
    "whole, dequantized, best, why",
    [
        ((5.0, 0.1, 0.6), (5.2, 0.1, 0.8), "whole", "the answers to keep have NLL 0.600, not 0.800"),
        ((5.0, 0.1, 0.8), (5.2, 0.1, 0.6), "dequantized", "as much is forgotten"),
        ((3.0, 0.1, 0.5), (5.2, 0.1, 0.6), "dequantized", "NLL 5.200, not 3.000"),
        ((5.2, 0.5, 0.5), (5.2, 0.1, 0.6), "dequantized", "10% of them by itself, not 50%"),
        ((3.0, 0.1, 0.5, 2.9, 0.1), (5.2, 0.1, 0.6, 2.9, 0.1), "whole", "0.500, not 0.600"),  # beyond never seen
        ((5.2, 0.5, 0.5, 9.0, 0.5), (5.2, 0.1, 0.6, 9.0, 0.1), "whole", "0.500, not 0.600"),  # anybody guesses half
        ((5.0, 0.1, None), (5.2, 0.1, None), "whole", "as much is forgotten in them as in the dequantised weights."),
        ((5.2, 0.5, 0.5), (3.0, 0.1, 0.6), "dequantized", "not 50%"),
    ],
)
def test_which_base_is_better(whole, dequantized, best, why):
    name, sentence = better(forms(whole, dequantized), BEFORE)
    assert name == best and why in sentence and f"(--base-weights {best})" in sentence


@pytest.mark.parametrize(
    "rounded, before, verdict",
    [
        ((4.9, 0.1, 0.6), BEFORE, "Forgetting survives 4 bits."),
        ((4.9, 0.6, 0.6), BEFORE, "WARNING: forgetting does not survive 4 bits."),  # extracted again
        ((2.0, 0.1, 0.6), BEFORE, "WARNING: forgetting does not survive 4 bits."),  # likelier again
        ((4.9, 0.1, 0.6, 3.0, 0.05), BEFORE, "Forgetting survives 4 bits."),
        ((4.9, 0.3, 0.6, 3.0, 0.05), BEFORE, "WARNING: forgetting does not survive 4 bits."),  # the holdout's less
        ((4.9, 0.3, 0.6, 3.0, 0.05, 0.04), BEFORE, "WARNING: forgetting does not survive 4 bits."),
        ((4.9, 0.3, 0.6, 3.0, 0.05, 0.06), BEFORE, "It cannot be told whether"),  # so few rows' 30% may be chance
        ((2.0, 0.3, 0.6, 3.0, 0.05, 0.06), BEFORE, "WARNING: forgetting does not survive 4 bits."),  # likelier again
        ((4.9, 0.1, 0.6), RowFigures(), "It cannot be told whether forgetting survives 4 bits."),
    ],
)
def test_whether_forgetting_survives(rounded, before, verdict):
    sentence = survival(RowFigures(5.0, 0.05, 0.55), RowFigures(*rounded), before)
    assert sentence.startswith(verdict) and "of the retain answers from 0.550 to 0.600" in sentence
    assert "--holdout" not in sentence  # merge has no option that names other rows


@pytest.mark.parametrize(("strength", "known"), [(0.5, 0.5), ([0.5], None), ({"now": 0.5}, None)])
def test_a_figure_of_the_run_that_is_no_number_is_not_known(strength, known, tmp_path):
    run = RunFiles(tmp_path)
    result = {"meaning": "", "leaks": None, "extraction_strength": strength}
    run.leaks.write_text(json.dumps({"before": {"extraction": result}}))
    assert figures_of_run(run, "before", run.weights) == RowFigures(extraction=known)


@pytest.mark.parametrize(
    ("whole", "after", "warns"),
    [
        ((0.01, 1.0, 0.5), (5.0, 0.1, 0.5), True),  # extracted as before
        ((2.0, 0.1, 0.5), (5.0, 0.1, 0.5), True),  # likelier again than beside the base
        ((4.0, 0.1, 0.5), (9.0, 0.1, 0.5), True),
        ((4.0, 0.1, 0.5, 3.0, 0.1), (9.0, 0.1, 0.5), False),  # as one that was never seen
        ((4.9, 0.1, 0.5), (5.0, 0.1, 0.5), False),
        ((0.01, 1.0, 0.5), (), True),
    ],
)
def test_what_is_kept_is_checked_whether_or_not_it_is_rounded(whole, after, warns, monkeypatch, tmp_path):
    """Both forms may be as they were before forgetting: that as much is forgotten in either says nothing."""
    monkeypatch.setattr(merging, "measure", lambda *_: RowFigures(*whole))
    rows = RunRows({}, ModelConfig("base"), 1, RowFigures(0.01, 1.0, 0.5), RowFigures(*after))
    plan = merging.Plan(["dequantized", "whole"], rows, choose=True)
    assert merging._measure(plan, tmp_path) == "whole"
    assert plan.sentences[0].startswith("Advised: the whole weights")
    warnings = [sentence for sentence in plan.measurements.sentences if sentence.startswith("WARNING: forgotten text")]
    assert len(warnings) == warns == len(plan.sentences) - 1
    assert not warns or "100%" in warnings[0]  # what it was before, or is again


def test_forgetting_of_next_to_nothing_survives_nothing():
    """Its NLL has risen by less than rounding alone takes it up, and neither model says any of it."""
    before = RowFigures(4.692, 0.0, 4.678)
    sentence = survival(RowFigures(4.695, 0.0, 4.681), RowFigures(4.712, 0.0, 4.695), before)
    assert sentence.startswith("So little is forgotten that it cannot be told whether it survives 4 bits.")


def test_what_was_never_forgotten_is_not_blamed_on_rounding():
    sentence = survival(RowFigures(1.1, 0.9, 0.5), RowFigures(1.2, 0.9, 0.5), BEFORE)
    assert sentence.startswith("WARNING: forgotten text is in the merged weights already")
