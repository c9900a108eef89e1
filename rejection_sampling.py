"""Rejection sampling, or best-of-N fine-tuning: sample, keep what scores best, train on it as in sft.py.

    loss = - sum over tokens of the kept completions of log pi(token | what stands before it) / their number

Nakano et al. 2021 (best of N), Touvron et al. 2023 (Llama 2, section 3.2.3), Dong et al. 2023 (RAFT: several
--iterations, each from the policy of the one before). N completions of each of M prompts are scored; of the
M x N scores the best of each row is kept, or the k best of all. The controls keep as many at random: only
against them can one say that selection did anything, since training on one's own samples at a temperature
below 1 sharpens a policy by itself. The rollouts also give best-of-N without any training, with a bound on
its KL, and each prompt's solve rate. Left out: data of earlier iterations (Llama 2 mixes it in), LoRA.

    python rejection_sampling.py      laptop run, after sft.py and reward_model.py: 90 seconds, two cores
    python rejection_sampling.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

Data: rows of prompt, and any columns that a checker reads. Expect one iteration to raise `eval/score`
by a part of what best-of-N promises. rollouts.jsonl holds all that was sampled, with scores."""

import json
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import Run, append_lines, as_forward, cli, clip_gradients, completion_batch, completion_text, due
from common import eos_ids, evaluate_samples, generator, head_logits, head_rows, hidden_states, load_examples
from common import load_held_out, load_policy, load_reward, load_tokenizer, make_optimizer, micro_batches
from common import on_first_rank, over_micro_batches, over_ranks, replace_text, sample, set_learning_rate
from common import setup, shuffled, stop, stream_logprobs


@dataclass
class Args:
    model: str | None = None
    """directory or Hub id of the model to start from; without it, the laptop run on the built-in task"""
    dataset: str = "sort"
    """the built-in task, a .jsonl or .json file, or a Hub id (name or name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same forms; the built-in task brings its own"""
    prompt_template: str = "{prompt}"
    """for text prompts, {column} stands for a column; Alpaca and GSM8K rows have their own default"""
    output_dir: str = "runs/rejection_sampling"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 2e-5
    """peak, of AdamW (2e-5: Touvron et al. 2023 for SFT)"""
    warmup_steps: int = 10
    """steps of linear warm-up (PyTorch's Adam takes large steps at first)"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """from the peak down to 0 at the last step, or not"""
    weight_decay: float = 0.0
    """of AdamW, on matrices"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm; 0: never (1: the RLHF book)"""
    micro_batch_tokens: int | None = None
    """tokens, with padding, of one forward and backward: memory, not results (GPU: 16,384, CPU: 4,096)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of compute (autocast): auto is bfloat16 on a GPU, float32 on a CPU; weights are always float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    eval_every: int = 0
    """steps between evaluations; 0: before the first and after the last step only"""
    save_every: int = 100
    """steps between checkpoints; 0: after the last step only"""
    log_every: int = 10
    """steps between lines when the output is not a terminal (metrics.jsonl has every step)"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """also send the metrics there"""
    shard: Literal["auto", "full", "none"] = "auto"
    """with torchrun: split models over processes (FSDP), or not; auto: those that take much of a GPU"""
    batch_size: int = 64
    """sequences per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    reward: str | None = None
    """a reward model (directory or Hub id), `sort` or `gsm8k` (exact checkers), or path/file.py:function"""
    num_generations: int = 16
    """completions of each prompt, N"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; a completion without EOS by then is cut, and counts as unfinished"""
    temperature: float = 0.8
    """of sampling; training is at 1, so that a lower one sharpens the policy"""
    select: Literal["top-per-prompt", "top-k", "random-per-prompt", "random-k"] = "top-per-prompt"
    """the best completion of each prompt, the --select-k best of all, or as many at random: the controls"""
    select_k: int | None = None
    """completions that top-k and random-k keep"""
    min_score: float | None = None
    """completions with a lower score are not selected, by the controls neither"""
    prompts: int | None = None
    """prompts of one iteration, the next ones of the shuffled data; without it all of them"""
    iterations: int = 1
    """rounds of sampling from the current policy, selecting and training (RAFT: more than 1)"""


@as_forward
def token_logprobs(model, input_ids, attention_mask, mask, temperature=1.0):
    """log pi(token t+1 | tokens 0..t) of softmax(logits / temperature), and the entropy of that softmax.

    input_ids, attention_mask (B, L), mask (B, L-1) -> logprobs, entropy (detached), each (B, L-1) float32, 0
    outside the mask, in nats. Head and softmax run at mask positions only, and in chunks where these are
    many, computed again in the backward pass, so that memory does not grow with B*L*V."""
    mask = mask.bool()
    hidden = hidden_states(model, input_ids, attention_mask, mask)  # (B, L, H)
    hidden = hidden[:, :-1][mask]  # (N, H): column t predicts token t+1
    targets = input_ids[:, 1:][mask]  # (N,)

    if len(targets) <= head_rows(model):
        logps = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (N, V) float32
        logprobs = logps.gather(-1, targets[:, None])[:, 0]
        finite = logps.detach().clamp(min=-1e30)  # a forbidden token, of probability 0, adds 0
        entropy = -(finite.exp() * finite).sum(-1)
    else:  # the same, a chunk of tokens at a time
        logprobs, entropy = stream_logprobs(model, hidden, targets, temperature)
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy = (zeros.masked_scatter(mask, values) for values in (logprobs, entropy))
    return logprobs, entropy


def sft_loss(logprobs, weights):
    """- sum of weights * logprobs; with weights = mask / number of trained tokens of the whole batch, their
    mean NLL. logprobs, weights (B, L-1) -> scalar, nats per token."""
    return -(weights * logprobs).sum()


def select_top_per_prompt(rewards):
    """rewards (M, N), NaN where there is no score -> (M,) the column of each row's best, the lower one in a
    tie, -1 where the row has no score."""
    best = rewards.masked_fill(rewards.isnan(), -torch.inf).argmax(1)
    return best.masked_fill(rewards.isnan().all(1), -1)


def select_top_k(rewards, k):
    """rewards (M, N), NaN where there is no score -> (k,) flat indices of the k best of all, best first, the
    lower one first in a tie."""
    flat = rewards.flatten()
    return flat.masked_fill(flat.isnan(), -torch.inf).sort(descending=True, stable=True).indices[:k]


def best_of_n(scores, values):
    """Best of N without training: what `values` of the best-scored of N completions is on average, for N = 1,
    2, 4, ... up to n. scores, values (n,), no NaN -> {N: mean}.

    Unbiased, the mean over all subsets of N: with scores in ascending order, the i-th (from 0) is the best of
    comb(i, N-1) of the comb(n, N) subsets. In a tie the lower index wins."""
    n, values = len(scores), values.tolist()
    order = scores.flip(0).sort(stable=True).indices
    ranked = [values[n - 1 - i] for i in order.tolist()]
    sizes = [2**i for i in range(n.bit_length())]
    return {N: sum(v * math.comb(i, N - 1) for i, v in enumerate(ranked)) / math.comb(n, N) for N in sizes}


def best_of_n_metrics(scores, gold):
    """Means of best_of_n over the rows of (M, n) that have all their scores, no NaN, and in nats the bound
    log N - (N-1)/N on the KL of best-of-N from the policy that was sampled (Beirami et al. 2024)."""
    known, metrics = ~scores.isnan().any(1), {}
    for name, values in {"score": scores, "gold": gold}.items():
        pairs = [] if values is None else zip(scores[known], values[known])
        curves = [best_of_n(*pair) for pair in pairs]
        for N in curves[0] if curves else ():
            metrics[f"best_of_{N}/{name}"] = sum(curve[N] for curve in curves) / len(curves)
            metrics[f"best_of_{N}/kl_bound"] = math.log(N) - (N - 1) / N
    return metrics


def main(args):
    device, autocast = setup(args)
    if ("k" in args.select.split("-")) != (args.select_k is not None):
        stop(f"--select {args.select}, --select-k {args.select_k}: top-k and random-k need it, others do not")

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "prompt", args)
    held_out = load_held_out(tokenizer, "prompt", args)
    score, gold = load_reward(args, tokenizer, examples + held_out, stop_ids, device, autocast)
    policy = load_policy(args.model, device, train=args)
    optimizer = make_optimizer([policy], args)
    M, N = args.prompts or len(examples), args.num_generations
    if (args.select_k or 0) > M * N:
        stop(f"--select-k is {args.select_k}, more than the {M * N} completions of an iteration")
    steps = args.iterations * -(-args.epochs * (args.select_k or M) // args.batch_size)
    run = Run(args, min(steps, args.steps or steps))  # fewer if some prompts have no score

    def distinct(flat, rolled):
        """Flat indices -> (row, column), of equal completions of a row the first only."""
        pairs = {}
        for i, j in (divmod(index, N) for index in flat.tolist()):
            pairs.setdefault((i, tuple(rolled[i]["ids"][j])), (i, j))
        return list(pairs.values())

    def logprobs_of(model, batch):
        """token_logprobs of a whole batch, without gradient"""
        inputs = batch, args.micro_batch_tokens, autocast
        return over_micro_batches(lambda *x: token_logprobs(model, *x, args.temperature), *inputs)

    def evaluate(step):
        sampling = args.num_generations, args.max_completion_length, args.temperature
        kl_from = logprobs_of, lambda: load_policy(args.model, device)
        judges = dict(score=score, gold=gold)
        inputs = policy, held_out, tokenizer, stop_ids, args.seed, autocast, sampling, judges, kl_from
        metrics, rows = evaluate_samples(*inputs)
        run.samples(step, rows)
        return metrics

    start, step, metrics = run.restore({"policy": policy}, optimizer), 0, {}
    if not args.resume:
        if held_out:
            run.log(0, evaluate(0), show=[])
        run.checkpoint(0, {"policy": policy}, optimizer)  # so that --resume can go on with the rollouts
    file = run.dir / "rollouts.jsonl"
    text = on_first_rank(lambda: file.read_text() if file.exists() else "")
    rollouts = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    for iteration in range(args.iterations):
        # prompts: the next M rows, in an order of its own for every epoch
        began = time.time()
        picked = shuffled(examples, args.seed, iteration * M, (iteration + 1) * M)

        # rollout and scores, 64 prompts at a time; a run that is resumed reads what is in rollouts.jsonl
        rolled = [r for r in rollouts if r["iteration"] == iteration]
        pairs = [(r["row"], json.loads(json.dumps(e["row"], default=str))) for r, e in zip(rolled, picked)]
        differs = any(str(a) != str(b) for a, b in pairs) or any(len(r["ids"]) != N for r in rolled)
        if differs or len(rolled) > M:
            stop(f"--resume: {file} was not sampled with this data and these flags", 1)
        if len(rolled) < M and step < start:
            stop(f"--resume: {file} lacks rollouts that the checkpoint was trained on", 1)
        if len(rolled) < M:  # a chunk that was cut off is sampled again
            rolled = rolled[: len(rolled) // 64 * 64]
            rollouts = [r for r in rollouts if r["iteration"] < iteration] + rolled
            with run.writing():
                replace_text(file, "".join(json.dumps(r, default=str) + "\n" for r in rollouts))
        for first in range(len(rolled), M, 64):
            part, draw = picked[first : first + 64], generator(args.seed, "sample", (iteration, first))
            lengths, prompts = (N, args.max_completion_length), [e["prompt_ids"] for e in part]
            with autocast():
                completions, _ = sample(policy, prompts, *lengths, args.temperature, stop_ids, draw)
            repeated = [e for e in part for _ in range(N)]
            scores = score(repeated, completions).tolist()  # sorted by length in there, for little padding
            scores = [None if math.isnan(x) else x for x in scores]
            golds = [None] * len(scores) if gold is None else gold(repeated, completions).tolist()
            with run.writing():
                for i, e in enumerate(part):
                    mine = slice(i * N, (i + 1) * N)
                    known = [g for g in golds[mine] if g is not None]
                    texts = [completion_text(tokenizer, e["prompt_ids"], c) for c in completions[mine]]
                    record = {"iteration": iteration, "row": e["row"], "completions": texts}
                    record |= {"scores": scores[mine], "gold": golds[mine], "ids": completions[mine]}
                    record["solve_rate"] = sum(known) / N if known else None
                    rolled.append(record)
                    rollouts.append(record)
                append_lines(file, rolled[first:])
            run.bar.set_postfix_str(f"iteration {iteration + 1}: {len(rolled)} of {M} prompts sampled")
            run.exit_if_interrupted(f"{len(rolled)} of {M} prompts of iteration {iteration + 1}")
        rewards = torch.tensor([[math.nan if x is None else x for x in r["scores"]] for r in rolled])  # (M,N)
        golds = None if gold is None else torch.tensor([r["gold"] for r in rolled])
        selection = {"score": rewards.nanmean()} | best_of_n_metrics(rewards, golds)

        # select: the controls select by random numbers instead of scores, and are the same otherwise
        if args.min_score is not None:
            rewards = rewards.masked_fill(rewards < args.min_score, math.nan)
        usable, ranked = int((~rewards.isnan()).sum()), rewards
        if args.select.startswith("random"):
            noise = torch.rand(rewards.shape, generator=generator(args.seed, "select", iteration))
            ranked = noise.masked_fill(rewards.isnan(), math.nan)
        if args.select_k is not None:
            if args.select_k > usable:
                stop(f"--select-k is {args.select_k}, but only {usable} completions have a usable score", 1)
            chosen = distinct(select_top_k(rewards, args.select_k), rolled)
            repeats = args.select_k - len(chosen)
            if args.select == "random-k":
                chosen = distinct(select_top_k(ranked, usable), rolled)[: len(chosen)]
        else:
            columns, repeats = select_top_per_prompt(ranked).tolist(), 0
            chosen = [(i, j) for i, j in enumerate(columns) if j >= 0]
        unscored = int(rewards.isnan().all(1).sum())
        print(
            f"iteration {iteration + 1}: {len(chosen)} of {M * N} completions selected; {unscored} of {M} "
            f"prompts without a usable score; {repeats} repeats of a completion of the same row left out"
        )
        if not chosen:
            stop(f"no completion has a usable score, so there is nothing to train on: look at {file}", 1)
        selected = [(picked[i]["prompt_ids"], rolled[i]["ids"][j]) for i, j in chosen]
        where = tuple(torch.tensor(chosen).T)
        selection["selected_score"] = rewards[where].mean()
        if gold is not None:
            selection |= {"gold": golds.mean(), "selected_gold": golds[where].mean()}
        selection["seconds/sample"] = time.time() - began

        # update: sft.py on what was selected, with a learning rate schedule of its own
        before, total = step, -(-args.epochs * len(selected) // args.batch_size)
        total = min(total, args.steps - before) if args.steps else total
        while step < before + total:
            began, step = time.time(), step + 1
            if step <= start:  # done before the run was resumed
                continue
            first = (step - 1 - before) * args.batch_size
            last = min(first + args.batch_size, args.epochs * len(selected))
            trained = shuffled(selected, f"{args.seed}/{iteration}", first, last)
            batch = completion_batch([p for p, _ in trained], [c for _, c in trained], device)

            # one denominator for the whole batch, however it is cut into micro-batches
            tokens, padded_tokens, loss_sum = batch.completion_mask[:, 1:].sum(), 0, 0.0
            for rows in micro_batches(batch.lengths, args.micro_batch_tokens):
                mb = batch.rows(rows)
                padded_tokens += mb.input_ids.numel()
                mask = mb.completion_mask[:, 1:]
                with autocast():
                    logprobs, _ = token_logprobs(policy, mb.input_ids, mb.attention_mask, mask)
                loss = sft_loss(logprobs, mask / tokens)
                loss.backward()
                loss_sum += loss.detach()
            loss_sum, padded_tokens = over_ranks(loss_sum, padded_tokens)
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            run.stop_unless_finite(step, trained, loss=loss_sum, grad_norm=grad_norm)
            learning_rate = set_learning_rate(optimizer, args, step - 1 - before, total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # log, eval, save
            # an iteration ends with a checkpoint, since the next one samples from its policy
            is_last = step == before + total
            metrics = {"loss": loss_sum, "grad_norm": grad_norm, "learning_rate": learning_rate}
            metrics["iteration"] = iteration + 1
            metrics["padding"] = 1 - sum(batch.lengths) / padded_tokens
            metrics["seconds/train"] = time.time() - began
            metrics["tokens_per_second"] = sum(batch.lengths) / metrics["seconds/train"]
            metrics |= selection if step == before + 1 else {}
            if held_out and (is_last or due(args.eval_every, step, 0)):
                metrics |= evaluate(step)
            run.log(step, metrics, show=["iteration", "loss", "grad_norm", "tokens_per_second"])
            run.checkpoint_if_due(step, {"policy": policy}, optimizer, is_last)
        if step == args.steps:
            break
    run.finish(policy, tokenizer, stop_ids, f"look at {args.output_dir}/samples.jsonl and {file.name}")
    return metrics


if __name__ == "__main__":
    laptop = dict(model="runs/sft", reward="runs/reward_model", prompts=2000, iterations=3, epochs=4)
    laptop |= dict(max_completion_length=10, batch_size=32, learning_rate=3e-4, overwrite=True)
    main(cli(Args, laptop=laptop))
