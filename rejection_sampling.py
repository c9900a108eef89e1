"""Rejection sampling, or best-of-N fine-tuning: sample, keep what scores best, train on it as in
sft.py.

    loss = - sum over tokens of the kept completions of log pi(token | what stands before it) /
    number of those tokens

Nakano et al. 2021 (best of N), Touvron et al. 2023 (Llama 2, section 3.2.3), Dong et al. 2023
(RAFT: several --iterations, each from the policy of the one before). N completions of each of M
prompts are scored; of the M x N scores the best of each row is kept, or the k best of all. The
controls keep as many at random: only against them can one say that selection did anything, since
training on one's own samples at a temperature below 1 sharpens a policy by itself. The rollouts
also give best-of-N without any training, with a bound on its KL, and each prompt's solve rate. Left
out: data of earlier iterations (Llama 2 mixes it in), LoRA.

    python rejection_sampling.py      after sft.py and reward_model.py: 90 seconds, two cores
    python rejection_sampling.py --model runs/my_sft --reward runs/my_reward_model \\
        --dataset prompts.jsonl

Data: rows of prompt, and any columns that a checker reads. Expect one iteration to raise
`eval/score` by a part of what best-of-N promises. rollouts.jsonl holds all that was sampled, with
scores."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    DroppedRow,
    Run,
    all_reduce,
    as_forward,
    check_fit,
    cli,
    clip_gradients,
    completion_text,
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
    load_rewards,
    load_tokenizer,
    micro_batches,
    on_first_rank,
    pad_rows,
    prompt_of,
    read_rows,
    sample,
    setup,
    stream,
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
    output_dir: str = "runs/rejection_sampling"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 2e-5
    """peak, of AdamW (2e-5: Touvron et al. 2023 for SFT)"""
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
    """sequences per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    reward: str | None = None
    """a reward model (directory or Hub id), a checker (sort, gsm8k), or path/file.py:function;
    several, an ensemble, with commas between"""
    reward_combine: Literal["mean", "min", "mean-minus-std"] = "mean"
    """how several rewards, commas between, make one score (Coste et al. 2023)"""
    reward_std_coef: float = 1.0
    """standard deviations that mean-minus-std takes off the mean"""
    num_generations: int = 16
    """completions of each prompt, N"""
    max_prompt_length: int = 512
    """tokens of a prompt; longer ones are dropped and counted"""
    max_completion_length: int = 256
    """tokens of a completion; one without EOS by then is cut, and counts as unfinished"""
    temperature: float = 0.8
    """of sampling; training is at 1, so that a lower one sharpens the policy"""
    select: Literal["top-per-prompt", "top-k", "random-per-prompt", "random-k"] = "top-per-prompt"
    """the best completion of each prompt, the --select-k best of all, or as many at random: the
    controls"""
    select_k: int | None = None
    """completions that top-k and random-k keep (equal ones of a prompt count once)"""
    min_score: float | None = None
    """completions with a lower score are not selected, by the controls neither"""
    prompts_per_iteration: int | None = None
    """prompts of one iteration, the next ones of the shuffled data; without it all of them"""
    iterations: int = 1
    """rounds of sampling from the current policy, selecting and training (RAFT: more than 1)"""


def prompt_example(row, tokenizer, end_id, args):
    """A prompt; the further columns are the checker's."""
    prompt = prompt_of(row, args)
    prompt_ids, _ = encode_completions(tokenizer, prompt, [], end_id)
    if len(prompt_ids) > args.max_prompt_length:
        raise DroppedRow(f"longer than --max-prompt-length {args.max_prompt_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids}


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


def sft_loss(logprobs, weights):
    """- sum of weights * logprobs; with weights = mask / number of trained tokens of the whole
    batch, their mean NLL. logprobs, weights (B, T) -> scalar, nats per token."""
    return -(weights * logprobs).sum()


def select_top_per_prompt(rewards):
    """rewards (M, N), NaN where there is no score -> (M,) the column of each row's best, the lower
    one in a tie, -1 where the row has no score."""
    best = rewards.masked_fill(rewards.isnan(), -torch.inf).argmax(1)
    return best.masked_fill(rewards.isnan().all(1), -1)


def select_top_k(rewards, k):
    """rewards (M, N), NaN where there is no score -> (k,) flat indices of the k best of all, best
    first, the lower one first in a tie."""
    flat = rewards.flatten()
    flat = flat.masked_fill(flat.isnan(), -torch.inf)
    return flat.sort(descending=True, stable=True).indices[:k]


def best_of_n(scores, values):
    """Best of N without training: what `values` of the best-scored of N completions is on average,
    for N = 1, 2, 4, ... up to n. scores, values (n,), no NaN -> {N: mean}.

    Unbiased, the mean over all subsets of N: with scores in ascending order, the i-th (from 0) is
    the best of comb(i, N-1) of the comb(n, N) subsets. In a tie the lower index wins."""
    n = len(scores)
    # flipped, so that of equal scores the lower index comes last
    ascending = scores.flip(0).sort(stable=True).indices
    ranked_values = values.flip(0)[ascending].tolist()
    curve = {}
    for N in [2**i for i in range(n.bit_length())]:
        # (a whole number over a whole number first: alone they can be beyond any float)
        shares = [math.comb(i, N - 1) / math.comb(n, N) for i in range(n)]
        curve[N] = sum(share * value for share, value in zip(shares, ranked_values))
    return curve


def best_of_n_metrics(scores, values, name):
    """Means of best_of_n over the rows of scores (M, n) that have no NaN, and in nats the bound log
    N - (N-1)/N on the KL of best-of-N from the policy that was sampled (Beirami et al. 2024)."""
    is_known = ~scores.isnan().any(1)
    curves = [best_of_n(s, v) for s, v in zip(scores[is_known], values[is_known])]
    metrics = {}
    for N in curves[0] if curves else ():
        metrics[f"best_of_{N}/{name}"] = sum(curve[N] for curve in curves) / len(curves)
        metrics[f"best_of_{N}/kl_bound"] = math.log(N) - (N - 1) / N
    return metrics


def combine_scores(member_scores, args):
    """Scores of the k members of an ensemble (k, B) -> (B,), by --reward-combine: their mean, the
    lowest, or the mean less --reward-std-coef standard deviations (Coste et al. 2023, section 3:
    mean, worst-case and uncertainty-weighted optimisation; they take off the variance). Members
    must share their zero and their scale, or the lowest is always the same one."""
    mean = member_scores.mean(0)
    if args.reward_combine == "min":
        return member_scores.amin(0)
    if args.reward_combine == "mean-minus-std":
        return mean - args.reward_std_coef * member_scores.std(0, correction=0)
    return mean


def member_metrics(member_scores):
    """What the members of an ensemble say, (k, B) -> metrics; of a single one none."""
    if len(member_scores) == 1:
        return {}
    metrics = {f"score/{i}": scores.nanmean() for i, scores in enumerate(member_scores, 1)}
    metrics["disagreement"] = member_scores.std(0, correction=0).nanmean()
    return metrics


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def nan_to_null(values):
    """A list as JSON can have it."""
    return [None if math.isnan(x) else x for x in values]


def null_to_nan(rows):
    """Lists of equal length, from JSON -> tensor (rows, values)."""
    return torch.tensor([[math.nan if x is None else x for x in values] for values in rows])


CHUNK = 64  # prompts that are sampled, scored and written at a time


def roll_out(
    policy, examples, iteration, run, *, ensemble, gold, tokenizer, eos_ids, args, autocast
):
    """Sample and score N completions of each prompt -> one record a prompt, as rollouts.jsonl has
    them.

    What that file holds of this iteration, from before a --resume, is read, whatever --reward or
    --temperature are now; a chunk that was cut off is sampled again. A score is None where the
    reward cannot judge."""
    records = on_first_rank(lambda: read_rows(run.dir / "rollouts.jsonl"))
    earlier = [record for record in records if record["iteration"] < iteration]
    records = [record for record in records if record["iteration"] == iteration]
    if len(records) < len(examples):
        records = records[: len(records) // CHUNK * CHUNK]
        run.rewrite("rollouts.jsonl", earlier + records)
    N = args.num_generations
    for record in records:
        sampled = len(record["ids"])
        if sampled != N:
            fail(f"--num-generations {N}: --resume found rollouts of {sampled} each; give that")
    for first in range(len(records), len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        with autocast():
            completions = sample(
                policy,
                [example["prompt_ids"] for example in chunk],
                num_generations=N,
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature,
                eos_ids=eos_ids,
                rng=generator(args.seed, "sample", iteration, first),
            )
        repeated = [example for example in chunk for _ in range(N)]
        member_scores = torch.stack([member(repeated, completions) for member in ensemble])
        scores = combine_scores(member_scores, args).tolist()
        golds = [math.nan] * len(scores) if gold is None else gold(repeated, completions).tolist()
        for i, example in enumerate(chunk):
            row_ids = completions[i * N : (i + 1) * N]
            row_scores = scores[i * N : (i + 1) * N]
            row_golds = golds[i * N : (i + 1) * N]
            row_members = member_scores[:, i * N : (i + 1) * N].tolist()
            records.append(
                {
                    "iteration": iteration,
                    "row": example["row"],
                    "completions": [
                        completion_text(tokenizer, example["prompt_ids"], ids) for ids in row_ids
                    ],
                    "scores": nan_to_null(row_scores),
                    "member_scores": [nan_to_null(values) for values in row_members],
                    "gold": nan_to_null(row_golds),
                    "solve_rate": sum(row_golds) / N,
                    "finished": [ids[-1] in eos_ids for ids in row_ids],
                    "ids": row_ids,
                }
            )
        run.append("rollouts.jsonl", records[first:])
        done = f"{len(records)} of {len(examples)} prompts of iteration {iteration + 1}"
        run.bar.set_postfix_str(f"sampled {done}")
        if run.is_interrupted():
            run.exit(done)
    return records


def select(rewards, ids, iteration, args):
    """Choose what to train on: rewards (M, N), NaN where there is no score, and the completions'
    ids, M lists of N -> (row, column) of each. The controls choose by random numbers, and are the
    same otherwise."""
    if args.min_score is not None:
        rewards = rewards.masked_fill(rewards < args.min_score, math.nan)
    num_usable = int((~rewards.isnan()).sum())
    num_wanted = args.select_k or 1
    if num_usable < num_wanted:
        fail(f"{num_usable} completions have a usable score, and at least {num_wanted} are wanted")
    noise = torch.rand(rewards.shape, generator=generator(args.seed, "select", iteration))
    noise = noise.masked_fill(rewards.isnan(), math.nan)
    if args.select in ("top-per-prompt", "random-per-prompt"):
        columns = select_top_per_prompt(rewards if args.select == "top-per-prompt" else noise)
        return [(row, column) for row, column in enumerate(columns.tolist()) if column >= 0]
    selected = distinct(select_top_k(rewards, args.select_k), ids)
    if args.select == "random-k":  # as many as top-k keeps
        selected = distinct(select_top_k(noise, num_usable), ids)[: len(selected)]
    return selected


def distinct(flat, ids):
    """Flat indices of (M, N) -> (row, column) of each; of equal completions of a row the first
    only."""
    pairs = {}
    for index in flat.tolist():
        row, column = divmod(index, len(ids[0]))
        pairs.setdefault((row, tuple(ids[row][column])), (row, column))
    return list(pairs.values())


def fine_tune(
    policy,
    optimizer,
    examples,
    run,
    *,
    iteration,
    first_step,
    start,
    log_first,
    held_out_metrics,
    args,
    autocast,
):
    """sft.py on the selected completions, with a learning rate schedule of its own -> steps done at
    its end, metrics of the last step. Steps before `start` were made before the run was resumed;
    the metrics `log_first` are of the first step."""
    steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    if args.steps is not None:
        steps = min(steps, args.steps - first_step)
    metrics = {}
    for step in range(max(start, first_step), first_step + steps):
        # take the next completions, in an order of its own for every epoch
        began = time.time()
        first_row = (step - first_step) * args.batch_size
        stop_row = min(first_row + args.batch_size, args.epochs * len(examples))
        batch_examples = stream(examples, f"{args.seed}/{iteration}", first_row, stop_row)
        batch = completion_batch(
            [example["prompt_ids"] for example in batch_examples],
            [example["completion_ids"] for example in batch_examples],
            policy.device,
        )

        # update: one normaliser for the whole batch, however it is cut into micro-batches
        batch["weights"] = batch["mask"] / batch["mask"].sum()
        totals = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            with autocast():
                mb_logprobs = token_logprobs(policy, mb)
            loss = sft_loss(mb_logprobs, mb["weights"])
            loss.backward()
            totals["loss"] += loss.detach()
            totals["padded_tokens"] += mb["inputs"].numel()
        learning_rate = scheduled_learning_rate(step - first_step, steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        if not grad_norm.isfinite():
            fail(f"step {step + 1}: the gradient's norm is {grad_norm}; no update was made")
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        seconds = time.time() - began
        batch_tokens = batch["attention_mask"].sum()
        metrics = {
            "loss": all_reduce(totals["loss"]),
            "iteration": iteration + 1,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "padding": 1 - batch_tokens / all_reduce(totals["padded_tokens"]),
            "tokens_per_second": batch_tokens / seconds,
            "seconds/train": seconds,
        }
        if step == first_step:
            metrics |= log_first
        is_last = step + 1 == first_step + steps
        is_evaluation_due = is_last or is_due(args.eval_every, step + 1, run.steps)
        if held_out_metrics is not None and is_evaluation_due:
            metrics |= held_out_metrics(step + 1)
        run.log(step + 1, metrics, show=["iteration", "loss", "grad_norm", "tokens_per_second"])
        # an iteration ends with a checkpoint, since the next one samples from its policy
        run.checkpoint_if_due(step + 1, is_last=is_last)
    return first_step + steps, metrics


@torch.no_grad()
def evaluate_policy(policy, examples, *, ensemble, gold, tokenizer, eos_ids, args, autocast):
    """One greedy and G sampled completions of each held-out prompt -> metrics, and a row for each
    prompt with its first sampled completion: their scores, the share that ends in EOS, tokens, and
    the KL from the model at the start in nats per completion."""
    prompts = [example["prompt_ids"] for example in examples]
    metrics = {}
    # the sampled completions come second: what follows the loop is about them
    for suffix, num_generations, temperature in [
        ("_greedy", 1, 0.0),
        ("", args.num_generations, args.temperature),
    ]:
        with autocast():
            completions = sample(
                policy,
                prompts,
                num_generations=num_generations,
                max_new_tokens=args.max_completion_length,
                temperature=temperature,
                eos_ids=eos_ids,
                rng=generator(args.seed, "evaluate"),
            )
        repeated = [example for example in examples for _ in range(num_generations)]
        member_scores = torch.stack([member(repeated, completions) for member in ensemble])
        numbers = {"score": combine_scores(member_scores, args)}
        if gold is not None:
            numbers["gold"] = gold(repeated, completions)
        for name, values in numbers.items():
            metrics[f"eval/{name}{suffix}"] = values.nanmean()
    if gold is not None and args.num_generations > 1:
        solved = numbers["gold"].view(-1, args.num_generations).amax(1)
        metrics[f"eval/pass@{args.num_generations}"] = solved.nanmean()
    metrics["eval/eos_rate"] = sum(ids[-1] in eos_ids for ids in completions) / len(completions)

    batch = completion_batch(
        [example["prompt_ids"] for example in repeated],
        completions,
        policy.device,
    )
    logprobs = batch_token_logprobs(policy, batch, args, autocast, args.temperature)
    reference = load_policy(args.model, policy.device)
    ref_logprobs = batch_token_logprobs(reference, batch, args, autocast, args.temperature)
    numbers["kl"] = (logprobs - ref_logprobs).sum(1)
    metrics["eval/kl"] = numbers["kl"].mean()
    metrics["eval/completion_length"] = batch["mask"].sum(1).float().mean()

    rows = []
    for i, example in enumerate(examples):
        first = i * args.num_generations
        text = completion_text(tokenizer, example["prompt_ids"], completions[first])
        row = {"prompt": example["prompt"], "completion": text}
        rows.append(row | {name: values[first].item() for name, values in numbers.items()})
    return metrics, rows


def main(args):
    device, autocast = setup(args)
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature}: logits are divided by it; it must be above 0")
    if (args.select in ("top-k", "random-k")) != (args.select_k is not None):
        fail(f"--select {args.select}, --select-k {args.select_k}: only top-k and random-k need it")

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model)
    examples = load_examples(args.dataset, prompt_example, tokenizer, args)
    held_out = load_held_out(prompt_example, tokenizer, args)
    longest_prompt = max(len(example["prompt_ids"]) for example in examples + held_out)
    check_fit(
        args.model,
        "--model",
        examples=examples + held_out,
        tokens=longest_prompt + args.max_completion_length,
        lengths="--max-prompt-length or --max-completion-length",
    )

    # load the models
    ensemble = load_rewards(
        args,
        examples + held_out,
        tokenizer,
        eos_ids,
        device=device,
        autocast=autocast,
    )
    gold = load_gold(args, args.dataset, tokenizer, eos_ids)
    eval_gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer, eos_ids)
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
    M = args.prompts_per_iteration or len(examples)
    N = args.num_generations
    if args.select_k is not None and not 1 <= args.select_k <= M * N:
        fail(f"--select-k is {args.select_k}, and an iteration has {M * N} completions")
    # (fewer if some prompts have no score)
    steps = args.iterations * math.ceil(args.epochs * (args.select_k or M) / args.batch_size)
    if args.steps is not None:
        if args.steps > steps:
            print(f"--steps {args.steps}: the run ends after {steps}, which are all --iterations")
        steps = min(steps, args.steps)
    # (the order too: rollouts.jsonl is of these prompts)
    order = stream(examples, args.seed, 0, M)
    run = Run(args, models, optimizer, steps, examples + order)

    def held_out_metrics(step):
        metrics, rows = evaluate_policy(
            policy,
            held_out,
            ensemble=ensemble,
            gold=eval_gold,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            args=args,
            autocast=autocast,
        )
        run.log_samples(step, rows)
        return metrics

    metrics = {}
    step = 0
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, held_out_metrics(0))
    for iteration in range(args.iterations):
        # take the next M prompts, in an order of its own for every pass over the data
        began = time.time()
        prompts = stream(examples, args.seed, iteration * M, (iteration + 1) * M)

        # sample N completions of each and score them
        records = roll_out(
            policy,
            prompts,
            iteration,
            run,
            ensemble=ensemble,
            gold=gold,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            args=args,
            autocast=autocast,
        )
        sampling_seconds = time.time() - began
        ids = [record["ids"] for record in records]
        rewards = null_to_nan([record["scores"] for record in records])  # (M, N)
        golds = null_to_nan([record["gold"] for record in records])
        member_scores = torch.cat([null_to_nan(x["member_scores"]) for x in records], 1)  # (k, M*N)

        # select some of them
        pairs = select(rewards, ids, iteration, args)
        selected = [prompts[row] | {"completion_ids": ids[row][column]} for row, column in pairs]
        rows, columns = torch.tensor(pairs).T
        selection = {
            "score": rewards.nanmean(),
            "selected_score": rewards[rows, columns].mean(),
            "seconds/sample": sampling_seconds,
        }
        selection |= best_of_n_metrics(rewards, rewards, "score")
        selection |= member_metrics(member_scores)
        if gold is not None:
            selection["gold"] = golds[~rewards.isnan()].mean()  # of those behind `score`
            selection["selected_gold"] = golds[rows, columns].mean()
            selection |= best_of_n_metrics(rewards, golds, "gold")
        without_score = int(rewards.isnan().all(1).sum())
        print(
            f"iteration {iteration + 1}: {len(pairs)} of {M * N} completions selected; "
            f"{without_score} of {M} prompts without a score"
        )

        # train on them
        step, last_metrics = fine_tune(
            policy,
            optimizer,
            selected,
            run,
            iteration=iteration,
            first_step=step,
            start=start,
            log_first=selection,
            held_out_metrics=held_out_metrics if held_out else None,
            args=args,
            autocast=autocast,
        )
        metrics = last_metrics or metrics
        if step == args.steps:
            break
    run.finish(
        policy,
        tokenizer,
        eos_ids,
        f"look at {args.output_dir}/rollouts.jsonl",
    )
    return metrics


if __name__ == "__main__":
    laptop = dict(
        model="runs/sft",
        reward="runs/reward_model",
        prompts_per_iteration=2000,
        iterations=3,
        epochs=4,
        max_completion_length=10,
        batch_size=32,
        learning_rate=3e-4,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
