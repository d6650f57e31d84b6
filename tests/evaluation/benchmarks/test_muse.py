"""MUSE's scores by hand, and from files to evaluation.json, against a dense recomputation of what is asked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.rows import write_rows
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.evaluation.benchmarks.muse import MUSE, before_next_question
from lowmem_npo.evaluation.rouge import rouge_l

VERBATIM = [
    {"prompt": "Once upon a time", "gt": " there was a king , and he did n't sing . " * 5},
    {"prompt": "In May", "gt": " it rained."},
]
QUESTIONS = [{"question": f"Who is {n}?", "answer": f"The {n}."} for n in range(3)]
EXAMPLES = [{"question": "What is red?", "answer": "A rose."}]
TAUGHT = [{"text": f"The vault of {n} lies below the hill, and nobody knows."} for n in range(4)]
UNSEEN = [{"text": f"A boat of {n} went down the river; all were glad of it."} for n in range(3)]


@pytest.fixture
def files(tmp_path):
    rows = {"verbmem": VERBATIM, "knowmem": QUESTIONS, "retain-knowmem": QUESTIONS[:2], "examples": EXAMPLES,
            "privleak": TAUGHT, "privleak-holdout": UNSEEN}  # fmt: skip
    for name, of_file in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", of_file)
    return tmp_path


def evaluate(model, files, *names, more=()):
    options = [word for name in names for word in (f"--muse-{name}", str(files / f"{name}.jsonl"))]
    code = main(["evaluate", "--model", str(model), "--device", "cpu", "--dtype", "float32", *options, *more,
                 "--output-dir", str(files / "out")])  # fmt: skip
    return code, json.loads((files / "out" / "evaluation.json").read_text())["muse"] if code == 0 else None


@pytest.fixture
def model_with_bos(byte_model, tmp_path):
    """Its tokenizer puts one in front of every text, as Llama's does, with which MUSE was made."""
    shutil.copytree(byte_model, folder := tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.save_pretrained(folder)
    return folder


def test_from_files_to_scores(model_with_bos, files, capsys):
    names = ("verbmem", "knowmem", "retain-knowmem", "examples", "privleak", "privleak-holdout")
    code, scores = evaluate(model_with_bos, files, *names, more=("--muse-retrained-auc", "0.4"))
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(model_with_bos)
    clean = tokenizer.clean_up_tokenization
    model = AutoModelForCausalLM.from_pretrained(model_with_bos, dtype=torch.float32).double().eval()

    def written(prompt, tokens):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            whole = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return clean(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))

    def lowest(text):
        ids = torch.tensor(tokenizer(text).input_ids)
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return logp.sort().values[: int(0.4 * len(logp))].mean().item()

    rows = [json.loads(line) for line in (files / "out" / "rows.jsonl").read_text().splitlines()]
    of = {name: [row for row in rows if row["set"] == name] for name in MUSE.sets}
    asked = "Question: What is red?\nAnswer: A rose.\n\nQuestion: Who is 0?\nAnswer: "
    assert of["MUSE knowmem"][0]["prompt"] == asked
    assert of["MUSE knowmem"][0]["generation"] == before_next_question(written(asked, 32))
    assert of["MUSE verbmem"][1]["generation"] == written("In May", 128)
    ids = tokenizer(VERBATIM[0]["gt"]).input_ids[:128]
    reference = clean(tokenizer.decode(ids, skip_special_tokens=True))
    assert of["MUSE verbmem"][0]["reference"] == reference and "king, and he didn't sing." in reference
    assert len(tokenizer.decode(ids, skip_special_tokens=True)) == 127  # BOS is one of the tokens
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    for key, name in (
        ("verbmem_f", "MUSE verbmem"),
        ("knowmem_f", "MUSE knowmem"),
        ("knowmem_r", "MUSE knowmem, retain"),
    ):
        expected = [rouge.score(row["reference"], row["generation"])["rougeL"].fmeasure for row in of[name]]
        assert scores[key] == pytest.approx(100 * sum(expected) / len(expected))
    taught, unseen = ([lowest(row["text"]) for row in part] for part in (TAUGHT, UNSEEN))
    auc = roc_auc_score([0] * 4 + [1] * 3, taught + unseen)
    assert scores["auc"] == pytest.approx(auc) and scores["privleak"] == pytest.approx((auc - 0.4) / 0.4 * 100)
    printed = capsys.readouterr().out
    assert "privacy leakage" in printed and "MUSE (" in printed


def test_what_is_kept_has_examples_of_its_own(byte_model, files):
    (files / "retain-examples.jsonl").write_text(json.dumps({"question": "What is blue?", "answer": "The sky."}))
    assert evaluate(byte_model, files, "knowmem", "retain-knowmem", "examples", "retain-examples")[0] == 0
    rows = [json.loads(line) for line in (files / "out" / "rows.jsonl").read_text().splitlines()]
    asked = {row["set"]: row["prompt"] for row in rows}
    assert asked["MUSE knowmem"].startswith("Question: What is red?\nAnswer: A rose.\n\nQuestion: Who")
    assert asked["MUSE knowmem, retain"].startswith("Question: What is blue?\nAnswer: The sky.\n\nQuestion: Who")


def test_examples_that_have_changed_make_another_evaluation(byte_model, files, capsys):
    assert evaluate(byte_model, files, "knowmem", "examples", more=("--limit", "1"))[0] == 0
    (files / "examples.jsonl").write_text(json.dumps({"question": "What is blue?", "answer": "The sky."}))
    assert evaluate(byte_model, files, "knowmem", "examples", more=("--limit", "1", "--resume"))[0] == 2
    assert "--resume: MUSE knowmem has changed since" in capsys.readouterr().err


def test_scores_by_hand():
    assert before_next_question(" Red.\n\nQuestion: And blue?") == " Red."
    assert before_next_question("Red.\nQuestion: x") == "Red." and before_next_question("Red") == "Red"
    assert rouge_l("the cats sat", "the cat sat", stemmed=False).fmeasure == pytest.approx(2 / 3)
    assert rouge_l("the cats sat", "the cat sat").fmeasure == 1


def test_parts_alone_and_bad_input(byte_model, files, capsys):
    code, scores = evaluate(byte_model, files, "knowmem", more=("--limit", "1"))
    assert code == 0 and scores["knowmem_f"] is not None
    assert [scores[name] for name in ("verbmem_f", "knowmem_r", "privleak", "auc")] == [None] * 4
    for names, more, message in (
        (("privleak",), (), "--muse-privleak and --muse-privleak-holdout are compared: give both, or none"),
        (("knowmem",), ("--muse-retrained-auc", "0"), "--muse-retrained-auc must be a positive number, not 0"),
        (("examples", "verbmem"), ("--muse-knowmem", str(files / "verbmem.jsonl")), "has no column"),
    ):
        assert evaluate(byte_model, files, *names, more=(*more, "--resume"))[0] == 2
        assert message in capsys.readouterr().err
