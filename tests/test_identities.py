"""Exact identities, no training: on a tree of completions small enough to sum over, the estimators
of the scripts have the expectation, the variance and the zero that the theory gives them, to
rounding.

A policy here is a table of logits, one row for each prefix, over two letters and EOS; completions
have at most three tokens. Expectations over groups of two are sums over all pairs of
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
# row and column of each token's logit; what lies behind the end is never looked at
STATE = torch.tensor(
    [[PREFIXES.index(c[:t]) if t < len(c) else 0 for t in range(LENGTH)] for c in COMPLETIONS]
)
ACTION = torch.tensor([[c[t] if t < len(c) else 0 for t in range(LENGTH)] for c in COMPLETIONS])


def table(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (len(PREFIXES), 3)), generator=draw, dtype=torch.float64)


LOGITS = table(1).requires_grad_()
REF = table(2)
REWARDS = table(3, K) + 2  # a mean well away from 0


def token_logps(logits):
    """Log-probs of the tokens of every completion, (K, LENGTH), 0 behind the end."""
    return logits.log_softmax(-1)[STATE, ACTION] * MASK


LOGPS, REF_LOGPS = token_logps(LOGITS), token_logps(REF)
P, P_REF = LOGPS.sum(1).exp().detach(), REF_LOGPS.sum(1).exp()
P_STAR = (REF_LOGPS.sum(1) + REWARDS / BETA).softmax(0)
LOG_Z = (REF_LOGPS.sum(1) + REWARDS / BETA).logsumexp(0)


def gradient(value):
    return torch.autograd.grad(value, LOGITS, retain_graph=True)[0]


def objective(logps):
    """J = E[r] - beta KL(policy || reference), the sum over all completions."""
    logp = logps.sum(1)
    return (logp.exp() * (REWARDS - BETA * (logp - REF_LOGPS.sum(1)))).sum()


TRUTH = gradient(objective(LOGPS))  # of J, in the logits
SCORE = torch.stack([gradient(x) for x in LOGPS.sum(1)])  # grad log p(y): (K, prefixes, 3)


def near(a, b, rtol=1e-12):
    return (a - b).norm() <= rtol * b.norm()


def in_pairs(advantages, penalty=BETA, rewards=REWARDS):
    """Advantages of script for all pairs, the k1 of the completion in the reward -> (K * K, 2)."""
    rewards = rewards - penalty * grpo.kl_penalty(LOGPS.detach(), REF_LOGPS, "k1").sum(1)
    return advantages(rewards[PAIRS.flatten()], 2).view(-1, 2)


def expected_gradient(advantages, aggregation="constant"):
    """The mean over all pairs of the gradient that grpo.py takes from a group of two, by its
    policy_loss and loss_weights. `constant` is made a plain mean over completions of sums over
    tokens."""
    total = 0.0
    for (first, second), pair_advantages in zip(PAIRS.tolist(), advantages):
        rows = [first, second]
        mask, logps = MASK[rows], LOGPS[rows]
        weights = grpo.loss_weights(mask, aggregation, 1)
        spread = pair_advantages[:, None] * mask
        loss, clipped = grpo.policy_loss(logps, logps.detach(), spread, weights, 0.2)
        assert not clipped.any()
        total = total + P[first] * P[second] * loss
    return -gradient(total)


def test_completions_are_all_of_them():
    assert K == 15 and abs(P.sum() - 1) < 1e-14 and abs(P_REF.sum() - 1) < 1e-14


# ---------------------------------------------------------------- the optimum
def test_at_the_optimum_every_advantage_is_zero():
    """Score - beta log-ratio is beta log Z for every completion, so no sample of any group moves
    p*, whatever divides the advantage. A wrong sign of the KL, or 1 / beta for beta, fails this at
    once."""
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
def test_at_the_optimum_with_the_soft_values_ppo_has_no_advantage(lam):
    """V(prefix) = beta log sum p_ref(rest) exp(r / beta): then every delta of GAE is 0 (gamma
    1)."""
    soft = {}  # beta log sum over completions with the prefix
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
def test_what_is_missing_to_the_optimum_is_the_kl_from_it(seed):
    """beta log Z - J(policy) = beta KL(policy || p*), with J summed from PPO's own token
    rewards."""
    logps = token_logps(table(seed))
    p = logps.sum(1).exp()
    j = (p * ppo.token_rewards(REWARDS, logps, REF_LOGPS, MASK, BETA).sum(1)).sum()
    kl = (p * (logps.sum(1) - P_STAR.log())).sum()
    assert math.isclose(BETA * LOG_Z - j, BETA * kl, rel_tol=1e-12)
    assert math.isclose(j, objective(logps), rel_tol=1e-12)


# ---------------------------------------------------------------- unbiased estimators
def reinforce_gradients(advantages):
    """The gradient that rloo.py takes from each pair, in float64: (K * K, prefixes, 3)."""
    result = []
    for rows, pair_advantages in zip(PAIRS.tolist(), advantages):
        mask, logps = MASK[rows], LOGPS[rows]
        loss, _ = rloo.reinforce_loss(
            logps, logps.detach(), pair_advantages[:, None] * mask, mask / 2, 0.2
        )
        result.append(-gradient(loss))
    return torch.stack(result)


def moments(gradients):
    """Mean and total variance of the gradient over pairs."""
    p = (P[PAIRS[:, 0]] * P[PAIRS[:, 1]])[:, None, None]
    mean = (p * gradients).sum(0)
    return mean, (p * (gradients - mean) ** 2).sum()


def test_leave_one_out_and_plain_reinforce_are_unbiased():
    for advantages in (rloo.leave_one_out_advantages, lambda rewards, group_size: rewards):
        assert near(moments(reinforce_gradients(in_pairs(advantages)))[0], TRUTH)
    no_kl = moments(reinforce_gradients(in_pairs(rloo.leave_one_out_advantages, penalty=0.0)))[0]
    assert not near(no_kl, TRUTH, rtol=0.1)


def test_unscaled_grpo_is_unbiased_but_for_its_factor():
    """A baseline that includes the sample itself shrinks the gradient by 1 - 1/G, here 1/2."""
    advantages = in_pairs(lambda *x: grpo.group_advantages(*x, "none"))
    assert near(expected_gradient(advantages), TRUTH / 2)


def test_distillation_is_the_gradient_of_the_kl_from_the_teacher():
    """--reward none: what is left is KL(policy || reference) of whole completions, on the policy's
    own samples; GRPO's is shrunk by 1 - 1/G."""
    logp = LOGPS.sum(1)
    kl = gradient((logp.exp() * (logp - REF_LOGPS.sum(1))).sum())
    nothing = torch.zeros(K, dtype=torch.float64)
    ours = moments(reinforce_gradients(in_pairs(rloo.leave_one_out_advantages, rewards=nothing)))[0]
    assert near(ours, -BETA * kl)
    advantages = in_pairs(lambda *x: grpo.group_advantages(*x, "none"), rewards=nothing)
    assert near(expected_gradient(advantages), -BETA * kl / 2)


def test_variance_under_a_shift_of_the_rewards():
    """A constant added to r leaves RLOO's gradients as they are; one of the sign of the mean raises
    the variance of REINFORCE (here; in general of the mean weighted by the squared score)."""
    shifted = {}
    for shift in (0.0, 1.0, 10.0):
        rewards = (REWARDS + shift - BETA * (LOGPS.detach() - REF_LOGPS).sum(1))[PAIRS.flatten()]
        left_out = rloo.leave_one_out_advantages(rewards, 2).view(-1, 2)
        shifted[shift] = [moments(reinforce_gradients(a)) for a in (left_out, rewards.view(-1, 2))]
    for shift in (1.0, 10.0):
        assert near(shifted[shift][0][0], TRUTH, rtol=1e-11) and near(
            shifted[shift][1][0], TRUTH, rtol=1e-11
        )
        assert math.isclose(shifted[shift][0][1], shifted[0.0][0][1], rel_tol=1e-11)
    assert shifted[0.0][1][1] < shifted[1.0][1][1] < shifted[10.0][1][1]
    assert shifted[0.0][0][1] < shifted[0.0][1][1]  # and the baseline is worth having


def ppo_advantages(rows, values):
    rewards = ppo.token_rewards(REWARDS, LOGPS.detach(), REF_LOGPS, MASK, BETA)[rows]
    return ppo.gae(rewards, values[rows], MASK[rows], 1.0, 1.0)[0]


@pytest.mark.parametrize("seed", [4, 5])
def test_ppo_is_unbiased_with_any_values(seed):
    """gamma = lambda = 1, constant weights, no whitening: any V(prefix) gives the gradient of J."""
    values = table(seed, len(PREFIXES))[STATE] * 3 * MASK
    advantages, weights = ppo_advantages(slice(None), values), P[:, None] * MASK
    loss, clipped = ppo.policy_loss(LOGPS, LOGPS.detach(), advantages, weights, 0.2)
    assert near(-gradient(loss), TRUTH) and not clipped.any()
    rewards = ppo.token_rewards(REWARDS, LOGPS.detach(), REF_LOGPS, MASK, BETA)
    advantages, _ = ppo.gae(
        rewards, values, MASK, 1.0, 0.5
    )  # lambda below 1 with wrong values is biased
    loss, _ = ppo.policy_loss(LOGPS, LOGPS.detach(), advantages, weights, 0.2)
    assert not near(-gradient(loss), TRUTH, rtol=0.01)


# ---------------------------------------------------------------- documented biases, and their size
# what each division does to the direction of the expected gradient, with the rewards of this tree
# and batches of two; an optimiser that normalises sees nothing else. Larger groups and batches have
# less of all but that of length; between prompts the group's deviation stays as a weight
DEGREES = {"group deviation": 6.70, "length": 12.57, "token mean": 7.46, "whitening": 12.62}


def angle(a):
    """Degrees between a gradient and that of J."""
    return math.degrees(math.acos(min(1.0, ((a * TRUTH).sum() / a.norm() / TRUTH.norm()).item())))


def over_pairs(entry):
    """Sum over pairs (y, z) of p(y) p(z) entry(y, z, r(y), r(z)), with the KL in the rewards."""
    r = (REWARDS - BETA * (LOGPS.detach() - REF_LOGPS).sum(1)).tolist()
    return sum(P[y] * P[z] * entry(y, z, r[y], r[z]) for y in range(K) for z in range(K))


def test_dividing_by_the_deviation_of_the_group():
    """With two completions what is left of the rewards is which one is better: +- 1 / sqrt(2)."""
    ours = expected_gradient(in_pairs(grpo.group_advantages))

    def entry(y, z, r, s):
        return (r - s) / 2 / (abs(r - s) / math.sqrt(2) + 1e-6) * (SCORE[y] - SCORE[z]) / 2

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["group deviation"], abs=0.01)


def test_dividing_by_the_deviation_of_the_batch():
    """Of one pair as a batch it is that of the group; of all pairs it is a constant and does no
    harm."""
    pair = torch.tensor([0.3, 1.0]).double()
    assert torch.allclose(
        grpo.group_advantages(pair, 2, "batch"), grpo.group_advantages(pair, 2, "group")
    )
    rewards = REWARDS - BETA * (LOGPS.detach() - REF_LOGPS).sum(1)
    advantages = grpo.group_advantages(rewards[PAIRS.flatten()], 2, "batch").view(-1, 2)
    assert angle(expected_gradient(advantages)) < 1e-5


def test_dividing_by_the_length_of_the_completion():
    """The mean over a completion's own tokens: short ones count for more."""
    ours = expected_gradient(in_pairs(lambda *x: grpo.group_advantages(*x, "none")), "sequence")

    def entry(y, z, r, s):
        return (r - s) / 2 * (SCORE[y] / LENGTHS[y] - SCORE[z] / LENGTHS[z]) / 2

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["length"], abs=0.01)


def test_the_mean_over_the_tokens_of_a_batch():
    """The divisor depends on what was sampled: batches of short completions count for more."""
    ours = expected_gradient(in_pairs(lambda *x: grpo.group_advantages(*x, "none")), "token")

    def entry(y, z, r, s):
        return (r - s) / 2 * (SCORE[y] - SCORE[z]) / (LENGTHS[y] + LENGTHS[z])

    assert near(ours, over_pairs(entry))
    assert angle(ours) == pytest.approx(DEGREES["token mean"], abs=0.01)


def test_whitened_advantages():
    """PPO on batches of two, V = 0: advantages less their mean over all tokens of the batch,
    divided by their deviation, then averaged over tokens."""
    values, total, formula = torch.zeros(K, LENGTH).double(), 0.0, 0.0
    step_scores = [[gradient(x) for x in row] for row in LOGPS]
    per_token = (REWARDS[:, None] * (LENGTHS[:, None] == torch.arange(1, LENGTH + 1))).double()
    per_token = (per_token - BETA * (LOGPS.detach() - REF_LOGPS)) * MASK
    for y, z in PAIRS.tolist():
        rows, p = [y, z], P[y] * P[z]
        whitened = ppo.masked_whiten(ppo_advantages(rows, values), MASK[rows])
        weights = MASK[rows] / MASK[rows].sum()
        total = (
            total
            + p * ppo.policy_loss(LOGPS[rows], LOGPS[rows].detach(), whitened, weights, 0.2)[0]
        )
        to_go = [
            (i, t, sum(per_token[i, t:].tolist())) for i in rows for t in range(int(LENGTHS[i]))
        ]
        mean = sum(a for _, _, a in to_go) / len(to_go)
        variance = sum((a - mean) ** 2 for _, _, a in to_go) / len(to_go)
        terms = [(a - mean) / math.sqrt(variance + 1e-8) * step_scores[i][t] for i, t, a in to_go]
        formula = formula + p * sum(terms) / len(terms)
    assert near(-gradient(total), formula)
    assert angle(-gradient(total)) == pytest.approx(DEGREES["whitening"], abs=0.01)


# ---------------------------------------------------------------- the KL as a loss
@pytest.mark.parametrize("estimator, rest", [("k3", "k3"), ("k2", "gibbs")])
def test_where_a_kl_loss_rests(estimator, rest):
    """One-token completions, all pairs of them: the expected gradient of GRPO's loss, unscaled, is
    0 at the law in the docstring of kl_penalty, and not at the other."""
    ref, rewards = table(6, 1, 5).log_softmax(1), table(7, 1, 5) + 2
    laws = {"k3": k3_law(ref, rewards, BETA, 2), "gibbs": gibbs(ref, rewards, 2 * BETA)}
    pairs = torch.tensor(list(itertools.product(range(5), repeat=2)))
    advantages = grpo.group_advantages(rewards[0, pairs.flatten()], 2, "none")[:, None]
    for name, p in laws.items():
        logits = p[0].clone().requires_grad_()
        logps = logits.log_softmax(0)
        weights = (p[0].exp()[pairs[:, 0]] * p[0].exp()[pairs[:, 1]])[:, None].expand(
            -1, 2
        ).reshape(-1, 1) / 2
        rows = logps[pairs.flatten()][:, None]
        loss, _ = grpo.policy_loss(rows, rows.detach(), advantages, weights, 0.2)
        kl = grpo.kl_penalty(rows, ref[0, pairs.flatten()][:, None], estimator)
        (loss + BETA * (weights * kl).sum()).backward()
        assert (logits.grad.abs().max() < 1e-13) == (name == rest)
    assert (laws["k3"].exp() - laws["gibbs"].exp()).abs().max() > 0.02


def test_kl_estimates_in_expectation():
    """Exactly: k1 and k3, summed over tokens, are the KL of the completions; k2 is half the mean
    squared log-ratio of each token."""
    p, x = P, LOGPS.detach()
    kl = (p * (x - REF_LOGPS).sum(1)).sum()
    half_square = (p * ((x - REF_LOGPS) ** 2 * MASK).sum(1)).sum() / 2
    for estimator, expected in (("k1", kl), ("k3", kl), ("k2", half_square)):
        estimate = (p * (grpo.kl_penalty(x, REF_LOGPS, estimator) * MASK).sum(1)).sum()
        assert math.isclose(estimate, expected, rel_tol=1e-12)
    assert (grpo.kl_penalty(x, REF_LOGPS, "k3") >= 0).all() and (
        grpo.kl_penalty(x, REF_LOGPS, "k2") >= 0
    ).all()
    assert not any(grpo.kl_penalty(x, x, estimator).any() for estimator in ("k1", "k2", "k3"))
    x = torch.tensor([1e-4])  # expm1: without it float32 loses all digits of a small k3
    assert grpo.kl_penalty(x, torch.zeros(1), "k3").item() == pytest.approx(1e-8 / 2, rel=1e-3)


def test_where_the_gradients_of_kl_losses_point():
    """The mean over completions of the gradient of each estimate. k1: nowhere, it does not
    regularise. k2: KL(policy || reference) of each next token. k3: KL(reference || policy) of each
    next token, which is why it leads elsewhere. Both leave out that tokens decide which prefixes
    come later."""
    reach = torch.tensor([sum(P[[c[: len(x)] == x for c in COMPLETIONS]]) for x in PREFIXES])[
        :, None
    ]
    p, q = LOGITS.log_softmax(-1), REF.log_softmax(-1)

    def of_loss(estimator):
        return gradient((P[:, None] * grpo.kl_penalty(LOGPS, REF_LOGPS, estimator) * MASK).sum())

    assert of_loss("k1").abs().max() < 1e-15
    assert near(of_loss("k2"), gradient((reach * p.exp() * (p - q)).sum()))
    assert near(of_loss("k3"), gradient((reach * q.exp() * (q - p)).sum()))
    whole = gradient((LOGPS.sum(1).exp() * (LOGPS - REF_LOGPS).sum(1)).sum())
    assert not near(of_loss("k2"), whole, rtol=0.1)
