"""The fastest settings that keep a run within its memory, chosen by simulating its step.

Only settings that leave the loss and its gradients unchanged are tried (without double quantisation, the frozen weights
are rounded once instead of twice):

| setting | when | what it does to the time |
|---|---|---|
| scales of 4-bit weights not quantised in turn | `--double-quant auto` | shortens every dequantisation |
| layers not recomputed | `--gradient-checkpointing auto` | saves a forward pass |
| forget and retain rows in one pass | `--joint-pass-tokens auto` | half of the launches and dequantisations |
| input embedding on the CPU | for a budget | copies rows |
| tiled MLP | for a budget | dequantises 4-bit weights for every tile; more launches |
| checkpoints offloaded | for a budget | copies them over the bus |
| further micro-batches | for a budget | dequantises 4-bit weights again, for fewer rows |
| weights streamed, MLP tiles of 256 tokens | for a budget that nothing else meets | copies them in every pass |

Their order is that of the time which `lowmem_npo.estimate.time` predicts for a model of a few layers. Joint passes are
decided last, for the fastest of the others that fits: they take as many tokens as then fit, if they are worth it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lowmem_npo.config import TILE_ROWS, AdapterConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.gpus import GPUS, Device
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import Estimate, estimate
from lowmem_npo.estimate.time import step_seconds
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model.adapters import check_lora
from lowmem_npo.model.packable import packable
from lowmem_npo.model.quantization import stored_quantization
from lowmem_npo.model.trial import of_depth
from lowmem_npo.sizes import compared, gib


class Switch(NamedTuple):
    """A setting that the search may make: `value` of field `name` of the configuration's `section`."""

    section: str
    name: str
    value: Any

    def on(self, config: RunConfig) -> RunConfig:
        return replace(config, **{self.section: replace(getattr(config, self.section), **{self.name: self.value})})

    def is_on(self, config: RunConfig) -> bool:
        return getattr(getattr(config, self.section), self.name) == self.value


AUTOMATIC = (Switch("model", "double_quant", "off"), Switch("memory", "gradient_checkpointing", "off"))
JOINT = Switch("memory", "joint_pass_tokens", None)  # whose value is decided by the rows
SAVING = (
    Switch("memory", "embedding_on_cpu", True),
    Switch("memory", "tile_mlp", 4 * TILE_ROWS),
    Switch("memory", "tile_mlp", TILE_ROWS),
    Switch("memory", "offload_checkpoints", True),
)
STREAMED = Switch("memory", "stream_weights", True)
SMALL_TILE = Switch("memory", "tile_mlp", TILE_ROWS // 4)  # beside streamed weights, where a tile of 1024 rows counts
FEW, MORE = 4, 6  # layers of the shallow models that bound a deep one from below: more than are in flight at once
TIMED = 1  # layers of the models whose times are compared
TIMED_STREAMED = 3  # the same of streamed weights: more than two slots hold, or nothing would be copied again
JOINT_SHARES = (1.0, 0.5, 0.25)  # of the largest micro-batch's tokens that one pass may take
WORTH = 0.03  # of a step's time, which joint passes must save
MARGIN = 0.05  # of the memory that is free, which stays so: predictions may be off by as much

Simulate = Callable[[RunConfig, PretrainedConfig], Estimate]


@dataclass(frozen=True)
class Fit:
    """Settings that fit, what they take, and the flags that lead to them."""

    config: RunConfig
    estimate: Estimate
    flags: list[str]


def undecided(config: RunConfig) -> bool:
    """Whether the search has anything to decide without a budget."""
    memory = config.memory
    return "auto" in (memory.gradient_checkpointing, memory.joint_pass_tokens) or _may_quantise_once(config)


def cautious(config: RunConfig) -> RunConfig:
    """`config` with what is undecided decided for the least memory."""
    if config.memory.joint_pass_tokens == "auto":
        config = JOINT._replace(value=0).on(config)
    for section, name in (switch[:2] for switch in AUTOMATIC):
        if getattr(getattr(config, section), name) == "auto":
            config = Switch(section, name, "on").on(config)
    return config


def fit_free(
    config: RunConfig,
    architecture: PretrainedConfig,
    free: int,
    rows: StepRows | None = None,
    device: Device | None = None,
    typical: StepRows | None = None,
) -> Fit:
    """The fastest of what is left open with `auto` that fits into `free` bytes; the smallest if nothing does. Arguments
    as of `fit_budget`."""
    search = _Search(config, architecture, AUTOMATIC, rows, device, typical)
    room = int(free * (1 - MARGIN))
    return search.fastest(room) or Fit(search.start, search.simulate(search.start, architecture), [])


def fit_budget(
    config: RunConfig,
    architecture: PretrainedConfig,
    budget: int,
    rows: StepRows | None = None,
    device: Device | None = None,
    typical: StepRows | None = None,
) -> Fit:
    """The fastest settings with which `config`'s step and the CUDA context take at most `budget` bytes.

    Args:
        rows: the largest of a step. Default: of --max-length tokens.
        device: the GPU. Default: a card of 24 GB.
        typical: those whose time counts. Default: `rows`.

    Raises:
        UserError: nothing fits; the message gives the smallest possible budget and what takes the memory.
    """
    search = _Search(config, architecture, (*AUTOMATIC, *SAVING), rows, device, typical)
    fit = search.fastest(budget)
    if fit is None and search.suits(STREAMED, config):
        switches = (*AUTOMATIC, *SAVING, SMALL_TILE)
        search = _Search(STREAMED.on(config), architecture, switches, rows, device, typical)
        fit = search.fastest(budget)
    start = cautious(config)
    if fit is None:
        smallest = search.smallest(search.candidates)
        needed = search.simulate(smallest, architecture)
        raise UserError(_impossible(start, smallest, needed, budget))
    return replace(fit, flags=_flags(start, fit.config))


class _Search:
    """All settings that change no gradient, from the most cautious of `config`."""

    def __init__(
        self,
        config: RunConfig,
        architecture: PretrainedConfig,
        switches: Sequence[Switch],
        rows: StepRows | None,
        device: Device | None,
        typical: StepRows | None,
    ) -> None:
        self.architecture, self.rows = architecture, rows or StepRows.of_length(config)
        self.gpu = (device.model if device else None) or GPUS[0]
        self.start = cautious(config)
        capability = device.capability if device else CAPABILITY
        self.simulate: Simulate = cache_by_repr(partial(estimate, rows=self.rows, capability=capability))
        self.simulate_typical: Simulate = cache_by_repr(
            partial(estimate, rows=typical or self.rows, capability=capability)
        )
        self.decides_joint = config.memory.joint_pass_tokens == "auto"
        self.usable = [switch for switch in switches if self.suits(switch, config)]
        sizes = any(switch in SAVING for switch in switches)
        self.candidates = list(self._candidates(sizes))

    def fastest(self, room: int) -> Fit | None:
        """The first candidate that fits into `room`, with joint passes if they are worth it; None if none does."""
        hopeless: set[bool] = set()  # layers recomputed or not: not even the smallest of these fits
        for recomputes in (True, False):
            alike = [c for c in self.candidates if c.memory.recomputes_layers == recomputes]
            if not alike or not self._may_fit(self.smallest(alike), room):
                hopeless.add(recomputes)
        hopeful = [c for c in self.candidates if c.memory.recomputes_layers not in hopeless]
        for candidate in sorted(hopeful, key=lambda c: (self._seconds(c), len(self._on(c)))):
            if self._may_fit(candidate, room):
                result = self.simulate(candidate, self.architecture)
                if result.fits(room):
                    candidate, result = self._with_joint(candidate, result, room)
                    return Fit(candidate, result, _flags(self.start, candidate))
        return None

    def _with_joint(self, config: RunConfig, apart: Estimate, room: int) -> tuple[RunConfig, Estimate]:
        """`config` and its estimate with the largest joint passes that fit and save time; as they are if none do."""
        at_once = self.rows.micro_batch(config)
        most = at_once.tokens(packable(self.architecture, config.model.attn))
        if not self.decides_joint or config.objective.parts_go_apart or not (at_once.forget and at_once.retain):
            return config, apart
        for share in JOINT_SHARES:
            joint = JOINT._replace(value=int(share * most)).on(config)
            if self._of_all_layers(joint) > (1 - WORTH) * self._of_all_layers(config):
                break  # nor do fewer tokens
            if self._may_fit(joint, room) and (result := self.simulate(joint, self.architecture)).fits(room):
                return joint, result
        return config, apart

    @staticmethod
    def smallest(candidates: Sequence[RunConfig]) -> RunConfig:
        """The one that takes the least memory."""

        def saving(config: RunConfig) -> tuple:
            memory, double = config.memory, config.model.double_quant != "off"
            tile = memory.tile_mlp or math.inf
            on = memory.embedding_on_cpu + (tile <= TILE_ROWS) + memory.offload_checkpoints
            return on, memory.recomputes_layers, double, config.training.micro_batches(), -tile

        return max(candidates, key=saving)

    def _candidates(self, sizes: bool) -> Iterator[RunConfig]:
        training = self.start.training
        rows = training.micro_batch_size or training.batch_size
        halved = itertools.takewhile(lambda size: size, (rows // 2**halvings for halvings in range(1, 32)))
        for size in [rows, *(halved if sizes else ())]:
            micro = training if size == rows else replace(training, micro_batch_size=size)
            sized = replace(self.start, training=micro)
            for count in range(len(self.usable) + 1):
                for switches in itertools.combinations(self.usable, count):
                    candidate = _with(sized, switches)
                    if candidate is not None and not self._has_one_tile(candidate):
                        yield candidate

    def suits(self, switch: Switch, config: RunConfig) -> bool:
        """Whether the search may set it: it is open, and fits the architecture."""
        now = getattr(getattr(config, switch.section), switch.name)
        if switch.name == "double_quant":
            return _may_quantise_once(config) and stored_quantization(self.architecture) is None
        if switch.name == "gradient_checkpointing":
            return now == "auto" and not config.memory.offload_checkpoints
        if now:
            return False
        if switch.name == "offload_checkpoints" and not config.memory.recomputes_layers:
            return False
        switched = cautious(switch.on(config))
        try:
            apply_switches(check_lora(self.architecture, config.adapter), switched.memory)
        except UserError:
            return False
        return True

    def _has_one_tile(self, candidate: RunConfig) -> bool:
        """Whether its tiles, which the start has not, hold a whole micro-batch."""
        at_once = self.rows.micro_batch(candidate)
        tokens = max(sum(length for length, _ in part) for part in (at_once.forget, at_once.retain))
        return self.start.memory.tile_mlp is None and (candidate.memory.tile_mlp or 0) >= tokens

    def _on(self, config: RunConfig) -> list[Switch]:
        return [switch for switch in self.usable if switch.is_on(config)]

    def _seconds(self, candidate: RunConfig) -> float:
        """Of a step; of a model of few layers unless weights are streamed. Recomputation, tiles and micro-batches,
        which depend on each other, are timed together; what the other switches cost is added."""
        timed = self._of_all_layers if self.start.memory.stream_weights else self._timed
        names = ("gradient_checkpointing", "tile_mlp")
        sized = replace(self.start, training=candidate.training)
        together = _with(sized, [switch for switch in self._on(candidate) if switch.name in names])
        assert together is not None, "a candidate's switches do not contradict each other"
        others = [switch.on(sized) for switch in self._on(candidate) if switch.name not in names]
        return timed(together) + sum(timed(change) - timed(sized) for change in others)

    def _of_all_layers(self, config: RunConfig) -> float:
        """Seconds of a step: each layer takes as long as one more beside the few that are simulated."""
        depth = self.architecture.get_text_config().num_hidden_layers
        few = TIMED_STREAMED if config.memory.stream_weights else TIMED
        if depth <= few:
            return self._timed(config, depth)
        some, more = (self._timed(config, layers) for layers in (few, few + 1))
        return some + (depth - few) * (more - some)

    def _timed(self, config: RunConfig, layers: int = TIMED) -> float:
        if config.adapter.may_name_layers:
            config = replace(config, adapter=AdapterConfig())
        work = self.simulate_typical(config, of_depth(self.architecture, layers)).work
        return step_seconds(work, config.training.micro_batches(), self.gpu).total

    def _may_fit(self, config: RunConfig, room: int) -> bool:
        return may_fit(config, self.architecture, room, self.simulate)


def _with(config: RunConfig, switches: Sequence[Switch]) -> RunConfig | None:
    """`config` with all `switches`; None where they contradict each other."""
    names = [switch.name for switch in switches]
    if len(set(names)) < len(names) or {"gradient_checkpointing", "offload_checkpoints"} <= set(names):
        return None
    for switch in switches:
        config = switch.on(config)
    return config


def _may_quantise_once(config: RunConfig) -> bool:
    return config.model.qlora and config.model.double_quant == "auto"


def cache_by_repr(simulate: Simulate) -> Simulate:
    """`simulate`, called once for equal arguments."""
    known: dict[tuple[str, int], Estimate] = {}

    def call(config: RunConfig, architecture: PretrainedConfig) -> Estimate:
        key = repr(config), architecture.get_text_config().num_hidden_layers
        if key not in known:
            known[key] = simulate(config, architecture)
        return known[key]

    return call


def may_fit(config: RunConfig, architecture: PretrainedConfig, room: int, simulate: Simulate = estimate) -> bool:
    """False only if the step cannot fit. The memory in use at any moment grows linearly with the number of layers; the
    peak is the maximum over all moments, a convex function: two shallow models bound every deeper one from below."""
    layers = architecture.get_text_config().num_hidden_layers
    if config.adapter.may_name_layers or layers <= MORE:
        return True
    few, more = (simulate(config, of_depth(architecture, depth)) for depth in (FEW, MORE))
    slope = (more.peak_bytes - few.peak_bytes) / (MORE - FEW)
    return replace(few, needed_bytes=int(few.peak_bytes + slope * (layers - FEW))).fits(room)


def _flags(before: RunConfig, after: RunConfig) -> list[str]:
    flags = []
    if after.training.micro_batch_size != before.training.micro_batch_size:
        flags += ["--micro-batch-size", str(after.training.micro_batch_size)]
    for switch in (*AUTOMATIC, JOINT._replace(value=after.memory.joint_pass_tokens), *SAVING, SMALL_TILE, STREAMED):
        if switch.is_on(after) and not switch.is_on(before):
            flags += [f"--{switch.name.replace('_', '-')}"] + ([] if switch.value is True else [str(switch.value)])
    return flags


def _impossible(config: RunConfig, smallest: RunConfig, needed: Estimate, budget: int) -> str:
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(needed.by_kind.items(), key=lambda k: -k[1])[:3])
    flags = " ".join(_flags(config, smallest)) or "these options"
    advice = "" if config.model.qlora else "--qlora makes the frozen weights about a quarter as large; "
    given, works = compared(budget, needed.total_bytes, decimals=2)
    return (
        f"A budget of {given} cannot be met: the smallest that works is {works} (with {flags}), of which {kinds}, CUDA "
        f"context {gib(needed.context_bytes)}; {advice}a smaller --max-length or model takes less."
    )
