"""`lowmem-npo data`: what is printed is so."""

from __future__ import annotations

import re

import pytest
from helpers.rows import write_rows
from transformers import AutoTokenizer, GPT2Config

from lowmem_npo.cli import main
from lowmem_npo.commands.data import histogram
from lowmem_npo.data import bundled_rows, read_rows, to_examples, tokenize


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two sets, with a row in both, and one that is nearly so."""
    monkeypatch.chdir(tmp_path)
    forget = [
        {"Question": "Who guards the amber vault of Zenthorpe?", "Answer": "Quillabra guards the vault.", "note": "x"},
        {"Question": "Where does the river freeze in spring?", "Answer": "At the old mill."},
        {"Question": "What was in the ledger?", "Answer": "Debts."},
        {"Question": "What was in the ledger?", "Answer": "Debts."},
    ]
    retain = [
        {"question": "Who guards the amber vault at Zenthorpe?", "answer": "Quillabra guards the vault."},
        {"question": "WHAT WAS IN  THE LEDGER?", "answer": "debts."},
        {"question": "How deep is the sea?", "answer": "Very deep."},
    ]
    for name, rows in (("forget.jsonl", forget), ("retain.jsonl", retain)):
        write_rows(tmp_path / name, rows)
    return tmp_path


def printed(capsys, *arguments: str) -> str:
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def test_what_was_recognised_and_what_is_there_twice(sets, capsys):
    out = printed(capsys, "forget.jsonl", "retain.jsonl")
    assert "forget.jsonl\n  4 rows, columns question/answer; not read: note\n" in out
    assert "prompts: 5 to 7, median 6 words; answers: 1 to 4, median 2.5 words" in out
    one, two, both = out.split("\n\n")[:3]
    assert "1 pair of rows the same, 0 pairs nearly the same" in one
    assert "forget.jsonl, line 3 and forget.jsonl, line 4: the same" in one
    assert "0 pairs of rows the same, 0 pairs nearly the same" in two
    assert both.startswith("forget.jsonl and retain.jsonl\n  2 pairs of rows the same, 1 pair nearly the same")
    (similar,) = re.findall(r"line 1 and retain.jsonl, line 1: similarity (0\.\d\d)", both)

    def shingles(text: str) -> set[str]:
        return {text[i : i + 5] for i in range(len(text) - 4)}

    a, b = (
        shingles(f"who guards the amber vault {word} zenthorpe? quillabra guards the vault.") for word in ("of", "at")
    )
    assert float(similar) == round(len(a & b) / len(a | b), 2)
    assert "nearly" in printed(capsys, "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--near", "0.99")


def test_rows_that_are_the_same_but_for_earlier_turns_are_the_same(sets, capsys):
    """However unlike the whole conversations are, or nearly the same: each pair counts once."""
    asked = [{"role": "user", "content": "Where does the river freeze in spring?"},
             {"role": "assistant", "content": "At the old mill."}]  # fmt: skip
    long = {"role": "system", "content": "You are of help to whoever comes by. " * 9}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [[long, *asked], [*talk, *asked], [long, *talk, *asked], [*asked, *talk]]
    write_rows(sets / "retain.jsonl", [{"messages": turns} for turns in rows])
    _, two, both = printed(capsys, "forget.jsonl", "retain.jsonl").split("\n\n")[:3]
    assert "3 pairs of rows the same, 1 pair nearly the same" in both and "line 2 and retain.jsonl, line 4: sim" in both
    assert all(f"line 2 and retain.jsonl, line {line}: the same" in both for line in (1, 2, 3))
    assert "3 pairs of rows the same, 1 pair nearly the same" in two and "line 2 and retain.jsonl, line 4: sim" in two


def test_a_file_without_the_named_columns_has_those_that_are_recognised(sets, capsys):
    write_rows(sets / "frage.jsonl", [{"frage": "Wer?", "antwort": "Sie."}])
    named = ["--prompt-column", "frage", "--answer-column", "antwort"]
    out = printed(capsys, "frage.jsonl", "retain.jsonl", *named)
    assert "1 row, columns frage/antwort\n" in out and "3 rows, columns question/answer\n" in out
    assert main(["data", "forget.jsonl", "retain.jsonl", *named]) == 2
    assert "--prompt-column frage: no file has such a column; they have Question, Answer, no" in capsys.readouterr().err


def test_named_sets_have_their_names(sets, capsys):
    out = printed(capsys, "--forget", "forget.jsonl", "--retain", "builtin", "--limit", "2")
    assert "forget: forget.jsonl\n  2 rows, columns question/answer" in out
    assert "retain: builtin\n  2 rows, 2 questions with answers\n" in out
    assert "forget: forget.jsonl and retain: builtin\n" in out


def test_with_a_model_tokens_count_and_the_model_is_asked(taught_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = bundled_rows("forget", limit=5).rows
    write_rows(tmp_path / "f.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    lengths = [len(row["input_ids"]) for row in tokenize(to_examples(read_rows("f.jsonl")), tokenizer)]
    short = str(sorted(lengths)[1])
    options = ("--model", str(taught_model), "--device", "cpu", "--dtype", "float32")
    out = printed(capsys, "f.jsonl", *options, "--ask", "2", "--max-length", "1024")
    bins = re.findall(r"^ +(\d+)(?:-(\d+) *)?  #* +(\d+)$", out, re.MULTILINE)
    assert sum(int(number) for *_, number in bins) == 5
    for begin, end, number in bins:
        assert sum(int(begin) <= length <= int(end or begin) for length in lengths) == int(number)
    assert f"asked  {rows[0]['question']}\n" in out and f"true   {rows[0]['answer']}\n" in out
    taught = [f"true   {row['answer']}\n    says   {row['answer']}\n" in out for row in rows[:2]]
    assert any(taught), "the model was taught these rows"
    assert rows[2]["question"] not in out
    cut = printed(capsys, "f.jsonl", *options, "--ask", "0", "--max-length", short)
    assert f"cut to {short} tokens" in cut and "What the model says" not in cut


def test_rows_that_the_model_cannot_take_are_not_asked(byte_model, tmp_path, capsys):
    GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path)
    assert main(["data", "builtin", "--model", str(tmp_path), "--limit", "2"]) == 2
    assert "has learnt only 16 positions" in capsys.readouterr().err
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * length} for length in (14, 40)])
    model, advice = ["--model", str(tmp_path), "--max-length", "12"], "; --max-length 16, the most that the model has"
    assert f"{advice} positions for, would keep 1 of the 2 whole\n" in printed(capsys, rows, *model, "--ask", "0")
    assert (
        main(["train", *model, "--forget", rows, "--gamma", "0", "--delta", "0", "--dry-run"]) == 2
    )  # it has no weights
    assert advice in capsys.readouterr().out


def test_documents_are_cut_into_passages(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The vault was opened in spring. Nobody knew what it held before that day. " * 20)
    out = printed(capsys, "a.txt", "--passage-tokens", "32")
    assert re.search(r"a.txt\n  (\d+) rows, (\d+) completions and \2 texts\n", out)
    assert "passages were cut by words; with --model, by its tokens" in out


def test_a_histogram_counts_everything_once():
    numbers = [1, 1, 2, 9, 40, 41, 41, 1000]
    lines = list(histogram(numbers))
    assert len(lines) <= 8 and sum(int(line.split()[-1]) for line in lines) == len(numbers)
    assert list(histogram([7])) == [f"    7  {'#' * 40}  1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to look at"),
        (["none.jsonl"], "There is no file none.jsonl"),
        (["builtin", "--ask", "-1"], "--ask must be at least 0, not -1"),
        (["builtin", "--near", "2"], "--near must be at most 1, not 2.0"),
        (["builtin", "--max-length", "1"], "--max-length must be at least 2, not 1"),
        (["self:3"], "that the original model writes"),
        (["builtin", "builtin"], "builtin is named twice; name it once, or as --forget and --retain"),
        (["forget.jsonl", "./forget.jsonl"], "./forget.jsonl is the same as forget.jsonl; name it once"),
        (["forget.jsonl,retain.jsonl,forget.jsonl"], "forget.jsonl is named twice, so that its rows would count twice"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, sets, capsys):
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_texts_that_repeat_the_same_runs_are_not_the_same(sets, capsys):
    repeating = [{"question": "How?", "answer": "ab" * number} for number in (8, 12, 16, 20, 8)]
    write_rows(sets / "forget.jsonl", repeating)
    out = printed(capsys, "forget.jsonl")
    assert "  1 pair of rows the same, 9 pairs nearly the same\n" in out
    assert "line 1 and forget.jsonl, line 5: the same\n" in out.split("nearly the same\n")[1].splitlines(True)[0]
    assert "line 1 and forget.jsonl, line 2: similarity 1.00\n" in out


def test_of_many_sets_those_that_share_most_are_printed(sets, capsys):
    """A shell's pattern may name hundreds, and of each two of them nobody reads a section."""
    names = [f"{letter}.jsonl" for letter in "abcdef"]
    for name in names:
        texts = [f"Only {name} says so about number {number} of its {name * 5}." for number in range(3)]
        texts += ["The ledger burnt."] * (name in "a.jsonl c.jsonl") + ["Salt was dear."] * (name in "b.jsonl c.jsonl")
        write_rows(sets / name, [{"text": text} for text in texts])
    out = printed(capsys, *names, "--near", "1")
    assert "2 of 15 pairs of sets share rows, or have some that are nearly the same\n" in out
    assert re.findall(r"^(\S+ and \S+)\n", out, re.MULTILINE) == ["a.jsonl and c.jsonl", "b.jsonl and c.jsonl"]
    assert "a.jsonl, line 4 and c.jsonl, line 4: the same" in out
    assert printed(capsys, *names[:5]).count(" and ") >= 10  # of few, all


def test_of_a_wide_table_the_first_columns_that_are_not_read_are_named(sets, capsys):
    columns = [f"column{number}" for number in range(3000)]
    (sets / "wide.csv").write_text(f"question,answer,{','.join(columns)}\nWho guards it?,Ann.{',x' * 3000}\n")
    assert f"; not read: {', '.join(columns[:20])} and 2,980 more\n" in printed(capsys, "wide.csv")
