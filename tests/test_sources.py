"""What the names of models and data may mean."""

from __future__ import annotations

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.sources import check_data_name, check_model_name


@pytest.mark.parametrize("name", ["locuslab/TOFU", "locuslab/TOFU:forget05/train@main", "o/name.jsonl-set"])
def test_names_on_the_hub(name):
    check_data_name(name)


def test_a_model_is_a_directory_or_a_name(tmp_path, byte_model):
    assert check_model_name(str(byte_model)) is True
    assert check_model_name("allenai/OLMo-1B-hf") is check_model_name("gpt2") is False
    with pytest.raises(UserError, match="holds no model"):
        check_model_name(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "as_file", "as_directory"),
    [
        ("model.gguf", "is a GGUF file, which is not trained on", "but a GGUF file: give the model"),
        ("adapter_config.json", "is a file: give the directory of a model", "but an adapter: give its base model here"),
    ],
)
def test_what_may_be_taken_for_a_model(file, as_file, as_directory, tmp_path, monkeypatch):
    (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    for name, told in ((file, as_file), (str(tmp_path / file), as_file), (str(tmp_path), as_directory)):
        with pytest.raises(UserError, match=told):
            check_model_name(name)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"model_type"', b"[" * 100_000, b"9" * 5000])
def test_a_configuration_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    told = "holds no model's configuration" if content == b"[]" else "is not valid JSON: "
    with pytest.raises(UserError, match=f"config.json' {told}"):
        check_model_name(str(tmp_path))
