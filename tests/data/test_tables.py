"""Which text is a table, and what separates its fields."""

from __future__ import annotations

import gzip

import pytest
from helpers.rows import DEEP, write

from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.errors import UserError


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_separator_other_than_a_comma_is_recognised(tmp_path, separator, suffix):
    text = (
        separator.join(["id", "Question", "ANSWER"]) + "\n" + separator.join(["1", "Born, when?", '"a; b|c\td"']) + "\n"
    )
    content = text.encode() if suffix == ".csv" else gzip.compress(text.encode())
    rows = read_rows(write(tmp_path / f"a{suffix}", content))
    assert rows.rows == [{"id": "1", "Question": "Born, when?", "ANSWER": "a; b|c\td"}]
    assert len(rows.notes) == 1 and "is separated by" in rows.notes[0]


def test_commas_stay_the_separator_where_they_are(tmp_path):
    """A semicolon in a header does not make it one, nor do fields of other names."""
    for header, row in (("question,answer;really", "a;b,c"), ("frage,antwort", "wer;wie,was"), ("text", "a;b|c")):
        rows = read_rows(write(tmp_path / "a.csv", f"{header}\n{row}\n"))
        assert rows.rows == [dict(zip(header.split(","), row.split(","), strict=True))] and not rows.notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_that_a_spreadsheet_saved_as_text_is_a_table(tmp_path, encoding):
    """Excel's "Text (tab delimited)" is .txt, its "Unicode text" UTF-16 with a byte order mark."""
    content = "Question\tAnswer\nКто?\tТолстой, Л. Н.\n".encode(encoding)
    for file in ("a.txt", "a.csv"):
        rows = read_rows(write(tmp_path / file, content))
        assert rows.rows == [{"Question": "Кто?", "Answer": "Толстой, Л. Н."}] and not rows.mixed
        assert rows.where(0).endswith("line 2") and "separated by tabs" in rows.notes[0]
    for text in ('{"messages": []}\n{"messages": []}\n', '[\n {"messages": []},\n {"messages": []}\n]'):
        json_rows = read_rows(write(tmp_path / "json.txt", text.encode(encoding)))
        assert json_rows.rows == [{"messages": []}] * 2 and "a table of JSON objects" in json_rows.notes[0]


def test_named_columns_make_a_table_of_text(tmp_path):
    """Which without them is a document, with a remark; two of them are named, or the answer's alone."""
    for text in ("Frage\tAntwort\nWer?\tAnna, Lee\n", '{"Frage": "Wer?", "Antwort": "Anna, Lee"}\n'):
        path = write(tmp_path / "a.txt", text)
        for columns in (("frage", "Antwort"), (None, "antwort")):
            rows = read_rows(path, columns=columns)
            assert rows.rows == [{"Frage": "Wer?", "Antwort": "Anna, Lee"}] and not rows.mixed
        document = read_rows(path, columns=("Frage", "Reply"))
        assert document.mixed and "of which no column is known: it is read as a document" in document.notes[0]
    only = read_rows(write(tmp_path / "only.txt", "Antwort\nAnna, Lee\n"), columns=("Antwort",))
    assert only.rows == [{"Antwort": "Anna, Lee"}]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("Question time\nand a line more, with some\twords in it.", None),
        ("{Anna} lives here\nand a line more, with some\twords in it.", None),
        ("[1] Anna lives here\nand a line more.", None),
        ('{"name": "Anna"}\nand a line more.', "looks like JSON objects"),
        ('{"id": 1, "text": "x"} is how it begins.\nA document about JSON.', None),
        (
            "The answer,\tthen the rest\nand a line more, with some\twords in it.",
            "looks like a table separated by tabs",
        ),
        ("Input, Output\nHe said, yes, no, maybe.\nOther, though.", "do not fit this header"),
        ("Question | Answer\n\nQ1 | what | who", "do not fit this header"),
        ('{"question": "Who?", "answer": Ann}\n', "looks like JSON objects"),
        (DEEP, "looks like JSON objects"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_other_text_stays_a_document(tmp_path, text, note):
    rows = read_rows(write(tmp_path / "a.txt", text))
    assert rows.mixed and [note in line for line in rows.notes] == ([True] if note else [])


def test_a_name_decides_what_a_text_is(tmp_path):
    """.md is never a table, and a folder knows its tables as a single file is known."""
    text = "Question\tAnswer\nWho?\tAnn Lee was here.\n"
    assert read_rows(write(tmp_path / "a.md", text)).mixed
    write(tmp_path / "b.txt", text)
    with pytest.raises(UserError, match=r"both documents \(a.md\) and tables; name one file in it, such as b.txt"):
        read_rows(str(tmp_path))


def test_lines_of_empty_cells_are_skipped_and_counted(tmp_path):
    """A spreadsheet writes them for lines that were filled once, at the end and between others."""
    for separator, name in ((";", "a.csv"), ("\t", "a.tsv"), ("\t", "a.txt")):
        empty = [separator, f" {separator}", f'""{separator}""', separator * 5]
        lines = [empty[0], f"question{separator}answer", f"a{separator}b", *empty, f"c{separator}d", *empty]
        rows = read_rows(write(tmp_path / name, "\n".join(lines)))
        assert rows.rows == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
        assert rows.lines == [3, 8]
    with pytest.raises(UserError, match="a.csv, line 4 has an empty answer"):
        to_examples(read_rows(write(tmp_path / "a.csv", "question,answer\na,b\n,\nc,\n")))


def test_excels_first_line_is_the_separator(tmp_path):
    for first, separator in (("sep=;", ";"), ('"SEP=\t"', "\t"), ("sep=^", "^")):
        text = f"{first}\r\nquestion{separator}answer\r\nWho, then?{separator}Ann\r\n"
        for name in ("a.csv", "a.tsv", "a.txt"):
            rows = read_rows(write(tmp_path / name, text.encode("utf-16")))
            assert rows.rows == [{"question": "Who, then?", "answer": "Ann"}] and rows.lines == [3]


def test_the_separator_is_the_one_that_the_records_fit(tmp_path):
    rows = {
        "Frage, deutsch;Antwort\nWer?;Anna\n": {"Frage, deutsch": "Wer?", "Antwort": "Anna"},
        "Frage,deutsch;Antwort\nWer, bitte?;Anna\n": {"Frage,deutsch": "Wer, bitte?", "Antwort": "Anna"},
        "Question, German;Answer\nWer?;Anna\n": {"Question, German": "Wer?", "Answer": "Anna"},
        "frage;n,antwort\nwer;n,ich\n": {"frage;n": "wer;n", "antwort": "ich"},
    }
    assert {text: read_rows(write(tmp_path / "a.csv", text)).rows[0] for text in rows} == rows


def test_tabs_separate_the_fields_of_tsv(tmp_path):
    text = "text\nOne, two; three\n"
    assert read_rows(write(tmp_path / "a.tsv", text)).rows == [{"text": "One, two; three"}]
    rows = read_rows(write(tmp_path / "b.tsv.gz", gzip.compress(b"question\tanswer\na,b\tc\n"))).rows
    assert rows == [{"question": "a,b", "answer": "c"}]
