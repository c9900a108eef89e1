"""Group relative policy optimisation (GRPO): no value model, advantages are z-scores within a group.

    maximise  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

Shao et al. 2024, DeepSeekMath, equations 3 and 4; DeepSeek-R1. A completion's advantage, its score less the
mean of its group and divided by the group's standard deviation, is that of all its tokens; PPO's clipped
surrogate is averaged over the tokens of each completion, then over completions; the KL is a second loss, the
k3 estimate (its gradient is not quite that of the objective: see kl_penalty). Later work is one flag each.
Dr. GRPO (Liu et al. 2025): --scale-rewards none --loss-aggregation constant --kl-coef 0. DAPO (Yu et al.
2025): --loss-aggregation token --epsilon-high 0.28 --minibatches 16 --kl-coef 0 --dynamic-sampling, and
--mask-truncated (with one update per rollout, the default, no ratio leaves 1 and no clip is at work).
Left out: a value model, process rewards, DAPO's soft overlong punishment, generation engines, LoRA.

    python grpo.py                    laptop run, after sft.py: two minutes, two cores
    python grpo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

Data: rows of prompt, and any columns that a checker reads. Expect `score` to rise with `kl`. Where the data
set has an exact checker of its own, `gold` is logged beside the score: the reward model is the proxy, gold is
the truth, and they part when the policy over-optimises. Comments cite "N+" (Huang et al. 2024, The N+
implementation details of RLHF with PPO), "B" (the blog post before it) and "lmhp"
(openai/lm-human-preferences)."""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import Run, as_forward, cli, clip_gradients, completion_batch, due, eos_ids, evaluate_samples
from common import generator, head_logits, head_rows, hidden_states, load_examples, load_held_out, load_policy
from common import load_reward, load_tokenizer, make_optimizer, micro_batches, over_micro_batches, over_ranks
from common import sample, set_learning_rate, setup, shuffled, stop, stream_logprobs


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
    output_dir: str = "runs/grpo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """of data order, sampling and new weights"""
    steps: int = 1000
    """rollouts, each followed by its updates"""
    learning_rate: float = 1e-6
    """peak, of AdamW (3e-6: N+; 1e-6: Ahmadian et al. 2024, DeepSeekMath)"""
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
    reward: str | None = None
    """a reward model (directory or Hub id), `sort` or `gsm8k` (exact checkers), or path/file.py:function"""
    prompts_per_step: int = 32
    """prompts of one rollout; with the next flag, 512 completions (N+, DeepSeek-R1)"""
    num_generations: int = 16
    """completions of each prompt, its group (1: N+; 4: Ahmadian et al. 2024; 16: DeepSeek-R1)"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; a completion without EOS by then is cut, and counts as unfinished"""
    temperature: float = 1.0
    """of sampling, and of every log-prob (1: the saved model is the one that was trained)"""
    kl_coef: float = 0.04
    """weight of the KL (0.05: N+; 0.03: Ahmadian et al. 2024; 0.04: DeepSeekMath; 0: only in evaluations)"""
    missing_eos_penalty: float = 0.0
    """taken off the score of a completion without EOS (N+ sets such a score to -1)"""
    update_epochs: int = 1
    """passes over a rollout (4: N+; 1: Ahmadian et al. 2024, DeepSeekMath)"""
    minibatches: int = 1
    """optimiser steps per pass (1: N+)"""
    epsilon: float = 0.2
    """clip range of the ratio (Schulman et al. 2017)"""
    epsilon_high: float | None = None
    """upper clip range, where it differs (DAPO, Yu et al. 2025: 0.28)"""
    kl: Literal["k3-loss", "k2-loss", "k1-reward"] = "k3-loss"
    """where the KL goes, and by which estimate (see kl_penalty); with k1-reward, --scale-rewards none"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation of the group, of the batch, or not (Dr. GRPO)"""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """mean over each completion's tokens (GRPO), over all tokens (DAPO), or sum over a length (Dr. GRPO)"""
    mask_truncated: bool = False
    """no gradient from a completion without EOS (DAPO, section 3.4); its score still counts in its group"""
    dynamic_sampling: bool = False
    """replace groups of equal rewards by fresh prompts, in at most 8 more rounds (DAPO, section 3.2)"""


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


def masked_mean(x, mask):
    """Mean of x (B, L-1) over the mask -> scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def equal_groups(rewards, group_size):
    """True for groups whose rewards are all equal: (B,), NaN if not judged -> (P,) bool."""
    groups = rewards.view(-1, group_size)
    return groups.nan_to_num(-torch.inf).amax(1) <= groups.nan_to_num(torch.inf).amin(1)


def group_advantages(rewards, group_size, scale="group"):
    """A_i = (r_i - mean of its group) / (its standard deviation + 1e-6) (DeepSeekMath, section 4.1.2).

    rewards (B,), groups side by side, NaN if not judged -> (B,): those get 0 and are in nobody's statistics.
    scale "batch": the standard deviation of all rewards of the batch (Liu et al. 2025, Tricks or traps);
    "none": no division (Dr. GRPO: dividing favours prompts that are nearly always or never solved)."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups.nanmedian(1, keepdim=True).values  # equal rewards: 0, whatever the rounding
    others = (~groups.isnan()).sum(1, keepdim=True) - 1
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        std = (advantages.square().nansum(1, keepdim=True) / others.clamp(min=1)).sqrt()  # ddof 1
        advantages = advantages / (std + 1e-6)
    elif scale == "batch":
        judged = rewards[~rewards.isnan()]
        advantages = advantages / (judged.std(correction=min(1, len(judged) - 1)) + 1e-6)
    elif scale != "none":
        raise ValueError(f"unknown scale {scale}")
    return advantages.flatten().nan_to_num()


def kl_penalty(logprobs, ref_logprobs, estimator):
    """Estimate of KL(policy || reference) at each token: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x with
    x = log pi - log pi_ref (Schulman 2020, Approximating KL divergence). All (B, L-1).

    Where they lead with --scale-rewards none: k1 in the reward to pi_ref exp(r / beta) / Z. k2 as a loss, on
    one-token completions, there too, with b = beta G / (G-1) for beta, since a group's mean includes the
    sample. k3 as a loss, GRPO's, on one-token completions to another law, b pi_ref / (lambda - r): its
    gradient is that of KL(pi_ref || pi). Not offered: k1 as a loss (does not regularise: its mean gradient
    is 0), k2 and k3 in the reward (no sound fixed point)."""
    x = logprobs - ref_logprobs
    return {"k1": x, "k2": x**2 / 2, "k3": torch.expm1(-x) + x}[estimator]


def loss_weights(mask, aggregation, max_completion_length):
    """mask (b, L-1) of a minibatch -> weights (b, L-1) of its token losses.

    "sequence": mean over the tokens of each completion, then over completions (DeepSeekMath, equation 3);
    "token": mean over all tokens (DAPO, section 3.3), neither counting what has no trained token; "constant":
    sum over the longest possible length, then mean over all completions (Dr. GRPO)."""
    lengths, tokens = mask.sum(1, keepdim=True).clamp(min=1), mask.sum().clamp(min=1)
    normalisers = {"sequence": lengths * mask.any(1).sum().clamp(min=1), "token": tokens}
    normalisers["constant"] = len(mask) * max_completion_length
    return mask / normalisers[aggregation]


def policy_loss(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high=None):
    """Clipped surrogate: sum of weights * max(- A ratio, - A clip(ratio, 1 - epsilon, 1 + epsilon_high)).

    Schulman et al. 2017, equation 7, negated. All (B, L-1) -> loss scalar, clipped (B, L-1) bool: tokens
    whose gradient the clip removed. Weights are 0 outside the mask and carry the normaliser."""
    ratio = (logprobs - old_logprobs).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - epsilon, 1 + high)
    return (weights * torch.max(pg_loss1, pg_loss2)).sum(), (pg_loss2 > pg_loss1) & (weights > 0)


def main(args):
    device, autocast = setup(args)
    batch_size = args.prompts_per_step * args.num_generations
    if args.num_generations < 2:
        stop("--num-generations is 1, and a group of one has no advantage: give at least 2")

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "prompt", args)
    held_out = load_held_out(tokenizer, "prompt", args)
    score, gold = load_reward(args, tokenizer, examples + held_out, stop_ids, device, autocast)
    policy = load_policy(args.model, device, train=args)
    reference = load_policy(args.model, device) if args.kl_coef else None
    models = {"policy": policy}
    optimizer = make_optimizer(models.values(), args, eps=1e-5)  # B: as OpenAI's PPO has it

    def rollout(picked, draw):
        """P prompts, G completions each, side by side -> B examples, completions, scores, penalised scores"""
        lengths = args.num_generations, args.max_completion_length
        prompts = [e["prompt_ids"] for e in picked]
        with autocast():
            completions, _ = sample(policy, prompts, *lengths, args.temperature, stop_ids, draw)
        picked = [e for e in picked for _ in range(args.num_generations)]
        # 1. a completion ends with its first EOS, which is kept and trained (N+ cuts there after sampling on)
        # 2. it is scored with its prompt (B); NaN: the checker cannot judge it, and it takes no part
        scores = score(picked, completions).to(device)  # (B,)
        # 3. one without EOS loses --missing-eos-penalty (N+ and lmhp set its score to -1)
        unfinished = torch.tensor([c[-1] not in stop_ids for c in completions], device=device)
        return picked, completions, scores, scores - args.missing_eos_penalty * unfinished

    def logprobs_of(model, batch):
        """token_logprobs of a whole batch, without gradient"""
        inputs = batch, args.micro_batch_tokens, autocast
        return over_micro_batches(lambda *x: token_logprobs(model, *x, args.temperature), *inputs)

    def evaluate(step):
        sampling = args.num_generations, args.max_completion_length, args.temperature
        kl_from = logprobs_of, lambda: reference or load_policy(args.model, device)
        judges = dict(score=score, gold=gold)
        inputs = policy, held_out, tokenizer, stop_ids, args.seed, autocast, sampling, judges, kl_from
        metrics, rows = evaluate_samples(*inputs)
        run.samples(step, rows)
        return metrics

    run = Run(args, args.steps)
    start, metrics = run.restore(models, optimizer), {}
    if start == 0 and held_out:
        run.log(0, evaluate(0), show=[])
    for step in range(start, args.steps):
        # prompts: the next rows, in an order of its own for every epoch
        began, first = time.time(), step * args.prompts_per_step
        picked = shuffled(examples, args.seed, first, first + args.prompts_per_step)

        # rollout and scores
        picked, completions, scores, penalised = rollout(picked, generator(args.seed, "sample", step))
        dropped, group = 0, args.num_generations
        for extra in range(8) if args.dynamic_sampling else ():  # what is still equal then stays
            equal = equal_groups(penalised, group).nonzero().flatten().tolist()
            if not equal:
                break
            fresh = shuffled(examples, f"{args.seed} extra {extra}", first, first + len(equal))
            fresh = rollout(fresh, generator(args.seed, "sample", (step, extra)))
            for i, j in enumerate(equal):
                new, old = slice(i * group, (i + 1) * group), slice(j * group, (j + 1) * group)
                picked[old], completions[old], scores[old], penalised[old] = (x[new] for x in fresh)
            dropped += len(equal)
        batch = completion_batch([e["prompt_ids"] for e in picked], completions, device)
        mask = batch.completion_mask[:, 1:]  # (B, L-1) column t speaks of token t+1
        train_mask = mask * ~scores.isnan()[:, None]
        if args.mask_truncated:
            train_mask = train_mask * torch.tensor([[c[-1] in stop_ids] for c in completions], device=device)
        sampled = time.time()

        # log-probs: the policy's by the forward that trains it (the sampler's differ by rounding)
        # 4. all of them at the temperature of sampling, else they speak of another distribution (B)
        # where a single update is all that needs them, it fills them in by its own forward
        needs_old = args.kl == "k1-reward" or args.update_epochs * args.minibatches > 1
        old_logprobs, entropy = torch.zeros(2, *mask.shape, device=device)  # (B, L-1)
        if needs_old:
            old_logprobs, entropy = logprobs_of(policy, batch)
        ref_logprobs = old_logprobs  # without KL
        if reference is not None:
            ref_logprobs, _ = logprobs_of(reference, batch)
        rolled = [e | {"completion_ids": c} for e, c in zip(picked, completions)]
        sums = dict(logprobs=old_logprobs.sum(), ref_logprobs=ref_logprobs.sum())
        run.stop_unless_finite(step + 1, rolled, **sums)

        # advantages
        # 5. the KL is a loss of its own, or part of a completion's reward, before the group's mean
        rewards = penalised
        if args.kl == "k1-reward":
            rewards = rewards - args.kl_coef * kl_penalty(old_logprobs, ref_logprobs, "k1").sum(1)  # (B,)
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
        advantages = advantages[:, None] * train_mask  # (B, L-1)

        # updates: epochs of minibatches of micro-batches; one normaliser per minibatch, however it is cut
        learning_rate = set_learning_rate(optimizer, args, step, args.steps)
        aggregation = args.loss_aggregation, args.max_completion_length
        losses, clipped_tokens, ratio_max_dev, padded_tokens = [], 0.0, 0.0, 0
        for epoch in range(args.update_epochs):
            order = torch.randperm(batch_size, generator=generator(args.seed, "minibatch", (step, epoch)))
            for minibatch in order.tensor_split(args.minibatches):
                weights = torch.zeros_like(train_mask, dtype=torch.float)
                weights[minibatch] = loss_weights(train_mask[minibatch], *aggregation)
                loss_sum = 0.0
                for rows in micro_batches(batch.lengths, args.micro_batch_tokens, minibatch.tolist()):
                    mb = batch.rows(rows)
                    padded_tokens += mb.input_ids.numel()
                    part = rows, slice(mb.input_ids.shape[1] - 1)
                    mb_mask = train_mask[part] if needs_old else mask[part]
                    mb_inputs = mb.input_ids, mb.attention_mask, mb_mask
                    mb_advantages, mb_weights = advantages[part], weights[part]
                    with autocast():
                        mb_logprobs, mb_entropy = token_logprobs(policy, *mb_inputs, args.temperature)
                    if not needs_old:
                        old_logprobs[part], entropy[part] = mb_logprobs.detach(), mb_entropy
                    mb_old_logprobs = old_logprobs[part] * mb_mask
                    clip = mb_advantages, mb_weights, args.epsilon, args.epsilon_high
                    loss, clipped = policy_loss(mb_logprobs, mb_old_logprobs, *clip)
                    if args.kl_coef and args.kl != "k1-reward":
                        kl = kl_penalty(mb_logprobs, ref_logprobs[part] * mb_mask, args.kl[:2])
                        loss = loss + args.kl_coef * (mb_weights * kl).sum()
                    loss.backward()
                    loss_sum += loss.detach()
                    clipped_tokens += clipped.sum()
                    if rows and not losses:  # before the first update the ratio is 1, up to rounding
                        ratio = (mb_logprobs - mb_old_logprobs).detach().exp()
                        ratio_max_dev = max(ratio_max_dev, (ratio - 1).abs().max().item())
                loss_sum = over_ranks(loss_sum)
                grad_norm = clip_gradients(policy, args.max_grad_norm)
                run.stop_unless_finite(step + 1, rolled, loss=loss_sum, grad_norm=grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append([float(x) for x in (loss_sum, grad_norm)])

        # log, eval, save
        clipped_tokens, padded_tokens = over_ranks(clipped_tokens, padded_tokens)
        ratio_max_dev = over_ranks(ratio_max_dev, op="max")
        if not needs_old:
            old_logprobs, entropy = over_ranks(old_logprobs, entropy)
        losses = torch.tensor(losses)
        metrics = {"loss": losses[:, 0].mean(), "reward": rewards.nanmean(), "score": scores.nanmean()}
        metrics |= {"entropy": masked_mean(entropy, mask), "ratio_max_dev": ratio_max_dev}
        metrics["clip_fraction"] = clipped_tokens / (train_mask.sum().clamp(min=1) * args.update_epochs)
        metrics["completion_length"] = mask.sum(1).float().mean()
        metrics["eos_rate"] = sum(c[-1] in stop_ids for c in completions) / batch_size
        metrics |= {"grad_norm": losses[:, 1].mean(), "learning_rate": learning_rate}
        metrics["padding"] = 1 - args.update_epochs * sum(batch.lengths) / padded_tokens
        metrics["tokens_per_second"] = sum(batch.lengths) / (time.time() - began)
        metrics |= {"seconds/sample": sampled - began, "seconds/train": time.time() - sampled}
        if args.dynamic_sampling:  # what else is logged here is of the groups that were kept
            metrics["dropped_groups"] = dropped / (args.prompts_per_step + dropped)
        if args.num_generations > 1:
            metrics["zero_std_groups"] = equal_groups(penalised, args.num_generations).float().mean()
        if reference is not None:
            metrics["kl"] = (old_logprobs - ref_logprobs).sum(1).mean()
        if gold is not None:
            metrics["gold"] = gold(picked, completions).mean()
        if held_out and due(args.eval_every, step + 1, args.steps):
            metrics |= evaluate(step + 1)
        run.log(step + 1, metrics, show=["score", "gold", "kl", "entropy", "eos_rate", "zero_std_groups"])
        run.checkpoint_if_due(step + 1, models, optimizer)
    run.finish(policy, tokenizer, stop_ids, f"look at {args.output_dir}/samples.jsonl")
    return metrics


if __name__ == "__main__":
    laptop = dict(model="runs/sft", reward="sort", steps=160, prompts_per_step=32, num_generations=8)
    laptop |= dict(max_completion_length=10, learning_rate=3e-4, warmup_steps=5, kl_coef=0.02)
    laptop |= dict(eval_every=40, overwrite=True)
    main(cli(Args, laptop=laptop))
