"""The tensor math of the scripts, each function against a slow float64 loop over the formula."""

import copy
import math

import pytest
import torch
from conftest import CPU, VOCAB, at_last_token, distance, gradients, ragged_batch

import common
import ppo
import reward_model
import sft

# prompts, completions and padding of different lengths; one row is full, one has a single action
MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
    ]
)
ROWS, WIDTH = MASK.shape


def normal(seed, *shape, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def assert_near(ours, theirs, rtol=1e-5, atol=1e-6):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours.detach().double(), theirs, rtol=rtol, atol=atol)


def grid(entry, mask=MASK):
    """Nested lists of entry(i, t) where the mask is 1, otherwise 0."""
    return [
        [entry(i, t) if on else 0.0 for t, on in enumerate(row)]
        for i, row in enumerate(mask.tolist())
    ]


def sequences_of(batch):
    """Token ids of each row, prompt and completion, without padding."""
    sequences = []
    for inputs, targets, n in zip(
        batch["inputs"], batch["targets"], batch["attention_mask"].sum(1)
    ):
        sequences.append([*inputs[:n].tolist(), targets[n - 1].item()])
    return sequences


def slow_logprobs(model, batch, temperature):
    """Log-probs and entropies, row by row without padding, by model.forward."""
    mask = batch["mask"].tolist()
    logprobs = [[0.0] * len(row) for row in mask]
    entropy = [[0.0] * len(row) for row in mask]
    for i, ids in enumerate(sequences_of(batch)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        for t in range(len(ids) - 1):
            if mask[i][t]:
                scaled = [x / temperature for x in logits[t]]
                log_normalizer = math.log(sum(math.exp(x) for x in scaled))
                logps = [x - log_normalizer for x in scaled]
                logprobs[i][t] = logps[ids[t + 1]]
                entropy[i][t] = -sum(math.exp(x) * x for x in logps)
    return logprobs, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(temperature, policy):
    """Shift, gather, temperature, cap and mask agree with the loop."""
    batch = ragged_batch(1)
    mask = batch["mask"]
    logprobs, entropy = ppo.token_logprobs_and_entropy(policy, batch, temperature)
    slow_logps, slow_entropy = slow_logprobs(policy, batch, temperature)
    assert_near(logprobs, slow_logps, atol=1e-5)
    assert_near(entropy, slow_entropy, atol=1e-5)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    assert mask.sum() == sum((7, 1, 12, 4, 2, 7))
    assert torch.equal(sft.token_logprobs(policy, batch, temperature), logprobs)


def test_token_logprobs_defaults_to_temperature_one(tiny_llama):
    batch = ragged_batch(2)
    with torch.no_grad():
        plain, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch)
        one, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch, 1.0)
        sharp, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch, 0.7)
        assert torch.equal(plain, one)
        assert (plain - sharp).abs().max() > 0.5
        assert torch.equal(
            sft.token_logprobs(tiny_llama, batch), sft.token_logprobs(tiny_llama, batch, 1.0)
        )


def test_token_logprobs_keep_the_cap_of_gemma2(tiny_gemma2, monkeypatch):
    """Logits stay within +-2, the cap of this model, and losing the cap changes log-probs."""
    batch = ragged_batch(2)
    with torch.no_grad():
        capped = sft.token_logprobs(tiny_gemma2, batch)
        assert capped.min() > -4 - math.log(64)
        monkeypatch.setattr(tiny_gemma2.config, "final_logit_softcapping", None)
        assert (capped - sft.token_logprobs(tiny_gemma2, batch)).abs().max() > 1


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_any_dtype_mean_the_same(kind, tiny_llama, scorers):
    """Boolean and float masks give the results of integer masks."""
    x = normal(1, ROWS, WIDTH)
    y = normal(2, ROWS, WIDTH)

    def results(dtype):
        batch = ragged_batch(3)
        batch["mask"] = batch["mask"].to(dtype)
        mask = MASK.to(dtype)
        with torch.no_grad():
            return [
                sft.token_logprobs(tiny_llama, batch),
                *ppo.token_logprobs_and_entropy(tiny_llama, batch),
                ppo.token_values(scorers["llama"], batch),
                ppo.masked_mean(x, mask),
                ppo.masked_whiten(x, mask),
                ppo.token_rewards(x[:, 0], x, y, mask, 0.1),
                *ppo.gae(x, y, mask, 0.9, 0.8),
                ppo.explained_variance(x, y, mask),
            ]

    for ours, theirs in zip(results(kind), results(torch.long), strict=True):
        assert torch.equal(ours, theirs)


def dense_logprobs(model, batch, temperature):
    """All logits at once by model.forward, for gradients."""
    logits = model(input_ids=batch["inputs"], attention_mask=batch["attention_mask"]).logits
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, batch["targets"][..., None])[..., 0] * batch["mask"]


def set_chunk(monkeypatch, model, tokens):
    """Set the chunk size of head and softmax, which depends on the vocabulary size."""
    monkeypatch.setattr(model.config.get_text_config(), "vocab_size", 40_000_000 // tokens)


def count_heads(monkeypatch, script):
    """List that gets the number of tokens of each call of the head, recomputation included."""
    calls = []
    head_logits = script.head_logits

    def counted(model, hidden):
        calls.append(len(hidden))
        return head_logits(model, hidden)

    monkeypatch.setattr(script, "head_logits", counted)
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_token_logprobs_is_the_dense_one(bias, policy, monkeypatch):
    """One chunk and chunks of four tokens give the values and gradients of all logits at once."""
    policy = copy.deepcopy(policy)
    batch = ragged_batch(4)
    temperature = 0.7
    head = policy.get_output_embeddings()
    if bias:
        head.bias = torch.nn.Parameter(normal(6, VOCAB))
    weights = normal(5, *batch["mask"].shape)
    ppo_calls = count_heads(monkeypatch, ppo)
    sft_calls = count_heads(monkeypatch, sft)
    for is_frozen in (False, True):
        head.requires_grad_(not is_frozen)
        dense = dense_logprobs(policy, batch, temperature)
        (weights * dense).sum().backward()
        dense_gradient = gradients(policy)
        for tokens, num_chunks in ((100, 1), (4, 9)):
            set_chunk(monkeypatch, policy, tokens)
            logprobs, entropy = ppo.token_logprobs_and_entropy(policy, batch, temperature)
            assert len(ppo_calls) == num_chunks and sum(ppo_calls) == 33
            assert_near(logprobs, dense.detach(), atol=1e-5)
            assert not entropy.requires_grad
            if not bias:
                _, slow_entropy = slow_logprobs(policy, batch, temperature)
                assert_near(entropy, slow_entropy, atol=1e-5)
            (weights * logprobs).sum().backward()
            assert distance(gradients(policy), dense_gradient) < 1e-6
            logprobs = sft.token_logprobs(policy, batch, temperature)
            assert len(sft_calls) == num_chunks and sum(sft_calls) == 33
            assert_near(logprobs, dense.detach(), atol=1e-5)
            (weights * logprobs).sum().backward()
            assert distance(gradients(policy), dense_gradient) < 1e-6
            ppo_calls.clear()
            sft_calls.clear()


def test_gradient_in_chunks_is_summed_in_float32_under_autocast(tiny_qwen2, monkeypatch):
    """Chunks of one token lose no precision against a single chunk."""
    batch = ragged_batch(4)
    head_gradients = {}
    all_gradients = {}
    for name, tokens, dtype in (
        ("exact", 1000, "float32"),
        ("one", 1000, "bfloat16"),
        ("many", 1, "bfloat16"),
    ):
        set_chunk(monkeypatch, tiny_qwen2, tokens)
        monkeypatch.setattr(tiny_qwen2, "compute_dtype", dtype)
        logprobs, entropy = ppo.token_logprobs_and_entropy(tiny_qwen2, batch)
        assert logprobs.dtype == entropy.dtype == torch.float32
        logprobs.sum().backward()
        head_gradients[name] = tiny_qwen2.get_output_embeddings().weight.grad.clone()
        all_gradients[name] = gradients(tiny_qwen2)
    for result in (head_gradients, all_gradients):
        assert 1e-3 < distance(result["one"], result["exact"]) < 5e-2
        one_chunk = distance(result["one"], result["exact"])
        assert distance(result["many"], result["exact"]) < 1.2 * one_chunk


@pytest.mark.parametrize("tokens", [4, 1000])
def test_a_token_of_probability_zero_has_no_entropy(tokens, tiny_llama, monkeypatch):
    """Logits of -inf keep entropy and gradients finite; the log-prob of such a token is -inf."""
    batch = ragged_batch(4)
    mask = batch["mask"].bool()
    is_banned = torch.arange(VOCAB) >= VOCAB // 2
    head_logits = ppo.head_logits
    monkeypatch.setattr(
        ppo, "head_logits", lambda m, x: head_logits(m, x).masked_fill(is_banned, -math.inf)
    )
    set_chunk(monkeypatch, tiny_llama, tokens)
    batch["targets"][:] = 5
    logprobs, entropy = ppo.token_logprobs_and_entropy(tiny_llama, batch)
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()
    assert 0 < entropy.max() < math.log(VOCAB / 2)
    logprobs.sum().backward()
    assert torch.isfinite(gradients(tiny_llama)).all()
    batch["targets"][:] = VOCAB - 1
    logprobs, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch)
    assert (logprobs[mask] == -math.inf).all()


@pytest.mark.parametrize("script", [sft, ppo])
def test_chunks_are_recomputed_in_the_backward_pass(script, tiny_llama, monkeypatch):
    """Only the logits of one chunk are in memory; without gradient, nothing is recomputed."""
    batch = ragged_batch(4)
    calls = count_heads(monkeypatch, script)
    set_chunk(monkeypatch, tiny_llama, 16)

    def logprobs_of(batch):
        if script is sft:
            return sft.token_logprobs(tiny_llama, batch)
        return ppo.token_logprobs_and_entropy(tiny_llama, batch)[0]

    logprobs = logprobs_of(batch)
    assert calls == [16, 16, 1]
    logprobs.sum().backward()
    gradients(tiny_llama)
    assert sum(calls) == 2 * 33 and max(calls) == 16
    calls.clear()
    with torch.no_grad():
        assert torch.equal(logprobs, logprobs_of(batch))
    assert calls == [16, 16, 1]


def test_rows_without_a_trained_token_give_zero_and_no_gradient(tiny_llama, scorers):
    """A micro-batch without trained tokens has losses and gradients of 0."""
    batch = ragged_batch(6)
    batch["mask"] = torch.zeros_like(batch["mask"])
    nothing = batch["mask"]
    scorer = scorers["llama"]
    logprobs, entropy = ppo.token_logprobs_and_entropy(tiny_llama, batch)
    values = ppo.token_values(scorer, batch)
    advantages = normal(1, *nothing.shape)
    pg_loss, clipped = ppo.policy_loss(logprobs, logprobs.detach(), advantages, nothing, 0.2)
    vf_loss, _ = ppo.value_loss(values, values.detach(), values.detach(), nothing, 0.2)
    nll = sft.nll_loss(sft.token_logprobs(tiny_llama, batch), nothing)
    (pg_loss + vf_loss + nll).backward()
    assert not logprobs.any() and not entropy.any() and not values.any() and not clipped.any()
    assert not gradients(tiny_llama).any() and not gradients(scorer).any()
    x = normal(2, ROWS, WIDTH)
    assert ppo.masked_mean(x, torch.zeros_like(MASK)) == 0
    assert not ppo.masked_whiten(x, torch.zeros_like(MASK)).any()


def test_masked_mean_has_one_denominator_for_all_rows():
    """The mean over all masked cells, not a mean of row means."""
    x = normal(1, ROWS, WIDTH, shift=2.0) + 1e3 * (1 - MASK)
    inside = [x[i, t].item() for i in range(ROWS) for t in range(WIDTH) if MASK[i, t]]
    assert len(inside) == 20
    assert_near(ppo.masked_mean(x, MASK), sum(inside) / 20)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 5.0])
def test_masked_whiten(shift_mean, scale):
    """Population variance plus 1e-8, visible at scale 1e-4; shift_mean=False keeps the mean."""
    x = normal(1, ROWS, WIDTH, scale=scale, shift=3 * scale) + 1e3 * (1 - MASK)
    inside = [x[i, t].item() for i in range(ROWS) for t in range(WIDTH) if MASK[i, t]]
    mean = sum(inside) / len(inside)
    var = sum((value - mean) ** 2 for value in inside) / len(inside)
    back = 0.0 if shift_mean else mean
    slow = grid(lambda i, t: (x[i, t].item() - mean) / math.sqrt(var + 1e-8) + back)
    assert_near(ppo.masked_whiten(x, MASK, shift_mean), slow)
    if shift_mean:
        assert torch.equal(ppo.masked_whiten(x, MASK), ppo.masked_whiten(x, MASK, True))


def test_masked_whiten_of_equal_numbers_is_finite():
    whitened = ppo.masked_whiten(torch.full((2, 3), 0.7), torch.ones(2, 3))
    assert_near(whitened, torch.zeros(2, 3), atol=1e-2)


def test_every_token_pays_the_kl_and_the_last_gets_the_score():
    scores = normal(1, ROWS)
    logprobs = normal(2, ROWS, WIDTH)
    ref_logprobs = normal(3, ROWS, WIDTH)

    def slow(i, t):
        penalty = 0.3 * (logprobs[i, t].item() - ref_logprobs[i, t].item())
        last = max(u for u in range(WIDTH) if MASK[i, u])
        return (scores[i].item() if t == last else 0.0) - penalty

    assert_near(ppo.token_rewards(scores, logprobs, ref_logprobs, MASK, 0.3), grid(slow))


def test_token_rewards_by_hand():
    """A token that is likelier than under the reference has a negative reward."""
    logprobs = torch.tensor([[0.0, -1.0, -2.0, 0.0]])
    ref_logprobs = torch.tensor([[0.0, -3.0, -1.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0]])
    rewards = ppo.token_rewards(torch.tensor([10.0]), logprobs, ref_logprobs, mask, 0.5)
    assert rewards.tolist() == [[0.0, -1.0, 10.5, 0.0]]


def test_token_rewards_of_an_empty_mask_are_zero():
    zeros = torch.zeros(1, 3)
    assert not ppo.token_rewards(torch.ones(1), torch.ones(1, 3), zeros, zeros, 0.1).any()


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (0.9, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas_within_a_row(gamma, gae_lambda):
    """A_t is the sum of (gamma lambda)^k delta_{t+k} over the actions of a row; V is 0 at its end.

    Rewards and values outside the mask are arbitrary."""
    rewards = normal(1, ROWS, WIDTH)
    values = normal(2, ROWS, WIDTH)

    def slow(i, t):
        actions = [u for u in range(WIDTH) if MASK[i, u]]
        advantage = 0.0
        for k, u in enumerate(u for u in actions if u >= t):
            next_value = values[i, u + 1].item() if u + 1 in actions else 0.0
            delta = rewards[i, u].item() + gamma * next_value - values[i, u].item()
            advantage += (gamma * gae_lambda) ** k * delta
        return advantage

    advantages, returns = ppo.gae(rewards, values, MASK, gamma, gae_lambda)
    assert_near(advantages, grid(slow))
    assert_near(returns, grid(lambda i, t: slow(i, t) + values[i, t].item()))


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value():
    """A = sum of gamma^k r - V, and the returns do not depend on any value."""
    rewards = normal(3, ROWS, WIDTH)
    values = normal(4, ROWS, WIDTH)
    gamma = 0.9

    def discounted(i, t):
        rest = [rewards[i, u].item() for u in range(t, WIDTH) if MASK[i, u]]
        return sum(gamma**k * reward for k, reward in enumerate(rest))

    advantages, returns = ppo.gae(rewards, values, MASK, gamma, 1.0)
    assert_near(returns, grid(discounted))
    assert_near(advantages, grid(lambda i, t: discounted(i, t) - values[i, t].item()))


@pytest.mark.parametrize("epsilon, epsilon_high", [(0.2, None), (0.2, 0.28), (0.1, 0.5)])
def test_policy_loss(epsilon, epsilon_high):
    """The cases of the clip, one token at a time.

    The ratio counts up to 1 + epsilon_high for positive advantages, down to 1 - epsilon for
    negative ones. The gradient is 0 where clipped, otherwise -weight * advantage * ratio."""
    old_logprobs = normal(1, ROWS, WIDTH, shift=-3.0)  # arbitrary outside the mask
    logprobs = (old_logprobs + normal(2, ROWS, WIDTH, scale=0.8)).requires_grad_()
    advantages = normal(3, ROWS, WIDTH)
    weights = MASK * (1 + torch.arange(ROWS)[:, None]) / 50  # a different weight per row
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    loss = 0.0
    gradient = torch.zeros(ROWS, WIDTH).double()
    clipped = torch.zeros(ROWS, WIDTH).bool()
    for i in range(ROWS):
        for t in range(WIDTH):
            weight = weights[i, t].item()
            advantage = advantages[i, t].item()
            ratio = math.exp(logprobs[i, t].item() - old_logprobs[i, t].item())
            if advantage > 0 and ratio > high:
                used = high
                clipped[i, t] = bool(MASK[i, t])
            elif advantage < 0 and ratio < 1 - epsilon:
                used = 1 - epsilon
                clipped[i, t] = bool(MASK[i, t])
            else:
                used = ratio
                gradient[i, t] = -weight * advantage * ratio
            loss -= weight * advantage * used
    both_sides = clipped & (advantages > 0), clipped & (advantages < 0)
    assert all(side.any() for side in both_sides) and (MASK.bool() & ~clipped).any()
    ours, ours_clipped = ppo.policy_loss(
        logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high
    )
    ours.backward()
    assert_near(ours, loss)
    assert_near(logprobs.grad, gradient)
    assert torch.equal(ours_clipped, clipped)
    assert (logprobs.grad[clipped] == 0).all() and (logprobs.grad[MASK == 0] == 0).all()


def test_policy_loss_before_the_first_update():
    """At ratio 1 nothing is clipped; loss and gradient are minus the weighted advantages."""
    logprobs = (normal(1, ROWS, WIDTH) * MASK).requires_grad_()
    advantages = normal(2, ROWS, WIDTH)
    weights = MASK / MASK.sum()
    loss, clipped = ppo.policy_loss(logprobs, logprobs.detach(), advantages, weights, 0.2)
    loss.backward()
    assert_near(loss, -(weights * advantages).sum())
    assert_near(logprobs.grad, -weights * advantages)
    assert not clipped.any()


@pytest.mark.parametrize(
    "log_ratio, advantage, weight, expected, is_clipped",
    [
        (1000.0, 2.0, 1.0, -2 * 1.3, True),
        (1000.0, 0.0, 1.0, 0.0, False),
        (1000.0, -2.0, 1.0, 2 * math.exp(20), False),
        (1000.0, -2.0, 0.0, 0.0, False),
        (-1000.0, 2.0, 1.0, 0.0, False),
        (-1000.0, -2.0, 1.0, 2 * 0.8, True),
    ],
)
def test_policy_loss_of_a_ratio_beyond_float32(log_ratio, advantage, weight, expected, is_clipped):
    """The ratio is cut at exp(20), which keeps loss and gradient finite."""
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, clipped = ppo.policy_loss(
        logprobs,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.tensor([[weight]]),
        0.2,
        epsilon_high=0.3,
    )
    loss.backward()
    assert_near(loss, expected)
    assert logprobs.grad == 0
    assert clipped == is_clipped


def test_policy_loss_cuts_no_ratio_below_exp_20():
    """A large ratio with a negative advantage keeps its gradient, -A * ratio."""
    logprobs = torch.tensor([[19.9]], requires_grad=True)
    ones = torch.ones(1, 1)
    loss, clipped = ppo.policy_loss(logprobs, torch.zeros(1, 1), -ones, ones, 0.2)
    loss.backward()
    assert_near(logprobs.grad, [[math.exp(19.9)]])
    assert not clipped


@pytest.mark.parametrize("value_clip", [0.2, 1.0])
def test_value_loss(value_clip):
    """Half the larger square, of the value or of the value clipped around the old one."""
    old_values = normal(1, ROWS, WIDTH)
    returns = normal(3, ROWS, WIDTH)
    values = (old_values + normal(2, ROWS, WIDTH, scale=0.7)).requires_grad_()
    weights = MASK * (1 + torch.arange(ROWS)[:, None]) / 50
    loss = 0.0
    gradient = torch.zeros(ROWS, WIDTH).double()
    clipped = torch.zeros(ROWS, WIDTH).bool()
    for i in range(ROWS):
        for t in range(WIDTH):
            weight = weights[i, t].item()
            value = values[i, t].item()
            old = old_values[i, t].item()
            target = returns[i, t].item()
            near = min(max(value, old - value_clip), old + value_clip)
            if abs(near - target) > abs(value - target):
                square = (near - target) ** 2
                clipped[i, t] = bool(MASK[i, t])
            else:
                square = (value - target) ** 2
                gradient[i, t] = weight * (value - target)
            loss += weight * 0.5 * square
    is_outside = (values - old_values).abs() > value_clip
    assert clipped.any() and (MASK.bool() & ~clipped & is_outside).any()
    ours, ours_clipped = ppo.value_loss(values, old_values, returns, weights, value_clip)
    ours.backward()
    assert_near(ours, loss)
    assert_near(values.grad, gradient)
    assert torch.equal(ours_clipped, clipped)


def test_explained_variance():
    """1 - Var(returns - values) / Var(returns), over the mask only."""
    returns = normal(1, ROWS, WIDTH, shift=2.0) + 1e3 * (1 - MASK)
    values = returns + normal(2, ROWS, WIDTH, scale=0.5, shift=-1.0) - 1e4 * (1 - MASK)
    cells = [(i, t) for i in range(ROWS) for t in range(WIDTH) if MASK[i, t]]

    def variance(numbers):
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    errors = [returns[i, t].item() - values[i, t].item() for i, t in cells]
    slow = 1 - variance(errors) / variance([returns[i, t].item() for i, t in cells])
    assert 0.5 < slow < 0.9
    assert_near(ppo.explained_variance(returns, values, MASK), slow)


def test_explained_variance_of_special_values():
    """1 for the returns plus a constant, 0 for a constant, -3 for minus the returns.

    NaN if the returns are constant."""
    returns = normal(1, ROWS, WIDTH)
    assert_near(ppo.explained_variance(returns, returns, MASK), 1.0)
    assert_near(ppo.explained_variance(returns, returns + 5, MASK), 1.0)
    assert_near(ppo.explained_variance(returns, torch.full_like(returns, 0.7), MASK), 0.0)
    assert_near(ppo.explained_variance(returns, -returns, MASK), -3.0)
    assert ppo.explained_variance(torch.full_like(returns, 0.7), returns, MASK).isnan()
    assert ppo.explained_variance(returns, returns, torch.zeros_like(MASK)).isnan()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_explained_variance_does_not_depend_on_the_scale_of_the_reward(scale):
    """Equal for scaled returns and values. NaN for constant returns, whatever their mean rounds to,
    even if the values vary."""
    returns = normal(1, ROWS, WIDTH, shift=2.0)
    values = returns + normal(2, ROWS, WIDTH, scale=0.5)
    expected = ppo.explained_variance(returns, values, MASK)
    assert 0.5 < expected < 0.9
    assert_near(ppo.explained_variance(scale * returns, scale * values, MASK), expected)
    for constant in (0.0, 0.7, -1 / 3, 1e3):
        constants = torch.full_like(returns, constant * scale)
        assert ppo.explained_variance(constants, scale * values, MASK).isnan()
    wide = torch.full((64, 100), scale / 3)
    assert ppo.explained_variance(wide, torch.zeros_like(wide), torch.ones_like(wide)).isnan()


def test_nll_loss():
    """Minus the weighted sum of log-probs; with the usual weights, the mean over trained tokens."""
    logprobs = (normal(1, ROWS, WIDTH) * MASK).requires_grad_()
    loss = sft.nll_loss(logprobs, MASK / MASK.sum())
    loss.backward()
    inside = [logprobs[i, t].item() for i in range(ROWS) for t in range(WIDTH) if MASK[i, t]]
    assert_near(loss, -sum(inside) / 20)
    assert_near(logprobs.grad, MASK / -20)
    uneven = normal(2, ROWS, WIDTH).abs() * MASK
    cells = zip(uneven.flatten().tolist(), logprobs.flatten().tolist())
    assert_near(sft.nll_loss(logprobs, uneven), -sum(weight * logp for weight, logp in cells))


@pytest.mark.parametrize("margin", [None, 0.7])
def test_bradley_terry_loss(margin):
    """log(1 + exp(-(chosen - rejected - margin))) and its derivative, finite for large scores."""
    chosen = torch.tensor([1.5, -0.3, 0.2, 300.0, -300.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.5, 0.4, 0.2, -300.0, 300.0, -1.0], requires_grad=True)
    margins = None if margin is None else margin * torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 4.0])
    losses = []
    slopes = []
    for i in range(6):
        difference = chosen[i].item() - rejected[i].item()
        difference -= 0.0 if margin is None else margins[i].item()
        losses.append(math.log1p(math.exp(-difference)) if difference > -500 else -difference)
        slopes.append(-1 / (1 + math.exp(min(difference, 700))))
    ours = reward_model.bradley_terry_loss(chosen, rejected, margins)
    ours.sum().backward()
    assert ours.shape == (6,)
    assert_near(ours, losses)
    assert_near(chosen.grad, slopes)
    assert_near(rejected.grad, [-slope for slope in slopes])


def slow_heads(model, sequences):
    """The score head at every position of every row, without padding, as loops."""
    weight = model.score.weight[0].tolist()
    rows = []
    for ids in sequences:
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].tolist()
        rows.append([sum(h * w for h, w in zip(position, weight)) for position in hidden])
    return rows


def score_batch(sequences, pad_id=0):
    """A batch of whole sequences, right-padded."""
    mask = [[1] * len(ids) for ids in sequences]
    return {
        "inputs": common.pad_rows(sequences, CPU).masked_fill(
            common.pad_rows(mask, CPU) == 0, pad_id
        ),
        "attention_mask": common.pad_rows(mask, CPU),
    }


@pytest.mark.parametrize("pad_id", [0, 1, 17])
def test_sequence_scores(pad_id, scorer):
    """The head at the last real token of each row, although rows contain PAD and end in it."""
    sequences = sequences_of(ragged_batch(7))
    sequences[0][-1] = pad_id
    batch = score_batch(sequences, pad_id)
    expected = [row[-1] for row in slow_heads(scorer, sequences)]
    for function in (reward_model.sequence_scores, common.last_token_scores):
        scores = function(scorer, at_last_token(batch)).flatten()
        assert scores.shape == (6,) and scores.dtype == torch.float32
        assert_near(scores, expected, atol=1e-5)


def test_sequence_scores_are_the_scores_of_transformers(scorers):
    """Without PAD inside a row, model.forward reads the score at the same token."""
    sequences = [[5 if i == 0 else i for i in ids] for ids in sequences_of(ragged_batch(8))]
    batch = score_batch(sequences)
    for model in scorers.values():
        with torch.no_grad():
            scores = reward_model.sequence_scores(model, batch)
            theirs = model(batch["inputs"], attention_mask=batch["attention_mask"]).logits[:, 0]
        assert_near(scores, theirs, atol=1e-5)


def test_token_values(scorer):
    """Column t is the head at inputs[:, t], before targets[:, t] is sampled; 0 outside the mask."""
    batch = ragged_batch(9)
    heads = slow_heads(scorer, sequences_of(batch))
    values = ppo.token_values(scorer, batch)
    assert values.shape == batch["mask"].shape and values.dtype == torch.float32
    assert_near(values, grid(lambda i, t: heads[i][t], batch["mask"]), atol=1e-5)
