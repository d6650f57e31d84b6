"""The JSON Schema of a configuration: it takes what the command line takes, and refuses what that refuses."""

from __future__ import annotations

import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.config import SECTIONS
from lowmem_npo.errors import UserError


@pytest.fixture(scope="module")
def validator():
    from lowmem_npo.commands.schema import run_schema

    schema = json.loads(json.dumps(run_schema()))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def accepted(content, folder):
    """Whether `--config` takes it."""
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    try:
        parse_run(["--config", str(folder / "run.yaml"), *([] if "model" in content else ["--model", "x"])], "train")
    except (UserError, SystemExit):
        return False
    return True


def test_the_command_prints_it(validator, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == validator.schema
    assert main(["schema", "run.yaml"]) == 2


def test_every_option_is_described(validator):
    properties = validator.schema["properties"]
    fields = [name for section in SECTIONS.values() for name in section.__dataclass_fields__]
    assert set(fields) <= set(properties)
    assert all(len(properties[name]["description"]) > 3 for name in properties)
    assert properties["lr"]["default"] == 1e-4 and properties["dtype"]["enum"] == ["bf16", "float32"]


def test_the_run_yaml_of_a_run_is_valid(validator, byte_model, tmp_path):
    options = "--device cpu --dtype float32 --limit 2 --max-steps 1 --eval-rows 0 --save-steps 5"
    assert main(["train", "--model", str(byte_model), *options.split(), "--output-dir", str(tmp_path / "run")]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert [error.message for error in validator.iter_errors(settings)] == []


@pytest.mark.parametrize(
    "options",
    [
        "--qlora --lora-layers 1 4-8 --lora-targets all-linear --tile-mlp",
        "--report-to tensorboard --run-name r --project p --save-strategy steps --save-steps 5 --logging-steps 0.5",
        "--lr-scheduler-type cosine --warmup-ratio 0.1 --weight-decay 0.01 --optim sgd --adam-beta1 0.8",
        "--forget a.jsonl,b.jsonl --retain self:8 --holdout c --stop-when forget-at-holdout retain-loss+10%",
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-3 --leaks none",
    ],
    ids=["qlora", "logging", "schedule", "stopping", "trl"],
)
def test_what_is_written_as_run_yaml_is_valid(validator, options):
    settings = yaml.safe_load(parse_run(["--model", "x", *options.split()], "train").to_yaml())
    assert [error.message for error in validator.iter_errors(settings)] == []


@pytest.mark.parametrize(
    "content",
    [
        {"model": "allenai/OLMo-7B", "forget": "forget.jsonl", "lr": 0.001},
        {"forget": ["a.txt", "b.txt"], "retain": "builtin"},
        {"lora_targets": "all-linear", "lora_layers": [1, "4-8"]},
        {"learning_rate": 0.001, "num_train_epochs": 3, "load_in_4bit": True},
        {"lora_targets": ["q_proj"], "stop_when": None, "max_steps": None},
        {"tile_mlp": 512, "memory_budget": "24GiB", "gradient_checkpointing": False},
    ],
    ids=lambda content: "-".join(content),
)
def test_files_that_are_right(validator, tmp_path, content):
    assert validator.is_valid(content) and accepted(content, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"lora_rank": 5},
        {"lora_r": "five"},
        {"lora_r": 0},
        {"lora_r": 2.5},
        {"beta": 0},
        {"beta": -1.0},
        {"lr": -0.1},
        {"gamma": -0.5},
        {"batch_size": 0},
        {"micro_batch_size": 0},
        {"max_steps": 0},
        {"epochs": 0},
        {"stop_patience": 0},
        {"report_examples": -1},
        {"dtype": "fp16"},
        {"device": "tpu"},
        {"normalization": "tokens"},
        {"qlora": "maybe"},
        {"passages": "half"},
    ],
    ids=lambda content: "-".join(f"{name}={value}" for name, value in content.items()),
)
def test_files_that_are_wrong(validator, tmp_path, capsys, content):
    errors = list(validator.iter_errors(content))
    assert len(errors) == 1 and (errors[0].path or "lora_rank" in errors[0].message)
    assert not accepted(content, tmp_path)
