"""The contenders: our engines, every other published kernel for the same job, and plain PyTorch.

Each is an adapter of at most three functions of a `Case`. What they return is differentiable in `case.hidden`:

    logprobs(case)   (N,) log-probabilities of the targets
    kl(case)         (N,) KL(policy || reference) of every token; or their mean, a scalar, where a peer gives only that
    retain(case)     scalar  CE_WEIGHT * mean cross-entropy + KL_WEIGHT * mean KL

A function that a peer has no kernel for is not defined. `contenders` also says which peers cannot run here, and why.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch
from lowmem_kernels import FrozenHead, retain_loss, token_kl, token_logprobs
from lowmem_kernels.dispatch import Engine
from torch import Tensor

from benchmarks.kernels_parts.cases import CE_WEIGHT, KL_WEIGHT, Case
from benchmarks.shared.record import reason

ENGINES: tuple[Engine, ...] = ("chunks", "tiles", "torch")


class Ours:
    """lowmem_kernels with one of its engines."""

    def __init__(self, engine: Engine) -> None:
        self.name: str = engine
        self.engine = engine

    def logprobs(self, case: Case) -> Tensor:
        return token_logprobs(case.hidden, FrozenHead(case.weight), case.targets, engine=self.engine)

    def kl(self, case: Case) -> Tensor:
        return token_kl(case.hidden, case.ref_hidden, FrozenHead(case.weight), engine=self.engine)

    def retain(self, case: Case) -> Tensor:
        weights = CE_WEIGHT / len(case.hidden), KL_WEIGHT / len(case.hidden)
        head = FrozenHead(case.weight)
        return retain_loss(case.hidden, case.ref_hidden, head, case.targets, *weights, engine=self.engine)[0]


class Dense:
    """The usual code: all logits, in bfloat16 as the LM head gives them, then float32 log-softmaxes."""

    name = "dense"

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).float()

    def logprobs(self, case: Case) -> Tensor:
        return self._logprobs(case.hidden, case.weight, case.targets)

    def kl(self, case: Case) -> Tensor:
        return self._kl(case.hidden, case.ref_hidden, case.weight)

    def retain(self, case: Case) -> Tensor:
        return self._retain(case.hidden, case.ref_hidden, case.weight, case.targets)

    def _logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return _picked(self.logits(hidden, weight).log_softmax(1), targets)

    def _kl(self, hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        return _divergence(self.logits(hidden, weight).log_softmax(1), self._log_q(ref_hidden, weight))

    def _retain(self, hidden: Tensor, ref_hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_q = self._log_q(ref_hidden, weight)
        log_p = self.logits(hidden, weight).log_softmax(1)
        return KL_WEIGHT * _divergence(log_p, log_q).mean() - CE_WEIGHT * _picked(log_p, targets).mean()

    def _log_q(self, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self.logits(ref_hidden, weight).log_softmax(1)


class DenseFloat32(Dense):
    """The same with logits that are never rounded to bfloat16: the yardstick for errors. Too slow to be a contender."""

    name = "dense, float32"

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.float() @ weight.float().T


class Compiled(Dense):
    """The dense form under torch.compile, recompiled for each shape."""

    name = "torch.compile"

    def __init__(self) -> None:
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for name in ("_logprobs", "_kl", "_retain"):
            setattr(self, name, torch.compile(getattr(super(), name), dynamic=False))


class Liger:
    """liger-kernel's fused linear cross-entropy and fused linear JSD; its JSD with beta 1 is KL(student || teacher).

    `logprobs` takes reduction "none", as any loss must whose token weights arrive in backward; `retain` takes "mean".
    """

    name = "liger"

    def __init__(self) -> None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as CrossEntropy
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as JSD

        self._ce, self._jsd = CrossEntropy, JSD

    def logprobs(self, case: Case) -> Tensor:
        return -self._cross_entropy(case, "none")

    def kl(self, case: Case) -> Tensor:
        return self._jsd.apply(case.hidden, case.weight, case.ref_hidden, case.weight, None, 1.0)

    def retain(self, case: Case) -> Tensor:
        return CE_WEIGHT * self._cross_entropy(case, "mean") + KL_WEIGHT * self.kl(case)

    def _cross_entropy(self, case: Case, reduction: str) -> Tensor:
        return self._ce.apply(case.hidden, case.weight, case.targets, None, None, -100, 0.0, 0.0, reduction)[0]


class LigerDistillation:
    """liger-kernel's chunked distillation loss: cross-entropy and JSD in one. It also computes the head's gradient."""

    name = "liger distill"

    def __init__(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        self._loss = LigerFusedLinearJSDLoss

    def kl(self, case: Case) -> Tensor:
        return self._run(case, 0.0, 1.0)

    def retain(self, case: Case) -> Tensor:
        return self._run(case, CE_WEIGHT, KL_WEIGHT)

    def _run(self, case: Case, hard: float, soft: float) -> Tensor:
        loss = self._loss(weight_hard_loss=hard, weight_soft_loss=soft, beta=1.0, compiled=case.hidden.is_cuda)
        return loss(case.hidden, case.weight, case.ref_hidden, case.weight, case.targets)


class TRL:
    """trl.kernels, called as TRL's trainers call it."""

    name = "trl"
    tile = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl.trainer.utils

    def __init__(self) -> None:
        from trl.kernels import ChunkedLogProbFunction
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        self._logprob, self._divergence = ChunkedLogProbFunction, ChunkedDivergenceFunction

    def logprobs(self, case: Case) -> Tensor:
        return self._logprob.apply(case.hidden, case.weight, None, case.targets, 1.0, self.tile, None, 1.0, ())[0]

    def kl(self, case: Case) -> Tensor:
        return self._divergence.apply(case.hidden, case.weight, None, case.ref_hidden, case.weight, None, 1.0)[0]

    def retain(self, case: Case) -> Tensor:
        return KL_WEIGHT * self.kl(case).mean() - CE_WEIGHT * self.logprobs(case).mean()


class CCE:
    """cut-cross-entropy with its default gradient filter. It has no KL: together with TRL's it makes a retain loss."""

    name = "cce"

    def __init__(self) -> None:
        from cut_cross_entropy import linear_cross_entropy

        self._cross_entropy = linear_cross_entropy
        if importlib.util.find_spec("trl") is not None:
            self._kl = TRL().kl
            self.retain = self._retain

    def logprobs(self, case: Case) -> Tensor:
        return -self._cross_entropy(case.hidden, case.weight, case.targets, reduction="none")

    def _retain(self, case: Case) -> Tensor:
        cross_entropy = self._cross_entropy(case.hidden, case.weight, case.targets, reduction="mean")
        return CE_WEIGHT * cross_entropy + KL_WEIGHT * self._kl(case).mean()


PACKAGES = {Liger: "liger-kernel", LigerDistillation: "liger-kernel", TRL: "trl", CCE: "cut-cross-entropy"}
NEED_GPU = {CCE: "its kernels do not run in Triton's interpreter"}
ON_CPU = {Liger: "its KL rounds the logits to bfloat16 on a CPU; on a GPU from sm_80 on it does not"}


def contenders(device: str, yardstick: bool = False) -> tuple[list, dict[str, str]]:
    """Those that run on `device`, and why the others do not. `yardstick` adds `DenseFloat32`."""
    runnable: list = [Ours(engine) for engine in ENGINES]
    missing: dict[str, str] = {}
    for make in (Liger, LigerDistillation, TRL, CCE, Compiled, Dense, *((DenseFloat32,) if yardstick else ())):
        try:
            if device == "cpu" and make in NEED_GPU:
                missing[make.name] = f"needs a GPU: {NEED_GPU[make]}"
            elif make in PACKAGES and not installed(PACKAGES[make]):
                missing[make.name] = f"not installed: pip install {PACKAGES[make]}"
            else:
                runnable.append(make())
        except Exception as error:  # a peer that this version of PyTorch or Triton breaks
            missing[make.name] = reason(error)
    return runnable, missing


def installed(package: str) -> str | None:
    """The version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _picked(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(1, targets[:, None]).squeeze(1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
