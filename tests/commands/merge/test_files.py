"""The files that `lowmem-npo merge` reads and writes: shards, types, the card, what an interrupted merge leaves."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.architectures import tiny_config
from helpers.merges import fails, logits, merge, merged_by_peft, saved_adapter, saved_base
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.claim import LOCK, claimed
from lowmem_npo.model import merging
from lowmem_npo.model.checkpoint import BESIDE_WEIGHTS, INDEX, find_checkpoint


def test_shards_keep_their_names_and_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    saved_base(base, max_shard_size="12KB")
    others = {"tokenizer_config.json": "{}", "merges.txt": "", "thesis.txt": "private"}
    for name, text in others.items():
        (base / name).write_text(text)
    adapter = saved_adapter(base, tmp_path / "adapter")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3
    written, alive, real = {}, [], merging.save_file

    def save(tensors, path, **options):
        assert not [one for one in alive if one() is not None]  # the shards before are freed
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        written[path.name] = set(tensors)
        real(tensors, path, **options)

    monkeypatch.setattr(merging, "save_file", save)
    assert merge(adapter, out) == 0
    assert sorted(written) == files
    for file, names in written.items():
        with safe_open(base / file, framework="pt") as before, safe_open(out / file, framework="pt") as after:
            assert set(before.keys()) == set(after.keys()) == names
            assert after.metadata() == {"format": "pt"}
    index = json.loads((out / INDEX).read_text())
    assert index == json.loads((base / INDEX).read_text())
    present = {path.name for path in out.iterdir()}
    assert present >= {"config.json", "generation_config.json", "tokenizer_config.json", "merges.txt"}
    assert "thesis.txt" not in present
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    exact = merged_by_peft(base, adapter)
    assert torch.allclose(logits(merged), logits(exact), atol=0.05 * logits(exact).std().item(), rtol=0.05)


def test_the_tokenizer_comes_along(byte_model, tmp_path):
    adapter = saved_adapter(byte_model, tmp_path / "adapter")
    assert merge(adapter, tmp_path / "out") == 0
    text = "Where was she born?"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (byte_model, tmp_path / "out")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"  # stored as float32, merged as bf16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # whoever reads one reads all


def test_named_chat_templates_come_along(byte_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(byte_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}{{ tools }}"}
    tokenizer.save_pretrained(base)
    assert merge(saved_adapter(base, tmp_path / "adapter"), tmp_path / "out") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    files = [path.relative_to(base).as_posix() for path in base.rglob("*.jinja")]
    downloaded = filter_repo_objects(files, allow_patterns=list(BESIDE_WEIGHTS))
    assert len(files) == 2 and list(downloaded) == files


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("architecture", ["olmo", "gemma2"])  # the head of gemma2 is its embedding, and stored twice
def test_checkpoints_of_pytorch_itself(architecture, shards, tmp_path):
    base, old, out = tmp_path / "base", tmp_path / "old", tmp_path / "out"
    model = saved_base(base, architecture, torch.bfloat16)
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    old.mkdir()
    shutil.copyfile(base / "config.json", old / "config.json")
    weights = model.state_dict()
    if shards:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: weight for name, weight in weights.items() if files[name] == file}, old / file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, old / "pytorch_model.bin")
    assert merge(adapter, out, "--model", str(old), "--any-base", "--dtype", "stored") == 0
    assert merge(adapter, tmp_path / "expected", "--dtype", "stored") == 0
    merged, expected = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (out, tmp_path / "expected"))
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(w, expected.state_dict()[name]) for name, w in merged.state_dict().items())
    written = sorted(path.name for path in out.iterdir() if "model" in path.name)
    assert written == (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
                       if shards else ["model.safetensors"])  # fmt: skip


@pytest.mark.parametrize("architecture", ["olmo", "glm4_moe"])
def test_bytes_are_counted_before_they_are_written(architecture, tmp_path):
    config = tiny_config(architecture, 97) if architecture == "glm4_moe" else architecture
    saved_base(tmp_path / "base", config, torch.float32, max_shard_size="12KB")
    checkpoint = find_checkpoint(str(tmp_path / "base"))
    for dtype in (torch.bfloat16, None):
        out = tmp_path / str(dtype)
        out.mkdir()
        merging.write_merged(checkpoint, {}, out, dtype, progress=False)
        files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert 0 <= files - checkpoint.bytes_as(dtype) < 2000 * len(checkpoint.shards)
        assert not math.isclose(checkpoint.bytes_as(torch.bfloat16), checkpoint.bytes_as(None))


def test_what_an_interrupted_merge_leaves_is_in_nobodys_way(tmp_path, capsys, monkeypatch):
    saved_base(tmp_path / "base")
    adapter, partial = saved_adapter(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out.partial"
    capsys.readouterr()  # progress
    with claimed(partial):
        fails(capsys, merge(adapter, tmp_path / "out"), "in use by process")
    (partial / "nested").mkdir(parents=True)
    for name in (LOCK, "model.safetensors", "nested/file"):  # of a merge that was killed
        (partial / name).write_text("")
    assert merge(adapter, tmp_path / "out") == 0
    assert not partial.exists() and not {LOCK, "nested"} & {file.name for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("lowmem_npo.commands.merge.run.merged_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(adapter, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.fixture(params=["disk", "directory"])
def mounted(request, tmp_path) -> Iterator[Path]:
    """A directory onto which nothing can be renamed, as `docker -v` makes them: of another disk, or of the same."""
    out, there = tmp_path / "mounted here", tmp_path / "there"
    out.mkdir(), there.mkdir()
    how = ["-t", "tmpfs", "-o", "size=100m", "tmpfs"] if request.param == "disk" else ["--bind", there]
    if subprocess.run(["mount", *how, out], capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield out
    subprocess.run(["umount", "--lazy", out], check=True)


def test_a_mount_point_gets_the_files_one_by_one_the_configuration_last(mounted, tmp_path, capsys, monkeypatch):
    saved_base(tmp_path / "base")
    adapter, partial = saved_adapter(tmp_path / "base", tmp_path / "adapter"), mounted / "merged.partial"
    partial.mkdir()
    for name in (LOCK, "model.safetensors"):  # of a merge that was killed
        (partial / name).write_text("")
    assert merge(adapter, mounted) == 0 and merge(adapter, tmp_path / "out") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in mounted.iterdir()} == files
    for path in mounted.iterdir():
        path.unlink()
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: 1 / 0 if b == mounted / "config.json" else real(a, b))
    with pytest.raises(ZeroDivisionError):
        merge(adapter, mounted)
    assert {path.name for path in mounted.iterdir()} == set(files) - {"config.json"}


def test_the_root_and_what_a_killed_run_has_left(tmp_path, capsys):
    saved_base(tmp_path / "base")
    adapter, out = saved_adapter(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out"
    capsys.readouterr()  # progress
    fails(capsys, merge(adapter, "/"), "'/' holds other files")
    with claimed(out):
        fails(capsys, merge(adapter, out), "in use by process")
    out.mkdir()
    (out / LOCK).write_text("")  # of a run that was killed before its first file
    assert merge(adapter, out) == 0
    assert (out / "model.safetensors").exists() and not (out / LOCK).exists()


def test_a_full_disk_and_an_interruption(tmp_path, capsys, monkeypatch):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    capsys.readouterr()  # progress
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        fails(capsys, merge(adapter, tmp_path / "out"), "has 1.0 MiB free")
    assert not (tmp_path / "out").exists()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(merging, "save_file", interrupted)
        assert merge(adapter, tmp_path / "out") == 130
    assert not list(tmp_path.glob("out*"))
    capsys.readouterr()
    (tmp_path / "out").symlink_to("out")
    fails(capsys, merge(adapter, tmp_path / "out"), "choose a directory")
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("on_another_disk")
    assert merge(adapter, tmp_path / "out") == 0
    assert (tmp_path / "on_another_disk" / "model.safetensors").exists()


def test_the_card_names_base_and_adapter_and_what_was_found(small_demo, tmp_path):
    run_directory = small_demo[0].directory / "unlearned"
    assert merge(run_directory, tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    weights = (run_directory / "adapter_model.safetensors").read_bytes()
    headline = json.loads((run_directory / "report.json").read_text())["verdict"]["headline"]
    assert headline in card.content and hashlib.sha256(weights).hexdigest() in card.content
    assert card.data.library_name == "transformers" and "`base`" in card.content
    assert "Not checked: whether forgotten text returns" in card.content
    assert str(run_directory.parent) not in card.content
    assert "evaluate --adapter unlearned " in card.content
    checkpoint = run_directory / "checkpoint-2"  # which is found by its run's name
    shutil.copytree(run_directory, checkpoint, ignore=lambda _, names: [n for n in names if "adapter" not in n])
    try:
        assert merge(checkpoint, tmp_path / "earlier") == 0
    finally:
        shutil.rmtree(checkpoint)
    assert "evaluate --adapter unlearned/checkpoint-2 " in (tmp_path / "earlier" / "README.md").read_text()


def test_an_adapter_of_no_run_gets_a_card_as_well(tmp_path):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    assert merge(adapter, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing is known of what this adapter forgets. It is not in the directory of a run" in card
