"""Group relative policy optimization (GRPO): advantages are z-scores within a group.

    maximize  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

Shao et al. 2024, DeepSeekMath, equations 3 and 4; DeepSeek-R1. Several completions are sampled per
prompt. All tokens of a completion share one advantage: its score minus the mean of its group,
divided by the standard deviation of the group. PPO's clipped surrogate loss is averaged over the
tokens of each completion, then over completions. The KL is a second loss, the k3 estimate (see
kl_penalty for its fixed point). Flags give later variants:

    Dr. GRPO (Liu et al. 2025)     --scale-rewards none --loss-aggregation constant --kl-coef 0
    DAPO (Yu et al. 2025)          --loss-aggregation token --epsilon-high 0.28 --kl-coef 0
                                   --num-minibatches 16 --dynamic-sampling, and --mask-truncated or
                                   --overlong-buffer
    GSPO (Zheng et al. 2025)       --ratio sequence --epsilon 3e-4 --epsilon-high 4e-4 --kl-coef 0
                                   --num-minibatches 4
    distillation from a teacher    --reference TEACHER --reward none --kl-coef 1
                                   --scale-rewards none
      KL per token                 --kl-estimator k2 (Agarwal et al. 2024, GKD)
      KL of whole completions      --kl-estimator k1 (Gu et al. 2024, MiniLLM)

With one update per step, the default, every ratio is 1 and --epsilon has no effect. Not
included: a value model, generation engines, LoRA.

    python grpo.py                    demo, after sft.py: two minutes on two cores
    python grpo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

Data: rows with a prompt, and any columns a reward function reads. Expect `score` to rise with `kl`.
`gold` is an exact checker of the dataset, if there is one: it diverges from `score` when the policy
overoptimizes a reward model. docs/metrics.md has a table of symptoms. Comments cite "N+" (Huang et
al. 2024, The N+ implementation details of RLHF with PPO), "B" (its 2023 blog post) and "lmhp"
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
    Run,
    all_reduce,
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
    member_metrics,
    micro_batches,
    model_forward,
    pad_rows,
    prompt_example,
    sample,
    setup,
    shuffled_examples,
    take,
    vocabulary,
)


@dataclass
class Args:
    kl_coef: float = 0.04
    """KL penalty weight (DeepSeekMath: 0.04); 0: no KL"""
    reference: str | None = None
    """reference model (default: the initial policy); a teacher for distillation"""
    kl_estimator: Literal["k1", "k2", "k3", "k3-weighted"] = "k3"
    """KL estimate; k1 is part of the reward, the others are losses (DeepSeekMath: k3)"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """standard deviation that divides advantages (Dr. GRPO: none)"""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """mean per completion (GRPO), mean over tokens (DAPO), or scaled sum (Dr. GRPO)"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio of each token, or one per completion (GSPO)"""
    mask_truncated: bool = False
    """no loss on completions without EOS; their scores still count (DAPO, section 3.4)"""
    dynamic_sampling: bool = False
    """replace groups of equal rewards, in at most 8 rounds (DAPO, section 3.2)"""
    overlong_buffer: int = 0
    """tokens before the length limit over which the reward falls by 1 (DAPO, section 3.4)"""
    # shared by the scripts that sample
    reward: str | None = None
    """reward model, sort, gsm8k or file.py:function; comma-separated: an ensemble"""
    reward_combine: Literal["mean", "min", "mean-minus-std"] = "mean"
    """ensemble aggregation (Coste et al. 2023)"""
    reward_std_coef: float = 1.0
    """standard deviations that mean-minus-std subtracts (with two members, 1 gives min)"""
    prompts_per_step: int = 32
    """prompts per step (N+: 512; DeepSeek-R1: 32, with 16 completions each)"""
    num_generations: int = 16
    """completions per prompt (N+: 1; Ahmadian et al. 2024: 4; DeepSeek-R1: 16)"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; longer completions are cut and count as unfinished"""
    temperature: float = 1.0
    """sampling temperature; log-probs use it too"""
    missing_eos_penalty: float = 0.0
    """subtracted from the score of a completion without EOS (N+: score becomes -1)"""
    update_epochs: int = 1
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
    output_dir: str = "runs/grpo"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int = 1000
    """steps: sample and score completions, then update"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW (DeepSeekMath: 1e-6; N+: 3e-6)"""
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


def equal_groups(rewards, group_size):
    """Groups of equal rewards, which train nothing but the KL. Shapes: (B,) -> (P,) bool."""
    groups = rewards.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


def group_advantages(rewards, group_size, scale="group"):
    """A_i = (r_i - mean of its group) / (std of its group + 1e-6), groups adjacent.

    DeepSeekMath, section 4.1.2, without the 1e-6. Scale "batch" divides by the standard deviation
    of all rewards of the batch (Liu et al. 2025, Tricks or traps); "none" does not divide
    (Dr. GRPO: dividing favors prompts that are nearly always or never solved).
    Shapes: (B,) -> (B,)."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards give exactly 0, whatever the mean rounds to
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + 1e-6)
    elif scale != "none":
        raise ValueError(f"unknown scale {scale}")
    return advantages.flatten()


def kl_penalty(logprobs, ref_logprobs, estimator):
    """Estimate of KL(policy || reference) per token (Schulman 2020). Shapes: all (B, T).

    With x = log pi - log pi_ref: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x.

    With --scale-rewards none, training converges to the policies below. G is --num-generations,
    beta is --kl-coef, and b = beta G / (G - 1), because the mean of a group includes the sample:
        k1 in the reward    pi_ref exp(r / beta) / Z, the optimum of the objective
        k2 as a loss        the same with b for beta, for completions of one token
        k3 as a loss        b pi_ref / (lambda - r) for completions of one token, where lambda
                            normalizes; its gradient is the gradient of KL(pi_ref || pi)
        ratio * k3          where k2 converges, also after several updates per step
    k2 and k3 give these gradients only while the ratio is 1. k1 as a loss has mean gradient 0.

    For distillation (--reward none, --loss-aggregation constant), k1 in the reward gives the
    gradient of the KL of whole completions, up to a constant factor. k2 as a loss gives the
    gradient of the KL of each next token, without the effect of a token on later ones."""
    x = logprobs - ref_logprobs
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x**2 / 2
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"unknown estimator {estimator}")


def kl_losses(logprobs, old_logprobs, ref_logprobs, estimator):
    """kl_penalty as a loss; "k3-weighted" is k3 times the ratio (DeepSeek-V3.2).

    Shapes: all (B, T)."""
    kl = kl_penalty(logprobs, ref_logprobs, estimator.removesuffix("-weighted"))
    if estimator == "k3-weighted":
        kl = kl * (logprobs - old_logprobs).clamp(max=20).exp()
    return kl


def loss_weights(mask, aggregation, max_completion_length):
    """Weights of the token losses of a minibatch. Shapes: (b, T) -> (b, T).

    "sequence": mean over the tokens of each completion, then over completions (DeepSeekMath,
    equation 3). "token": mean over all tokens (DAPO, section 3.3). Both means ignore completions
    without trained tokens (--mask-truncated). "constant": sum over tokens divided by the maximum
    length, then mean over all completions (Dr. GRPO)."""
    if aggregation == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        num_sequences = mask.any(1).sum().clamp(min=1)
        return mask / (lengths * num_sequences)
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "constant":
        return mask / (len(mask) * max_completion_length)
    raise ValueError(f"unknown aggregation {aggregation}")


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


def ratio_logprobs(logprobs, old_logprobs, mask, ratio):
    """The log-probs of which policy_loss takes the ratio. Shapes: all (B, T).

    "token": logprobs. "sequence": all tokens of a completion get one ratio, the geometric mean of
    theirs (GSPO, Zheng et al. 2025, equation 7)."""
    if ratio == "token":
        return logprobs
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True) / lengths
    return (old_logprobs + log_ratio) * mask


def overlong_penalty(lengths, max_completion_length, buffer):
    """0 up to `buffer` tokens before the limit, then linear to -1 at the limit.

    DAPO, Yu et al. 2025, equation 13. Shapes: lengths (B,) in tokens -> (B,)."""
    tokens_over = lengths - (max_completion_length - buffer)
    return -(tokens_over / buffer).clamp(0, 1)


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


def replace_equal_groups(rollouts, policy, reward, examples, args, *, step):
    """Replace groups of equal rewards by completions of fresh prompts (DAPO, section 3.2).

    Each round draws from the data in an order of its own. Groups without a score are not replaced.
    Returns the rollouts and the number of groups replaced. After 8 rounds, equal groups stay."""
    G = args.num_generations
    first = step * args.prompts_per_step
    num_replaced = 0
    for attempt in range(8):
        groups = [rollouts[i : i + G] for i in range(0, len(rollouts), G)]
        unequal = [group for group in groups if len({rollout["reward"] for rollout in group}) > 1]
        num_equal = len(groups) - len(unequal)
        if num_equal == 0:
            break
        seed = f"{args.seed} extra {attempt}"
        prompts = shuffled_examples(examples, seed, first, first + num_equal)
        rng = generator(args.seed, "sample", step, attempt)
        rollouts = [rollout for group in unequal for rollout in group]
        rollouts += sample_and_score(policy, reward, prompts, rng, args)
        num_replaced += num_equal
    return rollouts, num_replaced


def load_reference(args, tokenizer, device):
    """--reference, by default the initial policy."""
    path = args.reference or args.model
    if not vocabulary(args.model) <= vocabulary(path):
        fail(f"--reference {path} does not have the tokens and embeddings of {args.model}")
    return load_policy(path, tokenizer, args, device)


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
    if args.reference is not None and not args.kl_coef:
        fail(f"--reference {args.reference} has no effect with --kl-coef 0")
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature} must be above 0")
    if args.num_generations < 2:
        fail("--num-generations must be at least 2")
    if args.ratio == "sequence" and args.loss_aggregation != "sequence":
        fail("--ratio sequence needs --loss-aggregation sequence")
    if not 0 <= args.overlong_buffer <= args.max_completion_length:
        fail(f"--overlong-buffer {args.overlong_buffer} must be from 0 to --max-completion-length")

    # data first: a bad file fails before models are loaded
    tokenizer = load_tokenizer(args.model)
    examples = load_examples(args.dataset, "prompts", prompt_example, tokenizer, args)
    held_out = load_held_out(examples, "prompts", prompt_example, tokenizer, args)
    prompts = [example["prompt_ids"] for example in examples + held_out]
    for path in [args.model, args.reference or args.model]:
        check_fit(path, prompts, args.max_completion_length)

    # models
    reward = load_reward(args, examples + held_out, tokenizer, device)
    gold = load_gold(args, args.dataset, tokenizer)
    eval_gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer)
    scorers = {"score": reward} | eval_gold
    policy = load_policy(args.model, tokenizer, args, device, trainable=True)
    reference = None
    if args.kl_coef or held_out:
        reference = load_reference(args, tokenizer, device)
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        eps=1e-5,  # B: as in OpenAI's PPO
        weight_decay=args.weight_decay,
        fused=True,
    )
    run = Run(args, models, optimizer, tokenizer, steps=args.steps, examples=examples)

    is_on_policy = args.update_epochs * args.num_minibatches == 1
    is_kl_reward = args.kl_coef and args.kl_estimator == "k1"
    is_kl_loss = args.kl_coef and args.kl_estimator != "k1"
    aggregation = args.loss_aggregation
    max_length = args.max_completion_length
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
        if args.dynamic_sampling:
            rollouts, num_replaced = replace_equal_groups(
                rollouts, policy, reward, examples, args, step=step
            )
        if len(rollouts) < args.num_minibatches:
            fail(f"--num-minibatches {args.num_minibatches}: {len(rollouts)} scored completions")
        batch = completion_batch(rollouts, device)  # inputs, targets, attention_mask, mask: (B, T)
        mask = batch["mask"]
        sampling_seconds = time.time() - start_time

        # rewards and advantages
        # 5. old log-probs from a training forward pass, at the sampling temperature (B)
        if is_kl_reward or not is_on_policy:
            batch["old_logprobs"] = batch_logprobs(policy, batch, args)  # (B, T)
        rewards = torch.tensor([rollout["reward"] for rollout in rollouts], device=device)  # (B,)
        if args.overlong_buffer:
            rewards = rewards + overlong_penalty(mask.sum(1), max_length, args.overlong_buffer)
        zero_std_groups = equal_groups(rewards, args.num_generations).float().mean()
        if is_kl_reward:  # 6. the k1 of a completion is part of its reward
            kl = (batch["old_logprobs"] - batch_logprobs(reference, batch, args)).sum(1)
            rewards = rewards - args.kl_coef * kl
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
        batch["advantages"] = advantages[:, None] * mask
        # 7. completions that --mask-truncated does not train are still part of the group
        is_trained = [rollout["finished"] or not args.mask_truncated for rollout in rollouts]
        batch["loss_mask"] = mask * torch.tensor(is_trained, device=device)[:, None]

        # update
        optimizer.param_groups[0]["lr"] = scheduled_learning_rate(step, args.steps, args)
        sums = Counter()
        for epoch in range(args.update_epochs):
            for rows in minibatch_rows(len(mask), step, epoch, args):
                minibatch = take(batch, rows)
                minibatch["weights"] = loss_weights(minibatch["loss_mask"], aggregation, max_length)
                if not is_kl_loss:  # 8. no gradient at advantage 0: skip (not with other losses)
                    minibatch = take(minibatch, minibatch["advantages"].any(1).nonzero()[:, 0])
                for mb in micro_batches(minibatch, max_tokens):
                    if is_kl_loss:  # before the policy's activations exist
                        ref_logprobs = logprobs_without_gradient(reference, mb, args.temperature)
                    logprobs, entropy = token_logprobs_and_entropy(policy, mb, args.temperature)
                    old_logprobs = logprobs.detach() if is_on_policy else mb["old_logprobs"]
                    loss, clipped = policy_loss(
                        ratio_logprobs(logprobs, old_logprobs, mb["mask"], args.ratio),
                        old_logprobs,
                        mb["advantages"],
                        mb["weights"],
                        args.epsilon,
                        epsilon_high=args.epsilon_high,
                    )
                    if is_kl_loss:
                        kl = kl_losses(logprobs, old_logprobs, ref_logprobs, args.kl_estimator)
                        loss = loss + args.kl_coef * (mb["weights"] * kl).sum()
                        sums["kl"] += (old_logprobs - ref_logprobs).sum()
                    loss.backward()
                    track_ratio(sums, logprobs, old_logprobs)
                    sums.update(loss=loss.detach(), clipped=clipped.sum(), entropy=entropy.sum())
                    count_tokens(sums, mb)
                sums["grad_norm"] += clip_gradients(policy, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                sums["updates"] += 1

        # log, evaluate, save
        metrics = {
            "loss": all_reduce(sums["loss"]) / sums["updates"],
            "reward": rewards.mean(),
            "zero_std_groups": zero_std_groups,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        if is_kl_reward:
            metrics["kl"] = kl.mean()
        elif is_kl_loss:
            metrics["kl"] = all_reduce(sums["kl"]) / (args.update_epochs * len(rollouts))
        if args.dynamic_sampling:
            metrics["dropped_groups"] = num_replaced / (args.prompts_per_step + num_replaced)
        metrics |= rollout_metrics(rollouts, gold, args)
        metrics |= update_metrics(sums, batch, args)
        metrics |= speed_metrics(batch, start_time, sampling_seconds)
        if held_out and is_due(args.eval_every, step + 1, args.steps):
            metrics |= evaluate(policy, reference, scorers, held_out, run=run, step=step + 1)
        log_rollouts(run, step + 1, rollouts, rewards, advantages)
        run.log(step + 1, metrics, show=["score", "gold", "kl", "entropy", "eos_rate", "grad_norm"])
        run.checkpoint_if_due(step + 1)
    run.finish(policy)
    return metrics


if __name__ == "__main__":
    laptop = dict(
        model="runs/sft",
        reward="sort",
        steps=160,
        prompts_per_step=32,
        num_generations=8,
        max_completion_length=10,
        learning_rate=3e-4,
        warmup_steps=5,
        kl_coef=0.02,
        eval_every=40,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
