"""The runs that a sweep plans from its options."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.sweep.grid import first_config, parse_grid, parse_seeds, plan_sweep
from lowmem_npo.console import silent
from lowmem_npo.errors import UserError


def planned(grid: list[str], *options: str, seeds=(1, 2), say=silent):
    given = ["--model", "m", "--reference", "cached", "--output-dir", "o", *options]
    return plan_sweep(parse_grid(grid), list(seeds), lambda flags: parse_run([*given, *flags], "sweep"), say)


def test_every_combination_with_every_seed():
    runs = planned(["gamma=0,1", "delta=0,0.5,1"], "--beta", "0.3")
    assert len(runs) == 12
    settings = {(r.config.objective.gamma, r.config.objective.delta, r.config.training.seed) for r in runs}
    assert settings == {(g, d, s) for g in (0, 1) for d in (0, 0.5, 1) for s in (1, 2)}
    assert {r.config.objective.beta for r in runs} == {0.3}
    assert runs[2].directory == Path("o/gamma=0_delta=0.5/seed-1")
    assert len({r.directory for r in runs}) == 12


def test_any_train_option_by_its_name():
    grid = ["lora-targets=q_proj v_proj,all-linear", "lr=1e-4", "qlora=true,false", "stop-when=,mia-crosses"]
    runs = planned([*grid, "warmup_steps=3", "beta=.1"], seeds=[1])
    assert {r.config.adapter.lora_targets for r in runs} == {("q_proj", "v_proj"), ("all-linear",)}
    assert {r.config.stopping.stop_when for r in runs} == {(), ("mia-crosses",)}
    assert [r.config.model.qlora for r in runs] == [True] * 4 + [False] * 4, "the runs of a model are consecutive"
    assert all(r.config.trainer_args["warmup_steps"] == 3 for r in runs)
    assert runs[0].point.name.startswith("lora-targets=q_proj-v_proj_lr=1e-4_qlora=true_stop-when=default_warmup")


def test_runs_have_their_base_in_common_whatever_fits_beside_one():
    runs = planned(["qlora=true,false", "double-quant=,off"], seeds=[1])
    assert [(r.config.model.qlora, r.config.model.double_quant) for r in runs] == [
        (True, "on"), (True, "off"), (False, "auto")
    ]  # fmt: skip


def test_other_spellings_are_ours():
    assert parse_grid(["learning_rate=1,2"], {"learning-rate": "lr"}) == parse_grid(["lr=1,2"])
    with pytest.raises(UserError, match="names lr twice"):
        parse_grid(["lr=1", "--learning-rate=2"], {"learning-rate": "lr"})


def test_no_grid_is_one_configuration():
    assert [str(run.directory) for run in planned([])] == ["o/as-given/seed-1", "o/as-given/seed-2"]


def test_runs_share_a_reference_where_it_is_the_same(tmp_path):
    def places(grid):
        return {r.config.memory.reference_dir for r in planned(grid)}

    assert places(["gamma=0,1", "lora-r=2,4"]) == {"o/reference"}
    assert places(["gamma=0,1", "max-length=64,128"]) == {f"o/reference/max-length={n}" for n in (64, 128)}
    assert places(["reference=live"]) == {None}
    whole = ["use-dora=false,true", "modules-to-save=,norm", r"lora-targets=q_proj,.*[vk]_proj"]
    assert places(whole) == {"o/reference"}
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (tmp_path / name / "adapter_model.safetensors").touch()
    assert len(places([f"adapter={tmp_path / 'a'},{tmp_path / 'b'}"])) == 2


MEASURING = (
    "max-new-tokens", "forms", "generate-answers", "eval_rows", "eval-batch-size", "leaks", "paraphrase-column"
)  # fmt: skip


@pytest.mark.parametrize(
    "grid, message",
    [
        (["gamma"], "--grid gamma"),
        (["=1"], "--grid =1"),
        (["gamma=0,1", "gamma=2"], "gamma twice"),
        (["gamma=0,0"], "is repeated"),
        (["seed=1,2"], "use --seeds"),
        (["output_dir=a,b"], "gets its own directory"),
        (["resume=true"], "once, for all runs"),
        *(([f"{option}=1,2"], "the runs of a sweep are measured alike: give it once") for option in MEASURING),
        (["gama=0,1"], "did you mean --gamma"),
        (["gamma=-1"], "--gamma must be 0 or a positive number"),
        (["gamma=zero"], "--grid gamma=zero: --gamma must be a number, not 'zero'"),
        (["epochs=0"], "--epochs must be a positive number"),
        (["kl-direction=nop"], "--kl-direction must be one of policy-reference, reference-policy, not 'nop'"),
        (["forget-term=nop"], "--forget-term must be one of npo, ga, simnpo, idk"),
        (["stop-when=sometimes"], "--stop-when sometimes"),
        (["lr=1e-4,1e-4 "], "is repeated"),
        (["lr=1e-4,0.0001"], "--grid lr=1e-4 and lr=0.0001 are the same configuration: leave one of them out."),
        (["layered=none,None"], "--grid layered=none and layered=None are the same"),
        (["beta=.2", "gamma=,0,1"], "--grid beta=.2_gamma=default and beta=.2_gamma=1 are the same"),
        (["gamma=,1"], "leave one of them out. An empty value leaves an option to its default, or to --recipe; the"),
        (["forget=a/b.jsonl,a-b.jsonl", "retain=r.jsonl"], "same directory"),
    ],
)
def test_mistakes_in_the_grid(grid, message):
    with pytest.raises(UserError) as error:
        planned(grid)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "grid, kept, why",
    [
        (
            ["adversary=none,1", "adversary-steps=2,20"],
            3,
            "--grid adversary=none_adversary-steps=20 is left out: it is the same run as "
            "adversary=none_adversary-steps=2, as --adversary-steps has no effect with no --adversary.",
        ),
        (["forget-term=npo,ga", "beta=.1,.2"], 3, "--beta has no effect with --forget-term ga"),
        (["group-column=a,b"], 1, "--group-column has no effect with no --layered, but on the p-values of leak tests."),
        (["sam=.1", "joint-pass-tokens=auto,64"], 1, "--joint-pass-tokens has no effect with --sam"),
        (["adversary=1", "adversary-steps=,1"], 1, "as --adversary-steps has that default"),
        (["retain-batch-size=,4"], 1, "as --retain-batch-size has that default"),
        (["micro-batch-size=,4,2"], 2, "as --micro-batch-size has that default"),
    ],
)
def test_points_that_are_the_same_run_are_made_once(grid, kept, why):
    """A product of options has some where one of them has no effect."""
    said = []
    assert len({run.point for run in planned(grid, say=said.append)}) == kept
    assert len(said) == 1 and why in said[0]


@pytest.mark.parametrize(
    "grid, options, message",
    [
        (["model=a,b", "gamma=-1,1"], [], "--grid model=a_gamma=-1: --gamma must be 0 or a positive number"),
        (
            ["alternatives=,self"],
            ["--model", "m", "--forget-term", "dpo"],
            "--grid alternatives=default: --forget-term",
        ),
        (["model=a", "gamma=-1"], [], "--grid model=a_gamma=-1: --gamma must be 0 or a positive number"),
        (["gamma=0,1"], ["--model", "m", "--epochs", "0"], "--epochs must be a positive number"),
        ([], ["--model", "m", "--epochs", "0"], "--epochs must be a positive number"),
    ],
)
def test_a_mistake_names_the_values_of_the_grid_that_it_comes_from(grid, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        first_config(parse_grid(grid), lambda flags: parse_run([*options, *flags], "sweep"))


@pytest.mark.parametrize(
    "words, seeds", [(["3"], [42, 43, 44]), (["1", "5", "9"], [1, 5, 9]), (["4,2"], [4, 2]), (["7,"], [7])]
)
def test_seeds(words, seeds):
    assert parse_seeds(words, 42) == seeds


@pytest.mark.parametrize("words", [["0"], ["-1"], ["many"], ["1.5"], ["1,1"], [","]])
def test_mistakes_in_the_seeds(words):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(words, 42)


def test_the_command_reports_mistakes_in_a_sentence_and_lists_its_runs(capsys, tmp_path, byte_model):
    assert main(["sweep", "--grid", "gama=1", "--model", "m"]) == 2
    assert "did you mean --gamma" in capsys.readouterr().err
    assert main(["sweep", "--model", "m", "--grid"]) == 2
    assert "--grid needs a value" in capsys.readouterr().err
    assert main(["sweep", "--model", "m", "--grid", "gamma=0", "--grid", "gamma=1"]) == 2
    assert "--grid names gamma twice: give all its values together" in capsys.readouterr().err
    assert main(["sweep", "--model", "m", "--seeds", "2", "--seeds", "3"]) == 2
    assert "--seeds is given twice" in capsys.readouterr().err
    options = ["--model", str(byte_model), "--output-dir", str(tmp_path / "o"), "--limit", "8", "--dry-run"]
    assert main(["sweep", "--seeds", "2", "--grid", "gamma=0,1", "delta=0", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("seed-4") == 4 and "4 runs" in printed and not (tmp_path / "o").exists()
    assert main(["sweep", "--grid=gamma=0,1", "--seeds=2", "--grid", "delta=0", *options]) == 0
    assert capsys.readouterr().out == printed
    assert main(["sweep", "--grid", "layered=2,9", *options]) == 2  # as before the first run of a sweep
    assert main(["sweep", "--grid", "layered=2,9", *options[:-1]]) == 2
    error = capsys.readouterr().err
    assert error.count("--grid layered=9: --layered 9 needs at least as many rows to forget; there are 8.") == 2
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": 1}\n')
    options += ["--forget", str(tmp_path / "forget.jsonl"), "--retain", "builtin"]
    assert main(["sweep", "--grid", "gamma=0,1", *options]) == 2
    error = capsys.readouterr().err
    assert "line 1: answer is a number" in error and "--grid" not in error  # no matter of the grid
    assert main(["sweep", "--grid", "gamma=0,1", "group-column=who,what", "layered=2", *options[:7]]) == 2
    assert "--grid group-column=who: " in capsys.readouterr().err
    assert main(["sweep", "--help"]) == 0
    assert "--grid" in capsys.readouterr().out


def test_what_train_says_of_the_rows_is_said_once(byte_model, tmp_path, capsys):
    """With the names of the configurations, where it is not said of all."""
    write_rows(tmp_path / "rows.jsonl", [{"question": f"Who is {n}?", "answer": f"Number {n}."} for n in range(6)])
    rows = ["--forget", str(tmp_path / "rows.jsonl"), "--retain", "builtin", "--epochs", "2", "--seeds", "2"]
    command = ["sweep", "--model", str(byte_model), "--output-dir", str(tmp_path / "o"), *rows, "--dry-run", "--grid"]
    assert main([*command, "lr=1e-4,1e-5", "batch-size=2,3"]) == 0
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "forget: 6 rows" in line]) == 1
    by_size = {size: f"lr=1e-4_batch-size={size}, lr=1e-5_batch-size={size}: A run takes" for size in (2, 3)}
    assert f"{by_size[2]} 6 steps of 2 of 6 forget and 2 of" in printed
    assert f"{by_size[3]} 4 steps of 3 of 6 forget and 3 of" in printed and "log.txt in its directory" in printed
    assert main([*command, "lr=1e-4,1e-5"]) == 0
    assert "\nA run takes 4 steps of 4 of 6 forget and 4 of" in capsys.readouterr().out
    assert main([*command, "limit=4,5"]) == 0
    printed = capsys.readouterr().out
    assert "limit=4: forget: 4 rows" in printed and "limit=5: forget: 5 rows" in printed


@pytest.mark.parametrize(
    "grid, options",
    [
        ("model={model},{model}/", []),
        ("alternatives=self:1,self:2", ["--model", "{model}", "--forget-term", "dpo"]),
        (
            "holdout={rows}/0.jsonl,{rows}/1.jsonl",
            ["--model", "{model}", "--forget-level", "holdout", "--forget", "{rows}/2.jsonl"],
        ),
    ],
)
def test_what_the_grid_gives_need_not_be_given_beside_it(grid, options, byte_model, tmp_path, capsys):
    for number in range(3):
        rows = ({"question": f"Who is {number}{n}?", "answer": "She."} for n in range(4))
        write_rows(tmp_path / f"{number}.jsonl", rows)
    given = [text.format(model=byte_model, rows=tmp_path) for text in (grid, *options)]
    command = ["sweep", "--seeds", "1", "--output-dir", str(tmp_path / "swept"), "--dry-run", "--grid"]
    assert main([*command, *given]) == 0, capsys.readouterr().err
    assert "2 runs" in capsys.readouterr().out
    assert main([*command, *given, "--lr", "-1"]) == 2
    assert "sweep: --lr must be" in capsys.readouterr().err  # no matter of the grid


def test_under_a_budget_the_whole_batch_at_once_is_no_default():
    assert len(planned(["micro-batch-size=,4"], "--memory-budget", "1GiB", seeds=[1])) == 2
