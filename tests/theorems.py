"""Closed forms of the optimum of each script, on the language of language.py.

A Theorem is a run of a script's main with ordinary flags, and the distance of the saved model from
its closed form. test_theorems.py asserts the distances, benchmarks/closed_form.py plots them."""

import contextlib
import functools
import io
import math
import random
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import torch
import transformers
from language import (
    LETTERS,
    PROMPTS,
    best_of_n_law,
    gibbs,
    k3_law,
    kl,
    law,
    list_completions,
    normalize,
    save_start,
    texts_of,
    write_rows,
)

import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

BETA = 0.35
BEST_OF = 4


@functools.cache
def make_world(parent, seed, *, architecture="llama", pad_is_eos=False, letters=LETTERS):
    """Reference model, rewards, demonstrations, pairs and prompts, as files in a new directory.

    Theorems with the same arguments share a world."""
    folder = tempfile.mkdtemp(prefix="world-", dir=parent)
    draw = random.Random(seed)
    world = SimpleNamespace(folder=folder, ref=f"{folder}/ref")
    world.tokenizer = save_start(f"{folder}/start", seed, architecture, pad_is_eos)
    world.completions = list_completions(world.tokenizer)
    texts = texts_of(world.tokenizer, world.completions)
    eos_id = world.tokenizer.eos_token_id
    # the completions that text data can contain: letters, then EOS
    world.ended = [k for k, c in enumerate(world.completions) if c == (*c[: len(texts[k])], eos_id)]
    world.ended = [k for k in world.ended if set(texts[k]) <= set(letters)]

    # rewards: logs of 1 to 4, so repeated rows give exact odds, plus 3, so the mean is not near 0
    unique_texts = list(dict.fromkeys(texts))
    odds = {(prompt, text): draw.randint(1, 4) for prompt in PROMPTS for text in unique_texts}
    table = {p: {text: 3 + math.log(odds[p, text]) for text in unique_texts} for p in PROMPTS}
    world.table = table
    world.rewards = torch.tensor([[table[p][x] for x in texts] for p in PROMPTS]).double()
    with open(f"{folder}/reward.py", "w") as file:
        file.write(f"TABLE = {table!r}\n\n\ndef look_up(prompts, completions, rows):\n")
        file.write("    return [TABLE[p][c] for p, c in zip(prompts, completions)]\n")
    world.reward = f"{folder}/reward.py:look_up"

    # demonstrations: 128 per prompt, from a skewed distribution
    world.data = torch.full(world.rewards.shape, -torch.inf).double()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        weights = [draw.random() ** 3 for _ in world.ended]
        drawn = draw.choices(world.ended, weights, k=128)
        rows += [dict(prompt=prompt, completion=texts[k]) for k in drawn]
        for k in drawn:
            world.data[i, k] = math.log(drawn.count(k) / len(drawn))
    world.demonstrations = write_rows(f"{folder}/demonstrations.jsonl", rows)

    # pairs: neighbors in three rings of all texts; A is chosen odds(A) times, B odds(B) times
    rows = []
    for prompt in PROMPTS:
        for _ in range(3):
            ring = draw.sample([texts[k] for k in world.ended], len(world.ended))
            for a, b in zip(ring, ring[1:] + ring[:1]):
                for_a, for_b = Fraction(odds[prompt, a], odds[prompt, b]).as_integer_ratio()
                rows += [dict(prompt=prompt, chosen=a, rejected=b)] * for_a
                rows += [dict(prompt=prompt, chosen=b, rejected=a)] * for_b
    world.pairs = write_rows(f"{folder}/pairs.jsonl", rows)
    world.prompts = write_rows(f"{folder}/prompts.jsonl", [dict(prompt=p) for p in PROMPTS])

    # the training of the reference stops early: every completion keeps some probability
    run(
        sft,
        model=f"{folder}/start",
        output_dir=world.ref,
        dataset=world.demonstrations,
        epochs=40,
        batch_size=384,
        learning_rate=1e-3,
        save_every=0,
    )
    return world


def run(script, **flags):
    """Run main of a script, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(script.Args(**flags))


@dataclass
class Theorem:
    """A script, the flags of a run, and the closed form of its optimum."""

    script: object
    flags: dict
    world: SimpleNamespace
    target: torch.Tensor  # log-probs (prompts, K)
    law: object  # function(a model or its directory) -> log-probs (prompts, K)
    elsewhere: torch.Tensor = None  # log-probs of a similar target that is not the right one
    rewards: torch.Tensor = None  # (prompts, K)
    forward: bool = False  # distance KL(target || law), as of maximum likelihood, not the reverse

    def distance(self, model):
        """KL between the law of a model and the target in nats, mean over prompts."""
        law = self.law(model)
        return kl(self.target, law) if self.forward else kl(law, self.target)

    def run(self, **flags):
        return run(self.script, **(self.flags | flags))


def scores_of(world, model):
    """Scores of completions with EOS by the forward of transformers, (prompts, K)."""
    if not isinstance(model, torch.nn.Module):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model = load(model, dtype=torch.float64)
    scores = torch.zeros(len(PROMPTS), len(world.ended)).double()
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            prompt_ids = world.tokenizer.convert_tokens_to_ids(list(prompt))
            for j, k in enumerate(world.ended):
                ids = torch.tensor([prompt_ids + list(world.completions[k])])
                scores[i, j] = model(ids).logits[0, 0]
    model.train(was_training)
    return scores


def theorem(name, folder, seed=1, short=True):
    """The Theorem of a name, with its world made in a directory.

    short: train for seconds instead of a minute."""
    options = {
        "rloo": dict(architecture="gpt2"),
        "grpo k1": dict(pad_is_eos=True),
        # otherwise EOS and PAD share a text, and the loss barely holds the odds of two good answers
        "grpo k3": dict(pad_is_eos=True),
        "reward_model": dict(letters="abc"),
    }
    world = make_world(folder, seed, **options.get(name, {}))
    words = world.tokenizer
    completions = world.completions
    ended = world.ended
    flags = dict(
        model=world.ref,
        output_dir=f"{folder}/{name}{'' if short else ' long'}",
        seed=seed,
        save_every=0,
        log_every=10**6,
    )
    online = dict(
        dataset=world.prompts,
        reward=world.reward,
        prompts_per_step=len(PROMPTS),
        num_generations=64 if short else 80,
        max_completion_length=3,
        kl_coef=BETA,
        learning_rate=1.5e-3,
        steps=240 if short else 600,
    )

    def policy_law(model, temperature=1.0):
        return law(model, words, completions, temperature)

    def ended_law(model):
        return normalize(law(model, words, [completions[k] for k in ended]))

    ref = policy_law(world.ref)
    optimum = gibbs(ref, world.rewards, BETA)
    if name == "sft":
        flags |= dict(
            model=f"{world.folder}/start",
            dataset=world.demonstrations,
            batch_size=384,
            epochs=80 if short else 240,
            learning_rate=5e-3 if short else 3e-3,
        )
        return Theorem(sft, flags, world, world.data, policy_law, forward=True)
    if name == "reward_model":
        flags |= dict(
            dataset=world.pairs,
            batch_size=240,
            epochs=150 if short else 300,
            learning_rate=2e-3,
        )
        target = normalize(optimum[:, ended])

        def law_of_scores(model):  # of the policy that is optimal for these scores
            return normalize(ref[:, ended] + scores_of(world, model) / BETA)

        return Theorem(reward_model, flags, world, target, law_of_scores)
    if name == "dpo":
        flags |= dict(
            beta=BETA,
            dataset=world.pairs,
            batch_size=240,
            epochs=30 if short else 100,
            learning_rate=2e-3,
        )
        return Theorem(dpo, flags, world, normalize(optimum[:, ended]), ended_law)
    if name == "rejection_sampling":
        kept = 2048 if short else 8192
        rows = [dict(prompt=p) for p in PROMPTS] * kept
        flags |= dict(
            dataset=write_rows(f"{folder}/many.jsonl", rows),
            reward=world.reward,
            temperature=1.0,
            num_generations=BEST_OF,
            max_completion_length=3,
            batch_size=512,
            learning_rate=4e-3 if short else 2e-3,
            epochs=5,
        )
        target = best_of_n_law(ref, world.rewards, BEST_OF)
        return Theorem(rejection_sampling, flags, world, target, policy_law, forward=True)
    if name == "distillation":  # the teacher is the model of another world
        teacher = make_world(folder, seed + 1).ref
        flags |= online | dict(
            reward="none",
            reference=teacher,
            kl_coef=1.0,
            kl_estimator="k1",
            scale_rewards="none",
        )
        return Theorem(grpo, flags, world, policy_law(teacher), policy_law)
    if name == "ppo":  # with lambda 1, advantages are unbiased for any values
        flags |= online | dict(gae_lambda=1.0, update_epochs=1, num_generations=80)
        return Theorem(ppo, flags, world, optimum, policy_law)
    if name == "rloo":  # policy and reference are the distributions at the sampling temperature

        def warm_law(model):
            return policy_law(model, temperature=0.7)

        optimum = gibbs(warm_law(world.ref), world.rewards, BETA)
        return Theorem(rloo, flags | online | dict(temperature=0.7), world, optimum, warm_law)
    if name == "grpo k1":
        flags |= online | dict(scale_rewards="none", kl_estimator="k1")
        if short:
            flags |= dict(steps=220, learning_rate=2.5e-3)
        return Theorem(grpo, flags, world, optimum, policy_law)
    if name == "grpo k3":
        completions = list_completions(words, length=1)
        texts = texts_of(words, completions)
        rewards = torch.tensor([[world.table[p][x] for x in texts] for p in PROMPTS]).double()
        # groups of 4, so b, which depends on their size, is a third larger than beta
        flags |= online | dict(
            scale_rewards="none",
            kl_estimator="k3",
            kl_coef=0.15,
            max_completion_length=1,
            steps=140 if short else 240,
            prompts_per_step=60,
            num_generations=4,
            learning_rate=2e-3,
        )
        ref = policy_law(world.ref)
        beta = flags["kl_coef"]
        target = k3_law(ref, rewards, beta, flags["num_generations"])
        elsewhere = gibbs(ref, rewards, beta)
        return Theorem(grpo, flags, world, target, policy_law, elsewhere=elsewhere, rewards=rewards)
    raise ValueError(f"unknown theorem {name}")
