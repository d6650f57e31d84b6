"""A sweep that teaches, unlearns and evaluates: whose figures they are, what is measured again, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
from helpers.loaded_models import loads_watched
from safetensors.torch import load_file, save_file
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.sweep import runs as runs_module
from lowmem_npo.commands.sweep import taught_models
from lowmem_npo.commands.sweep.evaluation import SweepEvaluation
from lowmem_npo.commands.sweep.taught_models import lessons
from lowmem_npo.commands.train.plan import Inputs
from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare
from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.open_unlearning import privleak
from lowmem_npo.memory import switches
from lowmem_npo.run_directory import RunFiles

GRID = ["--seeds", "1,2", "--grid", "forget-term=npo,ga"]
TEACH = ["--teach", "full", "--teach-epochs", "30", "--teach-lr", "1e-2", "--teach-batch-size", "8"]
EVALUATE = ["--evaluate", "tofu,extraction"]


def swept(desk: Path, out: Path, *more: str, teach=TEACH, grid=GRID, evaluate=EVALUATE) -> int:
    data = [word for part in ("forget", "retain", "holdout") for word in (f"--{part}", str(desk / f"{part}.jsonl"))]
    given = [
        *("--model", str(desk / "base"), "--dtype", "float32", "--device", "cpu", *data, "--max-steps", "2"),
        *("--lora-targets", "all-linear", "--lr", "5e-3", "--save-strategy", "no", "--eval-rows", "3"),
        *("--max-new-tokens", "16", "--leaks", "none", "--output-dir", str(out)),
    ]
    try:
        return main(["sweep", *given, *teach, *grid, *evaluate, *more])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def whole(desk) -> Path:
    assert swept(desk, desk / "swept") == 0
    return desk / "swept"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def evaluation(place: Path) -> dict:
    return read(place / "evaluation" / "evaluation.json")


def runs(whole: Path) -> dict[str, list[Path]]:
    return {term: [whole / f"forget-term={term}" / f"seed-{seed}" for seed in (1, 2)] for term in ("npo", "ga")}


def test_the_base_is_taught_forget_and_retain_and_gold_retain_alone(whole, desk):
    nll = {}
    for name, folder in (("base", desk / "base"), ("taught", whole / "taught"), ("gold", whole / "gold")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        sources = {part: str(desk / f"{part}.jsonl") for part in ("forget", "retain", "holdout")}
        data = prepare(tokenizer, DataConfig(**sources))
        sets = {"forget": data.forget, "retain": data.retain, "holdout": data.holdout}
        nll[name] = {part: evaluate_answers(model, tokenizer, rows).summary.nll for part, rows in sets.items()}
        if name == "base":
            taught = lessons(Inputs(model.config, tokenizer, data))
            assert [len(rows) for rows in taught.values()] == [8, 4]
            ids = [row["input_ids"] for rows in taught.values() for row in rows]
            assert not any(row["input_ids"] in ids for row in data.holdout)
    for name, part in (("taught", "forget"), ("taught", "retain"), ("gold", "retain")):
        assert nll[name][part] < 0.5 * nll["base"][part]
        assert nll[name][part] < 0.7 * nll[name]["holdout"]
    assert nll["taught"]["forget"] < 0.7 * nll["gold"]["forget"]
    baselines = read(whole / "sweep.json")["baselines"]
    for name, part in (("before", "forget"), ("gold", "retain")):  # of 3 of the 4 rows
        assert 0.3 < baselines[name][f"{part}_nll"] / nll[{"before": "taught", "gold": "gold"}[name]][part] < 3


def test_means_and_deviations_are_over_the_seeds_evaluations(whole):
    result = read(whole / "sweep.json")
    assert list(result["baselines"]) == ["before", "gold"]
    table = (whole / "sweep.md").read_text()
    means = {line["configuration"]: line for line in csv.DictReader((whole / "sweep_means.csv").open())}
    for configuration in result["configurations"]:
        places = runs(whole)[configuration["settings"]["forget-term"]]
        for key, path in {
            "tofu.forget.truth_ratio": ("tofu", "sets", "forget", "truth_ratio"),
            "tofu.retain.probability": ("tofu", "sets", "retain", "probability"),
            "tofu.forget_quality": ("tofu", "forget_quality"),
            "leaks.extraction.extraction_strength": ("leaks", "extraction", "extraction_strength"),
        }.items():
            values = [evaluation(place) for place in places]
            for step in path:
                values = [value[step] for value in values]
            figure = configuration["figures"][key]
            assert figure["values"] == values and figure["mean"] == pytest.approx(fmean(values))
            assert figure["sd"] == pytest.approx(stdev(values))
            assert f"{fmean(values):.3f} ± {stdev(values):.3f}" in table
            assert float(means[configuration["name"]][key]) == pytest.approx(fmean(values))
            assert float(means[configuration["name"]][f"{key}_sd"]) == pytest.approx(stdev(values))
    ratios = [c["figures"]["tofu.forget.truth_ratio"]["values"] for c in result["configurations"]]
    assert ratios[0] != ratios[1], "otherwise a mix-up of the two would not be noticed"
    assert "2 of 2" in table and (whole / "sweep.png").stat().st_size > 10_000


def test_forget_quality_compares_with_the_gold_model(whole):
    ratios = evaluation(whole / "baselines" / "gold")["tofu"]["sets"]["forget"]["truth_ratios"]
    for place in [*sum(runs(whole).values(), []), whole / "baselines" / "before"]:
        tofu = evaluation(place)["tofu"]
        expected = ks_2samp(tofu["sets"]["forget"]["truth_ratios"], ratios).pvalue
        assert tofu["forget_quality"] == pytest.approx(expected)
    assert evaluation(whole / "baselines" / "gold")["tofu"]["forget_quality"] is None


def test_a_runs_evaluation_is_that_of_evaluate(whole, desk):
    """On one borrowed model after three others, and on one that is loaded for it alone."""
    place = runs(whole)["ga"][1]
    data = [word for part in ("forget", "retain", "holdout") for word in (f"--{part}", str(desk / f"{part}.jsonl"))]
    given = [
        "--adapter",
        str(place),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        *data,
        "--leaks",
        "extraction",
        "--batch-size",
        "8",
    ]
    given += ["--retained-log", str(whole / "baselines" / "gold" / "evaluation" / "evaluation.json")]
    assert main(["evaluate", *given, "--output-dir", str(desk / "alone")]) == 0
    alone, ours = read(desk / "alone" / "evaluation.json"), evaluation(place)
    assert alone["tofu"] == ours["tofu"] and alone["leaks"] == ours["leaks"]


def test_the_gold_model_stands_in_tables_files_and_every_report(whole):
    table = (whole / "sweep.md").read_text().splitlines()
    assert sum(line.startswith("| gold | –") for line in table) >= 3  # the runs' own figures, TOFU's, the worst attack
    means = {line["configuration"]: line for line in csv.DictReader((whole / "sweep_means.csv").open())}
    gold = evaluation(whole / "baselines" / "gold")
    assert float(means["gold"]["tofu.forget.truth_ratio"]) == gold["tofu"]["sets"]["forget"]["truth_ratio"]
    for place in sum(runs(whole).values(), []):
        report, worst = read(place / "report.json"), evaluation(place)["worst_attack"]
        answers = {(f["set"], f["key"]): f["values"] for f in report["figures"] if f["group"] == "answers"}
        assert answers["forget", "nll"]["gold"] == read(whole / "sweep.json")["baselines"]["gold"]["forget_nll"]
        assert report["leaks"]["gold"] == gold["leaks"]
        assert worst["gold"] == gold["worst_attack"]["value"] == report["worst_attack"]["after"]["gold"]
        assert float(means["gold"]["worst_attack.extraction_strength.value"]) == worst["gold"]
        assert means["gold"]["worst_attack.name"] == worst["test"] == "extraction"
        assert ">gold</th>" in (place / "report.html").read_text()
    for configuration in read(whole / "sweep.json")["configurations"]:
        places = runs(whole)[configuration["settings"]["forget-term"]]
        values = [evaluation(place)["worst_attack"]["value"] for place in places]
        assert configuration["figures"]["worst_attack.extraction_strength.value"]["values"] == values
        assert configuration["names"]["worst_attack.name"] == ["extraction"] * 2


def test_the_worst_attack_is_named_and_its_figure_is_of_what_it_measured(tmp_path):
    """Extraction strength, recall and the share of whole answers are no one figure that could be averaged."""
    measured, _ = SweepEvaluation.parse(["--evaluate", "extraction"])
    files = RunFiles(tmp_path).evaluation
    files.path.mkdir()

    def found(**worst):
        files.result.write_text(json.dumps({"rows": {}, "leaks": {}, "notes": [], "worst_attack": worst}))
        return {column.key: value for column, value in measured.figures(files).items()}

    first = found(test="relearning", attack="20 steps", figure="extraction strength", value=0.3, holdout=0.1, gold=None)
    assert first == {
        "worst_attack.name": "relearning: 20 steps",
        "worst_attack.extraction_strength.value": 0.3,
        "worst_attack.extraction_strength.holdout": 0.1,
    }
    second = found(test="sampling", attack="", figure="ROUGE-L recall", value=0.6, gold=0.2)
    assert second == {
        "worst_attack.name": "sampling",
        "worst_attack.rouge_l_recall.value": 0.6,
        "worst_attack.rouge_l_recall.gold": 0.2,
    }


def test_a_leak_test_that_found_no_traces_before_either_cannot_tell(tmp_path):
    """Its verdict counts neither as found nor as not found."""
    measured, _ = SweepEvaluation.parse(["--evaluate", "extraction,membership"])

    def write(name, **settings):
        files = RunFiles(tmp_path / name).evaluation
        files.path.mkdir(parents=True)
        none = {"meaning": "Nothing.", "leaks": False}
        leaks = {"extraction": none, **({"membership": none} if settings else {})}
        files.result.write_text(json.dumps({"rows": {}, "leaks": leaks, "notes": []}))
        files.settings.write_text(json.dumps({"digests": {"forget": "a"}, "leaks": ["all"], **settings}))
        return files

    before = write("before")
    after = write("after", before=str(before.result))
    assert {column.key: value for column, value in measured.figures(after).items()} == {"leaks.membership.leaks": 0.0}
    assert {column.key for column in measured.figures(before)} == {"leaks.extraction.leaks"}
    before.result.unlink()  # then it is not known
    assert len(measured.figures(after)) == 2


def test_an_evaluation_that_lacks_figures_is_read_as_far_as_it_goes(tmp_path):
    measured, _ = SweepEvaluation.parse(["--evaluate", "answers,muse,extraction"])
    files = RunFiles(tmp_path).evaluation
    files.path.mkdir()
    old = {"extraction_strength": 0.25, "meaning": "A quarter.", "leaks": None}
    files.result.write_text(json.dumps({"rows": {}, "answers": {}, "leaks": {"extraction": old}, "notes": []}))
    assert {column.key: value for column, value in measured.figures(files).items()} == {
        "leaks.extraction.extraction_strength": 0.25
    }


def stamps(whole: Path) -> dict[str, int]:
    files = [*whole.rglob("evaluation.json"), *whole.rglob("*.safetensors")]
    return {str(path.relative_to(whole)): path.stat().st_mtime_ns for path in files}


def test_resume_measures_and_teaches_only_what_is_missing(whole, desk, capsys):
    before, expected = stamps(whole), read(whole / "sweep.json")
    assert len(before) == 6 + 8  # evaluations; adapters, two models, the reference's two files
    shutil.rmtree(runs(whole)["npo"][1] / "evaluation")
    shutil.rmtree(whole / "gold")
    assert swept(desk, whole, "--resume") == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 4 and "taught: taught before" in printed and "gold: full" in printed
    after = stamps(whole)
    assert {name for name in after if after[name] != before[name]} == {
        "forget-term=npo/seed-2/evaluation/evaluation.json",
        "gold/model.safetensors",
    }
    again = read(whole / "sweep.json")
    assert again["configurations"] == expected["configurations"] and again["baselines"] == expected["baselines"]
    assert swept(desk, whole, "--resume", teach=[*TEACH[:3], "2", *TEACH[4:]]) == 2
    error = capsys.readouterr().err
    assert "was made with other settings (epochs)" in error and "\n" not in error.strip()


@pytest.mark.slow
def test_a_sweep_is_resumed_however_its_directory_is_spelled_and_wherever_it_lies(desk, tmp_path, monkeypatch, capsys):
    """Its runs begin with the model that it taught, and were compared with others of its own."""
    shutil.copytree(desk, ours := tmp_path / "ours", ignore=lambda *_: ("swept",))
    monkeypatch.chdir(ours)
    first = {"grid": ["--seeds", "1"], "teach": [*TEACH[:3], "2", *TEACH[4:]]}
    assert swept(Path(), Path("sw"), **first) == 0

    def resumed(place: Path) -> None:
        """With the run to finish, which has no checkpoint."""
        before, run = stamps(place), RunFiles(place / "as-given" / "seed-42")
        run.report_json.unlink()
        capsys.readouterr()
        assert swept(ours, place, "--resume", **first) == 0
        printed = capsys.readouterr().out
        assert "failed" not in printed and "evaluated: " not in printed and printed.count(": taught before") == 2
        again = {name for name, made in stamps(place).items() if made != before.get(name)}
        assert run.report_json.exists() and again == {"as-given/seed-42/adapter_model.safetensors"}

    resumed(ours / "sw")
    (tmp_path / "yonder").mkdir()
    shutil.move(ours / "sw", tmp_path / "yonder" / "renamed")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--adapter", "yonder/renamed/as-given/seed-42", "--device", "cpu", "--dry-run"]) == 2
    assert "holds an evaluation" in capsys.readouterr().err  # and the base is found
    resumed(tmp_path / "yonder" / "renamed")
    double(ours / "base" / "model.safetensors")
    assert swept(ours, tmp_path / "yonder" / "renamed", "--resume", **first) == 2
    assert "was made with other settings (model)" in capsys.readouterr().err


def test_what_has_changed_is_not_averaged_with_what_is_made_now(desk, tmp_path, capsys):
    """Rows that are trained on, and others that are measured, the base and what is compared with."""
    shutil.copytree(desk / "base", (ours := tmp_path / "desk") / "base")
    for part in ("forget", "retain", "holdout"):
        shutil.copy(desk / f"{part}.jsonl", ours)
    kept, log = ours / "kept.jsonl", ours / "log.json"
    shutil.copy(ours / "retain.jsonl", kept)
    log.write_text(json.dumps({"tofu": {"sets": {"forget": {"truth_ratios": [0.1, 0.2]}}}}))
    evaluate = ["--evaluate", "tofu", "--evaluate-forget", str(desk / "forget.jsonl"), "--evaluate-retain", str(kept)]
    evaluate += ["--retained-log", str(log), "--evaluate-limit", "2", "--reference", "live", "--max-steps", "1"]

    def resumed(*more: str, seeds: str = "1") -> int:
        capsys.readouterr()
        return swept(ours, tmp_path / "o", *more, teach=[], grid=["--seeds", seeds], evaluate=evaluate)

    assert resumed() == 0
    for file, change, message in (
        (kept, reverse, "--resume: retain has changed since '{}/baselines/before/evaluation' was begun"),
        (ours / "forget.jsonl", reverse, "--resume: the forget rows have changed since the run in '{}/as-given/seed-"),
        (ours / "base" / "model.safetensors", double, f"--resume: the model in '{ours}/base' has changed since the "),
    ):
        sound = file.read_bytes()
        change(file)
        assert resumed("--resume", seeds="2") == 2
        assert message.format(tmp_path / "o") in capsys.readouterr().err
        file.write_bytes(sound)
    assert not (tmp_path / "o" / "as-given" / "seed-43").exists()
    place, measured = tmp_path / "o" / "as-given" / "seed-42", []
    for ratios in ([0.1, 0.2], [0.01, 99.0]):
        log.write_text(json.dumps({"tofu": {"sets": {"forget": {"truth_ratios": ratios}}}}))
        assert resumed("--resume") == 0
        measured.append(("evaluated: " in capsys.readouterr().out, evaluation(place)["tofu"]["forget_quality"]))
    assert [again for again, _ in measured] == [False, True] and measured[0][1] != measured[1][1]


def reverse(rows: Path) -> None:
    rows.write_text("\n".join(reversed(rows.read_text().splitlines())) + "\n")


NOT_SETTINGS = ['"', "[]", "7", '{"digests": 7}', '{"digests": [1]}', ""]


def double(weights: Path) -> None:
    save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("damaged", ["{}", *(pytest.param(text, marks=pytest.mark.slow) for text in NOT_SETTINGS)])
def test_an_evaluation_whose_settings_are_damaged_is_named(damaged, whole, desk, capsys):
    settings = runs(whole)["npo"][0] / "evaluation" / "settings.json"
    sound = settings.read_text()
    settings.write_text(damaged)
    try:
        code = swept(desk, whole, "--resume")
    finally:
        settings.write_text(sound)
    printed = capsys.readouterr().out
    assert code == 1 and printed.count("failed: ") == 1
    assert f"failed: '{settings}' is damaged: remove '{settings.parent}', and measure anew" in printed


@pytest.mark.parametrize(
    "part",
    [
        {"leaks": {"extraction": {"meaning": 3, "leaks": None}}},
        pytest.param({"tofu": "high"}, marks=pytest.mark.slow),
        pytest.param({"leaks": {}, "worst_attack": {"value": "high"}}, marks=pytest.mark.slow),
        pytest.param({"open_unlearning": {"privleak": 10**400}}, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_with_values_of_other_types_is_named(part, whole, desk, capsys):
    result = runs(whole)["npo"][0] / "evaluation" / "evaluation.json"
    sound = result.read_text()
    result.write_text(json.dumps(json.loads(sound) | part))
    try:
        code = swept(desk, whole, "--resume")
    finally:
        result.write_text(sound)
    assert code == 1 and f"'{result}' is damaged" in capsys.readouterr().out


def test_all_of_a_sweep_is_measured_beside_the_half_that_judges_a_run_with_levels(desk, tmp_path, capsys):
    """From the first run with levels on, which a resumed sweep may bring: what was measured before is measured anew."""
    out, short = tmp_path / "out", {"teach": [*TEACH[:3], "2", *TEACH[4:]], "evaluate": ["--evaluate", "membership"]}

    def measured(*levels, resume=True):
        grid = ["--seeds", "1", "--grid", f"forget-level={','.join(levels)}"]
        assert swept(desk, out, *(["--resume"] if resume else []), grid=grid, **short) == 0
        printed = capsys.readouterr().out
        runs = [out / f"forget-level={level}" / "seed-42" for level in levels]
        places = [out / "baselines" / "before", out / "baselines" / "gold", *runs]
        rows = [[json.loads(line) for line in (place / "evaluation" / "rows.jsonl").open()] for place in places]
        notes = "\n".join(note for place in places for note in evaluation(place)["notes"])
        assert "not comparable" not in notes and "another" not in notes
        return [[row["row"] for row in of if row["set"] == "holdout"] for of in rows], printed

    assert measured("none", resume=False)[0] == [[0, 1, 2, 3]] * 3
    halves, printed = measured("none", "holdout")
    assert halves == [halves[0]] * 4 and len(halves[0]) == 2 and "failed" not in printed
    assert printed.count("evaluated: ") == 4
    assert "leak tests (membership): 4 forget, 2 holdout rows" in printed
    for run in ("none", "holdout"):
        place = out / f"forget-level={run}" / "seed-42"
        known = evaluation(out / "baselines" / "gold")["open_unlearning"]["mia_min_k"]
        named = evaluation(place)["open_unlearning"]
        assert named["privleak"] == pytest.approx(privleak(named["mia_min_k"], known))
    again, printed = measured("none", "holdout")
    assert again == halves and "evaluated: " not in printed


def test_a_dry_run_shows_all_of_it_and_writes_nothing(desk, capsys):
    assert swept(desk, desk / "dry", "--dry-run", "--evaluate-limit", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("/seed-") == 4 and "taught on 8 rows" in printed and "gold on 4" in printed
    assert "TOFU: 2 forget, 2 retain rows" in printed and "leak tests (extraction): 2 forget, 2 holdout" in printed
    assert not (desk / "dry").exists()


def test_rows_that_are_evaluated_need_no_group_column(desk, tmp_path):
    """Which those of the runs have."""
    rows = [json.loads(line) for line in (desk / "forget.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "about": str(number)}) for number, row in enumerate(rows)]
    (grouped := tmp_path / "grouped.jsonl").write_text("\n".join(lines))
    others, of_runs = str(desk / "forget.jsonl"), ["--forget", str(grouped), "--group-column", "about", "--dry-run"]
    assert swept(desk, tmp_path / "out", *of_runs, "--evaluate-forget", others, teach=[]) == 0


@pytest.mark.parametrize(
    "teach, evaluate, more, message",
    [
        ([], ["--evaluate", "tofuu"], [], "--evaluate: there is no 'tofuu'; there are lume, tofu, "),
        ([], ["--evaluate", "lume"], [], "--evaluate lume: no set has its rows"),
        ([], ["--evaluate-limit", "2"], [], "--evaluate-limit says how --evaluate measures"),
        ([], EVALUATE, ["--evaluate-limit", "0"], "--evaluate-limit must be at least 1"),
        ([], EVALUATE, ["--evaluate-forget", "missing.jsonl"], "missing.jsonl"),
        ([], ["--evaluate", "documents"], ["--members", "x.jsonl"], "--nonmembers is not"),
        (["--teach-epochs", "3"], [], [], "--teach-epochs says how --teach teaches"),
        (["--teach", "full", "--teach-epochs", "0"], [], [], "--teach-epochs must be at least 1"),
        (TEACH, [], ["--retain", "self:4"], "--teach teaches forget and retain rows"),
        (TEACH, [], ["--grid", "max-length=2,128"], "--grid cannot vary options of the model or the data"),
    ],
)
def test_what_is_refused_before_anything_runs(teach, evaluate, more, message, desk, capsys):
    out, grid = desk / "refused", [] if "--grid" in more else GRID
    assert swept(desk, out, *more, teach=teach, grid=grid, evaluate=evaluate) == 2
    error = capsys.readouterr().err
    assert message in error and "\n" not in error.strip() and not out.exists()


def test_one_model_at_a_time_is_in_memory(desk, tmp_path):
    """The base, which is taught twice; gold; the taught one, for the run and for its evaluation; three forms."""
    grid, tests = ["--seeds", "1", "--grid", "tile-mlp=8", "qlora=true"], ["--evaluate", "extraction,quantization"]
    with loads_watched(taught_models, runs_module, switches) as still_there:
        assert swept(desk, tmp_path / "out", grid=grid, evaluate=tests) == 0
    assert len(still_there) >= 8 and not any(still_there)
