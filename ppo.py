"""Proximal policy optimization (PPO) from human feedback.

    maximize  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

The third stage of RLHF (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022). Every token
is an action with reward -kl_coef * (log pi - log pi_ref); the last token also gets the score. A
value model predicts the return, and GAE turns rewards and values into advantages. Each step samples
a batch of completions, then minimizes the clipped surrogate loss (Schulman et al. 2017, equation 7)
on it for several epochs. --ptx-dataset and --ptx-coef add the pretraining term of PPO-ptx (Ouyang
et al. 2022, equation 2). Losses are means over the tokens of the batch; some lecture notes divide
by the length of each completion (grpo.py has both). Not included: an adaptive KL coefficient (the
Lagrange multiplier of the constraint KL <= epsilon), reward scaling, a trunk shared by policy and
value model, generation engines, LoRA.

    python ppo.py                     demo, after sft.py and reward_model.py: two minutes
    python ppo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

Data: rows with a prompt, and any columns a reward function reads. Expect `score` to rise with `kl`.
`gold` is an exact checker of the dataset, if there is one: it diverges from `score` when the policy
overoptimizes the reward model. docs/metrics.md has a table of symptoms. Comments cite "N+" (Huang
et al. 2024, The N+ implementation details of RLHF with PPO), "B" (its 2023 blog post) and "lmhp"
(openai/lm-human-preferences)."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    CHECKERS,
    COMPLETION_COLUMNS,
    DroppedRow,
    Run,
    all_reduce,
    check_fit,
    cli,
    clip_gradients,
    completion_text,
    encode_completions,
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
    load_scorer,
    load_tokenizer,
    member_metrics,
    micro_batches,
    model_forward,
    pad_rows,
    prompt_example,
    prompt_of,
    sample,
    setup,
    shuffled_examples,
    take,
    text_or_messages,
    vocabulary,
)


@dataclass
class Args:
    kl_coef: float = 0.05
    """KL penalty weight (N+: 0.05; Ahmadian et al. 2024: 0.03); 0: no KL"""
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """GAE lambda: 0 is one-step TD, 1 is Monte Carlo"""
    whiten_rewards: bool = False
    """scale token rewards to variance 1, keeping their mean (lmhp; not N+)"""
    value_model: str | None = None
    """initial value model (default: reward model if tokenizers agree, or policy + zero head)"""
    value_coef: float = 0.1
    """weight of the value loss (N+: 0.1); mostly cancels in Adam, as the models are separate"""
    value_clip: float = 0.2
    """clip range of the value loss (N+: 0.2)"""
    ptx_dataset: str | None = None
    """prompts and completions of the pretraining loss (PPO-ptx)"""
    ptx_coef: float = 0.0
    """weight of the pretraining loss (Ouyang et al. 2022: 27.8 at 8 rows per completion; here 1)"""
    # shared by the scripts that sample
    reward: str | None = None
    """reward model, sort, gsm8k or file.py:function; comma-separated: an ensemble"""
    reward_combine: Literal["mean", "min", "mean-minus-std"] = "mean"
    """ensemble aggregation (Coste et al. 2023)"""
    reward_std_coef: float = 1.0
    """standard deviations that mean-minus-std subtracts (with two members, 1 gives min)"""
    prompts_per_step: int = 512
    """prompts per step (N+: 512; DeepSeek-R1: 32, with 16 completions each)"""
    num_generations: int = 1
    """completions per prompt (N+: 1; Ahmadian et al. 2024: 4; DeepSeek-R1: 16)"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; longer completions are cut and count as unfinished"""
    temperature: float = 1.0
    """sampling temperature; log-probs use it too"""
    missing_eos_penalty: float = 0.0
    """subtracted from the score of a completion without EOS (N+: score becomes -1)"""
    update_epochs: int = 4
    """passes over the completions of a step (N+: 4; DeepSeekMath: 1)"""
    num_minibatches: int = 1
    """optimizer steps per pass (N+: 1)"""
    epsilon: float = 0.2
    """clip range of the ratio (Schulman et al. 2017)"""
    epsilon_high: float | None = None
    """upper clip range if it differs (DAPO, Yu et al. 2025: 0.28)"""
    # shared by all scripts
    model: str | None = None
    """directory or Hub id to start from (default: the tiny demo model)"""
    dataset: str = "sort"
    """sort (built in), a .jsonl or .json file, or a Hub id (name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same formats (sort brings its own)"""
    prompt_template: str = "{prompt}"
    """text prompt from columns, such as "Q: {question} A:" """
    output_dir: str = "runs/ppo"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int = 1000
    """steps: sample and score completions, then update"""
    learning_rate: float = 3e-6
    """peak learning rate of AdamW (N+: 3e-6; Ahmadian et al. 2024: 1e-6)"""
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


def ptx_example(row, tokenizer, args):
    """A prompt and its completion."""
    prompt = prompt_of(row, args)
    completion = text_or_messages(row, COMPLETION_COLUMNS)
    prompt_ids, (completion_ids,) = encode_completions(tokenizer, prompt, [completion])
    if len(prompt_ids) > args.max_prompt_length:
        raise DroppedRow(f"longer than --max-prompt-length {args.max_prompt_length}")
    if len(completion_ids) > args.max_completion_length:
        raise DroppedRow(f"longer than --max-completion-length {args.max_completion_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids, "completion_ids": completion_ids}


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
def token_logprobs_and_entropy(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) in nats, and the entropy of pi there, detached.

    pi is softmax(logits / temperature). Both are float32 and 0 outside the mask. The LM head runs
    on masked positions only, in checkpointed chunks, so memory does not scale with B * T * V.
    Shapes: batch of (B, T) -> (B, T), (B, T)."""
    mask = batch["mask"].bool()
    hidden = hidden_states(model, batch)  # (N, H)
    targets = batch["targets"][mask]  # (N,)

    def chunk_logprobs_and_entropy(hidden, targets):
        log_softmax = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (n, V) float32
        logprobs = log_softmax.gather(-1, targets[:, None])[:, 0]
        log_softmax = log_softmax.detach().clamp(min=-1e30)  # p log p is 0 at p = 0
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return logprobs, entropy

    chunk = 40_000_000 // model.config.get_text_config().vocab_size
    if len(targets) <= chunk:
        logprobs, entropy = chunk_logprobs_and_entropy(hidden, targets)
    else:
        results = [
            checkpoint(chunk_logprobs_and_entropy, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk))
        ]
        logprobs = torch.cat([logprobs for logprobs, _ in results])
        entropy = torch.cat([entropy for _, entropy in results])
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def logprobs_without_gradient(model, batch, temperature):
    """Log-probs without gradient. Shapes: batch of (B, T) -> (B, T)."""
    return token_logprobs_and_entropy(model, batch, temperature)[0]


def batch_logprobs(model, batch, args):
    """Log-probs of a whole batch without gradient. Shapes: batch of (B, T) -> (B, T)."""
    return in_micro_batches(
        logprobs_without_gradient,
        model,
        batch,
        args.micro_batch_tokens,
        args.temperature,
    )


@model_forward
def token_values(model, batch):
    """Values V(inputs[:, : t + 1]), the predicted return, float32 and 0 outside the mask.

    Shapes: batch of (B, T) -> (B, T)."""
    mask = batch["mask"].bool()
    hidden = hidden_states(model, batch)  # (N, H)
    values = (hidden.float() * model.score.weight[0]).sum(-1)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def masked_mean(x, mask):
    """Mean over the mask. Shapes: (B, T), (B, T) -> scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """Scale to variance 1 over the mask; shift the mean to 0 or keep it; 0 outside the mask.

    Population variance plus 1e-8 (lmhp). Shapes: (B, T), (B, T) -> (B, T)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """-kl_coef * (log pi - log pi_ref) at every completion token, plus the score at the last.

    Ziegler et al. 2019, equation 2, with the k1 estimate of the KL. With the score at the last
    token, one mask serves rewards, values and log-probs (N+ puts it one token later).
    Shapes: scores (B,), others (B, T) -> (B, T)."""
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    is_last = (tokens_from_here == 1) & mask.bool()
    kl = (logprobs - ref_logprobs) * mask
    return -kl_coef * kl + scores[:, None] * is_last


def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, with V and A 0
    after the last completion token. The returns A + V are the targets of the value model. Each row
    of the mask is one run of ones. Shapes: all (B, T) -> advantages, returns (B, T)."""
    advantages = torch.zeros_like(rewards)
    next_advantage = 0.0
    next_value = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_advantage = advantages[:, t]
        next_value = values[:, t] * mask[:, t]
    returns = (advantages + values) * mask
    return advantages, returns


def policy_loss(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high=None):  # noqa: PLR0917
    """Clipped surrogate loss (Schulman et al. 2017, equation 7, negated).

    Sum of weights * max(-A * ratio, -A * clip(ratio, 1 - epsilon, 1 + epsilon_high)). The weights
    are 0 outside the mask and carry the normalizer. Returns the loss and a mask of the clipped
    tokens, which have no gradient. Shapes: all (B, T) -> scalar, (B, T) bool."""
    if epsilon_high is None:
        epsilon_high = epsilon
    # the clamp avoids inf * 0 in the gradient of clipped tokens
    log_ratio = (logprobs - old_logprobs).clamp(max=20)
    ratio = log_ratio.exp()
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = (weights * torch.max(pg_loss1, pg_loss2)).sum()
    clipped = (pg_loss2 > pg_loss1) & (weights > 0)
    return loss, clipped


def value_loss(values, old_values, returns, weights, value_clip):
    """Clipped value loss (N+, OpenAI baselines).

    Sum of weights * 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2). Returns the loss
    and a mask of the clipped tokens, which have no gradient. Shapes: all (B, T) -> scalar, (B, T)
    bool."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    vf_loss1 = (values - returns) ** 2
    vf_loss2 = (clipped_values - returns) ** 2
    loss = 0.5 * (weights * torch.max(vf_loss1, vf_loss2)).sum()
    is_outside = (values - old_values).abs() > value_clip  # inside, the losses differ by rounding
    clipped = is_outside & (vf_loss2 > vf_loss1) & (weights > 0)
    return loss, clipped


def nll_loss(logprobs, weights):
    """Negative log-likelihood: -sum of weights * logprobs, in nats per token.

    The weights are mask / number of trained tokens in the whole batch.
    Shapes: (B, T), (B, T) -> scalar."""
    return -(weights * logprobs).sum()


def ptx_backward(policy, examples, update, args):
    """Add the gradient of the PPO-ptx loss (Ouyang et al. 2022, equation 2); return the loss.

    Each update takes as many rows as completions (Ouyang et al.: 8 times as many), and their loss
    is a mean over their own tokens."""
    batch_size = args.prompts_per_step * args.num_generations // args.num_minibatches
    first = update * batch_size
    rows = shuffled_examples(examples, f"{args.seed} ptx", first, first + batch_size)
    batch = completion_batch(rows, policy.device)
    batch["weights"] = batch["mask"] / batch["mask"].sum()
    total = 0.0
    for mb in micro_batches(batch, args.micro_batch_tokens):
        logprobs, _ = token_logprobs_and_entropy(policy, mb)
        loss = nll_loss(logprobs, mb["weights"])
        (args.ptx_coef * loss).backward()
        total += loss.detach()
    return total


def sample_and_score(policy, reward, prompts, rng, args):
    """Sample G completions per prompt and score them.

    Returns rollouts, grouped by prompt, with `score` and `reward`, the score minus the penalty for
    a missing EOS."""
    # 1. completions end at their first EOS, which is trained on (N+ samples on, then truncates)
    rollouts = sample(
        policy,
        prompts,
        num_generations=args.num_generations,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        rng=rng,
    )
    # 2. the reward model reads prompt and completion (B)
    scores = reward(rollouts)  # (P * G,)
    for rollout, score in zip(rollouts, scores.tolist()):
        rollout["score"] = score
        # 3. no EOS: the score loses --missing-eos-penalty (N+ and lmhp set it to -1)
        penalty = 0.0 if rollout["finished"] else args.missing_eos_penalty
        rollout["reward"] = score - penalty
    # 4. groups with an unscored completion (NaN) are dropped
    is_scored = ~scores.view(-1, args.num_generations).isnan().any(1)
    is_kept = is_scored.repeat_interleave(args.num_generations).tolist()
    return [rollout for rollout, keep in zip(rollouts, is_kept) if keep]


def load_value_model(args, prompts, device):
    """--value-model; by default the reward model (N+), or the policy with a zero head (B).

    Only a reward model (the first of an ensemble) with the policy's tokens is used."""
    path = args.value_model or args.model
    first = args.reward.split(",")[0]
    is_model = ".py:" not in first and first not in [*CHECKERS, "none"]
    if not args.value_model and is_model and vocabulary(args.model) <= vocabulary(first):
        path = first
    if not vocabulary(args.model) <= vocabulary(path):
        fail(f"--value-model {path} does not have the tokens and embeddings of {args.model}")
    check_fit(path, prompts, args.max_completion_length)

    def init(model, has_new_head):
        if has_new_head:
            nn.init.zeros_(model.score.weight)

    return load_scorer(path, args, device, trainable=True, init=init)


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


def minibatch_rows(num_rows, step, epoch, args):
    """The rows of each minibatch, reshuffled every epoch."""
    rng = generator(args.seed, "minibatch", step, epoch)
    return torch.randperm(num_rows, generator=rng).tensor_split(args.num_minibatches)


def count_tokens(sums, batch):
    """Count the tokens of a micro-batch: of completions, without padding, with padding."""
    sums["completion_tokens"] += batch["mask"].sum()
    sums["real_tokens"] += batch["attention_mask"].sum()
    sums["padded_tokens"] += batch["inputs"].numel()


def track_ratio(sums, logprobs, old_logprobs):
    """Record max |ratio - 1| before the first update, where it should be rounding error."""
    if sums["updates"] == 0:
        deviation = torch.expm1(logprobs - old_logprobs).detach().abs().max()
        sums["ratio_max_dev"] = max(deviation, sums["ratio_max_dev"])


def explained_variance(returns, values, mask):
    """1 - Var(returns - values) / Var(returns) over the mask; NaN for constant returns.

    1: the values predict the returns; 0: no better than their mean. Returns are constant if their
    standard deviation is at most 1e-6 of their root mean square, at any scale of the reward.
    Shapes: all (B, T) -> scalar."""
    errors = returns - values
    unexplained = masked_mean((errors - masked_mean(errors, mask)) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    is_constant = variance <= 1e-12 * masked_mean(returns**2, mask)
    return torch.tensor(math.nan) if is_constant else 1 - unexplained / variance


def rollout_metrics(rollouts, gold, args):
    """Means over the rollouts of a step."""
    num_sampled = args.prompts_per_step * args.num_generations
    n = len(rollouts)
    metrics = {
        "score": sum(rollout["score"] for rollout in rollouts) / n,
        "completion_length": sum(len(rollout["completion_ids"]) for rollout in rollouts) / n,
        "eos_rate": sum(rollout["finished"] for rollout in rollouts) / n,
        "unscored": 1 - n / num_sampled,
    }
    metrics |= {name: score(rollouts).mean() for name, score in gold.items()}
    return metrics | member_metrics(rollouts)


def update_metrics(sums, batch, args):
    """Means over the updates of a step; sums are over the micro-batches of this rank."""
    loss_mask = batch.get("loss_mask", batch["mask"])
    return {
        "entropy": all_reduce(sums["entropy"]) / all_reduce(sums["completion_tokens"]),
        "clip_fraction": all_reduce(sums["clipped"])
        / (args.update_epochs * loss_mask.sum().clamp(min=1)),
        "ratio_max_dev": all_reduce(sums["ratio_max_dev"], op="max"),
        "grad_norm": sums["grad_norm"] / sums["updates"],
        "padding": 1 - all_reduce(sums["real_tokens"]) / all_reduce(sums["padded_tokens"]),
    }


def speed_metrics(batch, start_time, sampling_seconds):
    """Speed and memory of a step that ends now."""
    seconds = time.time() - start_time
    metrics = {
        "tokens_per_second": batch["attention_mask"].sum() / seconds,
        "seconds/sample": sampling_seconds,
        "seconds/train": seconds - sampling_seconds,
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def loss_metrics(sums, batch, args):
    """Losses of policy and value model, means over the updates of a step."""
    num_tokens = args.update_epochs * batch["mask"].sum()
    policy_loss = all_reduce(sums["policy_loss"]) / sums["updates"]
    value_loss = all_reduce(sums["value_loss"]) / sums["updates"]
    metrics = {
        "loss": policy_loss + args.value_coef * value_loss,
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "value_clip_fraction": all_reduce(sums["value_clipped"]) / num_tokens,
        "value_grad_norm": sums["value_grad_norm"] / sums["updates"],
    }
    if args.ptx_coef:
        metrics["loss/ptx"] = all_reduce(sums["ptx_loss"]) / sums["updates"]
        metrics["loss"] = metrics["loss"] + args.ptx_coef * metrics["loss/ptx"]
    return metrics


def log_rollouts(run, step, rollouts, rewards, advantages):
    """Write the first group of a step, at least 8 completions, to rollouts.jsonl for reading.

    Shapes: rewards (B,), advantages (B,)."""
    if not is_due(run.args.log_every, step, run.steps):
        return
    for i, rollout in enumerate(rollouts[: max(8, run.args.num_generations)]):
        row = {
            "step": step,
            "prompt": rollout["prompt"],
            "completion": completion_text(run.tokenizer, rollout),
            "score": rollout["score"],
            "reward": rewards[i].item(),
            "advantage": advantages[i].item(),
            "length": len(rollout["completion_ids"]),
            "finished": rollout["finished"],
        }
        run.append("rollouts.jsonl", row)


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
def evaluate(policy, reference, scorers, examples, run, step):  # noqa: PLR0917
    """Score greedy and sampled completions of held-out prompts; return metrics.

    scorers are reward functions by name: score, and gold if there is an exact checker. The KL is in
    nats per completion. samples.jsonl gets one sampled completion per prompt."""
    args = run.args
    metrics = {}
    # the rollouts used below the loop are the sampled ones
    for suffix, G, temperature in [
        ("_greedy", 1, 0.0),
        ("", args.num_generations, args.temperature),
    ]:
        rollouts = sample(
            policy,
            examples,
            num_generations=G,
            max_new_tokens=args.max_completion_length,
            temperature=temperature,
            rng=generator(args.seed, "evaluate"),
        )
        values = {name: score(rollouts) for name, score in scorers.items()}
        metrics |= {f"eval/{name}{suffix}": x.nanmean() for name, x in values.items()}
    batch = completion_batch(rollouts, policy.device)
    logprobs = batch_logprobs(policy, batch, args)
    values["kl"] = (logprobs - batch_logprobs(reference, batch, args)).sum(1)
    metrics["eval/kl"] = values["kl"].mean()
    metrics["eval/eos_rate"] = sum(rollout["finished"] for rollout in rollouts) / len(rollouts)
    metrics["eval/completion_length"] = batch["mask"].sum(1).float().mean()
    if "gold" in scorers and G > 1:
        metrics |= pass_at_k(values["gold"].view(-1, G))
    run.log_samples(step, rollouts[::G], {name: x[::G].tolist() for name, x in values.items()})
    return metrics


def main(args):
    device = setup(args)
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature} must be above 0")
    if bool(args.ptx_coef) != bool(args.ptx_dataset):
        fail("--ptx-coef and --ptx-dataset go together")

    # data first: a bad file fails before models are loaded
    tokenizer = load_tokenizer(args.model)
    examples = load_examples(args.dataset, "prompts", prompt_example, tokenizer, args)
    held_out = load_held_out(examples, "prompts", prompt_example, tokenizer, args)
    ptx_examples = []
    if args.ptx_coef:
        ptx_examples = load_examples(args.ptx_dataset, "sft", ptx_example, tokenizer, args)
    prompts = [example["prompt_ids"] for example in examples + held_out + ptx_examples]
    check_fit(args.model, prompts, args.max_completion_length)

    # models
    reward = load_reward(args, examples + held_out, tokenizer, device)
    gold = load_gold(args, args.dataset, tokenizer)
    eval_gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer)
    scorers = {"score": reward} | eval_gold
    policy = load_policy(args.model, tokenizer, args, device, trainable=True)
    reference = None
    if args.kl_coef or held_out:
        reference = load_policy(args.model, tokenizer, args, device)
    value_model = load_value_model(args, prompts, device)
    models = nn.ModuleDict({"policy": policy, "value_model": value_model})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        eps=1e-5,  # B: as in OpenAI's PPO
        weight_decay=args.weight_decay,
        fused=True,
    )
    run = Run(
        args, models, optimizer, tokenizer, steps=args.steps, examples=examples + ptx_examples
    )

    num_updates = args.update_epochs * args.num_minibatches
    max_tokens = args.micro_batch_tokens
    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, evaluate(policy, reference, scorers, held_out, run=run, step=0))
    for step in range(start, args.steps):
        # rollouts: sample completions of the next prompts and score them
        start_time = time.time()
        first = step * args.prompts_per_step
        prompts = shuffled_examples(examples, args.seed, first, first + args.prompts_per_step)
        rng = generator(args.seed, "sample", step)
        rollouts = sample_and_score(policy, reward, prompts, rng, args)
        if len(rollouts) < args.num_minibatches:
            fail(f"--num-minibatches {args.num_minibatches}: {len(rollouts)} scored completions")
        batch = completion_batch(rollouts, device)  # inputs, targets, attention_mask, mask: (B, T)
        mask = batch["mask"]
        sampling_seconds = time.time() - start_time

        # log-probs and values
        # 5. from a training forward pass (sampling rounds differently), at its temperature (B)
        old_logprobs = batch_logprobs(policy, batch, args)  # (B, T)
        ref_logprobs = batch_logprobs(reference, batch, args) if args.kl_coef else old_logprobs
        old_values = in_micro_batches(token_values, value_model, batch, max_tokens)  # (B, T)

        # rewards, advantages and returns
        # 6. the KL is charged per token, the score added at the last (Ziegler et al. 2019)
        scores = torch.tensor([rollout["reward"] for rollout in rollouts], device=device)  # (B,)
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, args.kl_coef)
        completion_rewards = rewards.sum(1)  # (B,)
        if args.whiten_rewards:  # 7. without shifting their mean (lmhp)
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        # 8. advantages are whitened over all tokens of the batch, after the returns (N+)
        batch["advantages"] = masked_whiten(advantages, mask)
        batch |= {"old_logprobs": old_logprobs, "old_values": old_values, "returns": returns}

        # update
        optimizer.param_groups[0]["lr"] = scheduled_learning_rate(step, args.steps, args)
        sums = Counter()
        for epoch in range(args.update_epochs):
            for rows in minibatch_rows(len(mask), step, epoch, args):
                minibatch = take(batch, rows)
                minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()
                for mb in micro_batches(minibatch, max_tokens):
                    logprobs, entropy = token_logprobs_and_entropy(policy, mb, args.temperature)
                    loss, clipped = policy_loss(
                        logprobs,
                        mb["old_logprobs"],
                        mb["advantages"],
                        mb["weights"],
                        args.epsilon,
                        epsilon_high=args.epsilon_high,
                    )
                    loss.backward()  # frees the policy's activations before the value model runs
                    sums.update(policy_loss=loss.detach(), clipped=clipped.sum())
                    sums.update(entropy=entropy.sum())
                    count_tokens(sums, mb)
                    track_ratio(sums, logprobs, mb["old_logprobs"])
                    values = token_values(value_model, mb)
                    loss, clipped = value_loss(
                        values,
                        mb["old_values"],
                        mb["returns"],
                        mb["weights"],
                        args.value_clip,
                    )
                    (args.value_coef * loss).backward()
                    sums.update(value_loss=loss.detach(), value_clipped=clipped.sum())
                if args.ptx_coef:
                    update = step * num_updates + sums["updates"]
                    sums["ptx_loss"] += ptx_backward(policy, ptx_examples, update, args)
                # 9. clipped separately, so a large value loss does not slow the policy
                sums["grad_norm"] += clip_gradients(policy, args.max_grad_norm)
                sums["value_grad_norm"] += clip_gradients(value_model, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                sums["updates"] += 1

        # log, evaluate, save
        metrics = {
            "reward": completion_rewards.mean(),
            "explained_variance": explained_variance(returns, old_values, mask),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        metrics |= rollout_metrics(rollouts, gold, args) | loss_metrics(sums, batch, args)
        metrics |= update_metrics(sums, batch, args)
        metrics |= speed_metrics(batch, start_time, sampling_seconds)
        if args.kl_coef:
            metrics["kl"] = (old_logprobs - ref_logprobs).sum(1).mean()
        if held_out and is_due(args.eval_every, step + 1, args.steps):
            metrics |= evaluate(policy, reference, scorers, held_out, run=run, step=step + 1)
        mean_advantages = batch["advantages"].sum(1) / mask.sum(1)  # (B,)
        log_rollouts(run, step + 1, rollouts, completion_rewards, mean_advantages)
        run.log(step + 1, metrics, show=["score", "gold", "kl", "entropy", "eos_rate", "grad_norm"])
        run.checkpoint_if_due(step + 1)
    run.finish(policy)
    return metrics


if __name__ == "__main__":
    # the demo's reward model was only trained on text that ends in EOS; without a penalty PPO
    # learns not to stop
    laptop = dict(
        model="runs/sft",
        reward="runs/reward_model",
        steps=80,
        prompts_per_step=512,
        num_minibatches=4,
        max_completion_length=10,
        update_epochs=1,
        learning_rate=1.5e-4,
        warmup_steps=5,
        kl_coef=0.03,
        missing_eos_penalty=5.0,
        value_clip=2.0,
        eval_every=20,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
