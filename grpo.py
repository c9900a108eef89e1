"""Group relative policy optimisation (GRPO): advantages are z-scores within a group.

    maximise  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

Shao et al. 2024, DeepSeekMath, equations 3 and 4; DeepSeek-R1. A completion's advantage, its score
less the mean of its group and divided by the group's standard deviation, is that of all its tokens;
PPO's clipped surrogate is averaged over the tokens of each completion, then over completions; the
KL is a second loss, the k3 estimate (its gradient is not quite that of the objective: see
kl_penalty). Later work, by flags:

    Dr. GRPO (Liu et al. 2025)     --scale-rewards none --loss-aggregation constant --kl-coef 0
    DAPO (Yu et al. 2025)          --loss-aggregation token --epsilon-high 0.28 --kl-coef 0
                                   --num-minibatches 16 --dynamic-sampling, and --mask-truncated or
                                   --overlong-buffer
    GSPO (Zheng et al. 2025)       --ratio sequence --epsilon 3e-4 --epsilon-high 4e-4 --kl-coef 0
                                   --num-minibatches 4
    distillation of a teacher      --reference TEACHER --reward none --kl-coef 1
                                   --scale-rewards none
      each token's KL              --kl-estimator k2 (Agarwal et al. 2024, GKD)
      whole completions' KL        --kl-estimator k1 --kl-in reward (Gu et al. 2024, MiniLLM)

With one update per rollout, the default, every ratio is 1, and --epsilon has no effect. Left out: a
value model, generation engines, LoRA.

    python grpo.py                    after sft.py: two minutes, two cores
    python grpo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

Data: rows of prompt, and any columns that a checker reads. Expect `score` to rise with `kl`. Where
the data set has an exact checker of its own, `gold` is logged beside the score: the reward model is
the proxy, gold is the truth, and they part when the policy over-optimises. Comments cite "N+"
(Huang et al. 2024, The N+ implementation details of RLHF with PPO), "B" (the blog post before it)
and "lmhp" (openai/lm-human-preferences)."""

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
    pad_rows,
    prompt_of,
    same_ids,
    sample,
    setup,
    stream,
    take,
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
    output_dir: str = "runs/grpo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int = 1000
    """rollouts, each followed by its updates"""
    learning_rate: float = 1e-6
    """peak, of AdamW (3e-6: N+; 1e-6: Ahmadian et al. 2024, DeepSeekMath)"""
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
    reward: str | None = None
    """a reward model (directory or Hub id), a checker (sort, gsm8k), or path/file.py:function;
    several, an ensemble, with commas between"""
    reward_combine: Literal["mean", "min", "mean-minus-std"] = "mean"
    """how several rewards, commas between, make one score (Coste et al. 2023)"""
    reward_std_coef: float = 1.0
    """standard deviations that mean-minus-std takes off the mean"""
    prompts_per_step: int = 32
    """prompts of one rollout; with the next flag, 512 completions (N+, DeepSeek-R1)"""
    num_generations: int = 16
    """completions of each prompt, its group (1: N+; 4: Ahmadian et al. 2024; 16: DeepSeek-R1)"""
    max_prompt_length: int = 512
    """tokens of a prompt; longer ones are dropped and counted"""
    max_completion_length: int = 256
    """tokens of a completion; one without EOS by then is cut, and counts as unfinished"""
    temperature: float = 1.0
    """of sampling, and of every log-prob (1: the saved model is the one that was trained)"""
    kl_coef: float = 0.04
    """weight of the KL (0.05: N+; 0.03: Ahmadian et al. 2024; 0.04: DeepSeekMath; 0: no KL)"""
    reference: str | None = None
    """the model that the KL is from; without it the start. A teacher, with --reward none, makes it
    on-policy distillation"""
    missing_eos_penalty: float = 0.0
    """taken off the score of a completion without EOS (N+ sets such a score to -1)"""
    update_epochs: int = 1
    """passes over a rollout (4: N+; 1: Ahmadian et al. 2024, DeepSeekMath)"""
    num_minibatches: int = 1
    """optimiser steps per pass (1: N+)"""
    epsilon: float = 0.2
    """clip range of the ratio (Schulman et al. 2017)"""
    epsilon_high: float | None = None
    """upper clip range, where it differs (DAPO, Yu et al. 2025: 0.28)"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimate of the KL (see kl_penalty; k3: DeepSeekMath)"""
    kl_in: Literal["loss", "reward"] = "loss"
    """the KL is a loss of its own, by k2 or k3 (DeepSeekMath), or part of the reward, by k1"""
    kl_ratio: bool = False
    """k3 times the ratio: the gradient of KL(policy || reference) off-policy too (DeepSeek-V3.2)"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation of the group, of the batch, or not (Dr. GRPO)"""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """mean over each completion's tokens (GRPO), over all tokens (DAPO), or a sum (Dr. GRPO)"""
    mask_truncated: bool = False
    """no gradient from a completion without EOS, whose score still counts (DAPO, section 3.4)"""
    dynamic_sampling: bool = False
    """replace groups of equal rewards (score, --missing-eos-penalty) by fresh prompts, in 8 rounds
    at most (DAPO, section 3.2)"""
    overlong_buffer: int = 0
    """tokens before --max-completion-length over which the reward falls by 1 (DAPO, section 3.4)"""
    ratio: Literal["token", "sequence"] = "token"
    """of each token, or one of the completion, for which --epsilon is far smaller (GSPO, Zheng et
    al. 2025: 3e-4, and --epsilon-high 4e-4)"""


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
def token_logprobs_and_entropy(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) of softmax(logits / temperature), and that
    softmax's entropy.

    batch: inputs, targets, attention_mask, mask, each (B, T) -> logprobs, entropy (detached), each
    (B, T) float32, in nats, 0 outside the mask. Head and softmax run at mask positions only, and
    where these are many in chunks, computed again in the backward pass, so that memory does not
    grow with B * T * V."""
    mask = batch["mask"].bool()
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state[mask]  # (N, H)
    targets = batch["targets"][mask]  # (N,)

    def logprobs_and_entropy_of(hidden, targets):
        logps = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (n, V) float32
        logprobs = logps.gather(-1, targets[:, None])[:, 0]
        logps = logps.detach().clamp(min=-1e30)  # a forbidden token, of probability 0, adds 0
        entropy = -(logps.exp() * logps).sum(-1)
        return logprobs, entropy

    chunk = 40_000_000 // model.config.get_text_config().vocab_size
    if len(targets) <= chunk:
        logprobs, entropy = logprobs_and_entropy_of(hidden, targets)
    else:
        pairs = zip(hidden.split(chunk), targets.split(chunk))
        results = [checkpoint(logprobs_and_entropy_of, h, t, use_reentrant=False) for h, t in pairs]
        logprobs = torch.cat([logprobs for logprobs, _ in results])
        entropy = torch.cat([entropy for _, entropy in results])
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def batch_logprobs(model, batch, args, autocast):
    """Log-probs of a whole batch, without gradient -> (B, T)."""
    with autocast():
        return in_micro_batches(
            lambda mb: token_logprobs_and_entropy(model, mb, args.temperature)[0],
            batch,
            args.micro_batch_tokens,
        )


def equal_groups(rewards, group_size):
    """True for groups of equal rewards, which teach nothing but the KL: (B,) -> (P,) bool."""
    groups = rewards.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


def group_advantages(rewards, group_size, scale="group"):
    """A_i = (r_i - mean of its group) / (its std + 1e-6) (DeepSeekMath, section 4.1.2,
    without the 1e-6).

    rewards (B,), groups side by side -> (B,). scale "batch": the standard deviation of all rewards
    of the batch (Liu et al. 2025, Tricks or traps); "none": no division (Dr. GRPO: dividing favours
    prompts that are nearly always or never solved)."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards: exactly 0, whatever the rounding of their mean
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + 1e-6)
    elif scale != "none":
        raise ValueError(f"unknown scale {scale}")
    return advantages.flatten()


def kl_penalty(logprobs, ref_logprobs, estimator):
    """Estimate of KL(policy || reference) at each token: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x
    with x = log pi - log pi_ref (Schulman 2020, Approximating KL divergence). All (B, T).

    Where each ends with --scale-rewards none; beta is --kl-coef, G --num-generations, b = beta G /
    (G-1), since a group's mean includes the sample, lambda what makes probabilities sum to 1:
    k1 in the reward   at pi_ref exp(r / beta) / Z
    k2 as a loss       on one-token completions at the same, with b for beta
    k3 as a loss       on one-token completions at b pi_ref / (lambda - r): its gradient is that of
        KL(pi_ref || pi)
    ratio * k3 as a loss (--kl-ratio)   where k2 ends: its gradient is that of KL(pi || pi_ref)
    With ratio * k3 this holds after several updates of a rollout too; k2 and k3 alone point there
    only while the ratio is 1, and later theirs is the gradient of no divergence. Not offered: k1 as
    a loss (does not regularise: its mean gradient is 0), k2 and k3 in the reward (no sound fixed
    point).

    With --reward none, from another --reference, and --loss-aggregation constant: k1 in the reward
    gives the gradient of KL(policy || reference) of whole completions on the policy's own samples
    (times (G-1)/G); k2 as a loss that of each next token's KL, which ignores that a token changes
    the next ones. The other aggregations divide by lengths, which turns it a little."""
    x = logprobs - ref_logprobs
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x**2 / 2
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"unknown estimator {estimator}")


def loss_weights(mask, aggregation, max_completion_length):
    """mask (b, T) of a minibatch -> weights (b, T) of its token losses.

    "sequence": mean over the tokens of each completion, then over completions (DeepSeekMath,
    equation 3); "token": mean over all tokens (DAPO, section 3.3); a completion without a trained
    token (--mask-truncated) counts in neither; "constant": sum over the longest possible length,
    then mean over all completions (Dr. GRPO)."""
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
    """Clipped surrogate: sum of weights * max(- A ratio, - A clip(ratio, 1 - epsilon, 1 +
    epsilon_high)).

    Schulman et al. 2017, equation 7, negated. All (B, T) -> loss scalar, clipped (B, T) bool:
    tokens whose gradient the clip removed. Weights are 0 outside the mask and carry the
    normaliser."""
    if epsilon_high is None:
        epsilon_high = epsilon
    # without the clamp a token that the clip removes could give infinity times 0
    log_ratio = (logprobs - old_logprobs).clamp(max=20)
    ratio = log_ratio.exp()
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = (weights * torch.max(pg_loss1, pg_loss2)).sum()
    clipped = (pg_loss2 > pg_loss1) & (weights > 0)
    return loss, clipped


def sequence_logprobs(logprobs, old_logprobs, mask):
    """Log-probs that give every token of a completion one ratio, exp of the mean over its tokens of
    log pi / pi_old, whatever its length (GSPO, Zheng et al. 2025, equation 7). All (B, T)."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True) / lengths
    return (old_logprobs + log_ratio) * mask


def overlong_penalty(lengths, max_completion_length, buffer):
    """0 up to `buffer` tokens before the limit, then in a straight line to -1 at the limit (DAPO,
    Yu et al. 2025, equation 13). lengths (B,), in tokens -> (B,)."""
    tokens_over = lengths - (max_completion_length - buffer)
    return -(tokens_over / buffer).clamp(0, 1)


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


def sample_groups(policy, examples, rng, *, ensemble, eos_ids, args, autocast):
    """Sample and score G completions of each of P prompts -> list of rollouts, a group's side by
    side: its example with completion_ids, finished, score, member_scores and reward. A group with a
    completion that cannot be judged is left out."""
    with autocast():
        completions = sample(
            policy,
            [example["prompt_ids"] for example in examples],
            num_generations=args.num_generations,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            eos_ids=eos_ids,
            rng=rng,
        )
    # 1. a completion ends with its first EOS, which is kept and trained (N+ samples on, then cuts)
    # 2. it is scored together with its prompt (B)
    examples = [example for example in examples for _ in range(args.num_generations)]
    member_scores = torch.stack([member(examples, completions) for member in ensemble])  # (k, B)
    scores = combine_scores(member_scores, args)
    rollouts = []
    for i, (example, completion_ids) in enumerate(zip(examples, completions)):
        completion_score = scores[i].item()
        finished = completion_ids[-1] in eos_ids
        # 3. one without EOS loses --missing-eos-penalty (N+ and lmhp set its score to -1)
        reward = completion_score if finished else completion_score - args.missing_eos_penalty
        rollouts.append(
            example
            | {
                "completion_ids": completion_ids,
                "finished": finished,
                "score": completion_score,
                "member_scores": member_scores[:, i],
                "reward": reward,
            }
        )
    # 4. a group with a completion that the reward cannot judge (NaN) is left out, of the KL too
    judged = []
    for start in range(0, len(rollouts), args.num_generations):
        group = rollouts[start : start + args.num_generations]
        if not any(math.isnan(rollout["score"]) for rollout in group):
            judged += group
    return judged


def replace_equal_groups(rollouts, sample_fresh, group_size):
    """Groups of equal rewards are replaced by those of fresh prompts, which sample_fresh(attempt,
    number) gives (DAPO, section 3.2) -> rollouts, number of groups replaced. What is equal after 8
    rounds stays."""
    num_replaced = 0
    for attempt in range(8):
        groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
        unequal = [group for group in groups if len({rollout["reward"] for rollout in group}) > 1]
        num_equal = len(groups) - len(unequal)
        if num_equal == 0:
            break
        rollouts = [rollout for group in unequal for rollout in group]
        rollouts += sample_fresh(attempt, num_equal)
        num_replaced += num_equal
    return rollouts, num_replaced


def load_reference(args, tokenizer, device):
    """--reference, or the start; None where --kl-coef is 0."""
    if not args.kl_coef:
        return None
    path = args.reference or args.model
    other = load_tokenizer(path, "--reference")
    if not (same_ids(tokenizer, other) and same_ids(other, tokenizer)):
        fail(f"--reference {path}: its tokens are not those of --model, so it cannot judge them")
    return load_policy(path, device, "--reference")


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def grpo_update(policy, reference, optimizer, batch, *, step, args, autocast):
    """Epochs of minibatches over a rollout -> totals over all of them. A minibatch has one
    normaliser, however it is cut into micro-batches."""
    is_kl_loss = reference is not None and args.kl_in == "loss"
    totals = Counter()
    ratio_max_dev = 0.0
    for epoch in range(args.update_epochs):
        order = torch.randperm(
            len(batch["inputs"]),
            generator=generator(args.seed, "minibatch", step, epoch),
        )
        for minibatch_rows in order.tensor_split(args.num_minibatches):
            minibatch = take(batch, minibatch_rows)
            minibatch["weights"] = loss_weights(
                minibatch["trained"],
                args.loss_aggregation,
                args.max_completion_length,
            )
            for mb in micro_batches(minibatch, args.micro_batch_tokens):
                if is_kl_loss:  # before the policy's activations exist
                    with torch.no_grad(), autocast():
                        mb_ref_logprobs, _ = token_logprobs_and_entropy(
                            reference,
                            mb,
                            args.temperature,
                        )
                with autocast():
                    mb_logprobs, mb_entropy = token_logprobs_and_entropy(
                        policy,
                        mb,
                        args.temperature,
                    )
                # with one update a rollout, its old log-probs are the update's own
                mb_old_logprobs = mb.get("old_logprobs", mb_logprobs.detach())
                pg_logprobs = mb_logprobs
                if args.ratio == "sequence":
                    pg_logprobs = sequence_logprobs(mb_logprobs, mb_old_logprobs, mb["mask"])
                loss, clipped = policy_loss(
                    pg_logprobs,
                    mb_old_logprobs,
                    mb["advantages"],
                    mb["weights"],
                    args.epsilon,
                    epsilon_high=args.epsilon_high,
                )
                if is_kl_loss:
                    kl_loss = kl_penalty(mb_logprobs, mb_ref_logprobs, args.kl_estimator)
                    if args.kl_ratio:
                        kl_loss = kl_loss * (mb_logprobs - mb_old_logprobs).clamp(max=20).exp()
                    loss = loss + args.kl_coef * (mb["weights"] * kl_loss).sum()
                    totals["kl"] += (mb_old_logprobs - mb_ref_logprobs).sum()
                loss.backward()
                totals["loss"] += loss.detach()
                totals["entropy"] += mb_entropy.sum()
                totals["clipped"] += clipped.sum()
                totals["padded_tokens"] += mb["inputs"].numel()
                # before the first update the ratio is 1, up to rounding
                if totals["updates"] == 0:
                    ratio = (mb_logprobs - mb_old_logprobs).detach().exp()
                    ratio_max_dev = max(ratio_max_dev, (ratio - 1).abs().max().item())
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            if not grad_norm.isfinite():
                fail(f"step {step + 1}: the gradient's norm is {grad_norm}; no update was made")
            optimizer.step()
            optimizer.zero_grad()
            totals["grad_norm"] += grad_norm
            totals["updates"] += 1
    for name in ("loss", "kl", "entropy", "clipped", "padded_tokens"):
        totals[name] = all_reduce(totals[name])
    totals["ratio_max_dev"] = all_reduce(ratio_max_dev, op="max")
    return totals


@torch.no_grad()
def evaluate(policy, reference, examples, *, ensemble, gold, tokenizer, eos_ids, args, autocast):
    """One greedy and G sampled completions of each held-out prompt -> metrics, and a row for each
    prompt with its first sampled completion: their scores, the share that ends in EOS, tokens, and
    the KL from the reference in nats per completion."""
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
    logprobs = batch_logprobs(policy, batch, args, autocast)
    reference = reference or load_policy(args.model, policy.device)
    ref_logprobs = batch_logprobs(reference, batch, args, autocast)
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
    if args.reference is not None and not args.kl_coef:
        fail(f"--reference {args.reference} counts for nothing, since --kl-coef is 0")
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature}: logits are divided by it; it must be above 0")
    if args.num_generations < 2:
        fail("--num-generations is 1, and a group of one has no advantage: give at least 2")
    if (args.kl_in == "reward") != (args.kl_estimator == "k1"):
        fail(f"--kl-estimator {args.kl_estimator}: k1 is for --kl-in reward, k2, k3 for loss")
    if args.ratio == "sequence" and args.loss_aggregation != "sequence":
        fail(f"--ratio sequence is for --loss-aggregation sequence, not {args.loss_aggregation}")
    if not 0 <= args.overlong_buffer <= args.max_completion_length:
        fail(f"--overlong-buffer {args.overlong_buffer}: not within --max-completion-length")
    if args.dynamic_sampling and args.reward == "none":
        fail("--dynamic-sampling replaces groups of equal rewards, and --reward none has no others")
    if args.kl_ratio and args.kl_estimator != "k3":
        fail(f"--kl-ratio is for --kl-estimator k3, not {args.kl_estimator}")
    batch_size = args.prompts_per_step * args.num_generations
    if batch_size < args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: a step has {batch_size} completions")

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model)
    examples = load_examples(args.dataset, prompt_example, tokenizer, args)
    held_out = load_held_out(prompt_example, tokenizer, args)
    longest_prompt = max(len(example["prompt_ids"]) for example in examples + held_out)
    for flag, path in [("--model", args.model), ("--reference", args.reference)]:
        if path is not None:
            check_fit(
                path,
                flag,
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
    reference = load_reference(args, tokenizer, device)
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        eps=1e-5,  # B: as OpenAI's PPO has it
        weight_decay=args.weight_decay,
        fused=True,
    )
    run = Run(args, models, optimizer, args.steps, examples)

    def held_out_metrics(step):
        metrics, rows = evaluate(
            policy,
            reference,
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
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, held_out_metrics(0))
    for step in range(start, args.steps):
        # take the next prompts, in an order of its own for every pass over the data
        began = time.time()
        first = step * args.prompts_per_step
        prompts = stream(examples, args.seed, first, first + args.prompts_per_step)

        # sample completions and score them
        rollouts = sample_groups(
            policy,
            prompts,
            generator(args.seed, "sample", step),
            ensemble=ensemble,
            eos_ids=eos_ids,
            args=args,
            autocast=autocast,
        )
        num_replaced = 0
        if args.dynamic_sampling:
            rollouts, num_replaced = replace_equal_groups(
                rollouts,
                lambda attempt, number, step=step, first=first: sample_groups(
                    policy,
                    stream(examples, f"{args.seed} extra {attempt}", first, first + number),
                    generator(args.seed, "sample", step, attempt),
                    ensemble=ensemble,
                    eos_ids=eos_ids,
                    args=args,
                    autocast=autocast,
                ),
                args.num_generations,
            )
        if len(rollouts) < args.num_minibatches:
            fail(f"step {step + 1}: the reward judged only {len(rollouts)} completions")
        completions = [rollout["completion_ids"] for rollout in rollouts]
        batch = completion_batch(
            [rollout["prompt_ids"] for rollout in rollouts],
            completions,
            device,
        )
        mask = batch["mask"]  # (B, T)
        scores = torch.tensor([rollout["score"] for rollout in rollouts], device=device)  # (B,)
        sampling_seconds = time.time() - began

        # compute advantages
        # 5. log-probs are of the forward that trains them (the sampler's differ by rounding), at
        # the temperature of sampling, else they speak of another distribution (B)
        has_one_update = args.update_epochs * args.num_minibatches == 1
        is_kl_reward = reference is not None and args.kl_in == "reward"
        is_kl_loss = reference is not None and args.kl_in == "loss"
        if is_kl_reward or not has_one_update:
            batch["old_logprobs"] = batch_logprobs(policy, batch, args, autocast)  # (B, T)
        rewards = torch.tensor([rollout["reward"] for rollout in rollouts], device=device)  # (B,)
        if args.overlong_buffer:
            lengths = mask.sum(1)
            rewards = rewards + overlong_penalty(
                lengths,
                args.max_completion_length,
                args.overlong_buffer,
            )
        zero_std_groups = equal_groups(rewards, args.num_generations).float().mean()
        # 6. with --kl-in reward a completion's KL is part of its reward, before the group's mean
        if is_kl_reward:
            ref_logprobs = batch_logprobs(reference, batch, args, autocast)
            kl = kl_penalty(batch["old_logprobs"], ref_logprobs, args.kl_estimator).sum(1)
            rewards = rewards - args.kl_coef * kl
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
        batch["advantages"] = advantages[:, None] * mask
        # 7. with --mask-truncated a completion without EOS trains nothing, but counts in its group
        batch["trained"] = mask
        if args.mask_truncated:
            finished = torch.tensor([rollout["finished"] for rollout in rollouts], device=device)
            batch["trained"] = mask * finished[:, None]

        # update the weights
        learning_rate = scheduled_learning_rate(step, args.steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        totals = grpo_update(
            policy,
            reference,
            optimizer,
            batch,
            step=step,
            args=args,
            autocast=autocast,
        )

        # log, evaluate, save
        seconds = time.time() - began
        updates = totals["updates"]
        trained_tokens = args.update_epochs * mask.sum()
        clip_tokens = args.update_epochs * batch["trained"].sum().clamp(min=1)
        batch_tokens = batch["attention_mask"].sum()
        metrics = {
            "loss": totals["loss"] / updates,
            "reward": rewards.mean(),
            "score": scores.mean(),
            "entropy": totals["entropy"] / trained_tokens,
            "ratio_max_dev": totals["ratio_max_dev"],
            "clip_fraction": totals["clipped"] / clip_tokens,
            "completion_length": mask.sum(1).float().mean(),
            "eos_rate": sum(rollout["finished"] for rollout in rollouts) / len(rollouts),
            "unjudged": 1 - len(rollouts) / batch_size,
            "zero_std_groups": zero_std_groups,
            "grad_norm": totals["grad_norm"] / updates,
            "learning_rate": learning_rate,
            "padding": 1 - args.update_epochs * batch_tokens / totals["padded_tokens"],
            "tokens_per_second": batch_tokens / seconds,
            "seconds/sample": sampling_seconds,
            "seconds/train": seconds - sampling_seconds,
        }
        if is_kl_reward:
            metrics["kl"] = kl.mean()
        if is_kl_loss:
            metrics["kl"] = totals["kl"] / (args.update_epochs * len(rollouts))
        if args.dynamic_sampling:  # what else is logged here is of the groups that were kept
            metrics["dropped_groups"] = num_replaced / (args.prompts_per_step + num_replaced)
        if gold is not None:
            metrics["gold"] = gold(rollouts, completions).mean()
        metrics |= member_metrics(torch.stack([x["member_scores"] for x in rollouts], dim=1))
        if held_out and is_due(args.eval_every, step + 1, args.steps):
            metrics |= held_out_metrics(step + 1)
        run.log(
            step + 1,
            metrics,
            show=["score", "gold", "kl", "entropy", "eos_rate", "zero_std_groups"],
        )
        run.checkpoint_if_due(step + 1)
    logs = "samples.jsonl" if held_out else "metrics.jsonl"
    run.finish(policy, tokenizer, eos_ids, f"look at {args.output_dir}/{logs}")
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
