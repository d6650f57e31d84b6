"""Fixtures shared by every test: where the real data lies, and tiny models made from configurations."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with LUME, TOFU and the OLMo tokenizer; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the LUME/TOFU data and the OLMo tokenizer in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def olmo_tokenizer(shared_data):
    """The real tokenizer of OLMo-7B: byte-level BPE, EOS, no BOS."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "olmo-tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
    )
