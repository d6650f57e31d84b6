"""A mistyped name of a model or of data is answered before any library is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.sources import check_data_name, check_model_name

RETAIN = ["--retain", "builtin"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--model", "./nowhere"], "There is no directory './nowhere'"),
        (["train", "--model", "a/b/c", "--forget", "builtin"], "There is no directory 'a/b/c'"),
        (["train", "--model", "m", "--forget", "nowhere.jsonl", *RETAIN], "There is no file nowhere.jsonl"),
        (["train", "--model", "m", "--forget", "a.txt,b.txt", *RETAIN], "There is no file a.txt"),
        (["train", "--model", "m", "--forget", "o/d", "--retain", "no where"], "is neither a file nor a hub name"),
        (["estimate", "--model", "/nowhere/at/all"], "There is no directory"),
        (["sweep", "--model", "~/nowhere"], "There is no directory"),
        (["data", "nowhere.csv"], "There is no file nowhere.csv"),
        (["ask", "./nowhere", "Who?"], "There is no directory './nowhere'"),
        (["merge", "--adapter", "nowhere", "--output-dir", "m"], "There is no directory 'nowhere': --adapter"),
    ],
)
def test_no_library_is_loaded_for_a_typo(arguments, message, tmp_path):
    code = (
        "import sys; from lowmem_npo.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and message in process.stderr, process.stderr
    assert process.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["locuslab/TOFU", "locuslab/TOFU:forget05/train@main", "o/name.jsonl-set"])
def test_names_on_the_hub(name):
    check_data_name(name)


def test_a_model_is_a_directory_or_a_name(tmp_path, byte_model):
    assert check_model_name(str(byte_model)) is True
    assert check_model_name("allenai/OLMo-1B-hf") is check_model_name("gpt2") is False
    with pytest.raises(UserError, match="holds no model"):
        check_model_name(str(tmp_path))
