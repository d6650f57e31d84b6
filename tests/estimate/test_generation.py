"""How long written answers take while weights are streamed, and what follows from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.dense_step import random_rows
from transformers import LlamaConfig

from lowmem_npo.config import DataConfig, MemoryConfig, ModelConfig, OutputConfig, RunConfig
from lowmem_npo.data import Example, TokenizedRows
from lowmem_npo.estimate.automatic import with_answers
from lowmem_npo.estimate.generation import generation
from lowmem_npo.estimate.gpus import named
from lowmem_npo.estimate.host import StreamingHost
from lowmem_npo.estimate.report import Report
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.step import Estimate
from lowmem_npo.evaluation.scoring import batching

LLAMA = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
PASS = 25_600_000_000  # bytes: a second on PCIe 4


def config(**output) -> RunConfig:
    memory = MemoryConfig(stream_weights=True)
    return RunConfig(ModelConfig("x"), DataConfig(), memory=memory, output=OutputConfig(**output))


def report(of: RunConfig, in_file: bool = False, disk_rate: float = 2e9) -> Report:
    figures = Estimate(0, 0, {}, 0, streamed_bytes=PASS)
    host = StreamingHost(in_file, 0, 0, 0, disk_rate)
    return Report("x", "bf16", of, StepRows((), ()), named("rtx-4090"), figures, None, None, [], [], host)


def data(forget: int, retain: int | None = None, paraphrases: tuple[str, ...] = ()) -> SimpleNamespace:
    kept = None if retain is None else random_rows(retain, seed=2)
    written = {"retain_is_unwritten": False, "alternatives_are_unwritten": False}
    # one row alone has paraphrases: a pass is made for as many as any has
    examples = [
        Example("q", "a", "", "question/answer", paraphrases=paraphrases if n == 0 else ()) for n in range(forget)
    ]
    rows = TokenizedRows(random_rows(forget, seed=1), examples, 64)
    return SimpleNamespace(forget=rows, retain=kept, general=None, **written)


def test_what_the_original_model_writes_before_training():
    """Texts of 96 tokens, all together; five answers to each row, of 32 tokens and of 40, twice the longest."""
    lines: list[str] = []
    of = config()
    of.objective.forget_term = "dpo"
    of.data.forget, of.data.retain, of.data.alternatives = "x", "self:3", "self"
    asked = data(5, 3)
    asked.retain_is_unwritten = asked.alternatives_are_unwritten = True
    asked.forget[0].update(input_ids=[5] * 22, labels=[5] * 22, prompt_length=2)
    with_answers(report(of), asked, LLAMA, lines.append)
    texts, answers = lines[1:]
    assert texts.startswith("Writing the texts of --retain self:3 takes about 1.6 minutes (96 passes of 1 s), once")
    assert answers.startswith("Writing the answers of --alternatives self takes about 3.3 minutes (200 passes of 1 s)")
    assert "(--retain FILE), none is written." in texts and "(--alternative-column)" in answers


def test_passes_by_hand():
    """Before and after; the rows of a set together, the forget rows in two forms, and once more for each paraphrase."""
    assert generation(config(forms="trained"), data(5), LLAMA, report(config())) == (2 * 64, 1.0)
    assert generation(config(), data(5, 3), LLAMA, report(config())).passes == 2 * (2 + 1) * 64
    asked = config(max_new_tokens=10)
    for paraphrases in ((), ("r",), ("r", "s")):
        passes = generation(asked, data(5, paraphrases=paraphrases), LLAMA, report(asked)).passes
        assert passes == 2 * (2 + len(paraphrases)) * 10
    assert generation(config(eval_rows=0), data(5), LLAMA, report(config())).passes == 0


def test_rows_whose_keys_and_values_do_not_fit_together(monkeypatch):
    """2 layers of 2 x 16 keys and values of 2 bytes: 256 bytes a token. Five rows of up to 8 + 64 tokens, in threes."""
    monkeypatch.setattr(batching, "CACHE_BYTES", 256 * 3 * 72)
    assert generation(config(forms="trained"), data(5), LLAMA, report(config())).passes == 2 * 2 * 64


def test_a_pass_takes_as_long_as_the_slower_of_bus_and_disk():
    assert report(config()).pass_seconds == pytest.approx(1.0)
    assert report(config(), in_file=True).pass_seconds == pytest.approx(12.8)
    assert report(config(), in_file=True, disk_rate=1e12).pass_seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("asked", "seconds", "decided", "said"),
    [
        ("auto", 1.0, "on", "Writing the measured answers takes about 4.3 minutes (256 passes of 1 s)."),
        ("auto", 15.0, "off", "would take about 1.1 hours (256 passes of 15 s): they are read off the likelihoods"),
        ("on", 15.0, "on", "takes about 1.1 hours"),
        ("off", 1.0, "off", "would take about 4.3 minutes"),
    ],
)
def test_what_takes_more_than_an_hour_is_read_off_the_likelihoods(asked, seconds, decided, said):
    lines: list[str] = []
    streamed = report(config(generate_answers=asked), in_file=True, disk_rate=PASS / seconds)
    output = with_answers(streamed, data(5), LLAMA, lines.append).output
    assert output.generate_answers == decided and len(lines) == 1 and said in lines[0]
