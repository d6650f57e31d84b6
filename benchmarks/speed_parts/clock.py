"""Wall-clock time of training steps, from one to the next, and what a trainer needs beside its rows."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.speed_parts.step_profile import profiled
from lowmem_npo.data import TokenizedRow

WARM_UP = 3  # steps before the measured ones
Rows = list[TokenizedRow]


class Clock:
    """Wall-clock seconds between ticks, each of which synchronises the device; the first `warm_up` are not counted."""

    def __init__(self, device: torch.device, warm_up: int = WARM_UP) -> None:
        self._gpu, self._warm_up, self._ticks = device.type == "cuda", warm_up, list[float]()

    def tick(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()
            if len(self._ticks) == self._warm_up:
                torch.cuda.reset_peak_memory_stats()
        self._ticks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in itertools.pairwise(self._ticks[self._warm_up :])]

    @property
    def peak_bytes(self) -> int | None:
        """Allocated on the GPU; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._gpu else None

    def summary(self, rows: Rows) -> dict:
        """Seconds per step, tokens per second of a step on `rows`, peak bytes on the GPU."""
        median = statistics.median(self.seconds)
        return {
            "seconds_per_step": median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "tokens_per_second": sum(len(row["input_ids"]) for row in rows) / median,
            "peak_bytes": self.peak_bytes,
        }


class Watch(TrainerCallback):
    """Ticks when training begins and after each step; then profiles a step if there is one more than `steps`."""

    def __init__(self, clock: Clock, steps: int) -> None:
        self.clock, self.trace = clock, dict[str, Any]()
        self._last, self._profile = steps, contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.clock.tick()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step <= self._last:
            self.clock.tick()
        if state.global_step == self._last < state.max_steps:
            self.trace = self._profile.enter_context(profiled())
        elif state.global_step > self._last:
            self._profile.close()


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """Nothing is tokenised: the trainer needs the padding token, the cached reference a vocabulary to identify."""
    words = {f"t{i}": i for i in range(500)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), pad_token="t0")
