"""Where a step's forget gradient is taken, if not at the weights: under the attacker of `--adversary`, at the neighbour
of `--sam`, or at the neighbour that is found under the attacker.

Both are found by gradients of their own, before the step's first pass. The retain gradient is taken at the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from lowmem_kernels import token_logprobs
from torch import Tensor

from lowmem_npo.data.batching import Batch
from lowmem_npo.model import answer_hidden
from lowmem_npo.model.modes import eval_mode
from lowmem_npo.training.adversary import Lesson
from lowmem_npo.training.objective import StepTotals
from lowmem_npo.training.out_of_memory import DividedSteps
from lowmem_npo.training.passes import Passes
from lowmem_npo.training.sharpness import Neighbour
from lowmem_npo.training.step_metrics import StepMetrics


class ForgetPoint:
    """The point at which the forget passes of the current step run and are differentiated.

    passes: with the adversary, if there is one.
    next_lesson: makes what the adversary is taught before the step, in passes no larger than the step's.
    device: where this process computes.
    sum_gradients: sums the gradients of the model's parameters over all processes; returns whether there are several.
    """

    def __init__(
        self,
        passes: Passes,
        neighbour: Neighbour | None,
        divided: DividedSteps,
        next_lesson: Callable[[], Lesson],
        accelerator: Accelerator,
        device: torch.device,
        sum_gradients: Callable[[], bool],
    ) -> None:
        self.passes, self.neighbour, self.divided, self.next_lesson = passes, neighbour, divided, next_lesson
        self.accelerator, self.device, self.sum_gradients = accelerator, device, sum_gradients
        self.ahead: Sequence[Batch] = ()  # the step's micro-batches, until the neighbour has been found
        self.lesson: Lesson | None = None  # what the adversary is taught, until it has been
        self._figures: dict[str, Tensor] = {}  # of the adversary's step, once it has been taken

    def begin(self, batches: Sequence[Batch]) -> None:
        """A step of these micro-batches begins."""
        self.ahead = batches if self.neighbour is not None else ()
        self.lesson = None if self.passes.adversary is None else self.next_lesson()
        self._figures = {}
        self.passes.kept.clear()

    def find(self, step: int, attack_began: int, totals: StepTotals) -> None:
        """Takes the adversary's step, and finds the neighbour of the weights under it, unless this has been done.

        step: the global step, from 0. attack_began: the one before which the attacker at work in it began.
        """
        adversary = self.passes.adversary
        if adversary is not None and self.lesson is not None:
            figures: dict[str, Tensor] = {}
            gain = adversary.relearn(step, partial(self.add_lesson_gradients, self.lesson, figures), attack_began)
            figures["adversary_gain"] = gain / self.accelerator.num_processes
            self.passes.metrics.add(**figures)
            self.lesson, self._figures = None, figures
        if self.neighbour is not None and self.ahead:
            with nullcontext() if adversary is None else adversary.in_place():
                self.neighbour.find(partial(self._add_forget_gradients, self.ahead, totals))
            self.ahead = ()

    @contextmanager
    def there(self) -> Iterator[None]:
        """Inside, the model is at that point."""
        with ExitStack() as stack:
            if self.neighbour is not None:
                stack.enter_context(self.neighbour.there())
            if self.passes.adversary is not None:
                stack.enter_context(self.passes.adversary.in_place())
            yield

    def restart(self) -> None:
        """The step begins anew, in smaller passes; what has been found stays, and of the step's figures those of it.

        Raises:
            torch.OutOfMemoryError: the processes have summed a gradient that is not yet made use of, and would not sum
                it again.
        """
        if any(part is not None and part.is_summed for part in (self.passes.adversary, self.neighbour)):
            raise torch.OutOfMemoryError(
                "Memory ran out beside what the processes had summed; that cannot be repeated."
            )
        self.passes.metrics.drop_step()
        self.passes.kept.clear()
        self.passes.metrics.add(**self._figures)
        if self.lesson is not None:
            self.lesson = self.next_lesson()

    def _add_forget_gradients(self, batches: Sequence[Batch], totals: StepTotals) -> bool:
        """The forget gradient of the whole step; what it measures on the way does not count. Whether it was summed."""
        counted, self.passes.metrics = self.passes.metrics, StepMetrics(self.passes.objective)
        try:
            for rows in (part["forget"] for batch in batches for part in self.divided.divided(batch)):
                if rows:
                    part = self.passes.forget(rows.to(self.device), totals, again=True)
                    self.accelerator.backward(part)
                    del part
        finally:
            self.passes.metrics = counted
        return self.sum_gradients()

    def add_lesson_gradients(self, lesson: Lesson, figures: dict[str, Tensor]) -> bool:
        """The gradient of what the adversary lowers, the mean NLL per answer token of its rows, without dropout.
        Whether it was summed."""
        total = torch.zeros((), device=self.device)
        with eval_mode(self.passes.model):
            for rows in lesson.passes:
                answers = answer_hidden(self.passes.model, rows.to(self.device))
                logprobs = token_logprobs(answers.hidden, self.passes.head, answers.targets, checked=True)
                nll = -logprobs.sum() / lesson.tokens
                self.accelerator.backward(nll)
                total += nll.detach()
                del answers, logprobs, nll
        figures["adversary_nll"] = total
        return self.sum_gradients()
