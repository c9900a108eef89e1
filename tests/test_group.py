"""rloo.py and grpo.py: advantages, KL estimates, loss weights and losses against slow float64 loops, closed
forms and invariances; then both mains on a tiny model."""

import json
import math
import random
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CPU
from test_scripts import chain, metrics, refused, weights  # noqa: F401 (a fixture)

import common
import grpo
import rloo

NAN, G = math.nan, 4
SCRIPTS = {"rloo": rloo, "grpo": grpo}

pytestmark = pytest.mark.usefixtures("cut_by_budget_alone")


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged_mask():
    """(B, L-1) = (6, 7): rows of one run of ones, one of a single token, one without any."""
    mask = torch.zeros(6, 7, dtype=torch.long)
    for row, (first, last) in enumerate([(0, 7), (2, 5), (6, 7), (1, 6), (0, 0), (3, 7)]):
        mask[row, first:last] = 1
    return mask


REWARDS = [
    0.3,
    -1.0,
    2.5,
    0.1,
    NAN,
    4.0,
    1.0,
    NAN,
    7.0,
    7.0,
    7.0,
    7.0,
    NAN,
    NAN,
    3.0,
    NAN,
    *[NAN] * 4,
]


# ---------------------------------------------------------------- advantages
def slow_advantages(rewards, group_size, scale):
    known = [r for r in rewards if not math.isnan(r)]
    batch_std = np.std(np.array(known, dtype=np.float64), ddof=1)
    advantages = []
    for i, r in enumerate(rewards):
        first = i // group_size * group_size
        group = np.array(
            [x for x in rewards[first : first + group_size] if not math.isnan(x)], np.float64
        )
        if math.isnan(r) or len(group) < 2:
            advantages.append(0.0)
            continue
        std = {"group": np.std(group, ddof=1) + 1e-6, "batch": batch_std + 1e-6, "none": 1.0}[scale]
        advantages.append((r - group.mean()) / std)
    return advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    ours = grpo.group_advantages(torch.tensor(REWARDS), G, scale)
    assert ours.tolist() == pytest.approx(slow_advantages(REWARDS, G, scale), rel=1e-5, abs=1e-6)
    assert grpo.group_advantages(torch.tensor(REWARDS), G).equal(
        grpo.group_advantages(torch.tensor(REWARDS), G, "group")
    )


def test_leave_one_out_advantages():
    slow = []
    for i, r in enumerate(REWARDS):
        first = i // G * G
        others = [
            x
            for j, x in enumerate(REWARDS)
            if first <= j < first + G and j != i and not math.isnan(x)
        ]
        slow.append(0.0 if math.isnan(r) or not others else r - np.mean(np.float64(others)))
    ours = rloo.leave_one_out_advantages(torch.tensor(REWARDS), G)
    assert ours.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-6)


ADVANTAGES = [
    (scale, partial(grpo.group_advantages, scale=scale)) for scale in ("group", "batch", "none")
]
ADVANTAGES += [("leave-one-out", rloo.leave_one_out_advantages)]


@pytest.mark.parametrize("name, function", ADVANTAGES)
def test_invariances_of_advantages(name, function):
    rewards = draw(1, 24)
    base = function(rewards, 6)
    order = torch.cat([
        first + torch.randperm(6, generator=common.generator(1, "x")) for first in (0, 6, 12, 18)
    ])
    assert function(rewards[order], 6).allclose(base[order], atol=1e-6), "order within a group"
    swapped = torch.cat([rewards[12:], rewards[:12]])
    assert function(swapped, 6).allclose(torch.cat([base[12:], base[:12]]), atol=1e-6), (
        "order of groups"
    )
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
    """0.1 five times has a float mean other than 0.1: (r - mean) / (std + 1e-6) would be 1e-2, not 0."""
    for size in range(2, 10):
        for value in (0.1, 1 / 3, -7.7, 1e6 / 7):
            rewards = torch.full((3 * size,), value, dtype=dtype)
            rewards[-1] += 1.0  # (a batch without any spread has no standard deviation to speak of)
            assert not function(rewards, size)[: 2 * size].any()
            assert grpo.equal_groups(rewards, size).tolist() == [True, True, False]


def test_an_unknown_scale_or_estimator_is_an_error():
    with pytest.raises(ValueError, match="prompt"):
        grpo.group_advantages(torch.tensor(REWARDS), G, "prompt")
    with pytest.raises(KeyError):
        grpo.kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def test_equal_groups():
    assert grpo.equal_groups(torch.tensor(REWARDS), G).tolist() == [False, False, True, True, True]


# ---------------------------------------------------------------- losses
def slow_loss(logps, old, ref, advantages, mask, aggregation, kl, kl_coef, length, epsilon, high):
    """DeepSeekMath's equation 3 and its relatives, token by token."""
    sums, counts = [], []
    for i in range(mask.shape[0]):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        terms = []
        for t in tokens:
            ratio = math.exp(logps[i, t] - old[i, t])
            surrogate = min(
                ratio * advantages[i],
                min(max(ratio, 1 - epsilon), 1 + (high or epsilon)) * advantages[i],
            )
            x = logps[i, t] - ref[i, t]
            penalty = {"k2-loss": x * x / 2, "k3-loss": math.exp(-x) - 1 + x, "k1-reward": 0.0}[kl]
            terms.append(-surrogate + kl_coef * penalty)
        if tokens:
            sums.append(sum(terms))
            counts.append(len(tokens))
    if aggregation == "sequence":
        return float(np.mean([s / n for s, n in zip(sums, counts)]))
    return sum(sums) / (sum(counts) if aggregation == "token" else len(mask) * length)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl", ["k3-loss", "k2-loss", "k1-reward"])
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_loss(aggregation, kl, high):
    mask, length = ragged_mask(), 11
    logps, old, ref = (-draw(seed, 6, 7).abs() * mask for seed in (1, 2, 3))
    advantages = draw(4, 6)
    w = grpo.loss_weights(mask, aggregation, length)
    ours, clipped = grpo.policy_loss(logps, old, advantages[:, None] * mask, w, 0.2, high)
    if kl != "k1-reward":
        ours = ours + 0.3 * (w * grpo.kl_penalty(logps, ref, kl[:2])).sum()
    tensors = [x.double().numpy() for x in (logps, old, ref, advantages)]
    assert ours.item() == pytest.approx(
        slow_loss(*tensors, mask.numpy(), aggregation, kl, 0.3, length, 0.2, high), rel=1e-5
    )
    assert clipped.any() and not clipped[mask == 0].any()


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_loss_weights_of_a_batch_without_a_trained_token(aggregation):
    assert not grpo.loss_weights(torch.zeros(3, 4, dtype=torch.long), aggregation, 5).any()


def test_reinforce_loss_is_minus_advantage_times_log_prob():
    """At the first update: the mean over completions of - A log pi(completion), to the letter."""
    mask = ragged_mask()
    logps, advantages = -draw(1, 6, 7).abs().double() * mask, draw(2, 6).double()
    loss, clipped = rloo.reinforce_loss(
        logps, logps, advantages[:, None] * mask, mask.double() / 5, 0.2
    )
    slow = np.mean([
        -a * logp for a, logp, m in zip(advantages, logps.sum(1), mask.sum(1)) if m > 0
    ])
    assert loss.item() == pytest.approx(slow, rel=1e-12) and not clipped.any()


def test_reinforce_loss_of_a_ratio_that_overflows_is_finite():
    """300 tokens, each 0.35 nats up: clipped where A > 0, and never NaN."""
    old, ones = torch.full((3, 300), -2.0), torch.ones(3, 300)
    logps, advantages = (
        (old + 0.35).requires_grad_(),
        torch.tensor([1.0, -1.0, 0.0])[:, None] * ones,
    )
    loss, clipped = rloo.reinforce_loss(logps, old, advantages, ones / 3, 0.2)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert clipped.any(1).tolist() == [True, False, False] and not logps.grad[[0, 2]].any()


@pytest.mark.parametrize("high", [None, 0.5])
def test_reinforce_loss_later_has_the_gradient_of_a_clipped_sequence_ratio(high):
    mask = ragged_mask()
    old, advantages = -draw(1, 6, 7).abs().double() * mask, draw(5, 6).double()
    logps = (old + 0.15 * draw(3, 6, 7) * mask).requires_grad_()
    w = mask.double() / 5
    loss, clipped = rloo.reinforce_loss(logps, old, advantages[:, None] * mask, w, 0.2, high)
    ours = torch.autograd.grad(loss, logps)[0]
    ratio = (logps - old).sum(1).exp()
    bounded = ratio.clamp(0.8, 1 + (high or 0.2))
    surrogate = torch.max(-advantages * ratio, -advantages * bounded)[mask.any(1)].sum() / 5
    assert torch.allclose(ours, torch.autograd.grad(surrogate, logps)[0] * mask, atol=1e-12)
    rows = clipped.any(1)
    assert 0 < rows.sum() < 5 and clipped[rows].sum() == mask[rows].sum() and not ours[rows].any()


# ---------------------------------------------------------------- through main
def run_args(script, chain, output_dir, **changes):  # noqa: F811
    args = dict(
        model=str(chain / "sft"), reward=str(chain / "reward_model"), output_dir=str(output_dir)
    )
    args |= dict(
        steps=2, prompts_per_step=3, num_generations=4, max_completion_length=6, learning_rate=1e-3
    )
    return script.Args(**(args | dict(warmup_steps=0) | changes))


def checker(tmp_path, body):
    """A file with a checker `f`; body computes `scores` from prompts, completions, rows."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (tmp_path / "reward.py").write_text(
        f"def f(prompts, completions, rows):\n{lines}    return scores\n"
    )
    return f"{tmp_path}/reward.py:f"


def gradients_of_a_run(script, args, monkeypatch):
    """Run main -> the gradient of every optimiser step as one vector."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def recorder(parameters, max_norm):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten() for p in parameters]).double())
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorder)
        script.main(args)
    return seen


VARIANTS = [
    ("rloo", dict()),
    ("rloo", dict(baseline="none")),
    ("grpo", dict()),
    ("grpo", dict(loss_aggregation="token", scale_rewards="batch", kl="k2-loss")),
    (
        "grpo",
        dict(
            loss_aggregation="constant", scale_rewards="none", kl="k1-reward", mask_truncated=True
        ),
    ),
]


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_a_budget_that_cuts_groups_apart_changes_nothing(chain, tmp_path, monkeypatch, name, flags):  # noqa: F811
    """P=3, G=5, prompts of 2 to 40 tokens: the gradient of one big batch, however it is cut."""
    data = tmp_path / "prompts.jsonl"
    prompts = ["b>", "zyxwvutsrq>", "abcdefghijklmnopqrstuvwxyz" + "abcdefghijklm>"]
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    reward = checker(
        tmp_path, "scores = [len(set(c)) + 0.1 * len(p) for p, c in zip(prompts, completions)]"
    )
    args = dict(
        dataset=str(data), reward=reward, num_generations=5, steps=1, max_completion_length=12
    )
    results = []
    for budget in (60, 130, 100_000):
        changes = args | flags | dict(micro_batch_tokens=budget)
        run = run_args(SCRIPTS[name], chain, tmp_path / str(budget), **changes)
        results.append(gradients_of_a_run(SCRIPTS[name], run, monkeypatch)[0])
    assert results[-1].norm() > 1e-3
    for result in results[:-1]:
        assert (result - results[-1]).norm() / results[-1].norm() < 1e-5


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_an_exact_reward_goes_up(chain, tmp_path, name, flags):  # noqa: F811
    reward = checker(tmp_path, "scores = [text.count('a') / 6 for text in completions]")
    flags = {k: v for k, v in flags.items() if k != "mask_truncated"}
    args = dict(steps=20, prompts_per_step=8, kl_coef=1e-3, learning_rate=3e-3) | flags
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", reward=reward, **args))
    scores = [row["score"] for row in metrics(tmp_path / "run") if "score" in row]
    assert sum(scores[-3:]) / 3 > 3 * sum(scores[:3]) / 3 + 0.1


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_starts_at_ratio_one_and_kl_zero(chain, tmp_path, name, temperature):  # noqa: F811
    args = run_args(
        SCRIPTS[name], chain, tmp_path / "run", temperature=temperature, eval_every=1, minibatches=2
    )
    SCRIPTS[name].main(args)
    first, second = metrics(tmp_path / "run")[1:]
    assert first["ratio_max_dev"] == 0 and first["kl"] == 0 and second["kl"] != 0
    assert {
        "gold",
        "score",
        "zero_std_groups",
        "eval/gold",
        "eval/gold_greedy",
        "eval/pass@4",
    } <= first.keys()
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 3 * 16


@pytest.mark.parametrize("kl, sign", [("k1-reward", 0), ("k3-loss", 1), ("k2-loss", 1)])
def test_the_kl_pulls_back_to_the_reference(chain, tmp_path, kl, sign):  # noqa: F811
    """From a policy apart from its reference, rewards equal: the KL falls, whichever way it is paid for."""
    far = tmp_path / "far"
    reward = checker(tmp_path, "scores = [text.count('a') / 6 for text in completions]")
    args = dict(reward=reward, prompts_per_step=16, learning_rate=3e-3)
    grpo.main(run_args(grpo, chain, far, steps=8, kl_coef=0.0, **args))
    load, paths = grpo.load_policy, iter([str(far), str(chain / "sft")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "load_policy", lambda path, *a, **k: load(next(paths), *a, **k))
        args |= dict(
            reward=checker(tmp_path, "scores = [0.0] * len(prompts)"), scale_rewards="none"
        )
        grpo.main(run_args(grpo, chain, tmp_path / "run", steps=30, kl=kl, kl_coef=1.0, **args))
    kls = [row["kl"] for row in metrics(tmp_path / "run") if "kl" in row]
    assert sum(kls[-3:]) < 0.4 * sum(kls[:3]), kls


@pytest.mark.parametrize("name", SCRIPTS)
def test_advantages_belong_to_their_own_prompts(chain, tmp_path, name):  # noqa: F811
    """A score that depends on the prompt alone is equal within each group: nothing is learnt. Were groups
    tiled instead of side by side, or rows paired with others' prompts, there would be advantages."""
    body = "assert all(p == r['prompt'] for p, r in zip(prompts, rows))\nscores = [ord(p[0]) for p in prompts]"
    reward, run = checker(tmp_path, body), tmp_path / "run"
    SCRIPTS[name].main(
        run_args(SCRIPTS[name], chain, run, reward=reward, kl_coef=0.0, prompts_per_step=5)
    )
    before, after = weights(chain / "sft"), weights(run)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(row["zero_std_groups"] == 1.0 for row in metrics(run)[1:])


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_kl_a_reference_is_there_for_evaluations_only(chain, tmp_path, monkeypatch, name):  # noqa: F811
    script, loaded = SCRIPTS[name], []
    load = script.load_policy
    monkeypatch.setattr(script, "load_policy", lambda *a, **k: loaded.append(a) or load(*a, **k))
    script.main(run_args(script, chain, tmp_path / "run", kl_coef=0.0))
    rows = metrics(tmp_path / "run")
    assert len(loaded) == 1 + sum("eval/kl" in row for row in rows)
    assert rows[0]["eval/kl"] == 0 < rows[-1]["eval/kl"] and not any("kl" in row for row in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_checker_cannot_judge_trains_nothing(chain, tmp_path, name):  # noqa: F811
    reward = checker(tmp_path, "scores = [None] * len(prompts)")
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", reward=reward))
    before, after = weights(chain / "sft"), weights(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_eos_is_paid_for(chain, tmp_path, name):  # noqa: F811
    reward = checker(tmp_path, "scores = [1] * len(prompts)")
    args = dict(reward=reward, missing_eos_penalty=0.25, kl_coef=0.0, prompts_per_step=8)
    SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", **args))
    first = metrics(tmp_path / "run")[1]
    assert first["eos_rate"] < 1 and first["score"] == 1
    assert first["reward"] == pytest.approx(1 - 0.25 * (1 - first["eos_rate"]), abs=1e-5)


def test_rloo_pays_the_kl_before_the_baseline(chain, tmp_path, monkeypatch):  # noqa: F811
    """Sequence reward = score - kl_coef * summed log-ratio; the baseline is taken of that."""
    seen, inner = [], rloo.leave_one_out_advantages
    monkeypatch.setattr(
        rloo, "leave_one_out_advantages", lambda r, n: seen.append(r) or inner(r, n)
    )
    reward = checker(tmp_path, "scores = [len(set(text)) for text in completions]")
    rloo.main(
        run_args(
            rloo, chain, tmp_path / "run", reward=reward, kl_coef=0.5, steps=3, learning_rate=3e-2
        )
    )
    for rewards, row in zip(seen, metrics(tmp_path / "run")[1:]):
        assert rewards.mean().item() == pytest.approx(row["score"] - 0.5 * row["kl"], abs=1e-5)
        assert rewards.mean().item() == pytest.approx(row["reward"], abs=1e-6)
    assert abs(row["kl"]) > 0.01


def test_grpo_of_one_update_is_reinforce(chain, tmp_path, monkeypatch):  # noqa: F811
    """Two steps with --kl-coef 0 equal two steps on - weights * advantages * log pi."""
    reward = checker(tmp_path, "scores = [len(set(text)) for text in completions]")
    args = dict(reward=reward, kl_coef=0.0, prompts_per_step=6)
    grpo.main(run_args(grpo, chain, tmp_path / "a", **args))

    def reinforce(logprobs, old_logprobs, advantages, weights, *clip):
        return -(weights * advantages * logprobs).sum(), torch.zeros_like(
            logprobs, dtype=torch.bool
        )

    monkeypatch.setattr(grpo, "policy_loss", reinforce)
    grpo.main(run_args(grpo, chain, tmp_path / "b", **args))
    one, other, start = weights(tmp_path / "a"), weights(tmp_path / "b"), weights(chain / "sft")
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    assert not any(torch.equal(one[key], start[key]) for key in one if "norm" not in key)


def test_truncated_completions_are_masked_and_still_counted(chain, tmp_path, monkeypatch):  # noqa: F811
    masks, rewards, weigh, inner = [], [], grpo.loss_weights, grpo.group_advantages
    monkeypatch.setattr(
        grpo, "loss_weights", lambda mask, *a: masks.append(mask) or weigh(mask, *a)
    )
    monkeypatch.setattr(grpo, "group_advantages", lambda r, *a: rewards.append(r) or inner(r, *a))
    reward = checker(tmp_path, "scores = [len(set(text)) for text in completions]")
    args = dict(reward=reward, mask_truncated=True, prompts_per_step=8, max_completion_length=7)
    grpo.main(run_args(grpo, chain, tmp_path / "run", **args))
    rate = metrics(tmp_path / "run")[1]["eos_rate"]
    assert 0 < rate < 1 and masks[0].any(1).float().mean().item() == pytest.approx(rate)
    assert not rewards[0].isnan().any()


# ---------------------------------------------------------------- every flag, through main
@pytest.fixture(scope="module")
def far(chain, tmp_path_factory):  # noqa: F811
    """A policy some nats away from its reference, runs/sft."""
    folder = tmp_path_factory.mktemp("far")
    reward = checker(folder, "scores = [('a' in text) - 0.1 * len(text) for text in completions]")
    args = dict(reward=reward, prompts_per_step=16, learning_rate=1.5e-3, steps=4, kl_coef=0.0)
    grpo.main(run_args(grpo, chain, folder / "run", **args))
    return str(folder / "run")


def spy(patch, module, name, calls):
    """Record the arguments of a function, and what it gave."""
    inner = getattr(module, name)

    def recorder(*args, **kwargs):
        result = inner(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(module, name, recorder)


HARD = """pairs = list(zip(prompts, completions))
scores = [None if sum(map(ord, c)) % 3 == 1 else len(set(c)) + 0.1 * ord(p[0]) for p, c in pairs]"""


def hard_run(script, chain, far, folder, patch, **flags):  # noqa: F811
    """One step from `far` against runs/sft: unjudged and truncated completions, odd flags everywhere."""
    load, paths = script.load_policy, iter([far, str(chain / "sft")])
    patch.setattr(script, "load_policy", lambda path, *a, **k: load(next(paths), *a, **k))
    args = dict(
        reward=checker(folder, HARD), prompts_per_step=5, num_generations=4, steps=1, kl_coef=0.3
    )
    args |= dict(epsilon=0.07, epsilon_high=0.31, temperature=0.8, missing_eos_penalty=0.4)
    script.main(run_args(script, chain, folder / "run", **(args | flags)))
    return metrics(folder / "run")[1]


GRPO_FLAGS = [
    dict(),
    dict(scale_rewards="batch", loss_aggregation="token", kl="k2-loss"),
    dict(
        scale_rewards="none", loss_aggregation="constant", kl="k1-reward", max_completion_length=9
    ),
    dict(mask_truncated=True, loss_aggregation="constant", max_completion_length=9),
    dict(mask_truncated=True, loss_aggregation="token", scale_rewards="none"),
]


@pytest.mark.parametrize("flags", GRPO_FLAGS)
def test_grpo_step_is_the_formula(chain, far, tmp_path, monkeypatch, flags):  # noqa: F811
    """The loss that main logs, from its completions, log-probs and scores by float64 loops over the flags."""
    losses, groups, batches, over = [], [], [], []
    for name, calls in [
        ("policy_loss", losses),
        ("group_advantages", groups),
        ("completion_batch", batches),
    ]:
        spy(monkeypatch, grpo, name, calls)
    spy(monkeypatch, grpo, "over_micro_batches", over)
    row = hard_run(grpo, chain, far, tmp_path, monkeypatch, **flags)
    args = run_args(grpo, chain, tmp_path, **flags)
    ((given, loss),) = losses
    logps, old, advantages, weights, *epsilons = given
    assert epsilons == [0.07, 0.31]
    # rows of the one micro-batch, longest first
    trained = next((a, batch) for a, batch in batches if len(a[0]) == 20)
    (prompts, completions, _), batch = trained
    (order,) = common.micro_batches(batch.lengths, 10**9)
    scored = [groups[0][0][0][i].item() for i in order]
    judged = [not math.isnan(score) for score in scored]
    finished = [completions[i][-1] == 1 for i in order]
    assert 3 < sum(judged) < 17 and 3 < sum(finished) < 17
    mask = batch.completion_mask[order, 1:].numpy() * np.array(judged)[:, None]
    mask = mask * np.array(finished)[:, None] if args.mask_truncated else mask
    assert (weights > 0).numpy().tolist() == (mask > 0).tolist()
    *forward, ref_logprobs = (result[0] for a, result in over if result[0].shape[0] == 20)
    old_logprobs = forward[0] if forward else torch.zeros_like(ref_logprobs)
    if not forward:  # a single update gives them by its own forward
        old_logprobs[order] = old
    assert bool(forward) == (args.kl == "k1-reward")
    with torch.no_grad():
        inputs = batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:]
        exact, entropy = grpo.token_logprobs(common.load_policy(far, CPU), *inputs, 0.8)
    torch.testing.assert_close(old_logprobs, exact, rtol=1e-4, atol=1e-4)
    assert row["entropy"] == pytest.approx(grpo.masked_mean(entropy, inputs[2]).item(), rel=1e-4)
    log_ratio = (old_logprobs - ref_logprobs).sum(1)
    text = [
        common.completion_text(common.load_tokenizer(far), p, c)
        for p, c in zip(prompts, completions)
    ]
    tokenizer, rewards = common.load_tokenizer(far), []
    for i in range(20):
        score = (
            None
            if sum(map(ord, text[i])) % 3 == 1
            else len(set(text[i])) + 0.1 * ord(tokenizer.decode(prompts[i])[0])
        )
        reward = math.nan if score is None else score - 0.4 * (completions[i][-1] != 1)
        rewards.append(reward - (0.3 * log_ratio[i].item() if args.kl == "k1-reward" else 0.0))
    assert rewards == pytest.approx(groups[0][0][0].tolist(), abs=1e-4, nan_ok=True)
    slow = np.array(slow_advantages(rewards, 4, args.scale_rewards))[order]
    assert advantages.sum(1).div(torch.tensor(mask.sum(1)).clamp(min=1)).tolist() == pytest.approx(
        (slow * mask.any(1)).tolist(), abs=1e-3
    )
    tensors = [x.double().numpy() for x in (logps.detach(), old, ref_logprobs[order])]
    expected = slow_loss(
        *tensors,
        slow,
        mask,
        args.loss_aggregation,
        args.kl,
        0.3,
        args.max_completion_length,
        0.07,
        0.31,
    )
    assert row["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert row["ratio_max_dev"] == 0 and row["kl"] == pytest.approx(
        log_ratio.mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
def test_rloo_step_is_the_formula(chain, far, tmp_path, monkeypatch, baseline):  # noqa: F811
    losses, over, batches = [], [], []
    for name, calls in (
        ("reinforce_loss", losses),
        ("over_micro_batches", over),
        ("completion_batch", batches),
    ):
        spy(monkeypatch, rloo, name, calls)
    row = hard_run(rloo, chain, far, tmp_path, monkeypatch, baseline=baseline)
    ((logps, old, _, weights, *epsilons), _), *_ = losses
    assert epsilons == [0.07, 0.31]
    (prompts, completions, _), batch = next((a, b) for a, b in batches if len(a[0]) == 20)
    old_logprobs, ref_logprobs = (result[0] for a, result in over if result[0].shape[0] == 20)
    tokenizer, rewards = common.load_tokenizer(far), []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        text, ratio = (
            common.completion_text(tokenizer, p, c),
            (old_logprobs - ref_logprobs)[i].sum().item(),
        )
        score = (
            len(set(text)) + 0.1 * ord(tokenizer.decode(p)[0]) - 0.4 * (c[-1] != 1) - 0.3 * ratio
        )
        rewards.append(math.nan if sum(map(ord, text)) % 3 == 1 else score)
    judged = [i for i in range(20) if not math.isnan(rewards[i])]
    total = 0.0
    for i in judged:
        others = [rewards[j] for j in judged if j // 4 == i // 4 and j != i]
        advantage = rewards[i] - (np.mean(others) if others else rewards[i]) * (baseline != "none")
        total -= advantage * old_logprobs[i].sum().item()
    assert row["loss"] == pytest.approx(total / len(judged), rel=1e-3)
    assert row["reward"] == pytest.approx(np.mean([rewards[i] for i in judged]), rel=1e-4)


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_each_minibatch_has_its_own_normaliser(chain, far, tmp_path, monkeypatch, name, flags):  # noqa: F811
    script, calls, steps = SCRIPTS[name], [], []
    spy(monkeypatch, script, {"rloo": "reinforce_loss", "grpo": "policy_loss"}[name], calls)
    spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", steps)
    flags = dict(minibatches=3, update_epochs=2, max_completion_length=7) | flags
    hard_run(script, chain, far, tmp_path, monkeypatch, **flags)
    assert len(calls) == len(steps) == 6
    for (_, _, _, ours, *_), _ in calls:
        rows, lengths = (ours > 0).any(1).sum(), (ours > 0).sum(1)
        aggregation = flags.get("loss_aggregation", "sequence" if name == "grpo" else "sum")
        each = {"sequence": 1 / (rows * lengths), "sum": 1 / rows.expand(len(lengths))}.get(
            aggregation
        )
        if aggregation == "token":
            each = 1 / lengths.sum().expand(len(lengths))
        if aggregation == "constant":
            each = 1 / torch.tensor(len(lengths) * 7.0).expand(len(lengths))
        assert rows < len(lengths) <= 7
        assert torch.allclose(ours, (ours > 0) * each.nan_to_num(posinf=0)[:, None], rtol=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_of_clipping_and_equal_groups(chain, far, tmp_path, monkeypatch, name):  # noqa: F811
    """All tokens clipped is a fraction of 1, whatever the epochs; equal scores are equal groups."""
    script, loss = SCRIPTS[name], {"rloo": "reinforce_loss", "grpo": "policy_loss"}[name]

    def all_clipped(logprobs, old_logprobs, advantages, weights, *epsilons):
        return (0 * weights * logprobs).sum(), weights > 0

    monkeypatch.setattr(script, loss, all_clipped)
    monkeypatch.setitem(globals(), "HARD", "scores = [0.5] * len(prompts)")
    flags = dict(kl="k1-reward") if name == "grpo" else {}
    row = hard_run(
        script, chain, far, tmp_path, monkeypatch, update_epochs=3, missing_eos_penalty=0.0, **flags
    )
    assert row["clip_fraction"] == 1.0 and row["zero_std_groups"] == 1.0


def test_evaluation_measures_the_kl_at_the_temperature_of_sampling(
    chain, far, tmp_path, monkeypatch
):  # noqa: F811
    over = []
    spy(monkeypatch, grpo, "over_micro_batches", over)
    hard_run(grpo, chain, far, tmp_path, monkeypatch, num_generations=2)
    (first, logprobs), (_, ref_logprobs) = ((a[1], result[0]) for a, result in over[:2])
    models = [common.load_policy(path, torch.device("cpu")) for path in (far, str(chain / "sft"))]
    for model, ours in zip(models, (logprobs, ref_logprobs)):
        with torch.no_grad():
            inputs = first.input_ids, first.attention_mask, first.completion_mask[:, 1:]
            slow, _ = grpo.token_logprobs(model, *inputs, 0.8)
        assert torch.allclose(ours, slow, atol=1e-4)
    kl = (logprobs - ref_logprobs).sum(1).mean().item()
    assert metrics(tmp_path / "run")[0]["eval/kl"] == pytest.approx(kl, rel=1e-4)


# ---------------------------------------------------------------- dynamic sampling
def test_dynamic_sampling_looks_at_penalised_rewards_and_draws_afresh(chain, tmp_path, monkeypatch):  # noqa: F811
    """A score of 1 for all, and a price for missing EOS: only that makes groups differ."""
    keys, inner = [], grpo.generator
    monkeypatch.setattr(grpo, "generator", lambda *key: keys.append(key) or inner(*key))
    args = dict(reward=checker(tmp_path, "scores = [1.0] * len(prompts)"), missing_eos_penalty=0.5)
    grpo.main(
        run_args(grpo, chain, tmp_path / "run", dynamic_sampling=True, prompts_per_step=8, **args)
    )
    drawn = [key for key in keys if key[1] == "sample"]
    assert len(set(drawn)) == len(drawn) > 2
    assert all(row["dropped_groups"] < 0.8 for row in metrics(tmp_path / "run")[1:])


def test_dynamic_sampling_fills_the_batch(chain, tmp_path, monkeypatch):  # noqa: F811
    """Prompts that begin with a to m teach nothing; they are replaced until none is left."""
    body = "import zlib\ntexts = [p + c for p, c in zip(prompts, completions)]\n"
    body += "hashes = [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]\n"
    body += "scores = [0.5 if p[0] < 'n' else x for p, x in zip(prompts, hashes)]"
    batches, rewards, build, inner = [], [], grpo.completion_batch, grpo.group_advantages
    monkeypatch.setattr(
        grpo, "completion_batch", lambda p, c, d: batches.append((p, c)) or build(p, c, d)
    )
    monkeypatch.setattr(grpo, "group_advantages", lambda r, *a: rewards.append(r) or inner(r, *a))
    args = dict(
        reward=checker(tmp_path, body), dynamic_sampling=True, prompts_per_step=12, kl_coef=0.0
    )
    grpo.main(run_args(grpo, chain, tmp_path / "run", num_generations=3, **args))
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    trained = [pair for pair in batches if len(pair[0]) == 36]
    assert len(trained) == len(rewards) == 2
    for (prompts, completions), scores in zip(trained, rewards):
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
    reward = checker(tmp_path, "scores = [1.0] * len(prompts)")
    grpo.main(run_args(grpo, chain, tmp_path / "run", reward=reward, dynamic_sampling=True))
    row = metrics(tmp_path / "run")[1]
    assert row["zero_std_groups"] == 1.0 and row["dropped_groups"] == pytest.approx(8 / 9)


# ---------------------------------------------------------------- evaluation, and what is refused
def test_pass_at_g(chain, tmp_path, monkeypatch):  # noqa: F811
    """Of two held-out prompts the first is solved by one of two samples, the second by none."""
    args = run_args(grpo, chain, tmp_path / "run", num_generations=2, reward="sort")
    tokenizer, policy = (
        common.load_tokenizer(args.model),
        common.load_policy(args.model, torch.device("cpu")),
    )
    stop_ids = common.eos_ids(tokenizer, args.model)
    rows = [{"prompt": "ba>", "answer": "ab"}, {"prompt": "dc>", "answer": "cd"}]
    examples = [
        dict(prompt=r["prompt"], row=r, where="", prompt_ids=tokenizer(r["prompt"]).input_ids)
        for r in rows
    ]
    answers = {1: ["ab[EOS]", "cd[EOS]"], 2: ["ba[EOS]", "ab[EOS]", "cd", "dd[EOS]"]}

    def fake(model, prompts, number, limit, temperature, *args):
        assert (number, temperature) in ((1, 0.0), (2, 0.7))
        return [tokenizer(text).input_ids for text in answers[number]], None

    monkeypatch.setattr(common, "sample", fake)
    _, autocast = common.setup(args)
    score, gold = common.load_reward(args, tokenizer, examples, stop_ids, policy.device, autocast)

    def logprobs_of(model, batch):
        inputs = batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:]
        return grpo.token_logprobs(model, *inputs)

    inputs = (
        policy,
        examples,
        tokenizer,
        stop_ids,
        1,
        autocast,
        (2, 8, 0.7),
        dict(score=score, gold=gold),
    )
    found, shown = common.evaluate_samples(*inputs, kl_from=(logprobs_of, lambda: policy))
    assert (
        found["eval/gold_greedy"] == 1.0
        and found["eval/gold"] == 0.25
        and found["eval/pass@2"] == 0.5
    )
    assert found["eval/kl"] == 0 and found["eval/eos_rate"] == 0.75
    assert [row["completion"] for row in shown] == ["ba", "cd"] and [
        row["gold"] for row in shown
    ] == [0, 0]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_generations=1), ["--num-generations is 1", "at least 2"]),
        (dict(minibatches=13), ["--minibatches is 13", "12 completions"]),
        (dict(reward="gsm8k"), ["--reward gsm8k", "finds no answer", "row 1"]),
        (dict(epsilon_high=-0.1), ["--epsilon-high", "at least 0"]),
    ],
)
def test_refused(chain, tmp_path, capsys, name, changes, words):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main(run_args(SCRIPTS[name], chain, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_plain_reinforce_needs_no_group(chain, tmp_path):  # noqa: F811
    rloo.main(run_args(rloo, chain, tmp_path / "run", num_generations=1, baseline="none"))
    assert metrics(tmp_path / "run")[-1]["grad_norm"] > 0


# ---------------------------------------------------------------- GSM8K
FORMS = [
    ("#### 18", "18"),
    ("She has 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
    ("####18", "18"),
    ("#### 18.", "18"),
    ("#### 18.0", "18"),
    ("#### 18.50", "18.5"),
    ("#### $18", "18"),
    ("#### $ 18", "18"),
    ("#### 18$", "18"),
    ("#### 18%", "18"),
    ("#### 18 dollars", "18"),
    ("#### 18kg", "18"),
    ("#### **18**", "18"),
    ("#### $18$", "18"),
    ("#### The answer is 18.", "18"),
    ("#### x = 18", "18"),
    ("#### 1,234", "1234"),
    ("#### 1,234,567.25", "1234567.25"),
    ("#### $1,200.00", "1200"),
    ("#### -5", "-5"),
    ("#### −5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### .5", "0.5"),
    ("#### 0.50", "0.5"),
    ("#### 007", "7"),
    ("#### 18\nThat was easy, 20 of 20.", "18"),
    ("#### Step 1: halve 36\n#### 18", "18"),
    ("#### Conclusion\nSo we get \\boxed{18}.", "18"),
    ("#### Conclusion\nThe answer is 18.", "18"),
    ("\\boxed{18}", "18"),
    ("It is \\boxed{17}, no, \\boxed{18}. Of 20.", "18"),
    ("\\boxed{\\$18}", "18"),
    ("\\boxed{18\\%}", "18"),
    ("\\boxed{18 \\text{ apples}}", "18"),
    ("\\boxed{1,234}", "1234"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{-0.25}", "-0.25"),
    ("The answer is 18", "18"),
    ("2 and 3 make 5.", "5"),
    ("48/2 = 24", "24"),
    ("10-5", "5"),
    ("He pays $1,234.5", "1234.5"),
    ("#### --5", "5"),
    ("The answer is --18", "18"),
    ("-----18", "18"),
    ("-$-5", "-5"),
    ("#### Step 2: compute 5 + 3\nSo \\boxed{8}", "8"),
    ("\\boxed{1\\,234}", "1234"),
    ("#### 3 x 6", None),
    ("", None),
    ("no idea", None),
    ("####", None),
    ("#### 3 * 6", None),
    ("#### 10 + 8 = 18", None),
    ("#### 3/4", None),
    ("\\boxed{\\frac{36}{2}}", None),
    ("\\boxed{9 \\times 2}", None),
    ("#### __import__('os').getpid()", None),
]


@pytest.mark.parametrize("text, number", FORMS)
def test_gsm8k_reads_answer_forms(text, number):
    found = common.gsm8k_number(text)
    assert found == (None if number is None else common.Decimal(number))
    answers = [number or "18", "5551"]
    rows = [{"answer": f"They did it.\n#### {answer}"} for answer in answers]
    assert common.gsm8k_checker([""] * 2, [text] * 2, rows) == [float(number is not None), 0.0]


def test_gsm8k_never_raises():
    draw = random.Random(1)
    for _ in range(20_000):
        common.gsm8k_number("".join(draw.choices("-−$,./x* #09\\{}boxed\n", k=draw.randint(0, 12))))
        common.gsm8k_number("#### " + "".join(draw.choices("-−$,./09 ", k=6)))


def test_gsm8k_numbers_are_exact():
    rows = [{"answer": "#### 10000000000000001"}]
    assert common.gsm8k_checker([""], ["#### 10000000000000000"], rows) == [
        0.0
    ]  # (equal as floats)


def gsm8k_rows(count):
    return [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(count)
    ]


def test_gsm8k_end_to_end(chain, tmp_path, capsys):  # noqa: F811
    """A model that solves nothing says so: every group is equal, and the held-out pass rates are 0."""
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in gsm8k_rows(8)))
    args = dict(
        dataset=str(data), eval_dataset=str(data), reward="gsm8k", prompt_template="{question}"
    )
    args |= dict(prompts_per_step=4, max_completion_length=8, max_prompt_length=64)
    grpo.main(run_args(grpo, chain, tmp_path / "run", **args))
    last = metrics(tmp_path / "run")[-1]
    assert last["zero_std_groups"] == 1.0 and last["gold"] == last["score"] == 0
    assert last["eval/gold"] == last["eval/gold_greedy"] == last["eval/pass@4"] == 0


def test_prompts_that_leave_no_room_are_dropped_and_counted(chain, tmp_path, capsys):  # noqa: F811
    """A context of 64, completions of 30: prompts of over 34 tokens cannot be used."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a" * n + ">"}) + "\n" for n in (3, 33, 34, 60)))
    args = dict(dataset=str(data), max_completion_length=30)
    grpo.main(run_args(grpo, chain, tmp_path / "run", **args))
    said = capsys.readouterr().out
    assert (
        "2 of 4 rows; 2 dropped longer than the model's context less --max-completion-length: 34"
        in said
    )
