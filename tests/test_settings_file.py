"""What a settings file may hold, and that everything else is refused in one sentence, soon and in little memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lowmem_npo.cli import main
from lowmem_npo.settings_file import read_settings

BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)).replace("*a0", "x")
BAD = {
    "a bomb of nine levels": (BOMB, "line 1 has a reference"),
    "an alias": ("lr: &x 1\nbeta: *x\n", "line 1 has a reference"),
    "a date": ("model: m\nrevision: 2024-01-31\n", "line 2: 2024-01-31 would be a date: put it in quotes"),
    "no date": ("revision: 2024-02-31\n", "line 1: '2024-02-31' would be a number or a date, but is none"),
    "a time": ("revision: 2024-01-31 10:00:00\n", "would be a date"),
    "a tag": ("lr: !!int x\n", "line 1 has a tag"),
    "a tag of Python's": ("lr: !!python/object/apply:os.system ['true']\n", "line 1 has a tag"),
    "a set": ("lora_targets: !!set {a, b}\n", "has a tag"),
    "a binary": ("model: !!binary aGk=\n", "has a tag"),
    "octal": ("seed: 0100\n", "line 1: 0100 would be 64: write it so, or put it in quotes"),
    "hexadecimal": ("seed: 0x10\n", "0x10 would be 16"),
    "to the base 60": ("seed: 1:30\n", "1:30 would be 90"),
    "minutes": ("lr: -1:30.5\n", "-1:30.5 would be -90.5"),
    "5,000 digits": ("seed: " + "9" * 5000 + "\n", "would be a number or a date, but is none"),
    "deep lists": ("a: " + "[" * 100_000, "line 1 goes more than 6 levels deep"),
    "deep blocks": ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 40)), ""),
    "deep objects": ("a: " + "{a: " * 100_000, "levels deep"),
    "a list": ("- a\n- a\n", "it must hold lines of the form `name: value`"),
    "a text": ("hello", "it must hold lines"),
    "nothing": ("", "it must hold lines"),
    "twice": ("lr: 1\nbeta: 1\nlr: 2\n", "line 3 has lr again: remove one of the two"),
    "two documents": ("lr: 1\n---\nlr: 2\n", "line 2 begins a second document"),
    "a list as a name": ("? [a]\n: 1\n", "a list or an object cannot be a name"),
    "no YAML": ("model: [m\n", "line 2 is not valid YAML"),
    "a tab": ("\tmodel: m\n", "line 1 is not valid YAML"),
    "a control character": ("model: \x07\n", "it is not valid YAML"),
    "a list for one value": ("seed: [1]\n", "--seed takes one value, and "),
    "one option in two spellings": ("batch-size: 3\nbatch_size: 4\n", "batch-size and batch_size are one option"),
    "one option by two names": ("learning_rate: 1e-3\nlr: 1e-4\n", "learning_rate and lr are one option"),
    "a switch and its opposite": ("qlora: true\nno_qlora: true\n", "There is no option --no_qlora"),
    "no option, without a value": ("training:\n", "There is no option --training"),
    "too large": ("# " + "x" * 2**20, "it has more than 1 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_settings_do_not_have_is_one_sentence(name, tmp_path, capsys):
    text, message = BAD[name]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    tracemalloc.start()
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 700


def test_bytes_and_devices(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ValueError, match="it is not UTF-8 text"):
        read_settings(tmp_path / "run.yaml")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read_settings(tmp_path / "endless")


def test_settings_are_read(tmp_path):
    content = {"model": "a/b", "lr": 1e-4, "qlora": True, "lora_targets": ["q_proj", "v_proj"], "retain": None,
               "lr_scheduler_kwargs": {"num_cycles": 2}, "revision": "2024-01-31", "seed": 7}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert read_settings(tmp_path / "run.yaml") == content


LETTERS = st.characters(codec="utf-8", exclude_characters="\x7f\x85\u2028\u2029\ufeff", min_codepoint=32)
TEXTS = st.text(LETTERS, max_size=20)  # PyYAML makes spaces of other line ends
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
PIECES = [
    "a: ", "b: 1\n", "- ", "[", "]", "{", "}", "&x ", "*x ", "!!int ", "!x ", "? ", ": ", "\n", "  ", "'", '"',
    "|\n", "#", ">\n", "%YAML 1.1\n", "---\n", "...\n", "2024-13-01", "1e999", "0x", "9" * 30, ",", "<<: ", "é", "\0",
]  # fmt: skip


def test_any_text_is_read_or_refused(tmp_path, full):
    path = tmp_path / "run.yaml"

    @settings(max_examples=20_000 if full else 300, deadline=None, suppress_health_check=list(HealthCheck))
    @example("a: " + "[" * 5000)
    @given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text(max_size=60)))
    def check(text):
        path.write_text(text, encoding="utf-8")
        begin = time.process_time()
        try:
            read = read_settings(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
        else:
            assert all(isinstance(name, str) for name in read)
        assert time.process_time() - begin < 5

    check()


def test_whatever_we_write_we_read(tmp_path, full):
    path = tmp_path / "run.yaml"

    @settings(max_examples=20_000 if full else 200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(
            st.from_regex("[a-z_]{1,10}", fullmatch=True),
            st.one_of(SCALARS, st.lists(SCALARS, max_size=3)),
            min_size=1,
            max_size=5,
        )
    )
    def check(content):
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        assert read_settings(path) == content

    check()
