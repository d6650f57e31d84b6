"""The runs of a sweep: every point of a grid of train options, with every seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lowmem_npo.config import DataConfig, ModelConfig, OutputConfig, RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded
from lowmem_npo.idle_options import idle_in, without_idle_options
from lowmem_npo.run_directory import RunFiles

# Options that decide nothing but what is measured and how; a baseline is measured once, for all runs.
MEASURING = [f.name.replace("_", "-") for f in fields(OutputConfig)] + ["paraphrase-column"]
# Those, and options that a sweep sets itself, or that concern one invocation.
NOT_IN_GRID = {
    **dict.fromkeys(MEASURING, "the runs of a sweep are measured alike: give it once"),
    "seed": "use --seeds",
    "output-dir": "every run gets its own directory",
    "reference-dir": "the runs share one",
    "config": "give --config once, for all runs",
    **dict.fromkeys(("resume", "preview", "dry-run", "report-examples"), "give it once, for all runs"),
}


EMPTY = " An empty value leaves an option to its default, or to --recipe; the value none, where there is one, does not."


@dataclass(frozen=True)
class GridPoint:
    """One configuration. `settings`: train options without their dashes, and their values as typed; "" leaves the
    option out."""

    settings: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """For tables, and for the file system."""
        parts = (f"{option}={value or 'default'}" for option, value in self.settings)
        return re.sub(r"[^A-Za-z0-9.+%=_-]+", "-", "_".join(parts)) or "as-given"

    @property
    def start(self) -> GridPoint:
        """What of it decides the model before and the rows."""
        names = {f.name.replace("_", "-") for section in (ModelConfig, DataConfig) for f in fields(section)}
        return GridPoint(tuple(setting for setting in self.settings if setting[0] in {*names, "adapter"}))

    @property
    def flags(self) -> list[str]:
        return [word for option, value in self.settings if value for word in (f"--{option}", *value.split())]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    point: GridPoint
    seed: int
    config: RunConfig

    @property
    def directory(self) -> Path:
        return self.config.output_dir


def parse_grid(texts: Sequence[str], aliases: Mapping[str, str] | None = None) -> list[GridPoint]:
    """The points of a grid such as `gamma=0,1 delta=0,0.5,1`: all combinations, the last option varying fastest.

    Values are separated by commas; a value may have several words ("lora-targets=q_proj v_proj,all-linear"); an empty
    one leaves the option out.

    aliases: another spelling of an option -> ours.

    Raises:
        UserError: not of this form, an option named twice, or one that cannot be in a grid.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        option, equals, values = text.partition("=")
        option = option.strip().removeprefix("--").replace("_", "-")
        option = (aliases or {}).get(option, option)
        if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            raise UserError(f"--grid {text}: give an option of `lowmem-npo train` and values, such as delta=0,0.5,1.")
        if option in NOT_IN_GRID:
            raise UserError(f"--grid {text}: {option} cannot be in a grid; {NOT_IN_GRID[option]}.")
        if option in axes:
            raise UserError(f"--grid names {option} twice: give all its values together.")
        axes[option] = [value.strip() for value in values.split(",")]
        if len(set(axes[option])) < len(axes[option]):
            raise UserError(f"--grid {text}: a value is repeated.")
    return [GridPoint(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def parse_seeds(words: Sequence[str], base: int) -> list[int]:
    """`["5"]` is five seeds, from `base` on; several words, or words with commas, are the seeds themselves.

    Raises:
        UserError: no numbers, numbers that are not whole, or a repeated one.
    """
    parts = [part for word in words for part in word.split(",") if part]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds {' '.join(words)}: give how many (5), or which (42,43,44).")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1 and "," not in words[0]:
        if numbers[0] < 1:
            raise UserError("--seeds 0: there would be no run.")
        return list(range(base, base + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {' '.join(words)}: a seed is repeated.")
    return numbers


def plan_sweep(
    points: Sequence[GridPoint], seeds: Sequence[int], parse: Callable[[Sequence[str]], RunConfig], say: Say = silent
) -> list[SweepRun]:
    """Every run, one configuration after another; the runs of a model are consecutive. A point that differs from an
    earlier one only in options without effect is left out, as `say` is told: of a grid's products some may be the same.

    parse: the run that the sweep's train options and some further flags describe.

    Raises:
        UserError: an unknown option, an invalid value, one configuration in two spellings, or two of one name.
    """
    runs, made = list[SweepRun](), list[tuple[RunConfig, GridPoint, RunConfig]]()
    for point in points:
        config = _parsed(point, parse)
        in_use = _in_use(config)
        if same := next(((one, first) for used, one, first in made if used == in_use), None):
            earlier, first = same
            if not (why := _why_same(first, config)):
                emptied = not all(value for _, value in (*earlier.settings, *point.settings))
                raise UserError(
                    f"--grid {earlier.name} and {point.name} are the same configuration: leave one of them out."
                    + (EMPTY if emptied else "")
                )
            say(f"--grid {point.name} is left out: it is the same run as {earlier.name}, as {why}.")
            continue
        made.append((in_use, point, config))
        root = config.output_dir
        for seed in seeds:
            runs.append(SweepRun(point, seed, _placed(config, point, root, seed)))
    if len({run.directory for run in runs}) < len(runs):
        raise UserError("--grid: two configurations would have the same directory: spell their values differently.")
    models = list({repr(run.config.model): None for run in runs})
    return sorted(runs, key=lambda run: models.index(repr(run.config.model)))


def _in_use(config: RunConfig) -> RunConfig:
    """What of `config` makes a difference, with the defaults that mean another option's value written out."""
    training, objective = config.training, config.objective
    training = replace(training, retain_batch_size=training.retain_rows)
    if config.memory.memory_budget is None:  # which chooses the size that is not given
        training = replace(training, micro_batch_size=training.micro_batch_size or training.batch_size)
    objective = replace(objective, adversary_steps=objective.attack_steps or None)
    return without_idle_options(replace(config, training=training, objective=objective))


def _why_same(one: RunConfig, other: RunConfig) -> str:
    """Why two configurations that differ are the same run; "" if they do not."""
    first, second, idle = one.flat(), other.flat(), idle_in(other)
    differ = [name for name in first if first[name] != second[name]]
    reasons = (f"has no effect with {idle[name]}" if name in idle else "has that default" for name in differ)
    return " and ".join(f"--{name.replace('_', '-')} {why}" for name, why in zip(differ, reasons, strict=True))


def first_config(points: Sequence[GridPoint], parse: Callable[[Sequence[str]], RunConfig]) -> RunConfig:
    """The run that the sweep's options describe without the grid; where one that there must be is the grid's, such as
    model=a,b, that of its first point.

    Raises:
        UserError: an invalid value; it names the point of the grid that it comes from, unless all have the same.
    """
    try:
        return parse([])
    except UserError:
        pass
    try:
        return parse(points[0].flags)
    except UserError as error:
        if len(points) > 1 and all(_mistake(point, parse) == str(error) for point in points[1:]):
            raise
        raise named(points[0], error) from error


def _mistake(point: GridPoint, parse: Callable[[Sequence[str]], RunConfig]) -> str | None:
    try:
        parse(point.flags)
    except UserError as error:
        return str(error)
    return None


def _parsed(point: GridPoint, parse: Callable[[Sequence[str]], RunConfig]) -> RunConfig:
    try:
        return parse(point.flags)
    except UserError as error:
        raise named(point, error) from error


def named(point: GridPoint, error: UserError) -> UserError:
    """`error` with the values of the grid that it comes from, if there is a grid."""
    return UserError(f"--grid {point.name}: {error}" if point.settings else str(error))


def _placed(config: RunConfig, point: GridPoint, root: Path, seed: int) -> RunConfig:
    """`config` with its own directory and seed, and with a reference that it shares with all runs that can share it.

    Runs and evaluations share the base, too: whether its scales are quantised must not depend on what fits beside one.
    """
    memory, model = config.memory, config.model
    if model.qlora and model.double_quant == "auto":
        model = replace(model, double_quant="on")
    if memory.reference != "live":
        shared = expanded(memory.reference_dir or RunFiles(root).reference)
        memory = replace(memory, reference_dir=str(shared / point.start.name if point.start.settings else shared))
    return replace(
        config,
        model=model,
        memory=memory,
        training=replace(config.training, seed=seed),
        output=replace(config.output, output_dir=str(root / point.name / f"seed-{seed}")),
    )
