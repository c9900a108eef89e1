"""What a step of each script does, seen from outside: the gradient of every step that `main` clips,
the update that comes of it and every number that it logs, against slow float64 formulas.

Completions, scores, reference, value model and flags are put in; nothing of a script's own tensor
math is called. Models are GPT-2s of two layers, in float64 apart from what main runs. Each step is
compared at the weights that the run had then, since the second depends on the first."""

import copy
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers

import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

EOS = 1
END_OF_PROMPT = 3  # ">"
UNJUDGED = 29  # a completion that begins with z has no score
WIDTH = 16
G = 3
EXACT = 1e-4  # of the norm of what is compared: main computes in float32

pytestmark = pytest.mark.usefixtures("cut_by_budget_alone")


def ids_of(text):
    """The ids that sft.tiny_tokenizer gives a text, with $ for EOS."""
    special = {"$": EOS, ">": END_OF_PROMPT}
    return [special.get(letter) or ord(letter) - ord("a") + 4 for letter in text]


# ---------------------------------------------------------------- models
def tiny_gpt2(cls, seed):
    """Of weights drawn wide; with dropout in its configuration, which no step may use."""
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


CHAT = (
    "{% for m in messages %}{{ m.content }}{{ '[EOS]' if m.role == 'assistant' else '>' }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a policy, its reference some nats away, the policy with a chat template, and a
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


# ---------------------------------------------------------------- what is put in
PROMPTS = ["ab", "c", "defgh", "ijk", "lm", "nopqrs", "tu"]
HELD_OUT = ["xw", "bca", "qponm"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fake_sample(calls):
    """A `sample` that draws without a model, and records what it was asked for. In a rollout, where
    gradients are on, one completion of the second prompt has no score."""

    def sample(model, prompts, *, num_generations, max_new_tokens, temperature, eos_ids, rng):  # noqa: PLR0917
        rollout = torch.is_grad_enabled()
        draw = random.Random(f"{len(calls)} {num_generations}")
        completions = []
        while len(completions) < len(prompts) * num_generations:
            length = draw.randint(1, max_new_tokens + 2)
            ids = [draw.randrange(4, 28) for _ in range(max_new_tokens)]
            if length <= max_new_tokens:
                ids = ids[: length - 1] + [EOS]
            if ids not in completions:  # so that ids say which one it is
                completions.append(ids)
        if rollout:
            completions[num_generations + 1] = [UNJUDGED, 5, EOS]
        calls.append(
            SimpleNamespace(
                is_rollout=rollout,
                model=model,
                prompts=prompts,
                completions=completions,
                num_generations=num_generations,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
            )
        )
        return completions

    return sample


def score_of(prompt, completion):
    """Of these two alone; None for what cannot be judged."""
    if completion[0] == UNJUDGED:
        return None
    return (3 * sum(prompt) + 7 * sum(completion)) % 11 / 4 - 1


def gold_of(prompt, completion):
    return float((sum(prompt) + sum(completion)) % 3 == 0)


def fake_checker(function):
    """What load_rewards or load_gold gives, of a function of ids."""

    def score(examples, completions):
        values = [function(e["prompt_ids"], ids) for e, ids in zip(examples, completions)]
        return torch.tensor([math.nan if value is None else value for value in values])

    return score


# ---------------------------------------------------------------- what is recorded
def parameters_of(model):
    return {name: weight.detach().double().clone() for name, weight in model.named_parameters()}


def gradients_of(model):
    return {
        name: torch.zeros_like(weight).double() if weight.grad is None else weight.grad.double()
        for name, weight in model.named_parameters()
    }


def float64_copy(model):
    exact = copy.deepcopy(model).double()
    exact.zero_grad(set_to_none=True)
    return exact.requires_grad_()


def watch(script, patch, models):
    """Run main of a script with what is put in, later -> what its run did: `updates`, the steps in
    their order, one for each model, with its sequences, weights, gradient and norm; `samples`."""
    record = SimpleNamespace(updates=[], samples=[])
    sequences = []

    def forward_name():
        names = ("token_logprobs_and_entropy", "token_logprobs", "token_scores")
        return next(name for name in names if hasattr(script, name))

    inner_forward = getattr(script, forward_name())
    inner_clip = script.clip_gradients
    inner_load = script.load_policy if hasattr(script, "load_policy") else None

    def forward(model, batch, *more):
        if torch.is_grad_enabled():
            for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                ids = batch["inputs"][i, :length].tolist()
                if "targets" in batch:
                    ids.append(batch["targets"][i, length - 1].item())
                sequences.append(tuple(ids))
        return inner_forward(model, batch, *more)

    def clip(model, max_norm):
        update = SimpleNamespace(
            model=model,
            exact=float64_copy(model),
            sequences=list(sequences),
            weights=parameters_of(model),
            gradient=gradients_of(model),
        )
        sequences.clear()
        update.norm = inner_clip(model, max_norm)
        update.clipped = gradients_of(model)
        record.updates.append(update)
        return update.norm

    def load(path, device, flag="--model", *, trainable=False, **more):
        """Whatever is not trained is the reference."""
        path = path if trainable else str(models / "reference")
        return inner_load(path, device, flag, trainable=trainable, **more)

    patch.setattr(script, forward_name(), forward)
    patch.setattr(script, "clip_gradients", clip)
    if inner_load is not None:
        patch.setattr(script, "load_policy", load)
    if hasattr(script, "sample"):
        patch.setattr(script, "sample", fake_sample(record.samples))
    if hasattr(script, "load_rewards"):
        patch.setattr(script, "load_rewards", lambda *args, **kwargs: [fake_checker(score_of)])
    if hasattr(script, "load_gold"):
        patch.setattr(script, "load_gold", lambda *args, **kwargs: fake_checker(gold_of))
    return record


def read_log(args, name):
    with open(f"{args.output_dir}/{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def run(script, args, patch, models):
    """Run it -> what watch records, and `rows`, its lines of metrics.jsonl: of the evaluation
    before the first step, if any, and of the steps."""
    record = watch(script, patch, models)
    script.main(args)
    lines = read_log(args, "metrics")
    record.before = next((line for line in lines if line["step"] == 0), None)
    record.rows = [line for line in lines if line["step"] > 0]
    samples = read_log(args, "samples")
    evaluated = [line["step"] for line in lines if "eval/kl" in line or "eval/loss" in line]
    assert list(dict.fromkeys(line["step"] for line in samples)) == evaluated
    assert evaluated[0] == 0 and evaluated[-1] == lines[-1]["step"]
    record.samples_before = [line for line in samples if line["step"] == 0]
    return record


# ---------------------------------------------------------------- what holds of every script
def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def difference(ours, exact):
    """|ours - exact| / |exact|, also where both are 0."""
    return ((ours - exact).norm() / (exact.norm() + 1e-9)).item()


def check_gradient(update, loss):
    """The gradient that was clipped is that of this loss at update.exact."""
    weights = dict(update.exact.named_parameters())
    assert list(weights) == list(update.gradient)
    loss = loss + sum(0.0 * weight.sum() for weight in weights.values())  # (all may be clipped)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    exact = torch.cat([gradient.flatten() for gradient in gradients])
    off = difference(flat(update.gradient), exact)
    assert off < EXACT, f"the gradient is off by {off:.1e} of its norm"


def check_updates(updates, args, rates, eps):
    """Each model's steps: the gradient scaled to --max-grad-norm if it is longer, then AdamW
    (Loshchilov and Hutter 2019, algorithm 2) at that step's learning rate, with weight decay on
    matrices alone."""
    assert len(updates) == len(rates)
    model = updates[0].model
    after = [update.weights for update in updates[1:]] + [parameters_of(model)]
    first = {name: torch.zeros_like(weight) for name, weight in after[0].items()}
    second = {name: torch.zeros_like(weight) for name, weight in after[0].items()}
    for count, (update, weights, rate) in enumerate(zip(updates, after, rates), 1):
        assert update.model is model
        norm = flat(update.gradient).norm().item()
        assert float(update.norm) == pytest.approx(norm, rel=1e-4)
        scale = min(1.0, args.max_grad_norm / (norm + 1e-9)) if args.max_grad_norm else 1.0
        assert difference(flat(update.clipped), scale * flat(update.gradient)) < EXACT
        expected = {}
        for name, weight in update.weights.items():
            gradient = update.clipped[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            deviation = (second[name] / (1 - 0.999**count)).sqrt()
            step = first[name] / (1 - 0.9**count) / (deviation + eps)
            step = step + args.weight_decay * weight
            expected[name] = -rate * step
        moved = flat(weights) - flat(update.weights)
        assert difference(moved, flat(expected)) < 1e-3, f"update {count} is not AdamW's"


def check_rates(rates, args):
    """Linear warm-up, then down to what would be 0 a step after the last."""
    for i, rate in enumerate(rates):
        warm = min(1.0, (i + 1) / (args.warmup_steps + 1))
        done = max(0, i - args.warmup_steps) / (len(rates) - args.warmup_steps)
        assert rate == pytest.approx(args.learning_rate * warm * (1 - done))


def check_order(taken, data):
    """What the steps took, one after another: all the data once, then all of it again in another
    order."""
    n = len(data)
    assert len(taken) >= 2 * n, "two epochs are needed to see anything"
    assert sorted(taken[:n]) == sorted(data), "the first epoch has each row once"
    assert sorted(taken[n : 2 * n]) == sorted(data), "and so has the second"
    assert taken[:n] != taken[n : 2 * n], "in an order of its own"


def number(value):
    return value.item() if torch.is_tensor(value) else value


def check_logged(row, expected):
    assert expected.keys() <= row.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(number(value), rel=1e-4, abs=2e-5), name


def log_probs(model, prompt, completion, temperature=1.0):
    """(n, V): of every completion token's distribution, the row alone and without padding."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def token_log_probs(model, prompt, completion, temperature=1.0):
    """(n,)."""
    logps = log_probs(model, prompt, completion, temperature)
    return logps[range(len(completion)), completion]


def hidden_states(model, ids):
    return model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]


def reference_of(models):
    return float64_copy(transformers.AutoModelForCausalLM.from_pretrained(models / "reference"))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- rollouts
def online_args(script, models, folder, **flags):
    settings = dict(
        model=str(models / "policy"),
        dataset=write_rows(folder / "prompts.jsonl", [dict(prompt=p + ">") for p in PROMPTS]),
        eval_dataset=write_rows(
            folder / "held_out.jsonl", [dict(prompt=p + ">") for p in HELD_OUT]
        ),
        output_dir=str(folder / "run"),
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
    return script.Args(**settings | flags)


def prompt_ids(prompts):
    return [tuple(ids_of(f"{prompt}>")) for prompt in prompts]


def judged_rollouts(call, args, policy, reference):
    """What one call of `sample` gave -> rollouts of the groups that could be judged."""
    rollouts = []
    for i in range(0, len(call.completions), G):
        prompt = call.prompts[i // G]
        completions = call.completions[i : i + G]
        scores = [score_of(prompt, completion) for completion in completions]
        if None in scores:
            continue
        for completion, score in zip(completions, scores):
            finished = completion[-1] == EOS
            reward = score if finished else score - args.missing_eos_penalty
            if getattr(args, "overlong_buffer", 0):  # Yu et al. 2025, equation 13
                limit = args.max_completion_length
                start = limit - args.overlong_buffer
                if len(completion) > start:
                    reward += (start - len(completion)) / args.overlong_buffer
            with torch.no_grad():
                old = token_log_probs(policy, prompt, completion, args.temperature)
                ref = token_log_probs(reference, prompt, completion, args.temperature)
            rollouts.append(
                SimpleNamespace(
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
            )
    assert 0 < len(rollouts) < len(call.completions)
    return rollouts


def check_minibatches(steps, args):
    """Each epoch has each rollout once, in minibatches as even as can be, cut anew in every epoch
    of every step."""
    cuts = []
    for step in steps:
        numbers = [rollout.ids for rollout in step.rollouts]
        for i in range(0, len(step.updates), args.num_minibatches):
            epoch = [update.sequences for update in step.updates[i : i + args.num_minibatches]]
            assert sorted(ids for minibatch in epoch for ids in minibatch) == sorted(numbers)
            sizes = [len(minibatch) for minibatch in epoch]
            assert max(sizes) - min(sizes) <= 1
            cuts.append([sorted(numbers.index(ids) for ids in minibatch) for minibatch in epoch])
    if args.num_minibatches > 1:
        assert all(cut not in cuts[:i] for i, cut in enumerate(cuts)), "cut as before"


def groups_of(rollouts):
    return [rollouts[i : i + G] for i in range(0, len(rollouts), G)]


def check_shared_metrics(row, rollouts, args):
    """Those that have one definition in ppo, rloo and grpo."""
    num_sampled = args.prompts_per_step * G
    expected = {
        "score": mean(rollout.score for rollout in rollouts),
        "gold": mean(rollout.gold for rollout in rollouts),
        "completion_length": mean(len(rollout.completion) for rollout in rollouts),
        "eos_rate": mean(rollout.finished for rollout in rollouts),
        "unjudged": 1 - len(rollouts) / num_sampled,
    }
    if args.kl_coef:
        expected["kl"] = mean(sum(r.old) - sum(r.ref) for r in rollouts)
    else:
        assert "kl" not in row
    check_logged(row, expected)
    assert row["ratio_max_dev"] < 1e-4
    # sampling and training are the whole step, of which the rate is
    seconds = row["seconds/sample"] + row["seconds/train"]
    tokens = sum(len(r.prompt) + len(r.completion) - 1 for r in rollouts)
    assert row["tokens_per_second"] * seconds == pytest.approx(tokens, rel=1e-3)


def check_count(fraction, flags):
    """What is logged is the share of True among flags, which are True, False, or None for a ratio
    so near to the edge that rounding may decide."""
    sure = sum(flag is True for flag in flags)
    unsure = sum(flag is None for flag in flags)
    assert sure - 0.01 <= fraction * len(flags) <= sure + unsure + 0.01


def is_clipped(ratio, advantage, args):
    """True where the clip takes the gradient away."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    edge = 1 + high if advantage > 0 else 1 - args.epsilon
    if abs(ratio - edge) < 1e-4:
        return None
    return bool(advantage) and bool(ratio > edge if advantage > 0 else ratio < edge)


def surrogate(ratio, advantage, args):
    """Schulman et al. 2017, equation 7, of one token: the lesser of two gains."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    limited = min(max(ratio, 1 - args.epsilon), 1 + high)
    return min(ratio * advantage, limited * advantage)


def check_evaluations(record, reference, args):
    """Before the first step and after the last, with the weights of then: a greedy completion, and
    G at --temperature, whose KL is at that temperature, too."""
    of_policy = [update for update in record.updates if not hasattr(update.model, "score")]
    calls = [call for call in record.samples if not call.is_rollout]
    before = of_policy[0].exact
    after = float64_copy(of_policy[0].model)
    check_evaluation(record.before, calls[:2], before, reference, args)
    check_evaluation(record.rows[-1], calls[-2:], after, reference, args)


def check_evaluation(row, calls, policy, reference, args):
    greedy, sampled = calls
    assert (greedy.num_generations, greedy.temperature) == (1, 0.0)
    assert (sampled.num_generations, sampled.temperature) == (G, args.temperature)
    expected = {}
    for suffix, call in [("_greedy", greedy), ("", sampled)]:
        prompts = [prompt for prompt in call.prompts for _ in range(call.num_generations)]
        pairs = list(zip(prompts, call.completions, strict=True))
        expected[f"eval/score{suffix}"] = mean(score_of(*pair) for pair in pairs)
        expected[f"eval/gold{suffix}"] = mean(gold_of(*pair) for pair in pairs)
    golds = [gold_of(*pair) for pair in pairs]
    expected[f"eval/pass@{G}"] = mean(max(golds[i : i + G]) for i in range(0, len(golds), G))
    expected["eval/eos_rate"] = mean(completion[-1] == EOS for _, completion in pairs)
    expected["eval/completion_length"] = mean(len(completion) for _, completion in pairs)
    with torch.no_grad():
        expected["eval/kl"] = mean(
            (
                token_log_probs(policy, *pair, args.temperature)
                - token_log_probs(reference, *pair, args.temperature)
            ).sum()
            for pair in pairs
        )
    check_logged(row, expected)


def online_steps(script, models, folder, patch, **flags):
    """Run ppo, grpo or rloo -> its flags and its steps: row (what was logged), rollouts, and the
    updates of policy and value model, with minibatch (rollouts) and logps (by ids, with gradients).
    Whatever the three have in common is checked."""
    args = online_args(script, models, folder, **flags)
    record = run(script, args, patch, models)
    reference = reference_of(models)
    of_policy = [update for update in record.updates if not hasattr(update.model, "score")]
    of_values = [update for update in record.updates if hasattr(update.model, "score")]
    rates = [row["learning_rate"] for row in record.rows]
    num_updates = args.update_epochs * args.num_minibatches
    rates_of_updates = [rate for rate in rates for _ in range(num_updates)]
    check_rates(rates, args)
    check_updates(of_policy, args, rates_of_updates, eps=1e-5)
    if script is ppo:
        check_updates(of_values, args, rates_of_updates, eps=1e-5)
    check_evaluations(record, reference, args)
    calls = [call for call in record.samples if call.is_rollout]
    check_order([tuple(prompt) for call in calls for prompt in call.prompts], prompt_ids(PROMPTS))
    steps = []
    for i, (call, row) in enumerate(zip(calls, record.rows, strict=True)):
        assert (call.num_generations, call.temperature) == (G, args.temperature)
        updates = of_policy[i * num_updates : (i + 1) * num_updates]
        rollouts = judged_rollouts(call, args, updates[0].exact, reference)
        of_ids = {rollout.ids: rollout for rollout in rollouts}
        entropies = []
        for update in updates:
            update.others = [ids for ids in update.sequences if ids not in of_ids]
            update.sequences = [ids for ids in update.sequences if ids in of_ids]
            update.minibatch = [of_ids[ids] for ids in update.sequences]
            update.logps = {}
            for rollout in update.minibatch:
                logps = log_probs(
                    update.exact, rollout.prompt, rollout.completion, args.temperature
                )
                update.logps[rollout.ids] = logps[range(len(logps)), rollout.completion]
                entropies += [-(row.exp() * row).sum().item() for row in logps]
        check_shared_metrics(row, rollouts, args)
        if script is not ppo:
            equal = [len({rollout.reward for rollout in g}) == 1 for g in groups_of(rollouts)]
            if getattr(args, "baseline", None) != "none":
                check_logged(row, {"zero_std_groups": mean(equal)})
        expected = {
            "entropy": mean(entropies),
            "grad_norm": mean(update.norm for update in updates),
        }
        check_logged(row, expected)
        value_updates = of_values[i * num_updates : (i + 1) * num_updates]
        steps.append(
            SimpleNamespace(
                row=row,
                rollouts=rollouts,
                updates=updates,
                value_updates=value_updates,
            )
        )
    check_minibatches(steps, args)
    return args, steps


# ---------------------------------------------------------------- ppo
def whitened(rows, shift_mean):
    """Numbers of ragged rows to population variance 1 over all of them."""
    numbers = [x for row in rows for x in row]
    centre = mean(numbers)
    deviation = math.sqrt(mean((x - centre) ** 2 for x in numbers) + 1e-8)
    offset = 0.0 if shift_mean else centre
    return [[(x - centre) / deviation + offset for x in row] for row in rows]


def ppo_targets(rollouts, args):
    """Sets rewards, returns and advantages of each, from its reward, old, ref and values."""
    rewards = []
    for rollout in rollouts:
        token_rewards = [-args.kl_coef * (old - ref) for old, ref in zip(rollout.old, rollout.ref)]
        token_rewards[-1] += rollout.reward
        rollout.total_reward = sum(token_rewards)
        rewards.append(token_rewards)
    if args.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    advantages = []
    for rollout, token_rewards in zip(rollouts, rewards):
        values = [*rollout.values, 0.0]
        deltas = [
            r + args.gamma * values[t + 1] - values[t] for t, r in enumerate(token_rewards)
        ]  # Schulman et al. 2016, equation 11; 16 is the sum
        decay = args.gamma * args.gae_lambda
        sums = [
            sum(decay ** (k - t) * deltas[k] for k in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
        rollout.returns = [a + v for a, v in zip(sums, rollout.values)]
        advantages.append(sums)
    for rollout, numbers in zip(rollouts, whitened(advantages, shift_mean=True)):
        rollout.advantages = numbers


def token_values(model, rollout):
    """(n,): V of what stands before each completion token."""
    hidden = hidden_states(model, rollout.ids[:-1])[len(rollout.prompt) - 1 :]
    return hidden @ model.score.weight[0]


def half_squared_error(value, old, target, limit):
    """The clipped value loss of one token: the larger of two."""
    limited = min(max(value, old - limit), old + limit)
    return 0.5 * max((value - target) ** 2, (limited - target) ** 2)


def variance(numbers):
    return mean((x - mean(numbers)) ** 2 for x in numbers)


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
    "no-kl": dict(kl_coef=0.0, num_minibatches=1, temperature=1.0),
    "ptx": dict(ptx_coef=0.6, num_minibatches=3, temperature=0.7),
}
PTX = [
    ("qr", "stuvw"),
    ("y", "z"),
    ("tuv", ""),
    ("zyxw", "vut"),
    ("qq", "rsrsr"),
    ("o", "p"),
    ("m", "nop"),
]


def ptx_loss(update, args):
    """Mean NLL, at temperature 1, over the tokens of the rows of --ptx-dataset that it saw."""
    rows = {tuple(ids_of(f"{p}>{c}$")): (ids_of(f"{p}>"), ids_of(f"{c}$")) for p, c in PTX}
    assert len(update.others) == args.prompts_per_step * G // args.num_minibatches
    nlls = [-token_log_probs(update.exact, *rows[ids]) for ids in update.others]
    return torch.cat(nlls).mean()


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
        ppo_targets(step.rollouts, args)
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
                for t, logp in enumerate(update.logps[rollout.ids]):
                    advantage = rollout.advantages[t]
                    ratio = (logp - rollout.old[t]).exp()
                    gains.append(surrogate(ratio, advantage, args))
                    clipped.append(is_clipped(ratio, advantage, args))
                    error = half_squared_error(
                        values[t], rollout.values[t], rollout.returns[t], args.value_clip
                    )
                    errors.append(error)
                    value_clipped.append(bool(error > 0.5 * (values[t] - rollout.returns[t]) ** 2))
            ptx = ptx_loss(update, args) if args.ptx_coef else torch.zeros(())
            check_gradient(update, -mean(gains) + args.ptx_coef * ptx)
            ptx_losses.append(ptx)
            check_gradient(value_update, args.value_coef * mean(errors))
            policy_losses.append(-mean(gains))
            value_losses.append(mean(errors))
        old_values = [x for rollout in step.rollouts for x in rollout.values]
        returns = [x for rollout in step.rollouts for x in rollout.returns]
        errors = [a - b for a, b in zip(returns, old_values)]
        expected = {
            "loss/policy": mean(policy_losses),
            "loss/value": mean(value_losses),
            "loss": mean(policy_losses)
            + args.value_coef * mean(value_losses)
            + args.ptx_coef * mean(ptx_losses),
            "reward": mean(rollout.total_reward for rollout in step.rollouts),
            "explained_variance": 1 - variance(errors) / variance(returns),
            "value_grad_norm": mean(update.norm for update in step.value_updates),
        }
        if args.ptx_coef:
            expected["loss/ptx"] = mean(ptx_losses)
        check_logged(step.row, expected)
        check_count(step.row["clip_fraction"], clipped)
        check_count(step.row["value_clip_fraction"], value_clipped)
    if args.ptx_coef:
        taken = [ids for step in steps for update in step.updates for ids in update.others]
        counts = [taken.count(tuple(ids_of(f"{p}>{c}$"))) for p, c in PTX]
        assert sum(counts) == len(taken)
        assert max(counts) - min(counts) <= 1, "the next rows, from step to step"


# ---------------------------------------------------------------- grpo and rloo
def kl_of(rollout):
    """k1 of a completion."""
    return sum(rollout.old) - sum(rollout.ref)


def deviation(numbers):
    """With Bessel's correction."""
    return math.sqrt(sum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1))


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
        kl_in="reward",
        scale_rewards="none",
        loss_aggregation="constant",
        mask_truncated=True,
    ),
    "kl-ratio": dict(kl_ratio=True),
    "sequence-ratio": dict(ratio="sequence", epsilon=0.02, epsilon_high=0.03),
    "overlong": dict(overlong_buffer=4, scale_rewards="none"),
    "no-kl": dict(kl_coef=0.0, mask_truncated=True, update_epochs=1, num_minibatches=1),
}


def grpo_kl_loss(log_ratio, args):
    """Of one token, in the loss."""
    if args.kl_in == "reward":
        return 0.0
    if args.kl_estimator == "k2":
        return args.kl_coef * log_ratio**2 / 2
    return args.kl_coef * ((-log_ratio).exp() - 1 + log_ratio)


def grpo_advantages(rollouts, args):
    for rollout in rollouts:
        rollout.total_reward = rollout.reward
        if args.kl_in == "reward":
            rollout.total_reward -= args.kl_coef * kl_of(rollout)
    of_batch = deviation([rollout.total_reward for rollout in rollouts])
    for group in groups_of(rollouts):
        rewards = [rollout.total_reward for rollout in group]
        scale = {"group": deviation(rewards) + 1e-6, "batch": of_batch + 1e-6, "none": 1.0}
        for rollout in group:
            centred = rollout.total_reward - mean(rewards)
            rollout.advantage = centred / scale[args.scale_rewards]


def grpo_loss(minibatch, token_losses, args):
    """Of completions that are trained, lists of token losses, and how many there are in all."""
    if args.loss_aggregation == "token":
        return mean(loss for losses in token_losses for loss in losses)
    if args.loss_aggregation == "constant":
        return sum(map(sum, token_losses)) / (len(minibatch) * args.max_completion_length)
    return mean(mean(losses) for losses in token_losses)


@pytest.mark.parametrize("flags", GRPO_FLAGS.values(), ids=GRPO_FLAGS)
def test_grpo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric."""
    args, steps = online_steps(grpo, models, tmp_path, monkeypatch, **flags)
    for step in steps:
        grpo_advantages(step.rollouts, args)
        step_losses = []
        clipped = []
        for update in step.updates:
            token_losses = []
            for rollout in update.minibatch:
                if args.mask_truncated and not rollout.finished:
                    continue
                losses = []
                logps = update.logps[rollout.ids]
                of_sequence = mean(logp - old for logp, old in zip(logps, rollout.old)).exp()
                for t, logp in enumerate(logps):
                    ratio = (logp - rollout.old[t]).exp()
                    factor = ratio if args.kl_ratio else 1.0
                    ratio = of_sequence if args.ratio == "sequence" else ratio
                    loss = -surrogate(ratio, rollout.advantage, args)
                    losses.append(loss + factor * grpo_kl_loss(logp - rollout.ref[t], args))
                    clipped.append(is_clipped(ratio, rollout.advantage, args))
                token_losses.append(losses)
            loss = grpo_loss(update.minibatch, token_losses, args)
            check_gradient(update, loss)
            step_losses.append(loss)
        expected = {
            "loss": mean(step_losses),
            "reward": mean(rollout.total_reward for rollout in step.rollouts),
        }
        check_logged(step.row, expected)
        check_count(step.row["clip_fraction"], clipped)


RLOO_FLAGS = {
    "leave-one-out": dict(epsilon=0.2),
    "none": dict(baseline="none", kl_coef=0.0, num_minibatches=1, epsilon_high=None),
}


@pytest.mark.parametrize("flags", RLOO_FLAGS.values(), ids=RLOO_FLAGS)
def test_rloo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric. A completion is one action: its ratio is a
    factor, and the clip takes its gradient away whole."""
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
        step_losses = []
        clipped = []
        for update in step.updates:
            losses = []
            for rollout in update.minibatch:
                logp = update.logps[rollout.ids].sum()
                ratio = (logp - sum(rollout.old)).exp().item()
                flag = is_clipped(ratio, rollout.advantage, args)
                clipped += [flag] * len(rollout.completion)
                losses.append(-rollout.advantage * ratio * logp * (flag is not True))
            check_gradient(update, mean(losses))
            step_losses.append(mean(losses))
        expected = {
            "loss": mean(step_losses),
            "reward": mean(rollout.total_reward for rollout in step.rollouts),
        }
        check_logged(step.row, expected)
        check_count(step.row["clip_fraction"], clipped)


@pytest.mark.parametrize("script", [ppo, grpo, rloo])
def test_ratio_max_dev_is_of_the_first_update_alone(models, tmp_path, monkeypatch, script):
    """Of the first update alone: where the forward that trains gives log-probs 0.03 above those
    that were taken before, it is exp(0.03) - 1."""
    inner = script.token_logprobs_and_entropy

    def forward(model, batch, temperature):
        logprobs, entropy = inner(model, batch, temperature)
        shift = 0.03 if torch.is_grad_enabled() else 0.0
        return logprobs + shift * batch["mask"], entropy

    monkeypatch.setattr(script, "token_logprobs_and_entropy", forward)
    record = run(script, online_args(script, models, tmp_path), monkeypatch, models)
    for row in record.rows:
        assert row["ratio_max_dev"] == pytest.approx(math.exp(0.03) - 1, rel=1e-2)


# ---------------------------------------------------------------- data sets
def offline_args(script, model, folder, rows, held_out, **flags):
    settings = dict(
        model=str(model),
        dataset=write_rows(folder / "rows.jsonl", rows),
        eval_dataset=write_rows(folder / "held_out.jsonl", held_out),
        output_dir=str(folder / "run"),
        epochs=2,
        batch_size=4,
        micro_batch_tokens=24 if script is sft else 60,  # (of pairs, two or more)
        learning_rate=2e-3,
        warmup_steps=1,
        max_grad_norm=0.5,
        weight_decay=0.1,
    )
    return script.Args(**settings | flags)


def check_offline(record, args, taken, data):
    """What holds of sft, reward_model and dpo, with what their steps took: batches of two epochs,
    the last one smaller; the schedule; the updates."""
    n = len(data)
    size = args.batch_size
    assert [len(batch) for batch in taken] == [min(size, 2 * n - i) for i in range(0, 2 * n, size)]
    # (within a batch micro-batches have an order of their own)
    batches = [sorted(batch) for batch in taken]
    assert sorted(sum(batches, [])) == sorted([*data, *data])
    first_epoch = sum(batches[: n // size], [])
    assert len(set(first_epoch)) == len(first_epoch), "no row comes again before all have come"
    assert batches[0] != sorted(data[:size]), "in an order that is not the file's"
    if n % size == 0:
        assert not any(batch in batches[: n // size] for batch in batches[n // size :])
    rates = [row["learning_rate"] for row in record.rows]
    check_rates(rates, args)
    check_updates(record.updates, args, rates, eps=1e-8)
    for row, update in zip(record.rows, record.updates, strict=True):
        check_logged(row, {"grad_norm": update.norm})


def evaluations_of(record):
    """Before the first step and after the last: row, calls of `sample`, and the weights of then."""
    before = record.updates[0].exact
    after = float64_copy(record.updates[0].model)
    return [
        (record.before, record.samples[:2], before),
        (record.rows[-1], record.samples[-2:], after),
    ]


def check_completions(row, calls, longest, policy=None, reference=None):
    """A greedy and a sampled completion of each held-out prompt, the latter at temperature 1, as
    long as the longest that is held out."""
    greedy, sampled = calls
    assert (greedy.num_generations, greedy.temperature) == (1, 0.0)
    assert (sampled.num_generations, sampled.temperature) == (1, 1.0)
    assert greedy.max_new_tokens == sampled.max_new_tokens == longest
    pairs = list(zip(sampled.prompts, sampled.completions, strict=True))
    golds = list(zip(greedy.prompts, greedy.completions, strict=True))
    expected = {
        "eval/gold": mean(gold_of(*pair) for pair in pairs),
        "eval/gold_greedy": mean(gold_of(*pair) for pair in golds),
        "eval/eos_rate": mean(completion[-1] == EOS for _, completion in pairs),
        "eval/completion_length": mean(len(completion) for _, completion in pairs),
    }
    if policy is not None:
        with torch.no_grad():
            expected["eval/kl"] = mean(
                (token_log_probs(policy, *pair) - token_log_probs(reference, *pair)).sum()
                for pair in pairs
            )
    check_logged(row, expected)


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
    """A conversation's ids, and 1 where they are trained: on EOS, too."""
    ids = []
    mask = []
    for i, (prompt, completion) in enumerate(turns):
        prompt_ids = ids_of(f"{prompt}>")
        completion_ids = ids_of(f"{completion}$")
        is_trained = train_on == "all" or i == len(turns) - 1
        ids += prompt_ids + completion_ids
        mask += [0] * len(prompt_ids) + [int(is_trained)] * len(completion_ids)
    return tuple(ids), mask


def messages_of(turns):
    messages = []
    for prompt, completion in turns:
        messages.append(dict(role="user", content=prompt))
        messages.append(dict(role="assistant", content=completion))
    return dict(messages=messages)


def trained_nlls(model, ids, mask):
    """(n,): of the tokens of a sequence that are trained."""
    logps = token_log_probs(model, ids[:1], ids[1:])
    return -logps[torch.tensor(mask[1:]).bool()]


@pytest.mark.parametrize("form, train_on", [("text", "last"), ("chat", "last"), ("chat", "all")])
def test_sft_step_is_the_formula(models, tmp_path, monkeypatch, form, train_on):
    """The gradient of every step, and every metric: means over the tokens of the batch, in the
    evaluation over those of all held-out rows."""
    conversations = CONVERSATIONS
    model = models / "chat"
    rows = [messages_of(turns) for turns in conversations]
    if form == "text":
        conversations = [turns[-1:] for turns in conversations]
        model = models / "policy"
        rows = [dict(prompt=f"{p}>", completion=c) for ((p, c),) in conversations]
    held_out = [messages_of(turns) for turns in HELD_OUT_CONVERSATIONS]
    held_out_conversations = HELD_OUT_CONVERSATIONS
    if form == "text":
        held_out_conversations = [turns[-1:] for turns in HELD_OUT_CONVERSATIONS]
        held_out = [dict(prompt=f"{p}>", completion=c) for ((p, c),) in held_out_conversations]
    flags = dict(train_on=train_on)
    if form == "text":
        flags |= dict(weight_decay=0.0, max_grad_norm=0.0, batch_size=3)
    args = offline_args(sft, model, tmp_path, rows, held_out, **flags)
    record = run(sft, args, monkeypatch, models)
    masks = dict(masked_ids(turns, train_on) for turns in conversations)
    check_offline(record, args, [update.sequences for update in record.updates], list(masks))
    for row, update in zip(record.rows, record.updates):
        nlls = [trained_nlls(update.exact, ids, masks[ids]) for ids in update.sequences]
        loss = torch.cat(nlls).mean()
        check_gradient(update, loss)
        check_logged(row, {"loss": loss})
    held_out = [masked_ids(turns, train_on) for turns in held_out_conversations]
    for row, calls, policy in evaluations_of(record):
        with torch.no_grad():
            nlls = [trained_nlls(policy, ids, mask) for ids, mask in held_out]
        check_logged(row, {"eval/loss": torch.cat(nlls).mean()})
        longest = max(len(turns[-1][1]) + 1 for turns in held_out_conversations)
        check_completions(row, calls, longest)


# ---------------------------------------------------------------- pairs
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


def pair_rows(pairs):
    return [dict(prompt=f"{p}>", chosen=c, rejected=r, margin=m) for p, c, r, m in pairs]


def pair_ids(pair):
    """Ids of the prompt, the chosen and the rejected completion."""
    prompt, chosen, rejected, _ = pair
    return ids_of(f"{prompt}>"), ids_of(f"{chosen}$"), ids_of(f"{rejected}$")


def pairs_of(update):
    """The pairs that an update saw; chosen and rejected side by side."""
    known = {}
    for pair in PAIRS:
        prompt, chosen, rejected = pair_ids(pair)
        known[(*prompt, *chosen), (*prompt, *rejected)] = pair
    sequences = update.sequences
    return [known[pair] for pair in zip(sequences[0::2], sequences[1::2], strict=True)]


def log_sigmoid(x):
    return -(1 + (-x).exp()).log()


def is_ahead(chosen, rejected):
    """A tie counts half."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def binomial_error(share, n):
    return math.sqrt(share * (1 - share) / n)


# ---------------------------------------------------------------- reward_model
def pair_scores(model, pair):
    """Of chosen and rejected: the head at the last token, EOS."""
    prompt, chosen, rejected = pair_ids(pair)
    head = model.score.weight[0]
    return [hidden_states(model, prompt + ids)[-1] @ head for ids in (chosen, rejected)]


@pytest.mark.parametrize("center_coef", [0.0, 0.3])
def test_reward_model_step_is_the_formula(models, tmp_path, monkeypatch, center_coef):
    """The gradient of every step, and every metric; the head that it starts from."""
    flags = dict(center_coef=center_coef)
    if center_coef == 0.0:
        flags |= dict(weight_decay=0.0, max_grad_norm=0.0, batch_size=3)
    rows = pair_rows(PAIRS)
    held_out = pair_rows(HELD_OUT_PAIRS)
    args = offline_args(reward_model, models / "policy", tmp_path, rows, held_out, **flags)
    record = run(reward_model, args, monkeypatch, models)
    taken = [pairs_of(update) for update in record.updates]
    check_offline(record, args, taken, PAIRS)

    head = record.updates[0].weights["score.weight"]
    of_one = torch.empty(1, WIDTH)
    of_one.normal_(generator=reward_model.generator(args.seed, "head"))
    assert torch.allclose(head, of_one.double() / math.sqrt(WIDTH + 1), rtol=1e-4)

    for row, update, pairs in zip(record.rows, record.updates, taken):
        losses = []
        differences = []
        ahead = []
        for pair in pairs:
            chosen, rejected = pair_scores(update.exact, pair)
            loss = -log_sigmoid(chosen - rejected - pair[3])
            losses.append(loss + center_coef * (chosen + rejected) ** 2)
            differences.append(chosen - rejected)
            ahead.append(is_ahead(chosen, rejected))
        check_gradient(update, mean(losses))
        expected = {"loss": mean(losses), "margin": mean(differences), "accuracy": mean(ahead)}
        check_logged(row, expected)

    for row, _, model in evaluations_of(record):
        with torch.no_grad():
            scores = [pair_scores(model, pair) for pair in HELD_OUT_PAIRS]
        losses = [-log_sigmoid(c - r - p[3]) for (c, r), p in zip(scores, HELD_OUT_PAIRS)]
        both = [score.item() for pair in scores for score in pair]
        accuracy = mean(is_ahead(chosen, rejected) for chosen, rejected in scores)
        expected = {
            "eval/loss": mean(losses),
            "eval/accuracy": accuracy,
            "eval/accuracy_stderr": binomial_error(accuracy, len(scores)),
            "eval/top1_accuracy": accuracy,
            "eval/tied_pairs": 0.0,
            "eval/margin": mean(c - r for c, r in scores),
            "eval/score_mean": mean(both),
            "eval/score_std": math.sqrt(variance(both)),
        }
        check_logged(row, expected)
        if row is record.before:
            lines = record.samples_before
            assert [line["labels"] for line in lines] == [[1.0], [0.0]] * len(HELD_OUT_PAIRS)
            scores = [score for line in lines for score in line["scores"]]
            assert scores == pytest.approx(both, abs=1e-4)


# ---------------------------------------------------------------- reward_model, other data
COMPARED = [  # a prompt, completions and their scores; None: not judged
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
    ("defg", {"hi": 2.0, "jklmnopq": 0.0, "x": 1.0}),
    ("u", {"vwxy": 1.0, "": 0.0}),
]
STEPS = [  # a prompt, the steps of an answer and whether each is right; j stands between steps
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
HELD_OUT_STEPS = [("ab", {"c": True, "dc": False}), ("defg", {"hi": False}), ("u", {"vwxy": True})]
COMPARISONS = {
    "bradley-terry": dict(center_coef=0.3),
    "plackett-luce": dict(center_coef=0.3, batch_size=3, weight_decay=0.0, max_grad_norm=0.0),
    "outcome": dict(),
    "outcome-all": dict(outcome_tokens="all", batch_size=3),
    "process": dict(step_separator="j", batch_size=3),
}


def judged(comparisons, args):
    """Prompts as rows of a file, and each as its known completions: ids, where their scores are
    read, what is known there."""
    rows = []
    prompts = []
    for prompt, answers in comparisons:
        if args["loss"] == "outcome":
            answers = {text: score and float(score > 0) for text, score in answers.items()}
        row = {"prompt": f"{prompt}>", "completions": list(answers)}
        values = list(answers.values())
        rows.append(row | {"labels" if args["loss"] == "process" else "scores": values})
        start = len(ids_of(f"{prompt}>"))
        if args["loss"] == "process":
            whole = "j".join(answers) + "$"
            ends = [i for i, letter in enumerate(whole) if letter in "j$"]
            labels = [float(value) for value in values]
            known = [(ids_of(f"{prompt}>{whole}"), [start + i for i in ends], labels)]
        else:
            known = []
            for text, score in answers.items():
                ids = ids_of(f"{prompt}>{text}$")
                first = start if args.get("outcome_tokens") == "all" else len(ids) - 1
                read = list(range(first, len(ids)))
                if score is not None:
                    known.append((ids, read, [score] * len(read)))
        prompts.append(known)
    return rows, prompts


def read_scores(model, prompts):
    """Of each completion of each prompt: scores where they are read."""
    head = model.score.weight[0]
    return [
        [[hidden_states(model, ids)[i] @ head for i in read] for ids, read, _ in known]
        for known in prompts
    ]


def pairs_by_rank(scores, known):
    """(better, worse) scores of a prompt, at last tokens."""
    labels = [labels[-1] for _, _, labels in known]
    n = range(len(labels))
    return [(scores[i][-1], scores[j][-1]) for i in n for j in n if labels[i] > labels[j]]


def comparison_loss(loss_type, scores, prompts, center_coef):
    """As the papers have it, prompt by prompt."""
    if loss_type in ("outcome", "process"):
        losses = []
        for prompt_scores, known in zip(scores, prompts):
            for row, (_, _, labels) in zip(prompt_scores, known):
                for score, label in zip(row, labels):
                    losses.append(-log_sigmoid(score if label else -score))
        return mean(losses)
    losses = []
    for prompt_scores, known in zip(scores, prompts):
        pairs = pairs_by_rank(prompt_scores, known)
        loss = center_coef * mean((a + b) ** 2 for a, b in pairs)
        if loss_type == "bradley-terry":
            loss = loss - mean(log_sigmoid(a - b) for a, b in pairs)
        else:
            for own, (_, _, labels) in zip(prompt_scores, known):
                below = [s[-1].exp() for s, x in zip(prompt_scores, known) if x[2][-1] < labels[-1]]
                loss = loss - (own[-1].exp() / (own[-1].exp() + sum(below))).log()
        losses.append(loss)
    return mean(losses)


def comparison_metrics(loss_type, scores, prompts, is_held_out):
    metrics = {}
    pairs = [pairs_by_rank(*each) for each in zip(scores, prompts)]
    pairs = [each for each in pairs if each]
    if loss_type in ("outcome", "process"):
        read = [s for prompt_scores in scores for row in prompt_scores for s in row]
        labels = [label for known in prompts for _, _, row in known for label in row]
        metrics["label_accuracy"] = mean(float((s > 0) == (x == 1)) for s, x in zip(read, labels))
        metrics["brier"] = mean((1 / (1 + (-s).exp()) - x) ** 2 for s, x in zip(read, labels))
    if pairs and (is_held_out or "label_accuracy" not in metrics):
        metrics["accuracy"] = mean(mean(is_ahead(*pair) for pair in each) for each in pairs)
        metrics["margin"] = mean(mean(a - b for a, b in each) for each in pairs)
    return metrics


@pytest.mark.parametrize("flags", COMPARISONS.values(), ids=COMPARISONS)
def test_reward_model_of_more_than_pairs(models, tmp_path, monkeypatch, request, flags):
    """The gradient of every step, and every metric, of several completions of a prompt, or of the
    steps of one; what is not judged counts for nothing."""
    flags = dict(loss=request.node.callspec.id.removesuffix("-all")) | flags
    if flags["loss"] == "process":
        rows, prompts = judged(STEPS, flags)
        held_out_rows, held_out = judged(HELD_OUT_STEPS, flags)
    else:
        rows, prompts = judged(COMPARED, flags)
        # (one without a pair, which only outcome keeps)
        more = [("xy", {"a": 1.0, "bc": 1.0})] if flags["loss"] == "outcome" else []
        held_out_rows, held_out = judged(HELD_OUT_COMPARED + more, flags)
    args = offline_args(reward_model, models / "policy", tmp_path, rows, held_out_rows, **flags)
    record = run(reward_model, args, monkeypatch, models)
    number_of = {tuple(ids): n for n, known in enumerate(prompts) for ids, _, _ in known}
    taken = []
    for update in record.updates:
        numbers = {number_of[ids] for ids in update.sequences}
        everything = sorted(tuple(ids) for n in numbers for ids, _, _ in prompts[n])
        assert sorted(update.sequences) == everything, "all of a prompt's, once each"
        taken.append(sorted(numbers))
    check_offline(record, args, taken, list(range(len(prompts))))

    for row, update, numbers in zip(record.rows, record.updates, taken):
        batch = [prompts[n] for n in numbers]
        scores = read_scores(update.exact, batch)
        loss = comparison_loss(args.loss, scores, batch, args.center_coef)
        check_gradient(update, loss)
        expected = comparison_metrics(args.loss, scores, batch, is_held_out=False)
        check_logged(row, {"loss": loss} | expected)

    for row, _, model in evaluations_of(record):
        with torch.no_grad():
            scores = read_scores(model, held_out)
        expected = comparison_metrics(args.loss, scores, held_out, is_held_out=True)
        expected["loss"] = comparison_loss(args.loss, scores, held_out, 0.0)
        if args.loss != "process":
            compared = held_out[: len(HELD_OUT_COMPARED)]
            best = [max(range(len(s)), key=lambda i, s=s: s[i][-1]) for s in scores]
            labels = [[labels[-1] for _, _, labels in known] for known in compared]
            expected["top1_accuracy"] = mean(
                float(each[i] == max(each)) for i, each in zip(best, labels)
            )
            expected["tied_pairs"] = 3 / 8 if args.loss == "outcome" else 1 / 7
            error = binomial_error(expected["accuracy"], len(compared))
            expected["accuracy_stderr"] = error
        read = [number(s) for each in scores for row_scores in each for s in row_scores]
        expected["score_mean"] = mean(read)
        expected["score_std"] = math.sqrt(variance(read))
        check_logged(row, {f"eval/{name}": value for name, value in expected.items()})
        if row is record.before:
            lines = record.samples_before
            assert [x for line in lines for x in line["scores"]] == pytest.approx(read, abs=1e-4)


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


def odds(logp):
    return logp.exp() / (1 - logp.exp())


def preference(policy, reference, pair, args):
    """Loss of a pair, and what is logged of it, by the papers' formulas."""
    prompt, chosen, rejected = pair_ids(pair)
    w, l = (token_log_probs(policy, prompt, ids) for ids in (chosen, rejected))  # noqa: E741
    with torch.no_grad():
        ref_w, ref_l = (token_log_probs(reference, prompt, ids) for ids in (chosen, rejected))
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


def mean_of_each(logged):
    return {name: mean(values[name] for values in logged) for name in logged[0]}


@pytest.mark.parametrize("flags", DPO_FLAGS.values(), ids=DPO_FLAGS)
def test_dpo_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """The gradient of every step, and every metric, with a reference that the policy does not start
    from."""
    rows = pair_rows(PAIRS)
    held_out = pair_rows(HELD_OUT_PAIRS)
    args = offline_args(dpo, models / "policy", tmp_path, rows, held_out, **flags)
    record = run(dpo, args, monkeypatch, models)
    reference = reference_of(models)
    taken = [pairs_of(update) for update in record.updates]
    check_offline(record, args, taken, PAIRS)
    for row, update, pairs in zip(record.rows, record.updates, taken):
        expected = mean_of_each([preference(update.exact, reference, p, args) for p in pairs])
        check_gradient(update, expected["loss"])
        check_logged(row, expected)
        assert ("chosen_logratio" in row) == ("chosen_logratio" in expected)
    for row, calls, policy in evaluations_of(record):
        with torch.no_grad():
            logged = [preference(policy, reference, pair, args) for pair in HELD_OUT_PAIRS]
        expected = {f"eval/{name}": value for name, value in mean_of_each(logged).items()}
        error = binomial_error(expected["eval/accuracy"], len(HELD_OUT_PAIRS))
        check_logged(row, expected | {"eval/accuracy_stderr": error})
        longest = max(len(ids) for pair in HELD_OUT_PAIRS for ids in pair_ids(pair)[1:])
        check_completions(row, calls, longest, policy, reference)


# ---------------------------------------------------------------- rejection_sampling
def best_of(numbers, values, n):
    """Mean value of the best of n, over all subsets of n."""
    subsets = list(itertools.combinations(range(len(numbers)), n))
    return mean(values[max(subset, key=lambda i: (numbers[i], -i))] for subset in subsets)


def selected_of(groups, args):
    """The completions to be trained, of groups of (ids, score, gold)."""
    selected = []
    everything = []
    for group in groups:
        usable = [x for x in group if x.score is not None and x.score >= args.min_score]
        everything += usable
        if usable:
            selected.append(max(usable, key=lambda x: x.score))  # the first in a tie
    if args.select == "top-k":
        return sorted(everything, key=lambda x: -x.score)[: args.select_k]
    return selected


@pytest.mark.parametrize(
    "flags",
    [
        dict(min_score=0.5, max_grad_norm=0.5, weight_decay=0.1),
        dict(min_score=-0.5, select="top-k", select_k=5, max_grad_norm=0.0),
    ],
    ids=["top-per-prompt", "top-k"],
)
def test_rejection_sampling_step_is_the_formula(models, tmp_path, monkeypatch, flags):
    """What each iteration selects and trains, the gradient of every step, and every metric.
    Training is at temperature 1, sampling and the evaluation's KL at --temperature."""
    flags = dict(prompts_per_iteration=5, iterations=3, epochs=2, batch_size=3) | flags
    args = online_args(rejection_sampling, models, tmp_path, **flags)
    record = run(rejection_sampling, args, monkeypatch, models)
    check_evaluations(record, reference_of(models), args)
    calls = [call for call in record.samples if call.is_rollout]
    check_order([tuple(prompt) for call in calls for prompt in call.prompts], prompt_ids(PROMPTS))
    all_rates = [row["learning_rate"] for row in record.rows]
    check_updates(record.updates, args, all_rates, eps=1e-8)
    step = 0
    for iteration, call in enumerate(calls, 1):
        assert (call.num_generations, call.temperature) == (G, args.temperature)
        groups = []
        for i, prompt in enumerate(call.prompts):
            groups.append(
                [
                    SimpleNamespace(
                        ids=(*prompt, *completion),
                        mask=[0] * len(prompt) + [1] * len(completion),
                        score=score_of(prompt, completion),
                        gold=gold_of(prompt, completion),
                    )
                    for completion in call.completions[i * G : (i + 1) * G]
                ]
            )
        selected = selected_of(groups, args)
        num_steps = math.ceil(2 * len(selected) / 3)
        rows = record.rows[step : step + num_steps]
        updates = record.updates[step : step + num_steps]
        assert [row["iteration"] for row in rows] == [iteration] * num_steps
        check_rates([row["learning_rate"] for row in rows], args)
        taken = [update.sequences for update in updates]
        assert sorted(sum(taken, [])) == sorted(2 * [x.ids for x in selected])
        masks = {x.ids: x.mask for x in selected}
        for row, update in zip(rows, updates):
            nlls = [trained_nlls(update.exact, ids, masks[ids]) for ids in update.sequences]
            loss = torch.cat(nlls).mean()
            check_gradient(update, loss)
            check_logged(row, {"loss": loss, "grad_norm": update.norm})
        judged = [x for group in groups for x in group if x.score is not None]
        expected = {
            "score": mean(x.score for x in judged),
            "gold": mean(x.gold for x in judged),
            "selected_score": mean(x.score for x in selected),
            "selected_gold": mean(x.gold for x in selected),
        }
        whole = [group for group in groups if all(x.score is not None for x in group)]
        for n in (1, 2):
            for name in ("score", "gold"):
                expected[f"best_of_{n}/{name}"] = mean(
                    best_of([x.score for x in g], [getattr(x, name) for x in g], n) for g in whole
                )
        check_logged(rows[0], expected)
        assert not any("score" in row for row in rows[1:])
        step += num_steps
    assert step == len(record.rows)
