"""Every option has a range, and what is out of it is one sentence, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.config import SECTIONS, ObjectiveConfig, RunConfig, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.training.honoured import HONOURED, RANGES

OUT_OF_RANGE = [
    "--seed -1", "--seed 4294967296", "--lr nan", "--lr inf", "--lr 1e308", "--epochs inf", "--epochs nan",
    "--epochs 1e300", "--lora-dropout 1.0", "--lora-dropout -0.1", "--lora-dropout nan", "--lora-alpha 0",
    "--lora-alpha nan", "--lora-r 100000000", "--lora-layers 0-99999999999", "--eval-batch-size 0", "--eval-rows -1",
    "--gamma 1e308", "--delta inf", "--beta 1e-320", "--beta 1e308", "--simnpo-margin nan", "--preview -1",
    "--batch-size 99999999999999999999", "--max-steps 99999999999999999999", "--max-new-tokens 99999999999999",
    "--tile-mlp 99999999999999", "--memory-budget nan", "--fsdp full_shard", "--deepspeed x.json", "--push-to-hub",
    "--hub-token x", "--warmup-steps nan", "--warmup-ratio nan", "--weight-decay inf", "--adam-beta1 1.0",
    "--adam-beta2 nan", "--adam-epsilon -1", "--max-grad-norm nan", "--max-grad-norm -1", "--logging-steps nan",
    "--logging-steps inf", "--save-steps nan", "--save-steps 1.5", "--save-total-limit 0", "--data-seed -1",
    "--dataloader-num-workers -1", "--dataloader-num-workers 100000", "--stop-when retain-loss+" + "9" * 400,
    "--report-examples -1", "--report-examples 99999999999999999999", "--seed " + "9" * 5000, "--layered 1",
    "--layered-weight 1.5", "--reference-dir /dev/null", "--retain self:10001", "--lr abc", "--forms x", "--batch-size",
]  # fmt: skip


@pytest.mark.parametrize("option", OUT_OF_RANGE, ids=[option[:40] for option in OUT_OF_RANGE])
def test_what_is_out_of_range_is_one_sentence(option, byte_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "--model", str(byte_model), "--device", "cpu", "--output-dir", str(out), "--dry-run"]
    assert main([*command, *option.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and len(printed.err) < 700 and not out.exists()
    assert re.search(rf"{option.split()[0]}(?![\w-])", printed.err.replace("_", "-")), printed.err


@pytest.mark.parametrize("command", [
    "train --model m --forget", "train --model m --lora-layers", "evaluate --adapter", "evaluate --model m --retain",
    "ask run --template", "data", "merge --output-dir out --adapter", "report run --prove", "sweep --model m --holdout",
    "report", "train --config",
])  # fmt: skip
def test_an_empty_text_is_no_value(command, tmp_path, monkeypatch, capsys):
    """As a shell makes of a variable that is not set: all documents of the directory would be read, or no adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.txt").write_text("A document.")
    for empty in ("", " "):
        assert main([*command.split(), empty]) == 2
        printed = capsys.readouterr().err
        assert re.search(r": --[a-z-]+ must be a text that is not empty, not .*\.\n$", printed), printed


def numbers(hint) -> list:
    """The bare numbers among the kinds of a field."""
    kinds = [hint] if get_origin(hint) is Annotated else get_args(hint) or [hint]
    return [kind for kind in kinds if kind in (int, float)]


def test_every_number_has_a_range():
    for section in (*SECTIONS.values(), EvaluationConfig):
        hints = get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            assert not numbers(hints[field.name]), f"{section.__name__}.{field.name} has no range"
    assert RANGES.keys() <= HONOURED


@pytest.mark.parametrize("section", [s for s in SECTIONS.values() if s is not SECTIONS["model"]])
def test_defaults_are_in_range(section):
    section()


@pytest.mark.parametrize("value", ["4", 4.0, None, True, [4]])
def test_from_python_a_value_has_its_type(value):
    with pytest.raises(UserError, match="^--batch-size must be a whole number, not "):
        TrainingConfig(batch_size=value)


def test_an_integer_is_a_number():
    assert ObjectiveConfig(gamma=2).gamma == 2


def test_any_number_is_taken_or_refused(full):
    """Taken: what float32 and the machine can do; refused: in a sentence of one line."""
    fields = [
        (kind, field.name) for kind in SECTIONS.values() if kind is not SECTIONS["model"]
        for field in dataclasses.fields(kind) if isinstance(field.default, (int, float)) or field.default is None
    ]  # fmt: skip
    value = st.one_of(
        st.integers(), st.floats(), st.text(max_size=20), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)
    )

    @settings(max_examples=20_000 if full else 300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(fields), value)
    def check(field, value):
        kind, name = field
        try:
            options = kind(**{name: value})
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
        else:
            taken = getattr(options, name)
            assert not isinstance(taken, float) or (math.isfinite(taken) and abs(taken) <= 1e6)

    check()


def test_any_configuration_is_taken_or_refused(byte_model, tmp_path, capsys, full):
    """Some settings at once, in a file, with those of the Trainer among them."""
    names = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)] + [*HONOURED, "x", "fsdp"]
    words = ["auto", "on", "off", "all-linear", "npo", "0-3", "1e-4", "self:3", "builtin", "--lr", "'", "(a+"]
    value = st.one_of(
        st.integers(-2, 100), st.integers(), st.floats(), st.text(max_size=12), st.none(), st.booleans(),
        st.sampled_from(words), st.lists(st.integers(-1, 9) | st.text(max_size=4), max_size=3),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    )  # fmt: skip
    path, counts = tmp_path / "run.yaml", {"taken": 0, "refused": 0}

    @settings(
        max_examples=1_000 if full else 8, deadline=None, database=None, derandomize=not full,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.dictionaries(st.sampled_from(names), value, max_size=2))
    def check(content):
        path.write_text(yaml.safe_dump({"model": str(byte_model), **content}, allow_unicode=True), encoding="utf-8")
        try:
            config = parse_run(["--config", str(path)], "train")
        except (UserError, SystemExit) as error:
            message = str(error) if isinstance(error, UserError) else capsys.readouterr().err.strip()
            assert message and "Traceback" not in message and (isinstance(error, SystemExit) or "\n" not in message)
            counts["refused"] += 1
        else:
            again = parse_run(["--config", str(written(config, tmp_path))], "train")
            assert again.flat() == config.flat()  # but for what is of one invocation, as --preview
            counts["taken"] += 1

    check()
    print(f"configurations: {counts}")
    assert sum(counts.values()) >= 8 and (not full or min(counts.values()) > 100)


def written(config, folder):
    path = folder / "again.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


def test_a_run_is_still_made_of_its_sections(byte_model):
    assert RunConfig(model=SECTIONS["model"](model=str(byte_model))).training.batch_size == 4
