"""From checked arguments to an answer: chooses the engine, drops ignored rows; one operator under torch.compile."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lowmem_kernels.head import FrozenHead
from lowmem_kernels.launch import has_values
from lowmem_kernels.problem import IGNORE_INDEX, Answer, Direction, Problem

Engine = Literal["auto", "chunks", "tiles", "torch"]


def solve(problem: Problem, engine: Engine, checked: bool = False) -> Answer:
    """The answer to `problem`. Rows with target -100 get 0, 0 and a zero gradient row, whatever else they hold.

    checked   there are none, and all targets are valid: they are not looked at
    """
    if not torch.compiler.is_compiling():
        return _solve_eagerly(problem, engine, checked)
    head = problem.head
    logprobs, kl, grad = torch.ops.lowmem_kernels.solve(
        problem.hidden, problem.ref_hidden, head.weight, head.bias, problem.targets, problem.ce_weight,
        problem.kl_weight, head.softcap, head.logit_scale, problem.direction, problem.need_grad, engine,
    )  # fmt: skip
    return Answer(
        None if problem.targets is None else logprobs,
        None if problem.ref_hidden is None else kl,
        grad if problem.need_grad else None,
    )


def choose_engine(is_cuda: bool) -> str:
    """What engine="auto" means: Triton where there is a GPU for it, plain PyTorch elsewhere.

    `tiles` takes less memory where no gradient is needed, but has not yet proved to be as fast as `chunks` on any GPU
    (benchmarks/results/NOTES.md); with a gradient it computes 3 or 5 products instead of 2 or 3.
    """
    return "chunks" if is_cuda and find_spec("triton") is not None else "torch"


def _solver(engine: Engine, problem: Problem) -> Callable[[Problem], Answer]:
    name = choose_engine(problem.hidden.is_cuda) if engine == "auto" else engine
    if name not in ("torch", "chunks", "tiles"):
        raise ValueError(f"engine must be 'auto', 'chunks', 'tiles' or 'torch', not {engine!r}")
    if name != "torch":
        check_triton(name, problem.hidden)
    return import_module(f"lowmem_kernels.{name}_engine").solve


def check_triton(engine: str, hidden: Tensor) -> None:
    if find_spec("triton") is None:
        raise ValueError(f"engine {engine!r} needs triton, which is not installed; use engine='torch'")
    if has_values(hidden) and not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"engine {engine!r} runs on CUDA tensors, not on {hidden.device}; use engine='torch', or set "
            "TRITON_INTERPRET=1 before the first use to try it in Triton's interpreter"
        )


def _solve_eagerly(problem: Problem, engine: Engine, checked: bool = False) -> Answer:
    solver = _solver(engine, problem)
    with torch.no_grad(), _full_precision(problem.hidden.device.type):
        problem = _with_dense_vectors(problem)
        kept = None if checked else _kept_rows(problem.targets, problem.head.vocabulary)
        if kept is None:
            return solver(problem)

        answer = solver(problem.map_rows(lambda x: x.index_select(0, kept)))
        return answer.map(lambda x: x.new_zeros(problem.num_tokens, *x.shape[1:]).index_copy_(0, kept, x))


def _with_dense_vectors(problem: Problem) -> Problem:
    """The kernels take the strides of matrices, but step through vectors one entry at a time."""
    head = problem.head
    if head.bias is not None:
        head = replace(head, bias=head.bias.contiguous())
    return replace(problem, head=head).map_rows(lambda x: x.contiguous() if x.ndim == 1 else x)


def _kept_rows(targets: Tensor | None, vocabulary: int) -> Tensor | None:
    """Indices of the rows whose target counts; None means all of them, also where the targets have no values."""
    if targets is None or not has_values(targets):
        return None
    ignored = targets == IGNORE_INDEX
    invalid = (targets >= vocabulary) | ((targets < 0) & ~ignored)
    num_ignored, num_invalid = torch.stack([ignored.sum(), invalid.sum()]).tolist()  # a single synchronisation
    if num_invalid:
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {vocabulary}) or {IGNORE_INDEX}, but {num_invalid} are not; the first is "
            f"targets[{row}] = {int(targets[row])}"
        )
    return (~ignored).nonzero().squeeze(1) if num_ignored else None


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products are exact to their dtype whatever the caller's settings: no autocast, TF32 or sums kept in 16 bits."""
    cuda, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    settings: list[tuple[Any, str, Any]] = []
    reductions = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    split_k = {name: getattr(cuda, f"{name}_split_k", None) for name in reductions}  # None: torch has no such setting
    for name in reductions:
        settings.append((cuda, name, False if split_k[name] is None else (False, split_k[name])))
    if hasattr(cuda, "fp32_precision"):
        settings += [(cuda, "fp32_precision", "ieee"), (cpu, "fp32_precision", "ieee")]
    else:  # torch < 2.9
        settings += [(cuda, "allow_tf32", False)]
    before = [getattr(backend, name) for backend, name, _ in settings]
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        with contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        for (backend, name, _), value in zip(settings, before, strict=True):
            setattr(backend, name, value if split_k.get(name) is None else (value, split_k[name]))


@torch.library.custom_op("lowmem_kernels::solve", mutates_args=())
def _solve_op(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ce_weight: Tensor | None,
    kl_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    direction: str,
    need_grad: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = FrozenHead(weight, bias, softcap, logit_scale)
    problem = Problem(hidden, ref_hidden, head, targets, ce_weight, kl_weight, cast(Direction, direction), need_grad)
    return _as_tensors(_solve_eagerly(problem, cast(Engine, engine)), hidden)


@_solve_op.register_fake
def _(
    hidden, ref_hidden, weight, bias, targets, ce_weight, kl_weight, softcap, logit_scale, direction, need_grad, engine
):
    head = FrozenHead(weight, bias, softcap, logit_scale)
    problem = Problem(hidden, ref_hidden, head, targets, ce_weight, kl_weight, direction, need_grad)
    return _as_tensors(problem.empty_answer(), hidden)


def _as_tensors(answer: Answer, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, kl, grad = (like.new_empty(0) if x is None else x for x in answer)
    return logprobs, kl, grad
