"""Names of OLMo's original format, and those that stay."""

import json

import huggingface_hub.constants
import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.model.names import Base, commit_of, resolve_name
from lowmem_npo.model.saved_adapter import resolve_base
from lowmem_npo.report.as_audited import recorded_base


@pytest.mark.parametrize(
    "typed, loaded",
    [
        ("allenai/OLMo-7B", "allenai/OLMo-7B-hf"),
        ("allenai/OLMo-1B", "allenai/OLMo-1B-hf"),
        ("allenai/OLMo-7B-0424", "allenai/OLMo-7B-0424-hf"),
        ("allenai/OLMo-7B-0724", "allenai/OLMo-7B-0724-hf"),
        ("allenai/OLMo-1B-0724", "allenai/OLMo-1B-0724-hf"),
        ("ALLENAI/olmo-7b/", "allenai/OLMo-7B-hf"),
    ],
)
def test_original_olmo_names(typed, loaded):
    lines = []
    assert resolve_name(typed, say=lines.append) == loaded
    assert len(lines) == 1 and loaded in lines[0] and "\n" not in lines[0]


def test_a_revision_is_of_the_original():
    assert resolve_name("allenai/OLMo-7B", "step1000-tokens4B") == "allenai/OLMo-7B"
    assert resolve_name("allenai/OLMo-7B", "main") == resolve_name("allenai/OLMo-7B")
    assert resolve_name("allenai/OLMo-7B-hf", "v2") == "allenai/OLMo-7B-hf"


@pytest.mark.parametrize("typed", ["allenai/OLMo-7B-hf", "allenai/OLMo-2-1124-7B", "./OLMo-7B", "me/OLMo-7B"])
def test_other_names_stay(typed):
    lines = []
    assert resolve_name(typed, say=lines.append) == typed and lines == []


def test_the_commit_of_what_this_machine_has(tmp_path, monkeypatch):
    """As huggingface_hub keeps it: refs/REVISION names a commit, snapshots/COMMIT holds its files."""
    repository = tmp_path / "models--me--small"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert commit_of("me/small") == commit_of("me/small", "main") == commit_of("me/small", "a" * 40) == "a" * 40
    assert commit_of("me/small", "v2") == "b" * 40
    for absent in (("me/small", "v3"), ("me/other",), (str(tmp_path),), ("no/such/name",), ("",)):
        assert commit_of(*absent) is None
    (repository / "snapshots" / ("b" * 40) / "config.json").unlink()
    assert commit_of("me/small", "v2") is None


def test_a_base_is_known_by_its_weights_wherever_they_lie(tmp_path, monkeypatch):
    """On the hub and in a copy; by its name only where the weights are not here, and not by one that nobody gave."""
    snapshot, copy = tmp_path / "hub" / "models--me--small" / "snapshots" / ("a" * 40), tmp_path / "copy"
    for folder in (snapshot, copy):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"of": "{folder.name}"}}')
        (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub, local, gone = Base.here("me/small", "a" * 40), Base.here(str(copy)), Base.here(str(tmp_path / "gone"))
    assert hub.weights == local.weights and not hub.is_other_than(local) and gone.weights is None
    assert gone.is_other_than(local) and not gone.is_other_than(Base.here(str(copy), of_adapter=True))
    (copy / "model.safetensors").write_bytes(b"WEIGHTS")
    assert Base.here(str(copy), of_adapter=True).is_other_than(hub)


@pytest.mark.parametrize(
    ("trained_on", "given", "expected"),
    [
        ((None, None), {}, ("allenai/OLMo-7B-hf", None)),
        (("step1000-tokens4B", None), {}, ("allenai/OLMo-7B", "step1000-tokens4B")),  # none of the conversion's
        (("step1000-tokens4B", None), {"revision": "step2000-tokens8B"}, ("allenai/OLMo-7B", "step2000-tokens8B")),
        (("step1000-tokens4B", None), {"model": "mine/copy", "any_base": True}, ("mine/copy", None)),
        (("step1000-tokens4B", "mine/copy"), {}, ("mine/copy", "step1000-tokens4B")),
    ],
)
def test_the_base_of_an_adapter(trained_on, given, expected, tmp_path):
    """As evaluate, ask and merge find it."""
    revision, base = trained_on
    content = {"peft_type": "LORA", "base_model_name_or_path": base or "allenai/OLMo-7B", "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "adapter_model.safetensors").touch()
    options = {"model": None, "revision": None, "any_base": False} | given
    lines: list[str] = []
    assert resolve_base(str(tmp_path), **options, say=lines.append) == expected
    assert bool(lines) == expected[0].endswith("-hf")


def test_another_base_than_the_adapters_is_refused(tmp_path):
    content = {"peft_type": "LORA", "base_model_name_or_path": "mine/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="was trained on 'mine/model', not on 'mine/other'"):
        recorded_base(str(tmp_path), "mine/other", None, False, print)
