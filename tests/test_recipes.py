"""`--recipe`: what it sets, what wins over it, and that every command that reads a run's options knows it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
import yaml

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.schema import run_schema
from lowmem_npo.config import ModelConfig, ObjectiveConfig, Recipe, RunConfig, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.idle_options import remarks_on_idle_options
from lowmem_npo.recipes import OPTIONS, RECIPES, remark, with_recipe

ADAPTER = "--lora-targets all-linear --lora-r 16 --lora-alpha 64"
LASTING = f"Recipe lasting: --layered 2 --adversary 1 --adversary-steps 20 {ADAPTER}"


def parsed(*flags):
    return parse_run(["--model", "any", *map(str, flags)], "train")


def options(config):
    return config.training.layered, config.objective.adversary, config.adapter.lora_r


def test_every_recipe_has_a_name_and_the_paper_s_is_the_default():
    assert get_args(Recipe) == tuple(RECIPES)
    assert parsed().training.recipe == "paper" and options(parsed()) == (None, None, 5) and remark(parsed()) is None
    assert parsed() == parsed("--recipe", "paper")
    assert (
        options(parsed("--recipe=lasting")) == (2, 1.0, 16) and remark(parsed("--recipe", "lasting")) == f"{LASTING}."
    )


@pytest.mark.parametrize(
    "flags, expected, line",
    [
        (
            ("--layered", 5),
            (5, 1.0, 16),
            f"Recipe lasting: --adversary 1 --adversary-steps 20 {ADAPTER}; --layered 5 as given, which wins.",
        ),
        (
            ("--adversary", 0.5, "--lora-r", 8),
            (2, 0.5, 8),
            "Recipe lasting: --layered 2 --adversary-steps 20 --lora-targets all-linear --lora-alpha 64; "
            "--adversary 0.5 --lora-r 8 as given, which wins.",
        ),
        (("--layered", 2, "--sam", 0.05), (2, 1.0, 16), f"{LASTING}."),
        (
            ("--layered", 3, "--adversary", 2, "--adversary-steps", 1),
            (3, 2.0, 16),
            f"Recipe lasting: {ADAPTER}; --layered 3 --adversary 2 --adversary-steps 1 as given, which wins.",
        ),
        (  # which takes no steps
            ("--adversary", "None"),
            (2, None, 16),
            f"Recipe lasting: --layered 2 {ADAPTER}; no --adversary as given, which wins.",
        ),
    ],
)
def test_a_given_option_wins_and_is_named(flags, expected, line, tmp_path):
    for order in (("--recipe", "lasting", *flags), (*flags, "--recipe", "lasting")):
        assert options(parsed(*order)) == expected and remark(parsed(*order)) == line
    file = tmp_path / "run.yaml"  # a file's options are given, too
    file.write_text("".join(f"{flag[2:]}: {value}\n" for flag, value in zip(flags[::2], flags[1::2], strict=True)))
    config = parsed("--config", file, "--recipe", "lasting")
    assert options(config) == expected and remark(config) == line


def test_the_paper_s_recipe_names_what_is_given_beside_it():
    assert remark(parsed("--layered", 3)) is None
    config = parsed("--recipe", "paper", "--layered", 3)
    assert options(config) == (3, None, 5) and remark(config) == (
        "Recipe paper: the defaults; --layered 3 as given, which wins."
    )


def test_a_run_s_settings_name_no_recipe_where_none_was_named(tmp_path):
    """They record the default; whoever writes it into another file names it."""
    run, named = tmp_path / "run.yaml", tmp_path / "settings.yaml"
    for file in (run, named):
        file.write_text(parsed("--layered", 3, "--output-dir", tmp_path).to_yaml())
    resumed, again = (
        parse_run(given, "train") for given in (["--resume", "--output-dir", str(tmp_path)], ["--config", str(run)])
    )
    assert resumed.training.recipe == "paper" and options(resumed) == options(again) == (3, None, 5)
    assert remark(resumed) is remark(again) is None
    assert remark(parse_run(["--config", str(named)], "train")).startswith("Recipe paper: the defaults; --layered 3 as")
    assert remark(parse_run(["--config", str(run), "--recipe", "paper"], "train")) is not None


def test_a_run_s_settings_hold_the_recipe_and_what_it_became(tmp_path):
    settings = yaml.safe_load(parsed("--recipe", "lasting", "--layered", 4).to_yaml())
    assert (settings["recipe"], settings["layered"], settings["adversary"]) == ("lasting", 4, 1.0)
    file = tmp_path / "run.yaml"
    file.write_text(parsed("--recipe", "lasting", "--layered", 4).to_yaml())
    again = parse_run(["--config", str(file)], "train")
    assert again == parsed("--recipe", "lasting", "--layered", 4)
    for name in ("--layered", "--adversary"):  # what is switched off within it stays so
        chosen = parsed("--recipe", "lasting", name, "None")
        file.write_text(chosen.to_yaml())
        assert options(parse_run(["--config", str(file)], "train")) == options(chosen)
    plain = tmp_path / "plain.yaml"
    plain.write_text(parsed("--lora-alpha", 7).to_yaml())  # whose own options are those of its recipe, but for one
    config = parse_run(["--config", str(plain), "--recipe", "lasting"], "train")
    assert options(config) == (2, 1.0, 16) and config.adapter.lora_alpha == 7
    assert config.adapter.lora_targets == ("all-linear",)


@pytest.mark.parametrize("named", ["", "recipe: null\n", "recipe: lasting\n"])
def test_null_in_a_file_leaves_an_option_out_wherever_the_recipe_is_named(named, tmp_path):
    file = tmp_path / "settings.yaml"
    flags = ("--config", file, *(() if "lasting" in named else ("--recipe", "lasting")))
    file.write_text(f"{named}layered: null\n")
    config = parsed(*flags)
    assert options(config) == (None, 1.0, 16) and remark(config).endswith("; no --layered as given, which wins.")
    assert options(parsed(*flags, "--layered", 3)) == (3, 1.0, 16)
    file.write_text(named + "".join(f"{option.replace('_', '-')}: null\n" for option in OPTIONS))
    config = parsed(*flags)
    assert config == replace(parsed(), training=replace(parsed().training, recipe="lasting"))
    assert remark(config).startswith(
        "Recipe lasting: nothing; no --layered no --adversary --lora-targets q_proj v_proj"
    )
    file.write_text("".join(f"{option}: null\n" for option in OPTIONS))
    assert parsed("--config", file) == parsed() and remark(parsed("--config", file)) is None


def test_null_in_a_file_of_another_recipe_is_that_recipe_s_own(tmp_path):
    """As a run's settings have it, of which the docs say that they give way."""
    file = tmp_path / "settings.yaml"
    file.write_text("recipe: paper\nlayered: null\nadversary: null\n")
    assert options(parsed("--config", file, "--recipe", "lasting")) == (2, 1.0, 16)
    file.write_text("recipe: lasting\nlora_targets: all-linear\nlora_alpha: 64\n")  # without brackets, without a point
    assert parsed("--config", file, "--recipe", "paper").adapter == parsed().adapter


def test_what_does_not_go_with_the_recipe_is_a_sentence_that_names_it():
    with pytest.raises(UserError, match="--recipe lasting: --layered holds the folds whose turn has not come"):
        parsed("--recipe", "lasting", "--gamma", 0, "--delta", 0)
    with pytest.raises(UserError, match="^--adversary-steps must be at least 1"):  # which is not the recipe's
        parsed("--recipe", "lasting", "--adversary-steps", 0)
    with pytest.raises(UserError, match="--recipe must be one of paper, lasting, not 'forever'"):
        parsed("--recipe", "forever")


def test_a_script_s_run_has_the_recipe_s_options():
    config = with_recipe(RunConfig(ModelConfig("any"), training=TrainingConfig(recipe="lasting")))
    assert options(config) == (2, 1.0, 16) and with_recipe(config) == config
    own = RunConfig(
        ModelConfig("any"), objective=ObjectiveConfig(adversary=2.0), training=TrainingConfig(recipe="lasting")
    )
    assert options(with_recipe(own)) == (2, 2.0, 16)


def test_schema_estimate_and_sweep_know_it(byte_model, tmp_path, capsys):
    assert run_schema()["properties"]["recipe"]["enum"] == ["paper", "lasting"]
    flags = ["--model", str(byte_model), "--recipe", "lasting", "--max-length", "64"]
    assert main(["estimate", *flags, "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert estimated["notes"][0] == f"{LASTING}." and estimated["by_kind"]["adversary"] > 0
    assert main(["sweep", "--grid", "recipe=paper,lasting", "--seeds", "1", *flags[:2], "--dry-run"]) == 0
    assert "recipe=lasting/seed-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), []),
        (("--adversary-steps", "5"), ["adversary-steps"]),
        (("--group-column", "person", "--layered-weight", "0.3"), ["layered-weight"]),
        (("--group-column", "person", "--layered", "2"), []),
        (("--group-column", "person", "--recipe", "lasting"), []),
        (("--alternative-column", "other", "--refusal", "No."), ["refusal", "alternative-column"]),
        (("--alternative-column", "other", "--forget-term", "dpo", "--normalization", "token"), ["normalization"]),
        (("--refusal", "No.", "--forget-term", "jensun", "--beta", "0.1"), ["beta"]),
        (("--layered", "2", "--layered-weight", "0.5"), ["layered-weight"]),  # the second stage is the last
        (("--layered", "3", "--layered-weight", "0.5"), []),
        (("--satimp-beta1", "5"), []),  # the default, as a run's own settings name it
        (("--joint-pass-tokens", "64"), []),
        (("--joint-pass-tokens", "64", "--adversary", "1", "--sam", "0.05"), ["joint-pass-tokens"]),
        (("--joint-pass-tokens", "64", "--sam", "0.05"), ["joint-pass-tokens"]),
        (("--joint-pass-tokens", "0", "--sam", "0.05"), []),  # as a run's own settings say it
        (("--joint-pass-tokens", "64", "--delta", "0"), ["joint-pass-tokens"]),
        (("--joint-pass-tokens", "64", "--delta", "0", "--forget-term", "ga"), []),
        (("--delta", "0", "--gamma", "0", "--kl-direction", "reference-policy", "--retain-batch-size", "2"),
         ["kl-direction", "retain-batch-size"]),
    ],
)  # fmt: skip
def test_an_option_that_nothing_uses_is_named(flags, named):
    lines = remarks_on_idle_options(parsed("--forget", "f.jsonl", *flags))
    assert [line.partition(" has no effect with ")[0] for line in lines] == [f"--{name}" for name in named]


def test_a_run_says_so_and_its_merged_weights_where_it_lasts(byte_model, tmp_path, capsys):
    flags = ["--model", str(byte_model), "--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--limit", "12"]
    flags += ["--max-steps", "3", "--eval-rows", "0", "--output-dir", str(tmp_path / "run"), "--recipe", "lasting"]
    assert main(["train", *flags, "--dry-run"]) == 0
    assert f"{LASTING}.\n" in capsys.readouterr().out
    assert main(["train", *flags]) == 0
    assert f"{LASTING}.\n" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| recipe | `lasting` |" in card and "| layered | `2` |" in card
    assert "| adversary_steps | `1` |" in card
    settings, place = tmp_path / "run" / "run.yaml", flags[-4:-2]
    for again in (["--config", str(settings), *place[:1], str(tmp_path / "again"), "--dry-run"], [*place, "--resume"]):
        capsys.readouterr()
        assert main(["train", *again]) == 0
        assert f"{LASTING}.\n" in capsys.readouterr().out, "20 is the recipe's, though 1 was used"
    config = parsed("--config", settings, "--recipe", "paper")
    assert options(config) == (None, None, 5) and remarks_on_idle_options(config) == []
    assert main(["merge", "--adapter", str(tmp_path / "run"), "--output-dir", str(tmp_path / "merged")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == (
        "What --recipe lasting made last is a property of these merged weights: publish them, and not the adapter, "
        "which is undone beside its base by switching it off."
    )
    assert last.split(":")[0] in " ".join((tmp_path / "merged" / "README.md").read_text().split())
