"""Log-probabilities, cross-entropy and KL divergence of a frozen language-model head, without its logits. Norms with
frozen weights, rotary embeddings and gated activations without float32 copies.

    from lowmem_kernels import FrozenHead, token_logprobs, token_kl, retain_loss, rms_norm, layer_norm, rotary, glu

    head = FrozenHead(model.lm_head.weight)                       # (V, d), frozen
    logprobs = token_logprobs(hidden, head, targets)              # (N,) float32, differentiable in hidden (N, d)
    kl = token_kl(hidden, reference_hidden, head)                 # (N,) float32, KL(policy || reference)
    loss, logprobs, kl = retain_loss(hidden, reference_hidden, head, targets, ce_weight=1 / N, kl_weight=0.5 / N)

    y = rms_norm(x, weight, eps=1e-5)                             # and layer_norm; keeps x, no float32 copy of it
    q, k = rotary(q, k, cos, sin)
    h = glu(gate, up, "silu")                                     # act(gate) * up; packed_glu(gate_up) of one tensor
    h = act(x, "relu2")                                           # of an MLP without a gate

No call of the first three functions ever holds a tensor of N x V elements. Three engines compute them alike; `engine=`
chooses one:

    torch    any device, and the readable statement of the algorithm
    chunks   CUDA: float32 logits of a few hundred tokens at a time by cuBLAS, a Triton kernel on their rows. The fewest
             products, 2 for log-probabilities and 3 with the KL, in at most 256 MiB of workspace
    tiles    CUDA: Triton kernels that keep the logits on the chip. Almost no workspace without a gradient, about 50 MiB
             with one, and then 3 or 5 products
    auto     chunks on CUDA, torch elsewhere

The others have two engines, triton (one kernel each way) and torch; auto is triton on CUDA, torch elsewhere.

How it is wired, top to bottom:

    api.py           the three functions: check the arguments, call `dispatch.solve`, attach the gradient it returns
    dispatch.py      picks the engine, drops ignored rows; registers the whole as ONE custom op for torch.compile
    problem.py       an engine's input and output
    *_engine.py      the engines
    row_kernel.py    the kernel of `chunks`
    tile_*.py        the kernels of `tiles`, and their block sizes
    device_math.py   the mathematics that all Triton kernels share
    norm.py, rotary_embedding.py, gated_activation.py
                     the parts of a layer that are no products; each kernel in *_kernel.py beside it
    rowwise.py       what these have in common
    aot.py           compiles every kernel ahead of time, for GPUs that need not be there

The head is frozen, so d(output)/d(hidden) is known, row by row, as soon as the output is: the forward pass computes it
and the backward pass only scales its rows. Hence there is one engine function and no backward engine function.

Fake tensors. In eager mode nothing hides the engines: called with fake or meta tensors, or under any dispatch mode, the
functions run the engine itself, so that a memory simulator sees every workspace allocation (kernel launches are
skipped, allocations are the same). Steps that must read values (dropping rows whose target is -100, checking the range
of the targets) are left out when there are no values: a simulated step then counts every row, the worst case. Under
torch.compile the call is a single opaque operator, `lowmem_kernels::solve`; its fake implementation allocates only the
outputs.
"""

from lowmem_kernels.api import retain_loss, token_kl, token_logprobs
from lowmem_kernels.gated_activation import act, glu, packed_glu
from lowmem_kernels.head import FrozenHead
from lowmem_kernels.norm import layer_norm, rms_norm
from lowmem_kernels.problem import IGNORE_INDEX
from lowmem_kernels.rotary_embedding import rotary

__all__ = [
    "IGNORE_INDEX",
    "FrozenHead",
    "act",
    "glu",
    "layer_norm",
    "packed_glu",
    "retain_loss",
    "rms_norm",
    "rotary",
    "token_kl",
    "token_logprobs",
]
