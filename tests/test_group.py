"""rloo.py and grpo.py: advantages, KL estimates and losses against slow float64 loops, closed forms
and invariances; then both scripts through main on a tiny model."""

import itertools
import math
import shutil
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import as_rollouts, end_two_of_three, load_policy
from test_scripts import chain, check_refused, metrics, weights, write_rows  # noqa: F401

import common
import grpo
import rloo

G = 4
SCRIPTS = {"rloo": rloo, "grpo": grpo}
LOSSES = {"rloo": "reinforce_loss", "grpo": "policy_loss"}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged_mask():
    """A mask of (B, T) = (6, 7). Each row is one run of ones; one has a single token, one none."""
    mask = torch.zeros(6, 7, dtype=torch.long)
    for row, (first, last) in enumerate([(0, 7), (2, 5), (6, 7), (1, 6), (0, 0), (3, 7)]):
        mask[row, first:last] = 1
    return mask


REWARDS = [0.3, -1.0, 2.5, 0.1, 4.0, 4.0, 1.0, -7.5, 7.0, 7.0, 7.0, 7.0, 0.0, 1.0, 1.0, 1.0]


# ---------------------------------------------------------------- advantages
def slow_advantages(rewards, group_size, scale):
    rewards = np.array(rewards, dtype=np.float64)
    advantages = []
    for i, reward in enumerate(rewards):
        first = i // group_size * group_size
        group = rewards[first : first + group_size]
        stds = {
            "group": np.std(group, ddof=1) + 1e-6,
            "batch": np.std(rewards, ddof=1) + 1e-6,
            "none": 1.0,
        }
        advantages.append((reward - group.mean()) / stds[scale])
    return advantages


def slow_leave_one_out(rewards, group_size):
    advantages = []
    for i, reward in enumerate(rewards):
        first = i // group_size * group_size
        others = [rewards[j] for j in range(first, first + group_size) if j != i]
        advantages.append(reward - np.mean(np.float64(others)))
    return advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    ours = grpo.group_advantages(torch.tensor(REWARDS), G, scale)
    assert ours.tolist() == pytest.approx(slow_advantages(REWARDS, G, scale), rel=1e-5, abs=1e-6)
    if scale == "group":
        assert ours.equal(grpo.group_advantages(torch.tensor(REWARDS), G)), "the default"


def test_leave_one_out_advantages():
    ours = rloo.leave_one_out_advantages(torch.tensor(REWARDS), G)
    assert ours.tolist() == pytest.approx(slow_leave_one_out(REWARDS, G), rel=1e-5, abs=1e-6)


ADVANTAGES = [
    (scale, partial(grpo.group_advantages, scale=scale)) for scale in ("group", "batch", "none")
]
ADVANTAGES += [("leave-one-out", rloo.leave_one_out_advantages)]


@pytest.mark.parametrize("name, function", ADVANTAGES)
def test_invariances_of_advantages(name, function):
    rewards = draw(1, 24)
    base = function(rewards, 6)
    order = torch.cat(
        [first + torch.randperm(6, generator=common.generator(1, "x")) for first in (0, 6, 12, 18)]
    )
    assert function(rewards[order], 6).allclose(base[order], atol=1e-6), "order within a group"
    swapped = function(torch.cat([rewards[12:], rewards[:12]]), 6)
    assert swapped.allclose(torch.cat([base[12:], base[:12]]), atol=1e-6), "order of groups"
    constant = torch.tensor([3.0, -2.0, 0.5, 8.0]).repeat_interleave(6)
    if name != "batch":  # the standard deviation of the batch includes differences between groups
        assert function(rewards + constant, 6).allclose(base, atol=1e-5), "a constant per group"
    assert function(rewards + 5.0, 6).allclose(base, atol=1e-5), "a constant for all"
    scaled = function(7.0 * rewards, 6)
    assert scaled.allclose(base if name in ("group", "batch") else 7.0 * base, rtol=1e-4), "scale"
    assert base.view(4, 6).sum(1).abs().max() < 1e-5, "the advantages of a group sum to 0"


@pytest.mark.parametrize("name, function", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_of_equal_rewards_are_exactly_zero(name, function, dtype):
    """The float mean of five 0.1 is not 0.1, and (r - mean) / (std + 1e-6) would be 1e-2."""
    for size in range(2, 10):
        for value in (0.1, 1 / 3, -7.7, 1e6 / 7):
            rewards = torch.full((3 * size,), value, dtype=dtype)
            rewards[-1] += 1.0  # the standard deviation of the batch must not be 0
            assert not function(rewards, size)[: 2 * size].any()
            assert grpo.equal_groups(rewards, size).tolist() == [True, True, False]


def test_equal_groups():
    assert grpo.equal_groups(torch.tensor(REWARDS), G).tolist() == [False, False, True, False]
    assert grpo.equal_groups(torch.tensor([]), G).tolist() == []


def test_unknown_options_are_errors():
    with pytest.raises(ValueError, match="prompt"):
        grpo.group_advantages(torch.tensor(REWARDS), G, "prompt")
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="mean"):
        grpo.loss_weights(ragged_mask(), "mean", 5)


# ---------------------------------------------------------------- losses
def slow_loss(logprobs, old, ref, advantages, mask, args):  # noqa: PLR0917
    """DeepSeekMath's equation 3 and its variants, token by token."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    sums = []
    counts = []
    for i in range(mask.shape[0]):
        total = 0.0
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in tokens:
            ratio = math.exp(logprobs[i, t] - old[i, t])
            bounded = min(max(ratio, 1 - args.epsilon), 1 + high)
            total -= min(ratio * advantages[i], bounded * advantages[i])
            x = logprobs[i, t] - ref[i, t]
            k3 = math.exp(-x) - 1 + x
            losses = {"k1": 0.0, "k2": x * x / 2, "k3": k3, "k3-weighted": ratio * k3}
            total += args.kl_coef * losses[args.kl_estimator]
        if tokens:
            sums.append(total)
            counts.append(len(tokens))
    if args.loss_aggregation == "sequence":
        return float(np.mean([s / n for s, n in zip(sums, counts)]))
    if args.loss_aggregation == "token":
        return sum(sums) / sum(counts)
    return sum(sums) / (len(mask) * args.max_completion_length)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3-weighted"])
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_loss(aggregation, estimator, high):
    args = grpo.Args(
        loss_aggregation=aggregation,
        kl_estimator=estimator,
        kl_coef=0.3,
        max_completion_length=11,
        epsilon=0.2,
        epsilon_high=high,
    )
    mask = ragged_mask()
    logprobs, old, ref = (-draw(seed, 6, 7).abs() * mask for seed in (1, 2, 3))
    advantages = draw(4, 6)
    w = grpo.loss_weights(mask, aggregation, 11)
    ours, clipped = grpo.policy_loss(
        logprobs, old, advantages[:, None] * mask, w, 0.2, epsilon_high=high
    )
    if estimator != "k1":
        ours = ours + 0.3 * (w * grpo.kl_losses(logprobs, old, ref, estimator)).sum()
    tensors = [x.double().numpy() for x in (logprobs, old, ref, advantages)]
    expected = slow_loss(*tensors, mask.numpy(), args)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert clipped.any() and not clipped[mask == 0].any()


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_loss_weights_of_a_batch_without_a_trained_token(aggregation):
    assert not grpo.loss_weights(torch.zeros(3, 4, dtype=torch.long), aggregation, 5).any()


def test_reinforce_loss_of_the_first_update():
    """The mean over completions of -A log pi(completion)."""
    mask = ragged_mask().double()
    logprobs = -draw(1, 6, 7).abs().double() * mask
    advantages = draw(2, 6).double()
    loss, clipped = rloo.reinforce_loss(
        logprobs, logprobs, advantages[:, None] * mask, mask / 6, 0.2
    )
    slow = np.mean([-a.item() * x.item() for a, x in zip(advantages, logprobs.sum(1))])
    assert loss.item() == pytest.approx(slow, rel=1e-12) and not clipped.any()


def test_reinforce_loss_of_a_ratio_that_overflows_is_finite():
    """300 tokens, each with a log-ratio of 0.35; clipped where A > 0, never NaN."""
    old = torch.full((3, 300), -2.0)
    ones = torch.ones(3, 300)
    logprobs = (old + 0.35).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0])[:, None] * ones
    loss, clipped = rloo.reinforce_loss(logprobs, old, advantages, ones / 3, 0.2)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert clipped.any(1).tolist() == [True, False, False] and not logprobs.grad[[0, 2]].any()


@pytest.mark.parametrize("high", [None, 0.5])
def test_reinforce_loss_has_the_gradient_of_a_clipped_sequence_ratio(high):
    mask = ragged_mask()
    old = -draw(1, 6, 7).abs().double() * mask
    advantages = draw(5, 6).double()
    logprobs = (old + 0.15 * draw(3, 6, 7) * mask).requires_grad_()
    w = mask.double() / 6
    loss, clipped = rloo.reinforce_loss(
        logprobs, old, advantages[:, None] * mask, w, 0.2, epsilon_high=high
    )
    (ours,) = torch.autograd.grad(loss, logprobs)
    ratio = (logprobs - old).sum(1).exp()
    bounded = ratio.clamp(0.8, 1 + (high or 0.2))
    surrogate = torch.max(-advantages * ratio, -advantages * bounded).mean()
    (expected,) = torch.autograd.grad(surrogate, logprobs)
    assert torch.allclose(ours, expected * mask, atol=1e-12)
    rows = clipped.any(1)
    assert 0 < rows.sum() < 5 and clipped[rows].sum() == mask[rows].sum() and not ours[rows].any()


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_only_k3_weighted_has_the_gradient_of_the_kl(distance):
    """Expected gradients over five tokens, sampled from an old policy at some distance.

    k3-weighted has the gradient of KL(policy || reference) at any distance, k2 at distance 0 only.
    At distance 0, k3 has the gradient of KL(reference || policy)."""
    start, step, ref = (draw(seed, 5).double() for seed in (1, 2, 3))
    old_logprobs = start.log_softmax(0)
    logits = (start + distance * step).requires_grad_()
    logprobs = logits.log_softmax(0)
    ref_logprobs = ref.log_softmax(0)

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def error(estimator, kl):
        losses = grpo.kl_losses(logprobs, old_logprobs, ref_logprobs, estimator)
        expected = gradient(kl)
        actual = gradient((old_logprobs.exp() * losses).sum())
        return ((actual - expected).norm() / expected.norm()).item()

    forward = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    backward = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum()
    assert error("k3-weighted", forward) < 1e-14
    if distance == 0:
        assert error("k2", forward) < 1e-14 and error("k3", backward) < 1e-14
    else:
        assert error("k2", forward) > 0.3 and error("k3", backward) > 0.3
        assert error("k3", forward) > 0.3


def test_sequence_ratio_does_not_depend_on_the_length():
    """GSPO: a completion and its repetition have the same ratio, one for all tokens."""
    old = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -2.0, -1.0, -2.0]])
    new = torch.tensor([[-0.5, -2.3, 0.0, 0.0], [-0.5, -2.3, -0.5, -2.3]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ratio = (grpo.ratio_logprobs(new, old, mask, "sequence") - old).exp()
    expected = math.exp((0.5 - 0.3) / 2)
    assert ratio[0].tolist() == pytest.approx([expected, expected, 1, 1])
    assert ratio[1].tolist() == pytest.approx([expected] * 4)
    assert grpo.ratio_logprobs(new, old, mask, "token") is new


def test_overlong_penalty():
    """Yu et al. 2025, equation 13, with a limit of 10 and a buffer of 4."""
    lengths = torch.tensor([1, 5, 6, 7, 8, 9, 10])
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1]
    assert grpo.overlong_penalty(lengths, 10, 4).tolist() == expected


# ---------------------------------------------------------------- rollouts
def test_a_group_with_an_unscored_completion_is_dropped(monkeypatch):
    """Four prompts, three completions each; the second and the last group have a NaN."""
    prompts = [[i] for i in range(4) for _ in range(3)]
    rollouts = as_rollouts(prompts, [[7, 1], [8], [9, 1]] * 4)
    monkeypatch.setattr(grpo, "sample", lambda *args, **kwargs: rollouts)
    scores = [1.0, 2.0, 3.0, 4.0, math.nan, 6.0, 7.0, 8.0, 9.0, math.nan, math.nan, math.nan]
    args = grpo.Args(num_generations=3, missing_eos_penalty=0.5)
    kept = grpo.sample_and_score(None, lambda _: torch.tensor(scores), None, rng=None, args=args)
    assert [rollout["prompt_ids"] for rollout in kept] == [[0], [0], [0], [2], [2], [2]]
    assert [rollout["completion_ids"] for rollout in kept] == [[7, 1], [8], [9, 1]] * 2
    assert [rollout["finished"] for rollout in kept] == [True, False, True] * 2
    assert [rollout["score"] for rollout in kept] == [1, 2, 3, 7, 8, 9]
    assert [rollout["reward"] for rollout in kept] == [1, 1.5, 3, 7, 7.5, 9]


# ---------------------------------------------------------------- through main
def run_args(script, chain, output_dir, **changes):  # noqa: F811
    args = dict(
        model=str(chain / "sft"),
        reward=str(chain / "reward_model"),
        output_dir=str(output_dir),
        steps=2,
        prompts_per_step=3,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    return script.Args(**(args | changes))


def checker(folder, body):
    """The --reward of a new file; body computes `scores` from prompts, completions, rows."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "reward.py").write_text(
        f"def f(prompts, completions, rows):\n{lines}    return scores\n"
    )
    return f"{folder}/reward.py:f"


def spy(patch, module, name):
    """Patch a function to record its positional arguments and result; returns the list of both."""
    calls = []
    inner = getattr(module, name)

    def recorder(*args, **kwargs):
        result = inner(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(module, name, recorder)
    return calls


def first_gradient(script, args, monkeypatch):
    """Run main and return the gradient of its first optimizer step as one vector."""
    gradients = []
    clip_gradients = script.clip_gradients

    def recorder(model, max_norm):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        return clip_gradients(model, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(script, "clip_gradients", recorder)
        script.main(args)
    return gradients[0]


VARIANTS = [
    ("rloo", dict()),
    ("rloo", dict(baseline="none")),
    ("grpo", dict()),
    ("grpo", dict(loss_aggregation="token", scale_rewards="batch", kl_estimator="k2")),
    (
        "grpo",
        dict(
            loss_aggregation="constant",
            scale_rewards="none",
            kl_estimator="k1",
            mask_truncated=True,
        ),
    ),
]


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_gradient_does_not_depend_on_the_micro_batches(
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
    flags,
):
    """P=3, G=5, prompts of 2 to 40 tokens, budgets that separate the completions of a group."""
    prompts = ["b>", "zyxwvutsrq>", "abcdefghijklmnopqrstuvwxyz" + "abcdefghijklm>"]
    data = write_rows(tmp_path / "prompts.jsonl", [dict(prompt=prompt) for prompt in prompts])
    body = "scores = [len(set(c)) + 0.1 * len(p) for p, c in zip(prompts, completions)]"
    results = []
    for budget in (60, 130, 100_000):
        args = run_args(
            SCRIPTS[name],
            chain,
            tmp_path / str(budget),
            dataset=data,
            reward=checker(tmp_path, body),
            num_generations=5,
            steps=1,
            max_completion_length=12,
            micro_batch_tokens=budget,
            **flags,
        )
        results.append(first_gradient(SCRIPTS[name], args, monkeypatch))
    assert results[-1].norm() > 1e-3
    for result in results[:-1]:
        assert (result - results[-1]).norm() / results[-1].norm() < 1e-5


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_an_exact_reward_goes_up(chain, tmp_path, name, flags):  # noqa: F811
    body = "scores = [text.count('a') / 6 for text in completions]"
    settings = dict(steps=12, prompts_per_step=8, kl_coef=1e-3, learning_rate=5e-3)
    settings |= flags | dict(reward=checker(tmp_path, body))
    settings.pop("mask_truncated", None)
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", **settings))
    scores = [row["score"] for row in metrics(tmp_path / "run") if "score" in row]
    assert sum(scores[-3:]) / 3 > 3 * sum(scores[:3]) / 3 + 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_falls(chain, far, tmp_path, monkeypatch, estimator):  # noqa: F811
    """Equal rewards and a policy far from its reference: only the KL is minimized."""
    start_from(far, chain, monkeypatch, grpo)
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, "scores = [0.0] * len(prompts)"),
        prompts_per_step=12,
        learning_rate=6e-3,
        scale_rewards="none",
        steps=18,
        kl_estimator=estimator,
        kl_coef=1.0,
    )
    grpo.main(args)
    kls = [row["kl"] for row in metrics(tmp_path / "run") if "kl" in row]
    assert sum(kls[-3:]) < 0.4 * sum(kls[:3]), kls


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_completions_of_a_prompt_are_one_group(chain, tmp_path, name):  # noqa: F811
    """A score of the prompt alone is equal within each group, so nothing is trained.

    Groups that are tiled, or completions paired with other prompts, would have advantages."""
    body = "assert all(p == r['prompt'] for p, r in zip(prompts, rows))\n"
    body += "scores = [ord(p[0]) for p in prompts]"
    run = tmp_path / "run"
    settings = dict(reward=checker(tmp_path, body), kl_coef=0.0, prompts_per_step=5)
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, run, **settings))
    before = weights(chain / "sft")
    after = weights(run)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(row["zero_std_groups"] == 1.0 for row in metrics(run)[1:])


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_kl_only_evaluation_has_a_reference(
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
):
    loaded = spy(monkeypatch, SCRIPTS[name], "load_policy")
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "a", kl_coef=0.0))
    rows = metrics(tmp_path / "a")
    assert len(loaded) == 2, "one reference serves all evaluations"
    assert rows[0]["eval/kl"] == 0 != rows[-1]["eval/kl"]
    assert not any("kl" in row for row in rows)
    loaded.clear()
    data = write_rows(tmp_path / "prompts.jsonl", [dict(prompt="ba>")])
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "b", kl_coef=0.0, dataset=data))
    assert len(loaded) == 1


def test_rloo_subtracts_the_kl_before_the_baseline(chain, tmp_path, monkeypatch):  # noqa: F811
    """The baseline is taken of score - kl_coef * log-ratio, summed over the completion."""
    calls = spy(monkeypatch, rloo, "leave_one_out_advantages")
    args = run_args(
        rloo,
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, "scores = [len(set(text)) for text in completions]"),
        kl_coef=0.5,
        steps=3,
        learning_rate=3e-2,
    )
    rloo.main(args)
    rows = metrics(tmp_path / "run")[1:]
    for ((rewards, _), _), row in zip(calls, rows, strict=True):
        assert rewards.mean().item() == pytest.approx(row["score"] - 0.5 * row["kl"], abs=1e-5)
        assert rewards.mean().item() == pytest.approx(row["reward"], abs=1e-6)
    assert abs(rows[-1]["kl"]) > 0.01


def test_grpo_with_one_update_is_reinforce(chain, tmp_path, monkeypatch):  # noqa: F811
    """With --kl-coef 0, two steps equal two steps on -weights * advantages * log pi."""
    reward = checker(tmp_path, "scores = [len(set(text)) for text in completions]")
    settings = dict(reward=reward, kl_coef=0.0, prompts_per_step=6)
    grpo.main(run_args(grpo, chain, tmp_path / "a", **settings))

    def reinforce(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high):  # noqa: PLR0917
        loss = -(weights * advantages * logprobs).sum()
        return loss, torch.zeros_like(logprobs, dtype=torch.bool)

    monkeypatch.setattr(grpo, "policy_loss", reinforce)
    grpo.main(run_args(grpo, chain, tmp_path / "b", **settings))
    one = weights(tmp_path / "a")
    other = weights(tmp_path / "b")
    start = weights(chain / "sft")
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    assert not any(torch.equal(one[key], start[key]) for key in one if "norm" not in key)


def test_plain_reinforce_needs_no_group(chain, tmp_path):  # noqa: F811
    rloo.main(run_args(rloo, chain, tmp_path / "run", num_generations=1, baseline="none"))
    assert metrics(tmp_path / "run")[-1]["grad_norm"] > 0


# ---------------------------------------------------------------- every flag, through main
@pytest.fixture(scope="module")
def far(chain, tmp_path_factory):  # noqa: F811
    """A policy some nats away from its reference, runs/sft."""
    folder = tmp_path_factory.mktemp("far")
    body = "scores = [('a' in text) - 0.1 * len(text) for text in completions]"
    args = run_args(
        grpo,
        chain,
        folder / "run",
        reward=checker(folder, body),
        prompts_per_step=16,
        learning_rate=1.5e-3,
        steps=4,
        kl_coef=0.0,
    )
    grpo.main(args)
    return str(folder / "run")


def start_from(far, chain, patch, script):  # noqa: F811
    """The policy starts at `far`; the reference is runs/sft."""
    inner = script.load_policy
    paths = iter([far, str(chain / "sft")])

    def load_policy(path, *args, **kwargs):
        return inner(next(paths), *args, **kwargs)

    patch.setattr(script, "load_policy", load_policy)


HARD = """scores = []
for i, (p, c) in enumerate(zip(prompts, completions)):
    scores.append(None if i in (5, 17) else len(set(c)) + 0.1 * ord(p[0]))"""


def hard_score(tokenizer, rollout):
    """The score of HARD, except None."""
    prompt = tokenizer.decode(rollout["prompt_ids"])
    return len(set(common.completion_text(tokenizer, rollout))) + 0.1 * ord(prompt[0])


def hard_run(script, chain, far, folder, patch, **flags):  # noqa: F811, PLR0917
    """One step from `far` with unscored completions and unusual flags; returns args, metrics."""
    start_from(far, chain, patch, script)
    settings = dict(
        reward=flags.get("reward") or checker(folder, HARD),
        prompts_per_step=8,
        num_generations=G,
        steps=1,
        kl_coef=0.3,
        epsilon=0.07,
        epsilon_high=0.31,
        temperature=0.8,
        missing_eos_penalty=0.4,
        micro_batch_tokens=4096,
    )
    args = run_args(script, chain, folder / "run", **(settings | flags))
    script.main(args)
    return args, metrics(folder / "run")[1]


def number_rows(patch, script):
    """Patch completion_batch to add `row`, the index of each rollout."""
    inner = script.completion_batch

    def numbered(rollouts, device):
        return inner(rollouts, device) | {"row": torch.arange(len(rollouts))}

    patch.setattr(script, "completion_batch", numbered)


def one_update(name, chain, far, folder, patch, **flags):  # noqa: F811, PLR0917
    """A hard run with one update in several micro-batches.

    Returns its args, its metrics and the arguments of the loss for all rollouts, in order. Checks
    the log-probs against models that are loaded again, and which groups were dropped."""
    script = SCRIPTS[name]
    number_rows(patch, script)
    end_two_of_three(patch, script)
    samples = spy(patch, script, "sample")
    batches = spy(patch, script, "completion_batch")
    no_grad_calls = spy(patch, script, "batch_logprobs")
    forwards = spy(patch, script, "token_logprobs_and_entropy")
    losses = spy(patch, script, LOSSES[name])
    kl_losses = spy(patch, grpo, "kl_losses")
    args, row = hard_run(
        script, chain, far, folder, patch, micro_batch_tokens=90, update_epochs=1, **flags
    )

    # the first and the last batch belong to evaluations
    _, ((rollouts, _), batch), _ = batches
    mbs = [call[1] for call, (logprobs, _) in forwards if logprobs.requires_grad]
    rows = sorted(torch.cat([mb["row"] for mb in mbs]).tolist())
    assert len(mbs) > 2 and rows == list(range(len(rollouts)))

    def whole(calls, index):
        """Argument `index` (b, t) of a function called once per micro-batch -> (B, T)."""
        tensor = torch.zeros(batch["mask"].shape)
        for mb, (given, _) in zip(mbs, calls, strict=True):
            tensor[mb["row"], : given[index].shape[1]] = given[index].detach()
        return tensor

    update = SimpleNamespace(
        mask=batch["mask"],
        logprobs=whole(losses, 0),
        old_logprobs=whole(losses, 1),
        advantages=whole(losses, 2),
        weights=whole(losses, 3),
        finished=np.array([rollout["finished"] for rollout in rollouts]),
    )
    of_batch = [result for given, result in no_grad_calls if given[1] is batch]
    if name == "rloo" or args.kl_estimator == "k1":
        _, update.ref_logprobs = of_batch
    else:
        update.ref_logprobs = whole(kl_losses, 2)
        assert not of_batch, "the old log-probs of a single update are its own"
    assert all(given[4] == 0.07 for given, _ in losses)

    # log-probs at the temperature, by the right models
    with torch.no_grad():
        exact, entropy = script.token_logprobs_and_entropy(load_policy(far), batch, 0.8)
        sft = load_policy(chain / "sft")
        ref_exact, _ = script.token_logprobs_and_entropy(sft, batch, 0.8)
    torch.testing.assert_close(update.logprobs, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.old_logprobs, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.ref_logprobs, ref_exact, rtol=1e-4, atol=1e-4)
    assert row["ratio_max_dev"] < 1e-4
    assert row["entropy"] == pytest.approx((entropy.sum() / batch["mask"].sum()).item(), rel=1e-4)
    update.log_ratio = (update.old_logprobs - update.ref_logprobs).double().sum(1).tolist()
    assert row["kl"] == pytest.approx(np.mean(update.log_ratio), rel=1e-4)

    # whole groups are dropped; the others are complete and in order
    tokenizer = common.load_tokenizer(far)
    (sampled,) = [result for _, result in samples if len(result) == 8 * G]
    kept = [rollout for i, rollout in enumerate(sampled) if i // G not in (1, 4)]
    for ours, expected in zip(rollouts, kept, strict=True):
        assert ours["prompt_ids"] == expected["prompt_ids"]
        assert ours["completion_ids"] == expected["completion_ids"]
    assert len(kept) == 24 and update.finished.sum() == 15
    assert row["unscored"] == pytest.approx(1 - 24 / 32)
    update.rewards = [hard_score(tokenizer, x) - 0.4 * (not x["finished"]) for x in kept]
    return args, row, update


GRPO_FLAGS = [
    dict(),
    dict(scale_rewards="batch", loss_aggregation="token", kl_estimator="k2"),
    dict(
        scale_rewards="none",
        loss_aggregation="constant",
        kl_estimator="k1",
        max_completion_length=9,
    ),
    dict(mask_truncated=True, loss_aggregation="constant", max_completion_length=9),
    dict(mask_truncated=True, loss_aggregation="token", scale_rewards="none"),
]


@pytest.mark.parametrize("flags", GRPO_FLAGS)
def test_grpo_step_is_the_formula(chain, far, tmp_path, monkeypatch, flags):  # noqa: F811
    """The logged loss equals slow float64 loops over completions, log-probs and scores."""
    args, row, update = one_update("grpo", chain, far, tmp_path, monkeypatch, **flags)
    rewards = np.array(update.rewards)
    if args.kl_estimator == "k1":
        rewards = rewards - 0.3 * np.array(update.log_ratio)
    advantages = np.array(slow_advantages(rewards, G, args.scale_rewards))
    mask = update.mask.numpy()
    given = update.advantages.double().numpy()
    assert given == pytest.approx(advantages[:, None] * mask, abs=1e-3)
    if args.mask_truncated:
        mask = mask * update.finished[:, None]
    assert (update.weights > 0).tolist() == (mask > 0).tolist()
    tensors = [update.logprobs, update.old_logprobs, update.ref_logprobs]
    expected = slow_loss(*[x.double().numpy() for x in tensors], advantages, mask, args)
    assert row["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert row["reward"] == pytest.approx(rewards.mean(), rel=1e-4)


@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
def test_rloo_step_is_the_formula(chain, far, tmp_path, monkeypatch, baseline):  # noqa: F811
    _, row, update = one_update("rloo", chain, far, tmp_path, monkeypatch, baseline=baseline)
    rewards = np.array(update.rewards) - 0.3 * np.array(update.log_ratio)
    advantages = rewards if baseline == "none" else np.array(slow_leave_one_out(rewards, G))
    given = update.advantages.double().numpy()
    assert given == pytest.approx(advantages[:, None] * update.mask.numpy(), abs=1e-3)
    logprobs = update.logprobs.double().sum(1).numpy()
    assert row["loss"] == pytest.approx(np.mean(-advantages * logprobs), rel=1e-3, abs=1e-4)
    assert row["reward"] == pytest.approx(rewards.mean(), rel=1e-4)


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_each_minibatch_has_its_own_normalizer(  # noqa: PLR0917
    chain,  # noqa: F811
    far,
    tmp_path,
    monkeypatch,
    name,
    flags,
):
    number_rows(monkeypatch, SCRIPTS[name])
    losses = spy(monkeypatch, SCRIPTS[name], LOSSES[name])
    updates = spy(monkeypatch, SCRIPTS[name], "clip_gradients")
    forwards = spy(monkeypatch, SCRIPTS[name], "token_logprobs_and_entropy")
    flags = dict(num_minibatches=3, update_epochs=2, max_completion_length=7) | flags
    hard_run(SCRIPTS[name], chain, far, tmp_path, monkeypatch, **flags)
    mbs = [call[1] for call, (logprobs, _) in forwards if logprobs.requires_grad]
    assert len(losses) == len(updates) == len(mbs) == 6
    for epoch in (mbs[:3], mbs[3:]):
        rows = torch.cat([mb["row"] for mb in epoch]).tolist()
        assert sorted(rows) == list(range(len(rows))), "each rollout once per epoch"
    assert not mbs[0]["row"].equal(mbs[3]["row"]), "each epoch is shuffled"
    for (_, _, _, ours, *_), _ in losses:
        lengths = (ours > 0).sum(1)
        aggregation = flags.get("loss_aggregation", "sequence" if name == "grpo" else "sum")
        counts = {
            "sequence": lengths * (lengths > 0).sum(),
            "sum": torch.tensor(len(lengths)).expand(len(lengths)),
            "token": lengths.sum().expand(len(lengths)),
            "constant": torch.tensor(len(lengths) * 7).expand(len(lengths)),
        }
        expected = (ours > 0) / counts[aggregation].clamp(min=1)[:, None]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_of_clipping_and_equal_groups(chain, far, tmp_path, monkeypatch, name):  # noqa: F811
    """clip_fraction is 1 if all tokens are clipped in every epoch; both clip ranges are used."""
    ranges = []

    def all_clipped(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high=None):  # noqa: PLR0917
        ranges.append((epsilon, epsilon_high))
        return (0 * weights * logprobs).sum(), weights > 0

    monkeypatch.setattr(SCRIPTS[name], LOSSES[name], all_clipped)
    _, row = hard_run(
        SCRIPTS[name],
        chain,
        far,
        tmp_path,
        monkeypatch,
        reward=checker(tmp_path, "scores = [0.5] * len(prompts)"),
        update_epochs=3,
        missing_eos_penalty=0.0,
    )
    assert row["clip_fraction"] == 1.0 and row["zero_std_groups"] == 1.0 and row["unscored"] == 0
    assert ranges == [(0.07, 0.31)] * 3


def test_truncated_completions_are_masked_but_scored(chain, tmp_path, monkeypatch):  # noqa: F811
    weighted = spy(monkeypatch, grpo, "loss_weights")
    compared = spy(monkeypatch, grpo, "group_advantages")
    end_two_of_three(monkeypatch, grpo)
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, "scores = [len(set(text)) for text in completions]"),
        mask_truncated=True,
        prompts_per_step=8,
        max_completion_length=7,
    )
    grpo.main(args)
    loss_mask, *_ = weighted[0][0]
    rewards, *_ = compared[0][0]
    assert loss_mask.any(1).sum() == 21
    assert len(loss_mask) == len(rewards) == 32


# ---------------------------------------------------------------- dynamic sampling
def test_dynamic_sampling_compares_penalized_rewards(chain, tmp_path, monkeypatch):  # noqa: F811
    """All scores are 1, so groups differ by the EOS penalty only. Each round has new noise."""
    samples = spy(monkeypatch, grpo, "sample_and_score")
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        dynamic_sampling=True,
        prompts_per_step=8,
        reward=checker(tmp_path, "scores = [1.0] * len(prompts)"),
        missing_eos_penalty=0.5,
    )
    grpo.main(args)
    seeds = [rng.initial_seed() for (_, _, _, rng, _), _ in samples]
    assert len(set(seeds)) == len(seeds) > 2
    assert all(row["dropped_groups"] < 0.8 for row in metrics(tmp_path / "run")[1:])


def test_dynamic_sampling_fills_the_batch(chain, tmp_path, monkeypatch):  # noqa: F811
    """Prompts from a to m have equal scores; they are replaced until none is left."""
    body = "import zlib\ntexts = [p + c for p, c in zip(prompts, completions)]\n"
    body += "hashes = [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]\n"
    body += "scores = [0.5 if p[0] < 'n' else x for p, x in zip(prompts, hashes)]"
    batches = spy(monkeypatch, grpo, "completion_batch")
    compared = spy(monkeypatch, grpo, "group_advantages")
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, body),
        dynamic_sampling=True,
        prompts_per_step=12,
        num_generations=3,
        kl_coef=0.0,
    )
    grpo.main(args)
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    trained = [rollouts for (rollouts, _), _ in batches if len(rollouts) == 36]
    rewards = [given[0] for given, _ in compared]
    assert len(trained) == len(rewards) == 2
    for rollouts, scores in zip(trained, rewards):
        for i, rollout in enumerate(rollouts):
            ids = rollout["prompt_ids"]
            assert ids == rollouts[i // 3 * 3]["prompt_ids"], "a group has one prompt"
            text = tokenizer.decode(ids)
            assert text[0] >= "n"
            text += common.completion_text(tokenizer, rollout)
            assert scores[i].item() == pytest.approx(zlib.crc32(text.encode()) % 1000 / 1000)
    for row, scores in zip(metrics(tmp_path / "run")[1:], rewards):
        assert row["score"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert row["zero_std_groups"] == 0 and 0.2 < row["dropped_groups"] < 0.8


def test_dynamic_sampling_stops_after_eight_rounds(chain, tmp_path):  # noqa: F811
    """Equal groups of the last round stay, so the batch is complete."""
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, "scores = [1.0] * len(prompts)"),
        dynamic_sampling=True,
    )
    grpo.main(args)
    row = metrics(tmp_path / "run")[1]
    assert row["zero_std_groups"] == 1.0 and row["dropped_groups"] == pytest.approx(8 / 9)
    assert row["unscored"] == 0


# ---------------------------------------------------------------- evaluation
def test_evaluation_measures_the_kl_at_the_sampling_temperature(
    chain,  # noqa: F811
    far,
    tmp_path,
    monkeypatch,
):
    calls = spy(monkeypatch, grpo, "batch_logprobs")
    hard_run(grpo, chain, far, tmp_path, monkeypatch)
    (given, logprobs), (_, ref_logprobs) = calls[:2]
    batch = given[1]
    for path, ours in [(far, logprobs), (chain / "sft", ref_logprobs)]:
        with torch.no_grad():
            exact, _ = grpo.token_logprobs_and_entropy(load_policy(path), batch, 0.8)
        assert torch.allclose(ours, exact, atol=1e-4)
    kl = (logprobs - ref_logprobs).sum(1).mean().item()
    assert metrics(tmp_path / "run")[0]["eval/kl"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("G", [2, 3, 8, 11])
def test_pass_at_k_is_the_mean_over_all_subsets(G):
    """Subsets of k samples. A prompt without a verdict is skipped."""
    torch.manual_seed(G)
    golds = (torch.rand(6, G) < torch.linspace(0, 1, 6)[:, None]).float()
    found = grpo.pass_at_k(torch.cat([golds, torch.full((1, G), torch.nan)]))
    ks = [k for k in (1, 2, 4, 8) if k < G] + [G]
    assert list(found) == [f"eval/pass@{k}" for k in ks]
    for k in ks:
        subsets = list(itertools.combinations(range(G), k))
        exact = sum(golds[:, rows].amax(1).double().mean().item() for rows in subsets)
        assert found[f"eval/pass@{k}"].item() == pytest.approx(exact / len(subsets), abs=1e-6)


def test_pass_at_g_counts_prompts_with_a_right_sample(chain, tmp_path, monkeypatch):  # noqa: F811
    """One of two samples of the first held-out prompt is right, and none of the second."""
    args = run_args(grpo, chain, tmp_path / "run", num_generations=2, reward="sort")
    args.temperature = 0.7
    device = common.setup(args)
    tokenizer = common.load_tokenizer(args.model)
    policy = load_policy(args.model)
    examples = []
    for prompt, answer in [("ba>", "ab"), ("dc>", "cd")]:
        row = {"prompt": prompt, "answer": answer}
        ids = tokenizer(prompt).input_ids
        examples.append({"prompt": prompt, "row": row, "where": "", "prompt_ids": ids})
    answers = {1: ["ab[EOS]", "cd[EOS]"], 2: ["ba[EOS]", "ab[EOS]", "cd", "dd[EOS]"]}

    def sample(policy, examples, *, num_generations, temperature, **options):
        assert (num_generations, temperature) in ((1, 0.0), (2, 0.7))
        rollouts = []
        for i, text in enumerate(answers[num_generations]):
            ids = tokenizer(text).input_ids
            rollout = {"completion_ids": ids, "finished": text.endswith("[EOS]")}
            rollouts.append(examples[i // num_generations] | rollout)
        return rollouts

    monkeypatch.setattr(grpo, "sample", sample)
    logged = []
    run = SimpleNamespace(args=args, log_samples=lambda *given: logged.append(given))
    scorers = {"score": common.load_reward(args, examples, tokenizer, device)}
    scorers |= common.load_gold(args, args.dataset, tokenizer)
    result = grpo.evaluate(policy, policy, scorers, examples, run=run, step=3)
    assert result["eval/gold_greedy"] == 1.0 and result["eval/gold"] == 0.25
    assert result["eval/pass@1"] == 0.25 and result["eval/pass@2"] == 0.5
    assert result["eval/kl"] == 0 and result["eval/eos_rate"] == 0.75
    assert result["eval/completion_length"] == (3 + 3 + 2 + 3) / 4
    ((step, rollouts, values),) = logged
    assert step == 3
    assert [common.completion_text(tokenizer, x) for x in rollouts] == ["ba", "cd"]
    assert values["gold"] == values["score"] == [0, 0] and len(values["kl"]) == 2


def test_gsm8k_end_to_end(chain, tmp_path):  # noqa: F811
    """A tiny model solves no problem: all groups are equal, all pass rates 0."""
    rows = [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(8)
    ]
    data = write_rows(tmp_path / "gsm8k.jsonl", rows)
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        dataset=data,
        eval_dataset=data,
        reward="gsm8k",
        prompt_template="{question}",
        prompts_per_step=4,
        max_completion_length=8,
    )
    grpo.main(args)
    last = metrics(tmp_path / "run")[-1]
    assert last["zero_std_groups"] == 1.0 and last["gold"] == last["score"] == 0
    assert last["eval/gold"] == last["eval/gold_greedy"] == last["eval/pass@4"] == 0


# ---------------------------------------------------------------- distillation
@pytest.mark.parametrize("script", [grpo, rloo])
def test_distillation_from_the_initial_policy(script, chain, tmp_path):  # noqa: F811
    """The KL and its gradient are 0, the score is 0; the exact checker is still logged.

    Convergence to another teacher is tested in test_theorems.py."""
    flags = dict(reward="none", reference=str(chain / "sft"), kl_coef=1.0, steps=1)
    script.main(run_args(script, chain, tmp_path / "run", **flags))
    row = metrics(tmp_path / "run")[-1]
    assert row["score"] == 0 and row["kl"] == 0 and "gold" in row
    assert row["grad_norm"] == pytest.approx(0, abs=1e-6)


def test_the_kl_is_from_the_teacher(chain, tmp_path):  # noqa: F811
    """With another teacher, the KL of the first step is not 0."""
    teacher = str(tmp_path / "teacher")
    shutil.copytree(chain / "sft", teacher)
    model = load_policy(teacher)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(teacher)
    flags = dict(reward="none", reference=teacher, kl_coef=1.0, steps=1)
    for script in (grpo, rloo):
        script.main(run_args(script, chain, tmp_path / script.__name__, **flags))
        assert abs(metrics(tmp_path / script.__name__)[-1]["kl"]) > 0.1


def test_a_teacher_with_another_tokenizer_is_refused(chain, tmp_path, capsys):  # noqa: F811
    """It lacks a token of the policy. One more token of its own does no harm."""
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    tokenizer.add_tokens(["more"])
    richer = str(tmp_path / "richer")
    shutil.copytree(chain / "sft", richer)
    tokenizer.save_pretrained(richer)
    teacher = str(chain / "sft")
    args = run_args(grpo, chain, tmp_path / "run", model=richer, reference=teacher)
    check_refused(grpo, args, capsys, f"--reference {teacher}", "tokens and embeddings")
    grpo.main(run_args(grpo, chain, tmp_path / "run", reference=richer, steps=1))


def test_a_teacher_with_an_unknown_head_is_refused(chain, tmp_path, capsys):  # noqa: F811
    """The head of RoFormer is not a matrix product, so its log-probs would be wrong."""
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    config = transformers.RoFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        pad_token_id=0,
    )
    teacher = str(tmp_path / "teacher")
    transformers.RoFormerForCausalLM(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    args = run_args(grpo, chain, tmp_path / "run", reference=teacher)
    check_refused(grpo, args, capsys, teacher, "RoFormerForCausalLM")


# ---------------------------------------------------------------- errors
REFUSED = [
    ("rloo", dict(num_generations=1), ["--num-generations must be at least 2"]),
    ("grpo", dict(num_generations=1), ["--num-generations must be at least 2"]),
    ("grpo", dict(reward="gsm8k"), ["--reward gsm8k", "answer", "row 1"]),
    ("grpo", dict(ratio="sequence", loss_aggregation="token"), ["--ratio sequence", "sequence"]),
    ("grpo", dict(reference="x", kl_coef=0.0), ["--reference x", "--kl-coef 0"]),
    ("rloo", dict(reference="x", kl_coef=0.0), ["--reference x", "--kl-coef 0"]),
]


@pytest.mark.parametrize("name, changes, words", REFUSED)
def test_contradicting_flags_are_refused(chain, tmp_path, capsys, name, changes, words):  # noqa: F811, PLR0917
    args = run_args(SCRIPTS[name], chain, tmp_path / "run", **changes)
    check_refused(SCRIPTS[name], args, capsys, *words)
    assert not (tmp_path / "run").exists()


def test_prompts_that_exceed_the_context(chain, tmp_path, capsys):  # noqa: F811
    """A context of 64 minus completions of 30 leaves 34; --max-prompt-length drops the others."""
    rows = [dict(prompt="a" * n + ">") for n in (3, 33, 34, 60)]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = dict(dataset=data, max_completion_length=30, steps=1)
    args = run_args(grpo, chain, tmp_path / "run", **settings)
    check_refused(grpo, args, capsys, "91 tokens", "64")
    grpo.main(run_args(grpo, chain, tmp_path / "run", max_prompt_length=34, **settings))
    printed = capsys.readouterr().out
    assert f"{data}: 2 rows\n" in printed
    assert "dropped 2 rows: longer than --max-prompt-length 34, first at" in printed
