"""Names of OLMo's original format, and those that stay."""

import pytest

from lowmem_npo.model.names import resolve_name


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
    name, line = resolve_name(typed)
    assert name == loaded and loaded in line and "\n" not in line


def test_a_revision_is_of_the_original():
    assert resolve_name("allenai/OLMo-7B", "step1000-tokens4B") == ("allenai/OLMo-7B", None)
    assert resolve_name("allenai/OLMo-7B", "main") == resolve_name("allenai/OLMo-7B")
    assert resolve_name("allenai/OLMo-7B-hf", "v2") == ("allenai/OLMo-7B-hf", None)


@pytest.mark.parametrize("typed", ["allenai/OLMo-7B-hf", "allenai/OLMo-2-1124-7B", "./OLMo-7B", "me/OLMo-7B"])
def test_other_names_stay(typed):
    assert resolve_name(typed) == (typed, None)
