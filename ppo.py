"""Proximal policy optimisation (PPO) from human feedback: raise a learned reward, stay near the
reference.

    maximise  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

The third stage of RLHF (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022). Every token
is an action. Its reward is - kl_coef * (log pi - log pi_ref), and the score comes at the last
token. A value model predicts what is still to come, GAE turns both into advantages, and the clipped
surrogate (Schulman et al. 2017, equation 7) is stepped on for several epochs. PPO-ptx (Ouyang et
al. 2022, equation 2), by --ptx-dataset and --ptx-coef, adds - ptx_coef * mean log pi(token) of rows
that the policy must not forget to the loss of every update. Left out: an adaptive KL coefficient
(later work keeps it constant), reward scaling, a trunk shared by policy and value model, generation
engines, LoRA.

    python ppo.py                     after sft.py and reward_model.py: two minutes, two cores
    python ppo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

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
    COMPLETION_COLUMNS,
    DroppedRow,
    RewardModel,
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
    has_score_head,
    head_logits,
    in_micro_batches,
    is_due,
    load_examples,
    load_gold,
    load_held_out,
    load_policy,
    load_rewards,
    load_scorer,
    load_tokenizer,
    micro_batches,
    pad_rows,
    prompt_of,
    same_ids,
    sample,
    setup,
    stream,
    take,
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
    output_dir: str = "runs/ppo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int = 1000
    """rollouts, each followed by its updates"""
    learning_rate: float = 3e-6
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
    prompts_per_step: int = 512
    """prompts of one rollout; with the next flag, 512 completions (N+, DeepSeek-R1)"""
    num_generations: int = 1
    """completions of each prompt, its group (1: N+; 4: Ahmadian et al. 2024; 16: DeepSeek-R1)"""
    max_prompt_length: int = 512
    """tokens of a prompt; longer ones are dropped and counted"""
    max_completion_length: int = 256
    """tokens of a completion; one without EOS by then is cut, and counts as unfinished"""
    temperature: float = 1.0
    """of sampling, and of every log-prob (1: the saved model is the one that was trained)"""
    kl_coef: float = 0.05
    """weight of the KL (0.05: N+; 0.03: Ahmadian et al. 2024; 0.04: DeepSeekMath; 0: no KL)"""
    missing_eos_penalty: float = 0.0
    """taken off the score of a completion without EOS (N+ sets such a score to -1)"""
    update_epochs: int = 4
    """passes over a rollout (4: N+; 1: Ahmadian et al. 2024, DeepSeekMath)"""
    num_minibatches: int = 1
    """optimiser steps per pass (1: N+)"""
    epsilon: float = 0.2
    """clip range of the ratio (Schulman et al. 2017)"""
    epsilon_high: float | None = None
    """upper clip range, where it differs (DAPO, Yu et al. 2025: 0.28)"""
    value_model: str | None = None
    """where values start; without it the reward model if it has the policy's tokens, else a zero
    head"""
    value_coef: float = 0.1
    """weight of the value loss (0.1: N+). The value model stands apart, so it scales that gradient
    alone: no effect where --max-grad-norm clips it, almost none where it is far above Adam's eps"""
    value_clip: float = 0.2
    """a value moves this far from its old one before its gradient stops (0.2: N+)"""
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """of GAE: 0 trusts the value model, 1 the sampled rewards"""
    whiten_rewards: bool = False
    """divide token rewards by their deviation, and keep their mean (lmhp does, N+ does not): this
    adds a constant to every token, which pays or costs length"""
    ptx_dataset: str | None = None
    """rows of prompt and completion that the policy must not forget (PPO-ptx)"""
    ptx_coef: float = 0.0
    """weight of their loss, nats per token, in every update (Ouyang et al. 2022: 27.8)"""


def prompt_example(row, tokenizer, end_id, args):
    """A prompt; the further columns are the checker's."""
    prompt = prompt_of(row, args)
    prompt_ids, _ = encode_completions(tokenizer, prompt, [], end_id)
    if len(prompt_ids) > args.max_prompt_length:
        raise DroppedRow(f"longer than --max-prompt-length {args.max_prompt_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids}


def ptx_example(row, tokenizer, end_id, args):
    """A prompt and a completion."""
    prompt = prompt_of(row, args)
    completion = text_or_messages(row, COMPLETION_COLUMNS)
    prompt_ids, (completion_ids,) = encode_completions(tokenizer, prompt, [completion], end_id)
    if len(prompt_ids) > args.max_prompt_length:
        raise DroppedRow(f"longer than --max-prompt-length {args.max_prompt_length}")
    if len(completion_ids) > args.max_completion_length:
        raise DroppedRow(f"longer than --max-completion-length {args.max_completion_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids, "completion_ids": completion_ids}


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


def masked_mean(x, mask):
    """Mean of x (B, T) over the mask -> scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x (B, T) to variance 1 over the mask, and to mean 0 if shift_mean, else the mean stays; 0
    outside the mask. Population variance plus 1e-8 (lmhp)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


@as_forward
def token_values(model, batch):
    """V(inputs[:, : t + 1]), the rewards still to come: a batch of (B, T) -> (B, T) float32, 0
    outside the mask."""
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state.float()  # (B, T, H)
    return (hidden * model.score.weight[0]).sum(-1) * batch["mask"]


def batch_values(model, batch, args, autocast):
    """The values of a whole batch (B, T), without gradient -> (B, T)."""
    with autocast():
        return in_micro_batches(
            lambda mb: token_values(model, mb),
            batch,
            args.micro_batch_tokens,
        )


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """- kl_coef * (log pi - log pi_ref) at every completion token, the k1 estimate of the KL, and
    the score at the last.

    scores (B,), the others (B, T) -> (B, T). Ziegler et al. 2019, equation 2. The score stands at
    the last completion token, EOS unless the completion was cut, so that one mask serves rewards,
    values and log-probs (N+ puts it one token later and needs a second mask)."""
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    is_last = (tokens_from_here == 1) & mask.bool()
    kl = (logprobs - ref_logprobs) * mask
    return -kl_coef * kl + scores[:, None] * is_last


def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16): all (B, T) ->
    advantages, returns.

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lambda A_t+1, both 0 past the last
    completion token. returns = A + V, what the value model is trained on. The mask of a row is one
    run of ones."""
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


def value_loss(values, old_values, returns, weights, value_clip):
    """Clipped value loss: sum of weights * 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) -
    R)^2) (N+, OpenAI's baselines). All (B, T) -> loss scalar, clipped (B, T) bool."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    vf_loss1 = (values - returns) ** 2
    vf_loss2 = (clipped_values - returns) ** 2
    loss = 0.5 * (weights * torch.max(vf_loss1, vf_loss2)).sum()
    # (within the clip the two are equal but for rounding)
    is_outside = (values - old_values).abs() > value_clip
    clipped = is_outside & (vf_loss2 > vf_loss1) & (weights > 0)
    return loss, clipped


def sft_loss(logprobs, weights):
    """- sum of weights * logprobs; with weights = mask / number of trained tokens of the whole
    batch, their mean NLL. logprobs, weights (B, T) -> scalar, nats per token."""
    return -(weights * logprobs).sum()


def explained_variance(returns, values, mask):
    """1 - variance of (returns - values) / variance of returns, over the mask; all (B, T) ->
    scalar, NaN where the returns do not vary. 1: the values predict them; 0: no better than their
    mean."""
    errors = returns - values
    unexplained = masked_mean((errors - masked_mean(errors, mask)) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - unexplained / variance if variance > 1e-8 else torch.tensor(math.nan)


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


def load_value_model(args, tokenizer, ensemble, device):
    """--value-model; without it the first of --reward, if it is a model of the policy's tokens
    (N+), else the policy with a head that gives 0 (B)."""
    path = args.value_model or args.model
    reward = ensemble[0]
    is_reward_model = isinstance(reward, RewardModel) and has_score_head(reward.model)
    if args.value_model is None and is_reward_model and reward.has_policy_tokens:
        path = reward.path
    if not same_ids(tokenizer, load_tokenizer(path, "--value-model")):
        fail(f"--value-model {path}: its tokens are not the policy's, so it cannot value them")

    def init(model, has_new_head):
        if has_new_head:
            nn.init.zeros_(model.score.weight)

    return load_scorer(
        path,
        device,
        "--value-model",
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        init=init,
    )


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def ppo_update(policy, value_model, optimizer, batch, ptx_examples, *, step, args, autocast):
    """Epochs of minibatches over a rollout -> totals over all of them. A minibatch has one
    normaliser, however it is cut into micro-batches."""
    totals = Counter()
    ratio_max_dev = 0.0
    ptx_batch_size = args.prompts_per_step * args.num_generations // args.num_minibatches
    num_updates = args.update_epochs * args.num_minibatches
    for epoch in range(args.update_epochs):
        order = torch.randperm(
            len(batch["inputs"]),
            generator=generator(args.seed, "minibatch", step, epoch),
        )
        for minibatch_rows in order.tensor_split(args.num_minibatches):
            minibatch = take(batch, minibatch_rows)
            minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()
            for mb in micro_batches(minibatch, args.micro_batch_tokens):
                with autocast():
                    mb_logprobs, mb_entropy = token_logprobs_and_entropy(
                        policy,
                        mb,
                        args.temperature,
                    )
                pg_loss, clipped = policy_loss(
                    mb_logprobs,
                    mb["old_logprobs"],
                    mb["advantages"],
                    mb["weights"],
                    args.epsilon,
                    epsilon_high=args.epsilon_high,
                )
                pg_loss.backward()  # before the value model's activations exist
                with autocast():
                    mb_values = token_values(value_model, mb)
                vf_loss, value_clipped = value_loss(
                    mb_values,
                    mb["old_values"],
                    mb["returns"],
                    mb["weights"],
                    args.value_clip,
                )
                (args.value_coef * vf_loss).backward()
                totals["policy_loss"] += pg_loss.detach()
                totals["value_loss"] += vf_loss.detach()
                totals["entropy"] += mb_entropy.sum()
                totals["clipped"] += clipped.sum()
                totals["value_clipped"] += value_clipped.sum()
                totals["padded_tokens"] += mb["inputs"].numel()
                # before the first update the ratio is 1, up to rounding
                if totals["updates"] == 0:
                    ratio = (mb_logprobs - mb["old_logprobs"]).detach().exp()
                    ratio_max_dev = max(ratio_max_dev, (ratio - 1).abs().max().item())
            # with --ptx-coef as many of its rows join the update, with a normaliser of their own
            if args.ptx_coef:
                first = (step * num_updates + totals["updates"]) * ptx_batch_size
                batch_examples = stream(
                    ptx_examples,
                    f"{args.seed} ptx",
                    first,
                    first + ptx_batch_size,
                )
                ptx_batch = completion_batch(
                    [example["prompt_ids"] for example in batch_examples],
                    [example["completion_ids"] for example in batch_examples],
                    policy.device,
                )
                ptx_batch["weights"] = ptx_batch["mask"] / ptx_batch["mask"].sum()
                for mb in micro_batches(ptx_batch, args.micro_batch_tokens):
                    with autocast():
                        mb_logprobs, _ = token_logprobs_and_entropy(policy, mb)
                    ptx_loss = sft_loss(mb_logprobs, mb["weights"])
                    (args.ptx_coef * ptx_loss).backward()
                    totals["ptx_loss"] += ptx_loss.detach()
            # 9. the two norms are clipped apart: with one for both the value loss would slow
            # the policy down
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            value_grad_norm = clip_gradients(value_model, args.max_grad_norm)
            if not (grad_norm + value_grad_norm).isfinite():
                fail(f"step {step + 1}: gradient norms {grad_norm}, {value_grad_norm}; no update")
            optimizer.step()
            optimizer.zero_grad()
            totals["grad_norm"] += grad_norm
            totals["value_grad_norm"] += value_grad_norm
            totals["updates"] += 1
    for name in (
        "policy_loss",
        "value_loss",
        "ptx_loss",
        "entropy",
        "clipped",
        "value_clipped",
        "padded_tokens",
    ):
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
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature}: logits are divided by it; it must be above 0")
    batch_size = args.prompts_per_step * args.num_generations
    if batch_size < args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: a step has {batch_size} completions")
    if bool(args.ptx_coef) != bool(args.ptx_dataset):
        fail(f"--ptx-coef {args.ptx_coef}, --ptx-dataset {args.ptx_dataset}: each needs the other")

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model)
    examples = load_examples(args.dataset, prompt_example, tokenizer, args)
    held_out = load_held_out(prompt_example, tokenizer, args)
    ptx_examples = []
    if args.ptx_coef:
        ptx_examples = load_examples(args.ptx_dataset, ptx_example, tokenizer, args)
    longest_prompt = max(len(x["prompt_ids"]) for x in examples + held_out + ptx_examples)
    for flag, path in [("--model", args.model), ("--value-model", args.value_model)]:
        if path is not None:
            check_fit(
                path,
                flag,
                examples=examples + held_out + ptx_examples,
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
    reference = load_policy(args.model, device) if args.kl_coef else None
    value_model = load_value_model(args, tokenizer, ensemble, device)
    models = nn.ModuleDict({"policy": policy, "value_model": value_model})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        eps=1e-5,  # B: as OpenAI's PPO has it
        weight_decay=args.weight_decay,
        fused=True,
    )
    run = Run(args, models, optimizer, args.steps, examples + ptx_examples)

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

        # 5. log-probs are of the forward that trains them (the sampler's differ by rounding), at
        # the temperature of sampling, else they speak of another distribution (B)
        batch["old_logprobs"] = batch_logprobs(policy, batch, args, autocast)  # (B, T)
        ref_logprobs = batch["old_logprobs"]  # without a KL
        if reference is not None:
            ref_logprobs = batch_logprobs(reference, batch, args, autocast)
        batch["old_values"] = batch_values(value_model, batch, args, autocast)

        # compute rewards, advantages and returns
        # 6. the KL is paid token by token, the score at the last token (Ziegler et al. 2019)
        rewards = token_rewards(
            torch.tensor([rollout["reward"] for rollout in rollouts], device=device),
            batch["old_logprobs"],
            ref_logprobs,
            mask,
            args.kl_coef,
        )
        mean_reward = rewards.sum(1).mean()
        # 7. rewards are whitened without moving their mean, if asked (lmhp)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        # 8. returns are taken before advantages are whitened over all tokens of the batch (N+)
        advantages, batch["returns"] = gae(
            rewards,
            batch["old_values"],
            mask,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
        )
        batch["advantages"] = masked_whiten(advantages, mask)

        # update the weights
        learning_rate = scheduled_learning_rate(step, args.steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        totals = ppo_update(
            policy,
            value_model,
            optimizer,
            batch,
            ptx_examples,
            step=step,
            args=args,
            autocast=autocast,
        )

        # log, evaluate, save
        seconds = time.time() - began
        updates = totals["updates"]
        trained_tokens = args.update_epochs * mask.sum()
        batch_tokens = batch["attention_mask"].sum()
        metrics = {
            "loss": (totals["policy_loss"] + args.value_coef * totals["value_loss"]) / updates,
            "loss/policy": totals["policy_loss"] / updates,
            "loss/value": totals["value_loss"] / updates,
            "reward": mean_reward,
            "score": scores.mean(),
            "entropy": totals["entropy"] / trained_tokens,
            "ratio_max_dev": totals["ratio_max_dev"],
            "clip_fraction": totals["clipped"] / trained_tokens,
            "value_clip_fraction": totals["value_clipped"] / trained_tokens,
            "explained_variance": explained_variance(batch["returns"], batch["old_values"], mask),
            "completion_length": mask.sum(1).float().mean(),
            "eos_rate": sum(rollout["finished"] for rollout in rollouts) / len(rollouts),
            "unjudged": 1 - len(rollouts) / batch_size,
            "grad_norm": totals["grad_norm"] / updates,
            "value_grad_norm": totals["value_grad_norm"] / updates,
            "learning_rate": learning_rate,
            "padding": 1 - args.update_epochs * batch_tokens / totals["padded_tokens"],
            "tokens_per_second": batch_tokens / seconds,
            "seconds/sample": sampling_seconds,
            "seconds/train": seconds - sampling_seconds,
        }
        if args.ptx_coef:
            metrics["loss/ptx"] = totals["ptx_loss"] / updates
            metrics["loss"] = metrics["loss"] + args.ptx_coef * metrics["loss/ptx"]
        if reference is not None:
            metrics["kl"] = (batch["old_logprobs"] - ref_logprobs).sum(1).mean()
        if gold is not None:
            metrics["gold"] = gold(rollouts, completions).mean()
        metrics |= member_metrics(torch.stack([x["member_scores"] for x in rollouts], dim=1))
        if held_out and is_due(args.eval_every, step + 1, args.steps):
            metrics |= held_out_metrics(step + 1)
        run.log(
            step + 1,
            metrics,
            show=["score", "gold", "kl", "entropy", "eos_rate", "clip_fraction"],
        )
        run.checkpoint_if_due(step + 1)
    logs = "samples.jsonl" if held_out else "metrics.jsonl"
    run.finish(policy, tokenizer, eos_ids, f"look at {args.output_dir}/{logs}")
    return metrics


if __name__ == "__main__":
    # the reward model never saw text without EOS, and PPO finds that out unless it costs something
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
