"""What each script provably converges to, on the language that can be listed: a run of its own main
with ordinary flags, and the distance of what it saved from the closed form. test_theorems.py
asserts them, benchmarks/closed_form.py draws them."""

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
    normalise,
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
    """Reference model, rewards, demonstrations, pairs and prompts, as files in a new folder; made
    once for all theorems of one parent folder that are about the same world."""
    folder = tempfile.mkdtemp(prefix="world-", dir=parent)
    draw, world = random.Random(seed), SimpleNamespace(folder=folder, ref=f"{folder}/ref")
    world.tokenizer = save_start(f"{folder}/start", seed, architecture, pad_is_eos)
    world.completions = list_completions(world.tokenizer)
    texts, eos = texts_of(world.tokenizer, world.completions), world.tokenizer.eos_token_id
    # what a data set can hold: letters, then EOS
    world.ended = [k for k, c in enumerate(world.completions) if c == (*c[: len(texts[k])], eos)]
    world.ended = [k for k in world.ended if set(texts[k]) <= set(letters)]

    # rewards: the logs of 1 to 4, so that repeating rows gives exact odds, and a mean well away
    # from 0
    odds = {
        (prompt, text): draw.randint(1, 4) for prompt in PROMPTS for text in dict.fromkeys(texts)
    }
    world.table = table = {
        prompt: {x: 3 + math.log(odds[prompt, x]) for x in texts} for prompt in PROMPTS
    }
    world.rewards = torch.tensor([[table[p][x] for x in texts] for p in PROMPTS]).double()
    with open(f"{folder}/reward.py", "w") as file:
        file.write(f"TABLE = {table!r}\n\n\ndef look_up(prompts, completions, rows):\n")
        file.write("    return [TABLE[p][c] for p, c in zip(prompts, completions)]\n")
    world.reward = f"{folder}/reward.py:look_up"

    # demonstrations: 128 of each prompt, drawn from a skewed law
    world.data = torch.full(world.rewards.shape, -torch.inf).double()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        drawn = draw.choices(world.ended, [draw.random() ** 3 for _ in world.ended], k=128)
        rows += [dict(prompt=prompt, completion=texts[k]) for k in drawn]
        for k in drawn:
            world.data[i, k] = math.log(drawn.count(k) / len(drawn))
    world.demonstrations = write_rows(f"{folder}/demonstrations.jsonl", rows)

    # pairs: neighbours in three rings of all texts; A is chosen odds(A) times for odds(B) times B
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

    # the reference is trained, and not to the end: every completion keeps some probability
    flags = dict(
        dataset=world.demonstrations, epochs=40, batch_size=384, learning_rate=1e-3, save_every=0
    )
    run(sft, model=f"{folder}/start", output_dir=world.ref, **flags)
    return world


def run(script, **flags):
    """The script's main, without its printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(script.Args(**flags))


@dataclass
class Theorem:
    """A script, the flags of its run, and the closed form of where it must end."""

    script: object
    flags: dict
    world: SimpleNamespace
    target: torch.Tensor  # log probabilities (prompts, K)
    law: object  # a model in memory, or the folder of one -> its log probabilities (prompts, K)
    elsewhere: torch.Tensor = None  # the law that one might take for its target
    rewards: torch.Tensor = None  # (prompts, K)
    # KL(target || law), which fitting completions minimises, or KL(law || target)
    forward: bool = False

    def distance(self, model):
        """Mean over prompts, in nats."""
        return (
            kl(self.target, self.law(model)) if self.forward else kl(self.law(model), self.target)
        )

    def run(self, **flags):
        return run(self.script, **(self.flags | flags))


def scores_of(world, model):
    """A reward model's scores of the completions that EOS ended, by transformers' own class:
    (prompts, K)."""
    if not isinstance(model, torch.nn.Module):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model = load(model, dtype=torch.float64)
    scores, was_training = torch.zeros(len(PROMPTS), len(world.ended)).double(), model.training
    model.eval()
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            for j, k in enumerate(world.ended):
                ids = world.tokenizer.convert_tokens_to_ids(list(prompt)) + list(
                    world.completions[k]
                )
                scores[i, j] = model(torch.tensor([ids])).logits[0, 0]
    model.train(was_training)
    return scores


def theorem(name, folder, seed=1, short=True):
    """Name of a theorem -> Theorem, its world made in the folder. short: train for seconds, else a
    minute."""
    options = {
        "rloo": dict(architecture="gpt2"),
        "grpo k1": dict(pad_is_eos=True),
        # EOS and PAD would be one text, and the loss holds the odds of two good answers but weakly
        "grpo k3": dict(pad_is_eos=True),
        "reward_model": dict(letters="abc"),
    }
    world = make_world(folder, seed, **options.get(name, {}))
    words, completions, ended = world.tokenizer, world.completions, world.ended
    flags = dict(
        model=world.ref,
        output_dir=f"{folder}/{name}{'' if short else ' long'}",
        seed=seed,
        save_every=0,
        log_every=10**6,
    )
    online = dict(
        dataset=world.prompts, reward=world.reward, prompts_per_step=len(PROMPTS), kl_coef=BETA
    )
    online |= dict(max_completion_length=3, learning_rate=1.5e-3)
    online |= dict(num_generations=64 if short else 80, steps=240 if short else 600)

    def of_policy(model, temperature=1.0):
        return law(model, words, completions, temperature)

    def of_ended(model):
        return normalise(law(model, words, [completions[k] for k in ended]))

    ref = of_policy(world.ref)
    optimum = gibbs(ref, world.rewards, BETA)
    if name == "sft":
        flags |= dict(model=f"{world.folder}/start", dataset=world.demonstrations, batch_size=384)
        flags |= dict(epochs=80 if short else 240, learning_rate=5e-3 if short else 3e-3)
        return Theorem(sft, flags, world, world.data, of_policy, forward=True)
    if name == "reward_model":
        flags |= dict(
            dataset=world.pairs,
            batch_size=240,
            epochs=150 if short else 300,
            learning_rate=2e-3,
        )
        target = normalise(optimum[:, ended])

        def of_reward_model(model):  # the policy that its scores would make optimal
            return normalise(ref[:, ended] + scores_of(world, model) / BETA)

        return Theorem(reward_model, flags, world, target, of_reward_model)
    if name == "dpo":
        flags |= dict(
            dataset=world.pairs,
            batch_size=240,
            epochs=30 if short else 100,
            learning_rate=2e-3,
        )
        return Theorem(dpo, flags | dict(beta=BETA), world, normalise(optimum[:, ended]), of_ended)
    if name == "rejection_sampling":
        kept = 2048 if short else 8192
        rows = [dict(prompt=p) for p in PROMPTS] * kept
        flags |= dict(
            dataset=write_rows(f"{folder}/many.jsonl", rows), reward=world.reward, temperature=1.0
        )
        flags |= dict(
            num_generations=BEST_OF,
            max_completion_length=3,
            batch_size=512,
            learning_rate=4e-3 if short else 2e-3,
        )
        flags |= dict(epochs=5)
        target = best_of_n_law(ref, world.rewards, BEST_OF)
        return Theorem(rejection_sampling, flags, world, target, of_policy, forward=True)
    if name == "distillation":  # the teacher is the model of another world
        teacher = make_world(folder, seed + 1).ref
        flags |= online | dict(reward="none", reference=teacher, kl_coef=1.0)
        flags |= dict(kl_estimator="k1", kl_in="reward", scale_rewards="none")
        return Theorem(grpo, flags, world, of_policy(teacher), of_policy)
    if name == "ppo":  # lambda 1: an advantage is then right whatever the values are
        flags |= online | dict(gae_lambda=1.0, update_epochs=1)
        if short:
            flags |= dict(num_generations=80)
        return Theorem(ppo, flags, world, optimum, of_policy)
    if name == "rloo":  # at a temperature: reference and policy are the laws that are sampled from

        def of_warm_policy(model):
            return of_policy(model, temperature=0.7)

        optimum = gibbs(of_warm_policy(world.ref), world.rewards, BETA)
        return Theorem(rloo, flags | online | dict(temperature=0.7), world, optimum, of_warm_policy)
    online |= dict(scale_rewards="none")
    if name == "grpo k1":
        flags |= online | dict(kl_estimator="k1", kl_in="reward")
        if short:
            flags |= dict(steps=220, learning_rate=2.5e-3)
        return Theorem(grpo, flags, world, optimum, of_policy)
    if name == "grpo k3":
        completions = list_completions(words, length=1)
        texts = texts_of(words, completions)
        rewards = torch.tensor([[world.table[p][x] for x in texts] for p in PROMPTS]).double()
        # groups of 4, so that b, which knows their size, is a third larger than beta
        flags |= online | dict(
            kl_estimator="k3",
            kl_in="loss",
            kl_coef=0.15,
            max_completion_length=1,
            steps=140 if short else 240,
        )
        flags |= dict(prompts_per_step=60, num_generations=4, learning_rate=2e-3)
        ref, beta = of_policy(world.ref), flags["kl_coef"]
        target = k3_law(ref, rewards, beta, flags["num_generations"])
        elsewhere = gibbs(ref, rewards, beta)
        return Theorem(grpo, flags, world, target, of_policy, elsewhere=elsewhere, rewards=rewards)
    raise ValueError(f"unknown theorem {name}")
