"""What a result may not depend on: padding, row order, micro-batches, training mode."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CPU, TRAIN, VOCAB, distance, gradients, precise, ragged_batch, ragged_ids

import common
import ppo
import reward_model
import sft

pytestmark = pytest.mark.usefixtures("cut_by_budget_alone")
BUDGETS = [1, 17, 40, 10**6]  # one row at a time, in between, and all at once
TEMPERATURES = [1.0, 0.7]
close = dict(rtol=1e-5, atol=1e-5)


def padded(batch, pad_id, more):
    """The batch with another PAD, and `more` columns of it."""
    ids = [row[:n].tolist() for row, n in zip(batch.input_ids, batch.lengths)]
    masks = [row[:n].tolist() for row, n in zip(batch.completion_mask, batch.lengths)]
    wide = common.pad_batch([*ids, [0] * (max(batch.lengths) + more)], [*masks, [0]], CPU, pad_id)
    tensors = [t[:-1] for t in (wide.input_ids, wide.attention_mask, wide.completion_mask)]
    return common.Batch(*tensors, batch.lengths)


def logprobs_of(model, batch, temperature=0.7):
    mask = batch.completion_mask[:, 1:]
    return ppo.token_logprobs(model, batch.input_ids, batch.attention_mask, mask, temperature)


def heads_of(model, batch):
    mask = batch.completion_mask[:, 1:]
    values = ppo.token_values(model, batch.input_ids, batch.attention_mask, mask)
    return reward_model.sequence_scores(model, batch.input_ids, batch.attention_mask), values


@torch.no_grad()
def variants(function, model):
    """function on a batch, and on the same rows each alone, with more padding, and in another order."""
    batch = ragged_batch(1)
    width, rows = batch.input_ids.shape[1] - 1, range(len(batch.lengths))

    def wide(x):
        return x if x.ndim == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))

    yield function(model, batch)
    alone = [[wide(x) for x in function(model, batch.rows([i]))] for i in rows]
    yield tuple(torch.cat(parts) for parts in zip(*alone))
    for pad_id in (0, 1, 63):
        results = function(model, padded(batch, pad_id, more=9))
        assert all(x.ndim == 1 or not x[:, width:].any() for x in results)
        yield tuple(x if x.ndim == 1 else x[:, :width] for x in results)
    order = [4, 0, 5, 2, 1, 3]
    back = torch.tensor(order).argsort()
    yield tuple(x[back] for x in function(model, batch.rows(order)))


def assert_all_alike(results):
    first, *others = results
    assert len(others) == 5
    for other in others:
        for ours, theirs in zip(other, first):
            torch.testing.assert_close(ours, theirs, **close)


def test_logprobs_depend_on_neither_padding_nor_order(policy):
    """Log-probs and entropies of rows alone, among longer rows, and in another order."""
    assert_all_alike(variants(logprobs_of, policy))


def test_scores_and_values_depend_on_neither_padding_nor_order(scorer):
    """The same for the scalar head, at the last token and at every token."""
    assert_all_alike(variants(heads_of, scorer))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_results_do_not_depend_on_the_micro_batch_budget(name, request, scorers):
    """over_micro_batches puts every result back in its row and column, for one tensor and for two."""
    model, batch = request.getfixturevalue(f"tiny_{name}"), ragged_batch(2)
    with torch.no_grad():
        results = [(logprobs_of(model, batch), lambda *x: ppo.token_logprobs(model, *x, 0.7))]
        results += [
            (heads_of(scorers[name], batch)[1:], lambda *x: ppo.token_values(scorers[name], *x))
        ]
    for whole, function in results:
        for budget in BUDGETS:
            parts = common.over_micro_batches(function, batch, budget, contextlib.nullcontext)
            parts = parts if isinstance(parts, list) else [parts]
            for ours, theirs in zip(parts, whole, strict=True):
                torch.testing.assert_close(ours, theirs, **close)
                assert not ours.requires_grad


def test_scores_of_a_reward_model_do_not_depend_on_the_budget(tiny_dirs, scorers, tmp_path):
    """A saved reward model scores completions as sequence_scores does, in the order of the rows."""
    scorers["llama"].save_pretrained(tmp_path)
    common.tiny_tokenizer().save_pretrained(tmp_path)
    prompts, completions = ragged_ids(3)
    examples = [{"prompt_ids": ids} for ids in prompts]
    tokenizer = common.load_tokenizer(tiny_dirs["llama"])
    batch = common.completion_batch(prompts, completions, CPU)
    with torch.no_grad():
        scores = reward_model.sequence_scores(
            scorers["llama"], batch.input_ids, batch.attention_mask
        )
    for budget in BUDGETS:
        args = SimpleNamespace(reward=str(tmp_path), micro_batch_tokens=budget)
        score = common.RewardModel(args, tokenizer, CPU, contextlib.nullcontext, [1], longest=64)
        torch.testing.assert_close(score(examples, completions), scores, **close)


def test_sft_gradient_does_not_depend_on_the_budget(policy):
    """The gradient summed over micro-batches is that of the whole batch, with rows of uneven lengths."""
    policy, batch = precise(policy), ragged_batch(4)
    tokens, results = batch.completion_mask[:, 1:].sum(), []
    for budget in BUDGETS[::-1]:
        loss_sum, cuts = 0.0, common.micro_batches(batch.lengths, budget)
        for rows in cuts:
            mb = batch.rows(rows)
            mask = mb.completion_mask[:, 1:]
            logprobs, _ = sft.token_logprobs(policy, mb.input_ids, mb.attention_mask, mask)
            loss = sft.sft_loss(logprobs, mask / tokens)
            loss.backward()
            loss_sum += loss.item()
        results.append((len(cuts), loss_sum, gradients(policy)))
    assert [cuts for cuts, _, _ in results][::3] == [1, 6] and results[0][2].norm() > 0.1
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert distance(gradient, results[0][2]) < 1e-6


def test_reward_model_gradient_does_not_depend_on_the_budget(scorer):
    """Pairs of uneven lengths, with margins and the centering term."""
    (prompts, chosen), (_, rejected) = ragged_ids(5), ragged_ids(6)
    rejected = rejected[::-1]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")
    examples = [
        dict(zip(keys, row))
        for row in zip(prompts, chosen, rejected, [0.0, 1.0, 0.5, 0.0, 2.0, 1.0])
    ]
    scorer, results = precise(scorer), []
    for budget in BUDGETS[::-1]:
        loss_sum, cuts = (
            0.0,
            common.micro_batches([reward_model.pair_length(e) for e in examples], budget),
        )
        for rows in cuts:
            picked = [examples[i] for i in rows]
            mb = reward_model.pair_batch(picked, CPU)
            chosen_scores, rejected_scores = reward_model.sequence_scores(
                scorer, mb.input_ids, mb.attention_mask
            ).chunk(2)
            margins = torch.tensor([e["margin"] for e in picked])
            losses = reward_model.bradley_terry_loss(chosen_scores, rejected_scores, margins)
            losses = losses + 0.01 * (chosen_scores + rejected_scores) ** 2
            loss = losses.sum() / len(examples)
            loss.backward()
            loss_sum += loss.item()
        results.append((len(cuts), loss_sum, gradients(scorer)))
    assert [cuts for cuts, _, _ in results][::3] == [1, 6] and results[0][2].norm() > 0.1
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert distance(gradient, results[0][2]) < 1e-6


def rollout(policy, scorer, seed, temperature):
    """A batch with old log-probs off the policy's, so that ratios are not 1, and advantages from GAE."""
    batch, draw = ragged_batch(seed), torch.Generator().manual_seed(seed)
    mask = batch.completion_mask[:, 1:]

    def noise(scale):
        return scale * torch.randn(mask.shape, generator=draw) * mask

    with torch.no_grad():
        old_logprobs = logprobs_of(policy, batch, temperature)[0] + noise(0.3)
        old_values = heads_of(scorer, batch)[1] + noise(0.3)
    scores = torch.randn(len(mask), generator=draw)
    rewards = ppo.token_rewards(scores, old_logprobs, old_logprobs + noise(0.5), mask, 0.05)
    advantages, returns = ppo.gae(rewards, old_values, mask, 0.99, 0.95)
    return batch, old_logprobs, old_values, ppo.masked_whiten(advantages, mask), returns


def test_ppo_gradient_does_not_depend_on_the_budget(policy, scorers):
    """Policy and value loss of a minibatch, its weights carrying one denominator, cut as ppo.main cuts it."""
    policy, scorer, minibatch = precise(policy), precise(scorers["llama"]), [5, 2, 0, 4, 1]
    batch, old_logprobs, old_values, advantages, returns = rollout(policy, scorer, 7, 0.7)
    train_mask, results = batch.completion_mask[:, 1:], []
    tokens = train_mask[minibatch].sum()
    for budget in BUDGETS[::-1]:
        losses, cuts = torch.zeros(2), common.micro_batches(batch.lengths, budget, minibatch)
        clipped_tokens = 0
        for rows in cuts:
            mb = batch.rows(rows)
            part = rows, slice(0, mb.input_ids.shape[1] - 1)
            mask = train_mask[part]
            logprobs, _ = ppo.token_logprobs(policy, mb.input_ids, mb.attention_mask, mask, 0.7)
            values = ppo.token_values(scorer, mb.input_ids, mb.attention_mask, mask)
            weights = mask / tokens
            pg_loss, clipped = ppo.policy_loss(
                logprobs, old_logprobs[part], advantages[part], weights, 0.2
            )
            vf_loss, _ = ppo.value_loss(values, old_values[part], returns[part], weights, 0.2)
            (pg_loss + 0.1 * vf_loss).backward()
            losses += torch.stack([pg_loss, vf_loss]).detach()
            clipped_tokens += clipped.sum().item()
        results.append((len(cuts), clipped_tokens, losses, gradients(policy), gradients(scorer)))
    assert [cuts for cuts, *_ in results][::3] == [1, 5] and 0 < results[0][1] < tokens
    for _, clipped_tokens, losses, *gradient in results[1:]:
        assert clipped_tokens == results[0][1]
        torch.testing.assert_close(losses, results[0][2], rtol=1e-6, atol=1e-6)
        assert all(distance(*pair) < 1e-6 for pair in zip(gradient, results[0][3:]))


def test_micro_batches_cover_each_row_once_within_the_budget():
    """Padding counts; a row longer than the budget stands alone; rows of a length come together."""
    draw = random.Random(1)
    for _ in range(200):
        lengths = [draw.randint(1, 30) for _ in range(draw.randint(1, 40))]
        budget = draw.choice([1, 20, 64, 100, 10**6])
        cuts = common.micro_batches(lengths, budget)
        assert sorted(i for rows in cuts for i in rows) == list(range(len(lengths)))
        for rows in cuts:
            assert len(rows) == 1 or max(lengths[i] for i in rows) * len(rows) <= budget
        for rows, following in zip(cuts, cuts[1:]):
            assert min(lengths[i] for i in rows) >= max(lengths[i] for i in following)
            assert max(lengths[i] for i in rows) * (len(rows) + 1) > budget  # no cut without need
    assert common.micro_batches([5, 9, 7], 10**6) == [[1, 2, 0]]


def test_micro_batches_hold_rows_of_about_one_length(monkeypatch):
    """At most 1/20 of a list is padding, and one more row would be too much; a list still small is filled in
    any case."""
    monkeypatch.setattr(common, "SMALL_BATCH", 0)
    assert common.micro_batches([100, 90, 89, 81, 80, 10, 9, 1], 10**6) == [
        [0, 1],
        [2, 3],
        [4],
        [5, 6],
        [7],
    ]
    assert common.micro_batches([100] * 20 + [1], 10**6) == [list(range(21))]
    draw = random.Random(2)
    for _ in range(50):
        lengths = [draw.randint(1, 200) for _ in range(draw.randint(1, 60))]
        cuts = [[lengths[i] for i in rows] for rows in common.micro_batches(lengths, 10**6)]
        for cut, following in zip(cuts, cuts[1:] + [[]]):
            for more, holds in ([], True), (following[:1], not following):
                assert (20 * sum(cut + more) >= 19 * cut[0] * len(cut + more)) == holds
    monkeypatch.setattr(common, "SMALL_BATCH", 200)
    assert common.micro_batches([100, 50, 49, 45, 44], 10**6) == [[0, 1], [2, 3, 4]]
    assert common.micro_batches([100, 50, 49], 150) == [[0], [1, 2]]


def test_micro_batches_do_not_depend_on_the_order_of_rows():
    """A function of the set: shuffling a minibatch does not change what shares a forward."""
    draw = random.Random(2)
    for _ in range(100):
        lengths = [draw.randint(1, 12) for _ in range(30)]
        rows = draw.sample(range(30), draw.randint(1, 30))
        cuts = common.micro_batches(lengths, 40, rows)
        assert sorted(i for cut in cuts for i in cut) == sorted(rows)
        assert common.micro_batches(lengths, 40, draw.sample(rows, len(rows))) == cuts
        assert common.micro_batches(
            lengths, 40, draw.sample(range(30), 30)
        ) == common.micro_batches(lengths, 40)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("budget", [40, 10**6])
def test_ratio_is_one_and_kl_zero_before_the_first_update(temperature, budget, policy, tiny_dirs):
    """Bit for bit: old log-probs by a forward without gradient, new ones by the forward that trains, the
    reference a model loaded again."""
    batch = ragged_batch(8)
    reference = common.load_policy(policy.name_or_path, CPU)
    old_logprobs, ref_logprobs = (
        common.over_micro_batches(
            lambda *x: ppo.token_logprobs(model, *x, temperature),
            batch,
            budget,
            contextlib.nullcontext,
        )[0]
        for model in (policy, reference)
    )
    assert torch.equal(old_logprobs, ref_logprobs) and old_logprobs.any()
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1)).tolist()
    for rows in common.micro_batches(batch.lengths, budget, order):
        mb = batch.rows(rows)
        logprobs, _ = logprobs_of(policy, mb, temperature)
        assert logprobs.requires_grad
        old = old_logprobs[rows, : logprobs.shape[1]]
        assert torch.equal((logprobs - old).exp(), torch.ones_like(old))


def test_ratio_is_one_when_the_head_runs_in_chunks(tiny_llama, monkeypatch):
    """Chunks recomputed in the backward pass give the bits that the forward without gradient gave."""
    monkeypatch.setattr(common, "CHUNK", 4 * VOCAB)
    batch = ragged_batch(9)
    with torch.no_grad():
        old_logprobs, _ = logprobs_of(tiny_llama, batch)
    assert torch.equal(logprobs_of(tiny_llama, batch)[0], old_logprobs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_is_one_in_bfloat16_autocast(checkpointing, tiny_dirs):
    """The forward without gradient and the one that trains round alike; the head's results are float32."""
    args = SimpleNamespace(seed=1, gradient_checkpointing=checkpointing)
    policy, batch = common.load_policy(tiny_dirs["llama"], CPU, train=args), ragged_batch(9)
    old_logprobs, _ = common.over_micro_batches(
        lambda *x: ppo.token_logprobs(policy, *x, 0.7),
        batch,
        10**6,
        lambda: torch.autocast("cpu", torch.bfloat16),
    )
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = logprobs_of(policy, batch)
    assert logprobs.dtype == old_logprobs.dtype == torch.float32
    assert torch.equal(logprobs, old_logprobs)
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())


def test_gradient_checkpointing_changes_nothing(tiny_dirs, policy):
    """Log-probs and gradients are the same, and the ratio before the first update is 1."""
    args = SimpleNamespace(seed=1, gradient_checkpointing=True)
    other, batch = common.load_policy(policy.name_or_path, CPU, train=args), ragged_batch(10)
    checkpointed = [
        any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        for model in (other, policy)
    ]
    assert checkpointed == [True, False]
    with torch.no_grad():
        old_logprobs, _ = logprobs_of(other, batch)
    logprobs, _ = logprobs_of(other, batch)
    assert torch.equal(logprobs, old_logprobs)
    expected, _ = logprobs_of(policy, batch)
    assert torch.equal(logprobs, expected)
    logprobs.sum().backward()
    expected.sum().backward()
    assert distance(gradients(other), gradients(policy)) < 1e-6


def test_dropout_is_off(tiny_dirs, tiny_gpt2, scorers):
    """GPT-2 whose configuration drops one in ten gives the same numbers twice in training, and in eval."""
    batch = ragged_batch(11)
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    as_it_comes = transformers.AutoModelForCausalLM.from_pretrained(tiny_dirs["gpt2"]).train()
    assert as_it_comes.config.attn_pdrop == 0.1
    assert not torch.equal(as_it_comes(**inputs).logits, as_it_comes(**inputs).logits)
    for model, function in ((tiny_gpt2, logprobs_of), (scorers["gpt2"], heads_of)):
        assert model.training
        first, second = function(model, batch), function(model, batch)
        evaluated = function(model.eval(), batch)
        model.train()
        for ours, again, without in zip(first, second, evaluated):
            assert torch.equal(ours, again) and torch.equal(ours, without)


def test_dropout_that_is_no_setting_is_off(tiny_dirs):
    """Written into the code of a model, as a module."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dirs["llama"])
    model.model.extra = torch.nn.Dropout(0.1)
    assert common._prepare(model, CPU, TRAIN).model.extra.p == 0


def test_dropout_that_is_no_module_is_off(tiny_dirs, tmp_path):
    """Llama reads attention_dropout from its configuration at every forward."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_dirs["llama"], attention_dropout=0.3
    )
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.3
    policy, batch = common.load_policy(str(tmp_path), CPU, train=TRAIN), ragged_batch(11)
    assert policy.training
    assert torch.equal(logprobs_of(policy, batch)[0], logprobs_of(policy, batch)[0])


def test_training_weights_are_float32_and_take_gradients(policy, scorer):
    """Whatever a checkpoint holds, Adam works on float32."""
    for model in (policy, scorer):
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_a_bfloat16_checkpoint_is_trained_in_float32(tiny_llama, tmp_path, scorers):
    """load_policy and load_scorer convert it."""
    transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama.name_or_path, dtype=torch.bfloat16
    ).save_pretrained(tmp_path)
    scorer = common.load_scorer(str(tmp_path), CPU, "--model", train=TRAIN, new_head="zero")
    for model in (common.load_policy(str(tmp_path), CPU, train=TRAIN), scorer):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not heads_of(scorer, ragged_batch(12))[0].any()
