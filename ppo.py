"""Proximal policy optimisation (PPO) from human feedback: raise a learned reward, stay near the reference.

    maximise  E[ score(prompt, completion) ] - kl_coef * KL(policy || reference)

The third stage of RLHF (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022). Every token is an
action. Its reward is - kl_coef * (log pi - log pi_ref), and the score comes at the last token. A value model
predicts what is still to come, GAE turns both into advantages, and the clipped surrogate (Schulman et al.
2017, equation 7) is stepped on for several epochs. Left out: an adaptive KL coefficient (later work fixes
it), reward scaling, the pretraining loss of PPO-ptx, a trunk shared by policy and value model, generation
engines, LoRA.

    python ppo.py                     laptop run, after sft.py and reward_model.py: two minutes, two cores
    python ppo.py --model runs/my_sft --reward runs/my_reward_model --dataset prompts.jsonl

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
from common import RewardModel, check_context, load_scorer, same_ids


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
    output_dir: str = "runs/ppo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """of data order, sampling and new weights"""
    steps: int = 1000
    """rollouts, each followed by its updates"""
    learning_rate: float = 3e-6
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
    prompts_per_step: int = 512
    """prompts of one rollout; with the next flag, 512 completions (N+, DeepSeek-R1)"""
    num_generations: int = 1
    """completions of each prompt, its group (1: N+; 4: Ahmadian et al. 2024; 16: DeepSeek-R1)"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_completion_length: int = 256
    """tokens; a completion without EOS by then is cut, and counts as unfinished"""
    temperature: float = 1.0
    """of sampling, and of every log-prob (1: the saved model is the one that was trained)"""
    kl_coef: float = 0.05
    """weight of the KL (0.05: N+; 0.03: Ahmadian et al. 2024; 0.04: DeepSeekMath; 0: only in evaluations)"""
    missing_eos_penalty: float = 0.0
    """taken off the score of a completion without EOS (N+ sets such a score to -1)"""
    update_epochs: int = 4
    """passes over a rollout (4: N+; 1: Ahmadian et al. 2024, DeepSeekMath)"""
    minibatches: int = 1
    """optimiser steps per pass (1: N+)"""
    epsilon: float = 0.2
    """clip range of the ratio (Schulman et al. 2017)"""
    epsilon_high: float | None = None
    """upper clip range, where it differs (DAPO, Yu et al. 2025: 0.28)"""
    value_model: str | None = None
    """where values start; without it the reward model if it has the policy's tokens, else a zero head"""
    value_coef: float = 0.1
    """weight of the value loss (0.1: N+). Adam hides it where, as here, the value model stands apart"""
    value_clip: float = 0.2
    """a value moves this far from its old one before its gradient stops (0.2: N+)"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """of GAE: 0 trusts the value model, 1 the sampled rewards"""
    whiten_rewards: bool = False
    """divide rewards by their standard deviation (lmhp does, N+ does not)"""


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


def masked_whiten(x, mask, shift_mean=True):
    """x (B, L-1) to variance 1 over the mask, and to mean 0 if shift_mean, else the mean stays; 0 outside the
    mask. Population variance plus 1e-8 (lmhp)."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


@as_forward
def token_values(model, input_ids, attention_mask, mask):
    """V(tokens 0..t), the rewards still to come: (B, L), (B, L), mask (B, L-1) -> (B, L-1) float32."""
    hidden = hidden_states(model, input_ids, attention_mask, mask)  # (B, L, H)
    return (hidden[:, :-1].float() * model.score.weight[0]).sum(-1) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """- kl_coef * (log pi - log pi_ref) at every completion token, the k1 estimate of the KL, and the score
    at the last.

    scores (B,), the others (B, L-1) -> (B, L-1). Ziegler et al. 2019, equation 2; at the last completion
    token, which is EOS unless the completion was cut, so that one mask serves rewards, values and log-probs
    (N+ puts the score one token later and needs a second mask)."""
    from_here = mask.flip(1).cumsum(1).flip(1)  # completion tokens from this one on
    is_last = (from_here == 1) & mask.bool()
    return -kl_coef * (logprobs - ref_logprobs) * mask + scores[:, None] * is_last


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16); all (B, L-1) ->
    advantages, returns.

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lam A_t+1, both 0 past the last completion
    token. returns = A + V, what the value model is trained on. The mask of a row is one run of ones."""
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, weights, epsilon, epsilon_high=None):
    """Clipped surrogate: sum of weights * max(- A ratio, - A clip(ratio, 1 - epsilon, 1 + epsilon_high)).

    Schulman et al. 2017, equation 7, negated. All (B, L-1) -> loss scalar, clipped (B, L-1) bool: tokens
    whose gradient the clip removed. Weights are 0 outside the mask and carry the normaliser."""
    ratio = (logprobs - old_logprobs).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - epsilon, 1 + high)
    return (weights * torch.max(pg_loss1, pg_loss2)).sum(), (pg_loss2 > pg_loss1) & (weights > 0)


def value_loss(values, old_values, returns, weights, value_clip):
    """Clipped value loss: sum of weights * 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) (N+,
    OpenAI's baselines). All (B, L-1) -> loss scalar, clipped (B, L-1) bool."""
    moved = old_values + (values - old_values).clamp(-value_clip, value_clip)
    vf_loss1, vf_loss2 = (values - returns) ** 2, (moved - returns) ** 2
    return 0.5 * (weights * torch.max(vf_loss1, vf_loss2)).sum(), (vf_loss2 > vf_loss1) & (weights > 0)


def main(args):
    device, autocast = setup(args)
    batch_size = args.prompts_per_step * args.num_generations

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "prompt", args)
    held_out = load_held_out(tokenizer, "prompt", args)
    score, gold = load_reward(args, tokenizer, examples + held_out, stop_ids, device, autocast)
    policy = load_policy(args.model, device, train=args)
    reference = load_policy(args.model, device) if args.kl_coef else None
    # values start from the reward model (N+), or else from the policy with a head that gives 0 (B)
    from_reward = isinstance(score, RewardModel) and score.same_ids and score.has_score_head
    values_from = args.value_model or (args.reward if from_reward else args.model)
    if not same_ids(tokenizer, load_tokenizer(values_from, "--value-model")):
        stop(f"--value-model {values_from}: its tokens are not the policy's, so it cannot value them")
    value_model = load_scorer(values_from, device, "--value-model", train=args, new_head="zero")
    longest = max(len(e["prompt_ids"]) for e in examples + held_out) + args.max_completion_length
    check_context(value_model, longest, "--max-prompt-length or --max-completion-length")
    models = {"policy": policy, "value_model": value_model}
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
        batch = completion_batch([e["prompt_ids"] for e in picked], completions, device)
        mask = batch.completion_mask[:, 1:]  # (B, L-1) column t speaks of token t+1
        train_mask = mask * ~scores.isnan()[:, None]
        sampled = time.time()

        # log-probs: the policy's by the forward that trains it (the sampler's differ by rounding)
        # 4. all of them at the temperature of sampling, else they speak of another distribution (B)
        old_logprobs, entropy = logprobs_of(policy, batch)  # (B, L-1)
        ref_logprobs = old_logprobs  # without KL
        if reference is not None:
            ref_logprobs, _ = logprobs_of(reference, batch)
        rolled = [e | {"completion_ids": c} for e, c in zip(picked, completions)]
        sums = dict(logprobs=old_logprobs.sum(), ref_logprobs=ref_logprobs.sum())
        run.stop_unless_finite(step + 1, rolled, **sums)
        inputs = batch, args.micro_batch_tokens, autocast
        old_values = over_micro_batches(lambda *x: token_values(value_model, *x), *inputs) * train_mask

        # advantages
        # 5. the KL is paid token by token, the score at the last token (Ziegler et al. 2019)
        # 6. rewards whitened without moving their mean, if asked (lmhp)
        # 7. returns are taken before 8. advantages are whitened over all tokens of the batch (N+)
        judged = penalised.nan_to_num()
        rewards = token_rewards(judged, old_logprobs, ref_logprobs, train_mask, args.kl_coef)
        reward = rewards.sum(1)[~scores.isnan()].mean()
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, train_mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, train_mask, args.gamma, args.lam)
        advantages = masked_whiten(advantages, train_mask)

        # updates: epochs of minibatches of micro-batches; one normaliser per minibatch, however it is cut
        learning_rate = set_learning_rate(optimizer, args, step, args.steps)
        losses, clipped_tokens, ratio_max_dev, padded_tokens = [], 0.0, 0.0, 0
        for epoch in range(args.update_epochs):
            order = torch.randperm(batch_size, generator=generator(args.seed, "minibatch", (step, epoch)))
            for minibatch in order.tensor_split(args.minibatches):
                weights = train_mask / train_mask[minibatch].sum().clamp(min=1)
                pg_sum, vf_sum = 0.0, 0.0
                for rows in micro_batches(batch.lengths, args.micro_batch_tokens, minibatch.tolist()):
                    mb = batch.rows(rows)
                    padded_tokens += mb.input_ids.numel()
                    part = rows, slice(mb.input_ids.shape[1] - 1)
                    mb_mask = train_mask[part]
                    mb_inputs = mb.input_ids, mb.attention_mask, mb_mask
                    mb_advantages, mb_weights = advantages[part], weights[part]
                    with autocast():
                        mb_logprobs, _ = token_logprobs(policy, *mb_inputs, args.temperature)
                    mb_old_logprobs = old_logprobs[part] * mb_mask
                    clip = mb_advantages, mb_weights, args.epsilon, args.epsilon_high
                    pg_loss, clipped = policy_loss(mb_logprobs, mb_old_logprobs, *clip)
                    pg_loss.backward()  # before the value model's activations exist
                    with autocast():
                        mb_values = token_values(value_model, *mb_inputs)
                    target = old_values[part], returns[part], mb_weights, args.value_clip
                    vf_loss, _ = value_loss(mb_values, *target)
                    (args.value_coef * vf_loss).backward()
                    pg_sum, vf_sum = pg_sum + pg_loss.detach(), vf_sum + vf_loss.detach()
                    clipped_tokens += clipped.sum()
                    if rows and not losses:  # before the first update the ratio is 1, up to rounding
                        ratio = (mb_logprobs - mb_old_logprobs).detach().exp()
                        ratio_max_dev = max(ratio_max_dev, (ratio - 1).abs().max().item())
                pg_sum, vf_sum = over_ranks(pg_sum, vf_sum)
                # the two norms are clipped apart: with one for both the value loss would slow the policy down
                grad_norm = clip_gradients(policy, args.max_grad_norm)
                value_grad_norm = clip_gradients(value_model, args.max_grad_norm)
                norms = dict(grad_norm=grad_norm, value_grad_norm=value_grad_norm)
                run.stop_unless_finite(step + 1, rolled, loss=pg_sum + vf_sum, **norms)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append([float(x) for x in (pg_sum, grad_norm, vf_sum, value_grad_norm)])

        # log, eval, save
        clipped_tokens, padded_tokens = over_ranks(clipped_tokens, padded_tokens)
        ratio_max_dev = over_ranks(ratio_max_dev, op="max")
        losses, errors = torch.tensor(losses), returns - old_values
        unexplained = masked_mean((errors - masked_mean(errors, train_mask)) ** 2, train_mask)
        variance = masked_mean((returns - masked_mean(returns, train_mask)) ** 2, train_mask)
        metrics = {"loss": losses[:, 0].mean() + args.value_coef * losses[:, 2].mean()}
        metrics |= {"loss/policy": losses[:, 0].mean(), "loss/value": losses[:, 2].mean(), "reward": reward}
        metrics |= {"score": scores.nanmean(), "entropy": masked_mean(entropy, mask)}
        metrics["ratio_max_dev"] = ratio_max_dev
        metrics["clip_fraction"] = clipped_tokens / (train_mask.sum().clamp(min=1) * args.update_epochs)
        metrics["explained_variance"] = 1 - unexplained / variance if variance > 1e-8 else float("nan")
        metrics["completion_length"] = mask.sum(1).float().mean()
        metrics["eos_rate"] = sum(c[-1] in stop_ids for c in completions) / batch_size
        metrics |= {"grad_norm": losses[:, 1].mean(), "value_grad_norm": losses[:, 3].mean()}
        metrics["learning_rate"] = learning_rate
        metrics["padding"] = 1 - args.update_epochs * sum(batch.lengths) / padded_tokens
        metrics["tokens_per_second"] = sum(batch.lengths) / (time.time() - began)
        metrics |= {"seconds/sample": sampled - began, "seconds/train": time.time() - sampled}
        if reference is not None:
            metrics["kl"] = (old_logprobs - ref_logprobs).sum(1).mean()
        if gold is not None:
            metrics["gold"] = gold(picked, completions).mean()
        if held_out and due(args.eval_every, step + 1, args.steps):
            metrics |= evaluate(step + 1)
        run.log(step + 1, metrics, show=["score", "gold", "kl", "entropy", "eos_rate", "clip_fraction"])
        run.checkpoint_if_due(step + 1, models, optimizer)
    run.finish(policy, tokenizer, stop_ids, f"look at {args.output_dir}/samples.jsonl")
    return metrics


if __name__ == "__main__":
    # the reward model never saw text without EOS, and PPO finds that out unless such text costs something
    laptop = dict(model="runs/sft", reward="runs/reward_model", steps=80, prompts_per_step=512, minibatches=4)
    laptop |= dict(max_completion_length=10, update_epochs=1, learning_rate=1.5e-4, warmup_steps=5)
    laptop |= dict(kl_coef=0.03, missing_eos_penalty=5.0, value_clip=2.0, eval_every=20, overwrite=True)
    main(cli(Args, laptop=laptop))
