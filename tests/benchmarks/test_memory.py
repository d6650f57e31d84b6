"""benchmarks/memory.py: the baselines do the same step as ours; the README's table is made from the JSON."""

from __future__ import annotations

import copy
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error
from helpers.tiny_models import tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import memory, tables
from benchmarks.memory_parts import contenders
from benchmarks.memory_parts.contenders import CONTENDERS, simulate
from benchmarks.memory_parts.picture import draw
from benchmarks.shared.baselines import Baseline
from benchmarks.shared.peers import LikeOpenUnlearning, LikeTRL
from benchmarks.shared.random_model import save_random_model

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)
SMALL = LlamaConfig(
    vocab_size=997, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 2, "labels": -100}
    batch = {name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in rows]) for name in fill}
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {**batch, "attention_mask": torch.tensor(mask)}


@pytest.fixture
def in_float32(monkeypatch):
    """Instead of bf16, so that a baseline and the exact step differ by rounding in float32 only."""
    autocast = torch.autocast
    monkeypatch.setattr("benchmarks.shared.baselines.torch.autocast", lambda *_, **__: autocast("cpu", enabled=False))


def lora_gradients(folder, two_models: bool, way=Baseline) -> tuple[float, dict, float, dict]:
    """Loss and gradients of a baseline, and of the exact step, of the same adapter on the same model."""
    ours = make_trainer(tiny_model("olmo"), folder, FORGET, RETAIN)
    expected_loss, expected = dense_step(ours, FORGET, RETAIN)
    adapter = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    baseline = way.build(lambda: tiny_model("olmo"), two_models=two_models, lora=True, r=3)
    own = {name: p for name, p in baseline.policy.named_parameters() if p.requires_grad}
    assert own.keys() == adapter.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter[name])
    scales = [{m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
              for model in (ours.model, baseline.policy)]  # fmt: skip
    assert scales == [{5 / 3}, {1.0}]  # alpha / r; the benchmark's alpha is r
    for module in baseline.policy.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 5 / 3
    loss = float(baseline.differentiate(padded(FORGET), padded(RETAIN)))
    return loss, {name: p.grad for name, p in own.items()}, expected_loss, expected


@pytest.mark.parametrize(
    "way, two_models", [(Baseline, True), (Baseline, False), (LikeTRL, False), (LikeOpenUnlearning, True)]
)
def test_a_lora_baseline_does_the_same_step_as_ours(way, two_models, tmp_path, in_float32):
    loss, gradients, expected_loss, expected = lora_gradients(tmp_path, two_models, way)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and relative_error(gradients, expected) < 1e-4


def test_another_step_would_be_noticed(tmp_path, in_float32, monkeypatch):
    build = Baseline.build.__func__

    def other(cls, *args, **kwargs):
        made = build(cls, *args, **kwargs)
        made.beta = 0.4
        return made

    monkeypatch.setattr(Baseline, "build", classmethod(other))
    loss, gradients, expected_loss, expected = lora_gradients(tmp_path, two_models=False)
    assert loss != pytest.approx(expected_loss, rel=1e-4) and relative_error(gradients, expected) > 1e-3


def test_full_fine_tuning_is_the_same_loss_differentiated_together(in_float32):
    """Of all weights, in float64 from full logits; the reference is a copy of the untrained model."""
    baseline = Baseline.build(lambda: tiny_model("olmo"), two_models=True, lora=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in baseline.policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    exact = copy.deepcopy(baseline.policy).double().eval()
    original = tiny_model("olmo").double()

    def tables_of(model, row):
        labels = torch.tensor(row["labels"])
        places = (labels[1:] != -100).nonzero()[:, 0]
        return model(torch.tensor([row["input_ids"]])).logits[0, places].log_softmax(-1), labels[1:][places]

    loss = 0.0
    for row in FORGET:
        (own, targets), (old, _) = tables_of(exact, row), tables_of(original, row)
        ratio = (own - old.detach()).gather(1, targets[:, None]).sum()
        loss = loss + 4 * torch.log1p((0.5 * ratio).exp()) / len(FORGET)
    rows = [(*tables_of(exact, row), tables_of(original, row)[0].detach()) for row in RETAIN]
    count = sum(len(targets) for _, targets, _ in rows)
    for own, targets, old in rows:
        nll = -own.gather(1, targets[:, None]).sum()
        loss = loss + (nll + 0.5 * (own.exp() * (own - old)).sum()) / count
    loss.backward()
    assert baseline.together
    assert float(baseline.differentiate(padded(FORGET), padded(RETAIN))) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in exact.named_parameters()}
    assert relative_error({name: p.grad for name, p in baseline.policy.named_parameters()}, expected) < 1e-4


def test_a_baseline_step_moves_its_weights_and_frees_its_gradients(in_float32):
    baseline = Baseline.build(lambda: tiny_model("olmo"), two_models=False, lora=True)
    assert isinstance(baseline.policy, PeftModel) and baseline.reference is None
    before = [p.detach().clone() for p in baseline.policy.parameters() if p.requires_grad]
    baseline.step(padded(FORGET), padded(RETAIN))
    after = [p for p in baseline.policy.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def contender(name: str):
    return next(c for c in CONTENDERS if c.name == name)


def test_the_contenders_hold_what_their_names_say():
    def kinds(name):
        return simulate(contender(name), SMALL, 64).by_kind

    full, two, one = (kinds(c.name) for c in CONTENDERS[:3])
    ours = kinds("+ --sliced-float32 *")
    logits = 4 * 63 * 997 * 4  # float32, of one pass
    assert two["reference"] >= two["frozen weights"] > 0 and full["adapter"] > 2 * full["reference"]
    assert one["head"] + one["reference"] > 3 * logits and ours["head"] + ours["reference"] < 3 * logits
    # every row of ours is a switch more, and none takes more memory than the one before
    switches = list(contenders._ours())[2:-1]
    sizes = [sum(kinds(c.name).values()) for c in switches[:-1]]  # the last names layers that this model does not have
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes)) and sizes[-1] < sizes[0]
    flags = [set(c.flags) for c in switches]
    assert all(earlier < later for earlier, later in itertools.pairwise(flags))


# -- the whole script, its JSON, picture and table --------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "simulated" / "memory.json"
    only = ["--only", "two models, LoRA", "+ --qlora", "micro-batch", "32B"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "known_config", lambda name: SMALL)
        assert memory.main(["--tokens", "64", "2048", "--out", str(path), *only]) == 0
    return path


def test_without_a_gpu_everything_says_that_it_is_simulated(simulated):
    written = json.loads(simulated.read_text())
    names = [(entry["tokens"], entry["name"]) for entry in written["results"]]
    both = ["two models, LoRA", "+ --qlora", "+ --micro-batch-size 1"]
    assert names == [(64, n) for n in both] + [(2048, n) for n in (*both, "OLMo-2-32B, down to --offload-checkpoints")]
    assert written["simulated"] is True and written["results"][-1]["model"] == "allenai/OLMo-2-0325-32B"
    assert all(sum(e["by_kind"].values()) == e["peak_bytes"] for e in written["results"])
    assert simulated.with_suffix(".png").stat().st_size > 10_000
    text = tables.memory(simulated.parents[1])
    assert "**simulated**" in text and "| + `--micro-batch-size 1` |" in text and text.count("\n") == 5


def test_measurements_take_the_simulations_place_and_show_it_beside_them(simulated):
    record = json.loads(simulated.read_text())
    record |= {"simulated": False, "machine": {"gpu": "NVIDIA X"}}
    first, second, *rest = record["results"]
    record["results"] = [{**first, "predicted_peak_bytes": 2**30, "peak_bytes": 2**31}, {**second, "failed": "skipped"}]
    del record["results"][1]["peak_bytes"]
    folder = simulated.parents[1] / "nvidia-x"
    folder.mkdir()
    (folder / "memory-512.json").write_text(json.dumps(record))
    (folder / "memory-512.status.json").write_text('{"benchmark": "gpu_evidence memory-512"}')
    (folder / "cap.json").write_text("not read")
    text = tables.memory(folder.parent)
    assert "measured on NVIDIA X (predicted)" in text and "| 2.00 (1.00) |" in text and "| skipped |" in text
    draw(record, folder / "memory.png")
    assert (folder / "memory.png").exists()


def test_the_page_shows_the_committed_numbers_and_a_changed_one_is_noticed(tmp_path):
    assert tables.main(["--check"]) == 0
    page = tables.DOCUMENTS[0].read_text()
    begin = page.index("<!-- table:memory -->")
    digit = next(i for i in range(begin, len(page)) if page[i - 1] == "." and page[i].isdigit())
    wrong = page[:digit] + str((int(page[digit]) + 1) % 10) + page[digit + 1 :]
    copy_of_it = tmp_path / "memory.md"
    copy_of_it.write_text(wrong)
    assert tables.main(["--check", str(copy_of_it)]) == 1
    assert tables.main([str(copy_of_it)]) == 0 and copy_of_it.read_text() == page


# -- what runs on a GPU, as far as it goes without --------------------------------------------------------------------


def test_a_contender_that_fails_or_is_late_is_reported(monkeypatch):
    def process(code):
        return memory._begin([memory.sys.executable, "-c", code], {})

    soon = time.monotonic() + 600
    assert memory._end(process("print('loading'); print('{\"peak_bytes\": 3}')"), soon) == {"peak_bytes": 3}
    assert memory._end(process("raise ValueError('no room')"), soon) == {"failed": "ValueError: no room"}
    code = "class OutOfMemoryError(Exception): ...\nraise OutOfMemoryError('CUDA')"
    assert memory._end(process(code), soon) == {"failed": "out of memory"}
    late = {"failed": "skipped: the time limit was reached"}
    assert memory._end(process("import time; time.sleep(99)"), 0) == late
    assert memory._on_gpu(contender("+ --qlora"), 512, SimpleNamespace(), 0) == late


@pytest.mark.parametrize("filled", [None, 64], ids=["random", "mostly zeros"])
def test_random_weights_load_as_a_model(filled, tmp_path):
    folder = save_random_model("small", tmp_path, filled)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.lm_head.weight.detach()
    assert weight.dtype == torch.bfloat16 and weight.shape == (512, 64)
    assert weight.float().std() == pytest.approx(0.02, rel=0.1) if filled is None else int((weight != 0).sum()) == 32
    assert not torch.equal(weight, model.get_input_embeddings().weight)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
