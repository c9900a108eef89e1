"""Each script's own main, with its ordinary flags, ends at the closed form of its objective. The
distance is computed by listing every completion, not by sampling: see language.py and theorems.py.

The short runs are part of every test run; `python benchmarks/closed_form.py --seeds 1 2 3` has
longer ones with other seeds, and draws the figure."""

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
    normalise,
    save_start,
    texts_of,
)
from theorems import BEST_OF, scores_of, theorem

# the short runs, and the beginnings of the tests that judge each
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
    """The short runs that these tests judge."""
    for name, tests in SHORT.items():
        if any(item.name.startswith(tests) for item in items):
            PROOFS[name] = theorem(name, folder)
    return lambda: [proof.run() for proof in PROOFS.values()]


@pytest.fixture(scope="module")
def proofs(short_runs):
    """name -> Theorem, after its short run."""
    return PROOFS


def judge(proof, limit=5e-2, start=0.5):
    """It starts half a nat away, or it would prove little, and ends at the closed form."""
    assert proof.distance(proof.flags["model"]) > start
    assert proof.distance(proof.flags["output_dir"]) < limit
    return proof


def implied_beta(proof):
    """By the slope of log p / p_ref in r, completions weighted by the optimum. A distance alone
    would pass a KL coefficient that is a third off."""
    ours, ref = (proof.law(proof.flags[x]) for x in ("output_dir", "model"))
    rewards = (
        proof.world.rewards[:, proof.world.ended]
        if proof.script.__name__ == "dpo"
        else proof.world.rewards
    )
    p = proof.target.exp()
    x, y = (z - (p * z).sum(1, keepdim=True) for z in (rewards, ours - ref))
    return ((p * x * x).sum() / (p * x * y).sum()).item()


# ---------------------------------------------------------------- what the theorems rest on
@pytest.mark.parametrize("pad_is_eos, count", [(False, 259), (True, 156)])
def test_the_language_is_listed_whole(pad_is_eos, count, tmp_path):
    """Probabilities add up to 1 at any temperature, and completions that differ in PAD alone share
    a text."""
    words = save_start(tmp_path, 1, pad_is_eos=pad_is_eos)
    completions = list_completions(words)
    assert len(completions) == len(set(completions)) == count
    for temperature in (1.0, 0.5):
        total = law(tmp_path, words, completions, temperature).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert len(set(texts_of(words, completions))) == 156


def test_best_of_n_law_against_all_tuples():
    """Rewards with ties; the bound on its KL (Beirami et al. 2024) holds."""
    ref = torch.randn(
        1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).log_softmax(1)
    rewards, n = torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0, 2.0]]).double(), 4
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
    """Up to a constant for each prompt, which Bradley-Terry leaves open."""
    proof = proofs["reward_model"]
    world = proof.world
    scores, rewards = scores_of(world, proof.flags["output_dir"]), world.rewards[:, world.ended]
    scores, rewards = ((x - x.mean(1, keepdim=True)).flatten() for x in (scores, rewards))
    assert torch.corrcoef(torch.stack([scores, rewards]))[0, 1] > 0.999
    assert abs((scores @ rewards) / (rewards @ rewards) - 1) < 0.02


def test_rejection_sampling_ends_at_the_best_of_n_law(proofs):
    """The best of each rollout are m draws from that law for each prompt, so that their frequencies
    are about (K-1)/(2m) from it in expectation, K being the number of completions; and the model
    fits them."""
    kept = 2048
    noise = 258 / (2 * kept)
    proof = judge(proofs["rejection_sampling"], limit=2 * noise)
    world, ref = proof.world, law(proof.world.ref, proof.world.tokenizer, proof.world.completions)
    assert 0.5 < kl(proof.target, ref) < math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
    index = {c: k for k, c in enumerate(world.completions)}
    counts = torch.zeros_like(ref)
    with open(f"{proof.flags['output_dir']}/rollouts.jsonl") as lines:
        for line in map(json.loads, lines):
            best = max(range(BEST_OF), key=lambda j: line["scores"][j])
            counts[
                list(world.table).index(line["row"]["prompt"]), index[tuple(line["ids"][best])]
            ] += 1
    assert (counts.sum(1) == kept).all()
    assert kl((counts / kept).log(), proof.target) < 1.2 * noise
    assert kl((counts / kept).log(), ref) > 0.5


# ---------------------------------------------------------------- reinforcement learning
@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo k1"])
def test_online_methods_end_at_the_optimum(name, proofs):
    """p_ref exp(r / beta) / Z: rloo at a temperature of 0.7 and on GPT-2's architecture, grpo where
    PAD is EOS, all with prompts of different lengths."""
    proof = judge(proofs[name])
    assert implied_beta(proof) == pytest.approx(proof.flags["kl_coef"], rel=0.15)


def test_the_k3_loss_ends_at_its_own_law(proofs):
    """b p_ref / (lambda - r), far from what the k1 reward leads to; and nearer to it than with beta
    for b."""
    proof = judge(proofs["grpo k3"], limit=1e-2)
    ours, ref = (proof.law(proof.flags[x]) for x in ("output_dir", "model"))
    assert kl(ours, proof.elsewhere) > 0.2
    without = k3_law(ref, proof.rewards, proof.flags["kl_coef"], 10**9)
    assert kl(ours, proof.target) < 0.5 * kl(ours, without)


def test_distillation_ends_at_the_law_of_the_teacher(proofs):
    judge(proofs["distillation"], limit=2e-2)


def test_dpo_ends_at_the_optimum(proofs):
    """Of the same rewards, through the preferences that they make: p*, given letters and then
    EOS."""
    proof = judge(proofs["dpo"])
    assert implied_beta(proof) == pytest.approx(proof.flags["beta"], rel=0.2)
    logps = law(proof.flags["output_dir"], proof.world.tokenizer, proof.world.completions)
    print(
        "mass on what preferences say nothing of:",
        (1 - logps[:, proof.world.ended].exp().sum(1)).tolist(),
    )


def test_ppo_and_dpo_meet(proofs):
    """One reward table, once as a checker and once as preferences: two scripts, one
    distribution."""
    ppo = proofs["ppo"]
    dpo = proofs["dpo"]
    assert ppo.world.table == dpo.world.table
    ended = [ppo.world.completions[k] for k in ppo.world.ended]
    of_ppo = normalise(law(ppo.flags["output_dir"], ppo.world.tokenizer, ended))
    assert kl(of_ppo, dpo.law(dpo.flags["output_dir"])) < 0.1
