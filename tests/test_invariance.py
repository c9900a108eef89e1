"""Results do not depend on padding, row order, micro-batches, checkpointing or dropout."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ARGS,
    CPU,
    as_rollouts,
    at_last_token,
    distance,
    gradients,
    precise,
    ragged_batch,
    ragged_ids,
    random_head,
)

import common
import dpo
import ppo
import reward_model
import sft

BUDGETS = [1, 17, 40, 10**6]  # from one row at a time to all at once
close = dict(rtol=1e-5, atol=1e-5)


def load_policy(path, trainable=False, **changes):
    """common.load_policy with changed flags."""
    args = SimpleNamespace(**vars(ARGS) | changes)
    return common.load_policy(path, sft.tiny_tokenizer(), args, CPU, trainable=trainable)


def padded(batch, pad_id, more):
    """The batch with another PAD and `more` columns of padding."""
    wide = {name: torch.nn.functional.pad(x, (0, more)) for name, x in batch.items()}
    is_padding = wide["attention_mask"] == 0
    assert is_padding[:, -more:].all()
    for name in ("inputs", "targets"):
        wide[name] = wide[name].masked_fill(is_padding, pad_id)
    return wide


def logprobs_of(model, batch, temperature=0.7):
    return ppo.token_logprobs_and_entropy(model, batch, temperature)


def heads_of(model, batch):
    return reward_model.sequence_scores(model, batch), ppo.token_values(model, batch)


@torch.no_grad()
def variants(function, model):
    """Results for a batch, then for its rows one by one, with more padding, in another order."""
    batch = ragged_batch(1)
    rows, width = batch["inputs"].shape

    def wide(x):
        return x if x.ndim == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))

    yield function(model, batch)
    alone = [[wide(x) for x in function(model, common.take(batch, [i]))] for i in range(rows)]
    yield tuple(torch.cat(parts) for parts in zip(*alone))
    for pad_id in (0, 1, 63):
        results = function(model, padded(batch, pad_id, more=9))
        assert all(x.ndim == 1 or not x[:, width:].any() for x in results)
        yield tuple(x if x.ndim == 1 else x[:, :width] for x in results)
    order = [4, 0, 5, 2, 1, 3]
    back = torch.tensor(order).argsort()
    yield tuple(x[back] for x in function(model, common.take(batch, order)))


def assert_all_alike(results):
    first, *others = results
    assert len(others) == 5
    for other in others:
        for ours, theirs in zip(other, first):
            torch.testing.assert_close(ours, theirs, **close)


def test_logprobs_depend_on_neither_padding_nor_order(policy):
    assert_all_alike(variants(logprobs_of, policy))


def test_scores_and_values_depend_on_neither_padding_nor_order(scorer):
    assert_all_alike(variants(heads_of, scorer))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_results_do_not_depend_on_the_micro_batch_budget(name, request, scorers):
    """in_micro_batches puts every result back in its row and column."""
    policy = request.getfixturevalue(f"tiny_{name}")
    for function, model, options in (
        (lambda *args: logprobs_of(*args)[0], policy, [0.7]),
        (lambda *args: logprobs_of(*args)[1], policy, [1.3]),
        (common.last_token_scores, scorers[name], []),
        (ppo.token_values, scorers[name], []),
    ):
        batch = ragged_batch(2)
        if function is common.last_token_scores:
            batch = at_last_token(batch)
        with torch.no_grad():
            whole = function(model, batch, *options)
        for budget in BUDGETS:
            result = common.in_micro_batches(function, model, batch, budget, *options)
            result = result[:, : whole.shape[1]]
            torch.testing.assert_close(result, whole, **close)
            assert not result.requires_grad


def test_scores_of_a_reward_model_do_not_depend_on_the_budget(scorers, tmp_path):
    """A saved reward model has the scores of sequence_scores, in the order of the rollouts."""
    scorers["llama"].save_pretrained(tmp_path)
    tokenizer = sft.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    prompts, completions = ragged_ids(3)
    rollouts = as_rollouts(prompts, completions)
    sequences = [p + c for p, c in zip(prompts, completions)]
    batch = {
        "inputs": common.pad_rows(sequences, CPU),
        "attention_mask": common.pad_rows([[1] * len(ids) for ids in sequences], CPU),
    }
    with torch.no_grad():
        scores = reward_model.sequence_scores(scorers["llama"], batch)
    for budget in BUDGETS:
        changes = {"micro_batch_tokens": budget, "max_completion_length": 1}
        changes["model"] = str(tmp_path)  # its tokens are the policy's
        args = SimpleNamespace(**vars(ARGS) | changes)
        reward = common.model_reward(str(tmp_path), args, rollouts, tokenizer, CPU)
        torch.testing.assert_close(reward(rollouts), scores, **close)


# ---------------------------------------------------------------- gradients
def micro_batch_list(batch, budget):
    return list(common.micro_batches(batch, budget))


def assert_gradients_alike(results, most_cuts):
    """Compare (number of micro-batches, losses, gradients) of all budgets, largest first."""
    number, losses, first = results[0]
    assert number == 1 and results[-1][0] == most_cuts
    assert all(gradient.norm() > 0.1 for gradient in first)
    for _, other_losses, other in results[1:]:
        assert other_losses == pytest.approx(losses, rel=1e-6, abs=1e-6)
        for ours, theirs in zip(other, first, strict=True):
            assert distance(ours, theirs) < 1e-6


def test_sft_gradient_does_not_depend_on_the_budget(policy):
    """Gradients summed over micro-batches are the gradient of the whole batch."""
    policy = precise(policy)
    batch = ragged_batch(4)
    batch["weights"] = batch["mask"] / batch["mask"].sum()
    results = []
    for budget in BUDGETS[::-1]:
        mbs = micro_batch_list(batch, budget)
        total = 0.0
        for mb in mbs:
            loss = sft.nll_loss(sft.token_logprobs(policy, mb), mb["weights"])
            loss.backward()
            total += loss.item()
        results.append((len(mbs), [total], [gradients(policy)]))
    assert_gradients_alike(results, most_cuts=6)


def pairs_of_uneven_lengths():
    prompts, chosen = ragged_ids(5)
    _, rejected = ragged_ids(6)
    margins = [0.0, 1.0, 0.5, 0.0, 2.0, 1.0]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")
    return [dict(zip(keys, row)) for row in zip(prompts, chosen, rejected[::-1], margins)]


def compared(prompt_ids, completion_ids, labels, margin=0.0):
    """An example of reward_model.py, with scores read at the last tokens."""
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "ends": [[len(ids) - 1] for ids in completion_ids],
        "labels": [[label] for label in labels],
        "margin": margin,
    }


def test_reward_model_gradient_does_not_depend_on_the_budget(scorer):
    """Pairs of different lengths, with margins and the centering term."""
    scorer = precise(scorer)
    examples = [
        compared(x["prompt_ids"], [x["chosen_ids"], x["rejected_ids"]], [1.0, 0.0], x["margin"])
        for x in pairs_of_uneven_lengths()
    ]
    batch = reward_model.score_batch(examples, CPU)
    results = []
    for budget in BUDGETS[::-1]:
        mbs = micro_batch_list(batch, budget)
        total = 0.0
        for mb in mbs:
            scores = reward_model.token_scores(scorer, mb)
            loss = reward_model.weighted_loss(scores, mb, "bradley-terry", center_coef=0.01)
            loss.backward()
            total += loss.item()
        results.append((len(mbs), [total], [gradients(scorer)]))
    assert_gradients_alike(results, most_cuts=6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_gradient_does_not_depend_on_the_budget(loss_type, policy):
    """Pairs of different lengths, log-probs summed or averaged, with the NLL of the chosen ones."""
    policy = precise(policy)
    args = dpo.Args(loss_type=loss_type, sft_coef=0.3, micro_batch_tokens=40)
    examples = pairs_of_uneven_lengths()
    examples = dpo.add_reference(load_policy(policy.name_or_path), examples, args)
    batch = dpo.pair_batch(examples, CPU)
    results = []
    for budget in BUDGETS[::-1]:
        mbs = micro_batch_list(batch, budget)
        total = 0.0
        for mb in mbs:
            losses, _ = dpo.pair_losses(dpo.token_logprobs(policy, mb), mb, args)
            weights, _ = dpo.split_pairs(mb["weights"])
            loss = (weights * losses).sum()
            loss.backward()
            total += loss.item()
        results.append((len(mbs), [total], [gradients(policy)]))
    assert_gradients_alike(results, most_cuts=6)


def ppo_batch(policy, scorer, seed, temperature):
    """A batch of PPO in which ratios are not 1."""
    batch = ragged_batch(seed)
    mask = batch["mask"]
    draw = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(mask.shape, generator=draw) * mask

    with torch.no_grad():
        batch["old_logprobs"] = logprobs_of(policy, batch, temperature)[0] + noise(0.3)
        batch["old_values"] = ppo.token_values(scorer, batch) + noise(0.3)
    scores = torch.randn(len(mask), generator=draw)
    ref_logprobs = batch["old_logprobs"] + noise(0.5)
    rewards = ppo.token_rewards(scores, batch["old_logprobs"], ref_logprobs, mask, 0.05)
    advantages, batch["returns"] = ppo.gae(rewards, batch["old_values"], mask, 0.99, 0.95)
    batch["advantages"] = ppo.masked_whiten(advantages, mask)
    return batch


def test_ppo_gradient_does_not_depend_on_the_budget(policy, scorers):
    """Policy and value loss of a shuffled minibatch."""
    policy = precise(policy)
    scorer = precise(scorers["llama"])
    minibatch = common.take(ppo_batch(policy, scorer, 7, 0.7), [5, 2, 0, 4, 1])
    minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()
    results = []
    for budget in BUDGETS[::-1]:
        mbs = micro_batch_list(minibatch, budget)
        losses = torch.zeros(2)
        num_clipped = 0
        for mb in mbs:
            logprobs, _ = logprobs_of(policy, mb)
            pg_loss, clipped = ppo.policy_loss(
                logprobs,
                mb["old_logprobs"],
                mb["advantages"],
                mb["weights"],
                0.2,
            )
            vf_loss, _ = ppo.value_loss(
                ppo.token_values(scorer, mb),
                mb["old_values"],
                mb["returns"],
                mb["weights"],
                0.2,
            )
            (pg_loss + 0.1 * vf_loss).backward()
            losses += torch.stack([pg_loss, vf_loss]).detach()
            num_clipped += clipped.sum().item()
        results.append((len(mbs), losses.tolist(), [gradients(policy), gradients(scorer)]))
        assert 0 < num_clipped < minibatch["mask"].sum()
    assert_gradients_alike(results, most_cuts=5)


# ---------------------------------------------------------------- micro-batches
def of_lengths(lengths):
    """A batch with rows of these lengths; the inputs of a row are its number."""
    return {
        "attention_mask": common.pad_rows([[1] * n for n in lengths], CPU),
        "inputs": common.pad_rows([[i] * n for i, n in enumerate(lengths)], CPU),
        "number": torch.arange(len(lengths)),
    }


def cuts_of(lengths, budget, group=None):
    batch = of_lengths(lengths)
    if group is not None:
        batch["group"] = torch.tensor(group)
    return common.micro_batch_rows(batch, budget)


def test_micro_batches_cover_each_row_once_within_the_budget():
    """Padding counts, longer rows have their own micro-batch, and lengths are sorted."""
    draw = random.Random(1)
    for _ in range(200):
        lengths = [draw.randint(1, 30) for _ in range(draw.randint(1, 40))]
        budget = draw.choice([1, 20, 64, 100, 10**6])
        cuts = cuts_of(lengths, budget)
        assert sorted(i for rows in cuts for i in rows) == list(range(len(lengths)))
        for rows in cuts:
            assert len(rows) == 1 or max(lengths[i] for i in rows) * len(rows) <= budget
        for rows, following in zip(cuts, cuts[1:]):
            assert min(lengths[i] for i in rows) >= max(lengths[i] for i in following)
            longest = max(lengths[i] for i in rows)
            tokens = longest * (len(rows) + 1)
            is_uneven = max(lengths[i] for i in following) < 0.9 * longest
            assert tokens > budget or (is_uneven and tokens > common.SMALL_BATCH)
    assert cuts_of([5, 9, 7], 10**6) == [[1, 2, 0]]


def test_micro_batches_have_rows_of_similar_length(monkeypatch):
    """No row is shorter than nine tenths of the longest, except in a small micro-batch."""
    monkeypatch.setattr(common, "SMALL_BATCH", 0)
    lengths = [100, 90, 89, 81, 80, 10, 9, 1]
    assert cuts_of(lengths, 10**6) == [[0, 1], [2, 3], [4], [5, 6], [7]]
    draw = random.Random(2)
    for _ in range(50):
        lengths = [draw.randint(1, 200) for _ in range(draw.randint(1, 60))]
        cuts = [[lengths[i] for i in rows] for rows in cuts_of(lengths, 10**6)]
        for cut, following in zip(cuts, cuts[1:]):
            assert following[0] < 0.9 * cut[0] <= min(cut)
    monkeypatch.setattr(common, "SMALL_BATCH", 200)
    assert cuts_of([100, 50, 49, 45, 44], 10**6) == [[0, 1], [2, 3, 4]]
    assert cuts_of([100, 50, 49], 150) == [[0], [1, 2]]


def test_micro_batches_are_rows_of_the_batch():
    """(B, T) tensors are cut to the longest row of a micro-batch, (B,) tensors to its rows."""
    lengths = [3, 12, 7, 7, 1]
    batch = of_lengths(lengths)
    mbs = micro_batch_list(batch, budget=20)
    assert [mb["number"].tolist() for mb in mbs] == cuts_of(lengths, 20) == [[1], [2, 3], [0, 4]]
    for mb in mbs:
        width = max(lengths[i] for i in mb["number"])
        assert mb["inputs"].shape == mb["attention_mask"].shape == (len(mb["number"]), width)
        for i, row, is_real in zip(mb["number"], mb["inputs"], mb["attention_mask"]):
            assert is_real.sum() == lengths[i]
            assert row.tolist() == batch["inputs"][i, :width].tolist()


def test_rows_of_a_group_stay_together():
    """Rows of a group share a micro-batch, in order, and count as long as the longest of them."""
    draw = random.Random(3)
    for _ in range(100):
        sizes = [draw.randint(1, 5) for _ in range(draw.randint(1, 20))]
        group = [number for number, size in enumerate(sizes) for _ in range(size)]
        lengths = [draw.randint(1, 30) for _ in group]
        budget = draw.choice([1, 40, 100, 10**6])
        cuts = cuts_of(lengths, budget, group)
        assert sorted(i for rows in cuts for i in rows) == list(range(len(lengths)))
        for rows in cuts:
            runs = [list(run) for _, run in itertools.groupby(rows, key=lambda i: group[i])]
            for run in runs:
                assert run == [i for i in range(len(group)) if group[i] == group[run[0]]]
            assert len(runs) == 1 or max(lengths[i] for i in rows) * len(rows) <= budget


def test_micro_batches_do_not_depend_on_the_order_of_rows():
    """Shuffling a minibatch does not change which lengths share a forward."""
    draw = random.Random(2)
    for _ in range(100):
        lengths = [draw.randint(1, 12) for _ in range(30)]
        cuts = [[lengths[i] for i in rows] for rows in cuts_of(lengths, 40)]
        shuffled = draw.sample(lengths, 30)
        assert [[shuffled[i] for i in rows] for rows in cuts_of(shuffled, 40)] == cuts


# ---------------------------------------------------------------- before the first update
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [40, 10**6])
def test_ratio_is_one_and_kl_zero_before_the_first_update(temperature, budget, policy):
    """Log-probs are equal to the last bit if micro-batches are, and near 1e-5 after a shuffle.

    Old log-probs come from a forward without gradient, reference log-probs from a second model."""
    batch = ragged_batch(8)
    reference = load_policy(policy.name_or_path)
    assert not any(p.requires_grad for p in reference.parameters())
    args = SimpleNamespace(temperature=temperature, micro_batch_tokens=budget)
    batch["old_logprobs"] = ppo.batch_logprobs(policy, batch, args)
    ref_logprobs = ppo.batch_logprobs(reference, batch, args)
    assert torch.equal(batch["old_logprobs"], ref_logprobs) and ref_logprobs.any()
    for mb in common.micro_batches(batch, budget):
        logprobs, _ = logprobs_of(policy, mb, temperature)
        assert logprobs.requires_grad
        assert torch.equal(logprobs, mb["old_logprobs"])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for mb in common.micro_batches(common.take(batch, order), budget):
        logprobs, _ = logprobs_of(policy, mb, temperature)
        ratio = (logprobs - mb["old_logprobs"]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), **close)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_ratio_is_one_in_bfloat16(gradient_checkpointing, tiny_dirs):
    """Forwards with and without gradient round alike; log-probs and gradients are float32."""
    policy = load_policy(
        tiny_dirs["llama"],
        trainable=True,
        dtype="bfloat16",
        gradient_checkpointing=gradient_checkpointing,
    )
    batch = ragged_batch(9)
    args = SimpleNamespace(temperature=0.7, micro_batch_tokens=10**6)
    batch["old_logprobs"] = ppo.batch_logprobs(policy, batch, args)
    (mb,) = common.micro_batches(batch, 10**6)
    logprobs, _ = logprobs_of(policy, mb)
    assert logprobs.dtype == mb["old_logprobs"].dtype == torch.float32
    assert torch.equal(logprobs, mb["old_logprobs"])
    exact = ppo.batch_logprobs(load_policy(tiny_dirs["llama"]), mb, args)
    assert 1e-3 < (logprobs - exact).abs().max() < 0.5
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())


def test_gradient_checkpointing_changes_nothing(policy):
    """Log-probs and gradients are equal, and each layer is recomputed in the backward pass."""
    other = load_policy(policy.name_or_path, trainable=True, gradient_checkpointing=True)
    layers = [m for m in other.modules() if type(m).__name__ in other._no_split_modules]
    calls = []
    for layer in layers:  # the hook is on a child: checkpointing may replace the layer's forward
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    batch = ragged_batch(10)
    with torch.no_grad():
        old_logprobs, _ = logprobs_of(other, batch)
    logprobs, _ = logprobs_of(other, batch)
    assert torch.equal(logprobs, old_logprobs)
    expected, _ = logprobs_of(policy, batch)
    assert torch.equal(logprobs, expected)
    calls.clear()
    logprobs.sum().backward()
    assert len(calls) == len(layers) > 0
    expected.sum().backward()
    assert distance(gradients(other), gradients(policy)) < 1e-6


# ---------------------------------------------------------------- dropout, precision
@pytest.fixture(scope="module")
def dropouts(tiny_dirs, tmp_path_factory):
    """Directories of models with dropout, in three implementations.

    GPT-2 has modules, Llama's attention reads the config, OPT calls a function in the layer that is
    checkpointed."""
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_dirs["llama"],
        attention_dropout=0.3,
    )
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        dropout=0.1,
    )
    dirs = {"gpt2": tiny_dirs["gpt2"]}
    for name, model in [("llama", llama), ("opt", transformers.OPTForCausalLM(config))]:
        dirs[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(dirs[name])
    return dirs


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_dropout_is_off(name, gradient_checkpointing, dropouts):
    """Two forwards of a policy or scorer in training are equal, and equal to the frozen model's."""
    path = dropouts[name]
    batch = ragged_batch(11)
    unprepared = transformers.AutoModelForCausalLM.from_pretrained(path).train()
    inputs = dict(input_ids=batch["inputs"], attention_mask=batch["attention_mask"])
    assert not torch.equal(unprepared(**inputs).logits, unprepared(**inputs).logits)
    args = SimpleNamespace(**vars(ARGS) | {"gradient_checkpointing": gradient_checkpointing})
    scorer = common.load_scorer(path, args, CPU, trainable=True, init=random_head)
    frozen_scorer = common.load_scorer(path, ARGS, CPU, init=random_head)
    policy = load_policy(path, trainable=True, gradient_checkpointing=gradient_checkpointing)
    reference = load_policy(path)
    for function, model, frozen in [
        (logprobs_of, policy, reference),
        (heads_of, scorer, frozen_scorer),
    ]:
        first = function(model, batch)
        second = function(model, batch)
        for ours, again, expected in zip(first, second, function(frozen, batch)):
            assert torch.equal(ours, again) and torch.equal(ours, expected)


def test_a_bfloat16_checkpoint_is_trained_in_float32(tiny_dirs, tmp_path):
    """Weights become float32; a new head of zeros scores zero."""
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_dirs["llama"], dtype=torch.bfloat16
    )
    half.save_pretrained(tmp_path)
    scorer = common.load_scorer(
        str(tmp_path),
        ARGS,
        CPU,
        trainable=True,
        init=lambda model, has_new_head: torch.nn.init.zeros_(model.score.weight),
    )
    for model in (load_policy(str(tmp_path), trainable=True), scorer):
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not heads_of(scorer, ragged_batch(12))[0].any()
