"""SIGTERM, SIGHUP and Ctrl-C while a run trains: it saves a checkpoint after the step it is in, and ends."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.endings import Interrupted

HEARD = "Interrupted: this step is finished and saved; Ctrl-C again ends at once."


class Preemption(TrainerCallback):
    """Saves and ends training when a signal has come; `lowmem_npo.endings.handled` is to call `hear`. A second signal
    does not wait for the step."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._trains = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        if not self._trains or self.number is not None:
            raise Interrupted(number)
        self.number = number
        if number == signal.SIGINT and PartialState().is_main_process:  # somebody waits, and a step may be long
            with suppress(OSError, ValueError):  # stderr is closed
                os.write(sys.stderr.fileno(), f"\n{HEARD}\n".encode())  # `print` may be what was interrupted

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trains = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:  # all must end after the same step, whichever has heard
            number = torch.tensor(self.number or 0, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.number = int(number) or None
        if self.number is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trains = False

    def check(self) -> None:
        """Raises Interrupted if training was ended so."""
        if self.number is not None:
            raise Interrupted(signal.Signals(self.number))
