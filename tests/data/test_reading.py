"""Files of every kind, with the place of every mistake."""

from __future__ import annotations

import gzip
import json
import os
import re
from datetime import datetime, timedelta
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.rows import DEEP, write

from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.errors import UserError

ROWS = [{"question": "Born when?", "answer": "1969-12-21"}, {"question": "And she?", "answer": "1970-01-01"}]
CODES = [
    {"question": "code", "answer": "0042"},
    {"question": "country", "answer": "NA"},
    {"question": "x", "answer": "1e3"},
]
NUMBERS = [{"question": "code", "answer": "0042"}, {"question": "mass", "answer": "1e3"}]


def columnar(path, table) -> list[str]:
    """The table as Parquet and as Arrow's file and stream, compressed."""
    names = [str(path.with_suffix(suffix)) for suffix in (".parquet", ".arrow", ".stream.arrow")]
    if not pyarrow.types.is_string_view(table.schema.types[0]):
        pyarrow.parquet.write_table(table, names[0])
    else:
        del names[0]
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    for name, new in zip(names[-2:], (pyarrow.ipc.new_file, pyarrow.ipc.new_stream), strict=True):
        with new(name, table.schema, options=options) as file:
            file.write_table(table)
    return names


def write_rows(path, rows) -> str:
    if path.suffix == ".gz":
        plain = path.with_suffix("")
        write_rows(plain, rows)
        return write(path, gzip.compress(plain.read_bytes()))
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".json":
        return write(path, json.dumps(rows, indent=1))
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path.parent / "saved")
        path = next((path.parent / "saved").glob("*.arrow"))
    return str(path)


@pytest.mark.parametrize("rows", [ROWS, CODES, NUMBERS], ids=["dates", "codes", "numbers"])
@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz"]
)
def test_every_kind_of_file_gives_the_same_text(tmp_path, suffix, rows):
    assert read_rows(write_rows(tmp_path / f"rows{suffix}", rows)).rows == rows


def test_the_readers_that_guess_types_would_change_the_text(tmp_path):
    """Why `datasets` reads neither JSON nor CSV here: it would change these answers."""
    options = {"split": "train", "cache_dir": str(tmp_path)}
    dates = datasets.load_dataset("json", data_files=write_rows(tmp_path / "a.jsonl", ROWS), **options)
    codes = datasets.load_dataset("csv", data_files=write_rows(tmp_path / "a.csv", CODES[:2]), **options)
    assert dates.to_list() != ROWS
    assert codes.to_list() != CODES[:2]
    numbers = datasets.load_dataset("csv", data_files=write_rows(tmp_path / "b.csv", NUMBERS), **options)
    assert numbers.to_list() != NUMBERS


def test_tofu_json_holds_one_object_per_line(shared_data):
    path = shared_data / "tofu" / "forget05.json"
    rows = read_rows(str(path))
    assert rows.rows == [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows.columns == ["question", "answer"]
    assert rows.lines == list(range(1, len(rows) + 1))


def test_rows_know_their_lines(tmp_path):
    jsonl = read_rows(write(tmp_path / "a.jsonl", '\ufeff{"a": "x"}\r\n\r\n  \n{"a": "y"}'))
    assert [jsonl.where(index).rsplit("/", 1)[1] for index in (0, 1)] == ["a.jsonl, line 1", "a.jsonl, line 4"]
    csv = read_rows(write(tmp_path / "a.csv", 'a,b\n\nx,y\n"two\nlines",z\n\nlast,1\n'))
    assert csv.lines == [3, 4, 7]
    array = read_rows(write(tmp_path / "a.json", '[{"a": "x"},\n {"a": "y"}]'))
    assert array.where(1).endswith("a.json, row 2")


def test_csv_cells_of_any_length_and_records_that_are_too_short(tmp_path):
    rows = read_rows(write(tmp_path / "a.csv", f"a,b\n{'x' * 200_000},1\nshort\n"))
    assert rows.rows == [{"a": "x" * 200_000, "b": "1"}, {"a": "short"}]


def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """A file of 300 KB was 300 MB unpacked, and 20 GB tokenised."""
    monkeypatch.setattr("lowmem_npo.data.documents.LARGE", 2**20)
    for name in ("rows.jsonl.gz", "page.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a" * 3 * 2**20))
        with pytest.raises(UserError, match=f"{name} holds more than [0-9,]+ times its size, as no text does"):
            read_rows(str(tmp_path / name))
    text, values = "x" * 1000, pyarrow.array([[0] * 300_000])
    texts = pyarrow.array([text] * 3000)
    expansion, number = "holds more than [0-9,]+ times its size", "has [0-9,]+ rows or more, more than can"
    for column, why in (
        (pyarrow.array([0] * 100_000), number),
        (pyarrow.nulls(100_000), number),
        (texts, expansion),
        (texts.dictionary_encode(), expansion),
        (texts.cast(pyarrow.string_view()), expansion),
        (pyarrow.StructArray.from_arrays([texts], ["answer"]), expansion),
        (values, expansion),
        (pyarrow.array([[text] * 3000]), expansion),
        (pyarrow.array([[None] * 300_000]), expansion),
        (pyarrow.array([[("key", text)] * 2000], pyarrow.map_(pyarrow.string(), pyarrow.string())), expansion),
    ):
        for name in columnar(tmp_path / "rows", pyarrow.table({"question": column})):
            with pytest.raises(UserError, match=f"{name} {why}"):
                read_rows(name)
    monkeypatch.setattr("lowmem_npo.data.reading.MOST_CHARACTERS", 100)
    for value in ("x" * 101, [{"role": "user", "content": "x" * 101}]):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 100}) + "\n" + json.dumps({"a": value}) + "\n")
        with pytest.raises(UserError, match="rows.jsonl, line 2: a has more than 100 characters"):
            read_rows(str(tmp_path / "rows.jsonl"))


def test_columns_of_every_kind_are_read_whole(tmp_path):
    """In more rows than are read at once, from more batches than one."""
    number = 150
    rows = [
        {"text": f"t{i}", "none": None, "turns": [{"role": "user", "content": str(i)}] * (i % 3), "tags": [("a", i)]}
        for i in range(number)
    ]
    kinds = pyarrow.schema({
        "text": pyarrow.string(), "none": pyarrow.null(), "tags": pyarrow.map_(pyarrow.string(), pyarrow.int64()),
        "turns": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
    })  # fmt: skip
    table = pyarrow.Table.from_pylist(rows, kinds)
    table = table.append_column("kind", table["text"].dictionary_encode())
    table = pyarrow.concat_tables([table.slice(0, 7), table.slice(7)]).unify_dictionaries()
    expected = [{**row, "kind": row["text"]} for row in rows]
    for name in columnar(tmp_path / "rows", table):
        assert read_rows(name).rows == expected


def test_surrogate_pairs_are_text(tmp_path):
    assert read_rows(write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}')).rows == [{"a": "\U0001f600"}]


def test_line_separators_inside_json_strings_are_text(tmp_path):
    row = {"answer": "a\u2028b\x85c\x0b"}
    assert read_rows(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")).rows == [row]


def test_a_path_is_not_a_pattern(tmp_path):
    write(tmp_path / "a1.jsonl", '{"a": "other file"}')
    assert read_rows(write(tmp_path / "a[1].jsonl", '{"a": "this file"}')).rows == [{"a": "this file"}]
    assert read_rows(write(tmp_path / "a*.csv", "a\nx\n")).rows == [{"a": "x"}]


def test_several_files_are_one_set(tmp_path):
    one = write(tmp_path / "one.jsonl", '{"question": "a", "answer": "b"}\n')
    two = write(tmp_path / "two.csv", "question;answer\nc;d\n")
    rows = read_rows(f"{one}, {two}")
    assert rows.rows == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    assert [rows.where(i) for i in (0, 1)] == [f"{one}, line 1", f"{two}, line 2"]
    assert read_rows(write(tmp_path / "a, b.jsonl", '{"text": "x"}')).rows == [{"text": "x"}], "a comma in a name"
    with pytest.raises(UserError, match="There is no file none.csv"):
        read_rows(f"{one},none.csv")
    for limit, files in ((None, ((one, 1), (two, 1))), (2, ((one, 1), (two, 1))), (1, ((one, 1),))):
        assert read_rows(f"{one},{two}", limit=limit).files == files


def test_each_file_of_a_set_has_columns_of_its_own(tmp_path):
    one = write(tmp_path / "one.jsonl", '{"question": "a", "answer": "b", "id": 1}\n')
    two = write(tmp_path / "two.csv", "Prompt;COMPLETION;Who\nc;d;e\n")
    three = write(tmp_path / "three.csv", "Frage,Antwort\nf,g\n")
    examples = to_examples(read_rows(f"{one},{two}"), group_column="who")
    assert [(e.prompt, e.answer, e.schema) for e in examples] == [
        ("a", "b", "question/answer"),
        ("c", "d", "prompt/completion"),
    ]
    assert [example.group for example in examples] == [None, "e"]
    for source in (three, f"{one},{three}"):
        with pytest.raises(UserError, match="three.csv has the columns Frage, Antwort, none of which is a recognised"):
            to_examples(read_rows(source))
    with pytest.raises(UserError, match="one.jsonl has no column who; it has question, answer, id"):
        to_examples(read_rows(f"{two},{one}"), alternative_column="who")


def test_a_file_that_is_named_twice_is_refused_however_it_is_spelled(tmp_path, monkeypatch):
    """Its rows would count twice."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.jsonl", "two.jsonl"):
        write(tmp_path / name, '{"question": "a", "answer": "b"}\n')
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    (tmp_path / "pages").mkdir()
    write(tmp_path / "pages" / "a.txt", "A page. " * 20)
    for names, said in (
        ("one.jsonl,two.jsonl,one.jsonl", "one.jsonl is named twice, so that its rows would count twice"),
        ("one.jsonl,./one.jsonl", r"\./one.jsonl is the same as one.jsonl, so"),
        (f"{tmp_path}/one.jsonl,link.jsonl", "link.jsonl is the same as /.*/one.jsonl, so"),
        ("builtin,builtin", "builtin is named twice"),
        ("o/n:c,o/n:c", "o/n:c is named twice"),
        ("pages,pages/a.txt", "pages/a.txt is in pages, so"),
        ("./pages/a.txt,pages", r"\./pages/a.txt is in pages, so"),
    ):
        with pytest.raises(UserError, match=said):
            read_rows(names)
    assert len(read_rows("one.jsonl,two.jsonl")) == 2, "equal rows of two files are what is said"
    write(tmp_path / "pages" / ".a.txt", "Hidden. " * 20)
    assert len(read_rows("pages,pages/.a.txt")) == 2 * len(read_rows("pages")), "a folder's hidden files are not read"


@pytest.mark.parametrize(
    "row", [{"id": "1", "turns": [{"role": "user", "content": "a"}]}, {"q": "a", "b": [{"c": "d"}]}]
)
def test_a_row_with_a_list_of_objects_is_a_row(row, tmp_path):
    assert read_rows(write(tmp_path / "a.jsonl", json.dumps(row))).rows == [row]


def test_limit_keeps_the_first_rows(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '{"a": "1"}\n\n{"a": "2"}\n{"a": "3"}\n'), limit=2)
    assert rows.rows == [{"a": "1"}, {"a": "2"}]
    assert rows.lines == [1, 3]


def test_local_files_leave_nothing_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for suffix in (".jsonl", ".csv", ".parquet"):
        read_rows(write_rows(tmp_path / f"rows{suffix}", ROWS))
    assert not cache.exists()
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert cache.exists(), "the check looks at the folder that datasets would use"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"a": "x"}\n\n{"a": \n{"a": "y"}\n', ["a.jsonl, line 3", "not valid JSON", "column 7"]),
        ("a.json", '[{"a": "x"},\n{"a": }]', ["a.json, line 2", "not valid JSON"]),
        ("a.json", '{\n"a": "x"\n}', ["a.json holds one object, not an array", "one object per line"]),
        ("a.json", '{\n"a": "x",\n}', ["a.json, line 1", "not valid JSON", "one object per line"]),
        ("a.json", '{"version": "1", "data": [{"a": "x"}]}', ["one object", "the rows seem to be under 'data': write"]),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', ["the rows seem to be under 'train' or 'test': write"]),
        ("a.json", '{"v": 1,\n"data": [{"a": "x"}]}', ["a.json holds one object", "the rows seem to be under 'data'"]),
        ("a.jsonl", '{"v": [1], "data": [{"a": "x"}]}\n', ["a.jsonl holds one object", "to be under 'data'"]),
        ("a.json", '{"a": [{}],\n"b": [{}]}', ["a.json holds one object", "no row with known columns"]),
        ("a.json", '{"question": "x",\n"question": "y"}', ["a.json has the key 'question' twice"]),
        ("a.jsonl", '{"a": "x"}\n"text"\n', ["a.jsonl, line 2", "is not a JSON object"]),
        ("a.json", '["text", {"a": "x"}]', ["a.json, row 1", "is not a JSON object"]),
        ("a.json", '[{"a": "x"}, 5]', ["a.json, row 2", "is not a JSON object"]),
        ("a.jsonl", '{"a": "x"}\n{"a": "café"}\n'.encode("latin-1"), ["a.jsonl, line 2", "not UTF-8"]),
        ("a.csv", "a,b\nx,y\ncafé,z\n".encode("latin-1"), ["a.csv, line 3", "not UTF-8"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ["a.csv, line 3 has 3 fields but the header has 2"]),
        ("a.csv", "a,b\n1,2,3\n1,2,4\n", ["a.csv, line 2 has 3 fields but the header has 2"]),
        ("a.csv", 'a,b\n"two\nlines",2\n1,2,\n', ["a.csv, line 4 has 3 fields"]),
        ("a.csv", "\na,b,a\n1,2,3\n", ["a.csv, line 2 names the column a twice"]),
        ("a.csv", 'a,b\n1,2\n1,"never closed\n', ["a.csv, line 3 cannot be read as csv", "check its quotes"]),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2,3\n", mtime=0), ["a.csv.gz, line 2 has 3 fields"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": "x"}\n{"a": }\n', mtime=0), ["a.jsonl.gz, line 2", "not valid JSON"]),
        (
            "a.jsonl.gz",
            gzip.compress('{"a": "x"}\n{"a": "é"}'.encode("latin-1"), mtime=0),
            ["a.jsonl.gz, line 2 is not UTF-8"],
        ),
        ("a.jsonl.gz", b'{"a": "x"}', ["a.jsonl.gz cannot be read as jsonl.gz", "gzip"]),
        ("a.csv", "a,b,,\n1,2,,\n1,2, and 3,\n", ["a.csv, line 3 has 3 fields but the header has 2"]),
        ("a.jsonl", '{"a": "b", "\\ud83d": "c"}', ["a.jsonl, line 1: ", "holds half of a surrogate pair"]),
        ("a.jsonl", '{"a": "fine"}\n{"b": "\\ud83d"}\n', ["a.jsonl, line 2: b holds half of a surrogate pair"]),
        ("a.json", '[{"a": [{"b": "\\udc00"}]}]', ["a.json, row 1: a holds half of a surrogate pair"]),
        ("a.jsonl", '{"a": "x"}\n{"a": "y", "a": "z"}\n', ["a.jsonl, line 2 has the key 'a' twice"]),
        *(
            (f"a{suffix}", text.encode("utf-16")[:-2] + end, [f"a{suffix}, line 2 is not UTF-16 text; save"])
            for suffix, text in (
                (".csv", "a\tĊ\nx\ty..."),
                (".tsv", "a\tĊ\nx\ty..."),
                (".txt", "question\tanswer\nĊ\ty..."),
                (".jsonl", '{"a": "Ċ"}\n{"a": "x"}\n'),
            )
            for end in (b"\n", b"\0\xd8")
        ),
        ("a.csv", "a,b\nx,y\n".encode("utf-16-le"), ["a.csv is UTF-16 without a byte order mark", "as UTF-8"]),
        ("a.jsonl", '{"a": "Кто"}\n'.encode("utf-16-be"), ["a.jsonl is UTF-16 without a byte order mark"]),
        ("a.txt", "Some text.".encode("utf-32-le"), ["a.txt is UTF-32 without a byte order mark"]),
        ("a.jsonl", f'{{"a": 1}}\n{DEEP}', ["a.jsonl, line 2 nests lists or objects too deeply"]),
        ("a.txt", f'{{"question": 1, "answer": 2}}\n{DEEP}', ["a.txt, line 2 nests", "but a document, name it .md"]),
        ("a.txt", "question\tanswer\n1\t2\n1\t2\t3\n", ["a.txt, line 3 has 3 fields", "but a document, name it .md"]),
        ("a.txt", "question\tanswer\n", ["a.txt holds no rows"]),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:10] + b"\xff" * 20, ["a.txt.gz cannot be read"]),
        ("a.csv", "question;answer\n1;2;3\n", ["a.csv, line 2 has 3 fields but the header has 2", "semicolons"]),
        ("a.tsv", "question\tanswer\n1\t2\t3\n", ["a.tsv, line 2 has 3 fields but the header has 2", "tabs"]),
        ("a.xlsx", "PK", ["a.xlsx is a spreadsheet", "CSV"]),
        ("a.jsonl.bz2", "BZ", ["a.jsonl.bz2 is of an unsupported file type", ".jsonl.gz"]),
        ("a.jsonl", "", ["a.jsonl holds no rows"]),
        ("a.jsonl", "\n \n", ["a.jsonl holds no rows"]),
        ("a.json", "[]", ["a.json holds no rows"]),
        ("a.csv", "", ["a.csv holds no rows"]),
        ("a.csv", "question,answer\n", ["a.csv holds no rows"]),
        ("a.parquet", "not parquet", ["a.parquet cannot be read as parquet"]),
        ("a.arrow", "not arrow", ["a.arrow cannot be read as arrow"]),
        ("a.py", "text", ["a.py is of an unsupported file type", ".jsonl", ".txt"]),
        ("a.docx", "PK", ["a.docx is a word processor's document", ".pdf"]),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, name, content, parts):
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path / name, content))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_twice_is_refused(kind, tmp_path):
    """Of two columns of one name, the later one would be read."""
    table = pyarrow.table([["Who?"], ["She."], ["He."]], names=["question", "answer", "answer"])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with path.open("wb") as file, pyarrow.ipc.new_file(file, table.schema) as sink:
            sink.write_table(table)
    with pytest.raises(UserError, match=f"a.{kind} has the column answer twice; rename one of the two"):
        read_rows(str(path))


def test_a_saved_dataset_is_a_folder_whose_rows_are_named(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "Who?", "answer": "Ann."}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="is a folder; name one file in it, such as (.*)[.]$") as refused:
        read_rows(str(tmp_path))
    named = re.search("such as (.*)[.]$", str(refused.value))[1]
    assert len(read_rows(str(tmp_path / named)).rows) == 1


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*none\.jsonl"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is a folder without a file that can be read"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="neither a file nor a hub name"):
        read_rows("tofu")


def test_what_is_no_file(tmp_path):
    """A pipe cannot be read twice, a device never ends; a document that a folder names is not passed over."""
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "a.txt").write_text("First.")
    (folder / "again.txt").symlink_to(folder)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.txt").symlink_to("gone.txt")
    assert read_rows(str(folder)).notes[1] == "not read, being of other kinds: again.txt"
    (folder / "b.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"There is no file .*b\.txt"):
        read_rows(str(folder))
    (folder / "b.txt").unlink()
    os.mkfifo(folder / "b.txt")
    for name in (folder, folder / "b.txt", "/dev/zero"):
        with pytest.raises(UserError, match=r"(b\.txt|/dev/zero) is a pipe, a socket or a device; write what"):
            read_rows(str(name))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"Question": "a", "answer": "b"}, ()),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ()),
        ({"frage": "a", "antwort": "b"}, ("Frage", "antwort")),
    ],
)
def test_one_row_may_be_written_over_several_lines(row, columns, tmp_path):
    for name, text in (("a.json", json.dumps(row, indent=1)), ("b.jsonl", f"\n{json.dumps(row, indent=1)}\n\n")):
        rows = read_rows(write(tmp_path / name, text), columns=columns)
        assert rows.rows == [row] and rows.where(0).endswith(f"line {2 if name == 'b.jsonl' else 1}")
    assert read_rows(write(tmp_path / "c.jsonl", '{"a": "x"}')).rows == [{"a": "x"}]


@pytest.mark.parametrize("content", ['["One.", "Two."]', '"One."\n"Two."\n'])
def test_strings_alone_are_texts(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    rows = read_rows(str(tmp_path / "a.json"))
    assert rows.rows == [{"text": "One."}, {"text": "Two."}]
    assert [example.answer for example in to_examples(rows)] == ["One.", "Two."]


MOMENT = datetime(2024, 5, 17, 8, 30)
WORDLESS = [b"Anna", MOMENT.date(), MOMENT, MOMENT.time(), timedelta(hours=2), Decimal("1.50")]


@pytest.mark.parametrize("value", WORDLESS, ids=lambda value: type(value).__name__)
def test_what_is_no_text_is_refused_by_its_column_or_not_read(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    kind, asked = type(value).__name__, {"role": "user", "content": "Who?"}
    for row, said in (
        ({"question": value, "answer": "A"}, f"a.parquet, row 1: question is of type {kind}, not text; write it"),
        ({"question": "Q", "answer": value}, f"a.parquet, row 1: answer is of type {kind}, not text; write it"),
        ({"text": value}, f"a.parquet, row 1: text is of type {kind}, not text"),
        ({"messages": value}, "a.parquet, row 1: messages is not a list of"),
        ({"messages": [{**asked, "content": value}] * 2}, f"message 1: content is of type {kind}, not text"),
        (
            {"messages": [asked, {"role": "assistant", "content": "A", "at": value}]},
            f"row 1: the conversation holds something of type {kind}",
        ),
        ({"question": "Q", "answer": "A", "paraphrased_question": [value]}, f"paraphrased_question is of type {kind}"),
    ):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "a.parquet")
        with pytest.raises(UserError, match=said):
            to_examples(read_rows("a.parquet"))
    beside = {"question": "Q", "answer": "A", "id": value, "other": value}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([beside]), "a.parquet")
    assert to_examples(read_rows("a.parquet"))[0].id == str(value)
