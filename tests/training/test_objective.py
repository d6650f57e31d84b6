"""The losses against the formulas of docs/architecture.md, written out per sequence in float64 with exp and log."""

import math

import pytest
import torch

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.training.objective import SequenceLogprobs, StepTotals, forget_loss, jensun, retain_weights

LENGTHS = (3, 1, 7, 4)


@pytest.fixture(scope="module")
def answers():
    generator = torch.Generator().manual_seed(0)
    tokens = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    reference = [t + 0.7 * torch.randn(len(t), generator=generator, dtype=torch.float64) for t in tokens]
    return tokens, reference


def batch(tokens, reference, objective):
    policy = SequenceLogprobs(
        torch.cat(tokens).float(),
        torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor([len(t) for t in tokens])),
        len(tokens),
    )
    needed = objective.needs_reference
    given = {
        None: None,
        "token": torch.cat(reference).float(),
        "sequence": torch.stack([r.sum() for r in reference]).float(),
    }
    return policy, given[needed]


def weight(objective, logprobs):
    """The weights of the two reweighted ascents, which are constants to the gradient."""
    p = logprobs.detach().exp()
    if objective.forget_term == "wga":
        return p**objective.wga_beta
    return p**objective.satimp_beta1 * (1 - p) ** objective.satimp_beta2


def jensen_shannon(logprobs, others=6):
    """(N,) the divergence of two whole distributions: one that gives a token `logprobs` and spreads the rest unevenly
    over the others, and one that gives that token everything."""
    p = logprobs.exp()[:, None]
    shares = torch.arange(1, others + 1, dtype=torch.float64)
    model = torch.cat([p, (1 - p) * shares / shares.sum()], dim=1)
    target = torch.zeros_like(model)
    target[:, 0] = 1
    middle = (model + target) / 2
    return (model * (model / middle).log()).sum(1) / 2 + torch.log(1 / middle[:, 0]) / 2


def by_hand(objective, tokens, reference):
    """One number, from the paper's formulas."""
    beta, pairs = objective.beta, list(zip(tokens, reference, strict=True))
    if objective.forget_term == "ga":
        return sum(t.sum() for t in tokens) / sum(LENGTHS)
    if objective.forget_term == "idk":
        return -sum(t.sum() for t in tokens) / sum(LENGTHS)
    if objective.forget_term in ("wga", "satimp"):
        return sum((weight(objective, t) * t).sum() for t in tokens) / sum(LENGTHS)
    if objective.forget_term == "jensun":
        return sum(jensen_shannon(t).sum() for t in tokens) / sum(LENGTHS)
    if objective.forget_term == "simnpo":
        sigmoids = [1 / (1 + math.exp(beta / len(t) * t.sum() + objective.simnpo_margin)) for t in tokens]
        return sum(-2 / beta * math.log(s) for s in sigmoids) / len(tokens)
    if objective.normalization == "token":
        ratios = torch.cat([t.exp() / r.exp() for t, r in pairs])
        return (2 / beta * (1 + ratios**beta).log()).mean()
    if objective.normalization == "length":
        return sum(2 / beta * math.log(1 + math.exp((t.mean() - r.mean()) * beta)) for t, r in pairs) / len(pairs)
    return sum(2 / beta * math.log(1 + (t.sum().exp() / r.sum().exp()) ** beta) for t, r in pairs) / len(pairs)


OBJECTIVES = [
    *(ObjectiveConfig(beta=b, normalization=n) for b in (0.1, 0.5, 2.5) for n in ("sequence", "token", "length")),
    ObjectiveConfig(forget_term="ga"),
    ObjectiveConfig(forget_term="idk"),
    ObjectiveConfig(forget_term="simnpo", beta=2.5, simnpo_margin=0.3),
    *(ObjectiveConfig(forget_term="wga", wga_beta=b) for b in (0.0, 1.0, 3.0)),
    *(ObjectiveConfig(forget_term="satimp", satimp_beta1=b, satimp_beta2=c) for b, c in ((5.0, 1.0), (0.5, 2.5))),
    ObjectiveConfig(forget_term="jensun"),
]
TOTALS = StepTotals(len(LENGTHS), sum(LENGTHS), 0)


def name(o):
    own = {"wga": o.wga_beta, "satimp": f"{o.satimp_beta1}-{o.satimp_beta2}"}.get(o.forget_term, o.beta)
    return f"{o.forget_term}-{o.normalization}-{own}"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_forget_loss_is_the_formula(objective, answers):
    loss = forget_loss(objective, *batch(*answers, objective), TOTALS)
    assert loss.item() == pytest.approx(float(by_hand(objective, *answers)), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_gradient_is_the_formulas(objective, answers):
    tokens, reference = answers
    exact = [t.clone().requires_grad_() for t in tokens]
    if objective.forget_term == "simnpo":
        loss = torch.stack(
            [
                -2 / objective.beta * torch.sigmoid(-objective.beta * t.mean() - objective.simnpo_margin).log()
                for t in exact
            ]
        ).mean()
    elif objective.forget_term == "npo" and objective.normalization != "token":
        how = torch.sum if objective.normalization == "sequence" else torch.mean
        loss = torch.stack(
            [
                2 / objective.beta * (1 + (how(t) - how(r)).exp() ** objective.beta).log()
                for t, r in zip(exact, reference, strict=True)
            ]
        ).mean()
    else:
        loss = by_hand(objective, exact, reference)
    loss.backward()
    policy, given = batch(tokens, reference, objective)
    policy.token_logprobs.requires_grad_()
    forget_loss(objective, policy, given, TOTALS).backward()
    torch.testing.assert_close(
        policy.token_logprobs.grad.double(), torch.cat([t.grad for t in exact]), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_shares_of_micro_batches_add_up(objective, answers):
    whole = forget_loss(objective, *batch(*answers, objective), TOTALS)
    shares = []
    for rows in ((0,), (1, 2), (3,)):
        part = [[column[i] for i in rows] for column in answers]
        shares.append(forget_loss(objective, *batch(*part, objective), TOTALS))
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-6)


def test_mean_of_micro_batch_means_would_be_noticed(answers):
    """The bug the totals are there against: dividing by the micro-batch's own token count."""
    objective = ObjectiveConfig(normalization="token")
    whole = forget_loss(objective, *batch(*answers, objective), TOTALS)
    means = []
    for rows in ((0, 1), (2, 3)):
        part = [[column[i] for i in rows] for column in answers]
        own = StepTotals(2, sum(LENGTHS[i] for i in rows), 0)
        means.append(forget_loss(objective, *batch(*part, objective), own))
    assert (sum(means) / 2).item() != pytest.approx(whole.item(), rel=1e-3)


def test_npo_of_an_unchanged_model_is_two_ln2_over_beta():
    objective = ObjectiveConfig(beta=0.5)
    policy = SequenceLogprobs(torch.tensor([-1.0, -2.0]), torch.tensor([0, 1]), 2)
    loss = forget_loss(objective, policy, torch.tensor([-1.0, -2.0]), StepTotals(2, 2, 0))
    assert loss.item() == pytest.approx(2 / 0.5 * math.log(2))


def test_the_ratio_of_long_answers_does_not_depend_on_the_order_of_the_sum():
    """In which a GPU adds differs from one pass to the next; summed in float32 it would, by more than 1e-3 nats."""
    generator = torch.Generator().manual_seed(0)
    logprobs, sequence = -20 * torch.rand(4096, generator=generator), torch.arange(4096) % 2
    order = torch.randperm(4096, generator=generator)
    policy = SequenceLogprobs(logprobs, sequence, 2)
    reference = SequenceLogprobs(logprobs[order], sequence[order], 2).sums()
    exact = [math.fsum(logprobs[sequence == place].tolist()) for place in (0, 1)]
    assert policy.sums().tolist() == pytest.approx(exact, rel=1e-14)
    assert (policy.sums() - reference).abs().max() < 1e-9
    loss = forget_loss(ObjectiveConfig(beta=0.1), policy, reference, StepTotals(2, 4096, 0))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(20 * math.log(2), rel=1e-7)
    rounded = [torch.zeros(2).index_add(0, places, values) for places, values in
               ((sequence, logprobs), (sequence[order], logprobs[order]))]  # fmt: skip
    assert (rounded[0] - rounded[1]).abs().max() > 1e-3  # the other way is recognised


def test_extreme_ratios_stay_finite():
    objective = ObjectiveConfig(beta=0.5)
    for ratio, expected in ((-5000.0, 0.0), (5000.0, 2 * 5000.0)):
        policy = SequenceLogprobs(torch.tensor([ratio], requires_grad=True), torch.tensor([0]), 1)
        loss = forget_loss(objective, policy, torch.tensor([0.0]), StepTotals(1, 1, 0))
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert torch.isfinite(policy.token_logprobs.grad).all()


@pytest.mark.parametrize("term", ["ga", "wga", "satimp", "jensun"])
def test_certain_and_impossible_tokens_have_finite_gradients(term):
    """Also a log-prob that rounding put above 0, which has no power of 1 - p."""
    objective = ObjectiveConfig(forget_term=term, satimp_beta2=0.5)
    policy = SequenceLogprobs(torch.tensor([0.0, 1e-7, -1e-7, -5000.0], requires_grad=True), torch.zeros(4).long(), 1)
    loss = forget_loss(objective, policy, None, StepTotals(1, 4, 0))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(policy.token_logprobs.grad).all()


def test_jensun_is_bounded_and_points_to_the_refusal():
    logprobs = torch.tensor([0.0, -0.7, -3.0, -40.0], requires_grad=True)
    divergence = jensun(logprobs)
    assert divergence[0].item() == pytest.approx(0, abs=1e-6) and divergence[-1].item() == pytest.approx(math.log(2))
    assert (divergence.diff() > 0).all()  # the less likely the refusal, the further away
    divergence.sum().backward()
    assert (logprobs.grad <= 0).all()  # descent makes it likelier


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_the_formula(beta, answers):
    """-(2 / beta) log sigma(beta (log-ratio of the alternative - that of the forgotten answer)), and its gradient."""
    tokens, reference = answers
    objective = ObjectiveConfig(forget_term="dpo", beta=beta, normalization="token")  # which is npo's, not its own
    exact = [t.clone().requires_grad_() for t in tokens]
    ratios = [t.sum() - r.sum() for t, r in zip(exact, reference, strict=True)]
    loss = sum(-2 / beta * torch.sigmoid(beta * (other - own)).log() for own, other in (ratios[:2], ratios[2:])) / 2
    loss.backward()
    policy, given = batch(tokens, reference, objective)
    policy.token_logprobs.requires_grad_()
    ours = forget_loss(objective, policy, given, StepTotals(2, LENGTHS[0] + LENGTHS[2], 0))  # two pairs
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([t.grad for t in exact])
    torch.testing.assert_close(policy.token_logprobs.grad.double(), expected, rtol=1e-5, atol=1e-8)


def test_retain_weights_share_the_steps_tokens():
    assert retain_weights(ObjectiveConfig(gamma=2.0, delta=0.5), StepTotals(1, 1, 40)) == (0.05, 0.0125)
