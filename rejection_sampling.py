"""Rejection sampling, or best-of-N fine-tuning: sample, keep the best, fine-tune on it.

    loss = -sum over tokens of the selected completions of log pi(token | previous tokens) / number
    of these tokens

Nakano et al. 2021 (best of N), Touvron et al. 2023 (Llama 2, section 3.2.3), Dong et al. 2023
(RAFT: several --iterations, each starting from the policy of the previous one). N completions of
each of M prompts are scored. The best of each prompt, or the k best of all, are selected. Compare
with --select random: fine-tuning on any of the policy's samples at a temperature below 1 sharpens
it. The rollouts also give best-of-N without training, with a bound on its KL, and the solve
rate of each prompt. Not included: samples of earlier iterations (Llama 2 mixes them in), LoRA.

    python rejection_sampling.py      demo, after sft.py and reward_model.py: 90 seconds
    python rejection_sampling.py --model runs/my_sft --reward runs/my_reward_model \\
        --dataset prompts.jsonl

Data: rows with a prompt, and any columns a reward function reads. Expect an iteration to raise
`eval/score` by a fraction of the gain of best-of-N. rollouts.jsonl holds all samples and scores."""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    Run,
    all_reduce,
    broadcast_from_rank0,
    check_fit,
    cli,
    clip_gradients,
    completion_text,
    fail,
    generator,
    head_logits,
    hidden_states,
    in_micro_batches,
    is_due,
    load_examples,
    load_gold,
    load_held_out,
    load_policy,
    load_reward,
    load_tokenizer,
    micro_batches,
    model_forward,
    pad_rows,
    prompt_example,
    sample,
    setup,
    shuffled_examples,
)


@dataclass
class Args:
    select: Literal["top", "random"] = "top"
    """completions to train on: the best, or random ones for comparison"""
    select_per_prompt: int = 1
    """completions selected per prompt (Llama 2: 1)"""
    select_k: int | None = None
    """completions selected of all prompts together, instead of --select-per-prompt"""
    min_score: float | None = None
    """completions with a lower score are never selected"""
    prompts_per_iteration: int | None = None
    """prompts per iteration, M (default: all)"""
    iterations: int = 1
    """rounds of sampling, selection and fine-tuning (RAFT: several)"""
    # shared by the scripts that sample
    reward: str | None = None
    """reward model, sort, gsm8k or file.py:function; comma-separated: an ensemble"""
    reward_combine: Literal["mean", "min", "mean-minus-std"] = "mean"
    """ensemble aggregation (Coste et al. 2023)"""
    reward_std_coef: float = 1.0
    """standard deviations that mean-minus-std subtracts (with two members, 1 gives min)"""
    num_generations: int = 16
    """completions per prompt, N"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; longer completions are cut and count as unfinished"""
    temperature: float = 0.8
    """sampling temperature; training uses 1, so below 1 sharpens the policy"""
    batch_size: int = 64
    """sequences per optimizer step"""
    epochs: int = 1
    """passes over the data"""
    # shared by all scripts
    model: str | None = None
    """directory or Hub id to start from (default: the tiny demo model)"""
    dataset: str = "sort"
    """sort (built in), a .jsonl or .json file, or a Hub id (name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same formats (sort brings its own)"""
    prompt_template: str = "{prompt}"
    """text prompt from columns, such as "Q: {question} A:" """
    output_dir: str = "runs/rejection_sampling"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimizer steps at most (default: until --iterations ends)"""
    learning_rate: float = 2e-5
    """peak learning rate of AdamW (Touvron et al. 2023 for SFT: 2e-5)"""
    warmup_steps: int = 10
    """steps of linear warmup"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """decay after warmup: to 0, linearly or by cosine, or none"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """maximum gradient norm; 0: no clipping (RLHF book: 1)"""
    micro_batch_tokens: int | None = None
    """padded tokens per forward pass (default: 16,384 on GPU, 1,024 on CPU)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; weights stay float32 (auto: bfloat16 if supported)"""
    gradient_checkpointing: bool = False
    """recompute activations: less memory, a third more time"""
    eval_every: int = 0
    """steps between evaluations; 0: only before and after training"""
    save_every: int = 100
    """steps between checkpoints; 0: only after the last step"""
    log_every: int = 10
    """steps between printed lines if the output is not a terminal"""


def completion_batch(rollouts, device):
    """Make a batch, a dict of (B, T) tensors, from prompt_ids and completion_ids.

    inputs is all but the last token of each sequence, targets all but the first. mask is 1 where
    the target is a completion token, EOS included. Column t of every (B, T) tensor refers to
    targets[:, t]. Masks come from lengths, so PAD may be any id, even EOS."""
    sequences = [x["prompt_ids"] + x["completion_ids"] for x in rollouts]
    masks = [[0] * len(x["prompt_ids"]) + [1] * len(x["completion_ids"]) for x in rollouts]
    return {
        "inputs": pad_rows([ids[:-1] for ids in sequences], device),
        "targets": pad_rows([ids[1:] for ids in sequences], device),
        "attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),
        "mask": pad_rows([mask[1:] for mask in masks], device),
        "prompt_length": torch.tensor([len(x["prompt_ids"]) for x in rollouts], device=device),
    }


@model_forward
def token_logprobs(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) in nats, with pi = softmax(logits / temperature).

    The result is float32 and 0 outside the mask. The LM head runs on masked positions only, in
    checkpointed chunks, so memory does not scale with B * T * V.
    Shapes: batch of (B, T) -> (B, T)."""
    mask = batch["mask"].bool()
    hidden = hidden_states(model, batch)  # (N, H)
    targets = batch["targets"][mask]  # (N,)

    def chunk_logprobs(hidden, targets):
        log_softmax = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (n, V) float32
        return log_softmax.gather(-1, targets[:, None])[:, 0]

    chunk = 40_000_000 // model.config.get_text_config().vocab_size
    if len(targets) <= chunk:
        logprobs = chunk_logprobs(hidden, targets)
    else:
        chunks = [
            checkpoint(chunk_logprobs, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk))
        ]
        logprobs = torch.cat(chunks)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def nll_loss(logprobs, weights):
    """Negative log-likelihood: -sum of weights * logprobs, in nats per token.

    The weights are mask / number of trained tokens in the whole batch.
    Shapes: (B, T), (B, T) -> scalar."""
    return -(weights * logprobs).sum()


def select_top_per_prompt(rewards):
    """Column of the best reward of each row, the lower one in a tie, -1 if a row has none.

    Shapes: rewards (M, N), NaN where there is no score -> (M,)."""
    best = rewards.masked_fill(rewards.isnan(), -torch.inf).argmax(1)
    return best.masked_fill(rewards.isnan().all(1), -1)


def select_top_k(rewards, k):
    """Flat indices of the k best rewards, best first, the lower one first in a tie.

    Shapes: rewards (M, N), NaN where there is no score -> (k,)."""
    flat = rewards.flatten()
    flat = flat.masked_fill(flat.isnan(), -torch.inf)
    return flat.sort(descending=True, stable=True).indices[:k]


def best_of_n(scores, values):
    """Mean value of the best-scored of N completions, for N = 1, 2, 4, ... up to n.

    Unbiased: the mean over all subsets of size N. With scores in ascending order, the i-th (from
    0) is the best of comb(i, N-1) of the comb(n, N) subsets. In a tie the lower index wins.
    Shapes: scores (n,), values (n,) -> {N: mean}."""
    n = len(scores)
    # flipped, so of equal scores the lower index comes last
    ascending = scores.flip(0).sort(stable=True).indices
    ranked_values = values.flip(0)[ascending].tolist()
    curve = {}
    for N in [2**i for i in range(n.bit_length())]:
        # divide integers: the binomials may exceed the range of floats
        shares = [math.comb(i, N - 1) / math.comb(n, N) for i in range(n)]
        mean = sum(share * value for share, value in zip(shares, ranked_values))
        curve[N] = mean / sum(shares)  # rounded shares may sum to more than 1
    return curve


def best_of_n_metrics(scores, values, name):
    """best_of_n averaged over rows without NaN, and a bound on its KL from the policy, in nats.

    The bound is log N - (N-1)/N (Beirami et al. 2024). Shapes: scores (M, n), values (M, n)."""
    is_known = ~scores.isnan().any(1)
    curves = [best_of_n(s, v) for s, v in zip(scores[is_known], values[is_known])]
    metrics = {}
    for N in curves[0] if curves else ():
        metrics[f"best_of_{N}/{name}"] = sum(curve[N] for curve in curves) / len(curves)
        metrics[f"best_of_{N}/kl_bound"] = math.log(N) - (N - 1) / N
    return metrics


def select(scores, ids, iteration, args):
    """Choose what to train on; --select random replaces the scores by random numbers.

    Shapes: scores (M, N), NaN where there is no score; ids: M lists of N completions -> list of
    (row, column)."""
    if args.min_score is not None:
        scores = scores.masked_fill(scores < args.min_score, math.nan)
    num_usable = int((~scores.isnan()).sum())
    if num_usable < (args.select_k or 1):
        fail(f"only {num_usable} completions have a score (and at least --min-score)")
    noise = torch.rand(scores.shape, generator=generator(args.seed, "select", iteration))
    noise = noise.masked_fill(scores.isnan(), math.nan)
    values = scores if args.select == "top" else noise
    if args.select_k is None and args.select_per_prompt == 1:
        columns = select_top_per_prompt(values)
        return [(row, column) for row, column in enumerate(columns.tolist()) if column >= 0]
    if args.select_k is None:
        pairs = []
        for row, row_values in enumerate(values):
            best = select_top_k(row_values, int((~row_values.isnan()).sum()))
            columns = distinct(best, ids[row : row + 1])[: args.select_per_prompt]
            pairs += [(row, column) for _, column in columns]
        return pairs
    selected = distinct(select_top_k(scores, args.select_k), ids)
    if args.select == "random":  # as many as --select top keeps
        selected = distinct(select_top_k(noise, num_usable), ids)[: len(selected)]
    return selected


def distinct(flat, ids):
    """(row, column) of flat indices of (M, N), skipping repeated completions of a prompt."""
    pairs = {}
    for index in flat.tolist():
        row, column = divmod(index, len(ids[0]))
        pairs.setdefault((row, tuple(ids[row][column])), (row, column))
    return list(pairs.values())


def null_to_nan(rows):
    """Lists of numbers from JSON -> tensor (rows, values)."""
    return torch.tensor([[math.nan if x is None else x for x in values] for values in rows])


def iteration_records(policy, reward, gold, prompts, iteration, run):  # noqa: PLR0917
    """Sample and score N completions of each prompt; returns one record per prompt.

    A record is a row of rollouts.jsonl. A run that is resumed within an iteration reads its records
    from there: the policy has changed since they were sampled."""
    args = run.args
    path = run.dir / "rollouts.jsonl"
    lines = broadcast_from_rank0(lambda: path.read_text().splitlines() if path.exists() else [])
    records = [record for record in map(json.loads, lines) if record["iteration"] == iteration]
    if records:
        return records
    N = args.num_generations
    for start in range(0, len(prompts), 64):
        rollouts = sample(
            policy,
            prompts[start : start + 64],
            num_generations=N,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            rng=generator(args.seed, "sample", iteration, start),
        )
        scores = reward(rollouts).tolist()
        golds = gold["gold"](rollouts).tolist() if gold else [math.nan] * len(rollouts)
        for i in range(0, len(rollouts), N):
            group = rollouts[i : i + N]
            members = torch.stack([rollout["member_scores"] for rollout in group], dim=1)
            records.append(
                {
                    "iteration": iteration,
                    "row": group[0]["row"],
                    "completions": [completion_text(run.tokenizer, rollout) for rollout in group],
                    "scores": scores[i : i + N],
                    "member_scores": members.tolist(),
                    "gold": golds[i : i + N],
                    "solve_rate": sum(golds[i : i + N]) / N,
                    "finished": [rollout["finished"] for rollout in group],
                    "ids": [rollout["completion_ids"] for rollout in group],
                }
            )
        run.bar.set_postfix_str(f"sampled {len(records)} of {len(prompts)} prompts")
    for record in records:
        run.append("rollouts.jsonl", record)
    return records


def selection_metrics(records, pairs):
    """Scores of all and of the selected completions, and best-of-N without training."""
    scores = null_to_nan([record["scores"] for record in records])  # (M, N)
    golds = null_to_nan([record["gold"] for record in records])  # (M, N)
    members = torch.cat([null_to_nan(record["member_scores"]) for record in records], dim=1)
    rows, columns = torch.tensor(pairs).T
    metrics = {"score": scores.nanmean(), "selected_score": scores[rows, columns].mean()}
    metrics |= best_of_n_metrics(scores, scores, "score")
    if len(members) > 1:
        metrics |= {f"score/{i}": member.nanmean() for i, member in enumerate(members, 1)}
        metrics["disagreement"] = members.std(0, correction=0).nanmean()
    if not golds.isnan().all():
        metrics["gold"] = golds[~scores.isnan()].mean()  # of the completions behind `score`
        metrics["selected_gold"] = golds[rows, columns].mean()
        metrics |= best_of_n_metrics(scores, golds, "gold")
    return metrics


def scheduled_learning_rate(step, steps, args):
    """Linear warmup, then --lr-schedule. Depends on the step only: no state to checkpoint."""
    progress = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def throughput(batch, padded_tokens, start_time):
    """Padding, speed and memory of a step that ends now."""
    num_tokens = batch["attention_mask"].sum()
    seconds = time.time() - start_time
    metrics = {
        "padding": 1 - num_tokens / all_reduce(padded_tokens),
        "tokens_per_second": num_tokens / seconds,
        "seconds/train": seconds,
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def pass_at_k(golds):
    """Probability that at least one of k samples is right, for k = 1, 2, 4, ... and G.

    Unbiased (Chen et al. 2021, equation 1). Shapes: golds (P, G), 0 or 1 -> metrics."""
    G = golds.shape[1]
    num_wrong = G - golds.sum(1, keepdim=True)  # (P, 1)
    metrics = {}
    for k in sorted({G, *(2**i for i in range(G.bit_length()))}):
        i = torch.arange(k)
        all_wrong = ((num_wrong - i).clamp(min=0) / (G - i)).prod(1)  # C(num_wrong, k) / C(G, k)
        metrics[f"eval/pass@{k}"] = (1 - all_wrong).nanmean()
    return metrics


@torch.no_grad()
def evaluate_policy(policy, reference, scorers, examples, run, step):  # noqa: PLR0917
    """Score greedy and sampled completions of held-out prompts; return metrics.

    scorers are reward functions by name: score, and gold if there is an exact checker. The KL from
    the initial policy is in nats per completion. samples.jsonl gets one sampled completion per
    prompt."""
    args = run.args
    metrics = {}
    # the rollouts used below the loop are the sampled ones
    for suffix, N, temperature in [
        ("_greedy", 1, 0.0),
        ("", args.num_generations, args.temperature),
    ]:
        rollouts = sample(
            policy,
            examples,
            num_generations=N,
            max_new_tokens=args.max_completion_length,
            temperature=temperature,
            rng=generator(args.seed, "evaluate"),
        )
        values = {name: score(rollouts) for name, score in scorers.items()}
        metrics |= {f"eval/{name}{suffix}": x.nanmean() for name, x in values.items()}
    batch = completion_batch(rollouts, policy.device)
    max_tokens = args.micro_batch_tokens
    logprobs = in_micro_batches(token_logprobs, policy, batch, max_tokens, args.temperature)
    ref_logprobs = in_micro_batches(token_logprobs, reference, batch, max_tokens, args.temperature)
    values["kl"] = (logprobs - ref_logprobs).sum(1)
    metrics["eval/kl"] = values["kl"].mean()
    metrics["eval/eos_rate"] = sum(rollout["finished"] for rollout in rollouts) / len(rollouts)
    metrics["eval/completion_length"] = batch["mask"].sum(1).float().mean()
    if "gold" in scorers and N > 1:
        metrics |= pass_at_k(values["gold"].view(-1, N))
    run.log_samples(step, rollouts[::N], {name: x[::N].tolist() for name, x in values.items()})
    return metrics


def main(args):
    device = setup(args)
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature} must be above 0")

    # data first: a bad file fails before models are loaded
    tokenizer = load_tokenizer(args.model)
    examples = load_examples(args.dataset, "prompts", prompt_example, tokenizer, args)
    held_out = load_held_out(examples, "prompts", prompt_example, tokenizer, args)
    prompts = [example["prompt_ids"] for example in examples + held_out]
    check_fit(args.model, prompts, args.max_completion_length)

    # models
    reward = load_reward(args, examples + held_out, tokenizer, device)
    gold = load_gold(args, args.dataset, tokenizer)
    scorers = {"score": reward} | load_gold(args, args.eval_dataset or args.dataset, tokenizer)
    policy = load_policy(args.model, tokenizer, args, device, trainable=True)
    reference = load_policy(args.model, tokenizer, args, device) if held_out else None
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    M = args.prompts_per_iteration or len(examples)
    num_completions = M * args.num_generations
    if not 1 <= args.select_per_prompt <= args.num_generations:
        fail(f"--select-per-prompt {args.select_per_prompt} must be from 1 to --num-generations")
    if args.select_k is not None and not 1 <= args.select_k <= num_completions:
        fail(f"--select-k {args.select_k} must be from 1 to {num_completions}")
    # fewer if some prompts have no score
    num_selected = args.select_k or M * args.select_per_prompt
    steps = args.iterations * math.ceil(args.epochs * num_selected / args.batch_size)
    if args.steps is not None:
        steps = min(steps, args.steps)
    run = Run(args, models, optimizer, tokenizer, steps=steps, examples=examples)

    metrics = {}
    first_step = 0
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, evaluate_policy(policy, reference, scorers, held_out, run=run, step=0))
    for iteration in range(args.iterations):
        # rollouts: sample N completions of each of the next M prompts and score them
        start_time = time.time()
        prompts = shuffled_examples(examples, args.seed, iteration * M, (iteration + 1) * M)
        records = iteration_records(policy, reward, gold, prompts, iteration=iteration, run=run)
        sampling_seconds = time.time() - start_time

        # select
        ids = [record["ids"] for record in records]  # M lists of N completions
        scores = null_to_nan([record["scores"] for record in records])  # (M, N)
        pairs = select(scores, ids, iteration, args)
        selected = [prompts[row] | {"completion_ids": ids[row][column]} for row, column in pairs]
        selection = selection_metrics(records, pairs) | {"seconds/sample": sampling_seconds}
        print(f"iteration {iteration + 1}: selected {len(pairs)} of {num_completions} completions")

        # fine-tune, with a learning rate schedule per iteration
        num_rows = args.epochs * len(selected)
        num_steps = math.ceil(num_rows / args.batch_size)
        if args.steps is not None:
            num_steps = min(num_steps, args.steps - first_step)
        for step in range(max(start, first_step), first_step + num_steps):
            # batch: the next of the shuffled completions
            start_time = time.time()
            first = (step - first_step) * args.batch_size
            stop = min(first + args.batch_size, num_rows)
            rollouts = shuffled_examples(selected, f"{args.seed}/{iteration}", first, stop)
            batch = completion_batch(rollouts, device)
            batch["weights"] = batch["mask"] / batch["mask"].sum()

            # update: one normalizer for the whole batch
            learning_rate = scheduled_learning_rate(step - first_step, num_steps, args)
            optimizer.param_groups[0]["lr"] = learning_rate
            sums = Counter()
            for mb in micro_batches(batch, args.micro_batch_tokens):
                logprobs = token_logprobs(policy, mb)
                loss = nll_loss(logprobs, mb["weights"])
                loss.backward()
                sums.update(loss=loss.detach(), padded_tokens=mb["inputs"].numel())
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            # log, evaluate, save
            is_last = step + 1 == first_step + num_steps
            metrics = {
                "loss": all_reduce(sums["loss"]),
                "iteration": iteration + 1,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
            }
            metrics |= throughput(batch, sums["padded_tokens"], start_time)
            if step == first_step:
                metrics |= selection
            if held_out and (is_last or is_due(args.eval_every, step + 1, steps)):
                metrics |= evaluate_policy(
                    policy,
                    reference,
                    scorers,
                    held_out,
                    run=run,
                    step=step + 1,
                )
            run.log(step + 1, metrics, show=["iteration", "loss", "grad_norm"])
            # the next iteration samples from this policy, so it must be saved
            run.checkpoint_if_due(step + 1, force=is_last)
        first_step += num_steps
        if first_step == args.steps:
            break
    run.finish(policy)
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
