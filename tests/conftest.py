"""Fixtures shared by every test: where the real data lies, and tiny models made from configurations."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter. It is chosen when Triton is first imported, by whatever
# test or library comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture(scope="session")
def lume_model(olmo_tokenizer, tmp_path_factory) -> Path:
    """A directory with a small random OLMo of vocabulary 50304 and the real tokenizer, as a user would have it."""
    import torch
    from helpers.tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("olmo")
    tiny_model("olmo", 50304, torch.bfloat16).save_pretrained(folder)
    olmo_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A directory with a tiny random OLMo and a tokenizer of single bytes: needs no data at all."""
    from helpers.tiny_models import tiny_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    tiny_model("olmo", len(words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    """(what the demo found, what it said): base/ recites, gold/ never saw the forget rows, unlearned/ forgot them."""
    from helpers.small_demo import SMALL

    from lowmem_npo.commands.demo.run import run_demo

    said = []
    return run_demo(tmp_path_factory.mktemp("demo"), recipe=SMALL, device="cpu", say=said.append), "\n".join(said)


@pytest.fixture(scope="session")
def taught_model(tmp_path_factory) -> Path:
    """A directory with a tiny OLMo that recites the first twelve bundled forget and retain rows (see `taught.py`)."""
    from helpers.taught_model import teach_tiny

    return teach_tiny(tmp_path_factory.mktemp("taught") / "model")
