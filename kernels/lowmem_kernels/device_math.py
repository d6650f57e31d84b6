"""The mathematics the Triton kernels share: the statistics of torch_engine.py, for tiles of (rows, columns).

A row's statistics are five numbers, the last three 0 where there is no reference:

    top      its largest logit
    rest     its log-sum-exp - top: next to a logit of 1e4, a single float32 would round the log-sum-exp to 1e-3
    ref_top  the same as top for the reference
    shift    rest - the reference's rest: small where the two are alike, and then known to as many digits
    kl       KL(p || q) or KL(q || p), p and q being the softmax of this part of the logits

Logits that do not count are MASKED: finite, so that their difference is 0, and small enough to have no mass. A tile
without any entry that counts is the neutral element of `merge`.
"""

import os

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def phi(x):
    """exp(x) - 1 - x for |x| <= 0.5, to 1e-5 of its value: the first neglected term is x^7 / 5040."""
    return x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))))


@triton.jit
def log1p(x):
    """log(1 + x) for -1 < x <= 1, accurate for small x: log(u) / (u - 1) does not care how 1 + x was rounded to u."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def kl_term(p, q, ell, POLICY_FIRST: tl.constexpr):
    """One entry's part of KL(p || q) or KL(q || p), with ell = log(p / q). Never negative; a sum of them is the KL."""
    near = tl.abs(ell) < 0.5
    if POLICY_FIRST:
        return tl.where(near, p * phi(-ell), q - p + p * ell)
    else:
        return tl.where(near, q * phi(ell), p - q - q * ell)


@triton.jit
def kl_slope(p, q, ell, kl, POLICY_FIRST: tl.constexpr):
    """d KL / d (this entry's policy logit)."""
    if POLICY_FIRST:
        return p * (ell - kl)
    else:
        return tl.where(tl.abs(ell) < 0.5, p * (ell - phi(-ell)), p - q)  # p - q


@triton.jit
def logits(product, softcap, logit_scale):
    """(z, dz / d product). softcap is None or a number."""
    z = product * logit_scale
    if softcap is None:
        return z, tl.zeros_like(z) + logit_scale
    else:
        x = -2.0 * tl.abs(z / softcap)
        e = tl.exp(x)
        tanh = tl.where(x > -0.5, x + phi(x), e - 1.0) / -(1.0 + e)  # of |z| / softcap
        return softcap * tl.where(z < 0, -tanh, tanh), logit_scale * 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def statistics(z, ref_z, WITH_REF: tl.constexpr, POLICY_FIRST: tl.constexpr):
    """The statistics of every row of a tile of logits; ref_z counts only WITH_REF."""
    top = tl.max(z, 1)
    rest = tl.log(tl.sum(tl.exp(z - top[:, None]), 1))
    if not WITH_REF:
        zero = tl.zeros_like(top)
        return top, rest, zero, zero, zero
    else:
        ref_top = tl.max(ref_z, 1)
        ref_rest = tl.log(tl.sum(tl.exp(ref_z - ref_top[:, None]), 1))
        shift = rest - ref_rest
        from_top, ref_from_top = z - top[:, None], ref_z - ref_top[:, None]
        # Exponentials are computed again: to keep them would take twice the registers.
        p, q = tl.exp(from_top - rest[:, None]), tl.exp(ref_from_top - ref_rest[:, None])
        ell = from_top - ref_from_top - shift[:, None]
        return top, rest, ref_top, shift, tl.sum(kl_term(p, q, ell, POLICY_FIRST), 1)


@triton.jit
def merge(a, b, WITH_REF: tl.constexpr, POLICY_FIRST: tl.constexpr):
    """The statistics of the union of two disjoint sets of entries: `merge` of torch_engine.py."""
    top_a, rest_a, ref_top_a, shift_a, kl_a = a
    top_b, rest_b, ref_top_b, shift_b, kl_b = b
    odds = (top_b - top_a) + (rest_b - rest_a)
    top = tl.maximum(top_a, top_b)
    rest = tl.where(odds > 0, rest_b + (top_b - top), rest_a + (top_a - top)) + log1p(tl.exp(-tl.abs(odds)))
    if not WITH_REF:
        return top, rest, ref_top_a, shift_a, kl_a
    else:
        ref_odds = (ref_top_b - ref_top_a) + ((rest_b - shift_b) - (rest_a - shift_a))
        gap = (top_b - top_a) - (ref_top_b - ref_top_a) + (shift_b - shift_a)  # odds - ref_odds, with all its digits
        log_p_a, log_p_b = -softplus(odds), -softplus(-odds)  # the policy's mass on a and b
        log_q_a, log_q_b = -softplus(ref_odds), -softplus(-ref_odds)  # the reference's
        p_a, p_b, q_a, q_b = tl.exp(log_p_a), tl.exp(log_p_b), tl.exp(log_q_a), tl.exp(log_q_b)
        ell_a = log_ratio(log_p_a, log_q_a, p_b, -gap)
        ell_b = log_ratio(log_p_b, log_q_b, p_a, gap)
        kl = kl_term(p_a, q_a, ell_a, POLICY_FIRST) + kl_term(p_b, q_b, ell_b, POLICY_FIRST)
        if POLICY_FIRST:
            kl += p_a * kl_a + p_b * kl_b
        else:
            kl += q_a * kl_a + q_b * kl_b
        ref_top = tl.maximum(ref_top_a, ref_top_b)
        shift_a += (top_a - top) - (ref_top_a - ref_top) - ell_a  # either is the shift of the union; the one
        shift_b += (top_b - top) - (ref_top_b - ref_top) - ell_b  # that changes less is the more accurate
        shift = tl.where(odds > 0, shift_b, shift_a)
        return top, rest, ref_top, shift, kl


@triton.jit
def log_ratio(log_p, log_q, other_p, x):
    """log_p - log_q where p / q = 1 + other_p (e^x - 1): accurate also where both are close, 0 exactly where x is 0."""
    return tl.where(tl.abs(x) < 0.5, log1p(other_p * (x + phi(x))), log_p - log_q)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even. Triton's interpreter truncates to bfloat16: there the carry is done here."""
    if INTERPRETED and DTYPE is tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def loss_slope(z, ref_z, is_target, whole, others, ce_weight, kl_weight, POLICY_FIRST: tl.constexpr):
    """d (ce_weight * -logp + kl_weight * kl) / dz for a tile; `whole` are its rows' statistics over the vocabulary.

    others: the policy's mass on everything but the target. A weight of None leaves its part out.
    """
    top, rest, ref_top, shift, kl = whole
    log_p = (z - top[:, None]) - rest[:, None]
    p = tl.exp(log_p)
    slope = tl.zeros_like(z)
    if ce_weight is not None:
        slope += ce_weight[:, None] * tl.where(is_target, -others[:, None], p)
    if kl_weight is not None:
        ell = (z - top[:, None]) - (ref_z - ref_top[:, None]) - shift[:, None]
        q = tl.exp((ref_z - ref_top[:, None]) - (rest - shift)[:, None])
        slope += kl_weight[:, None] * kl_slope(p, q, ell, kl[:, None], POLICY_FIRST)
    return slope


@triton.jit
def largest_slope(others, kl, ce_weight, kl_weight, logit_scale):
    """An upper bound of the entries of a row of d loss / d product; 1 for a row of zeros.

    d -logp / dz is largest at the target, 1 - p. For the KL, no kl_term exceeds kl, therefore |d kl / dz| is at most
    1.7 sqrt(kl) + kl where |ell| < 1, and 2.8 kl elsewhere.
    """
    bound = tl.zeros_like(others)
    if ce_weight is not None:
        bound += tl.abs(ce_weight) * others
    if kl_weight is not None:
        bound += tl.abs(kl_weight) * (2.0 * tl.sqrt(kl) + 3.0 * kl)
    bound *= tl.abs(logit_scale)
    return tl.where(bound > 0, bound, 1.0)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b in float32. Triton's interpreter cannot multiply bfloat16: there a and b become float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
