"""`lowmem-npo evaluate` as a user runs it: real models and files; interrupted, resumed, and with bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import SIZES, tiny_model
from peft import IA3Config, PromptTuningConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoConfig

from lowmem_npo.cli import main
from lowmem_npo.commands.evaluate import run as running
from lowmem_npo.commands.evaluate.plan import _digests, _notes
from lowmem_npo.data import Rows
from lowmem_npo.evaluation.benchmarks import lm_eval as harness
from lowmem_npo.evaluation.directory import EvaluationDirectory
from lowmem_npo.evaluation.scoring import scorer as measuring
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import file_sha256

NAMES = ("Ada", "Bo", "Cy")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lume_file(path, who):
    """One completion and one question of every task."""
    rows = []
    for task, name in zip(("Task1", "Task2", "Task3"), NAMES, strict=True):
        rows.append({"id": f"{name}sc1", "input": f"{who} {name} went", "output": "o to the o d sea", "task": task})
        rows.append({"id": f"{name}qa0", "input": f"Where is {who} {name}?", "output": "Rome", "task": task})
    return write(path, rows)


@pytest.fixture
def files(tmp_path):
    lume_file(tmp_path / "forget.jsonl", "Miss")
    lume_file(tmp_path / "retain.jsonl", "Mister")
    write(tmp_path / "members.jsonl", [{"id": str(n), "document": f"A member named {n}"} for n in range(4)])
    write(tmp_path / "others.jsonl", [{"id": str(n), "document": f"{n}{n} somebody else"} for n in range(3)])
    return tmp_path


def evaluate(files, model, *more, sets=("forget", "retain"), output="out"):
    data = [word for name in sets for word in (f"--{name}", str(files / f"{name}.jsonl"))]
    return main(["evaluate", "--model", str(model), "--dtype", "float32", "--device", "cpu", *data,
                 "--output-dir", str(files / output), *more])  # fmt: skip


def result(files, output="out", name="evaluation.json"):
    return json.loads((files / output / name).read_text())


def fails(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2, out
    line = err.strip().splitlines()[-1]
    assert line.startswith("lowmem-npo evaluate: ") and "Traceback" not in err
    assert all(message in line for message in messages), line


@pytest.fixture(scope="module")
def brief_model(byte_model, tmp_path_factory):
    """A byte model that prefers a few letters, the space and the end of the sequence: short answers with words."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = tiny_model("olmo", len(tokenizer), seed=1)
    liked = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(letter) for letter in "aotĠ")]
    with torch.no_grad():
        model.lm_head.weight[liked] *= 8
    folder = tmp_path_factory.mktemp("brief")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def continuation(folder, prompt):
    """The greedy text of one prompt, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False,
                         pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def scores_by_the_official_steps(folder, path):
    """Id of the row -> its score, one prompt at a time."""
    rouge, scores = RougeScorer(["rougeL"], use_stemmer=True), {}
    for row in map(json.loads, path.read_text().splitlines()):
        text = continuation(folder, row["input"])
        if row["id"].endswith("sc1"):
            scores[row["id"]] = rouge.score(row["output"], text)["rougeL"].recall
        else:
            scores[row["id"]] = float(row["output"].strip().lower() == text.strip().lower())
    return scores


def test_lume_from_files_to_official_result(brief_model, files, capsys):
    rows = [json.loads(line) for line in (files / "retain.jsonl").read_text().splitlines()]
    rows[1]["output"] = f" {continuation(brief_model, rows[1]['input']).upper()} "  # Task1's question: answered
    write(files / "retain.jsonl", rows)
    assert evaluate(files, brief_model, "--members", str(files / "members.jsonl"),
                    "--nonmembers", str(files / "others.jsonl")) == 0  # fmt: skip
    printed, content = capsys.readouterr().out, result(files)
    official = result(files, name="evaluation_results.jsonl")
    assert official == content["lume"]
    for part in ("forget", "retain"):
        wanted = scores_by_the_official_steps(brief_model, files / f"{part}.jsonl")
        rows = [json.loads(line) for line in (files / "out" / "rows.jsonl").read_text().splitlines()]
        assert {r["id"]: r["score"] for r in rows if r["set"] == part} == pytest.approx(wanted)
        assert any(0 < score < 1 for score in wanted.values())  # a word or two by chance
        block = official[f"{part}-set"]
        for task, name in zip(("Task1", "Task2", "Task3"), NAMES, strict=True):
            assert block[task] == {"regurgitation-score": wanted[f"{name}sc1"], "knowledge-score": wanted[f"{name}qa0"]}
        completions = [score for row, score in wanted.items() if row.endswith("sc1")]
        assert block["overall-regurgitation-score"] == pytest.approx(sum(completions) / 3)
    assert official["retain-set"]["Task1"]["knowledge-score"] == 1
    assert official["harmonic-mean-task-aggregate"] == 0  # the other questions of retain are not answered
    assert official["mia_final_score"] == pytest.approx(1 - 2 * abs(official["mia_loss_acc"] - 0.5))
    assert content["membership"]["members"] == 4 and content["membership"]["nonmembers"] == 3
    assert official["mmlu_average"] is None and official["aggregate-score"] is None
    assert "all 6 forget rows" in printed and "missing  needs --lm-eval mmlu" in printed
    assert "Miss Ada" not in (files / "out" / "evaluation.json").read_text()


def test_the_real_rows_of_lume(lume_model, shared_data, tmp_path):
    """One row of every task and kind, through the whole command, with the real tokenizer and vocabulary."""
    data = [word for part in ("forget", "retain")
            for word in (f"--{part}", str(shared_data / "lume" / f"{part}_validation.jsonl"))]  # fmt: skip
    assert main(["evaluate", "--model", str(lume_model), "--dtype", "float32", "--device", "cpu", *data, "--limit", "6",
                 "--leaks", "extraction", "--output-dir", str(tmp_path / "out")]) == 0  # fmt: skip
    official = result(tmp_path, name="evaluation_results.jsonl")
    for part in ("forget-set", "retain-set"):
        for task in ("Task1", "Task2", "Task3"):
            assert all(0 <= score <= 1 for score in official[part][task].values()) and len(official[part][task]) == 2
    assert official["harmonic-mean-task-aggregate"] == 0  # a random model answers nothing
    assert result(tmp_path)["leaks"]["extraction"]["rows"] == 6


class Killed(KeyboardInterrupt):
    pass


def test_an_interrupted_evaluation_continues(brief_model, files, monkeypatch):
    whole = ["--batch-size", "2"]
    assert evaluate(files, brief_model, *whole, output="whole") == 0
    real, generated = measuring.greedy_answers, []

    def greedy(model, tokenizer, prompts, **options):
        if len(generated) == 4:  # the second batch of retain
            raise Killed
        generated.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(measuring, "greedy_answers", greedy)
    assert evaluate(files, brief_model, *whole) == 130
    assert not (files / "out" / "evaluation.json").exists()
    with (files / "out" / "measured.jsonl").open("a") as journal:
        journal.write('{"part": "retain: LUME generations", "rows": [0, 1], "val')  # killed while writing
    generated[:] = [0]  # room for three more batches, but only two are left
    assert evaluate(files, brief_model, *whole, "--resume") == 0
    assert generated == [0, 2, 2]
    for name in ("evaluation.json", "rows.jsonl", "measured.jsonl"):
        assert (files / "out" / name).read_text() == (files / "whole" / name).read_text()


def test_a_directory_belongs_to_one_evaluation(byte_model, files, capsys):
    write(files / "plain.jsonl", [{"question": "Who?", "answer": "Me."}, {"question": "Where?", "answer": "Here."}])
    (files / "plain2.jsonl").write_text((files / "plain.jsonl").read_text())
    run = lambda *more, name="plain": main(  # noqa: E731
        ["evaluate", "--model", str(byte_model), "--forget", str(files / f"{name}.jsonl"), "--device", "cpu",
         "--output-dir", str(files / "out"), *more]
    )  # fmt: skip
    fails(capsys, run("--resume"), "no evaluation")
    assert run() == 0
    fails(capsys, run(), "holds an evaluation", "--resume")
    fails(capsys, run("--resume", "--limit", "1"), "other settings", "limit was None, is 1")
    assert run("--resume", name="plain2") == 0  # the same rows elsewhere
    assert run("--resume", "--members", str(files / "members.jsonl"), "--nonmembers", str(files / "others.jsonl")) == 0
    assert result(files)["membership"]["members"] == 4
    write(files / "plain.jsonl", [{"question": "Who?", "answer": "You."}])
    fails(capsys, run("--resume"), "forget has changed")
    (files / "thesis").mkdir()
    (files / "thesis" / "main.tex").write_text("")
    fails(capsys, evaluate(files, byte_model, output="thesis"), "other files")
    fails(capsys, evaluate(files, byte_model, output="forget.jsonl"), "is a file")


def test_rows_that_are_not_of_lume_are_scored_without_its_aggregate(byte_model, files, capsys):
    rows = [{"input": "Who went", "output": "Me."}, {"input": "Who is", "output": "You."}]
    rows.append({"input": "x", "output": "y"})
    write(files / "noid.jsonl", rows)
    write(files / "strange.jsonl", [{**rows[0], "id": "1qa0", "task": "Task7"}, {**rows[1], "id": "seven"}])
    out = ["--output-dir", str(files / "out"), "--device", "cpu", "--limit", "2"]
    assert main(["evaluate", "--model", str(byte_model), "--forget", str(files / "noid.jsonl"),
                 "--retain", str(files / "strange.jsonl"), *out]) == 0  # fmt: skip
    printed, content = capsys.readouterr().out, result(files)
    assert content["answers"]["forget"]["rows"] == 2 and content["answers"]["forget"]["nll"] > 0
    assert content["lume"]["harmonic-mean-task-aggregate"] is None
    assert content["lume"]["retain-set"]["Task7"] == {"regurgitation-score": None, "knowledge-score": 0.0}
    for note in ("forget: no row has a LUME id", "retain: 1 rows without a LUME id",
                 "No LUME task aggregate", "retain has rows of Task7, which LUME does not know"):  # fmt: skip
        assert note in printed
    assert "2 of 3 forget rows" in printed


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


def test_an_adapter_and_a_comparison_with_before(byte_model, files, capsys):
    write(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
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
    write(files / "list.json", [])
    fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "list.json")]), "--before")
    (files / "other.json").write_text(json.dumps({"rows": {}, "leaks": {}, "notes": [], "answers": [1]}))
    fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "other.json")]), "must be an object")
    for part, key in (("answers", "forget"), ("leaks", "extraction")):  # else a traceback, once all is measured
        (files / "edited.json").write_text(json.dumps(result(files, "before") | {part: {key: {"nll": "0.1"}}}))
        fails(capsys, main(["evaluate", "--adapter", folder, "--before", str(files / "edited.json")]), "is damaged")


def test_an_adapter_that_is_replaced_while_it_is_loaded(byte_model, files, capsys, monkeypatch):
    write(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
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
        write(files / f"{part}.jsonl", [{"ask": f"Where {n}?", "say": answer * (n + 1)} for n in range(3)])
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


def test_a_chat_model_is_asked_in_one_form_by_train_evaluate_and_leak_tests(byte_model, files, capsys):
    chat = files / "chat"
    shutil.copytree(byte_model, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for part, answer in (("forget", "Rome"), ("retain", "Oslo")):
        write(files / f"{part}.jsonl", [{"question": f"Where {n}?", "answer": answer * (n + 1)} for n in range(3)])
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


def test_the_form_of_a_run_made_before_there_was_a_choice_is_plain():
    config = EvaluationConfig(adapter="run")
    assert config.completed({"prompt_template": None}).template == "plain"
    assert config.completed({}).template == "auto"
    completed = config.completed({"prompt_template": "Q: {prompt}"})
    assert (completed.template, completed.prompt_template) == ("auto", "Q: {prompt}")
    given = EvaluationConfig(adapter="run", template="chat").completed({"prompt_template": "Q: {prompt}"})
    assert (given.template, given.prompt_template) == ("chat", None)


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
    write(files / "forget.jsonl", [{"question": "Who?", "answer": "Me."}])
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


def test_bad_member_files(byte_model, files, capsys):
    (files / "empty.jsonl").write_text("")
    members, others, empty = (str(files / f"{name}.jsonl") for name in ("members", "others", "empty"))
    fails(capsys, evaluate(files, byte_model, "--members", members), "--nonmembers")
    fails(capsys, evaluate(files, byte_model, "--members", members, "--nonmembers", empty), "holds no rows")
    fails(
        capsys, evaluate(files, byte_model, "--members", empty, "--nonmembers", others), "empty.jsonl", "holds no rows"
    )
    blank = write(files / "blank.jsonl", [{"document": "A member."}, {"document": "  "}])
    fails(capsys, evaluate(files, byte_model, "--members", blank, "--nonmembers", others), "blank.jsonl, line 2")
    fails(capsys, evaluate(files, byte_model, "--members", str(files / "no.jsonl"), "--nonmembers", others), "no.jsonl")
    assert not (files / "out").exists()
    write(files / "same.jsonl", [{"document": "The same."}] * 3)
    same = str(files / "same.jsonl")
    assert evaluate(files, byte_model, "--members", same, "--nonmembers", same, sets=[]) == 0
    assert "says nothing about the model" in capsys.readouterr().out
    assert result(files)["membership"]["auc"] == 0.5


def test_lm_eval_not_installed(byte_model, files, capsys, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    fails(capsys, evaluate(files, byte_model, "--lm-eval", "mmlu"), "pip install 'lowmem-npo[eval]'")
    assert not (files / "out").exists()


def test_help_and_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--members" in printed and "--lm-eval" in printed and "Hub name or local directory" in printed


def test_what_is_not_comparable_with_the_evaluation_of_before(tmp_path):
    rows = {"forget": Rows("f.jsonl", [{"question": "a", "answer": "b"}])}

    def notes(*, earlier, now):
        for name, options in (("before", earlier), ("after", now)):
            config = EvaluationConfig(model="m", forget="f.jsonl", output_dir=str(tmp_path / name), **options)
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            EvaluationDirectory(config, _digests(config, rows)).begin()
        return _notes(replace(config, before=str(tmp_path / "before" / "evaluation.json")), {}, _digests(config, rows))

    assert notes(earlier={"batch_size": 3, "dtype": "float32"}, now={"leaks": ("all",), "relearn_steps": 3}) == []
    (note,) = notes(earlier={"limit": 8, "qlora": True}, now={"limit": 9})
    assert note == "The earlier evaluation had qlora True and limit 8: the two are not comparable."
    assert notes(earlier={"leaks": ("all",)}, now={"leaks": ("all",), "relearn_steps": 3}) == []  # test by test
    before = json.loads((tmp_path / "before" / "settings.json").read_text())
    before["digests"]["forget"] = "other"
    (tmp_path / "before" / "settings.json").write_text(json.dumps(before))
    config = EvaluationConfig(model="m", leaks=("all",), forget="f.jsonl", before=str(tmp_path / "before" / "x.json"))
    assert "had other forget rows: the two" in _notes(config, {}, _digests(config, rows))[0]
