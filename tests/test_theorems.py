"""Runs of main of each script, with ordinary flags, end at the closed form of its objective.

Distances are computed from a list of all completions, not by sampling: see language.py and
theorems.py. `python benchmarks/closed_form.py --seeds 1 2 3` makes longer runs and plots them."""

import itertools
import json
import math

import background
import pytest
import torch
from language import (
    best_of_n_law,
    k3_law,
    kl,
    law,
    list_completions,
    normalize,
    save_start,
    texts_of,
)
from theorems import BEST_OF, scores_of, theorem

# short run -> names, or their beginnings, of the tests that need it
SHORT = {
    "ppo": ("test_online_methods_end_at_the_optimum", "test_ppo_and_dpo_meet"),
    "rloo": "test_online_methods_end_at_the_optimum",
    "grpo k1": "test_online_methods_end_at_the_optimum",
    "grpo k3": "test_the_k3_loss",
    "distillation": "test_distillation_ends",
    "dpo": ("test_dpo_ends", "test_ppo_and_dpo_meet"),
    "sft": "test_sft_ends",
    "reward_model": "test_reward_model_ends",
    "rejection_sampling": "test_rejection_sampling_ends",
}
PROOFS = {}  # name -> Theorem


@background.job
def short_runs(folder, items):
    """The short runs that the collected tests need."""
    for name, tests in SHORT.items():
        if any(item.name.startswith(tests) for item in items):
            PROOFS[name] = theorem(name, folder)
    return lambda: [proof.run() for proof in PROOFS.values()]


@pytest.fixture(scope="module")
def proofs(short_runs):
    """Name -> Theorem, after its short run."""
    return PROOFS


def judge(proof, limit=5e-2, start=0.5):
    """Assert that a run starts half a nat from its closed form and ends there."""
    assert proof.distance(proof.flags["model"]) > start
    assert proof.distance(proof.flags["output_dir"]) < limit
    return proof


def implied_beta(proof):
    """1 / slope of log p / p_ref in r, with completions weighted by the optimum.

    The distance alone would not detect a KL coefficient that is a third too large."""
    final = proof.law(proof.flags["output_dir"])
    ref = proof.law(proof.flags["model"])
    rewards = proof.world.rewards
    if proof.script.__name__ == "dpo":
        rewards = rewards[:, proof.world.ended]
    p = proof.target.exp()
    x = rewards - (p * rewards).sum(1, keepdim=True)
    y = final - ref - (p * (final - ref)).sum(1, keepdim=True)
    return ((p * x * x).sum() / (p * x * y).sum()).item()


# ---------------------------------------------------------------- the closed forms themselves
@pytest.mark.parametrize("pad_is_eos, count", [(False, 259), (True, 156)])
def test_all_completions_are_listed(pad_is_eos, count, tmp_path):
    """Probabilities add up to 1 at any temperature; some completions share a text."""
    words = save_start(tmp_path, 1, pad_is_eos=pad_is_eos)
    completions = list_completions(words)
    assert len(completions) == len(set(completions)) == count
    for temperature in (1.0, 0.5):
        total = law(tmp_path, words, completions, temperature).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert len(set(texts_of(words, completions))) == 156


def test_best_of_n_law_against_all_tuples():
    """Rewards have ties; the bound on the KL (Beirami et al. 2024) holds."""
    n = 4
    draw = torch.Generator().manual_seed(1)
    ref = torch.randn(1, 6, generator=draw, dtype=torch.float64).log_softmax(1)
    rewards = torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0, 2.0]]).double()
    expected = torch.zeros(6).double()
    for drawn in itertools.product(range(6), repeat=n):
        expected[max(drawn, key=lambda k: rewards[0, k])] += ref[0, list(drawn)].sum().exp()
    ours = best_of_n_law(ref, rewards, n)
    torch.testing.assert_close(ours[0].exp(), expected)
    assert 0 < kl(ours, ref) < math.log(n) - (n - 1) / n


# ---------------------------------------------------------------- maximum likelihood
def test_sft_ends_at_the_law_of_its_data(proofs):
    judge(proofs["sft"], limit=1e-2)


def test_reward_model_ends_at_the_rewards_behind_the_odds(proofs):
    """Up to a constant per prompt, which Bradley-Terry does not determine."""
    proof = proofs["reward_model"]
    world = proof.world
    scores = scores_of(world, proof.flags["output_dir"])
    scores = (scores - scores.mean(1, keepdim=True)).flatten()
    rewards = world.rewards[:, world.ended]
    rewards = (rewards - rewards.mean(1, keepdim=True)).flatten()
    assert torch.corrcoef(torch.stack([scores, rewards]))[0, 1] > 0.999
    assert abs((scores @ rewards) / (rewards @ rewards) - 1) < 0.02


def test_rejection_sampling_ends_at_the_best_of_n_law(proofs):
    """The selected completions follow the law, and the model fits them.

    They are m draws per prompt, so the KL of their frequencies is about (K - 1) / (2m) for K
    possible completions."""
    kept = 2048
    noise = 258 / (2 * kept)
    proof = judge(proofs["rejection_sampling"], limit=2 * noise)
    world = proof.world
    ref = law(world.ref, world.tokenizer, world.completions)
    assert 0.5 < kl(proof.target, ref) < math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
    prompts = list(world.table)
    columns = {c: k for k, c in enumerate(world.completions)}
    counts = torch.zeros_like(ref)
    with open(f"{proof.flags['output_dir']}/rollouts.jsonl") as lines:
        for line in map(json.loads, lines):
            best = max(range(BEST_OF), key=lambda j: line["scores"][j])
            row = prompts.index(line["row"]["prompt"])
            counts[row, columns[tuple(line["ids"][best])]] += 1
    assert (counts.sum(1) == kept).all()
    assert kl((counts / kept).log(), proof.target) < 1.2 * noise
    assert kl((counts / kept).log(), ref) > 0.5


# ---------------------------------------------------------------- reinforcement learning
@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo k1"])
def test_online_methods_end_at_the_optimum(name, proofs):
    """p_ref exp(r / beta) / Z. rloo: GPT-2 at a temperature of 0.7. grpo: PAD is EOS."""
    proof = judge(proofs[name])
    assert implied_beta(proof) == pytest.approx(proof.flags["kl_coef"], rel=0.15)


def test_the_k3_loss_ends_at_its_own_law(proofs):
    """b p_ref / (lambda - r), far from the optimum of the k1 reward, and b is not beta."""
    proof = judge(proofs["grpo k3"], limit=1e-2)
    final = proof.law(proof.flags["output_dir"])
    ref = proof.law(proof.flags["model"])
    assert kl(final, proof.elsewhere) > 0.2
    law_with_beta = k3_law(ref, proof.rewards, proof.flags["kl_coef"], 10**9)
    assert kl(final, proof.target) < 0.5 * kl(final, law_with_beta)


def test_distillation_ends_at_the_law_of_the_teacher(proofs):
    judge(proofs["distillation"], limit=2e-2)


def test_dpo_ends_at_the_optimum(proofs):
    """The optimum of the rewards behind the preferences, given letters and then EOS."""
    proof = judge(proofs["dpo"])
    assert implied_beta(proof) == pytest.approx(proof.flags["beta"], rel=0.2)


def test_ppo_and_dpo_meet(proofs):
    """PPO on a table of rewards and DPO on preferences made from it end at one distribution."""
    ppo = proofs["ppo"]
    dpo = proofs["dpo"]
    assert ppo.world.table == dpo.world.table
    ended = [ppo.world.completions[k] for k in ppo.world.ended]
    ppo_law = normalize(law(ppo.flags["output_dir"], ppo.world.tokenizer, ended))
    assert kl(ppo_law, dpo.law(dpo.flags["output_dir"])) < 0.1
