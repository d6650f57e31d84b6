"""benchmarks/quality.py --lasting, --baselines and --real: pieces, arithmetic by hand, whole runs in small."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib import image
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import quality, tables
from benchmarks.quality_parts import lasting
from benchmarks.quality_parts.lasting_picture import draw_attacks
from benchmarks.quality_parts.lasting_table import (
    MISSING,
    answer_table,
    attack_table,
    official_table,
    summarise,
    unmeasured,
)
from benchmarks.quality_parts.measure import ATTACKS, Attack, totals
from benchmarks.quality_parts.methods import BASELINES, LASTING, LONGER, PAPER, Method
from benchmarks.quality_parts.pieces import Limits, Piece, make_pieces
from benchmarks.quality_parts.real_rows import KINDS, SIZES, write_rows
from benchmarks.quality_parts.subjects import RealSetting, demo_subject, real_subject
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.demo.recipe import Recipe
from lowmem_npo.commands.train.plan import read_inputs
from lowmem_npo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def pieces_of(made: list[str], flags: str = "") -> list[Piece]:
    def make(name: str):
        made.append(name)
        return {"value": len(made)}

    return [Piece(name, flags, lambda name=name: make(name)) for name in ("a/seed-0/x", "a/seed-0/y", "b/seed-0/x")]


def test_a_piece_is_made_once_and_kept_when_a_later_one_fails(tmp_path):
    made: list[str] = []
    path = tmp_path / "q.json"

    def fail() -> dict:
        raise RuntimeError("killed")

    pieces = pieces_of(made)
    with pytest.raises(RuntimeError):
        make_pieces([pieces[0], Piece("a/seed-0/y", "", fail), pieces[2]], path, "quality", {}, len_of)
    assert json.loads(path.read_text())["results"] == {"pieces": 1}
    known = make_pieces(pieces, path, "quality", {}, len_of)
    assert made == ["a/seed-0/x", "a/seed-0/y", "b/seed-0/x"] and [known[name]["value"] for name in made] == [1, 2, 3]
    assert make_pieces(pieces_of(made), path, "quality", {}, len_of) == known and len(made) == 3


def len_of(pieces: dict) -> dict:
    return {"pieces": len(pieces)}


def test_patterns_and_minutes_limit_a_call(tmp_path, capsys):
    made: list[str] = []
    make_pieces(pieces_of(made), tmp_path / "q.json", "quality", {}, len_of, Limits(only=("*/x",)))
    assert made == ["a/seed-0/x", "b/seed-0/x"]
    make_pieces(pieces_of(made), tmp_path / "q.json", "quality", {}, len_of, Limits(minutes=0))
    assert len(made) == 2 and "goes on with a/seed-0/y" in capsys.readouterr().out


def test_a_pattern_that_names_no_piece_is_a_mistake(tmp_path):
    """Not a call that has made all there is to be made."""
    with pytest.raises(UserError, match=r"--pieces \*/z: there is none"):
        make_pieces(pieces_of([]), tmp_path / "q.json", "quality", {}, len_of, Limits(only=("*/x", "*/z")))
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--minutes", "-1"], ["--minutes", "nan"]])
def test_a_number_that_cannot_be_meant_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--quick", *option])
    assert "is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "flags", "message"), [({"epochs": 3}, "", "setting"), ({}, "--sam 1", "--sam|without")]
)
def test_pieces_of_another_setting_or_method_are_not_mixed(tmp_path, setting, flags, message):
    make_pieces(pieces_of([]), tmp_path / "q.json", "quality", {}, len_of)
    with pytest.raises(UserError, match=message):
        make_pieces(pieces_of([], flags), tmp_path / "q.json", "quality", setting, len_of)


def pieces_by_hand() -> dict:
    def answers(nll: float) -> dict:
        figures = {"nll": nll, "exact_match": 0.5, "rouge_l_recall": 0.25, "extraction_strength": 0.125}
        auc = {"loss": 0.5, "min_k": 0.5, "min_k_pp": 0.5, "zlib": 0.25}
        return {"forget": figures, "retain": figures, "membership": auc, "general_nll": 3.0}

    pieces = {f"npo/seed-{seed}/answers": answers(4.0 + seed) for seed in (0, 1)}
    strengths = ((0.1, 0.2, 0.3, 0.4, 0.9), (0.3, 0.2, 0.1, 0.6, 0.5))
    for seed, of_seed in enumerate(strengths):
        for attack, strength in zip(ATTACKS, of_seed, strict=True):
            pieces[f"npo/seed-{seed}/{attack.part}"] = {"extraction_strength": strength}
    return pieces | {"gold/seed-0/attack-0.2-20": {"extraction_strength": 0.1}}


def test_the_tables_by_hand():
    results = summarise(pieces_by_hand())
    npo = results["npo"]
    assert npo["forget_nll"] | {"values": None} == {"mean": 4.5, "sd": 0.5**0.5, "values": None, "seeds": [0, 1]}
    assert npo["worst_attack"]["values"] == [0.9, 0.6], "the worst of each seed, not of the means"
    titles = {"gold": "never saw", "npo": "NPO", "layered": "layered"}
    gold, of_npo = attack_table(results, titles).splitlines()[2:]
    assert gold.split(" | ")[1:4] == ["1", MISSING, "0.10"] and gold.count(MISSING) == 6
    assert of_npo.split(" | ")[1:4] == ["2", "0.12 ± 0.00", "0.20 ± 0.14"] and of_npo.endswith("0.75 ± 0.21 |")
    assert unmeasured(results, titles) == "Not yet measured: layered."
    third = {
        f"npo/seed-2/{ATTACKS[0].part}": {"extraction_strength": 0.8}
    }  # above the worst of the seeds with all five
    marked = attack_table(summarise(pieces_by_hand() | third), titles).splitlines()[3].split(" | ")
    assert marked[1:5] == ["3", "0.12 ± 0.00 (2 of 3)", "0.40 ± 0.36", "0.20 ± 0.00 (2 of 3)"]
    assert marked[-1] == "0.75 ± 0.21 (2 of 3) |"
    assert "| NPO | 2 | 4.50 ± 0.71 | 0.25 ± 0.00 |" in answer_table(results, titles)


def test_what_would_say_nothing_is_not_promised():
    """The model that recites has forgotten nothing to relearn; what is said is judged by it; gold is compared with."""
    names, before = ("taught", "gold", "npo"), pieces_by_hand()["npo/seed-0/answers"]
    pieces = {f"{name}/seed-0/answers": before for name in names}
    pieces |= {f"{name}/seed-0/scores": {"tofu": {"model_utility": 0.5}} for name in names}
    results, titles = summarise(pieces), {"taught": "recites", "gold": "never saw", "npo": "NPO"}
    never = ["–"] * 6
    assert [line.count(MISSING) for line in attack_table(results, titles).splitlines()[2:]] == [0, 6, 6]
    assert attack_table(results, titles).splitlines()[2].strip("| ").split(" | ")[3:] == never
    cells = [line.strip("| ").split(" | ")[3:] for line in official_table(results, titles, "tofu").splitlines()[2:]]
    assert cells[0] == [MISSING, "0.50", MISSING, MISSING, "–"]
    assert cells[1] == ["–", "0.50", MISSING, MISSING, "–"]
    assert cells[2] == [MISSING, "0.50", MISSING, MISSING, MISSING]


def test_the_picture_shows_what_there_is(tmp_path):
    draw_attacks(tmp_path / "q.png", summarise(pieces_by_hand()), {"gold": "never saw", "npo": "NPO"}, "gold")
    height, width = image.imread(tmp_path / "q.png").shape[:2]
    assert width >= 1400 and height >= 600


@pytest.mark.parametrize("name", list({**LASTING, **LONGER, **PAPER, **BASELINES}))
def test_every_method_is_flags_that_train_knows(name):
    method = {**BASELINES, **PAPER, **LONGER, **LASTING}[name]
    sets = ["--model", "any", "--forget", "owner/rows", "--holdout", "owner/others"]
    config = parse_run([*sets, *RealSetting.flags.split(), *method.flags], "train")
    assert config.adapter.lora_r == 16


def test_the_recipe_lasting_is_among_them(tmp_path):
    """With what all methods share on either model."""
    demo = demo_subject(tmp_path, lasting.QUICK, epochs=1).flags
    for shared in (demo, RealSetting.flags.split()):
        run = ["--model", "any", "--forget", "owner/rows", "--retain", "owner/kept", *shared]
        adapter = [flag for name in ("--lora-r", "--lora-alpha", "--lora-targets") for flag in (name, of(shared, name))]
        others = [flag for flag in run if flag not in adapter]
        recipe = parse_run([*others, "--recipe", "lasting"], "train")
        ours = parse_run([*run, *LASTING["lasting"].flags], "train")
        assert ours.flat() | {"recipe": "lasting"} == recipe.flat()


def test_the_demos_model_forgets_with_the_demos_settings(tmp_path):
    """All of the objective, so that one that the demo changes later is not left at its default here."""
    demo = Recipe()
    shared = demo_subject(tmp_path, demo, demo.epochs).flags
    ours = parse_run(["--model", "any", "--forget", "owner/rows", "--retain", "owner/kept", *shared], "train")
    theirs = demo.run(tmp_path, tmp_path, 0, "auto")
    assert ours.objective == theirs.objective
    assert replace(ours.training, recipe=demo.recipe, seed=theirs.training.seed) == theirs.training


def of(flags, name):
    return flags[flags.index(name) + 1]


def nll_by_hand(model: Path, adapter: Path, rows: list[dict]) -> float:
    """Per answer token, EOS included, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64), adapter
    ).double()
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = network(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(logprobs[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
        tokens += len(answer)
    return total / tokens


def test_a_whole_run_in_small(tmp_path, capsys):
    """Two methods; the measured NLL is that of the adapter on the disk; a second call makes only what is missing."""
    command = ["--lasting", "--quick", "--seeds", "1", "--work", str(tmp_path)]
    run = [*command, "--pieces", "gold/*/attack-0.2-20", "layered/*/answers", "layered/*/attack-0.2-20"]
    assert quality.main(run) == 0
    out = tmp_path / "quality-lasting.json"
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"gold", "layered"}
    models, adapter = tmp_path / "demo" / "seed-0", tmp_path / "demo" / "4-epochs" / "layered" / "seed-0"
    rows = [json.loads(line) for line in (tmp_path / "demo" / "rows" / "forget.jsonl").read_text().splitlines()]
    expected = nll_by_hand(models / "taught", adapter, rows)
    assert record["results"]["layered"]["forget_nll"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert record["pieces"]["layered/seed-0/answers"]["flags"] == "--layered 3"
    assert out.with_suffix(".md").exists() and out.with_suffix(".png").exists()
    written = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    assert quality.main([*command, "--pieces", "layered/*/answers"]) == 0
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == written
    capsys.readouterr()
    assert quality.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("made") == 3


def test_two_models_with_full_logits_train_the_same_adapter(tmp_path):
    """The rows, the objective and the optimiser are ours: what differs is how they are computed."""
    subject = demo_subject(tmp_path, lasting.QUICK, epochs=1)
    for dtype, tolerance in (("float32", 2e-3), ("bf16", 0.2)):
        adapters = []
        for name, two_models in (("ours", False), ("two", True)):
            subject.load(f"{name}-{dtype}", Method(name, ("--dtype", dtype), two_models), seed=1)
            adapter = tmp_path / "1-epochs" / f"{name}-{dtype}" / "seed-1" / "adapter_model.safetensors"
            adapters.append(load_file(adapter))
        ours, two = adapters
        assert ours.keys() == two.keys()
        for key, expected in ours.items():
            assert torch.linalg.norm(two[key] - expected) < tolerance * torch.linalg.norm(expected), (dtype, key)


@pytest.mark.parametrize("kind", KINDS)
def test_every_baseline_has_the_columns_that_it_needs(kind, shared_data, byte_model, tmp_path):
    sizes = (("forget", 6), ("retain", 6), ("holdout", 6))
    setting = RealSetting(sizes, flags=RealSetting.flags.replace("--max-length 512", "--max-length 4096"))
    subject = real_subject(kind, byte_model, shared_data, tmp_path, setting)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "taught").symlink_to(byte_model)
    for way in BASELINES.values():
        data = read_inputs(subject.config(way, 0, tmp_path / "run"), lambda line: None).data
        assert len(data.forget) == 6, way.title


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_rows(kind, shared_data, tmp_path):
    paths = write_rows(kind, shared_data, tmp_path)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert {name: len(of) for name, of in rows.items()} == SIZES
    texts = [json.dumps(row, sort_keys=True) for of in rows.values() for row in of]
    assert len(set(texts)) == len(texts)
    subjects = {name: {row["subject"] for row in of} for name, of in rows.items()}
    if kind == "tofu":
        assert [len(subjects[name]) for name in SIZES] == [3, 6, 3] and not subjects["forget"] & subjects["holdout"]
        assert all(row["perturbed_answer"] for of in rows.values() for row in of)
    else:
        kinds = Counter((row["task"], "sc" in row["id"][-3:]) for row in rows["forget"])
        assert len(kinds) == 6 and not subjects["forget"] & subjects["retain"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_in_small(kind, shared_data, byte_model, tmp_path, monkeypatch):
    """On a tiny model: taught by full fine-tuning, forgotten by the command, attacked, scored."""
    attack = Attack(0.5, 2)
    monkeypatch.setattr(lasting, "FIRST", (attack,))
    monkeypatch.setattr(lasting, "ATTACKS", (attack,))
    command = ["--real", kind, "--quick", "--model", str(byte_model), "--data", str(shared_data)]
    names = [f"{model}/seed-0/{part}" for model in ("gold", "npo") for part in ("answers", attack.part)]
    names += ["npo/seed-0/scores"]  # for which gold is measured as well: TOFU's forget quality needs both
    assert quality.main([*command, "--work", str(tmp_path), "--pieces", *names]) == 0
    pieces = json.loads((tmp_path / f"quality-{kind}.json").read_text())["pieces"]
    assert list(pieces) == names
    scores = pieces["npo/seed-0/scores"]
    assert "privleak" in scores["open_unlearning"]
    if kind == "tofu":
        assert 0 <= scores["tofu"]["forget_quality"] <= 1 and "model_utility" in scores["tofu"]
        assert "truth_ratios" not in scores["tofu"]["sets"]["forget"]
    else:
        assert 0 <= scores["lume"]["mia_final_score"] <= 1


def test_a_real_model_must_be_named(capsys, monkeypatch):
    monkeypatch.delenv("LOWMEM_NPO_TEST_MODEL", raising=False)
    assert quality.main(["--real", "tofu"]) == 2
    assert "--model" in capsys.readouterr().out


def test_only_figures_of_sets_are_kept():
    evaluation = {"rows": {"forget": {"scored": 3}}, "tofu": {"sets": {"forget": {"probability": 0.5, "list": [1.0]}}}}
    assert totals(evaluation) == {"tofu": {"sets": {"forget": {"probability": 0.5}}}}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results" / "cpu").glob("quality-*.json")), ids=lambda p: p.stem
)
def test_the_committed_tables_are_those_of_the_committed_pieces(path):
    record = json.loads(path.read_text())
    assert json.loads(json.dumps(summarise(record["pieces"]))) == record["results"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    marked = re.search(rf"<!-- table:{path.stem} -->\n(.*?)\n<!-- /table -->", page, re.DOTALL)
    assert marked and marked[1] == path.with_suffix(".md").read_text().strip()


def test_every_table_of_the_page_is_that_of_the_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert tables.written(page) == page
    other = page.replace("| exact match | 1.000", "| exact match | 0.990")
    assert other != page and tables.written(other) == page, "a figure that was typed is noticed"
