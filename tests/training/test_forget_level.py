"""`--forget-level holdout`: where a row's push ends, by hand and in real runs of a tiny model that recites."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.rows import write, write_rows
from helpers.saved_adapters import same_adapter
from helpers.taught_model import unlearning_config
from helpers.tiny_models import tiny_model
from transformers import AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import DataConfig, ObjectiveConfig
from lowmem_npo.console import silent
from lowmem_npo.data import prepare
from lowmem_npo.data.overlap import sharing_text
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import THE_JUDGES
from lowmem_npo.files import load_json
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.run_directory import EvaluationFiles
from lowmem_npo.training.forget_level import halved, levels_of, run_levels, there_already
from lowmem_npo.training.objective import LET_GO, SequenceLogprobs, StepTotals, forget_loss

BUNDLED = Path(__file__).resolve().parents[2] / "lowmem_npo" / "data" / "bundled"


def test_the_gradient_fades_towards_the_level_and_never_turns():
    """Three answers of two tokens: far below their level, within the last stretch, and beyond it."""
    levels = torch.tensor([5.0, 5.0, 5.0])
    nll = [1.0, 5.0 - 0.3 * LET_GO, 7.0]
    tokens = torch.tensor([-v for v in nll for _ in range(2)], requires_grad=True)
    policy = SequenceLogprobs(tokens, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    objective, reference, totals = ObjectiveConfig(beta=0.3), torch.tensor([-2.0, -2.0, -2.0]), StepTotals(3, 6, 0)
    plain = forget_loss(objective, policy, reference, totals)
    (whole,) = torch.autograd.grad(plain, tokens)
    ended = forget_loss(objective, policy.up_to(levels), reference, totals)
    (faded,) = torch.autograd.grad(ended, tokens)
    assert ended.item() == pytest.approx(plain.item())  # the figures stay
    torch.testing.assert_close(faded, whole * torch.tensor([1, 1, 0.3, 0.3, 0, 0]), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("term", ["npo", "dpo"])
@pytest.mark.parametrize("passes", [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
                                    {"joint_pass_tokens": 10**6}], ids=["split", "joint"])  # fmt: skip
def test_each_row_of_a_step_is_let_go_at_its_own_level(term, passes, tmp_path):
    """In dense float64; the other answers that dpo prefers have no level."""
    forget, retain, others = (random_rows(4, seed=seed) for seed in (1, 2, 3))
    more = {"forget_term": term, "step_batch_size": 4, **passes}
    trainer = make_trainer(tiny_model("olmo"), tmp_path, forget, retain, others if term == "dpo" else None, **more)
    _, without = dense_step(trainer, forget, retain, others)
    with torch.no_grad():
        nll = [trainer.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
               for row in forget]  # fmt: skip
    past = (1.0, 0.7, 0.2, -0.5)  # of the last stretch, what is left: all, part, or less than nothing
    trainer.push_up_to([float(own) + left * LET_GO for own, left in zip(nll, past, strict=True)])
    loss, expected = dense_step(trainer, forget, retain, others)
    gradients = step_gradients(trainer)
    assert relative_error(gradients, expected) < 2e-5 and relative_error(gradients, without) > 1e-2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_levels_are_the_holdouts_quantiles_by_rank():
    unseen = [2.0, 3.0, 4.0, 5.0]
    assert levels_of([0.03, 0.01, 0.02, 0.04], unseen) == pytest.approx(
        np.quantile(unseen, [5 / 8, 1 / 8, 3 / 8, 7 / 8])
    )
    assert levels_of([0.5], unseen) == [3.5]
    assert levels_of([1.0, 1.0], unseen) == pytest.approx(np.quantile(unseen, [1 / 4, 3 / 4]))  # equal: in their order


def words(number, seed):
    """Words that no two texts have twenty characters of in common."""
    syllables = ["ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "vu", "xe"]
    return " ".join("".join(three) for three in np.random.default_rng(seed).choice(syllables, (number, 3)))


def test_the_halves_share_no_row(taught_model):
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    data = prepare(tokenizer, DataConfig(limit=7))
    split = halved(data)
    where = [{example.where for example in rows.examples} for rows in (split.level_rows, split.holdout)]
    assert (len(split.level_rows), len(split.holdout)) == (3, 4) and not where[0] & where[1]
    assert where[0] | where[1] == {example.where for example in data.holdout.examples}
    order = np.random.default_rng(0).permutation(7)  # as ever where no two rows say the same
    assert [row["input_ids"] for row in split.level_rows] == [data.holdout[i]["input_ids"] for i in sorted(order[:3])]
    for rows, message in ((None, "there is none"), (data.holdout, "there is one")):
        few = replace(data, holdout=rows) if rows is None else prepare(tokenizer, DataConfig(limit=1))
        with pytest.raises(UserError, match=message):
            halved(few)


def test_what_shares_text_is_in_one_half_and_a_document_is_cut_in_as_few_places_as_can_be(taught_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    copies = [{"question": f"Who is {name}?", "answer": f"The {name}."} for name in ("fox", "owl", "elk", "bee")]
    copies += [{"question": "who  is FOX?", "answer": "the fox."}] * 3 + [copies[1]]
    texts = {f"{name}.txt": write(tmp_path / f"{name}.txt", words(200, seed)) for seed, name in enumerate("abc")}
    three = ",".join(texts.values())

    def shared(holdout, said):
        data, lines = prepare(tokenizer, DataConfig(holdout=holdout, limit=None, passage_tokens=64)), []
        split = halved(data, lines.append)
        examples = [*split.level_rows.examples, *split.holdout.examples]
        levels, judges = len(split.level_rows), len(split.holdout)
        assert levels + judges == len(data.holdout) and levels <= judges <= 1.5 * levels
        near = sharing_text(examples)
        number = sum(any((at < levels) != (other < levels) for other in others) for at, others in near.items())
        assert [
            line for line in lines if line.startswith(f"--forget-level holdout: {number} of {len(examples)} ")
        ] == lines
        assert len(lines) == said
        return number / len(examples)

    assert shared(write_rows(tmp_path / "copies.jsonl", copies), said=0) == 0
    assert shared(",".join([*texts.values()][:2]), said=0) == 0
    assert 0 < shared(three, said=1) < 0.1
    assert 0 < shared(texts["a.txt"], said=1) < 0.2
    same = write_rows(tmp_path / "same.jsonl", copies[4:7])
    with pytest.raises(UserError, match="there are 3 that say the same"):
        halved(prepare(tokenizer, DataConfig(holdout=same)))


@pytest.mark.parametrize("kind", ["copies", "document"])
def test_evaluate_judges_by_the_rows_that_judged_the_run(kind, taught_model, tmp_path):
    if kind == "copies":
        rows = [{"question": f"Who is {n}?", "answer": f"Number {n}."} for n in range(9)]
        holdout = write_rows(tmp_path / "holdout.jsonl", [*rows, *rows[:5]])
    else:
        holdout = write(tmp_path / "holdout.txt", words(40, 0))
    config = unlearning_config(taught_model, tmp_path / "run", max_steps=1, eval_every=None)
    config = replace(
        config,
        data=replace(config.data, holdout=holdout, limit=None, passage_tokens=64),
        objective=replace(config.objective, forget_level="holdout"),
    )
    train(config, say=silent)
    audit = json.loads((config.output_dir / "audit.json").read_text())
    judges = len(audit["holdout_rows"])
    assert 7 <= judges <= 10 and {*audit["level_rows"]}.isdisjoint(audit["holdout_rows"])
    given = ["--adapter", str(config.output_dir), "--device", "cpu", "--passage-tokens", "64"]
    out = tmp_path / "evaluated"
    given += ["--forget", str(BUNDLED / "forget.jsonl"), "--holdout", holdout, "--leaks", "membership"]
    assert main(["evaluate", *given, "--output-dir", str(out)]) == 0
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["leaks"]["membership"]["holdout_rows"] == judges
    assert not load_json(EvaluationFiles(out).settings)["other_holdout"]
    of_base = ["--model", str(taught_model), "--forget-level", "holdout", "--output-dir", str(tmp_path / "base")]
    assert main(["evaluate", *given[2:], *of_base]) == 0
    of_run, of_base = (load_json(EvaluationFiles(place).settings)["digests"] for place in (out, tmp_path / "base"))
    assert of_run[THE_JUDGES] == of_base[THE_JUDGES]


@pytest.fixture(scope="module")
def runs(taught_model, tmp_path_factory):
    """(without a level, with one): the same run."""
    folder, results = tmp_path_factory.mktemp("levels"), []
    for level in ("none", "holdout"):
        config = unlearning_config(taught_model, folder / level, max_steps=40)
        config = replace(config, objective=replace(config.objective, forget_level=level))
        results.append((config, train(config, say=silent)))
    return results


def nll(result):
    return np.array([record.nll for record in result.after["forget"].records])


def test_rows_end_near_their_levels_and_what_is_kept_is_no_worse(runs):
    (_, free), (config, held) = runs
    levels = np.array(json.loads((config.output_dir / "forget_levels.json").read_text())["levels"])
    beyond, without = np.maximum(nll(held) - levels, 0).mean(), np.maximum(nll(free) - levels, 0).mean()
    assert without > 1 and beyond < without / 2, (without, beyond)
    assert held.after["retain"].summary.nll <= free.after["retain"].summary.nll * 1.1
    assert nll(held).mean() > 3 * held.before["forget"].summary.nll + 1  # and they are forgotten


def test_resumed_it_has_the_same_levels_and_ends_in_the_same_bits(runs, tmp_path):
    _, (config, held) = runs
    folder = tmp_path / "again"
    shutil.copytree(config.output_dir, folder)
    (folder / "adapter_model.safetensors").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > 20:
            shutil.rmtree(checkpoint)
    train(replace(config, output=replace(config.output, output_dir=str(folder), resume=True)), say=silent)
    assert same_adapter(config.output_dir, folder)
    assert (folder / "forget_levels.json").read_text() == (config.output_dir / "forget_levels.json").read_text()


def test_levels_that_cannot_be_read_are_measured_again(runs, tmp_path):
    _, (config, _) = runs
    data = halved(prepare(AutoTokenizer.from_pretrained(config.model.model), config.data))
    model = attach_lora(load_model(config.model, silent), config.adapter)
    path, rows = tmp_path / "forget_levels.json", len(data.forget_trained)
    levels = run_levels(path, model, data, rows, fresh=True)
    whole, other = path.read_text(), json.dumps({"levels": [9.0] * rows})
    of_other_types = other.replace("9.0", "[9.0]"), other.replace("9.0", "true"), other.replace("9.0", "NaN", 1)
    for content in ("", whole[: len(whole) // 2], "[]", "{}", '{"levels": [1.0]}', *of_other_types):
        path.write_text(content)
        assert run_levels(path, model, data, rows, fresh=False) == levels and path.read_text() == whole, content
    path.write_bytes(b"\xff\xfe")
    assert run_levels(path, model, data, rows, fresh=False) == levels
    path.write_text(other)
    assert run_levels(path, model, data, rows, fresh=False) == [9.0] * rows  # what can be read is


CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}:\n{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def test_in_both_forms_each_has_the_levels_that_it_has_alone(taught_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    tokenizer.chat_template = CHAT
    config = unlearning_config(taught_model, tmp_path)
    model = attach_lora(load_model(config.model, silent), config.adapter)

    def levels(template, **files):
        data = halved(prepare(tokenizer, DataConfig(limit=6, template=template, **files)))
        assert {example.where for example in data.level_rows.examples}.isdisjoint(
            {example.where for example in data.holdout.examples}
        )
        return run_levels(tmp_path / "levels.json", model, data, 4, fresh=True)

    both, chat, plain = (levels(template) for template in ("both", "chat", "plain"))
    assert len(both) == 12 and both == pytest.approx([*chat, *plain], rel=1e-4)
    assert not np.allclose(chat, plain, rtol=0.1)  # or it would not matter

    holdout = write_rows(tmp_path / "texts.jsonl", [{"text": f"Nothing is {n}. "} for n in range(4)])
    texts = levels("both", holdout=holdout)  # a holdout that has but one form
    assert len(texts) == 12 and sorted(texts[:6]) == pytest.approx(sorted(texts[6:]))


def test_half_of_the_holdout_is_what_the_run_is_judged_by(runs):
    _, (config, _) = runs
    audit = json.loads((config.output_dir / "audit.json").read_text())
    assert audit["data"]["holdout"]["rows"] == 6


@pytest.mark.parametrize(
    "objective, data, message",
    [
        ({}, {"forget": "f.jsonl", "retain": "r.jsonl"}, "name some, --holdout"),
        ({}, {"tokens": "all"}, "--tokens all takes prompts too"),
        ({"forget_term": "idk"}, {}, "idk trains on a refusal"),
        ({"forget_level": "gold"}, {}, "--forget-level must be one of none, holdout, not 'gold'"),
    ],
)
def test_bad_input(objective, data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config = unlearning_config(tmp_path, tmp_path)
        settings = {"forget_level": "holdout", **objective}
        replace(config, data=replace(config.data, **data), objective=replace(config.objective, **settings))


def test_rows_that_are_at_their_level_before_training_are_counted(taught_model, tmp_path):
    config = unlearning_config(taught_model, tmp_path / "run", max_steps=1)
    swapped = {"forget": "holdout", "retain": "retain", "holdout": "forget"}  # what was never taught is to be forgotten
    files = {name: str(BUNDLED / f"{of}.jsonl") for name, of in swapped.items()}
    lines, objective = [], replace(config.objective, forget_level="holdout")
    train(replace(config, data=replace(config.data, **files), objective=objective), say=lines.append)
    (line,) = [line for line in lines if "before training, and not pushed" in line]
    assert line.startswith("--forget-level holdout: 12 of 12 forget rows are at their level")
    assert "That is most of them, so that little will be forgotten" in line
    assert any(line.startswith("Forget rows below their level are pushed up to it") for line in lines)
    assert there_already([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) is None
    assert there_already([1.5, 2.0, 3.0], [1.5, 2.5, 3.5]).endswith("1 of 3 forget rows are at their level before "
                                                                   "training, and not pushed.")  # fmt: skip
