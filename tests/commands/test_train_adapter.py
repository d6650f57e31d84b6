"""`lowmem-npo train --adapter` as a user runs it: a second request to forget, on what the first one left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from helpers.rows import write_rows
from helpers.saved_adapters import same_adapter
from helpers.tiny_models import tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.model.continued import FIRST
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.training.metrics import read_metrics

IDS = torch.arange(2, 30)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part in ("forget", "second", "retain"):
        rows = [{"question": f"{part} {i}?", "answer": f"No {i * i}."} for i in range(6)]
        write_rows(folder / f"{part}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def train(data):
    def run(folder, *more, forget="second", code=0):
        settings = [
            *("--dtype", "float32", "--device", "cpu", "--forget", data / f"{forget}.jsonl"),
            *("--retain", data / "retain.jsonl", "--batch-size", 3, "--eval-rows", 6, "--lr", 1e-2, "--max-steps", 4),
            *("--save-steps", 1, "--save-total-limit", 9, "--output-dir", folder),
        ]
        assert main(["train", *map(str, settings), *map(str, more)]) == code
        return folder

    return run


@pytest.fixture(scope="module")
def first(train, byte_model, tmp_path_factory):
    return train(tmp_path_factory.mktemp("first") / "run", "--model", byte_model, forget="forget")


SECOND = ("--lora-r", "3", "--lora-targets", "all-linear", "--lora-layers", "1")


@pytest.fixture(scope="module")
def second(train, first, tmp_path_factory):
    """The model is not named: it is the first adapter's."""
    return train(tmp_path_factory.mktemp("second") / "run", "--adapter", first, *SECOND)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits[0]


def test_the_second_run_begins_where_the_first_one_ended(first, second, train, byte_model, data, tmp_path):
    began = next(line for line in read_metrics(RunFiles(second).metrics) if "retain_kl" in line)
    assert began["forget_log_ratio"] == pytest.approx(0, abs=1e-5) and began["retain_kl"] == pytest.approx(0, abs=1e-6)
    stages = [json.loads(RunFiles(run).answers(stage).read_text())["retain"]["summary"]
              for run, stage in ((first, "after"), (second, "before"), (first, "before"))]  # fmt: skip
    assert stages[0]["nll"] == pytest.approx(stages[1]["nll"], rel=1e-5) != pytest.approx(stages[2]["nll"], rel=1e-3)
    run_yaml = yaml.safe_load(RunFiles(second).run_yaml.read_text())
    assert run_yaml["adapter"] == str(first) and run_yaml["model"] == str(byte_model)
    assert "Went on from" in RunFiles(second).report_html.read_text()
    assert f"the adapter in {first.name}; SHA-256:" in RunFiles(second).model_card.read_text()

    def independent_nll(adapter):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_model), adapter).double()
        tokenizer, nll, count = AutoTokenizer.from_pretrained(byte_model), 0.0, 0
        for row in map(json.loads, (data / "second.jsonl").read_text().splitlines()):
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            ids = [*prompt, *tokenizer(" " + row["answer"]).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            nll -= sum(table[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
            count += len(ids) - len(prompt)
        return nll / count

    for stage, adapter in (("before", first), ("after", second)):
        measured = json.loads(RunFiles(second).answers(stage).read_text())["forget"]["summary"]["nll"]
        assert measured == pytest.approx(independent_nll(adapter), rel=1e-3), stage


def test_what_is_saved_stands_alone(first, second, byte_model, tmp_path, capsys):
    """One adapter in the run and in each checkpoint, for PEFT, `evaluate` and `merge`."""
    base = AutoModelForCausalLM.from_pretrained(byte_model)
    for folder in (second, second / "checkpoint-4"):
        assert not (folder / FIRST).exists()
        both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_model), folder)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] in (3, 8)
    merged_first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_model), first).merge_and_unload()
    assert not torch.allclose(logits(both), logits(merged_first), atol=1e-3)

    assert main(["merge", "--adapter", str(second), "--output-dir", str(tmp_path / "m"), "--dtype", "stored"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(both), rtol=1e-4, atol=1e-4)
    # base + first + second, the second's factors being the last ranks of the saved ones
    stored, weights = load_file(second / "adapter_model.safetensors"), dict(base.named_parameters())
    factors = load_file(first / "adapter_model.safetensors")
    layer = "model.layers.1.self_attn.q_proj"
    a, b = (f"base_model.model.{layer}.lora_{part}.weight" for part in "AB")
    own = factors[b] @ factors[a] + (5 / 3) * stored[b][:, -3:] @ stored[a][-3:]
    expected = weights[f"{layer}.weight"] + own
    torch.testing.assert_close(merged.get_parameter(f"{layer}.weight"), expected, rtol=1e-5, atol=1e-5)

    assert main(["evaluate", "--adapter", str(second), "--dtype", "float32", "--device", "cpu"]) == 0
    assert main(["report", str(second)]) == 0
    capsys.readouterr()


def test_the_original_of_a_second_run_is_what_the_first_one_left(first, second, capsys):
    """To `ask`, which says what the model said before and after: the first run's "after" is the second one's
    "before"."""
    answers = {}
    for run in (first, second):
        assert main(["ask", str(run), "second 1?", "--max-new-tokens", "12", "--dtype", "float32", "--json"]) == 0
        answers[run] = json.loads(capsys.readouterr().out)
    assert answers[second]["original"] == answers[first]["unlearned"] != answers[first]["original"]
    assert answers[second]["unlearned"] != answers[second]["original"]


def test_another_model_in_the_place_of_the_base_is_noticed(train, first, byte_model, tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(byte_model, base)
    train(run, "--model", base)
    (base / "training_args.bin").write_bytes(b"of another program")
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text())))  # in one line
    assert main(["merge", "--adapter", str(run), "--output-dir", str(tmp_path / "same")]) == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    train(run, "--model", base, "--max-steps", 6, "--resume", code=2)
    assert f"the model in '{base}' has changed since the run in '{run}' began" in capsys.readouterr().err
    train(tmp_path / "second", "--adapter", run, *SECOND, code=2)
    assert f"The model in '{base}' has changed since the adapter in '{run}'" in capsys.readouterr().err
    out = ["--output-dir", str(tmp_path / "out")]
    device = ["--dtype", "float32", "--device", "cpu"]
    for command in (
        ["merge", "--adapter", str(run), *out], ["evaluate", "--adapter", str(run), *out, *device],
        ["ask", str(run), "Who?", *device],
    ):  # fmt: skip
        assert main(command) == 2
        assert f"The model in '{base}' has changed since the adapter in '{run}'" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(run), *out, "--any-base"]) == 0


def test_resume_comes_to_the_same_adapter(second, train, first, tmp_path):
    cut = tmp_path / "run"
    shutil.copytree(second, cut)
    RunFiles(cut).weights.unlink()
    shutil.rmtree(cut / "checkpoint-4")
    shutil.rmtree(cut / "checkpoint-3")
    train(cut, "--adapter", first, *SECOND, "--resume")
    assert same_adapter(second, cut)
    assert [line["loss"] for line in read_metrics(RunFiles(cut).metrics) if "loss" in line][-1] == [
        line["loss"] for line in read_metrics(RunFiles(second).metrics) if "loss" in line
    ][-1]


def test_the_cached_reference_is_that_of_base_and_adapter(second, train, first, byte_model, tmp_path, capsys):
    cached = train(tmp_path / "cached", "--adapter", first, *SECOND, "--reference", "cached")
    losses = [
        [line["loss"] for line in read_metrics(RunFiles(run).metrics) if "loss" in line] for run in (second, cached)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    capsys.readouterr()
    cache = ("--reference", "cached", "--reference-dir", cached / "reference")
    train(tmp_path / "other", "--model", byte_model, *cache, code=2)
    assert "was made by another model" in capsys.readouterr().err


def test_what_is_refused_in_a_dry_run(train, first, byte_model, lume_model, tmp_path, capsys):
    def refused(*options):
        train(tmp_path / "out", *options, "--dry-run", code=2)
        return capsys.readouterr().err

    assert "There is no directory" in refused("--adapter", tmp_path / "none")
    assert "was trained on" in refused("--adapter", first, "--model", lume_model)
    assert "--any-base is about" in refused("--model", byte_model, "--any-base")
    assert "merge that adapter" in refused("--adapter", first, "--use-dora")
    four_bit = tmp_path / "four_bit"
    shutil.copytree(first, four_bit)
    (four_bit / "run.yaml").write_text("qlora: true\n")
    train(tmp_path / "out", "--adapter", four_bit, "--dry-run")
    assert "was trained on the 4-bit base, and goes on on the unquantised one" in capsys.readouterr().out
    train(tmp_path / "out", "--adapter", first, "--dry-run")
    assert f"adapter: {first}" in capsys.readouterr().out and not (tmp_path / "out").exists()


KINDS = ("--use-dora", "--use-rslora", "--modules-to-save", "norm", "embed_tokens")
PATTERN = ("--lora-targets", r".*layers\.1\..*(q|up)_proj")


@pytest.fixture(scope="module")
def of_all_kinds(train, byte_model, tmp_path_factory):
    return train(tmp_path_factory.mktemp("kinds") / "run", "--model", byte_model, *KINDS, *PATTERN)


def test_dora_rslora_pattern_and_whole_modules(of_all_kinds, train, byte_model, tmp_path, capsys):
    """Trained, described, resumed from what run.yaml says, evaluated and merged."""
    began = next(line for line in read_metrics(RunFiles(of_all_kinds).metrics) if "retain_kl" in line)
    assert began["forget_log_ratio"] == pytest.approx(0, abs=1e-5) and began["retain_kl"] == pytest.approx(0, abs=1e-6)
    config = json.loads((of_all_kinds / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"] and config["target_modules"] == PATTERN[1]
    assert config["modules_to_save"] == ["norm", "embed_tokens"]
    stored = load_file(RunFiles(of_all_kinds).weights)
    assert len([name for name in stored if "lora_A" in name]) == 2 and len(stored) == 2 * 3 + 1  # OLMo's norms are bare

    cut = tmp_path / "run"
    shutil.copytree(of_all_kinds, cut)
    RunFiles(cut).weights.unlink()
    for step in (3, 4):
        shutil.rmtree(cut / f"checkpoint-{step}")
    run_yaml = yaml.safe_load(RunFiles(cut).run_yaml.read_text()) | {"output_dir": str(cut), "resume": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_yaml))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert same_adapter(of_all_kinds, cut)

    assert main(["evaluate", "--adapter", str(of_all_kinds), "--dtype", "float32", "--device", "cpu"]) == 0
    merge = ["merge", "--adapter", str(of_all_kinds), "--output-dir", str(tmp_path / "m"), "--dtype", "stored"]
    assert main(merge) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_model), of_all_kinds)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(byte_model)))
    capsys.readouterr()


def test_what_a_module_cannot_be_is_refused_in_a_dry_run(train, byte_model, tmp_path, capsys):
    for options, message in (
        (("--modules-to-save", "lm_head"), "the output head is in it"),
        (("--modules-to-save", "down_proj", "--qlora"), "held in 4 bits"),
        (("--modules-to-save", "embed_tokens", "--embedding-on-cpu"), "keeps a frozen embedding"),
        (("--lora-targets", "(q_proj"), "is no regular expression"),
        ((*PATTERN, "--lora-layers", "1"), "goes with names"),
    ):
        train(tmp_path / "out", "--model", byte_model, *options, "--dry-run", code=2)
        assert message in capsys.readouterr().err
    train(tmp_path / "out", "--model", byte_model, *KINDS, *PATTERN, "--dry-run")
    assert "use_dora: true" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_dry_run_says_that_an_adapter_cannot_be_merged(train, byte_model, tmp_path, capsys):
    """Its weights are those of the output head, too."""
    tied = tmp_path / "tied"
    tiny_model("gemma2", 258).save_pretrained(tied)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tied)
    options = ("--lora-targets", "embed_tokens", "q_proj", "--max-steps", 1)
    train(tmp_path / "out", "--model", byte_model, *options, "--dry-run")
    assert "shares" not in capsys.readouterr().out
    run = train(tmp_path / "out", "--model", tied, *options)
    assert "shares model.embed_tokens with another layer" in capsys.readouterr().out
    assert main(["merge", "--adapter", str(run), "--output-dir", str(tmp_path / "merged")]) == 2
    assert "changes model.embed_tokens, which the base shares" in capsys.readouterr().err


def test_a_changed_first_adapter_is_noticed_on_resume(second, train, first, tmp_path, capsys):
    cut, moved = tmp_path / "run", tmp_path / "first"
    shutil.copytree(second, cut)
    shutil.copytree(first, moved)
    weights = load_file(moved / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, moved / "adapter_model.safetensors")
    config = yaml.safe_load((cut / "run.yaml").read_text())
    config["adapter"] = str(moved)
    (cut / "run.yaml").write_text(yaml.safe_dump(config))
    train(cut, "--adapter", moved, *SECOND, "--resume", code=2)
    assert f"the adapter in '{moved}' has changed since" in capsys.readouterr().err
