"""`lowmem-npo evaluate --adapter`: the base, the options and rows of the run that left it; other adapters and bases."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.chat_template_utils
import yaml
from helpers.evaluating import evaluate, fails, lume_files, result
from helpers.rows import write_rows
from helpers.tiny_models import SIZES, tiny_model
from peft import IA3Config, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoConfig

import lowmem_npo.data.chat
from lowmem_npo.cli import main
from lowmem_npo.commands import ask
from lowmem_npo.commands.evaluate import plan as planning
from lowmem_npo.commands.evaluate import run as running
from lowmem_npo.commands.questions import question
from lowmem_npo.console import silent
from lowmem_npo.files import file_sha256
from lowmem_npo.model.names import Base


@pytest.fixture
def files(tmp_path):
    return lume_files(tmp_path)


def adapter(base, folder, seed=0):
    """A saved adapter that changes the model, as `lowmem-npo train` leaves it."""
    from lowmem_npo.config import AdapterConfig, ModelConfig
    from lowmem_npo.model import attach_lora, load_model

    model = attach_lora(load_model(ModelConfig(model=str(base), dtype="float32", device="cpu")), AdapterConfig())
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(folder)
    return str(folder)


def test_an_adapter_is_not_compared_with_what_another_model_said_before(byte_model, files, capsys):
    """Of one family, with one tokenizer; and where its base has been fetched only since, as from the hub."""
    write_rows(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
    folder = adapter(byte_model, files / "adapter")
    shutil.copytree(byte_model, files / "other")
    weights = files / "other" / "model.safetensors"
    save_file({name: 2 * of for name, of in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert evaluate(files, files / "other", sets=["forget"], output="before") == 0
    compared = ["--device", "cpu", "--dtype", "float32", "--before", str(files / "before" / "evaluation.json")]
    compared += ["--forget", str(files / "forget.jsonl")]
    note = f"The earlier evaluation is of another model, '{files / 'other'}' (olmo, 2 layers"
    for out, patched in (("known", False), ("fetched", True)):
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch.setattr(planning, "Base", SimpleNamespace(here=lambda *_: Base()))
            assert main(["evaluate", "--adapter", folder, *compared, "--output-dir", str(files / out)]) == 0
        (told,) = [told for told in result(files, out)["notes"] if told.startswith("The earlier")]
        assert told.startswith(note) and told.endswith("nothing is compared with it.")
        assert "the model says 0 of 1 forget answers" in capsys.readouterr().out.splitlines()[-1]
    assert evaluate(files, files / "other", *compared[4:6], sets=["forget"], output="same") == 0
    assert not [told for told in result(files, "same")["notes"] if told.startswith("The earlier")]


def test_an_adapter_and_a_comparison_with_before(byte_model, files, capsys):
    write_rows(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
    folder = adapter(byte_model, files / "adapter")
    assert evaluate(files, byte_model, sets=["forget"], output="before") == 0
    before = str(files / "before" / "evaluation.json")
    options = ["--device", "cpu", "--dtype", "float32", "--forget", str(files / "forget.jsonl"), "--before", before]
    assert main(["evaluate", "--adapter", folder, *options]) == 0  # base model and directory follow from the adapter
    old, new = result(files, "before"), result(files, "adapter/evaluation")
    assert abs(new["answers"]["forget"]["nll"] - old["answers"]["forget"]["nll"]) > 0.01
    printed = capsys.readouterr().out
    assert "before" in printed and f"{new['answers']['forget']['nll']:.3f}" in printed
    said = new["fluency"]["forget"]  # of what the adapter says, without it
    assert said["rows"] + said["silent"] == 1 and old["fluency"] == {}
    assert "What is said, to the original model\nforget: NLL" in printed
    adapter(byte_model, files / "adapter", seed=1)
    fails(capsys, main(["evaluate", "--adapter", folder, *options, "--resume"]), "the adapter has changed")
    write_rows(files / "list.json", [])
    fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "list.json")]), "--before")
    (files / "other.json").write_text(json.dumps({"rows": {}, "leaks": {}, "notes": [], "answers": [1]}))
    fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "other.json")]), "must be an object")
    for part, key in (("answers", "forget"), ("leaks", "extraction")):  # else a traceback, once all is measured
        (files / "edited.json").write_text(json.dumps(result(files, "before") | {part: {key: {"nll": "0.1"}}}))
        fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "edited.json")]), "is damaged")


def test_a_resumed_evaluation_is_of_the_data_that_it_began_with(byte_model, files):
    """Of the run's, as many rows of it as the run had, and with its holdout for leak tests; or of what was named."""
    rows = [{"question": f"Who is {n}?", "answer": f"Number {n}."} for n in range(6)]
    data = {
        part: str(write_rows(files / f"{part}.jsonl", rows[2 * at :])) for at, part in enumerate(("forget", "rest"))
    }
    folder = adapter(byte_model, files / "adapter")
    (files / "adapter" / "run.yaml").write_text(
        f"model: {byte_model}\nforget: {data['forget']}\nholdout: {data['rest']}\nlimit: 2\nallow_overlap: true\n"
    )
    evaluate = ["evaluate", "--adapter", folder, "--device", "cpu", "--dtype", "float32"]
    assert main(evaluate) == 0
    assert main([*evaluate, "--resume", "--leaks", "extraction"]) == 0
    assert main([*evaluate, "--resume"]) == 0  # the same test once more
    assert [*result(files, "adapter/evaluation")["leaks"]] == ["extraction"]
    counts = result(files, "adapter/evaluation")["rows"]
    assert {part: of["in_set"] for part, of in counts.items()} == {"forget": 2, "holdout": 2}
    evaluate += ["--output-dir", str(files / "named")]
    assert main([*evaluate, "--forget", data["rest"], "--limit", "3"]) == 0
    assert main([*evaluate, "--resume", "--leaks", "extraction"]) == 0
    assert result(files, "named")["rows"] == {"forget": {"scored": 3, "in_set": 4}}
    settings = files / "named" / "settings.json"
    began = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: began[name] for name in began if name != "data_named"}))  # of before
    assert main([*evaluate, "--forget", data["rest"], "--resume", "--leaks", "extraction"]) == 0


def test_leak_tests_take_the_sets_that_are_not_named_from_the_run(byte_model, files, capsys):
    rows = [{"question": f"Who is {n}?", "answer": f"Number {n}."} for n in range(8)]
    parts = {"forget": rows[:4], "retain": rows[4:6], "holdout": rows[6:7], "unseen": rows[7:]}
    data = {part: str(write_rows(files / f"{part}.jsonl", of)) for part, of in parts.items()}
    folder = adapter(byte_model, files / "adapter")
    run = files / "adapter" / "run.yaml"
    named = "".join(f"{part}: {data[part]}\n" for part in ("forget", "retain", "holdout"))
    run.write_text(f"model: {byte_model}\nlimit: 3\n{named}")
    options = ["evaluate", "--adapter", folder, "--device", "cpu", "--dtype", "float32"]
    leaks = [*options, "--leaks", "extraction"]
    assert main([*leaks, "--holdout", data["unseen"]]) == 0
    assert f"Data: holdout {data['unseen']}; of the adapter's run forget {data['forget']}" in capsys.readouterr().out
    counts = {"forget": 3, "retain": 2, "holdout": 1}  # of the run's as many as it read
    assert {part: of["in_set"] for part, of in result(files, "adapter/evaluation")["rows"].items()} == counts
    for again in ([*options, "--resume"], [*leaks, "--holdout", data["unseen"], "--resume"]):
        assert main(again) == 0
    assert main([*leaks, "--retain", data["unseen"], "--dry-run", "--output-dir", str(files / "new")]) == 0
    printed = capsys.readouterr().out
    assert f"Data: retain {data['unseen']}; of the adapter's run forget {data['forget']}, holdout" in printed
    assert main([*leaks, "--forget", data["forget"], "--dry-run", "--output-dir", str(files / "new")]) == 0
    assert f"Data: forget {data['forget']}\n" in capsys.readouterr().out  # and no other set
    run.unlink()
    new = ["--output-dir", str(files / "new")]
    fails(capsys, main([*leaks, "--holdout", data["unseen"], *new]), "name them with --forget")


def test_an_adapter_that_is_replaced_while_it_is_loaded(byte_model, files, capsys, monkeypatch):
    write_rows(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
    folder, load = adapter(byte_model, files / "adapter"), running.load_base

    def slow_load(*arguments):  # meanwhile a run that goes on there ends
        adapter(byte_model, files / "adapter", seed=1)
        return load(*arguments)

    options = ["evaluate", "--adapter", folder, "--device", "cpu", "--dtype", "float32", "--forget"]
    options.append(str(files / "forget.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(running, "load_base", slow_load)
        fails(capsys, main(options), "has been replaced since the command began")
    assert not (files / "adapter" / "evaluation").exists()
    assert main(options) == 0
    digest = result(files, "adapter/evaluation", "settings.json")["digests"]["the adapter"]
    assert digest == file_sha256(files / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", "is damaged (line 1"),
        ("model: x\nmax_length: many\n", "max_length must be a whole number, not 'many'"),
        ("model: x\nlimit: all\n", "limit must be a whole number, not 'all'"),
        ("model: x\nsystem: [3]\n", "system must be text, not [3]"),
    ],
)
def test_settings_of_the_run_that_cannot_be_meant(byte_model, files, capsys, content, message):
    folder = adapter(byte_model, files / "adapter")
    (files / "adapter" / "run.yaml").write_text(content)
    fails(
        capsys, main(["evaluate", "--adapter", folder, "--forget", str(files / "forget.jsonl")]), "run.yaml'", message
    )
    (files / "adapter" / "run.yaml").write_text("\ufeffmodel: x\r\ndouble_quant: on\r\n", newline="")
    options = ["--forget", str(files / "forget.jsonl"), "--dry-run"]
    assert main(["evaluate", "--adapter", folder, *options]) == 0


def test_options_not_given_are_those_of_the_run(byte_model, files, capsys):
    """Rows, columns, template and length come from run.yaml: the adapter is evaluated on what it was trained on."""
    for part, answer in (("forget", "Rome"), ("retain", "Oslo")):
        write_rows(files / f"{part}.jsonl", [{"ask": f"Where {n}?", "say": answer * (n + 1)} for n in range(3)])
    folder, device = str(files / "run"), ["--dtype", "float32", "--device", "cpu"]
    data = [word for part in ("forget", "retain") for word in (f"--{part}", str(files / f"{part}.jsonl"))]
    form = ["--prompt-column", "ask", "--answer-column", "say", "--prompt-template", "Tell: {prompt}\n"]
    form += ["--max-length", "24"]
    assert main(["train", "--model", str(byte_model), *device, *data, *form, "--max-steps", "1", "--leaks", "none",
                 "--output-dir", folder]) == 0  # fmt: skip
    assert main(["evaluate", "--adapter", folder, *device]) == 0
    content, trained = result(files, "run/evaluation"), json.loads((files / "run" / "after.json").read_text())
    for part in ("forget", "retain"):
        assert content["answers"][part]["nll"] == pytest.approx(trained[part]["summary"]["nll"], rel=1e-5)
    other = ["--output-dir", str(files / "other"), "--prompt-template", "{prompt}"]
    assert main(["evaluate", "--adapter", folder, *device, *other]) == 0
    assert result(files, "other")["answers"]["forget"]["nll"] != pytest.approx(content["answers"]["forget"]["nll"])
    capsys.readouterr()

    (checkpoint,) = (files / "run").glob("checkpoint-*")
    assert main(["evaluate", "--adapter", str(checkpoint), *device]) == 0
    assert result(files, f"run/{checkpoint.name}/evaluation")["answers"] == content["answers"]
    before = ["--before", str(files / "run" / "evaluation" / "evaluation.json")]
    again = ["--output-dir", str(files / "again"), "--prompt-template", "{prompt}", "--max-length", "30"]
    assert main(["evaluate", "--adapter", folder, *device, *before, *again]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "and max_length 24: the two are not comparable" in printed, printed[-3000:]

    settings = (files / "run" / "run.yaml").read_text()
    (files / "run" / "run.yaml").write_text(settings.replace("limit: null", "limit: 2"))
    assert main(["evaluate", "--adapter", folder, *device, "--output-dir", str(files / "first")]) == 0
    assert result(files, "first")["rows"]["forget"] == {"scored": 2, "in_set": 2}
    code = main(["evaluate", "--adapter", folder, *device, "--max-length", "0"])
    fails(capsys, code, "--max-length must be at least 2, not 0")


def test_a_file_without_the_named_columns_has_those_that_are_recognised(byte_model, files, capsys):
    write_rows(files / "forget.jsonl", [{"ask": "Where?", "say": "Rome."}])
    write_rows(files / "retain.jsonl", [{"question": "Where?", "answer": "Oslo."}])
    data = [word for part in ("forget", "retain") for word in (f"--{part}", str(files / f"{part}.jsonl"))]
    command = ["evaluate", "--model", str(byte_model), *data, "--dry-run", "--answer-column", "say"]
    assert main([*command, "--prompt-column", "ask"]) == 0
    printed = capsys.readouterr().out
    assert "forget: written as '{prompt}'" in printed and "retain: written as 'Question: " in printed
    fails(capsys, main([*command, "--prompt-column", "asked"]), "--prompt-column asked: no file has such a column")


def test_a_chat_model_is_asked_in_one_form_by_train_evaluate_and_leak_tests(byte_model, files, capsys):
    chat = files / "chat"
    shutil.copytree(byte_model, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for part, answer in (("forget", "Rome"), ("retain", "Oslo")):
        write_rows(files / f"{part}.jsonl", [{"question": f"Where {n}?", "answer": answer * (n + 1)} for n in range(3)])
    folder, device = str(files / "run"), ["--dtype", "float32", "--device", "cpu"]
    data = [word for part in ("forget", "retain") for word in (f"--{part}", str(files / f"{part}.jsonl"))]
    assert main(["train", "--model", str(chat), *device, *data, "--system", "Be brief.", "--max-steps", "1",
                 "--output-dir", folder]) == 0  # fmt: skip
    assert "columns question/answer, written with the model's chat template" in capsys.readouterr().out
    assert main(["evaluate", "--adapter", folder, "--leaks", "extraction", *device]) == 0
    assert "forget: written with the model's chat template" in capsys.readouterr().out
    content, trained = result(files, "run/evaluation"), json.loads((files / "run" / "after.json").read_text())
    leaks = json.loads((files / "run" / "leaks.json").read_text())["after"]["extraction"]
    for part in ("forget", "retain"):
        assert content["answers"][part]["nll"] == pytest.approx(trained[part]["summary"]["nll"], rel=1e-5)
    assert content["leaks"]["extraction"]["nll"] == pytest.approx(leaks["nll"], rel=1e-5)
    for form in (["--template", "plain"], ["--system", "Be long."]):
        assert main(["evaluate", "--adapter", folder, *device, "--output-dir", str(files / form[1]), *form]) == 0
        assert result(files, form[1])["answers"]["forget"]["nll"] != pytest.approx(content["answers"]["forget"]["nll"])


def test_a_run_keeps_the_date_that_its_chat_template_writes(byte_model, files, monkeypatch, capsys):
    """Resumed, measured and asked on another day; one that does not record it is another run by then."""
    base, folder, form = files / "dated", files / "run", ["--dtype", "float32", "--device", "cpu"]
    shutil.copytree(byte_model, base)
    (base / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )

    def on(day, *arguments):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        for module in (lowmem_npo.data.chat, transformers.utils.chat_template_utils):
            monkeypatch.setattr(module, "datetime", Clock)
        lowmem_npo.data.chat.today.cache_clear()
        code = main([*map(str, arguments)])
        said = capsys.readouterr()
        print(said.err)
        return code, said

    for part, answer in (("forget", "Rome"), ("retain", "Oslo")):
        write_rows(files / f"{part}.jsonl", [{"question": f"Where {n}?", "answer": answer * (n + 1)} for n in range(3)])
    rows = [word for part in ("forget", "retain") for word in (f"--{part}", files / f"{part}.jsonl")]
    train = ["train", "--model", base, *form, *rows, "--max-steps", 2, "--save-steps", 1, "--output-dir", folder]
    assert on("2026-11-24", *train)[0] == 0
    assert yaml.safe_load((folder / "run.yaml").read_text())["chat_date"] == "2026-11-24"
    (folder / "report.json").unlink()
    assert on("2026-11-25", *train, "--resume")[0] == 0
    preview = on("2026-11-25", *train[:-2], "--output-dir", files / "other", "--preview", 1)[1].out
    assert "25 Nov 2026" in preview
    assert "24 Nov 2026" in on("2026-11-25", *train[:-2], "--preview", 1, "--chat-date", "2026-11-24")[1].out
    trained = json.loads((folder / "after.json").read_text())["forget"]["summary"]["nll"]
    assert on("2026-11-25", "evaluate", "--adapter", folder, *form)[0] == 0
    assert result(files, "run/evaluation")["answers"]["forget"]["nll"] == pytest.approx(trained, rel=1e-5)
    options = ["--adapter", folder, *form, "--output-dir", files / "fifth", "--chat-date", "2026-11-05"]
    assert on("2026-11-25", "evaluate", *options)[0] == 0
    assert result(files, "fifth")["answers"]["forget"]["nll"] != pytest.approx(trained, rel=1e-5)
    asked = ask.load(ask.AskOptions(run=str(folder), device="cpu"), silent)
    assert "24 Nov 2026" in asked.tokenizer.decode(asked.prompt(question("Where 1?")))
    merge = ["merge", "--adapter", folder, "--device", "cpu", "--quantize-check", "--output-dir"]
    assert on("2026-11-25", *merge, files / "merged")[0] == 0
    recorded = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(recorded.replace("chat_date: '2026-11-24'\n", ""))
    assert "the forget rows have changed" in on("2026-11-25", *merge, files / "again")[1].err
    assert "the forget rows have changed" in on("2026-11-25", *train, "--resume")[1].err
    assert "--chat-date must be auto or a date" in on("2026-11-25", *train, "--chat-date", "today")[1].err


def test_an_adapter_of_another_kind(byte_model, files, capsys):
    """Of a learnt prompt only what the model writes would be the adapter's, and likelihoods the base model's."""
    kinds = {"IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])}
    kinds["PROMPT_TUNING"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for kind, config in kinds.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(byte_model), config).save_pretrained(files / kind)
        options = ["--adapter", str(files / kind), "--device", "cpu", "--forget", str(files / "forget.jsonl")]
        fails(capsys, main(["evaluate", *options, "--leaks", "relearning"]), f"is '{kind}', not LoRA")


def test_the_base_is_loaded_in_the_adapters_revision(byte_model, files, monkeypatch):
    from lowmem_npo.commands.evaluate import run as module

    folder, revisions = adapter(byte_model, files / "adapter"), []
    path = files / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "step1000"}))
    real = module.load_base
    monkeypatch.setattr(
        module, "load_base", lambda config, *how: revisions.append(config.revision) or real(config, *how)
    )
    write_rows(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
    options = ["--adapter", folder, "--device", "cpu", "--forget", str(files / "forget.jsonl"), "--output-dir"]
    assert main(["evaluate", *options, str(files / "a")]) == 0
    assert main(["evaluate", *options, str(files / "b"), "--revision", "main"]) == 0
    assert revisions == ["step1000", "main"]


def test_an_adapter_of_another_model(byte_model, files, capsys, tmp_path):
    folder = adapter(byte_model, files / "adapter")
    other = tmp_path / "other"
    shutil.copytree(byte_model, other)
    fails(capsys, evaluate(files, other, "--adapter", folder), f"was trained on '{byte_model}'", "--any-base")
    assert evaluate(files, other, "--adapter", folder, "--any-base", "--limit", "1", sets=["forget"]) == 0
    for config in (
        OlmoConfig(vocab_size=258, eos_token_id=1, **{**SIZES, "hidden_size": 64}),  # other shapes
        OlmoConfig(vocab_size=258, eos_token_id=1, **{**SIZES, "num_hidden_layers": 1}),  # a layer that is not there
        OlmoConfig(vocab_size=258, eos_token_id=1, **{**SIZES, "num_hidden_layers": 3}),  # one that the adapter lacks
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
        fails(capsys, evaluate(files, other, "--adapter", folder, "--any-base", output="x"), "another model")
        assert not (files / "x").exists()  # what is refused leaves nothing
    tiny_model("olmo", 258).save_pretrained(other)
    (files / "empty").mkdir()
    fails(capsys, evaluate(files, other, "--adapter", str(files / "empty")), "holds no adapter")
    fails(capsys, evaluate(files, other, "--adapter", str(files / "nowhere")), "There is no directory")
    fails(capsys, main(["evaluate"]), "--model")
