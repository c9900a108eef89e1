"""Direct preference optimisation (DPO): learn from pairs of answers, of which people prefer
one, in one stage.

    loss = - log sigmoid(beta log pi/pi_ref(chosen) - beta log pi/pi_ref(rejected)), mean over pairs

Rafailov et al. 2023, equation 7. The optimum of RLHF, pi_ref exp(reward / beta) / Z, solved for the
reward, goes into the Bradley-Terry likelihood: no reward model, no sampling. Log-probs are sums
over the completion, EOS included. Its relatives are --loss-type, a line or three each in
preference_loss. Left out: making the pairs, a learnt or scheduled beta, LoRA.

    python dpo.py                     after sft.py: three quarters of a minute, two cores
    python dpo.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset more.jsonl

Data: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike; `margin`
optional. Expect `accuracy` and `margin` to rise from 0.5 and 0, the loss to fall from log 2."""

import math
import numbers
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    PROMPT_COLUMNS,
    BadRow,
    DroppedRow,
    Run,
    all_reduce,
    as_forward,
    check_fit,
    cli,
    clip_gradients,
    completion_text,
    context_of,
    encode_completions,
    fail,
    find_eos_ids,
    generator,
    head_logits,
    in_micro_batches,
    is_due,
    load_examples,
    load_gold,
    load_held_out,
    load_policy,
    load_tokenizer,
    micro_batches,
    pad_rows,
    prompt_of,
    sample,
    setup,
    stream,
    text_or_messages,
)


@dataclass
class Args:
    model: str | None = None
    """directory or Hub id of the model to start from; without it, the laptop run"""
    dataset: str = "sort"
    """the built-in task, a .jsonl or .json file, or a Hub id (name or name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same forms; the built-in task brings its own"""
    prompt_template: str = "{prompt}"
    """how columns make a text prompt: {column} stands for a column"""
    chat_template_kwargs: str | None = None
    """JSON object of variables of the chat template, as {"enable_thinking": false} of Qwen3's; they
    are saved in the template"""
    output_dir: str = "runs/dpo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 5e-7
    """peak, of AdamW (5e-7: Zephyr, Tulu 3)"""
    warmup_steps: int = 10
    """steps of linear warm-up (PyTorch's Adam takes large steps at first)"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """linear, cosine: from the peak down to 0, which would be reached one step after the last;
    constant: at the peak"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm; 0: never (1: the RLHF book)"""
    micro_batch_tokens: int | None = None
    """tokens, with padding, of one forward and backward (16,384 on a GPU, 4,096 on a CPU)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of compute, not of weights: auto is bfloat16 on a GPU that has it, else float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    eval_every: int = 0
    """steps between evaluations; 0: before the first and after the last step only"""
    save_every: int = 100
    """steps between checkpoints; 0: after the last step only"""
    log_every: int = 10
    """steps between lines when the output is not a terminal (metrics.jsonl has every step)"""
    batch_size: int = 64
    """pairs per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    beta: float | None = None
    """of the loss; without it 0.1, for simpo 2, for sigmoid-norm 5 (Rafailov et al.; Hong et al.;
    Meng et al.; Lambert et al.; ipo: TRL)"""
    loss_type: Literal["sigmoid", "sigmoid-norm", "ipo", "simpo", "orpo"] = "sigmoid"
    """preference_loss has the formula and the paper of each; simpo and orpo train without
    reference"""
    label_smoothing: float = 0.0
    """sigmoid, sigmoid-norm: probability that a label is wrong (cDPO, Mitchell 2023)"""
    simpo_margin: float | None = None
    """simpo: how far the chosen reward should lead; without it 1 (Meng et al. 2024)"""
    sft_coef: float = 0.0
    """weight of the chosen completion's NLL per token (Pang et al. 2024, iterative reasoning: 1)"""


# log-probs are means over a completion's tokens for these, as their papers or, for ipo, its authors
# have it
LENGTH_AVERAGED = ("sigmoid-norm", "ipo", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
# ipo's is TRL's, the others their papers'
BETA = {"sigmoid": 0.1, "sigmoid-norm": 5.0, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
SIMPO_MARGIN = 1.0


def preference_example(row, tokenizer, end_id, args):
    """Prompt, chosen, rejected, or chosen and rejected that begin alike; `margin` is optional."""
    chosen = text_or_messages(row, ["chosen"])
    rejected = text_or_messages(row, ["rejected"])
    # UltraFeedback: `prompt` is a text that both conversations repeat as their first message
    repeats_prompt = isinstance(chosen, list) and isinstance(row.get("prompt"), str)
    has_prompt = row.keys() & PROMPT_COLUMNS and not repeats_prompt
    if args.prompt_template != "{prompt}" or has_prompt:
        prompt = prompt_of(row, args)
    else:
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    margin = row.get("margin") or 0.0
    if not (isinstance(margin, numbers.Real) and abs(margin) < 1e9):  # nor NaN
        raise BadRow(f"`margin` must be a number, found {margin!r:.60}")
    prompt_ids, (chosen_ids, rejected_ids) = encode_completions(
        tokenizer,
        prompt,
        [chosen, rejected],
        end_id,
    )
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    if chosen_ids == rejected_ids:
        raise DroppedRow("whose chosen and rejected are the same in tokens")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "margin": float(margin),
    }


def split_shared_prefix(chosen, rejected):
    """chosen and rejected that begin alike -> prompt, chosen, rejected.

    Of messages all equal ones but the last are the prompt; of texts all up to the last "Assistant:"
    that they share (Anthropic's form), or up to the last white space."""
    is_same = [a == b for a, b in zip(chosen, rejected)] + [False]
    cut = is_same.index(False)
    if isinstance(chosen, list):
        cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    else:
        match = re.match(r"(.*\n\nAssistant:)|(.*)(?=\s)", chosen[:cut], re.DOTALL)
        cut = match.end() if match else 0
    if cut == 0:
        raise BadRow(
            "`chosen` and `rejected` do not begin alike, with a prompt (beside a text as `prompt` "
            "they are texts, or conversations that begin with it)"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def completion_batch(prompts, completions, device):
    """Lists of ids -> a batch: a dict of tensors (B, T).

    inputs is all but a sequence's last token, targets all but its first, and mask is 1 where the
    target is a completion's token, EOS included: column t of anything speaks of targets[:, t].
    Masks come from lengths, so that PAD, which is never read, may be any id, EOS too."""
    sequences = [p + c for p, c in zip(prompts, completions)]
    masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]
    return {
        "inputs": pad_rows([ids[:-1] for ids in sequences], device),
        "targets": pad_rows([ids[1:] for ids in sequences], device),
        "attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),
        "mask": pad_rows([mask[1:] for mask in masks], device),
    }


@as_forward
def token_logprobs(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) of softmax(logits / temperature).

    batch: inputs, targets, attention_mask, mask, each (B, T) -> (B, T) float32, in nats, 0 outside
    the mask. Head and softmax run at mask positions only, and where these are many in chunks,
    computed again in the backward pass, so that memory does not grow with B * T * V."""
    mask = batch["mask"].bool()
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state[mask]  # (N, H)
    targets = batch["targets"][mask]  # (N,)

    def logprobs_of(hidden, targets):
        logps = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (n, V) float32
        return logps.gather(-1, targets[:, None])[:, 0]

    chunk = 40_000_000 // model.config.get_text_config().vocab_size
    if len(targets) <= chunk:
        logprobs = logprobs_of(hidden, targets)
    else:
        pairs = zip(hidden.split(chunk), targets.split(chunk))
        logprobs = torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False) for h, t in pairs])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def batch_token_logprobs(model, batch, args, autocast, temperature=1.0):
    """Log-probs of a whole batch, without gradient -> (B, T)."""
    with autocast():
        return in_micro_batches(
            lambda mb: token_logprobs(model, mb, temperature),
            batch,
            args.micro_batch_tokens,
        )


def preference_loss(  # noqa: PLR0917
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
    margin=0.0,
):
    """Losses of B pairs and their implicit rewards, beta * log pi / pi_ref; all (B,). Log-probs, in
    nats, are means over tokens for the loss types in LENGTH_AVERAGED, the reference's 0 for those
    in REFERENCE_FREE.

    With h = chosen reward - rejected reward - margin, s the label smoothing and odds = p / (1 - p):
    sigmoid: - (1-s) log sigmoid(h) - s log sigmoid(-h) (Rafailov et al. 2023, equation 7; s > 0:
        cDPO, Mitchell 2023; a margin: ODPO, Amini et al. 2024)
    sigmoid-norm: the same of means over tokens, so that a longer answer is not preferred for its
        length (Lambert et al. 2024, Tulu 3, equation 6)
    ipo: (difference of log-ratios - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)
    simpo: - log sigmoid(h) (Meng et al. 2024, equation 6)
    orpo: - log pi(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)) (Hong et al. 2024,
        equations 6 and 7; of the answer, where the authors' code has prompt and answer)
    ipo and orpo have no margin. One line away: hinge (SLiC, Zhao et al. 2023), relu(1 - h); robust
    DPO (Chowdhury et al. 2024), sigmoid's with + s for - s and divided by 1 - 2s; REBEL (Gao et al.
    2024), (h - (score of chosen - score of rejected))^2."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    h = chosen_rewards - rejected_rewards - margin
    if loss_type in ("sigmoid", "sigmoid-norm", "simpo"):
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss_type == "ipo":
        difference = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        losses = (difference - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        log_odds_ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
        losses = -chosen_logps - beta * F.logsigmoid(log_odds_ratio)
    else:
        raise ValueError(f"unknown loss type {loss_type}")
    return losses, chosen_rewards, rejected_rewards


def log_odds(logps):
    """log(p / (1 - p)) of log p; any shape, in nats. In 1 - p, log p is held at -1e-6 or
    below: at p = 1 the odds are infinite."""
    return logps - torch.log(-torch.expm1(logps.clamp(max=-1e-6)))


def pair_accuracy(chosen, rejected):
    """1 where chosen > rejected, 0.5 in a tie, else 0: each (B,) -> (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def pair_length(example):
    """Tokens of the longer of the two sequences."""
    return len(example["prompt_ids"]) + max(
        len(example["chosen_ids"]),
        len(example["rejected_ids"]),
    )


def pair_batch(examples, device):
    """B pairs -> a batch of 2B sequences, each chosen one followed by its rejected one. ref_logps,
    margins and weights, those of the mean over pairs, are (2B,), the latter two the same for the
    two of a pair."""
    prompts = []
    completions = []
    ref_logps = []
    margins = []
    for example in examples:
        prompts += [example["prompt_ids"], example["prompt_ids"]]
        completions += [example["chosen_ids"], example["rejected_ids"]]
        ref_logps += example.get("ref_logps", [0.0, 0.0])
        margins += [example["margin"], example["margin"]]
    batch = completion_batch(prompts, completions, device)
    batch["group"] = torch.arange(len(examples), device=device).repeat_interleave(2)
    batch["ref_logps"] = torch.tensor(ref_logps, device=device)
    batch["margins"] = torch.tensor(margins, device=device)
    batch["weights"] = torch.full((len(completions),), 1 / len(examples), device=device)
    return batch


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def of_pairs(values):
    """Values of B pairs side by side (2B,) -> of the chosen ones (B,), of the rejected ones
    (B,)."""
    return values[0::2], values[1::2]


def add_reference(model, examples, args, autocast):
    """The examples with ref_logps: log-probs of chosen and rejected, summed over tokens, in
    nats."""
    ref_logps = []
    for start in range(0, len(examples), 1000):
        batch = pair_batch(examples[start : start + 1000], model.device)
        logprobs = batch_token_logprobs(model, batch, args, autocast)
        ref_logps += logprobs.sum(1).view(-1, 2).tolist()
    return [example | {"ref_logps": logps} for example, logps in zip(examples, ref_logps)]


def pair_losses(logprobs, batch, args):
    """logprobs (2B, T) of a pair_batch -> losses (B,), and what is logged of each pair, a dict of
    (B,)."""
    logps = logprobs.sum(1)  # (2B,)
    ref_logps = batch["ref_logps"]
    lengths = batch["mask"].sum(1).clamp(min=1)
    scale = lengths if args.loss_type in LENGTH_AVERAGED else 1
    chosen_logps, rejected_logps = of_pairs(logps / scale)
    ref_chosen_logps, ref_rejected_logps = of_pairs(ref_logps / scale)
    margins, _ = of_pairs(batch["margins"])
    if args.loss_type == "simpo":
        margins = margins + (SIMPO_MARGIN if args.simpo_margin is None else args.simpo_margin)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        BETA[args.loss_type] if args.beta is None else args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        margin=margins,
    )
    chosen_nll, _ = of_pairs(-logps / lengths)
    losses = losses + args.sft_coef * chosen_nll

    # the chosen reward often falls with the rejected one: the loss sees only their difference, and
    # the two share most of their tokens. It is no harm while the margin grows and samples stay
    # good; it is when eval/kl runs away or samples get worse: the mass has gone to answers in
    # neither (Razin et al. 2024)
    logged = {
        "loss": losses,
        "accuracy": pair_accuracy(chosen_rewards, rejected_rewards),
        "margin": chosen_rewards - rejected_rewards,
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
    }
    if args.loss_type not in REFERENCE_FREE:
        chosen_logratio, rejected_logratio = of_pairs(logps - ref_logps)
        logged["chosen_logratio"] = chosen_logratio
        logged["rejected_logratio"] = rejected_logratio
    return losses, logged


@torch.no_grad()
def complete_prompts(policy, examples, longest, *, gold, tokenizer, eos_ids, args, autocast):
    """A greedy and a sampled completion, of `longest` tokens at most, of each held-out prompt ->
    the sampled ones, metrics (how many are right, how many of the sampled ones stop), and a row for
    each prompt with the sampled one."""
    prompts = [example["prompt_ids"] for example in examples]
    room = context_of(policy.config) - max(map(len, prompts))
    metrics = {}
    # the sampled completions come second: what follows the loop is about them
    for suffix, temperature in [("_greedy", 0.0), ("", 1.0)]:
        with autocast():
            completions = sample(
                policy,
                prompts,
                num_generations=1,
                max_new_tokens=min(longest, room),
                temperature=temperature,
                eos_ids=eos_ids,
                rng=generator(args.seed, "evaluate"),
            )
        if gold is not None:
            golds = gold(examples, completions)
            metrics[f"eval/gold{suffix}"] = golds.mean()
    metrics["eval/eos_rate"] = sum(ids[-1] in eos_ids for ids in completions) / len(completions)
    metrics["eval/completion_length"] = sum(map(len, completions)) / len(completions)

    rows = []
    for i, example in enumerate(examples):
        text = completion_text(tokenizer, example["prompt_ids"], completions[i])
        row = {"prompt": example["prompt"], "completion": text}
        if gold is not None:
            row["gold"] = golds[i].item()
        rows.append(row)
    return completions, metrics, rows


@torch.no_grad()
def evaluate_preferences(policy, examples, *, gold, tokenizer, eos_ids, args, autocast):
    """Of held-out pairs what training logs, with the accuracy's binomial standard error; what
    complete_prompts says of the first 500 prompts; the KL of the sampled completions from the
    reference, in nats -> metrics, rows."""
    totals = Counter()
    for start in range(0, len(examples), 1000):
        batch = pair_batch(examples[start : start + 1000], policy.device)
        logprobs = batch_token_logprobs(policy, batch, args, autocast)
        _, logged = pair_losses(logprobs, batch, args)
        for name, values in logged.items():
            totals[name] += values.sum().item()
    metrics = {f"eval/{name}": total / len(examples) for name, total in totals.items()}
    accuracy = metrics["eval/accuracy"]
    metrics["eval/accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / len(examples))

    longest = max(pair_length(example) - len(example["prompt_ids"]) for example in examples)
    examples = examples[:500]
    completions, more_metrics, rows = complete_prompts(
        policy,
        examples,
        longest,
        gold=gold,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        args=args,
        autocast=autocast,
    )
    metrics |= more_metrics
    batch = completion_batch(
        [example["prompt_ids"] for example in examples],
        completions,
        policy.device,
    )
    logprobs = batch_token_logprobs(policy, batch, args, autocast)
    ref_logprobs = batch_token_logprobs(
        load_policy(args.model, policy.device),
        batch,
        args,
        autocast,
    )
    metrics["eval/kl"] = (logprobs - ref_logprobs).sum(1).mean()
    return metrics, rows


def main(args):
    device, autocast = setup(args)
    if args.label_smoothing and not args.loss_type.startswith("sigmoid"):
        fail(f"--label-smoothing is for sigmoid and sigmoid-norm, not {args.loss_type}")
    if args.simpo_margin is not None and args.loss_type != "simpo":
        fail(f"--simpo-margin is for --loss-type simpo, not {args.loss_type}")
    if args.beta is not None and args.beta <= 0:
        fail(f"--beta {args.beta}: it must be above 0")
    if not 0 <= args.label_smoothing <= 0.5:
        fail(f"--label-smoothing {args.label_smoothing}: it must be from 0 to 0.5")

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model)
    examples = load_examples(args.dataset, preference_example, tokenizer, args)
    held_out = load_held_out(preference_example, tokenizer, args)
    longest = max(map(pair_length, examples + held_out))
    check_fit(
        args.model,
        "--model",
        examples=examples + held_out,
        tokens=longest,
        lengths="--max-length",
    )
    gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer, eos_ids)
    num_margins = sum(example["margin"] != 0 for example in examples)
    if num_margins and args.loss_type in ("ipo", "orpo"):
        print(f"{num_margins} rows have a `margin`, which --loss-type {args.loss_type} leaves out")
    elif num_margins:
        print(f"{num_margins} rows have a `margin`, taken off h (ODPO, Amini et al. 2024)")

    # the reference's log-probs change no more: they are taken once, and its weights go
    if args.loss_type not in REFERENCE_FREE:
        reference = load_policy(args.model, device)
        examples = add_reference(reference, examples, args, autocast)
        held_out = add_reference(reference, held_out, args, autocast)
        del reference
    policy = load_policy(
        args.model,
        device,
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    if args.steps is not None:
        if args.steps > steps:
            print(f"--steps {args.steps}: the run ends after {steps}, which are all --epochs")
        steps = min(steps, args.steps)
    run = Run(args, models, optimizer, steps, examples)

    def held_out_metrics(step):
        metrics, rows = evaluate_preferences(
            policy,
            held_out,
            gold=gold,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            args=args,
            autocast=autocast,
        )
        run.log_samples(step, rows)
        return metrics

    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, held_out_metrics(0))
    for step in range(start, steps):
        # take the next pairs, in an order of its own for every epoch
        began = time.time()
        first_row = step * args.batch_size
        stop_row = min(first_row + args.batch_size, args.epochs * len(examples))
        batch = pair_batch(stream(examples, args.seed, first_row, stop_row), device)

        # update: one normaliser for the whole batch, however it is cut into micro-batches
        totals = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            with autocast():
                mb_logprobs = token_logprobs(policy, mb)
            losses, logged = pair_losses(mb_logprobs, mb, args)
            mb_weights, _ = of_pairs(mb["weights"])
            loss = (mb_weights * losses).sum()
            loss.backward()
            for name, values in logged.items():
                totals[name] += (mb_weights * values.detach()).sum()
            totals["padded_tokens"] += mb["inputs"].numel()
        learning_rate = scheduled_learning_rate(step, steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        if not grad_norm.isfinite():
            fail(f"step {step + 1}: the gradient's norm is {grad_norm}; no update was made")
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        seconds = time.time() - began
        batch_tokens = batch["attention_mask"].sum()
        totals = {name: all_reduce(total) for name, total in totals.items()}
        metrics = {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "padding": 1 - batch_tokens / totals.pop("padded_tokens"),
            "tokens_per_second": batch_tokens / seconds,
            "seconds/train": seconds,
        }
        metrics = totals | metrics
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= held_out_metrics(step + 1)
        run.log(
            step + 1,
            metrics,
            show=["loss", "accuracy", "margin", "chosen_reward", "rejected_reward"],
        )
        run.checkpoint_if_due(step + 1)
    logs = "samples.jsonl" if held_out else "metrics.jsonl"
    run.finish(policy, tokenizer, eos_ids, f"look at {args.output_dir}/{logs}")
    return metrics


if __name__ == "__main__":
    laptop = dict(
        model="runs/sft",
        steps=600,
        batch_size=32,
        learning_rate=1e-4,
        warmup_steps=20,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
