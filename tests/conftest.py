"""Fixtures shared by all tests: the datasets outside the repository, tiny models, and the demo in small."""

import gc
import importlib
import os
import pkgutil
import sys
from contextlib import suppress
from pathlib import Path

# One thread, here and in the processes that tests start: tiny models gain nothing from more, and the number decides how
# sums round. PyTorch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Coverage would take its probes out of code that has run often, and hold all that lives while it looks for that code:
# also tensors whose bytes a test counts. Left in, they cost nothing that could be measured.
with suppress(ImportError):
    from slipcover import pytest_plugin

    if (coverage := pytest_plugin._slipcover_instance) is not None:
        coverage.d_miss_threshold = 2**31 - 1

import lowmem_npo  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = (ROOT / (os.environ.get("LOWMEM_NPO_TEST_DATA") or "../shared/data")).resolve()


def pytest_addoption(parser):
    parser.addoption(
        "--matrix", choices=["sample", "full", "write"], default="sample",
        help="columns of docs/architectures.md: some for each architecture, all, or all, written anew",
    )  # fmt: skip
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")
    parser.addoption("--full", action="store_true", help="the long forms of tests, and those marked full or slow")


def pytest_collection_modifyitems(config, items):
    full = config.getoption("--full")
    runs = {"slow": full or config.getoption("--slow"), "full": full}
    for item in items:
        for marker in (marker for marker in runs if not runs[marker] and item.get_closest_marker(marker)):
            item.add_marker(pytest.mark.skip(reason=f"takes long: bash scripts/test.sh --{marker}"))


@pytest.fixture(scope="session")
def full(pytestconfig) -> bool:
    """Whether a test that has a long form runs it: bash scripts/test.sh --full."""
    return pytestconfig.getoption("--full")


def pytest_collection_finish():
    """Imports every module before the first test. One that is imported while a test has replaced a function would keep
    the replacement, for all tests after.

    What is imported by now is never garbage, but looked through at the start of every run of transformers' Trainer,
    which takes half a second.
    """
    for module in pkgutil.walk_packages(lowmem_npo.__path__, "lowmem_npo."):
        if not module.name.endswith("__main__"):
            with suppress(ModuleNotFoundError):  # of a machine that has the packages of the kernels alone
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def empty_pictures():
    """The pictures of reports, which take half of the time of a tiny run, stay empty in the runs that a test makes.
    They are drawn in test_report.py, where they are looked at, and in runs of other fixtures and other processes."""
    inline_svg = sys.modules.get("lowmem_npo.report.inline_svg")  # none where the packages of the kernels are alone
    with pytest.MonkeyPatch.context() as patch:
        if inline_svg:
            patch.setattr(inline_svg, "_draw", lambda *_, **__: '<svg viewBox="0 0 1 1"></svg>')
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with LUME, TOFU and the OLMo tokenizer; without it the tests that need it are skipped."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"needs LUME, TOFU and the OLMo tokenizer in {SHARED_DATA}: see LOWMEM_NPO_TEST_DATA in CONTRIBUTING.md"
        )
    return SHARED_DATA


@pytest.fixture(scope="session")
def instruct_model() -> Path:
    """The directory of SmolLM2-135M-Instruct; without it the tests that need it are skipped."""
    folder = os.environ.get("LOWMEM_NPO_TEST_MODEL")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("needs SmolLM2-135M-Instruct: see LOWMEM_NPO_TEST_MODEL in CONTRIBUTING.md")
    return Path(folder)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, where texts that models write are kept, in a directory of the test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    """A directory with a small random OLMo of vocabulary 50304 and the real tokenizer."""
    from helpers.tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("olmo")
    tiny_model("olmo", 50304, torch.bfloat16).save_pretrained(folder)
    olmo_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A directory with a tiny random OLMo and a byte tokenizer; needs no data."""
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
    """(result, output) of a demo: base/ recites, gold/ never saw the forget rows, unlearned/ forgot them."""
    from helpers.small_demo import SMALL

    from lowmem_npo.commands.demo.run import run_demo

    lines: list[str] = []
    return run_demo(tmp_path_factory.mktemp("demo"), recipe=SMALL, device="cpu", say=lines.append), "\n".join(lines)


@pytest.fixture(scope="session")
def taught_model(tmp_path_factory) -> Path:
    """A directory with a tiny OLMo that recites the first twelve bundled forget and retain rows."""
    from helpers.taught_model import teach_tiny_model

    return teach_tiny_model(tmp_path_factory.mktemp("taught") / "model")
