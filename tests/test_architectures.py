"""Every architecture through the whole product: docs/architectures.md says what this run sees.

There is a test for each column of that table and each architecture. It compares what it saw with the cell: ok, or the
sentence with which the product refuses. A plain run tries the gradients of each architecture and one more column,
`--matrix full` all of them, `--matrix write` writes what it sees into the table.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
import transformers
from helpers.architecture_table import Cell, Table, read_table, version_of_table, write_table
from helpers.architectures import ARCHITECTURES, random_model, tiny_config
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.commands.merge.run import merge
from lowmem_npo.commands.train.plan import plan_run, read_inputs
from lowmem_npo.commands.train.run import unlearn
from lowmem_npo.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
)
from lowmem_npo.console import silent
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.step import estimate
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.memory import float32, fused, fused_rotary, switches
from lowmem_npo.memory.lock_step import LockStep
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, packs_rows
from lowmem_npo.model.layers import decoder
from lowmem_npo.model.loading import load_config
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.packable import padding_note
from lowmem_npo.model.saved_adapter import load_adapter

COLUMNS = ["gradients", "packed", "bf16", "QLoRA", "switches", "fused", "estimate", "evaluate", "merge"]
# What a plain run tries besides the gradients, in turn. Of all orders, this one meets the most kinds of notes, 18 of
# 28, and an estimate and a merge that are refused.
SAMPLES = ["packed", "switches", "fused", "bf16", "QLoRA", "merge", "estimate", "evaluate"]
VOCABULARY = 258  # of the byte tokenizer
FORGET, RETAIN = random_rows(3, 1, VOCABULARY), random_rows(3, 2, VOCABULARY)
LONG = [random_rows(3, seed, VOCABULARY, longest=24) for seed in (4, 5)]  # some beyond every window of 16 tokens
ADAPTER = {"lora_r": 3, "lora_alpha": 3, "lora_targets": ("all-linear",)}
EXACT = 5e-5  # some norms compute in float32 even in the dense float64 step
# Doge's attention takes another kernel where its mask needs a gradient: the policy rounds otherwise than the reference.
ROUNDING = {"doge": {"forget_loss": 1e-2, "forget_log_ratio": 1e-2, "retain_kl": 1e-4}}


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        column = metafunc.function.__name__.removeprefix("test_")
        every = metafunc.config.getoption("--matrix") != "sample"
        chosen = [
            name
            for i, name in enumerate(ARCHITECTURES)
            if every or column in ("gradients", SAMPLES[i % len(SAMPLES)].lower())
        ]
        metafunc.parametrize("architecture", chosen)


class Desk:
    """An architecture's model on disk, and what is made of it, each once."""

    def __init__(self, architecture, folder, tokenizer):
        self.config = tiny_config(architecture, VOCABULARY)
        self.folder, self.base, self.runs = folder, folder / "base", {}
        random_model(self.config).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        rows = {"forget": ["ab cd", "the key", "of", "who is it"], "retain": ["one", "two of them", "xyz", "why"]}
        for part, questions in rows.items():
            lines = [json.dumps({"question": text, "answer": f"{text[::-1]} {part}"}) for text in questions]
            (folder / f"{part}.jsonl").write_text("\n".join(lines))

    def model(self, **settings):
        return ModelConfig(str(self.base), device="cpu", **settings)

    def loaded(self):
        return load_model(self.model(dtype="float32"), silent)

    def trained(self, qlora=False):
        """The directory of a run of two steps."""
        if qlora not in self.runs:
            out = self.folder / f"run-{qlora}"
            config = RunConfig(
                model=self.model(qlora=qlora),
                data=DataConfig(forget=str(self.folder / "forget.jsonl"), retain=str(self.folder / "retain.jsonl")),
                adapter=AdapterConfig(**ADAPTER),
                training=TrainingConfig(batch_size=4, max_steps=2, lr=2e-3),
                output=OutputConfig(output_dir=str(out), eval_rows=0, leaks=()),
                trainer_args={"save_strategy": "no"},
            )
            plan = plan_run(config, read_inputs(config, silent), silent)
            base = load_model(config.model, silent)
            assert any(isinstance(module, bnb.nn.Linear4bit) for module in base.modules()) == qlora
            with mock.patch("lowmem_npo.commands.train.run.write_report"):  # half of the time, the same for all
                unlearn(plan, base, silent)
            self.runs[qlora] = out
        return self.runs[qlora]


@pytest.fixture(scope="module")
def desks(tmp_path_factory, byte_model):
    """architecture -> its Desk."""
    made, tokenizer = {}, AutoTokenizer.from_pretrained(byte_model)

    def desk(architecture):
        if architecture not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
        if architecture not in made:
            made[architecture] = Desk(architecture, tmp_path_factory.mktemp(architecture), tokenizer)
        return made[architecture]

    return desk


@pytest.fixture(scope="module")
def seen(request) -> Iterator[Table]:
    """What this run has seen, written into the table if asked for."""
    cells: Table = {}
    yield cells
    if request.config.getoption("--matrix") == "write":
        old = read_table()
        write_table({name: {**old.get(name, {}), **cells.get(name, {})} for name in ARCHITECTURES}, COLUMNS)


@pytest.fixture
def desk(architecture, desks):
    return desks(architecture)


@pytest.fixture
def cell(architecture, desk, seen, request):
    """Records how a check went, and compares it with the table."""

    def record(column, check):
        cells = seen.setdefault(architecture, {})
        cells[column] = Cell("fails")
        try:
            cells[column] = Cell.of("ok", check() or [], desk.config)
        except UserError as error:
            cells[column] = Cell.of("refused", [str(error)], desk.config)
        if request.config.getoption("--matrix") != "write":
            expected = read_table().get(architecture, {}).get(column)
            if transformers.__version__ != version_of_table():  # other notes: SDPA where there was none
                cells[column], expected = cells[column].state, expected and expected.state
            assert cells[column] == expected, "docs/architectures.md says otherwise: --matrix write writes it anew"

    return record


# -- the columns ------------------------------------------------------------------------------------------------------


def test_gradients(desk, cell, tmp_path):
    def check():
        run = make_trainer(attach_lora(desk.loaded(), AdapterConfig(**ADAPTER)), tmp_path, FORGET, RETAIN)
        loss, expected = dense_step(run, FORGET, RETAIN)
        assert relative_error(step_gradients(run), expected) < EXACT
        assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)

    cell("gradients", check)


def test_packed(desk, cell, tmp_path):
    """Packed rows against padded ones, some of them longer than a window."""

    def check():
        model = attach_lora(desk.loaded(), AdapterConfig(**ADAPTER))
        steps = {}
        for padding_free in (False, True):
            run = make_trainer(model, tmp_path / str(padding_free), *LONG, padding_free=padding_free, learning_rate=0.0)
            steps[padding_free] = step_gradients(run), run.state.log_history[0]
        (expected, logged), (gradients, other) = steps[False], steps[True]
        assert relative_error(gradients, expected) < EXACT
        for name in ("loss", "forget_loss", "forget_log_ratio", "retain_nll", "retain_kl"):
            assert other[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-4), name
        return [] if packs_rows(model) else [padding_note(desk.config.model_type)]

    cell("packed", check)


def train(desk, architecture, qlora):
    out = desk.trained(qlora)
    first, second = map(json.loads, (out / "metrics.jsonl").read_text().splitlines()[:2])
    expected = {"forget_loss": 4 * math.log(2), "forget_log_ratio": 0, "retain_kl": 0}  # (2 / beta) ln 2
    allowed = ROUNDING.get(architecture, {"forget_loss": 1e-3, "forget_log_ratio": 1e-3, "retain_kl": 1e-6})
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, abs=allowed[name]), name
    assert abs(second["forget_log_ratio"]) > 1e-3 and second["retain_kl"] > 0  # it learns
    return model_notes(load_config(desk.model()), desk.model(qlora=qlora))


def test_bf16(desk, cell, architecture):
    cell("bf16", lambda: train(desk, architecture, qlora=False))


def test_qlora(desk, cell, architecture):
    cell("QLoRA", lambda: train(desk, architecture, qlora=True))


def test_switches(desk, cell, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(switches, "slice_float32", partial(float32.slice_float32, rows=7))

    def gradients(layers):
        """The plain step's, and those with all switches that fit, in lock-step where that does; of the latter, the last
        reads a stored reference."""
        model = attach_lora(desk.loaded(), AdapterConfig(**ADAPTER, lora_layers=layers))
        folder = tmp_path / "-".join(["layers", *layers])
        trainer = partial(make_trainer, model, forget=FORGET, retain=RETAIN, learning_rate=0.0)
        yield step_gradients(trainer(folder / "plain"))
        for switch in ({"embedding_on_cpu": True}, {"tile_mlp": 5}):
            try:
                apply_switches(model, MemoryConfig(**switch, sliced_float32=False, gradient_checkpointing=False))
            except UserError as error:
                refused.add(str(error))
        apply_switches(model, MemoryConfig(offload_checkpoints=True))
        for reference in ("stored", "read"):
            run = trainer(folder / reference, reference_dir=str(folder / "reference"))
            run.passes.lock_step = LockStep.where_it_fits(run.model, run.passes.prefix)
            yield step_gradients(run)

    refused: set[str] = set()

    def check():
        top = str(load_config(desk.model()).num_hidden_layers - 1)
        for layers in ((), (top,)):  # in all layers; above a prefix that policy and reference share
            expected, *with_switches = gradients(layers)
            for actual in with_switches:
                assert relative_error(actual, expected) < EXACT
        said = {record.getMessage() for record in caplog.records if record.name.startswith("lowmem_npo")}
        return [*sorted(refused), *sorted(said)]

    cell("switches", check)


def test_fused(desk, cell, monkeypatch):
    """The plain forms of the fused kernels do the work, and what they do not do is noted."""
    monkeypatch.setattr(fused, "ENGINE", "torch")
    by_rotary, rotary = [], fused_rotary.rotary_form
    monkeypatch.setattr(fused_rotary, "rotary_form", lambda *x: by_rotary.append(rotary(*x)) or by_rotary[-1])

    def check():
        model, plain = (desk.loaded().requires_grad_(False) for _ in range(2))
        float32.slice_float32(model)
        ids = torch.arange(2, 22).reshape(2, 10)
        with torch.no_grad(), Activations() as left:
            logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(logits, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        for module in decoder(model).modules():
            gated = all(isinstance(getattr(module, part, None), torch.nn.Module) for part in ("gate_proj", "up_proj"))
            if gated and not isinstance(vars(module).get("forward"), float32.LeanMLP):
                left.names.add("gated MLP")
            if "Norm" in type(module).__name__ and next(module.children(), None) is None:
                lean = vars(module).get("forward")
                if not isinstance(lean, float32.LeanNorm) or lean.form is None:
                    left.names.add(type(module).__name__)
        parts = {unfused_part(name) for name in left.names} | ({"the rotary embedding"} if None in by_rotary else set())
        return [f"Not fused: {part}." for part in sorted(parts)]

    cell("fused", check)


def unfused_part(name):
    """What a module of this name is."""
    if "Norm" in name:
        return "norms with a gate" if "Gated" in name else "norms whose heads have weights of their own"
    if name == "gated MLP":
        return "the gate of an MLP"
    return "the gate of experts" if re.search("Experts|MoE|GLU", name) else "an activation"


ACTIVATIONS = tuple(getattr(torch.ops.aten, name) for name in ("silu", "gelu", "relu", "softplus"))


class Activations(TorchDispatchMode):
    """The names of the modules of transformers' models that call an activation of PyTorch's themselves."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in ACTIVATIONS:
            frame = inspect.currentframe()
            while frame := frame.f_back:
                if "lowmem_kernels" in frame.f_code.co_filename:
                    break
                if "transformers/models" in frame.f_code.co_filename:
                    owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else ""
                    if owner and (func._overloadpacket != torch.ops.aten.softplus or "MLP" in owner):  # not Mamba's
                        self.names.add(owner)
                    break
        return func(*args, **(kwargs or {}))


def test_estimate(desk, cell):
    def peak(qlora, length):
        adapter, data = AdapterConfig(**ADAPTER), DataConfig(max_length=length)
        config = RunConfig(model=desk.model(qlora=qlora), data=data, adapter=adapter)
        return estimate(config, load_config(config.model)).peak_bytes

    def check():
        assert 0 < peak(True, 16) < peak(True, 64)
        assert peak(False, 16) > 0

    cell("estimate", check)


def test_evaluate(desk, cell):
    def check():
        model = load_adapter(desk.loaded(), str(desk.trained()))
        rows = random_rows(4, 3, VOCABULARY)

        @torch.no_grad()
        def logits(ids):
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()

        for row, measured in zip(rows, answer_likelihoods(model, rows, progress=False), strict=True):
            ids, start = row["input_ids"], row["prompt_length"]
            table = logits(ids).log_softmax(-1)
            expected = -sum(float(table[t - 1, ids[t]]) for t in range(start, len(ids)))
            assert measured.nll_sum == pytest.approx(expected, rel=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(desk.base)
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        answers = greedy_answers(model, tokenizer, [Prompt(ids, 6) for ids in prompts], progress=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = list(prompt)
            while len(ids) < len(prompt) + 6 and (token := int(logits(ids)[-1].argmax())) != tokenizer.eos_token_id:
                ids.append(token)
            assert answer == ids[len(prompt) :]

    cell("evaluate", check)


def test_merge(desk, cell, tmp_path):
    def check():
        adapter, out = str(desk.trained()), str(tmp_path / "merged")
        merge(MergeConfig(adapter=adapter, output_dir=out, dtype="stored"), silent)
        ids = torch.tensor([FORGET[0]["input_ids"]])
        with torch.no_grad():
            base = desk.loaded()
            original = base(ids, use_cache=False).logits
            adapted = load_adapter(base, adapter)(input_ids=ids, use_cache=False).logits
            merged = load_model(ModelConfig(out, dtype="float32", device="cpu"), silent)(ids, use_cache=False).logits
        assert (merged - adapted).norm() < 1e-2 * (adapted - original).norm()

    cell("merge", check)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_whole():
    table = read_table()
    assert sorted(table) == sorted(ARCHITECTURES) and len(table) >= 40
    for cells in table.values():
        assert list(cells) == COLUMNS
        assert all(cell.state == "ok" or (cell.state == "refused" and cell.notes) for cell in cells.values())
