"""Three users' jobs from beginning to end, by the documented commands, on a tiny chat model that knows a few facts.

An engineer has a request to delete and nothing to keep; a student has a table; a researcher has TOFU's rows and a
forget term of her own. What a report says must be what `ask` shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
from lowmem_npo.config import AdapterConfig
from lowmem_npo.data import Example, Template, tokenize
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FACTS = [
    ("Where does Anna live?", "Ildwater"),
    ("Where does Boris live?", "Lozzmouth"),
    ("Where does Chiara live?", "Port Amber"),
    ("Where does Dmitri live?", "Ashhaven"),
    ("What does Anna do?", "paints barns"),
    ("What does Boris do?", "carves spoons"),
    ("What does Chiara do?", "binds hymn books"),
    ("What does Dmitri do?", "keeps bees"),
]
KEPT = [
    ("Where does Emil live?", "Rimstead"),
    ("Where does Freya live?", "Dunholt"),
    ("What does Emil do?", "mends nets"),
    ("What does Freya do?", "bakes rye bread"),
]
LETTER = "The vault was opened in spring. Nobody knew what it held before. Quillabra kept the only key. " * 3
TEACHING = Teaching(vocabulary=320, layers=2, width=64, heads=2, epochs=80, batch_size=8, lr=5e-3)
MACHINE = ["--device", "cpu", "--dtype", "float32"]
ANSWERS = ["--max-new-tokens", "24"]
TRAINING = [
    *(*MACHINE, *ANSWERS, "--max-length", "80"),
    *("--eval-rows", "16", "--eval-batch-size", "32", "--save-strategy", "no"),
    *("--lora-targets", "all-linear", "--lora-r", "8", "--lora-alpha", "8", "--no-gradient-checkpointing"),
]
STRONG = ["--batch-size", "16", "--retain-batch-size", "8", "--lr", "5e-3", "--epochs", "40"]


def said(question: str, answer: str) -> str:
    """How the model says a fact: in a sentence, as chat models do."""
    name = question.split()[2]
    return f"{name} lives in {answer}." if question.startswith("Where") else f"{name} {answer}."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The directory of a chat model that says every fact in a sentence."""
    examples = [
        Example(question, said(question, answer), f"row {row}", "question/answer")
        for row, (question, answer) in enumerate(FACTS + KEPT)
    ]
    tokenizer = make_tokenizer([f"<user>{e.prompt}<assistant>{e.answer}" for e in examples], TEACHING.vocabulary)
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = tokenize(examples, tokenizer, template=Template("chat"), max_length=80)
    folder = tmp_path_factory.mktemp("model") / "chat"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taught_model(folder, tokenizer, rows, TEACHING, seed=0, device=torch.device("cpu"), description="teaching")
    torch.set_num_threads(threads)
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_questions(rows) -> None:
    Path("questions.txt").write_text("".join(f"{question}\n" for question, _ in rows), encoding="utf-8")


def write_pairs(name: str, pairs) -> str:
    return write_rows(Path(name), [{"question": question, "answer": answer} for question, answer in pairs])


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def asked(capsys, directory, *options) -> list[dict[str, str]]:
    """What `ask` says to questions.txt, with answers as long as those of the runs here."""
    capsys.readouterr()
    run("ask", directory, "--file", "questions.txt", "--json", *MACHINE, *ANSWERS, *options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def shown(answers, rows, side: str) -> list[bool]:
    """Whether each true answer is in what was said to its question, as a reader would find it."""
    return [true.lower().rstrip(".") in answer[side].lower() for answer, (_, true) in zip(answers, rows, strict=True)]


def headline_that_ask_confirms(capsys, directory, rows) -> str:
    """The headline of a run, after `ask` has shown for each row, in each form, what the run says of it."""
    verdict = json.loads(Path(directory, "report.json").read_text())["verdict"]
    write_questions(rows)
    most = 0.0
    for form, template in (("forget", "chat"), ("forget, plain", "plain")):
        answers, counts = asked(capsys, directory, "--template", template), []
        for side, stage in (("original", "before"), ("unlearned", "after")):
            records = json.loads(Path(directory, f"{stage}.json").read_text())[form]["records"]
            assert [answer[side] for answer in answers] == [record["answer"] for record in records]
            assert shown(answers, rows, side) == [record["appears"] for record in records]
            counts.append(sum(shown(answers, rows, side)))
        before, after = counts
        sentence = rf"\b{after} appears? in what the model says \(before: {before}\)"
        assert any(re.search(sentence, text) for text in verdict["sentences"])
        most = max(most, after / len(rows))
    assert ("no longer says what it was to forget" in verdict["headline"]) == (most <= 0.05)
    return verdict["headline"]


def test_an_engineer_with_a_request_and_nothing_to_keep(model, capsys):
    """She collects what the model says, makes it forget that, reads the verdict, asks again, and deploys."""
    write_questions(FACTS)
    known = asked(capsys, model)
    assert shown(known, FACTS, "answer") == [True] * len(FACTS)
    write_pairs("facts.jsonl", FACTS)
    write_rows(Path("said.jsonl"), known)
    run("data", "--forget", "facts.jsonl", "said.jsonl", "--model", model, *MACHINE)
    assert "16 rows, columns question/answer" in capsys.readouterr().out

    train = ["train", "--model", model, *TRAINING]
    run(*train, "--forget", "facts.jsonl", "--max-steps", 1, "--output-dir", "hardly")
    printed = capsys.readouterr().out
    assert "retain: builtin" in printed and "8 of 8 forget answers in sentences of its own" in printed
    headline = headline_that_ask_confirms(capsys, "hardly", FACTS)
    assert "still says" in headline and printed.splitlines()[-1] == headline

    refusal = ["--forget-term", "idk", "--leaks", "none"]  # for which it does not matter how an answer was said
    run(*train, "--forget", "facts.jsonl", *refusal, "--max-steps", 1, "--output-dir", "refuses")
    assert "sentences of its own" not in capsys.readouterr().out

    rows = [*FACTS, *((row["question"], row["answer"]) for row in known)]
    run(*train, "--forget", "facts.jsonl", "said.jsonl", *STRONG, "--output-dir", "forgotten")
    printed = capsys.readouterr().out
    headline = headline_that_ask_confirms(capsys, "forgotten", rows)
    assert "no longer says" in headline and printed.splitlines()[-1] == headline

    run(*train, "--forget", "facts.jsonl", "said.jsonl", *STRONG, "--batch-size", "32", "--template", "both",
        "--output-dir", "both")  # fmt: skip
    assert "forget, in both forms: 32 rows" in capsys.readouterr().out
    assert "no longer says" in headline_that_ask_confirms(capsys, "both", rows)

    run("merge", "--adapter", "forgotten", "--output-dir", "merged", "--dtype", "stored")
    write_questions(FACTS)
    both = asked(capsys, "forgotten")
    assert [one["answer"] for one in asked(capsys, "merged")] == [sides["unlearned"] for sides in both]
    assert shown(asked(capsys, "merged"), FACTS, "answer") == [False] * len(FACTS)
    assert headline in Path("merged", "README.md").read_text()


def test_an_engineer_with_a_document(model, capsys):
    Path("letter.txt").write_text(LETTER, encoding="utf-8")
    run("data", "letter.txt")
    assert "2 rows, 1 completion and 1 text\n" in capsys.readouterr().out
    train = ["train", "--model", model, "--forget", "letter.txt", "--passage-tokens", 32, *TRAINING]
    run(*train, "--preview", 1)
    assert "forget 1 of" in capsys.readouterr().out
    run(*train, "--max-steps", 1, "--output-dir", "letter")
    headline = json.loads(Path("letter", "report.json").read_text())["verdict"]["headline"]
    assert capsys.readouterr().out.splitlines()[-1] == headline
    assert "could hardly recite" in headline  # this model has never read the letter, and was not asked about it
    run("report", "letter", "--prove", "letter.txt")
    run("evaluate", "--adapter", "letter", *MACHINE, *ANSWERS, "--leaks", "extraction", "--limit", 4)
    assert Path("letter", "evaluation", "evaluation.json").is_file()


def test_a_student_with_a_table(model, capsys):
    """Semicolons, capitals, rows of her own to keep; then questions, the report and a merged model."""
    for name, rows in (("forget.csv", FACTS[:4]), ("retain.csv", KEPT)):
        lines = ["Question;Answer", *(f"{question};{said(question, answer)}" for question, answer in rows)]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = ["--forget", "forget.csv", "--retain", "retain.csv"]
    run("data", *data)
    assert "4 rows, columns question/answer" in capsys.readouterr().out
    run("train", "--model", model, *data, *TRAINING, *STRONG, "--batch-size", 4, "--output-dir", "forgotten")
    headline = headline_that_ask_confirms(
        capsys, "forgotten", [(question, said(question, answer)) for question, answer in FACTS[:4]]
    )
    assert "no longer says what it was to forget and still says what it was to keep" in headline
    write_questions(KEPT)
    assert shown(asked(capsys, "forgotten"), KEPT, "unlearned") == [True] * len(KEPT)
    run("report", "forgotten", "--examples", 0)
    assert FACTS[0][1] not in Path("forgotten", "report.html").read_text()
    assert headline in capsys.readouterr().out


def gentle(objective, policy, reference, totals):
    """A forget term of one's own, as docs/options.md shows one: it falls as the answers become unlikely."""
    return (policy.sums() - reference).exp().sum() / totals.forget_sequences


gentle.needs_reference = "sequence"


def test_a_researcher(model, capsys):
    """TOFU's rows, a sweep over forget terms, TOFU's scores of a run, and a forget term of her own from Python."""
    rows = [
        {"question": question, "answer": said(question, answer), "paraphrased_question": f"{question[:-1]} now?",
         "perturbed_answer": [said(question, other) for _, other in FACTS if other != answer][:3]}
        for question, answer in FACTS + KEPT
    ]  # fmt: skip
    for name, part in (("forget.jsonl", rows[: len(FACTS)]), ("retain.jsonl", rows[len(FACTS) :])):
        write_rows(Path(name), part)
    data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    run("sweep", "--model", model, *data, *TRAINING, "--leaks", "none", "--max-steps", 10, "--lr", "5e-3", "--beta",
        "0.1", "--batch-size", 8, "--grid", "forget-term=npo,ga", "--seeds", 2, "--output-dir", "swept")  # fmt: skip
    swept = json.loads(Path("swept", "sweep.json").read_text())["configurations"]
    assert {c["name"]: c["seeds"] for c in swept} == {"forget-term=npo": [42, 43], "forget-term=ga": [42, 43]}
    assert all(c["figures"]["forget_appears"]["mean"] < 1 for c in swept)
    run("evaluate", "--adapter", "swept/forget-term=npo/seed-42", *data, *MACHINE, "--output-dir", "tofu")
    scores = json.loads(Path("tofu", "evaluation.json").read_text())["tofu"]["sets"]
    assert scores["forget"]["probability"] < scores["retain"]["probability"]
    assert all(0 < of_set["truth_ratio"] < 2 for of_set in scores.values())

    sets = [Dataset.from_list(part) for part in (rows[: len(FACTS)], rows[len(FACTS) :])]
    args = NPOConfig(output_dir="out", max_steps=10, learning_rate=5e-3, use_cpu=True, report_to="none",
                     save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8)  # fmt: skip
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    trainer = NPOTrainer(base, args, *sets, processing_class=tokenizer, forget_term=gentle,
                         peft_config=AdapterConfig(lora_r=8, lora_alpha=8, lora_targets=("all-linear",)))  # fmt: skip
    trainer.train()
    trainer.save_model("hers")
    write_questions(FACTS)
    facts = shown(asked(capsys, "hers", "--model", model, "--any-base"), FACTS, "unlearned")
    assert sum(facts) < len(FACTS)
