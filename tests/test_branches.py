"""The second branches of each main, against float64 formulas.

Reward models with other tokens or other ids, ensembles, teachers, dynamic sampling, penalties
within groups, full contexts, other templates. The models are real and small, and completions are
given where a formula needs them. test_steps.py has the first branches."""

import json
import math
import random
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import background
import processes
import pytest
import torch
import transformers
from language import write_rows
from processes import launch
from test_data import refused as refused  # a fixture
from test_processes import CLOCK, assert_close
from test_rewards import other_tokenizer, wordlevel
from test_scripts import metrics, reward_file
from test_situations import contents
from test_steps import (
    EOS,
    check_gradient,
    check_logged,
    deviation,
    float64_copy,
    gradient_of,
    hidden_states,
    ids_of,
    mean,
    token_logprobs,
    trained_nll,
    variance,
)

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

SAMPLING = [ppo, grpo, rloo, rejection_sampling]
SCRIPTS = [sft, reward_model, dpo, *SAMPLING]
PROMPTS = ["ab>", "c>", "defgh>", "ijk>", "lm>", "nopqrs>", "tu>"]
HELD_OUT = ["xw>", "bca>", "qponm>"]
G = 3
LENGTH = 6  # --max-completion-length
CONTEXT = 16  # of the models with few positions


# ---------------------------------------------------------------- models
def tiny_gpt2(cls, tokenizer, seed, n_positions=32):
    """A model with large random weights and a head of its own."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=n_positions,
        initializer_range=0.3,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
        tie_word_embeddings=False,
    )
    return cls(config)


def tiny_llama(cls, tokenizer, seed):
    """A model without biases, with large random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    return cls(config)


def avoid_eos(model):
    """Lower the logit of EOS by 160, so no completion ends."""
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(0.1)
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[EOS] = -10.0
    return model


def permuted_tokenizer():
    """The tokens of the tiny tokenizer with ids in reverse order."""
    vocab = sft.tiny_tokenizer().get_vocab()
    special = dict(pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    return wordlevel(sorted(vocab, key=vocab.get, reverse=True), **special)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models.

    With the policy's tokens: policy, teacher (a Llama), scorer. With other ids: permuted (a
    scorer), permuted_policy. With other tokens: other (a scorer). With 16 positions: endless (a
    policy that never samples EOS), short_scorer."""
    folder = tmp_path_factory.mktemp("branches")
    language_model = transformers.GPT2LMHeadModel
    scorer = transformers.GPT2ForSequenceClassification
    tokenizer, permuted, other = (
        sft.tiny_tokenizer(),
        permuted_tokenizer(),
        other_tokenizer(True),
    )
    saved = {
        "policy": (tiny_gpt2(language_model, tokenizer, 1), tokenizer),
        "teacher": (tiny_llama(transformers.LlamaForCausalLM, tokenizer, 9), tokenizer),
        "scorer": (tiny_gpt2(scorer, tokenizer, 2), tokenizer),
        "permuted": (tiny_gpt2(scorer, permuted, 3), permuted),
        "permuted_policy": (tiny_gpt2(language_model, permuted, 4), permuted),
        "other": (tiny_gpt2(scorer, other, 5), other),
        "endless": (avoid_eos(tiny_gpt2(language_model, tokenizer, 6, CONTEXT)), tokenizer),
        "short_scorer": (tiny_gpt2(scorer, tokenizer, 7, CONTEXT), tokenizer),
    }
    for name, (model, its_tokenizer) in saved.items():
        model.save_pretrained(folder / name)
        its_tokenizer.save_pretrained(folder / name)
    return folder


def load_exact(path, cls=transformers.AutoModelForCausalLM):
    return cls.from_pretrained(path, dtype=torch.float64).eval()


# ---------------------------------------------------------------- scores by hand
def own_ids(name, rollout):
    """The ids that a reward model reads: its own BOS and EOS; no EOS after a cut completion."""
    text = rollout.prompt + rollout.text
    if name == "other":
        ids = [1, *(6 + string.printable.index(letter) for letter in text)]
        return ids + [2] * rollout.finished
    ids = ids_of(text + "$" * rollout.finished)
    return [29 - i for i in ids] if name == "permuted" else ids


class ExactReward:
    """--reward as a list of members, in float64. None: no score."""

    def __init__(self, models, names):
        self.names = names
        cls = transformers.AutoModelForSequenceClassification
        paths = {name: models / name for name in names if name != "function"}
        self.models = {name: load_exact(path, cls) for name, path in paths.items()}

    @torch.no_grad()
    def members(self, rollout):
        scores = []
        for name in self.names:
            if name == "function":
                scores.append(None if rollout.text[:1] == "z" else len(rollout.text) / 2 - 1.5)
            else:
                model = self.models[name]
                last = hidden_states(model, own_ids(name, rollout))[-1]
                scores.append((last @ model.score.weight[0]).item())
        return scores

    def __call__(self, rollout):
        """The minimum of all members."""
        scores = self.members(rollout)
        return None if None in scores else min(scores)


LENGTH_REWARD = "return [None if c[:1] == 'z' else len(c) / 2 - 1.5 for c in completions]"


def known_mean(values):
    return mean(value for value in values if value is not None)


# ---------------------------------------------------------------- running a script
def random_texts(call, examples, num_generations):
    """Distinct texts; $ is EOS. The first text of the second prompt begins with z."""
    draw = random.Random(f"texts {call}")
    texts = []
    while len(texts) < len(examples) * num_generations:
        letters = "".join(draw.choices(string.ascii_lowercase[:25], k=draw.randint(1, LENGTH)))
        if len(texts) == num_generations:
            letters = "z" + letters[1:]
        text = letters + "$" * (len(letters) < LENGTH)
        if text not in texts:
            texts.append(text)
    return texts


def watch(script, patch, texts=random_texts):
    """Patch a script to get given completions, and return a record that its run fills in.

    `samples` has the calls of `sample`; a call of training has gradients enabled. `updates` has an
    exact copy of the policy at each of its optimizer steps, and the gradient."""
    record = SimpleNamespace(updates=[], samples=[])
    inner = script.clip_gradients

    def sample(policy, examples, *, num_generations=1, max_new_tokens, temperature=1.0, rng):
        given = texts(len(record.samples), examples, num_generations)
        rollouts = []
        seen = []
        for i, text in enumerate(given):
            example = examples[i // num_generations]
            completion = {"completion_ids": ids_of(text), "finished": text[-1] == "$"}
            rollouts.append(example | completion)
            seen.append(
                SimpleNamespace(
                    prompt=example["prompt"],
                    text=text.removesuffix("$"),
                    finished=text[-1] == "$",
                    ids=(ids_of(example["prompt"]), ids_of(text)),
                )
            )
        call = SimpleNamespace(
            rollouts=seen,
            is_training=torch.is_grad_enabled(),
            num_generations=num_generations,
            temperature=temperature,
        )
        record.samples.append(call)
        return rollouts

    def clip(model, max_norm):
        if not hasattr(model, "score"):
            exact = float64_copy(model)
            record.updates.append(SimpleNamespace(exact=exact, gradient=gradient_of(model)))
        return inner(model, max_norm)

    patch.setattr(script, "sample", sample)
    patch.setattr(script, "clip_gradients", clip)
    return record


def run(script, args, patch, texts=random_texts):
    """Run a script with given completions and return its record.

    Adds `rollouts`, one list per step of training; `rows`, one per step; `evaluations`, one
    (row, rollouts of greedy completions, sampled rollouts, lines of samples.jsonl) each."""
    record = watch(script, patch, texts)
    script.main(args)
    lines = metrics(Path(args.output_dir))
    record.rows = [line for line in lines if line["step"] > 0]
    record.rollouts = [call.rollouts for call in record.samples if call.is_training]
    evaluated = [call for call in record.samples if not call.is_training]
    rows = [line for line in lines if "eval/score" in line]
    assert len(evaluated) == 2 * len(rows)
    samples = Path(args.output_dir, "samples.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()] if rows else []
    record.evaluations = []
    for row, greedy, sampled in zip(rows, evaluated[::2], evaluated[1::2]):
        assert (greedy.temperature, sampled.temperature) == (0.0, args.temperature)
        assert (greedy.num_generations, sampled.num_generations) == (1, args.num_generations)
        of_step = [line for line in samples if line["step"] == row["step"]]
        record.evaluations.append((row, greedy.rollouts, sampled.rollouts, of_step))
    return record


def args_of(script, models, folder, **flags):
    """Args of two steps (two iterations of one step) of one update each, without KL."""
    given = dict(
        model=str(models / "policy"),
        dataset=write_rows(folder / "prompts.jsonl", [dict(prompt=p) for p in PROMPTS]),
        eval_dataset=write_rows(folder / "held_out.jsonl", [dict(prompt=p) for p in HELD_OUT]),
        output_dir=str(folder / "run"),
        num_generations=G,
        max_completion_length=LENGTH,
        micro_batch_tokens=40,
        learning_rate=1e-3,
        warmup_steps=0,
        max_grad_norm=0.0,
        temperature=0.7,
        eval_every=1,
    )
    if script is rejection_sampling:
        given |= dict(prompts_per_iteration=5, iterations=2, epochs=1, batch_size=99)
    else:
        given |= dict(prompts_per_step=5, steps=2, update_epochs=1, num_minibatches=1, kl_coef=0.0)
    return script.Args(**given | flags)


def groups_of(rollouts):
    return [rollouts[i : i + G] for i in range(0, len(rollouts), G)]


# ---------------------------------------------------------------- losses by hand
def advantages_of(script, rollouts, args):
    """Advantages from `reward` of the rollouts."""
    advantages = []
    for group in groups_of(rollouts):
        rewards = [rollout.reward for rollout in group]
        for i, reward in enumerate(rewards):
            if script is rloo:
                advantages.append(reward - mean(rewards[:i] + rewards[i + 1 :]))
            else:
                scale = deviation(rewards) + 1e-6 if args.scale_rewards == "group" else 1.0
                advantages.append((reward - mean(rewards)) / scale)
    return advantages


def loss_by_hand(script, policy, rollouts, args):
    """Loss of a step with one update, from `reward` of the rollouts.

    For ppo.py, the values are 0 and the last reward is the return of every token."""
    logprobs = [token_logprobs(policy, *rollout.ids, args.temperature) for rollout in rollouts]
    if script is ppo:
        returns = [x.reward for x, logprob in zip(rollouts, logprobs) for _ in logprob]
        scale = math.sqrt(variance(returns) + 1e-8)
        gains = [
            (rollout.reward - mean(returns)) / scale * logprob
            for rollout, logprob in zip(rollouts, logprobs)
        ]
        return -torch.cat(gains).mean()
    advantages = advantages_of(script, rollouts, args)
    totals = [x.sum() if script is rloo else x.mean() for x in logprobs]
    return -mean(a * total for a, total in zip(advantages, totals))


# ---------------------------------------------------------------- reward models and ensembles
ENSEMBLE = ["permuted", "function", "scorer", "other"]


@pytest.mark.parametrize("names", [["other"], ["permuted"], ENSEMBLE], ids=["other", "ids", "min"])
@pytest.mark.parametrize("script", SAMPLING, ids=lambda script: script.__name__)
def test_main_uses_the_scores_of_other_reward_models(models, tmp_path, monkeypatch, script, names):
    """Logged scores in training and evaluation, and the gradient that follows from them.

    A reward model with other tokens, one with other ids, and the minimum of an ensemble. Groups
    with an unscored completion are not trained. ppo.py must not take values from such models."""
    paths = [str(models / name) for name in names]
    if "function" in names:
        paths[names.index("function")] = reward_file(tmp_path, LENGTH_REWARD)
    flags = dict(reward=",".join(paths), reward_combine="min" if len(names) > 1 else "mean")
    if script is ppo:
        flags |= dict(gamma=1.0, gae_lambda=1.0)
    args = args_of(script, models, tmp_path, **flags)
    record = run(script, args, monkeypatch)
    reward = ExactReward(models, names)
    lowest = set()
    assert len(record.rollouts) == len(record.rows) == len(record.updates) == 2
    for i, (rollouts, row) in enumerate(zip(record.rollouts, record.rows)):
        kept = [
            rollout
            for group in groups_of(rollouts)
            for rollout in group
            if script is rejection_sampling or None not in map(reward, group)
        ]
        assert (None in map(reward, rollouts)) == ("function" in names)
        members = [reward.members(rollout) for rollout in kept]
        expected = {"score": known_mean(map(reward, kept))}
        if len(names) > 1:
            known = [scores for scores in members if None not in scores]
            lowest |= {scores.index(min(scores)) for scores in known}
            expected["disagreement"] = mean(math.sqrt(variance(scores)) for scores in known)
            for number, scores in enumerate(zip(*members), 1):
                expected[f"score/{number}"] = known_mean(scores)
        check_logged(row, expected)
        if script is rejection_sampling:
            check_gradient(record.updates[i], selection_loss(record, i, reward))
        elif script is not ppo or i == 0:  # later, the value model has learned
            for rollout in kept:
                rollout.reward = reward(rollout)
            exact = record.updates[i].exact
            check_gradient(record.updates[i], loss_by_hand(script, exact, kept, args))
        if script is ppo and i == 0:
            assert row["explained_variance"] == pytest.approx(0, abs=1e-5), "values are not 0"
    assert len(lowest) == len(names) or len(names) == 1, "a member is never the minimum"
    assert len(record.evaluations) == 3
    for row, greedy, sampled, lines in record.evaluations:
        expected = {
            "eval/score_greedy": known_mean(map(reward, greedy)),
            "eval/score": known_mean(map(reward, sampled)),
        }
        check_logged(row, expected)
        for line, rollout in zip(lines, sampled[::G], strict=True):
            assert line["completion"] == rollout.text
            assert line["score"] == pytest.approx(reward(rollout), abs=1e-5)


def selection_loss(record, i, reward):
    """NLL of the best completion of each prompt of an iteration of rejection_sampling.py."""
    best = []
    for group in groups_of(record.rollouts[i]):
        scored = [rollout for rollout in group if reward(rollout) is not None]
        scored.sort(key=reward)
        assert reward(scored[-1]) - reward(scored[-2]) > 1e-3, "rounding may decide"
        best.append(scored[-1])
    masks = [
        [0] * len(prompt) + [1] * len(completion) for prompt, completion in [x.ids for x in best]
    ]
    sequences = [((*x.ids[0], *x.ids[1]), mask) for x, mask in zip(best, masks)]
    return trained_nll(record.updates[i].exact, sequences)


@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo, dict(value_model="permuted")),
        (grpo, dict(reference="permuted_policy", kl_coef=0.1)),
        (rloo, dict(reference="permuted_policy", kl_coef=0.1)),
    ],
    ids=["value model", "grpo", "rloo"],
)
def test_a_second_model_with_other_ids_is_refused(models, tmp_path, refused, script, flags):  # noqa: PLR0917
    """It has the same number of tokens, and every id is in its vocabulary."""
    (name,) = flags.keys() & {"value_model", "reference"}
    path = str(models / flags[name])
    body = "return [0.0] * len(prompts)"
    flags = flags | {name: path, "reward": reward_file(tmp_path, body)}
    args = args_of(script, models, tmp_path, **flags)
    refused([f"--{name.replace('_', '-')} {path}"], script.main, args)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a teacher
TEACHER_FLAGS = {
    "rloo": (rloo, dict()),
    "grpo-k1": (grpo, dict(kl_estimator="k1", scale_rewards="none")),
    "grpo-k2": (grpo, dict(kl_estimator="k2")),
    "grpo-k3": (grpo, dict(kl_estimator="k3", loss_aggregation="constant")),
}


@pytest.mark.parametrize("script, flags", TEACHER_FLAGS.values(), ids=TEACHER_FLAGS)
def test_distillation_follows_the_teacher(models, tmp_path, monkeypatch, script, flags):
    """--reward none --reference TEACHER: the KL in training and evaluation, every gradient.

    The KL is the only reward, and all scores are 0."""
    flags = flags | dict(reward="none", reference=str(models / "teacher"), kl_coef=0.4)
    args = args_of(script, models, tmp_path, **flags)
    record = run(script, args, monkeypatch)
    teacher = load_exact(models / "teacher")
    final = load_exact(tmp_path / "run")
    is_kl_reward = script is rloo or args.kl_estimator == "k1"

    def kl_of(policy, rollout):
        """log pi - log pi_teacher of each token."""
        with torch.no_grad():
            ref_logprobs = token_logprobs(teacher, *rollout.ids, args.temperature)
        return token_logprobs(policy, *rollout.ids, args.temperature) - ref_logprobs

    assert len(record.updates) == len(record.rows) == 2
    for rollouts, row, update in zip(record.rollouts, record.rows, record.updates):
        token_kls = [kl_of(update.exact, rollout) for rollout in rollouts]
        kls = [kl.sum().item() for kl in token_kls]
        assert mean(map(abs, kls)) > 0.3
        expected = {"score": 0.0, "kl": mean(kls), "reward": 0.0}
        if is_kl_reward:
            expected["reward"] = -0.4 * mean(kls)
            for rollout, kl in zip(rollouts, kls):
                rollout.reward = -0.4 * kl
            loss = loss_by_hand(script, update.exact, rollouts, args)
        elif args.kl_estimator == "k2":
            loss = 0.4 * mean((kl**2 / 2).mean() for kl in token_kls)
        else:
            losses = [((-kl).exp() - 1 + kl).sum() for kl in token_kls]
            loss = 0.4 * mean(losses) / args.max_completion_length
        check_logged(row, expected)
        check_gradient(update, loss)
    policies = [update.exact for update in record.updates] + [final]
    evaluations = zip(record.evaluations, policies, strict=True)
    for (row, _, sampled, lines), policy in evaluations:
        with torch.no_grad():
            kls = [kl_of(policy, rollout).sum().item() for rollout in sampled]
        assert mean(map(abs, kls)) > 0.3, "the KL from the initial policy is smaller"
        check_logged(row, {"eval/kl": mean(kls), "eval/score": 0.0, "eval/score_greedy": 0.0})
        assert [line["kl"] for line in lines] == pytest.approx(kls[::G], rel=1e-4, abs=1e-4)
        assert [line["score"] for line in lines] == [0.0] * len(HELD_OUT)


# ---------------------------------------------------------------- a penalty within groups
def texts_of_equal_scores(call, examples, num_generations):
    """Texts of one length in a group. Zero to three of its completions end with EOS."""
    texts = []
    draw = random.Random(f"equal {call}")
    for i in range(len(examples)):
        for j in range(num_generations):
            letters = "".join(draw.choices(string.ascii_lowercase[:25], k=2 + i % 3))
            texts.append(letters + "$" * (j < (i + call) % 4))
    return texts


@pytest.mark.parametrize(
    "script, flags",
    [(rloo, {}), (grpo, {}), (grpo, dict(scale_rewards="none"))],
    ids=["rloo", "grpo", "grpo-unscaled"],
)
def test_a_missing_eos_counts_within_its_group(models, tmp_path, monkeypatch, script, flags):
    """Scores are equal in each group, so advantages come from --missing-eos-penalty alone.

    The penalty is subtracted once, after the minimum of the ensemble. Evaluations and `score` are
    without it."""
    body = "return [len(c) / 2 - 1.5 for c in completions]"
    (tmp_path / "other").mkdir()
    quarter = reward_file(tmp_path / "other", "return [0.25] * len(rows)")
    members = f"{reward_file(tmp_path, body)},{quarter}"
    flags = dict(reward=members, reward_combine="min", missing_eos_penalty=0.7) | flags
    args = args_of(script, models, tmp_path, **flags)
    record = run(script, args, monkeypatch, texts_of_equal_scores)

    def score_of(rollout):
        return min(len(rollout.text) / 2 - 1.5, 0.25)

    for rollouts, row, update in zip(record.rollouts, record.rows, record.updates, strict=True):
        for rollout in rollouts:
            rollout.reward = score_of(rollout) - (0.0 if rollout.finished else 0.7)
        groups = groups_of(rollouts)
        assert all(len(set(map(score_of, group))) == 1 for group in groups)
        is_equal = [len({rollout.finished for rollout in group}) == 1 for group in groups]
        assert 0 < sum(is_equal) < len(is_equal)
        expected = {
            "score": mean(map(score_of, rollouts)),
            "reward": mean(rollout.reward for rollout in rollouts),
            "zero_std_groups": mean(is_equal),
        }
        check_logged(row, expected)
        check_gradient(update, loss_by_hand(script, update.exact, rollouts, args))
    for row, greedy, sampled, lines in record.evaluations:
        assert not all(rollout.finished for rollout in sampled)
        expected = {
            "eval/score_greedy": mean(map(score_of, greedy)),
            "eval/score": mean(map(score_of, sampled)),
        }
        check_logged(row, expected)
        assert [line["score"] for line in lines] == list(map(score_of, sampled[::G]))


# ---------------------------------------------------------------- dynamic sampling
def texts_of_some_equal_groups(call, examples, num_generations):
    """About half of the groups have equal rewards.

    Of the others, some differ only by a missing EOS, and a few have no score."""
    draw = random.Random(f"some {call}")
    texts = []
    for i in range(len(examples)):
        letters = ["".join(draw.choices("cdefgh", k=3)) for _ in range(num_generations)]
        kind = draw.choice(["equal", "equal", "cut", "unequal"])
        if i == 1 and call % 4 == 0:
            kind = "unscored"
        firsts = {"unequal": "ba" + "b" * num_generations, "unscored": "z" + "b" * num_generations}
        first = firsts.get(kind, draw.choice("ab") * num_generations)
        for j in range(num_generations):
            end = "" if kind == "cut" and j == 0 else "$"
            texts.append(first[j] + letters[j] + end)
    return texts


def test_dynamic_sampling_takes_the_next_prompts_of_each_round(models, tmp_path, monkeypatch):
    """Which prompts replace groups of equal rewards, in ten steps.

    Round r of step s takes the prompts from position s * --prompts-per-step on, from its own
    shuffled data. So within an epoch, no round takes a prompt twice. Groups of unequal rewards
    stay in front, rewards include the penalty, and groups without a score are not replaced."""
    body = "return [None if c[0] == 'z' else float(c[0] == 'b') for c in completions]"
    flags = dict(
        dynamic_sampling=True,
        reward=reward_file(tmp_path, body),
        missing_eos_penalty=0.5,
        steps=10,
        prompts_per_step=3,
        eval_dataset=None,
        seed=4,
    )
    args = args_of(grpo, models, tmp_path, **flags)
    record = run(grpo, args, monkeypatch, texts_of_some_equal_groups)
    n = len(PROMPTS)

    def expected_prompts(seed, start, count):
        """Prompts from a position of the endless shuffled data."""
        prompts = []
        for position in range(start, start + count):
            epoch, i = divmod(position, n)
            order = torch.randperm(n, generator=common.generator(seed, "shuffle", epoch))
            prompts.append(PROMPTS[order[i]])
        return prompts

    calls = iter(record.rollouts)
    taken = {}  # round, epoch -> prompts
    most_rounds = 0
    for step, (row, update) in enumerate(zip(record.rows, record.updates, strict=True)):
        groups = []
        num_new = 3
        num_replaced = 0
        for attempt in range(9):
            rollouts = next(calls)
            new = groups_of(rollouts)
            seed = f"4 extra {attempt - 1}" if attempt else 4
            prompts = [group[0].prompt for group in new]
            assert prompts == expected_prompts(seed, 3 * step, num_new)
            for i, prompt in enumerate(prompts):
                taken.setdefault((attempt, (3 * step + i) // n), []).append(prompt)
            for rollout in rollouts:
                rollout.score = float(rollout.text[0] == "b")
                rollout.reward = rollout.score - (0.0 if rollout.finished else 0.5)
            groups += [group for group in new if not any(x.text[0] == "z" for x in group)]
            unequal = [group for group in groups if len({x.reward for x in group}) > 1]
            num_new = len(groups) - len(unequal)
            if num_new == 0 or attempt == 8:
                break
            num_replaced += num_new
            groups = unequal
        most_rounds = max(most_rounds, attempt)
        kept = [rollout for group in groups for rollout in group]
        expected = {
            "dropped_groups": num_replaced / (3 + num_replaced),
            "score": mean(rollout.score for rollout in kept),
            "reward": mean(rollout.reward for rollout in kept),
            "unscored": 1 - len(kept) / 9,
        }
        check_logged(row, expected)
        check_gradient(update, loss_by_hand(grpo, update.exact, kept, args))
    assert next(calls, None) is None
    assert most_rounds >= 2, "too few rounds"
    for prompts in taken.values():
        assert len(set(prompts)) == len(prompts), "a round takes a prompt twice in an epoch"
    for epoch in range(4):
        assert sorted(taken[0, epoch]) == sorted(PROMPTS)


# ---------------------------------------------------------------- the end of the context
def context_args(script, models, folder, prompt):
    """Args of a step with one long held-out prompt and short prompts otherwise.

    The longest held-out completion belongs to a short prompt."""
    rows = [dict(prompt=p, completion="a", chosen="a", rejected="b") for p in ("ab>", "c>")]
    answer = "a" * (LENGTH - 1)  # and EOS
    long = dict(prompt=prompt, completion=answer, chosen=answer, rejected="b")
    other = rows[0] | dict(completion=answer + "bcde", chosen=answer + "bcde")
    given = dict(
        model=str(models / "endless"),
        dataset=write_rows(folder / "rows.jsonl", rows),
        eval_dataset=write_rows(folder / "held_out.jsonl", [*rows, other, long]),
        output_dir=str(folder / "run"),
        learning_rate=1e-4,
        steps=1,
    )
    if script in SAMPLING:
        given |= dict(reward=str(models / "short_scorer"), num_generations=2)
        given |= dict(max_completion_length=LENGTH)
    if script in (ppo, grpo, rloo):
        given |= dict(prompts_per_step=2, update_epochs=1)
    return script.Args(**given)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_held_out_prompt_may_fill_the_context(models, tmp_path, refused, script):
    """Prompt and completion of 16 tokens are evaluated. With 17, nothing is trained."""
    prompt = "abcdefghi>"  # 10 tokens
    script.main(context_args(script, models, tmp_path, prompt))
    rows = [row for row in metrics(tmp_path / "run") if any("eval/" in name for name in row)]
    assert [row["step"] for row in rows] == [0, 1]
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["prompt"] == prompt]
    assert len(last) == 4 if script is reward_model else 2
    if script is not reward_model:
        assert all(row["eval/completion_length"] == LENGTH for row in rows)
        assert all(row["eval/eos_rate"] == 0 for row in rows)
    if script in SAMPLING:
        reward = ExactReward(models, ["short_scorer"])
        for line in last:
            assert len(line["completion"]) <= LENGTH
            if len(line["completion"]) == LENGTH:  # otherwise it has tokens without text
                rollout = SimpleNamespace(prompt=prompt, text=line["completion"], finished=False)
                assert line["score"] == pytest.approx(reward(rollout), abs=1e-4)
    before = contents(tmp_path / "run")
    (tmp_path / "longer").mkdir()
    args = context_args(script, models, tmp_path / "longer", "j" + prompt)
    words = [f"{models / 'endless'}: 17 tokens exceed its context of 16"]
    refused(words, script.main, args)
    assert not (tmp_path / "longer/run").exists()
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("script", SAMPLING, ids=lambda script: script.__name__)
def test_a_held_out_prompt_may_fill_the_context_of_the_reward_model(
    models, tmp_path, refused, script
):
    """The policy has a longer context, and the reward model has 16 positions."""
    for prompt in ("abcdefghi>", "jabcdefghi>"):
        (tmp_path / prompt).mkdir()
        args = context_args(script, models, tmp_path / prompt, prompt)
        args.model = str(models / "policy")
        if prompt[0] == "a":
            script.main(args)
        else:
            words = [f"{models / 'short_scorer'}: 17 tokens exceed its context of 16"]
            refused(words, script.main, args)
            assert not (tmp_path / prompt / "run").exists()


# ---------------------------------------------------------------- another template at --resume
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_run_is_not_resumed_with_another_template(models, tmp_path, monkeypatch, refused, script):  # noqa: PLR0917
    """Both columns exist, so only the prompts differ. The run stays and can be resumed."""
    rows = [
        dict(prompt=prompt, question=prompt[::-1], completion="a", chosen="a", rejected="b")
        for prompt in ("ab>", "cde>", "f>", "gh>")
    ]
    flags = dict(
        model=str(models / "policy"),
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-4,
        steps=1,
    )
    if script in SAMPLING:
        body = "return [float(len(c)) for c in completions]"
        flags |= dict(reward=reward_file(tmp_path, body), num_generations=2)
        flags |= dict(max_completion_length=LENGTH)
    if script in (ppo, grpo, rloo):
        flags |= dict(prompts_per_step=2)
    else:
        flags |= dict(batch_size=2)
    script.main(script.Args(**flags))
    before = contents(tmp_path / "run")

    def resume(template):
        argv = ["--resume", "--output-dir", str(tmp_path / "run"), "--steps", "2"]
        argv += ["--prompt-template", template]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        script.main(common.cli(script.Args, laptop={}))

    line = refused(["--resume"], resume, "{question}")
    assert "--prompt-template" in line or "data" in line
    assert contents(tmp_path / "run") == before
    resume("{prompt}")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


# ---------------------------------------------------------------- two processes
@background.job
def ptx_of_two(folder, items):
    """PPO-ptx in two processes, its start models and its data."""
    tokenizer = sft.tiny_tokenizer()
    for name, cls, seed in [
        ("sft", transformers.LlamaForCausalLM, 1),
        ("reward_model", transformers.LlamaForSequenceClassification, 2),
    ]:
        tiny_llama(cls, tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [dict(prompt=prompt, completion=prompt[-2::-1][:5]) for prompt in PROMPTS]
    write_rows(folder / "ptx.jsonl", rows)

    def run():
        done = launch(2, "ptx", folder, folder)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def test_ptx_of_two_processes_is_that_of_one(ptx_of_two, tmp_path, monkeypatch):
    """Gradients, metrics and weights of three steps, with an uneven number of rows per update."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "TASK_ROWS", processes.TASK_ROWS)
    processes.ptx(tmp_path, ptx_of_two)
    expected = torch.load(tmp_path / "ppo.pt")
    found = torch.load(ptx_of_two / "ppo.pt")
    assert min(expected["margins"]) > 1e-5  # rounding decides no token
    assert found["sampled"] == expected["sampled"]
    assert len(expected["gradients"]) == 24  # of policy and value model
    for gradient, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert (gradient - other).norm() < 1e-5 * other.norm()
    rows = metrics(ptx_of_two / "ppo")
    others = metrics(tmp_path / "ppo")
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        assert row["step"] == 0 or row["loss/ptx"] > 1
        for key in row.keys() - set(CLOCK):
            # rounding could move a token or two across the clip range
            tolerance = 0.05 if "clip_fraction" in key else 1e-4
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=tolerance), key
    assert_close(ptx_of_two / "ppo", tmp_path / "ppo")
