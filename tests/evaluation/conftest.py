"""Fixtures for what is measured of answers."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer(byte_model) -> PreTrainedTokenizerFast:
    """The byte tokenizer, without a chat template."""
    return AutoTokenizer.from_pretrained(byte_model)
