"""Whatever a file holds: its rows are read rightly, or it is refused in one sentence of one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import string
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.data.tokenizing import decode, tokenize
from lowmem_npo.errors import UserError

LONGEST = 20.0  # seconds of processor that no file of these sizes takes
PIECES = [
    '{"question": "Who?", "answer": "She."}', '{"text": "a"}', '{"messages": [', '{"role": "user", "content": "?"}',
    '"answer"', "question,answer", "a,b", '"', "'", "[", "]", "{", "}", ",", ":", ";", "\t", "\n", "\r\n", "\r", "\\",
    "\\u", "\\ud83d", "null", "true", "NaN", "Infinity", "1" * 5000, "1e999", "-", "\0", "\ufeff", "\u2028", "\x85",
    "\x1c", "é", "漢", "😀", "<|endoftext|>", "<eos>", "<p>", "</p>", "<script>", "&nbsp;", "&#x110000;", "&#0;",
    "<!--", "-->", "<![CDATA[", "[" * 2000, '{"a":' * 500, "#", "```", "|", "\f", "x" * 200_000,
]  # fmt: skip
TEXT_KINDS = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".html"]
KINDS = [*TEXT_KINDS, ".jsonl.gz", ".csv.gz", ".parquet", ".arrow", ".pdf", ".xlsx", ".weird", ""]

contents = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map(str.encode),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=80),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    *("question", "answer", "input", "output", "prompt", "completion", "text", "messages", "role", "content"),
    *("id", "task", "tools", "instruction", "response", "context", "document", "conversations", "weight", "x"),
]
words = st.text(min_size=1, max_size=12) | st.sampled_from(["She.", "Who is it?", "<|im_end|>", "a\n\nb"])
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": words | values}
)
conversations = st.lists(words, min_size=2, max_size=5).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)
PAIRS = [("question", "answer"), ("input", "output"), ("prompt", "completion"), ("instruction", "response")]
pairs = st.sampled_from(PAIRS).flatmap(lambda names: st.fixed_dictionaries(dict.fromkeys(names, words)))
usual = pairs | st.fixed_dictionaries({"text": words}) | st.fixed_dictionaries({"messages": conversations})
more = st.dictionaries(st.sampled_from(NAMES), values | st.lists(turns, max_size=4), max_size=2)
one_row = st.one_of(usual, st.builds(lambda row, others: row | others, usual, more), more)
rows = st.one_of(one_row.map(lambda row: [row]), usual.map(lambda row: [row, row]), st.lists(one_row, max_size=3))
# What any text file can hold and give back: no half surrogates, and no control characters, which JSON alone can write.
MARKS = "\U0010fffc\U0010fffd"  # which are refused: test_special_texts.py
characters = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=MARKS)
texts = st.text(characters, min_size=1, max_size=30).filter(str.strip)


def outcome(path: Path, tokenizer, max_length: int = 64) -> list | None:
    """The examples in a file, tokenised; None if it is refused as it should be."""
    begun = time.process_time()
    try:
        examples = to_examples(read_rows(str(path)))
        tokenize(examples, tokenizer, max_length=max_length, drop_too_long=True)
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and message[-1] in ".)…" and len(message) < 2000, repr(message)
        return None
    finally:
        assert time.process_time() - begun < LONGEST
    return examples


def many(full: bool, long: int, short: int):
    return settings(
        max_examples=long if full else short, deadline=None, database=None, derandomize=not full,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def test_any_file(tmp_path, bpe_tokenizer, full):
    counts = {"read": 0, "refused": 0}

    @many(full, 20_000, 250)
    @example(".jsonl", ('{"text": ' + "1" * 5000 + "}").encode())
    @example(".jsonl", b'{"text": "a", "text": "b"}')
    @example(".jsonl", b'{"text": "\\ud83d"}')
    @example(".json", b"[" * 100_000)
    @example(".json", b'{"a":' * 100_000)
    @example(".jsonl", b'{"text": NaN}')
    @example(".csv", b"text,text\na,b\n")
    @example(".csv", b'text\n"' + b"x" * 200_000 + b'"\n')
    @example(".csv", b"text\na\0b\n")
    @example(".csv.gz", b"text\na\n")
    @example(".tsv", b"1" * 5000)
    @example(".csv", b'"a\nb",' * 500)
    @example(".jsonl", b"\xff\xfe")
    @example(".txt", b"\xff\xfea\0")
    @example(".html", b"<p>" * 20_000)
    @example(".html", b"a <p a=" * 20_000)
    @example(".txt", b"a" + b" " * 30_000 + b"b")
    @example(".jsonl", b'{"text": "' + b"<|endoftext|> " * 5_000 + b'x"}')
    @example(".html", b"&#x110000;&#0;&#xd800;")
    @given(st.sampled_from(KINDS), contents)
    def check(kind, content):
        path = tmp_path / f"rows{kind}"
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") and len(content) % 2 else content)
        counts["refused" if outcome(path, bpe_tokenizer) is None else "read"] += 1

    check()
    print(f"generated files: {counts}")
    assert min(counts.values()) > 10


@pytest.mark.parametrize("chat", [False, True])
def test_any_rows(chat, tmp_path, bpe_tokenizer, chat_tokenizer, full):
    counts = {"read": 0, "refused": 0}
    path = tmp_path / "rows.jsonl"

    @many(full, 10_000, 250)
    @example([{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}])
    @example([{"messages": [{"role": "assistant", "content": "a"}]}])
    @example([{"messages": [{"role": "system", "content": None}, {"role": "assistant", "content": "a"}]}])
    @example([{"question": "?", "answer": ""}, {"question": "?", "answer": "<|im_end|>"}])
    @example([{"question": "?", "answer": 10**300}])
    @given(rows)
    def check(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts["refused" if outcome(path, chat_tokenizer if chat else bpe_tokenizer) is None else "read"] += 1

    check()
    print(f"generated rows: {counts}")
    assert min(counts.values()) > 30


def test_rows_that_are_fine_are_read_as_they_are(tmp_path, bpe_tokenizer, full):
    """Of every kind of table; the tokens say what was written, whatever it is."""

    @many(full, 10_000, 120)
    @example([("<|endoftext|>", "a<|im_end|>b")], ".jsonl")
    @example([('"', "',;\t|")], ".csv")
    @given(
        st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from([".jsonl", ".json", ".csv", ".tsv"])
    )
    def check(pairs, kind):
        path, made = tmp_path / f"rows{kind}", [{"question": q, "answer": a} for q, a in pairs]
        if kind == ".json":
            path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
        elif kind == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        else:
            buffer = io.StringIO()
            writer = csv.DictWriter(
                buffer, ["question", "answer"], delimiter="\t" if kind == ".tsv" else ",", quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(made)
            path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
        examples = outcome(path, bpe_tokenizer, 10_000)
        assert [(e.prompt, e.answer) for e in examples] == pairs
        for row, (_, answer) in zip(tokenize(examples, bpe_tokenizer, max_length=10_000), pairs, strict=True):
            text = decode(bpe_tokenizer, row["input_ids"][row["prompt_length"] :])
            assert text.removesuffix("<|endoftext|>").strip() == answer.removesuffix("<|endoftext|>").strip()

    check()


def test_any_document(tmp_path, bpe_tokenizer, full):
    """What a plain text says is what its passages say, but for spaces."""

    @many(full, 5_000, 100)
    @given(st.lists(st.text(string.ascii_letters + " .,é漢\n-", min_size=1, max_size=60), min_size=1, max_size=5))
    def check(paragraphs):
        path = tmp_path / "page.txt"
        path.write_text("\n\n".join(paragraphs), encoding="utf-8")
        examples = outcome(path, bpe_tokenizer)
        if examples is None:
            letters = "".join("".join(paragraphs).replace("-", "").split())  # a hyphen at the end of a line may go
            assert len(bpe_tokenizer(letters).input_ids) <= 1  # a text of a single token holds nothing to learn

    check()
