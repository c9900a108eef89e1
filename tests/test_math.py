"""The tensor math of the scripts, each function against a slow loop in float64 that follows the formula."""

import copy
import math

import pytest
import torch
from conftest import VOCAB, distance, gradients, ragged_batch

import common
import ppo
import reward_model
import sft

# rows: prompt, completion and padding of different lengths; one row full, one with a single action
MASK = torch.tensor([
    [0, 0, 1, 1, 1, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0, 1, 1, 1],
    [1, 1, 1, 0, 0, 0, 0, 0, 0],
])
ROWS, WIDTH = MASK.shape


def normal(seed, *shape, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def assert_near(ours, theirs, rtol=1e-5, atol=1e-6):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours.detach().double(), theirs, rtol=rtol, atol=atol)


def grid(entry, mask=MASK):
    """Rows of entry(i, t) where the mask is 1, else 0."""
    return [
        [entry(i, t) if on else 0.0 for t, on in enumerate(row)]
        for i, row in enumerate(mask.tolist())
    ]


def slow_logprobs(model, batch, mask, temperature):
    """Row by row without padding, through the model's own forward and head -> logprobs, entropy."""
    logprobs, entropy = ([[0.0] * mask.shape[1] for _ in mask] for _ in range(2))
    for i, length in enumerate(batch.lengths):
        ids = batch.input_ids[i, :length].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        for t in range(length - 1):
            if mask[i, t]:
                scaled = [x / temperature for x in logits[t]]
                log_normaliser = math.log(sum(math.exp(x) for x in scaled))
                logprobs[i][t] = scaled[ids[t + 1]] - log_normaliser
                entropy[i][t] = -sum(
                    math.exp(x - log_normaliser) * (x - log_normaliser)
                    for x in scaled
                    if x > -math.inf
                )
    return logprobs, entropy


@pytest.mark.parametrize("script, temperature", [(sft, 1.0), (ppo, 0.7)])
def test_token_logprobs(script, temperature, policy):
    """Shift, gather, temperature, cap and mask are those of the loop; nothing of prompt and padding."""
    batch = ragged_batch(1)
    mask = batch.completion_mask[:, 1:]
    inputs = (policy, batch.input_ids, batch.attention_mask, mask, temperature)
    logprobs, entropy = script.token_logprobs(*inputs)
    slow = slow_logprobs(policy, batch, mask, temperature)
    assert_near(logprobs, slow[0], atol=1e-5)
    assert_near(entropy, slow[1], atol=1e-5)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    assert mask.sum() == sum((7, 1, 12, 4, 2, 7))


def test_token_logprobs_defaults_to_temperature_one(tiny_llama):
    """And a temperature of 0.7 is another distribution."""
    batch = ragged_batch(2)
    inputs = (tiny_llama, batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:])
    with torch.no_grad():
        assert torch.equal(ppo.token_logprobs(*inputs)[0], ppo.token_logprobs(*inputs, 1.0)[0])
        assert (
            ppo.token_logprobs(*inputs)[0] - ppo.token_logprobs(*inputs, 0.7)[0]
        ).abs().max() > 0.5


def test_token_logprobs_keep_the_cap_of_gemma2(tiny_gemma2, monkeypatch):
    """The cap is small enough here that losing it shows, and it stays within +-cap."""
    batch = ragged_batch(2)
    mask = batch.completion_mask[:, 1:]
    inputs = (tiny_gemma2, batch.input_ids, batch.attention_mask, mask)
    with torch.no_grad():
        capped, _ = ppo.token_logprobs(*inputs)
        assert capped.min() > -4 - math.log(64)
        monkeypatch.setattr(tiny_gemma2.config, "final_logit_softcapping", None)
        assert (capped - ppo.token_logprobs(*inputs)[0]).abs().max() > 1


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_dtype_mean_the_same(kind, tiny_llama):
    """Bool, integer and float masks give one result in every function that takes one."""
    batch = ragged_batch(3)
    mask = batch.completion_mask[:, 1:]
    inputs = (tiny_llama, batch.input_ids, batch.attention_mask)
    with torch.no_grad():
        ours, theirs = (ppo.token_logprobs(*inputs, m)[0] for m in (mask.to(kind), mask))
    assert torch.equal(ours, theirs)
    x, y = normal(1, ROWS, WIDTH), normal(2, ROWS, WIDTH)
    results = [
        (
            ppo.masked_mean(x, m),
            ppo.masked_whiten(x, m),
            ppo.token_rewards(x[:, 0], x, y, m, 0.1),
            *ppo.gae(x, y, m, 0.9, 0.8),
        )
        for m in (MASK.to(kind), MASK)
    ]
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def dense_logprobs(model, batch, mask, temperature):
    """All logits at once through the model's own head, for gradients."""
    logits = (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    )
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * mask


def count_heads(monkeypatch):
    """Rows of logits in each call of the head, recomputations too."""
    calls, scaled = [], common._scaled
    monkeypatch.setattr(
        common, "_scaled", lambda m, logits: (calls.append(len(logits)), scaled(m, logits))[1]
    )
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_token_logprobs_is_the_dense_one(bias, policy, monkeypatch):
    """In one chunk and in chunks of four tokens, values and gradients are those of all logits at once; with
    a frozen head too."""
    policy, (batch, temperature) = copy.deepcopy(policy), (ragged_batch(4), 0.7)
    head = policy.get_output_embeddings()
    if bias:
        head.bias = torch.nn.Parameter(normal(6, VOCAB))
    mask = batch.completion_mask[:, 1:]
    weights = normal(5, *mask.shape)
    calls = count_heads(monkeypatch)
    for frozen in (False, True):
        head.requires_grad_(not frozen)
        dense = dense_logprobs(policy, batch, mask, temperature)
        (weights * dense).sum().backward()
        dense_gradient = gradients(policy)
        for size, chunks in ((100 * VOCAB, 1), (4 * VOCAB, 9)):
            monkeypatch.setattr(common, "CHUNK", size)
            inputs = (policy, batch.input_ids, batch.attention_mask, mask, temperature)
            logprobs, entropy = ppo.token_logprobs(*inputs)
            assert len(calls) == chunks and sum(calls) == 33
            assert_near(logprobs, dense.detach(), atol=1e-5)
            assert not entropy.requires_grad
            if not bias:
                assert_near(entropy, slow_logprobs(policy, batch, mask, temperature)[1], atol=1e-5)
            (weights * logprobs).sum().backward()
            assert distance(gradients(policy), dense_gradient) < 1e-6
            calls.clear()


def test_gradient_in_chunks_is_summed_in_float32_under_autocast(tiny_qwen2, monkeypatch):
    """Many chunks of one row: as near to float32's gradient as one chunk in bfloat16 is."""
    batch = ragged_batch(4)
    mask = batch.completion_mask[:, 1:]
    inputs = (tiny_qwen2, batch.input_ids, batch.attention_mask, mask)
    found = {}
    for name, size, half in (("exact", 2**30, False), ("one", 2**30, True), ("many", VOCAB, True)):
        monkeypatch.setattr(common, "CHUNK", size)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logprobs, entropy = ppo.token_logprobs(*inputs)
        assert logprobs.dtype == entropy.dtype == torch.float32
        logprobs.sum().backward()
        found[name] = tiny_qwen2.get_output_embeddings().weight.grad.clone(), gradients(tiny_qwen2)
    for exact, one, many in zip(*found.values()):
        assert 1e-3 < distance(one, exact) < 5e-2
        assert distance(many, exact) < 1.2 * distance(one, exact)


@pytest.mark.parametrize("rows", [4, 1000])
def test_a_token_of_probability_zero_has_no_entropy(rows, tiny_llama, monkeypatch):
    """A model may forbid tokens by a logit of - infinity; in chunks too. Its log-prob is - infinity, which
    stops a run, not some number."""
    monkeypatch.setattr(common, "CHUNK", rows * VOCAB)
    batch, scaled = ragged_batch(4), common._scaled
    mask = batch.completion_mask[:, 1:]
    batch.input_ids[:] = 5
    banned = torch.arange(VOCAB) >= VOCAB // 2
    monkeypatch.setattr(common, "_scaled", lambda m, x: scaled(m, x).masked_fill(banned, -math.inf))
    logprobs, entropy = ppo.token_logprobs(tiny_llama, batch.input_ids, batch.attention_mask, mask)
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()
    assert 0 < entropy.max() < math.log(VOCAB / 2)
    logprobs.sum().backward()
    assert torch.isfinite(gradients(tiny_llama)).all()
    batch.input_ids[:] = VOCAB - 1
    logprobs, _ = ppo.token_logprobs(tiny_llama, batch.input_ids, batch.attention_mask, mask)
    assert (logprobs[mask.bool()] == -math.inf).all()


def test_chunks_are_recomputed_in_the_backward_pass(tiny_llama, monkeypatch):
    """So that the logits of one chunk only are alive; without gradient nothing runs twice."""
    batch = ragged_batch(4)
    calls = count_heads(monkeypatch)
    monkeypatch.setattr(common, "CHUNK", 16 * VOCAB)
    inputs = (tiny_llama, batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:])
    logprobs, _ = ppo.token_logprobs(*inputs)
    forward, all_tokens = list(calls), 33
    assert sum(forward) == all_tokens and max(forward) == 16
    logprobs.sum().backward()
    gradients(tiny_llama)
    assert sum(calls) == 2 * all_tokens and max(calls) == 16
    calls.clear()
    with torch.no_grad():
        assert torch.equal(logprobs, ppo.token_logprobs(*inputs)[0])
    assert calls == forward


def test_rows_without_a_trained_token_give_zero_and_no_gradient(tiny_llama, scorers):
    """A micro-batch that trains on nothing is finite and leaves every gradient at 0."""
    batch, scorer = ragged_batch(6), scorers["llama"]
    nothing = torch.zeros_like(batch.completion_mask[:, 1:])
    inputs = (batch.input_ids, batch.attention_mask, nothing)
    logprobs, entropy = ppo.token_logprobs(tiny_llama, *inputs)
    values = ppo.token_values(scorer, *inputs)
    pg_loss, clipped = ppo.policy_loss(
        logprobs, logprobs.detach(), normal(1, *nothing.shape), nothing, 0.2
    )
    vf_loss, _ = ppo.value_loss(values, values.detach(), values.detach(), nothing, 0.2)
    (pg_loss + vf_loss + sft.sft_loss(logprobs, nothing)).backward()
    assert not logprobs.any() and not entropy.any() and not values.any() and not clipped.any()
    assert not gradients(tiny_llama).any() and not gradients(scorer).any()
    x = normal(2, ROWS, WIDTH)
    assert ppo.masked_mean(x, torch.zeros_like(MASK)) == 0
    assert not ppo.masked_whiten(x, torch.zeros_like(MASK)).any()


def test_masked_mean():
    """One denominator for all rows: not a mean of the rows' means. What lies outside plays no part."""
    x = normal(1, ROWS, WIDTH, shift=2.0) + 1e3 * (1 - MASK)
    total = count = 0
    for i in range(ROWS):
        for t in range(WIDTH):
            if MASK[i, t]:
                total, count = total + x[i, t].item(), count + 1
    assert count == 20
    assert_near(ppo.masked_mean(x, MASK), total / count)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 5.0])
def test_masked_whiten(shift_mean, scale):
    """Population variance plus 1e-8 (which shows at scale 1e-4); shift_mean=False keeps the mean."""
    x = normal(1, ROWS, WIDTH, scale=scale, shift=3 * scale) + 1e3 * (1 - MASK)
    inside = [x[i, t].item() for i in range(ROWS) for t in range(WIDTH) if MASK[i, t]]
    mean = sum(inside) / len(inside)
    var = sum((value - mean) ** 2 for value in inside) / len(inside)
    back = 0.0 if shift_mean else mean
    slow = grid(lambda i, t: (x[i, t].item() - mean) / math.sqrt(var + 1e-8) + back)
    assert_near(ppo.masked_whiten(x, MASK, shift_mean), slow)
    assert shift_mean is False or torch.equal(
        ppo.masked_whiten(x, MASK), ppo.masked_whiten(x, MASK, True)
    )


def test_masked_whiten_of_equal_numbers_is_finite():
    """A batch whose advantages are all alike teaches nothing, and divides by nothing."""
    assert_near(
        ppo.masked_whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)), torch.zeros(2, 3), atol=1e-2
    )


def test_token_rewards():
    """Every action pays kl_coef for a log-ratio above 0; the score comes once, at the last action."""
    scores, logprobs, ref_logprobs = normal(1, ROWS), normal(2, ROWS, WIDTH), normal(3, ROWS, WIDTH)

    def slow(i, t):
        penalty = 0.3 * (logprobs[i, t].item() - ref_logprobs[i, t].item())
        last = max(u for u in range(WIDTH) if MASK[i, u])
        return (scores[i].item() if t == last else 0.0) - penalty

    assert_near(ppo.token_rewards(scores, logprobs, ref_logprobs, MASK, 0.3), grid(slow))


def test_token_rewards_by_hand():
    """Two actions, kl_coef 0.5: the likelier than under the reference, the lower the reward."""
    logprobs, ref_logprobs = (
        torch.tensor([[0.0, -1.0, -2.0, 0.0]]),
        torch.tensor([[0.0, -3.0, -1.0, 0.0]]),
    )
    rewards = ppo.token_rewards(
        torch.tensor([10.0]), logprobs, ref_logprobs, torch.tensor([[0, 1, 1, 0]]), 0.5
    )
    assert rewards.tolist() == [[0.0, -1.0, 10.5, 0.0]]


def test_token_rewards_of_a_row_that_takes_no_part():
    """A row whose mask is all 0 gets no score either."""
    rewards = ppo.token_rewards(
        torch.ones(1), torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), 0.1
    )
    assert not rewards.any()


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (0.9, 0.0)])
def test_gae(gamma, lam):
    """A_t is the sum of (gamma lam)^k delta_{t+k} over the row's own actions, V past the last being 0."""
    rewards, values = normal(1, ROWS, WIDTH), normal(2, ROWS, WIDTH)  # rubbish outside the mask

    def slow(i, t):
        actions = [u for u in range(WIDTH) if MASK[i, u]]
        advantage = 0.0
        for k, u in enumerate(u for u in actions if u >= t):
            next_value = values[i, u + 1].item() if u + 1 in actions else 0.0
            delta = rewards[i, u].item() + gamma * next_value - values[i, u].item()
            advantage += (gamma * lam) ** k * delta
        return advantage

    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    assert_near(advantages, grid(slow))
    assert_near(returns, grid(lambda i, t: slow(i, t) + values[i, t].item()))


def test_gae_with_lam_one_is_the_discounted_return_less_the_value():
    """No value but that of the state itself enters: A = sum of gamma^k r - V, and returns hold no value."""
    rewards, values, gamma = normal(3, ROWS, WIDTH), normal(4, ROWS, WIDTH), 0.9

    def discounted(i, t):
        rest = [rewards[i, u].item() for u in range(t, WIDTH) if MASK[i, u]]
        return sum(gamma**k * reward for k, reward in enumerate(rest))

    advantages, returns = ppo.gae(rewards, values, MASK, gamma, 1.0)
    assert_near(returns, grid(discounted))
    assert_near(advantages, grid(lambda i, t: discounted(i, t) - values[i, t].item()))


@pytest.mark.parametrize("epsilon, epsilon_high", [(0.2, None), (0.2, 0.28), (0.1, 0.5)])
def test_policy_loss(epsilon, epsilon_high):
    """By cases: a rise of a good token counts up to 1 + epsilon_high, a fall of a bad one down to
    1 - epsilon; clipped tokens have no gradient, the others - weight * advantage * ratio."""
    old_logprobs = normal(
        1, ROWS, WIDTH, shift=-3.0
    )  # rubbish outside the mask: weights are 0 there
    logprobs = (old_logprobs + normal(2, ROWS, WIDTH, scale=0.8)).requires_grad_()
    advantages = normal(3, ROWS, WIDTH)
    weights = MASK * (1 + torch.arange(ROWS)[:, None]) / 50  # rows weigh differently
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    loss, gradient, clipped = (
        0.0,
        torch.zeros(ROWS, WIDTH).double(),
        torch.zeros(ROWS, WIDTH).bool(),
    )
    for i in range(ROWS):
        for t in range(WIDTH):
            weight, advantage = weights[i, t].item(), advantages[i, t].item()
            ratio = math.exp(logprobs[i, t].item() - old_logprobs[i, t].item())
            if advantage > 0 and ratio > high:
                used, clipped[i, t] = high, bool(MASK[i, t])
            elif advantage < 0 and ratio < 1 - epsilon:
                used, clipped[i, t] = 1 - epsilon, bool(MASK[i, t])
            else:
                used, gradient[i, t] = ratio, -weight * advantage * ratio
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
    """At ratio 1 nothing is clipped, the loss is - sum of weights * advantages, and so is the gradient."""
    logprobs = (normal(1, ROWS, WIDTH) * MASK).requires_grad_()
    advantages, weights = normal(2, ROWS, WIDTH), MASK / MASK.sum()
    loss, clipped = ppo.policy_loss(logprobs, logprobs.detach(), advantages, weights, 0.2)
    loss.backward()
    assert_near(loss, -(weights * advantages).sum())
    assert_near(logprobs.grad, -weights * advantages)
    assert not clipped.any()


@pytest.mark.parametrize("value_clip", [0.2, 1.0])
def test_value_loss(value_clip):
    """Half of the larger square, of the value itself or of the value at most value_clip from the old one."""
    old_values, returns = normal(1, ROWS, WIDTH), normal(3, ROWS, WIDTH)
    values = (old_values + normal(2, ROWS, WIDTH, scale=0.7)).requires_grad_()
    weights = MASK * (1 + torch.arange(ROWS)[:, None]) / 50
    loss, gradient, clipped = (
        0.0,
        torch.zeros(ROWS, WIDTH).double(),
        torch.zeros(ROWS, WIDTH).bool(),
    )
    for i in range(ROWS):
        for t in range(WIDTH):
            weight, value, old = weights[i, t].item(), values[i, t].item(), old_values[i, t].item()
            target = returns[i, t].item()
            near = min(max(value, old - value_clip), old + value_clip)
            if abs(near - target) > abs(value - target):
                square, clipped[i, t] = (near - target) ** 2, bool(MASK[i, t])
            else:
                square, gradient[i, t] = (value - target) ** 2, weight * (value - target)
            loss += weight * 0.5 * square
    assert (
        clipped.any()
        and (MASK.bool() & ~clipped & ((values - old_values).abs() > value_clip)).any()
    )
    ours, ours_clipped = ppo.value_loss(values, old_values, returns, weights, value_clip)
    ours.backward()
    assert_near(ours, loss)
    assert_near(values.grad, gradient)
    assert torch.equal(ours_clipped, clipped)


def test_sft_loss():
    """The mean negative log-likelihood over all trained tokens, for these weights."""
    logprobs = (normal(1, ROWS, WIDTH) * MASK).requires_grad_()
    weights = MASK / MASK.sum()
    loss = 0.0
    for i in range(ROWS):
        for t in range(WIDTH):
            loss -= logprobs[i, t].item() / 20 if MASK[i, t] else 0.0
    ours = sft.sft_loss(logprobs, weights)
    ours.backward()
    assert_near(ours, loss)
    assert_near(logprobs.grad, MASK / -20)
    uneven = normal(2, ROWS, WIDTH).abs() * MASK
    slow = -sum(
        uneven[i, t].item() * logprobs[i, t].item() for i in range(ROWS) for t in range(WIDTH)
    )
    assert_near(sft.sft_loss(logprobs, uneven), slow)


@pytest.mark.parametrize("margin", [None, 0.7])
def test_bradley_terry_loss(margin):
    """log(1 + exp(-(chosen - rejected - margin))) for each pair, and its slope; far pairs stay finite."""
    chosen = torch.tensor([1.5, -0.3, 0.2, 300.0, -300.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.5, 0.4, 0.2, -300.0, 300.0, -1.0], requires_grad=True)
    margins = None if margin is None else margin * torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 4.0])
    losses, slopes = [], []
    for i in range(6):
        difference = (
            chosen[i].item() - rejected[i].item() - (0.0 if margin is None else margins[i].item())
        )
        losses.append(math.log1p(math.exp(-difference)) if difference > -500 else -difference)
        slopes.append(-1 / (1 + math.exp(min(difference, 700))))
    ours = reward_model.bradley_terry_loss(chosen, rejected, margins)
    ours.sum().backward()
    assert ours.shape == (6,)
    assert_near(ours, losses)
    assert_near(chosen.grad, slopes)
    assert_near(rejected.grad, [-slope for slope in slopes])


def slow_heads(model, batch):
    """The scalar head at every position of every row, without padding, as loops."""
    weight, rows = model.score.weight[0].tolist(), []
    for ids, length in zip(batch.input_ids, batch.lengths):
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None, :length]).last_hidden_state[0].tolist()
        rows.append([sum(h * w for h, w in zip(position, weight)) for position in hidden])
    return rows


@pytest.mark.parametrize("pad_id", [0, 1, 17])
def test_sequence_scores(pad_id, scorer):
    """The head at the last real token of each row, though rows hold PAD and may end in it."""
    batch = ragged_batch(7)
    for i, length in enumerate(batch.lengths):
        batch.input_ids[i, length:] = pad_id
    batch.input_ids[0, batch.lengths[0] - 1] = pad_id
    scores = reward_model.sequence_scores(scorer, batch.input_ids, batch.attention_mask)
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert_near(scores, [row[-1] for row in slow_heads(scorer, batch)], atol=1e-5)


def test_sequence_scores_are_those_of_transformers(scorers):
    """Where no PAD stands inside a row, the model's own forward pools at the same place."""
    for model in scorers.values():
        batch = ragged_batch(8)
        batch.input_ids[batch.input_ids == 0] = 5
        batch.input_ids[batch.attention_mask == 0] = 0
        with torch.no_grad():
            scores = reward_model.sequence_scores(model, batch.input_ids, batch.attention_mask)
            theirs = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        assert_near(scores, theirs, atol=1e-5)


def test_token_values(scorer):
    """Column t is the head at token t, before token t+1 is chosen; 0 outside the mask."""
    batch = ragged_batch(9)
    mask = batch.completion_mask[:, 1:]
    heads = slow_heads(scorer, batch)
    values = ppo.token_values(scorer, batch.input_ids, batch.attention_mask, mask)
    assert values.shape == mask.shape and values.dtype == torch.float32
    assert_near(values, grid(lambda i, t: heads[i][t], mask), atol=1e-5)
