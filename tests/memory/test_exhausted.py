"""When memory runs out while a model is measured, fewer rows go through it at once, to the same figures. The GPU is
simulated: passes of more than so many tokens fail as they do there."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import tiny_model

from lowmem_npo.config import AdapterConfig
from lowmem_npo.evaluation.leaks.fine_tuning import fine_tune
from lowmem_npo.evaluation.scoring.forced import forced_answers
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, sampled_answers
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.memory.exhausted import as_fits
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import decoder_layers

ROWS = random_rows(12, seed=1)
PROMPTS = [Prompt(row["input_ids"], 3) for row in ROWS]
TOKENIZER = word_tokenizer()


@pytest.fixture
def model():
    return attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3)).eval()


@contextmanager
def small_gpu(model, most: int):
    """Passes of more than `most` tokens fail; gives the tokens of those that do not."""
    passes: list[int] = []

    def hook(module, args, output):
        if output.shape[:-1].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passes.append(output.shape[:-1].numel())

    handle = decoder_layers(model)[-1].register_forward_hook(hook)
    yield passes
    handle.remove()


def likelihoods(model):
    return [one.nll_sum for one in answer_likelihoods(model, ROWS, progress=False)]


def scores(model):
    return [number for one in token_scores(model, ROWS, progress=False) for number in one.logprobs + one.standard]


def greedy(model):
    return [token for answer in greedy_answers(model, TOKENIZER, PROMPTS, progress=False) for token in answer]


def forced(model):
    lengths = [len(row["input_ids"]) - max(1, row["prompt_length"]) for row in ROWS]
    return [token for answer in forced_answers(model, TOKENIZER, ROWS, lengths, progress=False) for token in answer]


def after_fine_tuning(model):
    """The likelihoods after three steps of four rows: of their gradients, that is, whatever the parts."""
    torch.manual_seed(3)
    again = attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3))
    with small_gpu(again, after_fine_tuning.most):
        assert [*fine_tune(again, ROWS, steps=3, lr=1e-2, batch_size=4, seed=1, progress=False)] == [1, 2, 3]
    return likelihoods(again)


@pytest.mark.parametrize("measure", [likelihoods, scores, greedy, forced])
def test_the_figures_are_the_same(measure, model, caplog):
    expected = measure(model)
    longest = max(len(row["input_ids"]) for row in ROWS)
    with small_gpu(model, 3 * longest) as passes, caplog.at_level(logging.WARNING):
        assert measure(model) == pytest.approx(expected, rel=1e-5)
        measure(model)  # begins with what fitted, and is silent
    assert len(passes) > 4 and [record.message[:21] for record in caplog.records] == ["The GPU ran out of me"]
    with small_gpu(model, longest - 1), pytest.raises(torch.OutOfMemoryError):
        measure(model)


def test_fine_tuning_has_the_same_gradient(model):
    after_fine_tuning.most = 10**9
    expected = after_fine_tuning(model)
    after_fine_tuning.most = 30
    assert after_fine_tuning(model) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(likelihoods(model), rel=1e-2)


def test_samples_are_those_of_smaller_batches(model):
    """Random numbers that a failed attempt has drawn are drawn again; samples of one prompt are divided, too."""

    def samples(size: int):
        return sampled_answers(model, TOKENIZER, PROMPTS[:2], samples=4, seed=1, batch_size=size, progress=False)

    whole, smaller = samples(8), samples(4)
    width = max(len(prompt.ids) for prompt in PROMPTS[:2])
    with small_gpu(model, 4 * width):
        assert samples(8) == smaller == whole
    with small_gpu(model, 2 * width):
        assert samples(8) == whole


def test_other_errors_and_other_models(model):
    with pytest.raises(RuntimeError, match="shape"):
        as_fits(model, 4, lambda _: (_ for _ in ()).throw(RuntimeError("shape")))
    sizes: list[int] = []

    def fails_above_two(size: int) -> int:
        sizes.append(size)
        if size > 2:
            raise torch.OutOfMemoryError
        return size

    def fails_in_a_library(size: int) -> int:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    with pytest.raises(torch.OutOfMemoryError, match="ALLOC_FAILED"):  # a single row
        as_fits(tiny_model("olmo"), 2, fails_in_a_library)
    assert as_fits(model, 9, fails_above_two) == 2 and sizes == [9, 4, 2]
    assert as_fits(model, 9, lambda size: size) == 2 and as_fits(tiny_model("olmo"), 9, lambda size: size) == 9
