"""Exact identities without training: expectations, variances and zeros of the estimators.

All completions can be listed: two letters and EOS, at most three tokens. A policy is a table of
logits with one row per prefix. An expectation over groups of two is a sum over all pairs of
completions."""

import itertools
import math

import pytest
import torch
from language import gibbs, k3_law

import grpo
import ppo
import rloo

EOS, LENGTH, BETA = 2, 3, 0.4
COMPLETIONS = [
    c
    for n in range(1, LENGTH + 1)
    for c in itertools.product(range(3), repeat=n)
    if EOS not in c[:-1] and (c[-1] == EOS or n == LENGTH)
]
PREFIXES = [c for n in range(LENGTH) for c in itertools.product(range(2), repeat=n)]
K = len(COMPLETIONS)
PAIRS = torch.tensor(list(itertools.product(range(K), repeat=2)))  # all groups of two: (K * K, 2)
MASK = torch.tensor([[float(t < len(c)) for t in range(LENGTH)] for c in COMPLETIONS]).double()
LENGTHS = MASK.sum(1)
# row and column of the logit of each token, arbitrary after the end
STATE = torch.tensor(
    [[PREFIXES.index(c[:t]) if t < len(c) else 0 for t in range(LENGTH)] for c in COMPLETIONS]
)
ACTION = torch.tensor([[c[t] if t < len(c) else 0 for t in range(LENGTH)] for c in COMPLETIONS])


def table(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (len(PREFIXES), 3)), generator=draw, dtype=torch.float64)


LOGITS = table(1).requires_grad_()
REF = table(2)
REWARDS = table(3, K) + 2  # the mean is not near 0


def token_logps(logits):
    """Log-probs of the tokens of every completion, (K, LENGTH), 0 after the end."""
    return logits.log_softmax(-1)[STATE, ACTION] * MASK


LOGPS = token_logps(LOGITS)
REF_LOGPS = token_logps(REF)
P = LOGPS.sum(1).exp().detach()
P_REF = REF_LOGPS.sum(1).exp()
P_STAR = (REF_LOGPS.sum(1) + REWARDS / BETA).softmax(0)
LOG_Z = (REF_LOGPS.sum(1) + REWARDS / BETA).logsumexp(0)


def gradient(value):
    return torch.autograd.grad(value, LOGITS, retain_graph=True)[0]


def objective(logps):
    """J = E[r] - beta KL(policy || reference), summed over all completions."""
    logp = logps.sum(1)
    return (logp.exp() * (REWARDS - BETA * (logp - REF_LOGPS.sum(1)))).sum()


TRUTH = gradient(objective(LOGPS))  # of J with respect to the logits
SCORE = torch.stack([gradient(x) for x in LOGPS.sum(1)])  # of log p(y): (K, prefixes, 3)


def near(a, b, rtol=1e-12):
    return (a - b).norm() <= rtol * b.norm()


def in_pairs(advantages, penalty=BETA, rewards=REWARDS):
    """Advantages of all pairs, with the k1 of a completion in its reward, (K * K, 2)."""
    rewards = rewards - penalty * grpo.kl_penalty(LOGPS.detach(), REF_LOGPS, "k1").sum(1)
    return advantages(rewards[PAIRS.flatten()], 2).view(-1, 2)


def expected_gradient(advantages, aggregation="constant"):
    """Expected gradient of grpo.py for a group of two, by its policy_loss and loss_weights.

    "constant" with a maximum length of 1 is a mean over completions of sums over tokens."""
    total = 0.0
    for (first, second), pair_advantages in zip(PAIRS.tolist(), advantages):
        rows = [first, second]
        mask = MASK[rows]
        logps = LOGPS[rows]
        weights = grpo.loss_weights(mask, aggregation, 1)
        spread = pair_advantages[:, None] * mask
        loss, clipped = grpo.policy_loss(logps, logps.detach(), spread, weights, 0.2)
        assert not clipped.any()
        total = total + P[first] * P[second] * loss
    return -gradient(total)


def test_all_completions_are_listed():
    assert K == 15 and abs(P.sum() - 1) < 1e-14 and abs(P_REF.sum() - 1) < 1e-14


# ---------------------------------------------------------------- the optimum
def test_at_the_optimum_every_advantage_is_zero():
    """Score - beta * log-ratio is beta log Z for every completion, so all advantages are 0.

    With a wrong sign of the KL, or 1 / beta for beta, they are not."""
    log_ratio = P_STAR.log() - REF_LOGPS.sum(1)
    rewards = REWARDS - BETA * grpo.kl_penalty(P_STAR.log(), REF_LOGPS.sum(1), "k1")
    assert (rewards - BETA * LOG_Z).abs().max() < 1e-13
    for group_size in (3, 5, 15):
        assert rloo.leave_one_out_advantages(rewards, group_size).abs().max() < 1e-13
        assert grpo.group_advantages(rewards, group_size, "none").abs().max() < 1e-13
        assert grpo.group_advantages(rewards, group_size, "group").abs().max() < 1e-6
    for wrong in (REWARDS + BETA * log_ratio, REWARDS - log_ratio / BETA):
        assert rloo.leave_one_out_advantages(wrong, 5).abs().max() > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_at_the_optimum_with_soft_values_every_ppo_advantage_is_zero(lam):
    """V(prefix) = beta log sum p_ref(rest) exp(r / beta) makes every delta of GAE 0."""
    soft = {}  # the values: prefix -> V
    for prefix in PREFIXES:
        with_prefix = torch.tensor([c[: len(prefix)] == prefix for c in COMPLETIONS])
        rest = torch.stack([REF_LOGPS[k, len(prefix) :].sum() for k in range(K)])
        soft[prefix] = BETA * (rest + REWARDS / BETA)[with_prefix].logsumexp(0).item()
    values = [[soft[PREFIXES[s]] for s in row] for row in STATE.tolist()]
    values = torch.tensor(values, dtype=torch.float64) * MASK
    optimal = torch.zeros_like(REF)  # log p*(token | prefix), by the soft Bellman equation
    for i, prefix in enumerate(PREFIXES):
        for token in range(3):
            then = (*prefix, token)
            if then in COMPLETIONS:
                after = REWARDS[COMPLETIONS.index(then)].item()
            else:
                after = soft[then]
            optimal[i, token] = REF.log_softmax(-1)[i, token] + (after - soft[prefix]) / BETA
    assert torch.allclose(token_logps(optimal).sum(1).exp(), P_STAR, rtol=1e-12)
    rewards = ppo.token_rewards(REWARDS, token_logps(optimal), REF_LOGPS, MASK, BETA)
    advantages, returns = ppo.gae(rewards, values, MASK, 1.0, lam)
    assert advantages.abs().max() < 1e-13
    assert torch.allclose(returns, values, rtol=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gap_to_the_optimum_is_the_kl_from_it(seed):
    """beta log Z - J(policy) = beta KL(policy || p*), with J from the token rewards of PPO."""
    logps = token_logps(table(seed))
    p = logps.sum(1).exp()
    j = (p * ppo.token_rewards(REWARDS, logps, REF_LOGPS, MASK, BETA).sum(1)).sum()
    kl = (p * (logps.sum(1) - P_STAR.log())).sum()
    assert math.isclose(BETA * LOG_Z - j, BETA * kl, rel_tol=1e-12)
    assert math.isclose(j, objective(logps), rel_tol=1e-12)


# ---------------------------------------------------------------- unbiased estimators
def reinforce_gradients(advantages):
    """Gradient of rloo.py for each pair, (K * K, prefixes, 3)."""
    result = []
    for rows, pair_advantages in zip(PAIRS.tolist(), advantages):
        mask = MASK[rows]
        logps = LOGPS[rows]
        spread = pair_advantages[:, None] * mask
        loss, _ = rloo.reinforce_loss(logps, logps.detach(), spread, mask / 2, 0.2)
        result.append(-gradient(loss))
    return torch.stack(result)


def moments(gradients):
    """Mean and total variance over pairs."""
    p = (P[PAIRS[:, 0]] * P[PAIRS[:, 1]])[:, None, None]
    mean = (p * gradients).sum(0)
    return mean, (p * (gradients - mean) ** 2).sum()


def test_leave_one_out_and_plain_reinforce_are_unbiased():
    for advantages in (rloo.leave_one_out_advantages, lambda rewards, group_size: rewards):
        assert near(moments(reinforce_gradients(in_pairs(advantages)))[0], TRUTH)
    no_kl = moments(reinforce_gradients(in_pairs(rloo.leave_one_out_advantages, penalty=0.0)))[0]
    assert not near(no_kl, TRUTH, rtol=0.1)


def test_unscaled_grpo_is_unbiased_up_to_a_factor():
    """A baseline that includes the sample shrinks the gradient by 1 - 1/G, here 1/2."""
    advantages = in_pairs(lambda *x: grpo.group_advantages(*x, "none"))
    assert near(expected_gradient(advantages), TRUTH / 2)


def test_distillation_is_the_gradient_of_the_kl_from_the_teacher():
    """--reward none leaves the KL of whole completions; GRPO shrinks it by 1 - 1/G."""
    logp = LOGPS.sum(1)
    kl = gradient((logp.exp() * (logp - REF_LOGPS.sum(1))).sum())
    nothing = torch.zeros(K, dtype=torch.float64)
    ours = moments(reinforce_gradients(in_pairs(rloo.leave_one_out_advantages, rewards=nothing)))[0]
    assert near(ours, -BETA * kl)
    advantages = in_pairs(lambda *x: grpo.group_advantages(*x, "none"), rewards=nothing)
    assert near(expected_gradient(advantages), -BETA * kl / 2)


def test_variance_under_a_shift_of_the_rewards():
    """A constant added to all rewards does not affect RLOO.

    It raises the variance of plain REINFORCE, since the mean reward is positive."""
    baseline_variance = {}
    plain_variance = {}
    for shift in (0.0, 1.0, 10.0):
        rewards = (REWARDS + shift - BETA * (LOGPS.detach() - REF_LOGPS).sum(1))[PAIRS.flatten()]
        advantages = rloo.leave_one_out_advantages(rewards, 2).view(-1, 2)
        mean, baseline_variance[shift] = moments(reinforce_gradients(advantages))
        assert near(mean, TRUTH, rtol=1e-11)
        mean, plain_variance[shift] = moments(reinforce_gradients(rewards.view(-1, 2)))
        assert near(mean, TRUTH, rtol=1e-11)
        assert math.isclose(baseline_variance[shift], baseline_variance[0.0], rel_tol=1e-11)
    assert plain_variance[0.0] < plain_variance[1.0] < plain_variance[10.0]
    assert baseline_variance[0.0] < plain_variance[0.0]


def ppo_advantages(rows, values):
    rewards = ppo.token_rewards(REWARDS, LOGPS.detach(), REF_LOGPS, MASK, BETA)[rows]
    return ppo.gae(rewards, values[rows], MASK[rows], 1.0, 1.0)[0]


@pytest.mark.parametrize("seed", [4, 5])
def test_ppo_is_unbiased_with_any_values(seed):
    """gamma = lambda = 1 without whitening. With lambda below 1, wrong values bias the gradient."""
    values = table(seed, len(PREFIXES))[STATE] * 3 * MASK
    advantages = ppo_advantages(slice(None), values)
    weights = P[:, None] * MASK
    loss, clipped = ppo.policy_loss(LOGPS, LOGPS.detach(), advantages, weights, 0.2)
    assert near(-gradient(loss), TRUTH) and not clipped.any()
    rewards = ppo.token_rewards(REWARDS, LOGPS.detach(), REF_LOGPS, MASK, BETA)
    advantages, _ = ppo.gae(rewards, values, MASK, 1.0, 0.5)
    loss, _ = ppo.policy_loss(LOGPS, LOGPS.detach(), advantages, weights, 0.2)
    assert not near(-gradient(loss), TRUTH, rtol=0.01)


# ---------------------------------------------------------------- documented biases and their size
# Angle between the expected gradient of batches of two and the gradient of J. Adam normalizes, so
# only the direction matters. Larger groups and batches reduce all of these but the length bias; the
# group deviation remains as a weight of prompts.
DEGREES = {"group deviation": 6.70, "length": 12.57, "token mean": 7.46, "whitening": 12.62}


def angle(a):
    """Degrees between a gradient and the gradient of J."""
    return math.degrees(math.acos(min(1.0, ((a * TRUTH).sum() / a.norm() / TRUTH.norm()).item())))


def over_pairs(entry):
    """Sum of p(y) p(z) entry(y, z, r(y), r(z)) over pairs (y, z), with the KL in the rewards."""
    r = (REWARDS - BETA * (LOGPS.detach() - REF_LOGPS).sum(1)).tolist()
    return sum(P[y] * P[z] * entry(y, z, r[y], r[z]) for y in range(K) for z in range(K))


def test_dividing_by_the_deviation_of_the_group():
    """With two completions, the advantages are 1 / sqrt(2) for the better one and -1 / sqrt(2)."""
    ours = expected_gradient(in_pairs(grpo.group_advantages))

    def entry(y, z, r, s):
        return (r - s) / 2 / (abs(r - s) / math.sqrt(2) + 1e-6) * (SCORE[y] - SCORE[z]) / 2

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["group deviation"], abs=0.01)


def test_dividing_by_the_deviation_of_the_batch():
    """For a batch of one pair it is the group's; over all pairs it is a constant without bias."""
    pair = torch.tensor([0.3, 1.0]).double()
    assert torch.allclose(
        grpo.group_advantages(pair, 2, "batch"), grpo.group_advantages(pair, 2, "group")
    )
    rewards = REWARDS - BETA * (LOGPS.detach() - REF_LOGPS).sum(1)
    advantages = grpo.group_advantages(rewards[PAIRS.flatten()], 2, "batch").view(-1, 2)
    assert angle(expected_gradient(advantages)) < 1e-5


def test_dividing_by_the_length_of_the_completion():
    """A mean over the tokens of each completion gives short completions more weight."""
    ours = expected_gradient(in_pairs(lambda *x: grpo.group_advantages(*x, "none")), "sequence")

    def entry(y, z, r, s):
        return (r - s) / 2 * (SCORE[y] / LENGTHS[y] - SCORE[z] / LENGTHS[z]) / 2

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["length"], abs=0.01)


def test_the_mean_over_the_tokens_of_a_batch():
    """A mean over the sampled tokens gives batches of short completions more weight."""
    ours = expected_gradient(in_pairs(lambda *x: grpo.group_advantages(*x, "none")), "token")

    def entry(y, z, r, s):
        return (r - s) / 2 * (SCORE[y] - SCORE[z]) / (LENGTHS[y] + LENGTHS[z])

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["token mean"], abs=0.01)


def test_whitened_advantages():
    """PPO on batches of two with V = 0; mean and deviation are taken over all tokens of a batch."""
    values = torch.zeros(K, LENGTH).double()
    total = 0.0
    formula = 0.0
    token_scores = [[gradient(x) for x in row] for row in LOGPS]  # of log p(token | prefix)
    rewards = (REWARDS[:, None] * (LENGTHS[:, None] == torch.arange(1, LENGTH + 1))).double()
    rewards = (rewards - BETA * (LOGPS.detach() - REF_LOGPS)) * MASK
    for y, z in PAIRS.tolist():
        rows = [y, z]
        p = P[y] * P[z]
        whitened = ppo.masked_whiten(ppo_advantages(rows, values), MASK[rows])
        weights = MASK[rows] / MASK[rows].sum()
        loss, _ = ppo.policy_loss(LOGPS[rows], LOGPS[rows].detach(), whitened, weights, 0.2)
        total = total + p * loss
        tokens = [(i, t) for i in rows for t in range(int(LENGTHS[i]))]
        to_go = [sum(rewards[i, t:].tolist()) for i, t in tokens]
        mean = sum(to_go) / len(tokens)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in to_go) / len(tokens) + 1e-8)
        terms = [(x - mean) / deviation * token_scores[i][t] for x, (i, t) in zip(to_go, tokens)]
        formula = formula + p * sum(terms) / len(tokens)
    assert near(-gradient(total), formula)
    assert angle(-gradient(total)) == pytest.approx(DEGREES["whitening"], abs=0.01)


# ---------------------------------------------------------------- the KL as a loss
@pytest.mark.parametrize(
    "estimator, fixed_point", [("k3", "k3"), ("k2", "gibbs"), ("k3-weighted", "gibbs")]
)
def test_fixed_point_of_a_kl_loss(estimator, fixed_point):
    """The expected gradient of unscaled GRPO is 0 at the law in the docstring of kl_penalty.

    It is not 0 at the other law. Completions have one token."""
    ref = table(6, 1, 5).log_softmax(1)
    rewards = table(7, 1, 5) + 2
    laws = {"k3": k3_law(ref, rewards, BETA, 2), "gibbs": gibbs(ref, rewards, 2 * BETA)}
    pairs = torch.tensor(list(itertools.product(range(5), repeat=2)))
    columns = pairs.flatten()
    advantages = grpo.group_advantages(rewards[0, columns], 2, "none")[:, None]
    for name, law in laws.items():
        p = law[0].exp()
        weights = (p[pairs[:, 0]] * p[pairs[:, 1]] / 2).repeat_interleave(2)[:, None]
        logits = law[0].clone().requires_grad_()
        logps = logits.log_softmax(0)[columns][:, None]
        loss, _ = grpo.policy_loss(logps, logps.detach(), advantages, weights, 0.2)
        kl = grpo.kl_losses(logps, logps.detach(), ref[0, columns][:, None], estimator)
        (loss + BETA * (weights * kl).sum()).backward()
        assert (logits.grad.abs().max() < 1e-13) == (name == fixed_point)
    assert (laws["k3"].exp() - laws["gibbs"].exp()).abs().max() > 0.02


def test_kl_estimates_in_expectation():
    """k1 and k3, summed over tokens, are the KL; k2 is half the mean squared log-ratio."""
    x = LOGPS.detach()
    kl = (P * (x - REF_LOGPS).sum(1)).sum()
    half_square = (P * ((x - REF_LOGPS) ** 2 * MASK).sum(1)).sum() / 2
    for estimator, expected in (("k1", kl), ("k3", kl), ("k2", half_square)):
        estimate = (P * (grpo.kl_penalty(x, REF_LOGPS, estimator) * MASK).sum(1)).sum()
        assert math.isclose(estimate, expected, rel_tol=1e-12)
        assert not grpo.kl_penalty(x, x, estimator).any()
    for estimator in ("k2", "k3"):
        assert (grpo.kl_penalty(x, REF_LOGPS, estimator) >= 0).all()
    small = torch.tensor([1e-4])  # exp(-x) - 1 without expm1 would lose all digits in float32
    assert grpo.kl_penalty(small, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=1e-3)


def test_expected_gradients_of_kl_losses():
    """k1: 0. k2: the gradient of KL(policy || reference) of each next token.

    k3: the gradient of KL(reference || policy) of each next token. Weighted with the ratio, k3 has
    the gradient of k2. None includes the effect of a token on later prefixes."""
    p_prefix = torch.tensor([sum(P[[c[: len(x)] == x for c in COMPLETIONS]]) for x in PREFIXES])
    log_p = LOGITS.log_softmax(-1)
    log_q = REF.log_softmax(-1)
    next_token_kl = (p_prefix[:, None] * log_p.exp() * (log_p - log_q)).sum()
    reverse_kl = (p_prefix[:, None] * log_q.exp() * (log_q - log_p)).sum()

    def loss_gradient(estimator):
        kl = grpo.kl_losses(LOGPS, LOGPS.detach(), REF_LOGPS, estimator)
        return gradient((P[:, None] * kl * MASK).sum())

    assert loss_gradient("k1").abs().max() < 1e-15
    assert near(loss_gradient("k2"), gradient(next_token_kl))
    assert near(loss_gradient("k3"), gradient(reverse_kl))
    assert near(loss_gradient("k3-weighted"), gradient(next_token_kl))
    whole_kl = gradient((LOGPS.sum(1).exp() * (LOGPS - REF_LOGPS).sum(1)).sum())
    assert not near(loss_gradient("k2"), whole_kl, rtol=0.1)
