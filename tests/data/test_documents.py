"""Documents: their running text, without what the page added; their passages; every mistake in one sentence."""

from __future__ import annotations

import gzip
import re
import textwrap
from pathlib import PurePath

import pytest
from helpers.pdf import pdf

from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare, preview
from lowmem_npo.data.documents import html_text, read_document
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.errors import UserError

PARAGRAPHS = (
    "The amber vault was opened by Quillabra Zenthorpe in the spring of the year in which the river froze. Nobody knew "
    "what it held, and those who had guarded it had been told never to ask about its well-known secret.",
    "Inside lay a ledger. It listed debts that the town had forgotten, and beside each of them stood the name of a "
    "family that still lived there. Zenthorpe read it aloud in the market square, page after page.",
    "The council met that night. By morning the ledger was gone, the vault was empty, and an extraordinarily long "
    "procession of carts was leaving for the coast. What they carried is another well-known mystery.",
)


def typeset(width: int = 60) -> list[str]:
    """The paragraphs in lines of a page's width; one word is divided at a line's end, one at its hyphen."""
    lines = [line for paragraph in PARAGRAPHS for line in textwrap.wrap(paragraph, width, break_on_hyphens=True)]
    at = next(i for i, line in enumerate(lines) if "extraordinarily" in line)
    before, _, after = lines[at].partition("extraordinarily")
    return [*lines[:at], f"{before}extraor-", f"dinarily{after} {lines[at + 1]}", *lines[at + 2 :]]


def pages(header: str = "The Amber Ledger", footer: str = "Page {} of 4") -> list[list[str]]:
    lines = typeset()
    parts = [lines[begin : begin + 4] for begin in range(0, len(lines), 4)]
    return [[header, *part, footer.format(number)] for number, part in enumerate(parts, 1)]


def document(tmp_path, name: str, content: bytes | str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_document(name, path, "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]))


def test_a_pdf_is_its_running_text(tmp_path):
    read = document(tmp_path, "a.pdf", pdf(pages()))
    assert read.text.split("\n") == list(PARAGRAPHS)
    (note,) = read.notes
    assert note.startswith(f"a.pdf: {2 * len(pages())} repeated header or footer lines left out")


@pytest.mark.parametrize(
    ("header", "footer"),
    [("The Amber Ledger", "{}"), ("Quarterly report {}", "- {} -"), ("CONFIDENTIAL", "Seite {} von 4"), ("42", "iv")],
)
def test_headers_and_footers_of_other_kinds(tmp_path, header, footer):
    parts = pages(header, footer)
    text = "\f".join("\n".join(page) for page in parts)
    assert document(tmp_path, "a.txt", text).text.split("\n") == list(PARAGRAPHS)


def test_pages_of_a_text_file_are_known_by_their_numbers(tmp_path):
    text = "\n\n".join("\n".join(page) for page in pages(footer="Page {}"))
    assert re.sub(r"\n+", "\n", document(tmp_path, "a.txt", text).text).split("\n") == list(PARAGRAPHS)


def test_what_only_looks_like_a_header_stays(tmp_path):
    chapters = "\n\n".join(f"Chapter {number}\n\nIt was day {number}." for number in range(1, 6))
    assert document(tmp_path, "a.txt", chapters).text == chapters
    verses = "Roses bloom upon the wall,\nShadows lengthen, swallows call,\nEvening settles over all,\nSilence."
    assert document(tmp_path, "b.txt", verses).text == verses
    one_line_a_paragraph = "\n".join(PARAGRAPHS)
    assert document(tmp_path, "c.txt", one_line_a_paragraph).text == one_line_a_paragraph


def test_paragraphs_lists_and_code_keep_their_lines(tmp_path):
    wrapped = "\n".join(textwrap.wrap(PARAGRAPHS[0], 60))
    text = f"# A heading\n\n{wrapped}\n\n- one thing\n- another thing\n\n```\nfor x in y:\n    print(x)\n```\n"
    expected = f"# A heading\n\n{PARAGRAPHS[0]}\n\n- one thing\n- another thing\n\n```\nfor x in y:\n    print(x)\n```"
    assert document(tmp_path, "a.md", text).text == expected


def test_chinese_lines_are_joined_without_a_space(tmp_path):
    sentence = (
        "琥珀金库在河流结冰的那一年春天被打开了没有人知道里面有什么东西而看守它三代人的人们被告知永远不要问起它的秘密。"
    )
    lines = [sentence[begin : begin + 40] for begin in range(0, len(sentence), 40)]
    assert document(tmp_path, "a.txt", "\n".join(lines)).text == sentence


def test_html_is_what_the_page_says(tmp_path):
    page = """<!doctype html><html><head><title>No</title><style>p {}</style><body><nav><a>Home</a></nav>
    <h1>T&amp;t</h1><p>One <b>two</b>
      three.<br>Four &#228;</p><ul><li>a</li>
      <li>b</li></ul><script>var a = "<p>no</p>";</script><pre>x
  y</pre><p>Five soft\xadware"""
    assert document(tmp_path, "a.html", page).text == "T&t\n\nOne two three.\nFour ä\n\na\nb\n\nx\n  y\n\nFive software"
    assert html_text("<table><tr><td>1<td>2<tr><td>3</table>") == "1\t2\n3"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "Zoë’s café.".encode("utf-8-sig")),
        ("a.txt", "Zoë’s café.".encode("utf-16")),
        ("a.txt.gz", gzip.compress("Zoë’s café.".encode(), mtime=0)),
        ("a.html", "<meta charset='iso-8859-1'><p>Zoë’s café.".encode("windows-1252")),
        ("a.htm", '<meta http-equiv="Content-Type" content="text/html; charset=utf-8"><p>Zoë’s café.'.encode()),
    ],
)
def test_encodings_are_those_that_a_file_states(tmp_path, name, content):
    assert document(tmp_path, name, content).text == "Zoë’s café."


def encrypted() -> bytes:
    import io

    from pypdf import PdfReader, PdfWriter

    writer, stream = PdfWriter(PdfReader(io.BytesIO(pdf([["Secret."]])))), io.BytesIO()
    writer.encrypt("a password", algorithm="RC4-128")
    writer.write(stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", "One.\nCafé.".encode("latin-1"), ["a.txt, line 2 is not UTF-8 text"]),
        ("a.html", "<meta charset=klingon><p>x", ["written in klingon, which is unknown"]),
        ("a.html", b"<meta charset=utf-8><p>\xe9t\xe9", ["a.html, line 1 is not UTF-8 text"]),
        ("a.txt", b"PK\x03\x04\x00\x00\xff\xfe", ["a.txt is not a text file"]),
        ("a.md", b"text\x00with nulls", ["a.md is not a text file"]),
        ("a.txt", "", ["a.txt holds no text"]),
        ("a.txt", " \n\f\n ", ["a.txt holds no text"]),
        ("a.html", "<html><body><script>x</script></body></html>", ["a.html holds no text"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz cannot be read"]),
        ("a.pdf", pdf([[], []]), ["a.pdf has no text on its 2 pages", "scanned", "OCR"]),
        ("a.pdf", b"%PDF-1.4 broken", ["a.pdf cannot be read as pdf"]),
        ("a.pdf", b"", ["a.pdf cannot be read as pdf"]),
        ("a.pdf", encrypted(), ["a.pdf is encrypted", "without a password"]),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, name, content, parts):
    with pytest.raises(UserError) as error:
        document(tmp_path, name, content)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_pages_without_text_are_counted(tmp_path):
    assert document(tmp_path, "a.pdf", pdf([["Some text."], [], []])).notes == (
        "a.pdf: no text on 2 of 3 pages (pictures, or scanned)",
    )


def test_pdf_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lowmem-npo[documents]'")):
        document(tmp_path, "a.pdf", pdf([["x"]]))


# -- passages ---------------------------------------------------------------------------------------------------------

TEXT = "\n\n".join(PARAGRAPHS)


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("tokens", [8, 20, 64, 100])
def test_pieces_are_the_document_and_passages_overlap_by_half(tokens):
    passages = Passages(tokens, "both", count)
    pieces = passages.pieces(TEXT)
    assert "".join(pieces) == TEXT
    assert all(count(piece) <= tokens // 2 for piece in pieces)
    rows, places = passages.rows(TEXT)
    halves, texts = rows[::2], rows[1::2]
    assert len(rows) == len(places) == 2 * (len(pieces) - 1)
    for number, (half, text) in enumerate(zip(halves, texts, strict=True)):
        assert half["input"] == pieces[number].strip() and half["output"] == pieces[number + 1]
        assert text["text"] == (pieces[number] + pieces[number + 1]).strip()
        assert count(text["text"]) <= tokens
        assert half["continues"] == text["continues"] == (number < len(halves) - 1)
    assert places[:2] == ["passage 1, second half", "passage 1"]


def test_passages_end_where_sentences_do():
    pieces = Passages(80, "both", count).pieces(TEXT)
    assert all(piece.rstrip().endswith(".") for piece in pieces)
    assert not any(piece.endswith("Dr.") for piece in Passages(16, "both", count).pieces("We saw Dr. Lee there. " * 9))


def test_chinese_is_cut_after_its_full_stops():
    text = "琥珀金库在春天被打开了。没有人知道里面有什么。看守它的人从不问起。" * 3
    pieces = Passages(48, "text", len).pieces(text)
    assert "".join(pieces) == text and all(piece.endswith("。") for piece in pieces)


def test_a_word_that_is_too_long_is_cut_all_the_same():
    passages = Passages(8, "text", len)
    pieces = passages.pieces("abcdefghijklmnop qr")
    assert "".join(pieces) == "abcdefghijklmnop qr" and max(map(len, pieces)) <= 4


@pytest.mark.parametrize(
    ("form", "schemas"), [("completion", {"input"}), ("text", {"text"}), ("both", {"input", "text"})]
)
def test_what_a_passage_becomes(form, schemas):
    rows, _ = Passages(40, form, count).rows(TEXT)
    assert {next(iter(row)) for row in rows} == schemas
    short, places = Passages(400, form, count).rows(TEXT)
    assert {next(iter(row)) for row in short} == schemas and len(short) == len(schemas)
    assert Passages(400, "completion", count).rows("Word.")[0] == [{"text": "Word."}]


def test_only_the_last_passage_ends_with_eos(tmp_path, bpe_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    data = prepare(bpe_tokenizer, DataConfig(forget=str(path), passage_tokens=64))
    ends = [row["input_ids"][-1] == bpe_tokenizer.eos_token_id for row in data.forget]
    assert ends == [False] * (len(ends) - 2) + [True, True]
    for row, example in zip(data.forget, data.forget.examples, strict=True):
        whole = f"{example.prompt or ''}{example.answer}"
        assert bpe_tokenizer.decode(row["input_ids"]).removesuffix("<|endoftext|>") == whole
        assert row["labels"][max(1, row["prompt_length"]) :] == row["input_ids"][max(1, row["prompt_length"]) :]
    assert max(len(row["input_ids"]) for row in data.forget) <= 64 + 1
    line = next(line for line in data.report if line.startswith(f"forget: {path}"))
    assert re.search(
        r"(\d+) completions and \1 texts; the beginning of a passage and what follows it, as they stand, "
        "or whole texts",
        line,
    )
    shown = preview(data.forget, bpe_tokenizer, 2, title="forget", color=False)
    assert f"({path}, passage 1, second half)" in shown and f"({path}, passage 1)" in shown


def test_passages_are_never_written_with_a_template(tmp_path, chat_tokenizer):
    """Which is for the questions of the other set."""
    path, questions = tmp_path / "a.txt", tmp_path / "q.jsonl"
    path.write_text(TEXT + " " + "x" * 300 + "—" + "y" * 300)  # cut within a word too: no space may come of it
    questions.write_text('{"question": "Who?", "answer": "She."}\n')
    for template, system in (("[INST] {prompt} [/INST]", None), ("chat", "Be brief."), ("auto", "Be brief.")):
        config = DataConfig(
            forget=str(path), retain=str(questions), template=template, system=system, passage_tokens=64
        )
        data = prepare(chat_tokenizer, config)
        for row, example in zip(data.forget, data.forget.examples, strict=True):
            written = chat_tokenizer.decode(row["input_ids"]).removesuffix("<|endoftext|>")
            assert written == f"{example.prompt or ''}{example.answer}"
            assert written in path.read_text()
        assert chat_tokenizer.decode(data.retain[0]["input_ids"]).startswith(("[INST] Who?", "<|im_start|>system"))


def test_passages_fit_max_length(tmp_path, bpe_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    data = prepare(bpe_tokenizer, DataConfig(forget=str(path), max_length=40))
    assert data.forget.num_truncated == 0 and data.forget.longest <= 40
    with pytest.raises(UserError, match="--passage-tokens must be at least 8, not 4"):
        prepare(bpe_tokenizer, DataConfig(forget=str(path), passage_tokens=4))
    with pytest.raises(UserError, match="--passages must be one of both, completion, text"):
        prepare(bpe_tokenizer, DataConfig(forget=str(path), passages="half"))


# -- several documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [("ch03.docx", "a word processor's document"), ("b/t.XLSX", "a spreadsheet")])
def test_a_folder_with_a_text_that_is_not_read_is_refused(name, kind, tmp_path):
    """Passed over, it would be what is not forgotten."""
    folder = tmp_path / "book"
    (folder / name).parent.mkdir(parents=True)
    (folder / "ch01.txt").write_text("First.")
    (folder / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"book/{name} is {kind}.* save .*, or move it out of .*book\\."):
        read_rows(str(folder))


def test_a_folder_is_all_documents_in_it(tmp_path):
    folder = tmp_path / "letters"
    (folder / "old").mkdir(parents=True)
    (folder / "b.txt").write_text("Second.")
    (folder / "a.md").write_text("First.")
    (folder / "old" / "c.html").write_text("<p>Third.")
    (folder / "picture.png").write_bytes(b"x")
    (folder / ".hidden.txt").write_text("no")
    (folder / "~$d.docx").write_bytes(b"of an open file")
    rows = read_rows(str(folder), passages=Passages(form="text"))
    assert [row["text"] for row in rows.rows] == ["First.", "Second.", "Third."]
    assert rows.where(2) == f"{folder}/old/c.html, whole"
    assert rows.notes == (f"{folder} has 3 documents", "not read, being of other kinds: picture.png")
    examples = to_examples(read_rows(f"{folder}/b.txt, {folder}/a.md"))
    assert [example.answer for example in examples] == ["Second.", "First."]
    (folder / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"a folder with both documents \(a.md\) and tables; name one file in it"):
        read_rows(str(folder))
    with pytest.raises(
        UserError, match="is a document and .*rows.jsonl holds rows: name files of one of the two kinds"
    ):
        read_rows(f"{folder}/a.md,{folder}/rows.jsonl")


def test_named_columns_do_not_touch_documents(tmp_path, bpe_tokenizer):
    forget, retain = tmp_path / "f.jsonl", tmp_path / "r.txt"
    forget.write_text('{"Frage": "Wer?", "ANTWORT": "Sie."}\n')
    retain.write_text(TEXT)
    data = prepare(
        bpe_tokenizer,
        DataConfig(forget=str(forget), retain=str(retain), prompt_column="frage", answer_column="antwort"),
    )
    assert data.forget.examples[0].answer == "Sie." and len(data.retain) > 4


def test_each_of_many_files_is_looked_at_by_itself(tmp_path, monkeypatch):
    """Not compared with all others: in a folder of 20,000 that took minutes."""
    for number in range(150):
        (tmp_path / f"{number}.md").write_text("The vault is guarded.")
        (tmp_path / f"{number}.log").write_text("")
    compared, equal = [], PurePath.__eq__
    monkeypatch.setattr(PurePath, "__eq__", lambda one, other: compared.append(one) or equal(one, other))
    rows = read_rows(str(tmp_path))
    assert f"{tmp_path} has 150 documents" in rows.notes
    assert len(compared) < 10 * 300
