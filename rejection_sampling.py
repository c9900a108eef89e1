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
    as_forward,
    check_context,
    check_finite,
    cli,
    clip_gradients,
    completion_batch,
    completion_text,
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
    load_reward,
    load_tokenizer,
    make_optimizer,
    micro_batches,
    sample,
    set_learning_rate,
    setup,
    stream,
)


@dataclass
class Args:
    model: str | None = None
    """directory or Hub id of the model to start from; without it, the laptop run on the built-in task"""
    dataset: str = "sort"
    """the built-in task, a .jsonl or .json file, or a Hub id (name or name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same forms; the built-in task brings its own"""
    prompt_template: str = "{prompt}"
    """how columns make a text prompt: {column} stands for a column"""
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
    learning_rate: float = 1e-5
    """peak, of AdamW (2e-5: RAFT)"""
    warmup_steps: int = 10
    """steps of linear warm-up (PyTorch's Adam takes large steps at first)"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """from the peak down to 0, which would be reached one step after the last; or not"""
    weight_decay: float = 0.0
    """weight decay of AdamW, on matrices only"""
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
    batch_size: int = 64
    """sequences per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    reward: str | None = None
    """a reward model (directory or Hub id), `sort` or `gsm8k` (exact checkers), or path/file.py:function"""
    num_generations: int = 16
    """completions of each prompt, N"""
    max_prompt_length: int = 512
    """tokens of a prompt; longer ones are dropped and counted"""
    max_completion_length: int = 256
    """tokens of a completion; one without EOS by then is cut, and counts as unfinished"""
    temperature: float = 0.8
    """of sampling; training is at 1, so that a lower one sharpens the policy"""
    select: Literal["top-per-prompt", "top-k", "random-per-prompt", "random-k"] = "top-per-prompt"
    """the best completion of each prompt, the --select-k best of all, or as many at random: the controls"""
    select_k: int | None = None
    """completions that top-k and random-k keep"""
    min_score: float | None = None
    """completions with a lower score are not selected, by the controls neither"""
    prompts_per_iteration: int | None = None
    """prompts of one iteration, the next ones of the shuffled data; without it all of them"""
    iterations: int = 1
    """rounds of sampling from the current policy, selecting and training (RAFT: more than 1)"""


@as_forward
def token_logprobs(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) of softmax(logits / temperature).

    batch: inputs, targets, attention_mask, mask, each (B, T) -> (B, T) float32, in nats, 0 outside the mask.
    Head and softmax run at mask positions only, and where these are many in chunks, computed again in the
    backward pass, so that memory does not grow with B * T * V."""
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
        (logprobs,) = in_micro_batches(
            lambda mb: (token_logprobs(model, mb, temperature),),
            batch,
            args.micro_batch_tokens,
        )
    return logprobs


def sft_loss(logprobs, weights):
    """- sum of weights * logprobs; with weights = mask / number of trained tokens of the whole batch, their
    mean NLL. logprobs, weights (B, T) -> scalar, nats per token."""
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
    flat = flat.masked_fill(flat.isnan(), -torch.inf)
    return flat.sort(descending=True, stable=True).indices[:k]


def best_of_n(scores, values):
    """Best of N without training: what `values` of the best-scored of N completions is on average, for N = 1,
    2, 4, ... up to n. scores, values (n,), no NaN -> {N: mean}.

    Unbiased, the mean over all subsets of N: with scores in ascending order, the i-th (from 0) is the best of
    comb(i, N-1) of the comb(n, N) subsets. In a tie the lower index wins."""
    n = len(scores)
    ascending = scores.flip(0).sort(stable=True).indices  # of equal scores the lower index comes last
    ranked_values = values.flip(0)[ascending].tolist()
    curve = {}
    for N in [2**i for i in range(n.bit_length())]:
        total = sum(value * math.comb(i, N - 1) for i, value in enumerate(ranked_values))
        curve[N] = total / math.comb(n, N)
    return curve


def best_of_n_metrics(scores, values, name):
    """Means of best_of_n over the rows of scores (M, n) that have no NaN, and in nats the bound
    log N - (N-1)/N on the KL of best-of-N from the policy that was sampled (Beirami et al. 2024)."""
    is_known = ~scores.isnan().any(1)
    curves = [best_of_n(*row) for row in zip(scores[is_known], values[is_known])]
    metrics = {}
    for N in curves[0] if curves else ():
        metrics[f"best_of_{N}/{name}"] = sum(curve[N] for curve in curves) / len(curves)
        metrics[f"best_of_{N}/kl_bound"] = math.log(N) - (N - 1) / N
    return metrics


def sample_groups(policy, examples, iteration, run, *, score, gold, tokenizer, eos_ids, args, autocast):
    """Sample and score N completions of each prompt, 64 prompts at a time -> one record a prompt, as
    rollouts.jsonl has them. What that file already holds of the iteration, from before a --resume, is read."""
    records = [r for r in run.read("rollouts.jsonl") if r["iteration"] == iteration]
