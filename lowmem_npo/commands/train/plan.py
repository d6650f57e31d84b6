"""What a run reads before its weights, and what it will do: all that could fail is checked here, nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from accelerate import PartialState
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowmem_npo.commands.train.own_texts import check_askable, own_answers, own_texts
from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.data import PreparedData, prepare
from lowmem_npo.data.fit import check_fit, positions_of
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.automatic import as_begun, decide
from lowmem_npo.estimate.report import Report
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, leak_tests
from lowmem_npo.idle_options import remarks_on_idle_options
from lowmem_npo.memory.streaming import check_device
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import load_tokenizer, resolve_name
from lowmem_npo.model.adapters import adapter_size, check_lora, note_on_experts, shared_layers
from lowmem_npo.model.loading import load_config, local_cache_entry, quantization_of, resolve_device
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.saved_adapter import check_finite, settings_of_run
from lowmem_npo.model.stop_tokens import stop_tokens
from lowmem_npo.model.weights import check_has_weights
from lowmem_npo.recipes import named_in_errors, remark
from lowmem_npo.report.as_audited import check_recorded_base, check_same_adapter, check_same_model, check_same_rows
from lowmem_npo.run_directory import RunDirectory, check_disk, step_of
from lowmem_npo.training.adversary import attacker_size
from lowmem_npo.training.arguments import check_trainer_args
from lowmem_npo.training.forget_level import halved
from lowmem_npo.training.groups import split_texts
from lowmem_npo.training.layered import attack_length
from lowmem_npo.training.sampler import check_division
from lowmem_npo.training.step_rows import num_steps
from lowmem_npo.training.training_rows import planned_rows, rows_read


class Inputs(NamedTuple):
    """What a run reads before its weights."""

    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


@dataclass
class RunPlan:
    """A validated run. `config` has its memory budget, and what `auto` left open, resolved; `directory.config`, which
    is run.yaml's, has what was asked for where the rows let the run have less."""

    config: RunConfig
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    predicted: Report | None = None  # on a GPU, or with a budget

    @property
    def steps(self) -> int:
        """Optimiser steps, as the Trainer counts them."""
        return steps_of(self.config, self.data)

    @property
    def sentence(self) -> str:
        """The number of steps, and of rows in each."""
        training, data = self.config.training, self.data
        retain = " rows"
        if data.retain is not None:
            drawn, rows = training.retain_rows, len(data.retain)
            retain = f" and {drawn} of {rows} retain rows"
            if drawn > rows:
                retain = f" and {drawn} retain rows (the {rows} there are, repeatedly)"
        rows = len(data.forget_trained)
        return (
            f"{self.steps} steps of {min(training.batch_size, rows)} of {rows} forget{retain}"
            f"{f', in {training.layered} stages' if training.layered else ''}"
        )


def steps_of(config: RunConfig, data: PreparedData) -> int:
    """Optimiser steps of a run, as the Trainer counts them."""
    training = config.training
    return num_steps(len(data.forget_trained), training.batch_size, training.epochs, training.max_steps)


def is_main_process(config: RunConfig) -> bool:
    """Whether this process is the one that measures, writes and prints."""
    return PartialState(cpu=resolve_device(config.model.device).type == "cpu").is_main_process


def read_inputs(config: RunConfig, say: Say, known: Inputs | None = None) -> Inputs:
    """Reads and checks all that a run reads before its weights, and reports on the data.

    known: inputs that a run with the same model and data has read; they are reported, but not read again.

    Raises:
        UserError: as for `train`.
    """
    resolve_name(config.model.model, config.model.revision, say)
    for line in filter(None, [remark(config), *remarks_on_idle_options(config)]):
        say(line)
    leak_tests(config.output.leaks, WHILE_TRAINING)
    if known is None:
        unused = say if config.output.dry_run else silent  # a run says so when it loads the weights
        model_config, tokenizer = load_config(config.model, unused), load_tokenizer(config.model)
        data = read_data(config, tokenizer, model_config)
        known = Inputs(model_config, tokenizer, data)
    for line in [*model_notes(known.model_config, config.model), *known.data.report]:
        say(line)
    return known


def read_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> PreparedData:
    stops, texts = stop_tokens(config.model, model_config), own_texts(config)
    answers = partial(own_answers, config)
    positions = positions_of(model_config)
    return prepare(tokenizer, config.data, config.objective.forget_term, stops, texts, answers, positions)


def plan_run(config: RunConfig, inputs: Inputs, say: Say) -> RunPlan:
    """Checks all that could fail after the weights are loaded, and finds the memory switches; writes nothing.

    Raises:
        UserError: as for `train`.
    """
    model_config, tokenizer, data = inputs
    asked = as_begun(config)
    config, data = fitted(asked, data, say)
    if config.memory.stream_weights:
        check_device(resolve_device(config.model.device))
    check_has_weights(resolve_name(config.model.model, config.model.revision))
    local_cache_entry(config.model, model_config)  # raises if it could be neither read nor written
    check_fit(model_config, tokenizer, rows_read(config, data), say)
    if data.alternatives_are_unwritten:
        check_askable(config, data.forget.examples, tokenizer, model_config)
    directory = RunDirectory(asked)
    directory.check()
    check_trainer_args(config)
    if config.output.resume:
        check_same_rows(directory.path, config, data)
        check_same_adapter(directory.path, config)
        check_same_model(directory.path, config)
    if config.adapter.adapter is not None:
        if not config.adapter.any_base:
            name = resolve_name(config.model.model, config.model.revision)
            check_recorded_base(config.adapter.adapter, name, config.model.revision)
        if settings_of_run(config.adapter.adapter).get("qlora") and not config.model.qlora:
            say("The adapter was trained on the 4-bit base, and goes on on the unquantised one (no --qlora).")
    quantized = quantization_of(model_config, config.model) is not None
    adapted = check_lora(model_config, config.adapter, quantized)
    if config.adapter.adapter is not None:
        check_finite(config.adapter.adapter)
    attack_steps = config.objective.attack_steps
    check_disk(config, *adapter_size(adapted), attacker_size(adapted) if attack_steps > 1 else 0)
    if line := note_on_experts(adapted, config.adapter):
        say(line)
    if shared := shared_layers(adapted):
        say(f"The base shares {shared[0]} with another layer: the adapter works beside its base, but cannot be merged.")
    apply_switches(adapted, config.memory)  # raises if one does not fit
    config, predicted = decide(config, data, model_config, say)
    directory.config = replace(config, objective=asked.objective)
    plan = RunPlan(config, directory, tokenizer, data, predicted)
    trained = step_of(next(iter(directory.checkpoints()), None)) if config.output.resume else 0
    if trained > plan.steps:
        raise UserError(
            f"--resume: the run in '{directory.path}' has trained {trained} steps, and these settings ask for "
            f"{plan.steps}: give --max-steps {trained} or more, or start anew."
        )
    return plan


def fitted(config: RunConfig, data: PreparedData, say: Say) -> tuple[RunConfig, PreparedData]:
    """The run as its rows let it be: with as many of --adversary-steps as an attacker will take, which is said if these
    are fewer, and under --forget-level with half of the holdout set apart.

    Raises:
        UserError: rows that cannot be divided as --layered and --adversary do it, or a holdout that cannot be halved.
    """
    if config.objective.forget_level == "holdout":
        data = halved(data, say)
    steps, wanted, batch_size = steps_of(config, data), config.objective.attack_steps, config.training.batch_size
    used = attack_length(wanted, steps, config.training.layered or 1)
    with named_in_errors(config):
        rows = planned_rows(config, data)
        check_division(rows.num_forget, rows.folds, batch_size, steps, used)
    if rows.folds and (shared := split_texts(data.forget_trained, rows.folds)):
        say(
            f"--layered: {shared} of {rows.num_forget} rows to forget share text with one of another fold, so that for "
            "a time it is forgotten and held at once; of documents, --passages completion leaves fewest such rows."
        )
    if used == wanted:
        return config, data
    short = "not every stage is" if rows.folds else "the run is not"
    say(f"--adversary-steps {wanted} becomes {used}: {short} long enough for two attackers of more steps.")
    return replace(config, objective=replace(config.objective, adversary_steps=used)), data
