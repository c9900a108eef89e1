"""rloo.py and grpo.py: advantages, KL estimates, loss weights and losses against slow float64
loops, closed forms and invariances; then both mains on a tiny model."""

import contextlib
import json
import math
import shutil
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import CPU, end_two_of_three
from test_scripts import chain, metrics, refused, weights  # noqa: F401 (a fixture)

import common
import grpo
import rloo

G = 4
SCRIPTS = {"rloo": rloo, "grpo": grpo}
LOSSES = {"rloo": "reinforce_loss", "grpo": "policy_loss"}

pytestmark = pytest.mark.usefixtures("cut_by_budget_alone")


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged_mask():
    """(B, T) = (6, 7): rows of one run of ones, one of a single token, one without any."""
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


def test_group_advantages_are_scaled_by_the_group_unless_told_otherwise():
    rewards = torch.tensor(REWARDS)
    default = grpo.group_advantages(rewards, G)
    assert default.equal(grpo.group_advantages(rewards, G, "group"))


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
    if name != "batch":  # (the batch's standard deviation sees what differs between groups)
        assert function(rewards + constant, 6).allclose(base, atol=1e-5), "a constant per group"
    assert function(rewards + 5.0, 6).allclose(base, atol=1e-5), "a constant for all"
    scaled = function(7.0 * rewards, 6)
    assert scaled.allclose(base if name in ("group", "batch") else 7.0 * base, rtol=1e-4), "scale"
    assert base.view(4, 6).sum(1).abs().max() < 1e-5, "each group's advantages sum to 0"


@pytest.mark.parametrize("name, function", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(name, function, dtype):
    """0.1 five times has a float mean other than 0.1: (r - mean) / (std + 1e-6) would be 1e-2, not
    0."""
    for size in range(2, 10):
        for value in (0.1, 1 / 3, -7.7, 1e6 / 7):
            rewards = torch.full((3 * size,), value, dtype=dtype)
            rewards[-1] += 1.0  # (a batch without any spread has no standard deviation to speak of)
            assert not function(rewards, size)[: 2 * size].any()
            assert grpo.equal_groups(rewards, size).tolist() == [True, True, False]


def test_an_unknown_scale_aggregation_or_estimator_is_an_error():
    with pytest.raises(ValueError, match="prompt"):
        grpo.group_advantages(torch.tensor(REWARDS), G, "prompt")
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="mean"):
        grpo.loss_weights(ragged_mask(), "mean", 5)


def test_equal_groups():
    assert grpo.equal_groups(torch.tensor(REWARDS), G).tolist() == [False, False, True, False]
    assert grpo.equal_groups(torch.tensor([]), G).tolist() == []


# ---------------------------------------------------------------- losses
def slow_loss(logps, old, ref, advantages, mask, args):  # noqa: PLR0917
    """DeepSeekMath's equation 3 and its relatives, token by token."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    sums = []
    counts = []
    for i in range(mask.shape[0]):
        total = 0.0
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in tokens:
            ratio = math.exp(logps[i, t] - old[i, t])
            bounded = min(max(ratio, 1 - args.epsilon), 1 + high)
            total -= min(ratio * advantages[i], bounded * advantages[i])
            if args.kl_in == "loss":
                x = logps[i, t] - ref[i, t]
                penalties = {"k2": x * x / 2, "k3": math.exp(-x) - 1 + x}
                factor = ratio if args.kl_ratio else 1.0
                total += args.kl_coef * factor * penalties[args.kl_estimator]
        if tokens:
            sums.append(total)
            counts.append(len(tokens))
    if args.loss_aggregation == "sequence":
        return float(np.mean([s / n for s, n in zip(sums, counts)]))
    if args.loss_aggregation == "token":
        return sum(sums) / sum(counts)
    return sum(sums) / (len(mask) * args.max_completion_length)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl", [("k3", "loss"), ("k2", "loss"), ("k1", "reward")])
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_loss(aggregation, kl, high):
    estimator, place = kl
    args = grpo.Args(
        loss_aggregation=aggregation,
        kl_estimator=estimator,
        kl_in=place,
        kl_coef=0.3,
        max_completion_length=11,
        epsilon=0.2,
        epsilon_high=high,
    )
    mask = ragged_mask()
    logps, old, ref = (-draw(seed, 6, 7).abs() * mask for seed in (1, 2, 3))
    advantages = draw(4, 6)
    w = grpo.loss_weights(mask, aggregation, 11)
    ours, clipped = grpo.policy_loss(
        logps, old, advantages[:, None] * mask, w, 0.2, epsilon_high=high
    )
    if place == "loss":
        ours = ours + 0.3 * (w * grpo.kl_penalty(logps, ref, estimator)).sum()
    expected = slow_loss(
        logps.double().numpy(),
        old.double().numpy(),
        ref.double().numpy(),
        advantages.double().numpy(),
        mask.numpy(),
        args,
    )
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert clipped.any() and not clipped[mask == 0].any()


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_loss_weights_of_a_batch_without_a_trained_token(aggregation):
    assert not grpo.loss_weights(torch.zeros(3, 4, dtype=torch.long), aggregation, 5).any()


def test_reinforce_loss_is_minus_advantage_times_log_prob():
    """At the first update: the mean over completions of - A log pi(completion), to the letter."""
    mask = ragged_mask().double()
    logps = -draw(1, 6, 7).abs().double() * mask
    advantages = draw(2, 6).double()
    loss, clipped = rloo.reinforce_loss(logps, logps, advantages[:, None] * mask, mask / 6, 0.2)
    slow = np.mean([-a.item() * logp.item() for a, logp in zip(advantages, logps.sum(1))])
    assert loss.item() == pytest.approx(slow, rel=1e-12) and not clipped.any()


def test_reinforce_loss_of_a_ratio_that_overflows_is_finite():
    """300 tokens, each 0.35 nats up: clipped where A > 0, and never NaN."""
    old = torch.full((3, 300), -2.0)
    ones = torch.ones(3, 300)
    logps = (old + 0.35).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0])[:, None] * ones
    loss, clipped = rloo.reinforce_loss(logps, old, advantages, ones / 3, 0.2)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert clipped.any(1).tolist() == [True, False, False] and not logps.grad[[0, 2]].any()


@pytest.mark.parametrize("high", [None, 0.5])
def test_reinforce_loss_later_has_the_gradient_of_a_clipped_sequence_ratio(high):
    mask = ragged_mask()
    old = -draw(1, 6, 7).abs().double() * mask
    advantages = draw(5, 6).double()
    logps = (old + 0.15 * draw(3, 6, 7) * mask).requires_grad_()
    w = mask.double() / 6
    loss, clipped = rloo.reinforce_loss(
        logps, old, advantages[:, None] * mask, w, 0.2, epsilon_high=high
    )
    (ours,) = torch.autograd.grad(loss, logps)
    ratio = (logps - old).sum(1).exp()
    bounded = ratio.clamp(0.8, 1 + (high or 0.2))
    surrogate = torch.max(-advantages * ratio, -advantages * bounded).mean()
    (expected,) = torch.autograd.grad(surrogate, logps)
    assert torch.allclose(ours, expected * mask, atol=1e-12)
    rows = clipped.any(1)
    assert 0 < rows.sum() < 5 and clipped[rows].sum() == mask[rows].sum() and not ours[rows].any()


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_only_k3_times_the_ratio_has_the_gradient_of_the_kl(distance):
    """All five tokens enumerated, drawn from a policy that the present one has left or not: the
    expected gradient of ratio * k3 is that of KL(policy || reference); k2's only at ratio 1, where
    k3's is that of KL(reference || policy)."""
    start, step, ref = (draw(seed, 5).double() for seed in (1, 2, 3))
    old_logprobs = start.log_softmax(0)
    logits = (start + distance * step).requires_grad_()
    logprobs = logits.log_softmax(0)
    ref_logprobs = ref.log_softmax(0)
    ratio = (logprobs - old_logprobs).exp()
    probabilities = old_logprobs.exp()

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def error(loss, expected):
        return ((gradient(loss) - expected).norm() / expected.norm()).item()

    k2, k3 = (grpo.kl_penalty(logprobs, ref_logprobs, name) for name in ("k2", "k3"))
    forward = gradient((logprobs.exp() * (logprobs - ref_logprobs)).sum())
    backward = gradient((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum())
    assert error((probabilities * ratio * k3).sum(), forward) < 1e-14
    plain = error((probabilities * k2).sum(), forward), error((probabilities * k3).sum(), backward)
    if distance == 0:
        assert max(plain) < 1e-14
    else:
        assert min(plain) > 0.3
        assert error((probabilities * k3).sum(), forward) > 0.3


# ---------------------------------------------------------------- rollouts
def test_a_group_that_cannot_be_judged_is_left_out_whole(monkeypatch):
    """Four prompts, three completions of each; the second and the last group hold a NaN."""
    completions = [[7, 1], [8], [9, 1]] * 4
    monkeypatch.setattr(grpo, "sample", lambda *args, **kwargs: completions)
    scores = [1.0, 2.0, 3.0, 4.0, math.nan, 6.0, 7.0, 8.0, 9.0, math.nan, math.nan, math.nan]
    examples = [{"prompt_ids": [i]} for i in range(4)]
    rollouts = grpo.sample_groups(
        None,
        examples,
        None,
        ensemble=[lambda examples, completions: torch.tensor(scores)],
        eos_ids=[1],
        args=grpo.Args(num_generations=3, missing_eos_penalty=0.5),
        autocast=contextlib.nullcontext,
    )
    assert [rollout["prompt_ids"] for rollout in rollouts] == [[0], [0], [0], [2], [2], [2]]
    assert [rollout["completion_ids"] for rollout in rollouts] == [[7, 1], [8], [9, 1]] * 2
    assert [rollout["finished"] for rollout in rollouts] == [True, False, True] * 2
    assert [rollout["score"] for rollout in rollouts] == [1, 2, 3, 7, 8, 9]
    assert [rollout["reward"] for rollout in rollouts] == [1, 1.5, 3, 7, 7.5, 9]


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


def checker(tmp_path, body):
    """A file with a checker `f`; body computes `scores` from prompts, completions, rows."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (tmp_path / "reward.py").write_text(
        f"def f(prompts, completions, rows):\n{lines}    return scores\n"
    )
    return f"{tmp_path}/reward.py:f"


def spy(patch, module, name, calls):
    """Record the arguments of a function, and what it gave."""
    inner = getattr(module, name)

    def recorder(*args, **kwargs):
        result = inner(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(module, name, recorder)


def gradient_of_a_run(script, args, monkeypatch):
    """Run main -> the gradient of its first optimiser step as one vector."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorder(parameters, max_norm):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten() for p in parameters]).double())
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorder)
        script.main(args)
    return seen[0]


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
            kl_in="reward",
            mask_truncated=True,
        ),
    ),
]


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_a_budget_that_cuts_groups_apart_changes_nothing(
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
    flags,
):
    """P=3, G=5, prompts of 2 to 40 tokens: the gradient of one big batch, however it is cut."""
    data = tmp_path / "prompts.jsonl"
    prompts = ["b>", "zyxwvutsrq>", "abcdefghijklmnopqrstuvwxyz" + "abcdefghijklm>"]
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    body = "scores = [len(set(c)) + 0.1 * len(p) for p, c in zip(prompts, completions)]"
    results = []
    for budget in (60, 130, 100_000):
        args = run_args(
            SCRIPTS[name],
            chain,
            tmp_path / str(budget),
            dataset=str(data),
            reward=checker(tmp_path, body),
            num_generations=5,
            steps=1,
            max_completion_length=12,
            micro_batch_tokens=budget,
            **flags,
        )
        results.append(gradient_of_a_run(SCRIPTS[name], args, monkeypatch))
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


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_starts_at_ratio_one_and_kl_zero(chain, tmp_path, name, temperature):  # noqa: F811
    args = run_args(
        SCRIPTS[name],
        chain,
        tmp_path / "run",
        temperature=temperature,
        eval_every=1,
        num_minibatches=2,
    )
    SCRIPTS[name].main(args)
    first, second = metrics(tmp_path / "run")[1:]
    assert first["ratio_max_dev"] < 1e-4 and abs(first["kl"]) < 1e-4 < abs(second["kl"])
    wanted = {"gold", "score", "unjudged", "zero_std_groups"}
    wanted |= {"eval/gold", "eval/gold_greedy", "eval/pass@4"}
    assert wanted <= first.keys()
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 3 * 16


@pytest.mark.parametrize("kl", [("k1", "reward"), ("k3", "loss"), ("k2", "loss")])
def test_the_kl_pulls_back_to_the_reference(chain, far, tmp_path, monkeypatch, kl):  # noqa: F811
    """From a policy apart from its reference, rewards equal: the KL falls, whichever way it is paid
    for."""
    estimator, place = kl
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
        kl_in=place,
        kl_coef=1.0,
    )
    grpo.main(args)
    kls = [row["kl"] for row in metrics(tmp_path / "run") if "kl" in row]
    assert sum(kls[-3:]) < 0.4 * sum(kls[:3]), kls


@pytest.mark.parametrize("name", SCRIPTS)
def test_advantages_belong_to_their_own_prompts(chain, tmp_path, name):  # noqa: F811
    """A score that depends on the prompt alone is equal within each group: nothing is learnt. Were
    groups tiled instead of side by side, or rows paired with others' prompts, there would be
    advantages."""
    body = "assert all(p == r['prompt'] for p, r in zip(prompts, rows))\n"
    body += "scores = [ord(p[0]) for p in prompts]"
    run = tmp_path / "run"
    args = run_args(
        SCRIPTS[name],
        chain,
        run,
        reward=checker(tmp_path, body),
        kl_coef=0.0,
        prompts_per_step=5,
    )
    SCRIPTS[name].main(args)
    before = weights(chain / "sft")
    after = weights(run)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(row["zero_std_groups"] == 1.0 for row in metrics(run)[1:])


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_kl_a_reference_is_there_for_evaluations_only(
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
):
    loaded = []
    spy(monkeypatch, SCRIPTS[name], "load_policy", loaded)
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", kl_coef=0.0))
    rows = metrics(tmp_path / "run")
    assert len(loaded) == 1 + sum("eval/kl" in row for row in rows) == 3
    assert rows[0]["eval/kl"] == 0 != rows[-1]["eval/kl"]
    assert not any("kl" in row for row in rows)


@pytest.mark.parametrize(
    "name, flags", [("rloo", {}), ("grpo", {}), ("grpo", dict(dynamic_sampling=True))]
)
def test_a_step_of_which_nothing_can_be_judged_ends_the_run(
    chain,  # noqa: F811
    tmp_path,
    capsys,
    name,
    flags,
):
    flags = flags | dict(reward=checker(tmp_path, "scores = [None] * len(prompts)"))
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", **flags))
    assert ended.value.code == 2
    refused(capsys, "step 1", "judged", " 0 ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_checker_cannot_judge_is_counted(chain, tmp_path, capsys, name):  # noqa: F811
    """One of three groups is judged: four minibatches are possible, five are not."""
    reward = checker(tmp_path, "scores = [1.0 if p == prompts[0] else None for p in prompts]")
    for num_minibatches in (4, 5):
        args = run_args(
            SCRIPTS[name],
            chain,
            tmp_path / f"{num_minibatches}",
            reward=reward,
            steps=1,
            num_minibatches=num_minibatches,
        )
        if num_minibatches == 5:
            with pytest.raises(SystemExit):
                SCRIPTS[name].main(args)
            refused(capsys, "step 1", "judged", " 4 ")
        else:
            SCRIPTS[name].main(args)
    row = metrics(tmp_path / "4")[1]
    assert row["unjudged"] == pytest.approx(2 / 3) and row["score"] == row["zero_std_groups"] == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_eos_is_paid_for(chain, tmp_path, monkeypatch, name):  # noqa: F811
    end_two_of_three(monkeypatch, SCRIPTS[name])
    args = run_args(
        SCRIPTS[name],
        chain,
        tmp_path / "run",
        reward=checker(tmp_path, "scores = [1] * len(prompts)"),
        missing_eos_penalty=0.25,
        kl_coef=0.0,
        prompts_per_step=8,
    )
    SCRIPTS[name].main(args)
    first = metrics(tmp_path / "run")[1]
    assert first["eos_rate"] == pytest.approx(21 / 32) and first["score"] == 1
    assert first["reward"] == pytest.approx(1 - 0.25 * 11 / 32, abs=1e-5)


def test_rloo_pays_the_kl_before_the_baseline(chain, tmp_path, monkeypatch):  # noqa: F811
    """Sequence reward = score - kl_coef * summed log-ratio; the baseline is taken of that."""
    seen = []
    spy(monkeypatch, rloo, "leave_one_out_advantages", seen)
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
    for ((rewards, _), _), row in zip(seen, rows, strict=True):
        assert rewards.mean().item() == pytest.approx(row["score"] - 0.5 * row["kl"], abs=1e-5)
        assert rewards.mean().item() == pytest.approx(row["reward"], abs=1e-6)
    assert abs(rows[-1]["kl"]) > 0.01


def test_grpo_of_one_update_is_reinforce(chain, tmp_path, monkeypatch):  # noqa: F811
    """Two steps with --kl-coef 0 equal two steps on - weights * advantages * log pi."""
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


def test_truncated_completions_are_masked_and_still_counted(chain, tmp_path, monkeypatch):  # noqa: F811
    weighed = []
    compared = []
    spy(monkeypatch, grpo, "loss_weights", weighed)
    spy(monkeypatch, grpo, "group_advantages", compared)
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
    trained, *_ = weighed[0][0]
    rewards, *_ = compared[0][0]
    assert trained.any(1).sum() == 21
    assert len(trained) == len(rewards) == 32


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
    """The policy starts at `far`, while the reference is runs/sft."""
    load = script.load_policy
    paths = iter([far, str(chain / "sft")])
    patch.setattr(script, "load_policy", lambda path, *a, **k: load(next(paths), *a, **k))


HARD = """scores = []
for i, (p, c) in enumerate(zip(prompts, completions)):
    scores.append(None if i in (5, 17) else len(set(c)) + 0.1 * ord(p[0]))"""


def hard_run(script, chain, far, folder, patch, **flags):  # noqa: F811, PLR0917
    """One step from `far` against runs/sft: unjudged and truncated completions, odd flags
    everywhere -> its flags, its metrics."""
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
    """Every batch has `row`, so that a micro-batch says which rollouts it holds."""
    inner = script.completion_batch

    def numbered(prompts, completions, device):
        return inner(prompts, completions, device) | {"row": torch.arange(len(prompts))}

    patch.setattr(script, "completion_batch", numbered)


def one_update(name, chain, far, folder, patch, **flags):  # noqa: F811, PLR0917
    """A hard run of one update in several micro-batches -> its flags, its metrics, and what the
    loss was given of every rollout, in the order of rollouts; log-probs are checked against those
    of models loaded afresh, and so is which groups were left out."""
    script = SCRIPTS[name]
    number_rows(patch, script)
    end_two_of_three(patch, script)
    calls = {
        function: []
        for function in (
            "sample",
            "completion_batch",
            "batch_logprobs",
            "token_logprobs_and_entropy",
            LOSSES[name],
        )
    }
    calls["kl_penalty"] = []
    for function in calls:
        if hasattr(script, function):
            spy(patch, script, function, calls[function])
    args, row = hard_run(
        script, chain, far, folder, patch, micro_batch_tokens=90, update_epochs=1, **flags
    )

    # the second batch is the one that was trained on: before and after it are evaluations
    (prompts, completions, _), batch = calls["completion_batch"][1]
    forwards = calls["token_logprobs_and_entropy"]
    mbs = [call[1] for call, (logprobs, _) in forwards if logprobs.requires_grad]
    assert len(mbs) > 2 and sorted(torch.cat([mb["row"] for mb in mbs])) == list(
        range(len(prompts))
    )

    def whole(function, index):
        """An argument (b, t) of a function called once a micro-batch -> (B, T)."""
        tensor = torch.zeros(batch["mask"].shape)
        for mb, (given, _) in zip(mbs, calls[function], strict=True):
            tensor[mb["row"], : given[index].shape[1]] = given[index].detach()
        return tensor

    update = SimpleNamespace(
        mask=batch["mask"],
        logprobs=whole(LOSSES[name], 0),
        old_logprobs=whole(LOSSES[name], 1),
        advantages=whole(LOSSES[name], 2),
        weights=whole(LOSSES[name], 3),
        finished=np.array([ids[-1] == 1 for ids in completions]),
    )
    all_at_once = [result for given, result in calls["batch_logprobs"] if given[1] is batch]
    if getattr(args, "kl_in", "reward") == "reward":
        _, update.ref_logprobs = all_at_once
    else:
        update.ref_logprobs = whole("kl_penalty", 1)
        assert not all_at_once, "a single update gives its old log-probs by its own forward"
    assert all(given[4] == 0.07 for given, _ in calls[LOSSES[name]])

    # log-probs are those of the temperature, of the right models
    with torch.no_grad():
        exact, entropy = script.token_logprobs_and_entropy(common.load_policy(far, CPU), batch, 0.8)
        sft = common.load_policy(str(chain / "sft"), CPU)
        ref_exact, _ = script.token_logprobs_and_entropy(sft, batch, 0.8)
    torch.testing.assert_close(update.logprobs, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.old_logprobs, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.ref_logprobs, ref_exact, rtol=1e-4, atol=1e-4)
    assert row["ratio_max_dev"] < 1e-4
    assert row["entropy"] == pytest.approx((entropy.sum() / batch["mask"].sum()).item(), rel=1e-4)
    update.log_ratio = (update.old_logprobs - update.ref_logprobs).double().sum(1).tolist()
    assert row["kl"] == pytest.approx(np.mean(update.log_ratio), rel=1e-4)

    # whole groups are left out, and the others are complete and in order
    tokenizer = common.load_tokenizer(far)
    ((_, sampled_prompts), sampled) = next(
        (given[:2], result) for given, result in calls["sample"] if len(result) == 32
    )
    expected = []
    update.rewards = []
    for i in range(0, 32, G):
        group = [(sampled_prompts[i // G], ids) for ids in sampled[i : i + G]]
        scores = [hard_score(tokenizer, p, c) for p, c in group]
        if i // G not in (1, 4):
            expected += group
            update.rewards += [s - 0.4 * (c[-1] != 1) for s, (_, c) in zip(scores, group)]
    assert list(zip(prompts, completions)) == expected
    assert len(expected) == 24 and update.finished.sum() == 15
    assert row["unjudged"] == pytest.approx(1 - len(expected) / 32)
    return args, row, update


def hard_score(tokenizer, prompt_ids, completion_ids):
    """What HARD says of what it judges."""
    prompt = tokenizer.decode(prompt_ids)
    text = common.completion_text(tokenizer, prompt_ids, completion_ids)
    return len(set(text)) + 0.1 * ord(prompt[0])


GRPO_FLAGS = [
    dict(),
    dict(scale_rewards="batch", loss_aggregation="token", kl_estimator="k2"),
    dict(
        scale_rewards="none",
        loss_aggregation="constant",
        kl_estimator="k1",
        kl_in="reward",
        max_completion_length=9,
    ),
    dict(mask_truncated=True, loss_aggregation="constant", max_completion_length=9),
    dict(mask_truncated=True, loss_aggregation="token", scale_rewards="none"),
]


@pytest.mark.parametrize("flags", GRPO_FLAGS)
def test_grpo_step_is_the_formula(chain, far, tmp_path, monkeypatch, flags):  # noqa: F811
    """The loss that main logs, from its completions, log-probs and scores by float64 loops over the
    flags."""
    args, row, update = one_update("grpo", chain, far, tmp_path, monkeypatch, **flags)
    rewards = np.array(update.rewards)
    if args.kl_in == "reward":
        rewards = rewards - 0.3 * np.array(update.log_ratio)
    advantages = np.array(slow_advantages(rewards, G, args.scale_rewards))
    mask = update.mask.numpy()
    given = update.advantages.double().numpy()
    assert given == pytest.approx(advantages[:, None] * mask, abs=1e-3)
    if args.mask_truncated:
        mask = mask * update.finished[:, None]
    assert (update.weights > 0).tolist() == (mask > 0).tolist()
    expected = slow_loss(
        update.logprobs.double().numpy(),
        update.old_logprobs.double().numpy(),
        update.ref_logprobs.double().numpy(),
        advantages,
        mask,
        args,
    )
    assert row["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert row["reward"] == pytest.approx(rewards.mean(), rel=1e-4)


@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
def test_rloo_step_is_the_formula(chain, far, tmp_path, monkeypatch, baseline):  # noqa: F811
    _, row, update = one_update("rloo", chain, far, tmp_path, monkeypatch, baseline=baseline)
    rewards = np.array(update.rewards) - 0.3 * np.array(update.log_ratio)
    advantages = rewards if baseline == "none" else np.array(slow_leave_one_out(rewards, G))
    given = update.advantages.double().numpy()
    assert given == pytest.approx(advantages[:, None] * update.mask.numpy(), abs=1e-3)
    logps = update.logprobs.double().sum(1).numpy()
    assert row["loss"] == pytest.approx(np.mean(-advantages * logps), rel=1e-3, abs=1e-4)
    assert row["reward"] == pytest.approx(rewards.mean(), rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_clip_ranges_reach_the_loss(chain, far, tmp_path, monkeypatch, name):  # noqa: F811
    seen = []

    def loss(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high=None):  # noqa: PLR0917
        seen.append((epsilon, epsilon_high))
        return (0 * weights * logprobs).sum(), weights > 0

    monkeypatch.setattr(SCRIPTS[name], LOSSES[name], loss)
    hard_run(SCRIPTS[name], chain, far, tmp_path, monkeypatch)
    assert seen == [(0.07, 0.31)]


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_each_minibatch_has_its_own_normaliser(  # noqa: PLR0917
    chain,  # noqa: F811
    far,
    tmp_path,
    monkeypatch,
    name,
    flags,
):
    calls = []
    steps = []
    number_rows(monkeypatch, SCRIPTS[name])
    spy(monkeypatch, SCRIPTS[name], LOSSES[name], calls)
    spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", steps)
    forwards = []
    spy(monkeypatch, SCRIPTS[name], "token_logprobs_and_entropy", forwards)
    flags = dict(num_minibatches=3, update_epochs=2, max_completion_length=7) | flags
    hard_run(SCRIPTS[name], chain, far, tmp_path, monkeypatch, **flags)
    mbs = [call[1] for call, (logprobs, _) in forwards if logprobs.requires_grad]
    assert len(calls) == len(steps) == len(mbs) == 6
    for epoch in (mbs[:3], mbs[3:]):
        rows = torch.cat([mb["row"] for mb in epoch]).tolist()
        assert sorted(rows) == list(range(len(rows))), "an epoch goes through each rollout once"
    assert not mbs[0]["row"].equal(mbs[3]["row"]), "in an order of its own"
    for (_, _, _, ours, *_), _ in calls:
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
    """All tokens clipped is a fraction of 1, whatever the epochs; equal scores are equal groups."""

    def all_clipped(logprobs, old_logprobs, advantages, weights, *epsilons, **more_epsilons):
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
    assert row["clip_fraction"] == 1.0 and row["zero_std_groups"] == 1.0 and row["unjudged"] == 0


def test_evaluation_measures_the_kl_at_the_temperature_of_sampling(
    chain,  # noqa: F811
    far,
    tmp_path,
    monkeypatch,
):
    calls = []
    spy(monkeypatch, grpo, "batch_logprobs", calls)
    hard_run(grpo, chain, far, tmp_path, monkeypatch)
    (given, logprobs), (_, ref_logprobs) = calls[:2]
    batch = given[1]
    for path, ours in [(far, logprobs), (str(chain / "sft"), ref_logprobs)]:
        with torch.no_grad():
            exact, _ = grpo.token_logprobs_and_entropy(common.load_policy(path, CPU), batch, 0.8)
        assert torch.allclose(ours, exact, atol=1e-4)
    kl = (logprobs - ref_logprobs).sum(1).mean().item()
    assert metrics(tmp_path / "run")[0]["eval/kl"] == pytest.approx(kl, rel=1e-4)


# ---------------------------------------------------------------- dynamic sampling
def test_dynamic_sampling_looks_at_penalised_rewards_and_draws_afresh(
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """A score of 1 for all, and a price for missing EOS: only that makes groups differ."""
    keys = []
    inner = grpo.generator
    monkeypatch.setattr(grpo, "generator", lambda *key: keys.append(key) or inner(*key))
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
    drawn = [key for key in keys if key[1] == "sample"]
    assert len(set(drawn)) == len(drawn) > 2
    assert all(row["dropped_groups"] < 0.8 for row in metrics(tmp_path / "run")[1:])


def test_dynamic_sampling_fills_the_batch(chain, tmp_path, monkeypatch):  # noqa: F811
    """Prompts that begin with a to m teach nothing; they are replaced until none is left."""
    body = "import zlib\ntexts = [p + c for p, c in zip(prompts, completions)]\n"
    body += "hashes = [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]\n"
    body += "scores = [0.5 if p[0] < 'n' else x for p, x in zip(prompts, hashes)]"
    batches = []
    compared = []
    spy(monkeypatch, grpo, "completion_batch", batches)
    spy(monkeypatch, grpo, "group_advantages", compared)
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
    trained = [given for given, _ in batches if len(given[0]) == 36]
    rewards = [given[0] for given, _ in compared]
    assert len(trained) == len(rewards) == 2
    for (prompts, completions, _), scores in zip(trained, rewards):
        for i, (p, c) in enumerate(zip(prompts, completions)):
            assert p == prompts[i // 3 * 3], "a group has one prompt"
            text = tokenizer.decode(p)
            assert text[0] >= "n"
            text += common.completion_text(tokenizer, p, c)
            assert scores[i].item() == pytest.approx(zlib.crc32(text.encode()) % 1000 / 1000)
    for row, scores in zip(metrics(tmp_path / "run")[1:], rewards):
        assert row["score"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert row["zero_std_groups"] == 0 and 0.2 < row["dropped_groups"] < 0.8


def test_dynamic_sampling_gives_up_in_the_end(chain, tmp_path):  # noqa: F811
    """After eight more rounds what is equal stays, and the step is as large as ever."""
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
    assert row["unjudged"] == 0


# ---------------------------------------------------------------- evaluation, and what is refused
def test_pass_at_g_counts_prompts_that_one_sample_solves(chain, tmp_path, monkeypatch):  # noqa: F811
    """Of two held-out prompts the first is solved by one of two samples, the second by none."""
    args = run_args(grpo, chain, tmp_path / "run", num_generations=2, reward="sort")
    args.temperature = 0.7
    device, autocast = common.setup(args)
    tokenizer = common.load_tokenizer(args.model)
    policy = common.load_policy(args.model, device)
    eos_ids = common.find_eos_ids(tokenizer, args.model)
    examples = []
    for prompt, answer in [("ba>", "ab"), ("dc>", "cd")]:
        row = {"prompt": prompt, "answer": answer}
        ids = tokenizer(prompt).input_ids
        examples.append({"prompt": prompt, "row": row, "where": "", "prompt_ids": ids})
    answers = {1: ["ab[EOS]", "cd[EOS]"], 2: ["ba[EOS]", "ab[EOS]", "cd", "dd[EOS]"]}

    def fake(model, prompts, *, num_generations, temperature, **more):
        assert (num_generations, temperature) in ((1, 0.0), (2, 0.7))
        return [tokenizer(text).input_ids for text in answers[num_generations]]

    monkeypatch.setattr(grpo, "sample", fake)
    metrics, rows = grpo.evaluate(
        policy,
        None,
        examples,
        ensemble=common.load_rewards(
            args, examples, tokenizer, eos_ids, device=device, autocast=autocast
        ),
        gold=common.load_gold(args, args.dataset, tokenizer, eos_ids),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        args=args,
        autocast=autocast,
    )
    assert metrics["eval/gold_greedy"] == 1.0 and metrics["eval/gold"] == 0.25
    assert metrics["eval/pass@2"] == 0.5
    assert metrics["eval/kl"] == 0 and metrics["eval/eos_rate"] == 0.75
    assert metrics["eval/completion_length"] == (3 + 3 + 2 + 3) / 4
    assert [row["completion"] for row in rows] == ["ba", "cd"]
    assert [row["gold"] for row in rows] == [0, 0]


REFUSED = [
    ("rloo", dict(num_generations=1), ["--num-generations is 1", "at least 2"]),
    ("grpo", dict(num_generations=1), ["--num-generations is 1", "at least 2"]),
    ("rloo", dict(num_minibatches=13), ["--num-minibatches 13", "12 completions"]),
    ("grpo", dict(num_minibatches=13), ["--num-minibatches 13", "12 completions"]),
    ("grpo", dict(reward="gsm8k"), ["--reward gsm8k", "`answer`", "row 1"]),
    ("grpo", dict(kl_in="reward"), ["--kl-estimator k3", "--kl-in"]),
    ("grpo", dict(kl_estimator="k1"), ["--kl-estimator k1", "--kl-in"]),
    ("grpo", dict(ratio="sequence", loss_aggregation="token"), ["--ratio sequence", "token"]),
    ("grpo", dict(overlong_buffer=99), ["--overlong-buffer 99", "--max-completion-length"]),
    ("grpo", dict(overlong_buffer=-1), ["--overlong-buffer -1"]),
    ("grpo", dict(reference="x", kl_coef=0.0), ["--reference x", "--kl-coef is 0"]),
    ("rloo", dict(reference="x", kl_coef=0.0), ["--reference x", "--kl-coef is 0"]),
    ("rloo", dict(reference="no/such"), ["--reference no/such"]),
    ("rloo", dict(reward="none"), ["--reward none", "beside --reference"]),
    ("grpo", dict(reward="none,sort", reference="start"), ["--reward none,sort", "stands alone"]),
    ("grpo", dict(reward="none", dynamic_sampling=True), ["--dynamic-sampling", "--reward none"]),
]


def test_a_teacher_with_other_tokens_is_refused(chain, tmp_path, capsys):  # noqa: F811
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    tokenizer.add_tokens(["more"])
    shutil.copytree(chain / "sft", tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    args = run_args(grpo, chain, tmp_path / "run", reference=str(tmp_path / "teacher"))
    with pytest.raises(SystemExit):
        grpo.main(args)
    refused(capsys, "--reference", "its tokens are not those of --model")


@pytest.mark.parametrize("script", [grpo, rloo])
def test_a_teacher_that_cannot_be_computed_is_refused(script, chain, tmp_path, capsys):  # noqa: F811
    """One whose head is no plain product: its log-probs would be wrong."""
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
    transformers.RoFormerForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    args = run_args(script, chain, tmp_path / "run", reference=str(tmp_path / "teacher"))
    with pytest.raises(SystemExit):
        script.main(args)
    refused(capsys, "--reference: RoFormerForCausalLM cannot be")


@pytest.mark.parametrize("script", [grpo, rloo])
def test_distillation_without_a_reward(script, chain, tmp_path):  # noqa: F811
    """From the teacher that it is already nothing moves it; a score of 0, and the exact checker
    still logged. (That it ends at the teacher's law: test_theorems.py.)"""
    flags = dict(reward="none", reference=str(chain / "sft"), kl_coef=1.0, steps=1)
    script.main(run_args(script, chain, tmp_path / "run", **flags))
    row = metrics(tmp_path / "run")[-1]
    assert row["score"] == 0 and row["kl"] == 0 and "gold" in row
    assert row["grad_norm"] == pytest.approx(0, abs=1e-6)


def test_a_teacher_is_what_the_kl_is_from(chain, tmp_path):  # noqa: F811
    """Another model of the same tokens: the KL of the first step is not 0."""
    for name in ("teacher", "start"):
        shutil.copytree(chain / "sft", tmp_path / name)
    teacher = common.load_policy(str(chain / "sft"), torch.device("cpu"))
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(0.5)
    teacher.save_pretrained(tmp_path / "teacher")
    flags = dict(reward="none", reference=str(tmp_path / "teacher"), kl_coef=1.0, steps=1)
    for script in (grpo, rloo):
        script.main(run_args(script, chain, tmp_path / script.__name__, **flags))
        assert abs(metrics(tmp_path / script.__name__)[-1]["kl"]) > 0.1


def test_the_ratio_of_a_sequence_does_not_know_its_length():
    """GSPO: a completion that says everything twice has the same ratio, one at every token."""
    old = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -2.0, -1.0, -2.0]])
    now = torch.tensor([[-0.5, -2.3, 0.0, 0.0], [-0.5, -2.3, -0.5, -2.3]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ratio = (grpo.sequence_logprobs(now, old, mask) - old).exp()
    expected = math.exp((0.5 - 0.3) / 2)
    assert ratio[0].tolist() == pytest.approx([expected, expected, 1, 1])
    assert ratio[1].tolist() == pytest.approx([expected] * 4)


def test_overlong_penalty():
    """Yu et al. 2025, equation 13, with a limit of 10 and a buffer of 4."""
    lengths = torch.tensor([1, 5, 6, 7, 8, 9, 10])
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1]
    assert grpo.overlong_penalty(lengths, 10, 4).tolist() == expected


@pytest.mark.parametrize("name, changes, words", REFUSED)
def test_flags_that_contradict_are_refused(chain, tmp_path, capsys, name, changes, words):  # noqa: F811, PLR0917
    if changes.get("reference") == "start":
        changes = changes | dict(reference=str(chain / "sft"))
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", **changes))
    assert ended.value.code == 2
    refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_plain_reinforce_needs_no_group(chain, tmp_path):  # noqa: F811
    rloo.main(run_args(rloo, chain, tmp_path / "run", num_generations=1, baseline="none"))
    assert metrics(tmp_path / "run")[-1]["grad_norm"] > 0


# ---------------------------------------------------------------- GSM8K
def gsm8k_rows(count):
    return [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(count)
    ]


def test_gsm8k_end_to_end(chain, tmp_path):  # noqa: F811
    """A model that solves nothing says so: every group is equal, and the held-out pass rates are
    0."""
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in gsm8k_rows(8)))
    args = run_args(
        grpo,
        chain,
        tmp_path / "run",
        dataset=str(data),
        eval_dataset=str(data),
        reward="gsm8k",
        prompt_template="{question}",
        prompts_per_step=4,
        max_completion_length=8,
    )
    grpo.main(args)
    last = metrics(tmp_path / "run")[-1]
    assert last["zero_std_groups"] == 1.0 and last["gold"] == last["score"] == 0
    assert last["eval/gold"] == last["eval/gold_greedy"] == last["eval/pass@4"] == 0


def test_prompts_that_leave_no_room(chain, tmp_path, capsys):  # noqa: F811
    """A context of 64, completions of 30: with prompts of over 34 tokens the run says which flag
    drops them, and drops and counts them when it is given."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a" * n + ">"}) + "\n" for n in (3, 33, 34, 60)))
    settings = dict(dataset=str(data), max_completion_length=30, steps=1)
    with pytest.raises(SystemExit):
        grpo.main(run_args(grpo, chain, tmp_path / "run", **settings))
    refused(capsys, "91 tokens", "64", "--max-prompt-length")
    grpo.main(run_args(grpo, chain, tmp_path / "run", max_prompt_length=34, **settings))
    said = capsys.readouterr().out
    assert "2 rows; 2 dropped longer than --max-prompt-length 34" in said
