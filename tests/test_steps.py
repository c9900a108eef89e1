"""Every training step of every script, against slow float64 formulas.

`main` of a script runs with given completions, scores, reference, value model and flags. The tests
compare the gradient of every update, the update itself and the logged metrics. They call no tensor
math of the scripts. The models are GPT-2s with two layers, float32 in the scripts and float64 in
the formulas. Each step is compared at the weights that the run had at that step."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import COPY

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

if COPY.path is not None:  # --script takes the place of the script it is a copy of
    ORIGINAL = globals()[COPY.like]
    globals()[COPY.like] = importlib.import_module(COPY.path.stem)

EOS = 1
END_OF_PROMPT = 3  # ">"
TIED = 28  # completions that begin with y have equal scores
UNSCORED = 29  # a completion that begins with z has no score
WIDTH = 16
G = 3
EXACT = 1e-4  # relative error of norms: the scripts compute in float32
UNSURE = 1e-4  # closer to a threshold, rounding may decide


def ids_of(text):
    """Token ids of a text in the tiny tokenizer, with $ for EOS."""
    special = {"$": EOS, ">": END_OF_PROMPT}
    return [special.get(letter) or ord(letter) - ord("a") + 4 for letter in text]


# ---------------------------------------------------------------- models
CHAT = (
    "{% for m in messages %}{{ m.content }}{{ '[EOS]' if m.role == 'assistant' else '>' }}"
    "{% endfor %}"
)


def tiny_gpt2(cls, seed):
    """A model with large random weights. Its config has dropout, which no step may use."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=30,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        initializer_range=0.25,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=EOS,
        num_labels=1,
    )
    model = cls(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with four models.

    policy; chat, the same with a chat template; reference, the policy with noise; scorer, another
    model with a scalar head."""
    folder = tmp_path_factory.mktemp("steps")
    tokenizer = sft.tiny_tokenizer()
    policy = tiny_gpt2(transformers.GPT2LMHeadModel, seed=1)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * torch.randn_like(weight)
    scorer = tiny_gpt2(transformers.GPT2ForSequenceClassification, seed=2)
    for name, model in [("policy", policy), ("reference", reference), ("scorer", scorer)]:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.chat_template = CHAT
    policy.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    return folder


# ---------------------------------------------------------------- given completions and scores
PROMPTS = ["ab", "c", "defgh", "ijk", "lm", "nopqrs", "tu"]
HELD_OUT = ["xw", "bca", "qponm"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fake_sample(calls):
    """A `sample` that ignores the model and records its calls.

    Gradients are enabled in rollouts for training and disabled in evaluations. In a rollout for
    training, one completion of the second prompt has no score, and all completions of the
    third prompt have equal scores."""

    def sample(policy, examples, *, num_generations=1, max_new_tokens, temperature=1.0, rng):
        is_rollout = torch.is_grad_enabled()
        draw = random.Random(f"{len(calls)} {num_generations}")
        completions = []
        while len(completions) < len(examples) * num_generations:
            length = draw.randint(1, max_new_tokens + 2)
            ids = [draw.randrange(4, 28) for _ in range(max_new_tokens)]
            if length <= max_new_tokens:
                ids = ids[: length - 1] + [EOS]
            if ids not in completions:  # a sequence is identified by its ids
                completions.append(ids)
        if is_rollout:
            completions[G + 1] = [UNSCORED, 5, EOS]
            completions[2 * G : 3 * G] = [[TIED, 16 + i, EOS] for i in range(G)]
        rollouts = [
            examples[i // num_generations] | {"completion_ids": ids, "finished": ids[-1] == EOS}
            for i, ids in enumerate(completions)
        ]
        call = SimpleNamespace(
            is_rollout=is_rollout,
            policy=policy,
            prompts=[tuple(example["prompt_ids"]) for example in examples],
            pairs=[(rollout["prompt_ids"], rollout["completion_ids"]) for rollout in rollouts],
            num_generations=num_generations,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        calls.append(call)
        return rollouts

    return sample


def score_of(prompt, completion):
    """A score that depends on both, or None."""
    if completion[0] in (TIED, UNSCORED):
        return 0.5 if completion[0] == TIED else None
    return (3 * sum(prompt) + 7 * sum(completion)) % 11 / 4 - 1


def gold_of(prompt, completion):
    return float((sum(prompt) + sum(completion)) % 3 == 0)


def scores_of(rollouts, function):
    values = [function(x["prompt_ids"], x["completion_ids"]) for x in rollouts]
    return torch.tensor([math.nan if value is None else value for value in values])


def fake_reward(args, examples, tokenizer, device):
    """Replaces load_reward."""

    def reward(rollouts):
        scores = scores_of(rollouts, score_of)
        for rollout, score in zip(rollouts, scores):
            rollout["member_scores"] = score[None]
        return scores

    return reward


def fake_gold(args, dataset, tokenizer):
    """Replaces load_gold."""
    return {"gold": lambda rollouts: scores_of(rollouts, gold_of)}


# ---------------------------------------------------------------- running a script
def make_args(script, settings):
    """Args of a script.

    A copy of a script may lack flags. Settings of these flags are ignored. The formulas see the
    default of the original, and 0 for kl_coef."""
    if COPY.path is None:
        return script.Args(**settings)
    fields = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: value for name, value in settings.items() if name in fields})
    for name, value in (vars(ORIGINAL.Args()) | {"kl_coef": 0.0}).items():
        if name not in fields:
            setattr(args, name, value)
    return args


def flat(tensors):
    """One float64 vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def gradient_of(model):
    """The whole gradient, 0 for a weight without one."""
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def float64_copy(model):
    exact = copy.deepcopy(model).double()
    exact.zero_grad(set_to_none=True)
    return exact.requires_grad_()


def watch(script, patch, models):
    """Patch a script, and return a record that its run fills in.

    `updates` has one entry per optimizer step and model: an exact copy of the model, the sequences
    of the forward passes with gradient, the gradient and its norm, the clipped gradient. `samples`
    has the calls of `sample`, `minibatches` the rows of all minibatches. Every model that is not
    trained is the reference."""
    record = SimpleNamespace(updates=[], samples=[], minibatches=[])
    sequences = []
    names = ("token_logprobs_and_entropy", "token_logprobs", "token_scores")
    forward_name = next(name for name in names if hasattr(script, name))
    inner_forward = getattr(script, forward_name)
    inner_clip = script.clip_gradients
    inner_load = common.load_policy
    inner_rows = getattr(script, "minibatch_rows", None)

    def forward(model, batch, *options):
        if torch.is_grad_enabled():
            for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                ids = batch["inputs"][i, :length].tolist()
                if "targets" in batch:
                    ids.append(batch["targets"][i, length - 1].item())
                sequences.append(tuple(ids))
        return inner_forward(model, batch, *options)

    def clip(model, max_norm):
        update = SimpleNamespace(
            model=model,
            exact=float64_copy(model),
            sequences=list(sequences),
            gradient=gradient_of(model),
        )
        sequences.clear()
        update.norm = inner_clip(model, max_norm)
        update.clipped = gradient_of(model)
        record.updates.append(update)
        return update.norm

    def load(path, tokenizer, args, device, trainable=False):
        path = path if trainable else str(models / "reference")
        return inner_load(path, tokenizer, args, device, trainable=trainable)

    def minibatch_rows(*args):
        minibatches = inner_rows(*args)
        record.minibatches.extend(rows.tolist() for rows in minibatches)
        return minibatches

    patches = {
        forward_name: forward,
        "minibatch_rows": minibatch_rows,
        "clip_gradients": clip,
        "load_policy": load,
        "sample": fake_sample(record.samples),
        "load_reward": fake_reward,
        "load_gold": fake_gold,
    }
    for name, replacement in patches.items():
        if hasattr(script, name):
            patch.setattr(script, name, replacement)
    return record


def read_log(args, name):
    with open(f"{args.output_dir}/{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def run(script, args, patch, models):
    """Run a script and return its record.

    Adds what the run logged: `before` (the first evaluation), `rows` (one per step) and
    `samples_before` (the samples of the first evaluation)."""
    record = watch(script, patch, models)
    script.main(dataclasses.replace(args))
    lines = read_log(args, "metrics")
    record.before = lines[0]
    record.rows = lines[1:]
    samples = read_log(args, "samples")
    evaluated = [line["step"] for line in lines if "eval/kl" in line or "eval/loss" in line]
    assert list(dict.fromkeys(line["step"] for line in samples)) == evaluated
    assert evaluated[0] == 0 and evaluated[-1] == lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    record.samples_before = [line for line in samples if line["step"] == 0]
    return record


# ---------------------------------------------------------------- checks for all scripts
def difference(actual, expected):
    """|actual - expected| / |expected|, also where both are 0."""
    return ((actual - expected).norm() / (expected.norm() + 1e-9)).item()


def check_gradient(update, loss):
    """Compare the gradient before clipping with the gradient of a loss at update.exact."""
    weights = list(update.exact.parameters())
    loss = loss + sum(0.0 * weight.sum() for weight in weights)  # in case all tokens are clipped
    error = difference(update.gradient, flat(torch.autograd.grad(loss, weights)))
    assert error < EXACT, f"the gradient is off by {error:.1e} of its norm"


def check_updates(updates, args, rates, eps):
    """Compare all updates of a model with AdamW (Loshchilov and Hutter 2019, algorithm 2).

    Gradients are scaled to --max-grad-norm if they are longer. Weight decay applies to all
    weights."""
    assert len(updates) == len(rates)
    model = updates[0].model
    weights = [flat(update.exact.parameters()) for update in updates] + [flat(model.parameters())]
    first = torch.zeros_like(weights[0])
    second = torch.zeros_like(weights[0])
    for i, (update, rate) in enumerate(zip(updates, rates)):
        assert update.model is model
        norm = update.gradient.norm().item()
        assert float(update.norm) == pytest.approx(norm, rel=1e-4)
        scale = min(1.0, args.max_grad_norm / (norm + 1e-9)) if args.max_grad_norm else 1.0
        assert difference(update.clipped, scale * update.gradient) < EXACT
        first = 0.9 * first + 0.1 * update.clipped
        second = 0.999 * second + 0.001 * update.clipped**2
        deviation = (second / (1 - 0.999 ** (i + 1))).sqrt()
        step = first / (1 - 0.9 ** (i + 1)) / (deviation + eps) + args.weight_decay * weights[i]
        error = difference(weights[i + 1] - weights[i], -rate * step)
        assert error < 1e-3, f"update {i + 1} differs from AdamW"


def check_rates(rates, args):
    """Linear warmup, then linear decay that would reach 0 one step after the last."""
    for i, rate in enumerate(rates):
        warmup = min(1.0, (i + 1) / (args.warmup_steps + 1))
        progress = max(0, i - args.warmup_steps) / (len(rates) - args.warmup_steps)
        assert rate == pytest.approx(args.learning_rate * warmup * (1 - progress))


def check_order(taken, data):
    """Check that the first two epochs have each row once, in different orders."""
    n = len(data)
    assert len(taken) >= 2 * n, "the run is shorter than two epochs"
    assert sorted(taken[:n]) == sorted(data)
    assert sorted(taken[n : 2 * n]) == sorted(data)
    assert taken[:n] != taken[n : 2 * n], "the second epoch has the order of the first"


def number(value):
    return value.item() if torch.is_tensor(value) else value


def check_logged(row, expected):
    assert expected.keys() <= row.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(number(value), rel=1e-4, abs=2e-5), name


def check_fraction(fraction, flags):
    """Compare a logged fraction with flags: True, False, or None where rounding may decide."""
    sure = sum(flag is True for flag in flags)
    unsure = sum(flag is None for flag in flags)
    assert sure - 0.01 <= fraction * len(flags) <= sure + unsure + 0.01


def is_ahead(chosen, rejected):
    """1.0 if chosen > rejected, otherwise 0.0. The data has no pair that is closer than UNSURE."""
    assert abs(chosen - rejected) > UNSURE, "rounding may decide: change the data"
    return float(chosen > rejected)


def log_softmax(model, prompt, completion, temperature=1.0):
    """Distributions of all completion tokens, for a single unpadded row. Shape (n, V)."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def token_logprobs(model, prompt, completion, temperature=1.0):
    """Shape (n,)."""
    distributions = log_softmax(model, prompt, completion, temperature)
    return distributions[range(len(completion)), completion]


def hidden_states(model, ids):
    return model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]


def load_reference(models):
    return float64_copy(transformers.AutoModelForCausalLM.from_pretrained(models / "reference"))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def variance(values):
    return mean((x - mean(values)) ** 2 for x in values)


def evaluations_of(record):
    """Row, calls of `sample` and exact model of the evaluations before and after training."""
    model = record.updates[0].model
    calls = [call for call in record.samples if not call.is_rollout]
    return [
        (record.before, calls[:2], record.updates[0].exact),
        (record.rows[-1], calls[-2:], float64_copy(model)),
    ]


def check_completions(
    row, calls, policy, reference=None, *, scorers, num_generations=1, temperature=1.0
):
    """Check the metrics of greedy and sampled completions of held-out prompts.

    The KL is a mean over sampled completions, at the sampling temperature."""
    greedy, sampled = calls
    assert (greedy.num_generations, greedy.temperature) == (1, 0.0)
    assert (sampled.num_generations, sampled.temperature) == (num_generations, temperature)
    expected = {
        "eval/eos_rate": mean(completion[-1] == EOS for _, completion in sampled.pairs),
        "eval/completion_length": mean(len(completion) for _, completion in sampled.pairs),
    }
    for suffix, call in [("_greedy", greedy), ("", sampled)]:
        for name, function in scorers.items():
            expected[f"eval/{name}{suffix}"] = mean(function(*pair) for pair in call.pairs)
    if num_generations > 1:
        golds = [gold_of(*pair) for pair in sampled.pairs]
        for k in sorted({1, 2, G}):  # G is at most 4
            subsets = [x for golds in groups_of(golds) for x in itertools.combinations(golds, k)]
            expected[f"eval/pass@{k}"] = mean(map(max, subsets))
    if reference is not None:
        kls = []
        with torch.no_grad():
            for pair in sampled.pairs:
                logprobs = token_logprobs(policy, *pair, temperature)
                ref_logprobs = token_logprobs(reference, *pair, temperature)
                kls.append((logprobs - ref_logprobs).sum())
        expected["eval/kl"] = mean(kls)
    check_logged(row, expected)


# ---------------------------------------------------------------- rollouts
def online_args(script, models, folder, **flags):
    held_out = [dict(prompt=f"{prompt}>") for prompt in HELD_OUT]
    settings = dict(
        model=str(models / "policy"),
        dataset=write_rows(folder / "prompts.jsonl", [dict(prompt=f"{p}>") for p in PROMPTS]),
        eval_dataset=write_rows(folder / "held_out.jsonl", held_out),
        output_dir=str(folder / "run"),
        reward="none",
        num_generations=G,
        max_completion_length=6,
        micro_batch_tokens=24,
        learning_rate=2e-3,
        warmup_steps=1,
        temperature=0.7,
    )
    if script is not rejection_sampling:
        settings |= dict(
            prompts_per_step=5,
            steps=3,
            update_epochs=2,
            num_minibatches=3,
            epsilon=0.07,
            epsilon_high=0.31,
            kl_coef=0.3,
            missing_eos_penalty=0.4,
            max_grad_norm=0.5,
            weight_decay=0.1,
        )
    return make_args(script, settings | flags)


def groups_of(values):
    return [values[i : i + G] for i in range(0, len(values), G)]


def check_sampling(record, reference, args):
    """Check prompts and settings of all calls of `sample`, and both evaluations.

    Returns the calls of rollouts for training."""
    rollouts = [call for call in record.samples if call.is_rollout]
    for call in rollouts:
        assert (call.num_generations, call.temperature) == (G, args.temperature)
    for call in record.samples:
        assert call.policy is record.updates[0].model
        assert call.max_new_tokens == args.max_completion_length
    data = [tuple(ids_of(f"{prompt}>")) for prompt in PROMPTS]
    check_order([prompt for call in rollouts for prompt in call.prompts], data)
    scorers = dict(score=score_of, gold=gold_of)
    for row, calls, policy in evaluations_of(record):
        check_completions(
            row,
            calls,
            policy,
            reference,
            scorers=scorers,
            num_generations=G,
            temperature=args.temperature,
        )
    return rollouts


def scored_rollouts(call, args, policy, reference):
    """Rollouts of the groups of a call in which every completion has a score."""
    rollouts = []
    for group in groups_of(call.pairs):
        scores = [score_of(*pair) for pair in group]
        if None in scores:
            continue
        for (prompt, completion), score in zip(group, scores):
            finished = completion[-1] == EOS
            reward = score if finished else score - args.missing_eos_penalty
            if getattr(args, "overlong_buffer", 0):  # Yu et al. 2025, equation 13
                start = args.max_completion_length - args.overlong_buffer
                reward += min(0.0, (start - len(completion)) / args.overlong_buffer)
            with torch.no_grad():
                old = token_logprobs(policy, prompt, completion, args.temperature)
                ref = token_logprobs(reference, prompt, completion, args.temperature)
            rollout = SimpleNamespace(
                prompt=prompt,
                completion=completion,
                ids=(*prompt, *completion),
                score=score,
                gold=gold_of(prompt, completion),
                finished=finished,
                reward=reward,
                old=old.tolist(),
                ref=ref.tolist(),
            )
            rollouts.append(rollout)
    assert 0 < len(rollouts) < len(call.pairs)
    return rollouts


def check_minibatches(steps, args):
    """Check that each epoch has each rollout once, in minibatches of nearly equal size.

    No two epochs of the run may have the same minibatches."""
    cuts = []
    for step in steps:
        ids = [rollout.ids for rollout in step.rollouts]
        for i in range(0, len(step.updates), args.num_minibatches):
            epoch = [
                [rollout.ids for rollout in update.minibatch]
                for update in step.updates[i : i + args.num_minibatches]
            ]
            assert sorted(itertools.chain(*epoch)) == sorted(ids)
            sizes = [len(minibatch) for minibatch in epoch]
            assert max(sizes) - min(sizes) <= 1
            cuts.append([sorted(map(ids.index, minibatch)) for minibatch in epoch])
    if args.num_minibatches > 1:
        assert all(cut not in cuts[:i] for i, cut in enumerate(cuts))


def check_shared_metrics(row, rollouts, args):
    """Check the metrics that ppo, rloo and grpo define in the same way."""
    expected = {
        "score": mean(rollout.score for rollout in rollouts),
        "gold": mean(rollout.gold for rollout in rollouts),
        "reward": mean(rollout.total_reward for rollout in rollouts),
        "completion_length": mean(len(rollout.completion) for rollout in rollouts),
        "eos_rate": mean(rollout.finished for rollout in rollouts),
        "unscored": 1 - len(rollouts) / (args.prompts_per_step * G),
    }
    if args.kl_coef:
        expected["kl"] = mean(kl_of(rollout) for rollout in rollouts)
    else:
        assert "kl" not in row
    check_logged(row, expected)
    assert row["ratio_max_dev"] < 1e-4
    # a step is sampling and training
    seconds = row["seconds/sample"] + row["seconds/train"]
    num_tokens = sum(len(rollout.ids) - 1 for rollout in rollouts)
    assert row["tokens_per_second"] * seconds == pytest.approx(num_tokens, rel=1e-3)


def kl_of(rollout):
    """The k1 estimate for a completion."""
    return sum(rollout.old) - sum(rollout.ref)


def clip_edges(args):
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return 1 - args.epsilon, 1 + high


def is_clipped(ratio, advantage, args):
    """True where the clip removes the gradient, None where rounding may decide."""
    low, high = clip_edges(args)
    if advantage == 0:
        return False
    if abs(ratio - (high if advantage > 0 else low)) < UNSURE:
        return None
    return bool(ratio > high if advantage > 0 else ratio < low)


def surrogate(logprob, ratio, advantage, args):
    """Objective of a token (Schulman et al. 2017, equation 7)."""
    low, high = clip_edges(args)
    return min(ratio * advantage, min(max(ratio, low), high) * advantage)


def online_steps(script, models, folder, patch, **flags):
    """Run ppo, grpo or rloo and check everything but rewards, losses and gradients.

    Returns args and steps. A step has the logged row, the rollouts, and the updates of policy and
    value model. An update of the policy has its minibatch of rollouts, their log-probs with
    gradient by ids, and `others`, the sequences that are not rollouts."""
    args = online_args(script, models, folder, **flags)
    record = run(script, args, patch, models)
    reference = load_reference(models)
    calls = check_sampling(record, reference, args)
    policy_updates = [update for update in record.updates if not hasattr(update.model, "score")]
    value_updates = [update for update in record.updates if hasattr(update.model, "score")]
    assert bool(value_updates) == (script is ppo)
    rates = [row["learning_rate"] for row in record.rows]
    check_rates(rates, args)
    num_updates = args.update_epochs * args.num_minibatches
    for updates in filter(None, [policy_updates, value_updates]):
        check_updates(updates, args, [r for r in rates for _ in range(num_updates)], eps=1e-5)
    steps = []
    for i, (call, row) in enumerate(zip(calls, record.rows, strict=True)):
        updates = policy_updates[i * num_updates : (i + 1) * num_updates]
        rollouts = scored_rollouts(call, args, updates[0].exact, reference)
        ids_of_rollouts = {rollout.ids for rollout in rollouts}
        entropies = []
        for update in updates:
            update.others = [ids for ids in update.sequences if ids not in ids_of_rollouts]
            update.sequences = [ids for ids in update.sequences if ids in ids_of_rollouts]
            update.minibatch = [rollouts[row] for row in record.minibatches.pop(0)]
            computed = Counter(update.sequences)  # rollouts of advantage 0 may be missing
            assert computed <= Counter(rollout.ids for rollout in update.minibatch)
            update.logprobs = {}
            for rollout in update.minibatch:
                prompt, completion = rollout.prompt, rollout.completion
                rows = log_softmax(update.exact, prompt, completion, args.temperature)
                update.logprobs[rollout.ids] = rows[range(len(completion)), completion]
                if computed[rollout.ids] > 0:
                    computed[rollout.ids] -= 1
                    entropies += (-(rows.exp() * rows).sum(1)).tolist()
        expected = {
            "entropy": mean(entropies),
            "grad_norm": mean(update.norm for update in updates),
        }
        if script is grpo or script is rloo and args.baseline != "none":
            is_equal = [len({rollout.reward for rollout in g}) == 1 for g in groups_of(rollouts)]
            expected["zero_std_groups"] = mean(is_equal)
        check_logged(row, expected)
        step = SimpleNamespace(
            row=row,
            rollouts=rollouts,
            updates=updates,
            value_updates=value_updates[i * num_updates : (i + 1) * num_updates],
        )
        steps.append(step)
    check_minibatches(steps, args)
    return args, steps


# ---------------------------------------------------------------- ppo
def whitened(rows, shift_mean):
    """Scale numbers in ragged rows to population variance 1."""
    numbers = [x for row in rows for x in row]
    deviation = math.sqrt(variance(numbers) + 1e-8)
    offset = 0.0 if shift_mean else mean(numbers)
    return [[(x - mean(numbers)) / deviation + offset for x in row] for row in rows]


def set_ppo_targets(rollouts, args):
    """Set total_reward, returns and advantages of each rollout."""
    rewards = []
    for rollout in rollouts:
        token_rewards = [-args.kl_coef * (old - ref) for old, ref in zip(rollout.old, rollout.ref)]
        token_rewards[-1] += rollout.reward
        rollout.total_reward = sum(token_rewards)
        rewards.append(token_rewards)
    if args.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    advantages = []
    decay = args.gamma * args.gae_lambda
    for rollout, token_rewards in zip(rollouts, rewards):
        n = len(token_rewards)
        values = [*rollout.values, 0.0]
        # Schulman et al. 2016, equations 11 and 16
        deltas = [token_rewards[t] + args.gamma * values[t + 1] - values[t] for t in range(n)]
        sums = [sum(decay ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        rollout.returns = [advantage + value for advantage, value in zip(sums, rollout.values)]
        advantages.append(sums)
    for rollout, numbers in zip(rollouts, whitened(advantages, shift_mean=True)):
        rollout.advantages = numbers


def token_values(model, rollout):
    """Values V before each completion token. Shape (n,)."""
    hidden = hidden_states(model, rollout.ids[:-1])[len(rollout.prompt) - 1 :]
    return hidden @ model.score.weight[0]


def clipped_value_loss(value, old, target, clip):
    """Loss of a token, and a flag like that of is_clipped."""
    limited = min(max(value, old - clip), old + clip)
    losses = 0.5 * (value - target) ** 2, 0.5 * (limited - target) ** 2
    flag = bool(losses[1] > losses[0])
    is_near = abs(abs(value - old) - clip) < UNSURE or abs(value + limited - 2 * target) < UNSURE
    return max(losses), None if is_near else flag


PTX = [
    ("qr", "stuvw"),
    ("y", "z"),
    ("tuv", ""),
    ("zyxw", "vut"),
    ("qq", "rsrsr"),
    ("o", "p"),
    ("m", "nop"),
]
PPO_FLAGS = {
    "all": dict(gamma=0.9, gae_lambda=0.8, value_clip=0.05, value_coef=0.3, num_minibatches=5),
    "whitened": dict(
        whiten_rewards=True,
        gae_lambda=0.6,
        epsilon_high=None,
        num_minibatches=2,
        value_clip=0.1,
        max_grad_norm=0.0,
        weight_decay=0.0,
        missing_eos_penalty=-0.6,
    ),
    "no-kl": dict(kl_coef=0.0, num_minibatches=1, temperature=1.0, update_epochs=4, value_clip=5.0),
    "ptx": dict(ptx_coef=0.6),
}


def ptx_loss(update, args):
    """Mean NLL per token, at temperature 1, of the rows of --ptx-dataset in an update."""
    if not args.ptx_coef:
        return torch.zeros(())
    rows = {tuple(ids_of(f"{p}>{c}$")): (ids_of(f"{p}>"), ids_of(f"{c}$")) for p, c in PTX}
    assert len(update.others) == args.prompts_per_step * G // args.num_minibatches
    return -torch.cat([token_logprobs(update.exact, *rows[ids]) for ids in update.others]).mean()


@pytest.mark.parametrize("flags", PPO_FLAGS.values(), ids=PPO_FLAGS)
def test_ppo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """Both gradients of every step, and every metric."""
    flags = dict(value_model=str(models / "scorer")) | flags
    if "ptx_coef" in flags:
        rows = [dict(prompt=f"{prompt}>", completion=completion) for prompt, completion in PTX]
        flags |= dict(ptx_dataset=write_rows(tmp_path / "ptx.jsonl", rows))
    args, steps = online_steps(ppo, models, tmp_path, monkeypatch, **flags)
    for step in steps:
        for rollout in step.rollouts:
            with torch.no_grad():
                rollout.values = token_values(step.value_updates[0].exact, rollout).tolist()
        set_ppo_targets(step.rollouts, args)
        check_shared_metrics(step.row, step.rollouts, args)
        policy_losses = []
        value_losses = []
        ptx_losses = []
        clipped = []
        value_clipped = []
        for update, value_update in zip(step.updates, step.value_updates):
            gains = []
            errors = []
            for rollout in update.minibatch:
                values = token_values(value_update.exact, rollout)
                for t, logprob in enumerate(update.logprobs[rollout.ids]):
                    advantage = rollout.advantages[t]
                    ratio = (logprob - rollout.old[t]).exp()
                    gains.append(surrogate(logprob, ratio, advantage, args))
                    clipped.append(is_clipped(ratio, advantage, args))
                    error, flag = clipped_value_loss(
                        values[t],
                        rollout.values[t],
                        rollout.returns[t],
                        args.value_clip,
                    )
                    errors.append(error)
                    value_clipped.append(flag)
            policy_losses.append(-mean(gains))
            value_losses.append(mean(errors))
            ptx_losses.append(ptx_loss(update, args))
            check_gradient(update, policy_losses[-1] + args.ptx_coef * ptx_losses[-1])
            check_gradient(value_update, args.value_coef * value_losses[-1])
        old_values = [x for rollout in step.rollouts for x in rollout.values]
        returns = [x for rollout in step.rollouts for x in rollout.returns]
        errors = [target - value for target, value in zip(returns, old_values)]
        expected = {
            "loss/policy": mean(policy_losses),
            "loss/value": mean(value_losses),
            "loss": mean(policy_losses)
            + args.value_coef * mean(value_losses)
            + args.ptx_coef * mean(ptx_losses),
            "explained_variance": 1 - variance(errors) / variance(returns),
            "value_grad_norm": mean(update.norm for update in step.value_updates),
        }
        if args.ptx_coef:
            expected["loss/ptx"] = mean(ptx_losses)
        check_logged(step.row, expected)
        check_fraction(step.row["clip_fraction"], clipped)
        check_fraction(step.row["value_clip_fraction"], value_clipped)
    if args.ptx_coef:
        taken = [ids for step in steps for update in step.updates for ids in update.others]
        counts = [taken.count(tuple(ids_of(f"{p}>{c}$"))) for p, c in PTX]
        assert sum(counts) == len(taken)
        assert max(counts) - min(counts) <= 1, "an update does not take the next rows"


# ---------------------------------------------------------------- grpo and rloo
def check_losses(step, update_loss):
    """Check gradients, loss and clip_fraction of a step. update_loss(update) -> loss, flags."""
    losses = []
    clipped = []
    for update in step.updates:
        loss, flags = update_loss(update)
        check_gradient(update, loss)
        losses.append(loss)
        clipped += flags
    check_logged(step.row, {"loss": mean(losses)})
    check_fraction(step.row["clip_fraction"], clipped)


def deviation(numbers):
    """Standard deviation with Bessel's correction."""
    return math.sqrt(variance(numbers) * len(numbers) / (len(numbers) - 1))


GRPO_FLAGS = {
    "kl3-loss": dict(),
    "kl2-loss": dict(
        kl_estimator="k2",
        scale_rewards="batch",
        epsilon=0.08,
        num_minibatches=1,
        loss_aggregation="token",
        epsilon_high=None,
        max_grad_norm=0.0,
    ),
    "kl1-reward": dict(
        kl_estimator="k1",
        scale_rewards="none",
        loss_aggregation="constant",
        mask_truncated=True,
    ),
    "k3-weighted": dict(kl_estimator="k3-weighted"),
    "sequence-ratio": dict(
        ratio="sequence",
        loss_aggregation="sequence",
        epsilon=0.02,
        epsilon_high=0.03,
    ),
    "overlong": dict(overlong_buffer=4, scale_rewards="none"),
    "no-kl": dict(kl_coef=0.0, mask_truncated=True, update_epochs=1, num_minibatches=1),
}


def grpo_kl_loss(log_ratio, ratio, args):
    """KL loss of a token; log_ratio is to the reference, ratio to the old policy."""
    losses = {"k1": 0.0, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}
    losses["k3-weighted"] = ratio * losses["k3"]
    return args.kl_coef * losses[args.kl_estimator]


def set_grpo_advantages(rollouts, args):
    for rollout in rollouts:
        rollout.total_reward = rollout.reward
        if args.kl_estimator == "k1":
            rollout.total_reward -= args.kl_coef * kl_of(rollout)
    batch_deviation = deviation([rollout.total_reward for rollout in rollouts])
    for group in groups_of(rollouts):
        rewards = [rollout.total_reward for rollout in group]
        scales = {
            "group": deviation(rewards) + 1e-6,
            "batch": batch_deviation + 1e-6,
            "none": 1.0,
        }
        for rollout in group:
            centered = rollout.total_reward - mean(rewards)
            rollout.advantage = centered / scales[args.scale_rewards]


def grpo_loss(update, args):
    """Loss of a minibatch, and flags of is_clipped for all trained tokens."""
    token_losses = []  # one list per trained completion
    flags = []
    for rollout in update.minibatch:
        if args.mask_truncated and not rollout.finished:
            continue
        losses = []
        logprobs = update.logprobs[rollout.ids]
        sequence_ratio = mean(x - old for x, old in zip(logprobs, rollout.old)).exp()
        for t, logprob in enumerate(logprobs):
            token_ratio = (logprob - rollout.old[t]).exp()
            ratio = sequence_ratio if args.ratio == "sequence" else token_ratio
            kl_loss = grpo_kl_loss(logprob - rollout.ref[t], token_ratio, args)
            losses.append(kl_loss - surrogate(logprob, ratio, rollout.advantage, args))
            flags.append(is_clipped(ratio, rollout.advantage, args))
        token_losses.append(losses)
    if args.loss_aggregation == "token":
        loss = mean(itertools.chain(*token_losses))
    elif args.loss_aggregation == "constant":
        total = sum(itertools.chain(*token_losses))
        loss = total / (len(update.minibatch) * args.max_completion_length)
    else:
        loss = mean(map(mean, token_losses))
    return loss, flags


@pytest.mark.parametrize("flags", GRPO_FLAGS.values(), ids=GRPO_FLAGS)
def test_grpo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric."""
    args, steps = online_steps(grpo, models, tmp_path, monkeypatch, **flags)
    for step in steps:
        set_grpo_advantages(step.rollouts, args)
        check_shared_metrics(step.row, step.rollouts, args)
        check_losses(step, lambda update: grpo_loss(update, args))


RLOO_FLAGS = {
    "leave-one-out": dict(epsilon=0.2),
    "none": dict(baseline="none", kl_coef=0.0, num_minibatches=1, epsilon_high=None),
}


def rloo_loss(update, args):
    """Loss of a minibatch, and flags of is_clipped for all tokens.

    A completion is one action. Its ratio is a constant factor, and the clip removes the gradient of
    the whole completion."""
    losses = []
    flags = []
    for rollout in update.minibatch:
        logprob = update.logprobs[rollout.ids].sum()
        ratio = (logprob - sum(rollout.old)).exp().item()
        flag = is_clipped(ratio, rollout.advantage, args)
        losses.append(-rollout.advantage * ratio * logprob * (flag is not True))
        flags += [flag] * len(rollout.completion)
    return mean(losses), flags


@pytest.mark.parametrize("flags", RLOO_FLAGS.values(), ids=RLOO_FLAGS)
def test_rloo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric."""
    args, steps = online_steps(rloo, models, tmp_path, monkeypatch, **flags)
    for step in steps:
        for group in groups_of(step.rollouts):
            for rollout in group:
                rollout.total_reward = rollout.reward - args.kl_coef * kl_of(rollout)
            for rollout in group:
                others = [other.total_reward for other in group if other is not rollout]
                rollout.advantage = rollout.total_reward
                if args.baseline == "leave-one-out":
                    rollout.advantage -= mean(others)
        check_shared_metrics(step.row, step.rollouts, args)
        check_losses(step, lambda update: rloo_loss(update, args))


@pytest.mark.parametrize("script", [ppo, grpo, rloo])
def test_ratio_max_dev_covers_only_the_first_update(models, tmp_path, monkeypatch, script):
    """Log-probs that are 0.03 higher with gradient than without give exp(0.03) - 1."""
    inner = script.token_logprobs_and_entropy

    def forward(model, batch, temperature):
        logprobs, entropy = inner(model, batch, temperature)
        shift = 0.03 if torch.is_grad_enabled() else 0.0
        return logprobs + shift * batch["mask"], entropy

    monkeypatch.setattr(script, "token_logprobs_and_entropy", forward)
    record = run(script, online_args(script, models, tmp_path), monkeypatch, models)
    for row in record.rows:
        assert row["ratio_max_dev"] == pytest.approx(math.exp(0.03) - 1, rel=1e-2)


# ---------------------------------------------------------------- fixed data
def offline_args(script, model, folder, rows, held_out, **flags):
    settings = dict(
        model=str(model),
        dataset=write_rows(folder / "rows.jsonl", rows),
        eval_dataset=write_rows(folder / "held_out.jsonl", held_out),
        output_dir=str(folder / "run"),
        epochs=2,
        batch_size=4,
        micro_batch_tokens=24 if script is sft else 60,  # at least two pairs
        learning_rate=2e-3,
        warmup_steps=1,
        max_grad_norm=0.5,
        weight_decay=0.1,
    )
    return make_args(script, settings | flags)


def check_offline(record, args, taken, data):
    """Check batches, learning rates and updates of sft, reward_model or dpo.

    `taken` has the rows of each batch. The run has two epochs, and the last batch is smaller if the
    rows do not divide evenly."""
    n = len(data)
    size = args.batch_size
    assert [len(batch) for batch in taken] == [min(size, 2 * n - i) for i in range(0, 2 * n, size)]
    batches = [sorted(batch) for batch in taken]  # micro-batches change the order within a batch
    assert sorted(sum(batches, [])) == sorted([*data, *data])
    first_epoch = sum(batches[: n // size], [])
    assert len(set(first_epoch)) == len(first_epoch), "a row is repeated within an epoch"
    assert batches[0] != sorted(data[:size]), "the order is that of the file"
    if n % size == 0:
        assert not any(batch in batches[: n // size] for batch in batches[n // size :])
    rates = [row["learning_rate"] for row in record.rows]
    check_rates(rates, args)
    check_updates(record.updates, args, rates, eps=1e-8)
    for row, update in zip(record.rows, record.updates, strict=True):
        check_logged(row, {"grad_norm": update.norm})


def check_offline_completions(row, calls, longest, policy, reference=None):
    """Check the completions of an evaluation, which may be as long as the longest held-out one."""
    assert [call.max_new_tokens for call in calls] == [longest, longest]
    check_completions(row, calls, policy, reference, scorers=dict(gold=gold_of))


# ---------------------------------------------------------------- sft
CONVERSATIONS = [
    [("ab", "ba")],
    [("c", "defghijk")],
    [("lmn", "o"), ("p", "qrstuv")],
    [("w", "xyzab"), ("cd", "e")],
    [("fghij", "")],
    [("k", "lm"), ("no", "pqr"), ("s", "t")],
    [("uv", "wx")],
    [("yzabcd", "efg"), ("h", "ijklm")],
    [("n", "opq")],
]
HELD_OUT_CONVERSATIONS = [
    [("ab", "c")],
    [("defg", "hijklmnopq"), ("r", "st")],
    [("u", "vwxyz")],
]


def masked_ids(turns, train_on):
    """Ids of a conversation, and a mask that is 1 where they are trained, EOS included."""
    ids = []
    mask = []
    for i, (prompt, completion) in enumerate(turns):
        prompt_ids = ids_of(f"{prompt}>")
        completion_ids = ids_of(f"{completion}$")
        is_trained = train_on == "all" or i == len(turns) - 1
        ids += prompt_ids + completion_ids
        mask += [0] * len(prompt_ids) + [int(is_trained)] * len(completion_ids)
    return tuple(ids), mask


def row_of(turns, form):
    if form == "text":
        ((prompt, completion),) = turns
        return dict(prompt=f"{prompt}>", completion=completion)
    messages = []
    for prompt, completion in turns:
        messages.append(dict(role="user", content=prompt))
        messages.append(dict(role="assistant", content=completion))
    return dict(messages=messages)


def trained_nll(model, sequences):
    """Mean NLL over the trained tokens of all sequences, pairs of ids and mask."""
    nlls = []
    for ids, mask in sequences:
        logprobs = token_logprobs(model, ids[:1], ids[1:])
        nlls.append(-logprobs[torch.tensor(mask[1:]).bool()])
    return torch.cat(nlls).mean()


@pytest.mark.parametrize("form, train_on", [("text", "last"), ("chat", "last"), ("chat", "all")])
def test_sft_step_is_the_formula(models, tmp_path, monkeypatch, form, train_on):
    """The gradient of every step, and every metric.

    The loss is a mean over the trained tokens of a batch. The evaluation takes the mean over all
    held-out rows."""
    conversations = CONVERSATIONS
    held_out_conversations = HELD_OUT_CONVERSATIONS
    flags = dict(train_on=train_on)
    if form == "text":
        conversations = [turns[-1:] for turns in conversations]
        held_out_conversations = [turns[-1:] for turns in held_out_conversations]
        flags |= dict(weight_decay=0.0, max_grad_norm=0.0, batch_size=3)
    rows = [row_of(turns, form) for turns in conversations]
    held_out = [row_of(turns, form) for turns in held_out_conversations]
    model = models / ("policy" if form == "text" else "chat")
    args = offline_args(sft, model, tmp_path, rows, held_out, **flags)
    record = run(sft, args, monkeypatch, models)
    masks = dict(masked_ids(turns, train_on) for turns in conversations)
    check_offline(record, args, [update.sequences for update in record.updates], list(masks))
    for row, update in zip(record.rows, record.updates):
        loss = trained_nll(update.exact, [(ids, masks[ids]) for ids in update.sequences])
        check_gradient(update, loss)
        check_logged(row, {"loss": loss})
    held_out = [masked_ids(turns, train_on) for turns in held_out_conversations]
    longest = max(len(turns[-1][1]) + 1 for turns in held_out_conversations)
    for row, calls, policy in evaluations_of(record):
        with torch.no_grad():
            check_logged(row, {"eval/loss": trained_nll(policy, held_out)})
        check_offline_completions(row, calls, longest, policy)


# ---------------------------------------------------------------- reward_model
PAIRS = [  # prompt, chosen, rejected, margin
    ("ab", "ba", "cdefgh", 0.0),
    ("c", "defghijk", "a", 0.5),
    ("lmn", "o", "pq", 1.5),
    ("w", "xyzab", "b", 0.0),
    ("fghij", "", "kl", 0.25),
    ("k", "lm", "mlkji", 0.0),
    ("uv", "wx", "", -0.75),
    ("yzabcd", "efg", "gfe", 0.0),
    ("n", "opq", "opqrstu", 2.0),
]
HELD_OUT_PAIRS = [("ab", "c", "dc", 0.0), ("defg", "hi", "jklmnopq", 1.0), ("u", "vwxy", "", 0.5)]
COMPARED = [  # prompt, completions with their scores; None: no score
    ("ab", {"ba": 3.0, "cdefgh": 1.0, "x": 2.0}),
    ("c", {"defghijk": 0.5, "a": -2.0}),
    ("lmn", {"o": 1.0, "pq": 0.0, "rs": None, "tuvw": 1.0, "q": 0.0}),
    ("w", {"xyzab": 0.0, "b": 7.0, "": 0.0}),
    ("fghij", {"": 1.0, "kl": 0.0}),
    ("k", {"lm": 4.0, "mlkji": 3.0, "n": 2.0, "op": 1.0}),
    ("uv", {"wx": -1.0, "": 5.0, "vu": None}),
    ("yzabcd", {"efg": 1.0, "gfe": 0.0, "feg": 0.0}),
    ("n", {"opq": 0.0, "opqrstu": 1.0}),
]
HELD_OUT_COMPARED = [
    ("ab", {"c": 1.0, "dc": 0.0, "cd": 1.0}),
    ("defg", {"hi": 2.0, "jklmnopq": 0.0, "yz": 1.0}),
    ("u", {"vwxy": 1.0, "": 0.0}),
]
HELD_OUT_TIE = ("xy", {"a": 1.0, "bc": 1.0})  # for --loss outcome
STEPS = [  # prompt, steps of a completion with their labels; j separates steps
    ("ab", {"ba": True, "cdefgh": False, "x": False}),
    ("c", {"defghi": True}),
    ("lmn", {"o": True, "pq": True, "rs": False, "tuvw": True}),
    ("w", {"xyzab": False, "b": True}),
    ("fghi", {"kl": False}),
    ("k", {"lm": True, "mlki": False}),
    ("uv", {"wx": True, "vu": True}),
    ("yzabcd", {"efg": True, "gfe": False, "feg": False}),
    ("n", {"opq": False, "opqrstu": True}),
]
HELD_OUT_STEPS = [("ab", {"cd": True, "c": False}), ("defg", {"hi": False}), ("u", {"vwxy": True})]
REWARD_MODEL_FLAGS = {
    "pairs": dict(weight_decay=0.0, max_grad_norm=0.0, batch_size=3),
    "centered-pairs": dict(center_coef=0.3),
    "bradley-terry": dict(center_coef=0.3),
    "plackett-luce": dict(center_coef=0.3, batch_size=3, weight_decay=0.0, max_grad_norm=0.0),
    "outcome": dict(),
    "outcome-all": dict(outcome_tokens="all", batch_size=3),
    "process": dict(step_separator="j", batch_size=3),
}


def pair_rows(pairs):
    return [dict(prompt=f"{p}>", chosen=c, rejected=r, margin=m) for p, c, r, m in pairs]


def comparison(row, args):
    """Completions of a row that have labels, as (ids, positions of the labels, labels)."""
    prompt = row["prompt"]
    if args.loss == "process":
        text = prompt + "j".join(row["completions"]) + "$"
        ends = [i for i, letter in enumerate(text) if i >= len(prompt) and letter in "j$"]
        return [(ids_of(text), ends, [float(label) for label in row["labels"]])]
    completions = row.get("completions") or [row["chosen"], row["rejected"]]
    completions_with_labels = []
    for completion, label in zip(completions, row.get("scores", [1.0, 0.0])):
        ids = ids_of(f"{prompt}{completion}$")
        first = len(prompt) if args.outcome_tokens == "all" else len(ids) - 1
        if label is not None:
            ends = list(range(first, len(ids)))
            completions_with_labels.append((ids, ends, [label] * len(ends)))
    return completions_with_labels


def read_scores(model, comparisons):
    """Scores at the labels, for each completion of each prompt."""
    head = model.score.weight[0]
    return [
        [[hidden_states(model, ids)[i] @ head for i in ends] for ids, ends, _ in completions]
        for completions in comparisons
    ]


def flat_scores(scores):
    """Plain numbers, in the order of the data."""
    return [score.item() for rows in scores for row in rows for score in row]


def ranked_pairs(scores, completions):
    """Last scores (better, worse) of all pairs of a prompt with different labels."""
    last = [(labels[-1], row[-1]) for row, (_, _, labels) in zip(scores, completions)]
    return [(a, b) for label, a in last for other, b in last if label > other]


def log_sigmoid(x):
    return -(1 + (-x).exp()).log()


def comparison_loss(args, scores, comparisons, margins, center_coef):
    """Loss by the formulas of the papers, prompt by prompt."""
    losses = []
    for prompt_scores, completions, margin in zip(scores, comparisons, margins):
        labeled = [(row, labels) for row, (_, _, labels) in zip(prompt_scores, completions)]
        if args.loss in ("outcome", "process"):
            for row, labels in labeled:
                losses += [-log_sigmoid(s if label else -s) for s, label in zip(row, labels)]
            continue
        pairs = ranked_pairs(prompt_scores, completions)
        loss = center_coef * mean((a + b) ** 2 for a, b in pairs)
        if args.loss == "bradley-terry":
            loss = loss - mean(log_sigmoid(a - b - margin) for a, b in pairs)
        else:
            for (*_, own), (*_, label) in labeled:
                below = [row[-1].exp() for row, labels in labeled if labels[-1] < label]
                loss = loss - (own.exp() / (own.exp() + sum(below))).log()
        losses.append(loss)
    return mean(losses)


def comparison_metrics(args, scores, comparisons, is_held_out):
    metrics = {}
    numbers = flat_scores(scores)
    labels = [label for completions in comparisons for _, _, row in completions for label in row]
    pairs = [ranked_pairs(*both) for both in zip(scores, comparisons)]
    pairs = [prompt_pairs for prompt_pairs in pairs if prompt_pairs]
    if args.loss in ("outcome", "process"):
        right = [is_ahead(s, 0.0) == label for s, label in zip(numbers, labels)]
        errors = [1 / (1 + math.exp(-s)) - label for s, label in zip(numbers, labels)]
        metrics["label_accuracy"] = mean(right)
        metrics["brier"] = mean(error**2 for error in errors)
    if pairs and (is_held_out or "label_accuracy" not in metrics):
        metrics["accuracy"] = mean(mean(is_ahead(*pair) for pair in each) for each in pairs)
        metrics["margin"] = mean(mean(a - b for a, b in each) for each in pairs)
    if is_held_out:
        metrics["score_mean"] = mean(numbers)
        metrics["score_std"] = math.sqrt(variance(numbers))
    if pairs and is_held_out:
        best = []
        is_tied = []
        for prompt_scores, completions in zip(scores, comparisons):
            last = [row_labels[-1] for _, _, row_labels in completions]
            is_tied += [float(a == b) for a, b in itertools.combinations(last, 2)]
            if len(set(last)) > 1:
                top = max(range(len(last)), key=lambda i, rows=prompt_scores: rows[i][-1])
                best.append(float(last[top] == max(last)))
        metrics["top1_accuracy"] = mean(best)
        metrics["tied_pairs"] = mean(is_tied)
        metrics["accuracy_stderr"] = binomial_error(metrics["accuracy"], len(pairs))
    return metrics


def binomial_error(share, n):
    return math.sqrt(share * (1 - share) / n)


def reward_model_rows(name):
    """Rows of data and held-out rows."""
    if name.endswith("pairs"):
        return pair_rows(PAIRS), pair_rows(HELD_OUT_PAIRS)
    data = [COMPARED, HELD_OUT_COMPARED]
    if name == "process":
        data = [STEPS, HELD_OUT_STEPS]
    elif name.startswith("outcome"):
        data = [COMPARED, [*HELD_OUT_COMPARED, HELD_OUT_TIE]]
    both = []
    for comparisons in data:
        rows = []
        for prompt, answers in comparisons:
            values = list(answers.values())
            if name.startswith("outcome"):
                values = [value and float(value > 0) for value in values]
            column = "labels" if name == "process" else "scores"
            rows.append({"prompt": f"{prompt}>", "completions": list(answers), column: values})
        both.append(rows)
    return both


@pytest.mark.parametrize("name, flags", REWARD_MODEL_FLAGS.items(), ids=REWARD_MODEL_FLAGS)
def test_reward_model_step_is_the_formula(models, tmp_path, monkeypatch, name, flags):
    """The initial head, the gradient of every step, and every metric.

    For pairs, rankings and labels of completions, and labels of steps. Completions without a score
    change nothing."""
    loss_type = "bradley-terry" if name.endswith("pairs") else name.removesuffix("-all")
    rows, held_out_rows = reward_model_rows(name)
    args = offline_args(
        reward_model,
        models / "policy",
        tmp_path,
        rows,
        held_out_rows,
        loss=loss_type,
        **flags,
    )
    comparisons = [comparison(row, args) for row in rows]
    held_out = [comparison(row, args) for row in held_out_rows]
    record = run(reward_model, args, monkeypatch, models)
    numbers = {tuple(ids): i for i, known in enumerate(comparisons) for ids, _, _ in known}
    taken = []
    for update in record.updates:
        batch = sorted({numbers[ids] for ids in update.sequences})
        expected = [tuple(ids) for i in batch for ids, _, _ in comparisons[i]]
        assert sorted(update.sequences) == sorted(expected), "completions of a prompt are separated"
        taken.append(batch)
    check_offline(record, args, taken, list(range(len(rows))))

    head = torch.empty(1, WIDTH).normal_(generator=common.generator(args.seed, "head"))
    expected = head.double() / math.sqrt(WIDTH + 1)
    assert torch.allclose(record.updates[0].exact.score.weight, expected, rtol=1e-4)

    for row, update, batch in zip(record.rows, record.updates, taken):
        known = [comparisons[i] for i in batch]
        margins = [rows[i].get("margin", 0.0) for i in batch]
        scores = read_scores(update.exact, known)
        loss = comparison_loss(args, scores, known, margins, args.center_coef)
        check_gradient(update, loss)
        check_logged(row, {"loss": loss} | comparison_metrics(args, scores, known, False))

    margins = [row.get("margin", 0.0) for row in held_out_rows]
    for row, _, model in evaluations_of(record):
        with torch.no_grad():
            scores = read_scores(model, held_out)
        expected = comparison_metrics(args, scores, held_out, is_held_out=True)
        expected["loss"] = comparison_loss(args, scores, held_out, margins, center_coef=0.0)
        check_logged(row, {f"eval/{name}": value for name, value in expected.items()})
        if row is record.before:
            lines = record.samples_before
            labels = [labels for known in held_out for _, _, labels in known]
            assert [line["labels"] for line in lines] == labels
            logged = [score for line in lines for score in line["scores"]]
            assert logged == pytest.approx(flat_scores(scores), abs=1e-4)


# ---------------------------------------------------------------- dpo
DPO_FLAGS = {
    "sigmoid": dict(
        beta=0.3,
        label_smoothing=0.1,
        batch_size=3,
        weight_decay=0.0,
        max_grad_norm=0.0,
    ),
    "ipo": dict(beta=0.4, loss_type="ipo"),
    "simpo": dict(beta=1.5, loss_type="simpo", simpo_margin=0.5),
    "orpo": dict(loss_type="orpo", beta=0.2),
    "sigmoid-norm": dict(loss_type="sigmoid-norm", beta=1.5, label_smoothing=0.1),
    "sft": dict(beta=0.3, sft_coef=0.7),
}


def pair_ids(pair):
    """Ids of the prompt, the chosen and the rejected completion."""
    prompt, chosen, rejected, _ = pair
    return ids_of(f"{prompt}>"), ids_of(f"{chosen}$"), ids_of(f"{rejected}$")


def pairs_of(update):
    """The pairs of an update; chosen and rejected must be adjacent."""
    known = {}
    for pair in PAIRS:
        prompt, chosen, rejected = pair_ids(pair)
        known[(*prompt, *chosen), (*prompt, *rejected)] = pair
    sequences = update.sequences
    return [known[pair] for pair in zip(sequences[0::2], sequences[1::2], strict=True)]


def odds(logprob):
    return logprob.exp() / (1 - logprob.exp())


def preference(policy, reference, pair, args):
    """Loss and metrics of a pair by the formulas of the papers."""
    prompt, chosen, rejected = pair_ids(pair)
    w, l = (token_logprobs(policy, prompt, ids) for ids in (chosen, rejected))  # noqa: E741
    with torch.no_grad():
        ref_w, ref_l = (token_logprobs(reference, prompt, ids) for ids in (chosen, rejected))
    logratios = (w - ref_w).sum(), (l - ref_l).sum()
    if args.loss_type in ("sigmoid", "sigmoid-norm"):
        lengths = (len(w), len(l)) if args.loss_type == "sigmoid-norm" else (1, 1)
        rewards = [args.beta * x / n for x, n in zip(logratios, lengths)]
        h = rewards[0] - rewards[1] - pair[3]
        s = args.label_smoothing
        loss = -(1 - s) * log_sigmoid(h) - s * log_sigmoid(-h)
    elif args.loss_type == "ipo":
        means = (w - ref_w).mean(), (l - ref_l).mean()
        rewards = args.beta * means[0], args.beta * means[1]
        loss = (means[0] - means[1] - 1 / (2 * args.beta)) ** 2
    elif args.loss_type == "simpo":
        rewards = args.beta * w.mean(), args.beta * l.mean()
        loss = -log_sigmoid(rewards[0] - rewards[1] - args.simpo_margin - pair[3])
    else:
        rewards = args.beta * w.mean(), args.beta * l.mean()
        log_odds_ratio = (odds(w.mean()) / odds(l.mean())).log()
        loss = -w.mean() - args.beta * log_sigmoid(log_odds_ratio)
    logged = {
        "loss": loss - args.sft_coef * w.mean(),
        "accuracy": is_ahead(*rewards),
        "margin": rewards[0] - rewards[1],
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
    }
    if args.loss_type in ("sigmoid", "sigmoid-norm", "ipo"):
        logged["chosen_logratio"], logged["rejected_logratio"] = logratios
    return logged


def mean_preference(policy, reference, pairs, args):
    logged = [preference(policy, reference, pair, args) for pair in pairs]
    return {name: mean(values[name] for values in logged) for name in logged[0]}


@pytest.mark.parametrize("flags", DPO_FLAGS.values(), ids=DPO_FLAGS)
def test_dpo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric.

    The reference is not the initial policy."""
    rows = pair_rows(PAIRS)
    held_out = pair_rows(HELD_OUT_PAIRS)
    args = offline_args(dpo, models / "policy", tmp_path, rows, held_out, **flags)
    record = run(dpo, args, monkeypatch, models)
    reference = load_reference(models)
    taken = [pairs_of(update) for update in record.updates]
    check_offline(record, args, taken, PAIRS)
    for row, update, pairs in zip(record.rows, record.updates, taken):
        expected = mean_preference(update.exact, reference, pairs, args)
        check_gradient(update, expected["loss"])
        check_logged(row, expected)
        assert ("chosen_logratio" in row) == ("chosen_logratio" in expected)
    longest = max(len(ids) for pair in HELD_OUT_PAIRS for ids in pair_ids(pair)[1:])
    for row, calls, policy in evaluations_of(record):
        with torch.no_grad():
            expected = mean_preference(policy, reference, HELD_OUT_PAIRS, args)
        expected["accuracy_stderr"] = binomial_error(expected["accuracy"], len(HELD_OUT_PAIRS))
        check_logged(row, {f"eval/{name}": value for name, value in expected.items()})
        check_offline_completions(row, calls, longest, policy, reference)


# ---------------------------------------------------------------- rejection_sampling
def best_of(n, scores, values):
    """Mean value of the best-scored of n, over all subsets of size n."""
    subsets = list(itertools.combinations(range(len(scores)), n))
    return mean(values[max(subset, key=lambda i: (scores[i], -i))] for subset in subsets)


def selected_of(groups, args):
    """Completions to train on; the first one wins a tie."""
    usable = [
        [x for x in group if x.score is not None and x.score >= args.min_score] for group in groups
    ]
    if args.select_k is not None:
        return sorted(sum(usable, []), key=lambda x: -x.score)[: args.select_k]
    return [max(group, key=lambda x: x.score) for group in usable if group]


@pytest.mark.parametrize(
    "flags",
    [
        dict(min_score=0.5, max_grad_norm=0.5, weight_decay=0.1),
        dict(min_score=-0.5, select_k=5, max_grad_norm=0.0),
    ],
    ids=["top-per-prompt", "top-k"],
)
def test_rejection_sampling_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The selection of every iteration, the gradient of every step, and every metric.

    Training uses temperature 1. Sampling and the KL of the evaluation use --temperature."""
    flags = dict(prompts_per_iteration=5, iterations=3, epochs=2, batch_size=3) | flags
    args = online_args(rejection_sampling, models, tmp_path, **flags)
    record = run(rejection_sampling, args, monkeypatch, models)
    calls = check_sampling(record, load_reference(models), args)
    check_updates(record.updates, args, [row["learning_rate"] for row in record.rows], eps=1e-8)
    step = 0
    for iteration, call in enumerate(calls, 1):
        rollouts = [
            SimpleNamespace(
                ids=(*prompt, *completion),
                mask=[0] * len(prompt) + [1] * len(completion),
                score=score_of(prompt, completion),
                gold=gold_of(prompt, completion),
            )
            for prompt, completion in call.pairs
        ]
        groups = groups_of(rollouts)
        selected = selected_of(groups, args)
        num_steps = math.ceil(2 * len(selected) / 3)
        rows = record.rows[step : step + num_steps]
        updates = record.updates[step : step + num_steps]
        assert [row["iteration"] for row in rows] == [iteration] * num_steps
        check_rates([row["learning_rate"] for row in rows], args)
        taken = sum([update.sequences for update in updates], [])
        assert sorted(taken) == sorted(2 * [x.ids for x in selected])
        masks = {x.ids: x.mask for x in selected}
        for row, update in zip(rows, updates):
            loss = trained_nll(update.exact, [(ids, masks[ids]) for ids in update.sequences])
            check_gradient(update, loss)
            check_logged(row, {"loss": loss, "grad_norm": update.norm})
        scored = [x for x in rollouts if x.score is not None]
        whole = [group for group in groups if all(x.score is not None for x in group)]
        expected = {}
        for name in ("score", "gold"):
            expected[name] = mean(getattr(x, name) for x in scored)
            expected[f"selected_{name}"] = mean(getattr(x, name) for x in selected)
            for n in (1, 2):
                expected[f"best_of_{n}/{name}"] = mean(
                    best_of(n, [x.score for x in group], [getattr(x, name) for x in group])
                    for group in whole
                )
        check_logged(rows[0], expected)
        assert not any("score" in row for row in rows[1:])
        step += num_steps
    assert step == len(record.rows)


# ---------------------------------------------------------------- formulas for a copy of a script
if COPY.path is not None and COPY.path.with_name(f"{COPY.path.stem}_float64.py").exists():
    own = vars(importlib.import_module(f"{COPY.path.stem}_float64"))
    globals().update({name: value for name, value in own.items() if not name.startswith("__")})
