"""The cached reference: same losses, no passes, never stale, and a full disk ends nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.dense_step import make_trainer, random_rows, word_tokenizer
from helpers.saved_adapters import same_adapter
from helpers.tiny_models import CONFIGS, tiny_model
from safetensors.torch import load_file
from transformers import LlamaConfig

from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.errors import UserError
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.training.metrics import read_metrics
from lowmem_npo.training.reference import check_cache_space, live
from lowmem_npo.training.reference.answer_file import AnswerFile

FORGET, RETAIN = random_rows(6, seed=1), random_rows(6, seed=2)


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of the original model."""
    counted = []
    right = live.reference_mode

    def counting(model):
        counted.append(model)
        return right(model)

    monkeypatch.setattr(live, "reference_mode", counting)
    return counted


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(
    folder: Path,
    cache: Path | None,
    epochs: int = 2,
    forget=FORGET,
    retain=RETAIN,
    seed: int = 0,
    rows: int = 2,
    **settings,
):
    """The loss of each step; two rows a step, so that every epoch mixes them anew."""
    run = make_trainer(
        tiny_model("olmo", seed=seed), folder, forget, retain, max_steps=-1, num_train_epochs=epochs,
        learning_rate=1e-2, per_device_train_batch_size=rows, **settings,
        reference_dir=None if cache is None else str(cache),
    )  # fmt: skip
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def long_rows(count: int, seed: int) -> list[dict]:
    """20 to 60 tokens, the later half of them answers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 60, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :], "prompt_length": len(ids) // 2}
        for ids in rows
    ]


def test_the_first_epoch_stores_and_all_later_ones_read(passes, tmp_path):
    alone = losses(tmp_path / "live", None)
    assert len(passes) == 2 * 6  # forget and retain at each of six steps
    passes.clear()

    first = losses(tmp_path / "first", tmp_path / "cache")
    assert len(passes) == 6
    assert first[:3] == alone[:3]  # to the bit: the batches are the same
    assert first == pytest.approx(alone, rel=1e-6)  # later these short rows share batches with others
    passes.clear()

    assert losses(tmp_path / "again", tmp_path / "cache") == first  # to the bit
    assert losses(tmp_path / "token", tmp_path / "cache", normalization="token") == pytest.approx(
        losses(tmp_path / "live token", None, normalization="token"), rel=1e-6
    )
    assert len(passes) == 2 * 6  # those of the live one


def test_rows_mixed_anew_every_epoch_give_the_live_losses_to_the_bit(passes, one_thread, tmp_path):
    """On one thread of a CPU a row's sums do not depend on its batch, once it has some dozen tokens."""
    forget, retain = long_rows(9, seed=3), long_rows(14, seed=4)
    for normalization in ("sequence", "token"):
        live, cached = (
            losses(tmp_path / f"{normalization} {name}", cache, 5, forget, retain, rows=4, normalization=normalization)
            for name, cache in (("live", None), ("cached", tmp_path / "long"))
        )
        assert len(live) == 15 and cached == live
    assert len(passes) == 2 * 30 + 3 + 4  # the live ones; steps with forget rows, and retain rows, not met before


def test_where_rows_share_no_batch_every_epoch_is_the_live_one_to_the_bit(tmp_path):
    alone = losses(tmp_path / "live", None, epochs=3, rows=1)
    assert len(alone) == 18 and losses(tmp_path / "cached", tmp_path / "cache", epochs=3, rows=1) == alone


def test_what_is_stored_is_what_the_original_model_says(tmp_path):
    """The files read as any safetensors, against the model's own float64 states and logits, row by row."""
    losses(tmp_path / "run", tmp_path / "cache", epochs=1)
    forget, retain = (load_file(tmp_path / "cache" / f"{part}.safetensors")["values"] for part in ("forget", "retain"))
    model = tiny_model("olmo").double()
    expected = {"forget": [], "retain": []}
    for part, rows in (("forget", FORGET), ("retain", RETAIN)):
        for row in rows:
            ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
            states = model.model(ids).last_hidden_state[0, start - 1 : -1]
            table = model.lm_head(states).log_softmax(-1)
            expected[part].append(states if part == "retain" else table.gather(1, ids[0, start:, None]))
    torch.testing.assert_close(forget.double(), torch.cat(expected["forget"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(retain.double(), torch.cat(expected["retain"]), rtol=1e-5, atol=1e-5)


def test_a_wrong_value_in_the_cache_changes_the_loss(tmp_path):
    """The comparisons above would notice: the stored values are what the loss is made of."""
    first = losses(tmp_path / "first", tmp_path / "cache", epochs=1)
    lengths = [sum(label != -100 for label in row["labels"][1:]) for row in FORGET]
    path = tmp_path / "cache" / "forget.safetensors"
    metadata = AnswerFile(path, lengths, 1, torch.float32, {}).metadata
    path.unlink()
    AnswerFile(path, lengths, 1, torch.float32, metadata).write(range(6), torch.full((sum(lengths), 1), -1.0))
    assert losses(tmp_path / "again", tmp_path / "cache", epochs=1) != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("joint", [0, 10**6])
def test_a_stored_row_counts_as_it_is_stored_beside_one_that_is_not(joint, tmp_path):
    """Run again, in another batch, it may be rounded otherwise; and a resumed run reads it."""
    rows = {"forget": FORGET[:2], "retain": RETAIN[:2]}
    first = losses(tmp_path / "first", tmp_path / "cache", 1, **rows, joint_pass_tokens=joint)
    for part, of_part in rows.items():
        path = tmp_path / "cache" / f"{part}.safetensors"
        lengths = [sum(label != -100 for label in row["labels"][1:]) for row in of_part]
        width = load_file(path)["values"].shape[1]
        file = AnswerFile(path, lengths, width, torch.float32, {})
        other = file.read([0]) + 1  # more than rounding, so that it shows
        path.unlink()
        AnswerFile(path, lengths, width, torch.float32, file.metadata).write([0], other)
    beside, read = (
        losses(tmp_path / name, tmp_path / "cache", 1, **rows, joint_pass_tokens=joint) for name in ("beside", "read")
    )
    assert beside == read and read != pytest.approx(first, rel=1e-3)


def test_damaged_values_are_not_used(passes, tmp_path):
    first = losses(tmp_path / "first", tmp_path / "cache")
    path = tmp_path / "cache" / "retain.safetensors"
    passes.clear()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert losses(tmp_path / "again", tmp_path / "cache", epochs=1) == first[:3]
    assert len(passes) == 1  # the batch with that row, run and stored again
    passes.clear()
    assert losses(tmp_path / "repaired", tmp_path / "cache") == first and not passes


# -- stale --------------------------------------------------------------------------------------------------


def refused(match: str, folder: Path, cache: Path, **changed):
    before = {path: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(UserError, match=match):
        losses(folder, cache, **changed)
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def test_a_stale_cache_is_refused_with_the_reason(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    losses(tmp_path / "run", cache, epochs=1)
    refused("another model: same name, other weights or quantisation", tmp_path / "a", cache, seed=1)
    refused("other rows", tmp_path / "b", cache, retain=random_rows(6, seed=3))
    refused("other rows", tmp_path / "c", cache, forget=FORGET[:5])

    monkeypatch.setitem(CONFIGS, "olmo", lambda v: LlamaConfig(vocab_size=v, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False))  # fmt: skip
    refused(r"another model \('OlmoForCausalLM', not 'LlamaForCausalLM'\)", tmp_path / "d", cache)


def test_another_tokenizer_is_named(tmp_path, monkeypatch):
    losses(tmp_path / "run", tmp_path / "cache", epochs=1)
    other = word_tokenizer()
    other.add_tokens(["new"])
    monkeypatch.setattr("helpers.dense_step.word_tokenizer", lambda: other)
    refused("another tokenizer", tmp_path / "a", tmp_path / "cache", forget=random_rows(6, seed=9))
    # The same rows all the same: what their values depend on has not changed.
    losses(tmp_path / "b", tmp_path / "cache", epochs=1)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a reference cache"),
        (b"hello, this is some other file", "not a reference cache"),
        (b"\x02" + bytes(7) + b"{}", "not a reference cache"),
        (None, "cut off"),
    ],
)
def test_a_damaged_file_is_refused(content, reason, tmp_path):
    path = tmp_path / "cache" / "forget.safetensors"
    losses(tmp_path / "run", path.parent, epochs=1)
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    refused(reason, tmp_path / "a", path.parent)


# -- disks ----------------------------------------------------------------------------------------------------


def test_no_room_at_the_start_continues_live(passes, files_no_larger_than, tmp_path, caplog, monkeypatch):
    alone = losses(tmp_path / "live", None)
    passes.clear()
    create = AnswerFile._create

    def create_on_a_small_disk(file):
        with files_no_larger_than(2000):  # retain takes 5 kB, forget 1 kB
            create(file)

    monkeypatch.setattr(AnswerFile, "_create", create_on_a_small_disk)
    assert losses(tmp_path / "run", tmp_path / "cache") == pytest.approx(alone, rel=1e-6)
    assert len(passes) == 3 + 6  # forget was stored in the first epoch, retain ran live in both
    assert "retain.safetensors" in caplog.text and "continues with the live reference" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["forget.safetensors"]


def test_the_size_is_reported_beforehand_and_must_fit(tmp_path):
    objective, config = ObjectiveConfig(), tiny_model("olmo").config
    line = check_cache_space(objective, FORGET, RETAIN, config, torch.float32, tmp_path / "cache")
    losses(tmp_path / "run", tmp_path / "cache", epochs=1)
    for part in ("forget", "retain"):
        size = (tmp_path / "cache" / f"{part}.safetensors").stat().st_size
        number, unit = re.search(rf"{part} ([\d.]+) (\w+)", line).groups()
        stated = float(number) * {"bytes": 1, "KiB": 2**10}[unit]
        assert 0.9 * stated <= size < 1.2 * stated + 600  # the file's header comes on top
    config.hidden_size = 10**13
    with pytest.raises(UserError, match=r"takes \d+\.\d GiB.*--reference-dir on another disk"):
        check_cache_space(objective, FORGET, RETAIN, config, torch.float32, tmp_path / "elsewhere")
    assert "needs no reference" in check_cache_space(
        ObjectiveConfig(forget_term="ga", delta=0.0), FORGET, RETAIN, config, torch.float32, tmp_path
    )


# -- whole runs, with every switch ------------------------------------------------------------------------------


def whole_run(byte_model, folder, *more):
    lines = []
    config = parse_run(
        ["--model", str(byte_model), "--dtype", "float32", "--limit", "6", "--batch-size", "3", "--max-length", "64",
         "--eval-rows", "1", "--lr", "1e-2", "--tile-mlp", "--offload-checkpoints", "--embedding-on-cpu",
         "--lora-layers", "1", "--output-dir", str(folder), "--save-steps", "1", "--device", "cpu", *more],
        "train",
    )  # fmt: skip
    train(config, lines.append)
    return [line["loss"] for line in read_metrics(RunFiles(folder).metrics) if "retain_nll" in line], lines


def test_a_run_with_every_switch_resumes_with_its_cache(byte_model, tmp_path, passes):
    whole, lines = whole_run(byte_model, tmp_path / "whole", "--reference", "cached", "--max-steps", "4")
    assert any("Reference cache in" in line and "KiB of that is new" in line for line in lines)
    assert yaml.safe_load(RunFiles(tmp_path / "whole").run_yaml.read_text())["tile_mlp"] == 1024
    assert json.loads(RunFiles(tmp_path / "whole").answers("after").read_text())

    whole_run(byte_model, tmp_path / "cut", "--reference", "cached", "--max-steps", "3")
    passes.clear()
    resumed, _ = whole_run(byte_model, tmp_path / "cut", "--reference", "cached", "--max-steps", "4", "--resume")
    assert resumed == whole and not passes  # the second epoch reads what the first stored, also after a resume

    later, _ = whole_run(byte_model, tmp_path / "later", "--reference", "cached", "--max-steps", "4",
                         "--reference-dir", str(RunFiles(tmp_path / "whole").reference))  # fmt: skip
    assert later == whole and not passes
    assert same_adapter(tmp_path / "whole", tmp_path / "later")
