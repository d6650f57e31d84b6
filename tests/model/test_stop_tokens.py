"""Where generation stops, known before the weights are loaded."""

from __future__ import annotations

import json

import pytest
from transformers import OlmoConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.model.stop_tokens import stop_tokens


@pytest.mark.parametrize(
    ("generation", "configured", "stops"),
    [([1, 106], 1, {1, 106}), (7, [1, 2], {7}), (None, [1, 2], {1, 2}), (None, None, set()), (-1, 1, set())],
)
def test_the_generation_configuration_comes_first(tmp_path, generation, configured, stops):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_tokens(ModelConfig(str(tmp_path)), OlmoConfig(eos_token_id=configured)) == stops
