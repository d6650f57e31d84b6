"""Flags, aliases, configuration files, and which of them wins."""

import contextlib
from dataclasses import fields, make_dataclass, replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from lowmem_npo.cli import COMMANDS, main
from lowmem_npo.commands.arguments import parse_options, parse_run
from lowmem_npo.commands.ask import AskOptions
from lowmem_npo.commands.data import DataCommand
from lowmem_npo.commands.help_texts import COMMON, field_docstrings
from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.commands.spellings import ALIASES
from lowmem_npo.config import SECTIONS
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.settings import EvaluationConfig, EvaluationOptions
from lowmem_npo.training.arguments import check_trainer_args, npo_config
from lowmem_npo.training.honoured import FROM_PYTHON, HONOURED
from lowmem_npo.training.npo_config import NPOConfig

# Names other tools rely on.
PROMISED = (
    "model", "qlora", "forget", "retain", "output-dir", "batch-size", "retain-batch-size", "max-length", "max-steps",
    "epochs", "lr", "beta", "gamma", "delta", "lora-r", "lora-alpha", "lora-targets", "seed", "resume",
)  # fmt: skip


def test_promised_flags_are_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(["--help-all"], "train")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for flag in [*PROMISED, "config", "preview", "dry-run", "attn"]:
        assert f"--{flag}" in printed, flag


def test_a_made_class_has_the_help_of_its_bases(monkeypatch):
    """From Python 3.12 on, make_dataclass names the module that calls it, where there is no such class to be read."""
    made = make_dataclass("Made", [], bases=(EvaluationOptions,))
    monkeypatch.setattr(made, "__module__", __name__)
    texts = field_docstrings(made)
    assert texts == field_docstrings(EvaluationOptions) and texts["batch_size"]


def test_the_short_help_fits_a_screen_and_has_what_most_runs_need(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(["--help"], "train")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 104
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(flags) == sorted(f"--{name.replace('_', '-')}" for names in COMMON.values() for name in names)


@pytest.mark.parametrize(
    "typed, name, value",
    [
        (["--model_name_or_path", "m"], "model", "m"),
        (["--model-name-or-path=m"], "model", "m"),
        (["--model", "m", "--load_in_4bit"], "qlora", True),
        (["--model", "m", "--load-in-4bit", "True"], "qlora", True),
        (["--model", "m", "--qlora=false"], "qlora", False),
        (["--model", "m", "--learning_rate", "3e-5"], "lr", 3e-5),
        (["--model", "m", "--lora_r", "16"], "lora_r", 16),
        (["--model", "m", "--lora_target_modules", "a", "b"], "lora_targets", ["a", "b"]),
        (["--model", "m", "--num_train_epochs", "3"], "epochs", 3),
        (["--model", "m", "--warmup_steps", "5"], "warmup_steps", 5),
        (["--model", "m", "--lr-scheduler-type", "cosine"], "lr_scheduler_type", "cosine"),
        (["--model", "m", "--warmup_ratio", "0.1"], "warmup_steps", 0.1),
    ],
)
def test_spellings(typed, name, value):
    assert parse_run(typed, "train").flat()[name] == value


@pytest.mark.parametrize(
    "typed, name, value",
    [
        (["--qlora", "true"], "qlora", True),
        (["--load_in_4bit=True"], "qlora", True),
        (["--load-in-4bit", "no"], "qlora", False),
        (["--double-quant", "--qlora"], "double_quant", "on"),
        (["--no_double_quant"], "double_quant", "off"),
        (["--double_quant=false"], "double_quant", "off"),
        (["--double_quant"], "double_quant", "on"),
        (["--double-quant", "auto"], "double_quant", "auto"),
        (["--stream_weights", "yes"], "stream_weights", True),
    ],
)
def test_switches_are_spelled_alike_in_all_commands(typed, name, value):
    for command in ("train", "estimate", "sweep"):
        assert parse_run(["--model", "m", *typed], command).flat()[name] == value
    for kind, arguments in {AskOptions: ["run"], EvaluationConfig: ["--model", "m"]}.items():
        assert getattr(parse_options(kind, [*arguments, *typed], "c"), name) == value


@pytest.mark.parametrize("value", ["None", "none", "null", "off", "no", "false"])
def test_a_number_is_left_out_in_any_of_these_words(value, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"layered: {value}\n")
    for typed in (["--layered", value], [f"--layered={value}"], ["--config", str(file)]):
        config = parse_run(["--model", "m", "--recipe", "lasting", *typed], "train")
        assert config.training.layered is None and config.objective.adversary == 1.0
    assert parse_run(["--model", "m", "--revision", "off"], "train").model.revision == "off"  # a name, not a number


def test_trl_accumulation_means_a_step_of_all_micro_batches():
    trl = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    run = parse_run(["--model", "m", *trl], "train")
    assert (run.training.batch_size, run.training.micro_batch_size, run.training.micro_batches()) == (8, 2, 4)
    with pytest.raises(UserError, match="--micro-batch-size"):
        parse_run(["--model", "m", "--gradient_accumulation_steps", "4"], "train")
    more = parse_run(["--model", "m", "--per-device-train-batch-size=8", "--gradient-accumulation-steps=4"], "train")
    assert (more.training.batch_size, more.training.micro_batch_size) == (32, 8)
    for rows in (2, 8):  # a step has one micro-batch, unless something says otherwise
        of = parse_run(["--model", "m", f"--per_device_train_batch_size={rows}"], "train").training
        assert (of.batch_size, of.micro_batch_size) == (rows, rows)
    of = parse_run(["--model", "m", "--per-device-train-batch-size", "2", "--batch-size", "6"], "train").training
    assert (of.batch_size, of.micro_batch_size) == (6, 2)
    both = ["--per-device-train-batch-size", "8", "--micro-batch-size", "2"]
    for given in (both, both[2:] + both[:2]):  # as a line on memory advises
        of = parse_run(["--model", "m", *given], "train").training
        assert (of.batch_size, of.micro_batch_size) == (8, 2)
    with pytest.raises(UserError, match="per-device-train-batch-size must be a whole number, not 'x'"):
        parse_run(["--model", "m", "--per-device-train-batch-size", "x", "--micro-batch-size", "2"], "train")


def test_trl_accumulation_may_be_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("gradient_accumulation_steps: 4\n")
    given = ["--model", "m", "--config", str(tmp_path / "run.yaml"), "--per-device-train-batch-size", "2"]
    assert parse_run(given, "train").training.batch_size == 8
    (tmp_path / "run.yaml").write_text("per_device_train_batch_size: 8\n")
    assert parse_run(given[:4], "train").training.batch_size == 8
    of = parse_run(given, "train").training  # the command line wins
    assert (of.batch_size, of.micro_batch_size) == (2, 2)


def test_every_alias_leads_to_a_flag():
    ours = {field.name.replace("_", "-") for section in SECTIONS.values() for field in fields(section)}
    assert set(ALIASES.values()) <= ours
    assert not ours & set(ALIASES), "an alias hides a flag"


def test_a_template_goes_by_two_names_wherever_there_is_one(tmp_path):
    text = "Q: {prompt}"
    named = {AskOptions: ["run"], DataCommand: ["f.jsonl"], EvaluationConfig: ["--model", "m"]}
    for spelled in ([f"--prompt_template={text}"], ["--prompt-template", text]):
        for command in ("train", "estimate", "sweep"):
            assert parse_run(["--model", "m", *spelled], command).data.template == text
        for kind, arguments in named.items():
            assert parse_options(kind, [*arguments, *spelled], "c").template == text
    (tmp_path / "run.yaml").write_text(f"model: m\nprompt_template: '{text}'\n")
    assert parse_run(["--config", str(tmp_path / "run.yaml")], "train").data.template == text
    with pytest.raises(UserError, match="There is no option --prompt-template"):
        parse_options(MergeConfig, ["--adapter", "a", "--output-dir", "o", *spelled], "merge")


def test_a_file_holds_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nlearning_rate: 1e-3\nload_in_4bit: true\nlora_targets: [x, y]\nrevision: null\nwarmup_steps: 7\n"
    )
    run = parse_run(["--config", str(file), "--lora_r", "9"], "train").flat()
    assert (run["model"], run["lr"], run["qlora"], run["lora_targets"], run["lora_r"]) == (
        "m",
        1e-3,
        True,
        ["x", "y"],
        9,
    )
    assert run["warmup_steps"] == 7 and run["revision"] is None
    for typed in (["--config", str(file), "--lr", "2"], ["--lr", "2", "--config", str(file)]):
        assert parse_run(typed, "train").training.lr == 2


@pytest.mark.parametrize(
    "typed, message",
    [
        (["--model", "m", "--batchsize", "3"], "--batch-size"),
        (["--model", "m", "--evaluate", "tofu"], "There is no option --evaluate: `lowmem-npo"),  # not --eval-steps
        (["--model", "m", "--weight-decoy", "1"], "did you mean --weight-decay?"),
        (["--model", "m", "--warmup_steps", "many"], "--warmup-steps must be a number, not 'many'."),
        (["--model", "m", "--warmup-ratio", "5"], "warmup-ratio"),
        (["--model", "m", "--config", "absent.yaml"], "absent.yaml"),
        (["--model", "m", "--beta", "0"], "--beta"),
        (["--model", "m", "--gamma", "-1"], "--gamma"),
        (["--model", "m", "--batch-size", "0"], "--batch-size"),
        (["--model", "m", "--lora-r", "0"], "--lora-r"),
        (["--model", "m", "--epochs", "0"], "--epochs"),
        (["--model", "m", "--lr", "-1"], "--lr must be 0 or a positive number, not -1.0."),
        (["--model", "m", "--lr", "nan"], "--lr"),
        (["--model", "m", "--retain", "f.jsonl"], "--forget"),
        (["--model", "m", "--config"], "--config"),
    ],
)
def test_mistakes_end_in_one_sentence(typed, message, capsys):
    assert main(["train", *typed]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def planned(*typed):
    run = parse_run(["--model", "m", "--device", "cpu", *typed], "train")
    check_trainer_args(run)
    return npo_config(run)


@pytest.mark.parametrize("given", [["--warmup-steps", "4"], ["--warmup-ratio", "0.4"]])
@pytest.mark.parametrize("schedule", [[], ["--lr-scheduler-type", "constant"]])
def test_a_warm_up_warms_up(given, schedule):
    """The default schedule, `constant`, would ignore it."""
    args = planned("--max-steps", "10", *given, *schedule)
    assert args.lr_scheduler_type == "constant_with_warmup" and args.get_warmup_steps(10) == 4
    assert planned(*given, "--lr-scheduler-type", "cosine").lr_scheduler_type == "cosine"
    assert planned("--warmup-steps", "0").lr_scheduler_type == "constant"


@pytest.mark.parametrize(
    "typed, message",
    [
        (["--label-smoothing-factor", "0.3"], "--label-smoothing-factor 0.3 would have no effect: leave it out"),
        (["--neftune-noise-alpha", "5"], "no effect"),
        (["--train-sampling-strategy", "group_by_length"], "no effect"),
        (["--group-by-length", "true"], "There is no option"),
        (["--fp16"], "--dtype"),
        (["--bf16", "false"], "--dtype"),
        (["--bf16", "--dtype", "float32"], "--dtype"),
        (["--torch-compile"], "no effect"),
        (["--use-liger-kernel"], "no effect"),
        (["--eval-strategy", "epoch"], "--stop-when"),
        (["--load-best-model-at-end"], "--stop-when"),
        (["--per-device-eval-batch-size", "2"], "--eval-batch-size"),
        (["--deepspeed", "ds.json"], "no effect"),
        (["--fsdp", "full_shard"], "no effect"),
        (["--push-to-hub"], "no effect"),
        (["--use-cpu"], "--device cpu"),
        (["--torch-empty-cache-steps", "2"], "no effect"),
        (["--average-tokens-across-devices", "false"], "no effect"),
        (["--save-strategy", "best"], "not supported"),
        (["--save-strategy", "epoch", "--save-steps", "3"], "--save-strategy epoch"),
        (["--logging-strategy", "epoch", "--logging-steps", "3"], "--logging-strategy epoch"),
        (["--save-steps", "0"], "--save-steps must be a positive number, not 0.0."),
        (["--logging-steps", "1.5"], "logging_steps must be an integer"),
        (["--lr-scheduler-type", "reduce_lr_on_plateau"], "not supported"),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "--lr-scheduler-type cosine_with_min_lr: not valid"),
        (["--lr-scheduler-kwargs", "{no json"], "not valid"),
        (["--lr-scheduler-kwargs", '{"no": 1}', "--lr-scheduler-type", "cosine"], "'no'"),
        (["--lr-scheduler-kwargs", '{"num_cycles": 2}'], "no effect: --lr-scheduler-type constant takes none"),
        (["--lr-scheduler-kwargs", '{"num_cycles": 2}', "--warmup-steps", "2"], "constant_with_warmup takes none"),
        (
            ["--optim-args", "garbage"],
            "--optim adamw_torch_fused, --optim-args garbage: not valid, or not to be had here (",
        ),
        (["--optim-args", "momentum=0.9"], "no effect: --optim adamw_torch"),
        (["--optim", "schedule_free_adamw"], "not supported"),
        (["--optim", "galore_adamw"], "not supported"),
        (["--optim", "adamw_anyprecision"], "torchdistx"),
        (["--adam-beta1", "2"], "beta"),
        (["--warmup-steps", "-1"], "--warmup-steps must be 0 or a positive number, not -1.0."),
        (["--weight-decay", "-0.1"], "--weight-decay must be 0 or a positive number, not -0.1."),
        (["--run-name", "mine"], "--run-name would have no effect without --report-to"),
        (["--report-to", "notebook"], "--report-to must be one of none, all, "),
    ],
)
def test_no_argument_of_the_trainer_is_ignored_silently(typed, message):
    with pytest.raises(UserError) as error:
        planned(*typed)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [{"label_smoothing_factor": 0.3}, {"fp16": True}, {"eval_strategy": "epoch"}, {"torch_compile": True},
     {"neftune_noise_alpha": 5.0}, {"deepspeed": "ds.json"}, {"optim": "galore_adamw"},
     {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}],
)  # fmt: skip
def test_a_script_is_refused_what_has_no_effect(given, tmp_path):
    name = [*given][-1]
    with pytest.raises(UserError, match=f"{name}=(\\S+|{{.*}}) (would have no effect|is not supported)"):
        NPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)


def test_a_script_may_say_what_has_an_effect_and_change_it(tmp_path):
    args = NPOConfig(output_dir=str(tmp_path), use_cpu=True, warmup_steps=3, gradient_checkpointing=True, fp16=False)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert replace(args, learning_rate=2e-4, beta=0.1).warmup_steps == 3
    for done in ({"use_reentrant": False}, '{"use_reentrant": false}', {}, None):  # so layers are recomputed anyway
        NPOConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs=done)
    with pytest.raises(UserError, match="layers are recomputed with use_reentrant=False and nothing else"):
        NPOConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs={"every_n_layers": 2})


def test_what_is_done_anyway_may_be_said():
    args = planned(
        "--bf16", "--eval-strategy", "no", "--push-to-hub", "false", "--report-to", "none", "--ddp-backend", "gloo"
    )
    assert not args.bf16  # the weights are: no autocast around them
    assert planned("--dtype", "float32", "--bf16", "false", "--fp16", "false").save_strategy == "epoch"
    assert planned("--save-steps", "3").save_strategy == "steps"


def test_the_list_of_honoured_arguments_is_documented_and_exists():
    options = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    assert not [name for name in HONOURED if f"`--{name.replace('_', '-')}`" not in options]
    newer = {"activation_checkpointing"}  # than the oldest transformers
    assert {field.name for field in fields(TrainingArguments)} | newer >= HONOURED | FROM_PYTHON


def test_a_dry_run_refuses_what_has_no_effect(byte_model, tmp_path, capsys):
    code = main(["train", "--model", str(byte_model), "--dry-run", "--output-dir", str(tmp_path / "out"), "--fp16"])
    error = capsys.readouterr().err
    assert code == 2 and "--dtype" in error and "Traceback" not in error
    assert main(["estimate", "--model", str(byte_model), "--fp16"]) == 2


def test_a_dry_run_shows_the_settings_that_are_no_defaults_and_have_an_effect(byte_model, tmp_path, capsys):
    options = ["--model", str(byte_model), "--lr", "3e-4", "--simnpo-margin", "0.1", "--limit", "4", "--device", "cpu"]
    assert main(["train", *options, "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    shown = printed.partition(f"model: {byte_model}\n")[2].partition("All other options")[0]
    assert "lr: 0.0003\n" in shown and "limit: 4\n" in shown
    for name in ("double_quant", "simnpo_margin", "qlora", "gamma"):  # without an effect here, or defaults
        assert f"{name}:" not in printed
    assert len(shown.splitlines()) < 15 and "a run's run.yaml holds all" in printed
    assert main(["train", *options, "--double-quant", "off", "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "--double-quant has no effect with no --qlora." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["data", "ask", "evaluate", "merge", "report"])
def test_help_is_as_wide_as_the_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert not ended.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("text, message", [
    ("- a\n- b\n", "name: value"), ("model: [m\n", "not valid YAML"), ("nonsense: 3\nmodel: m", "--nonsense"),
    ("help: null", "no option --help:"), ("help: true", "no option --help:"), ('"": null', "no option --:"),
    ("1: null", "no option --1:"), ('"seed=3": null', "no option --seed=3: did you mean --seed?"),
    ("no_qlora: true", "no option --no_qlora: did you mean --qlora?"), ("no-double-quant: true", "--double-quant?"),
    (f"{'x' * 300}: 1", f"no option --{'x' * 198}…:"),
], ids=lambda text: text[:30])  # fmt: skip
def test_a_bad_file_is_named(text, message, tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "typed, message",
    [
        (
            "train --modle x",
            "There is no option --modle: did you mean --model? `lowmem-npo train --help-all` lists them.",
        ),
        ("evaluate --adpter x --limit 2", "There is no option --adpter: did you mean --adapter?"),
        ("merge --adpter x", "There is no option --adpter: did you mean --adapter? `lowmem-npo merge --help`"),
        ("ask r Who? --templte=plain", "There is no option --templte=plain: did you mean --template? `lowmem-npo ask"),
        ("train --model m --learning-rte 1", "There is no option --learning-rte: did you mean --learning-rate?"),
        ("train --model m --eval-stratgy no", "There is no option --eval-stratgy: did you mean --eval-strategy?"),
        ("train --model m --warmup 1", "There is no option --warmup: did you mean --warmup-"),
        ("estimate --model m --gqu t4", "There is no option --gqu: did you mean --gpu?"),
        ("sweep --model m --evalute tofu", "There is no option --evalute: did you mean --evaluate?"),
        ("schema --jsn", "'--jsn' belongs to no option; schema takes none"),
        ("evaluate nonsense", "'nonsense' belongs to no option"),
        ("train --model m nonsense", "'nonsense' belongs to no option"),
        ("train", "--model must be given"),
        ("train --warmup-steps 4", "--model must be given"),
        ("merge", "--adapter and --output-dir must be given"),
        ("ask", "RUN must be given"),
        ("ask --max_new_tokens=4 --no-json", "RUN must be given"),
        ("ask --mdoel m run Who?", "There is no option --mdoel: did you mean --model? `lowmem-npo ask --help`"),
        ("ask --adapter --json", "--adapter needs a value: the directory of a run or of an adapter."),
        ("report --adapter", "--adapter needs a value: the directory of a run or of an adapter."),
        ("train --model", "--model needs a value"),
        ("train --model m --lr x", "--lr must be a number, not 'x'"),
        ("train --model m --max-steps x", "--max-steps must be a whole number, not 'x'"),
        ("demo --seed 1.5", "--seed must be a whole number, not '1.5'"),
        ("train --model m --attn sdp", "--attn must be one of sdpa, flash_attention_2, eager, not 'sdp'"),
        ("sweep --model m --teach ful", "--teach must be one of full, lora, not 'ful'"),
        ("completion csh", "shell must be one of bash, zsh, fish, not 'csh'"),
    ],
)
def test_mistakes_that_tyro_explains_in_a_box_are_sentences(typed, message, capsys):
    assert main(typed.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lowmem-npo {typed.split()[0]}: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "merge --output-dir merged"])
def test_a_directory_that_belongs_to_no_option_is_a_run_or_a_model(command, tmp_path, capsys):
    assert main([*command.split(), str(tmp_path)]) == 2
    assert f"'{tmp_path}' belongs to no option: did you mean --adapter {tmp_path}? `" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    assert main([*command.split(), str(tmp_path)]) == 2
    assert f": did you mean --model {tmp_path}? `" in capsys.readouterr().err


def test_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert main([]) == 2
    assert main(["tarin"]) == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_help_speaks_of_none(command, capsys):
    """An option that may be left out is shown by its type or its choices."""
    with contextlib.suppress(SystemExit):
        main([command, "--help-all" if command == "train" else "--help"])
    printed = capsys.readouterr().out
    assert "None" not in printed and "(default: )" not in printed


def test_env_says_what_a_bug_report_needs(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("torch", "transformers", "bitsandbytes", "cuda", "host memory", "disk"))


def test_several_files_are_one_source():
    typed = ["--model", "m", "--forget", "a.txt", "b.txt", "c,d.txt", "--retain=r.jsonl", "--holdout", "h", "--qlora"]
    data = parse_run(typed, "train").data
    assert (data.forget, data.retain, data.holdout) == ("a.txt,b.txt,c,d.txt", "r.jsonl", "h")
