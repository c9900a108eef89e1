"""Supervised fine-tuning (SFT): teach a language model to answer, by maximum likelihood of given completions.

    loss = - sum over completion tokens of log pi(token | what stands before it) / number of completion tokens

The first stage of RLHF (Ouyang et al. 2022, section 3.5). Prompt tokens are not trained (Huang et al. 2024
train them too); EOS is, so that the model learns to stop. Left out: packing several rows into one sequence
(sorting by length saves most of the padding), LoRA and 8-bit optimisers (a few lines of peft or bitsandbytes
at load_policy).

    python sft.py                     laptop run: a tiny model from scratch, a quarter of a minute, two cores
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset data.jsonl --eval-dataset held_out.jsonl

Data: rows of prompt and completion, messages, Alpaca's instruction, input and output, or GSM8K's question and
answer. Expect the held-out loss to fall, and to rise again once the rows are learnt by heart: stop there. The
laptop run ends near 35% exact match (`gold`): 165 demonstrations do not teach more, and the next stages
shall."""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import Run, as_forward, check_context, cli, clip_gradients, context_of, due, eos_ids
from common import evaluate_samples, find_gold, head_logits, head_rows, hidden_states, judge, load_examples
from common import load_held_out, load_policy, load_tokenizer, make_optimizer, micro_batches, over_ranks
from common import pad_batch, set_learning_rate, setup, shuffled, stream_logprobs, tiny_policy, tiny_tokenizer


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
    output_dir: str = "runs/sft"
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
    """peak, of AdamW (2e-5: Alpaca, Tulu)"""
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
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    train_on: Literal["last", "all"] = "last"
    """assistant turns of `messages` that are trained"""


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


@torch.no_grad()
def evaluate_answers(policy, tokenizer, examples, gold, stop_ids, args, autocast):
    """Held-out loss (nats per token); of greedy and sampled completions: how many stop, and are right."""
    total, tokens = 0.0, 0
    for rows in micro_batches([len(e["ids"]) for e in examples], args.micro_batch_tokens):
        picked = [examples[i] for i in rows]
        masks = [e["mask"] for e in picked]
        batch = pad_batch([e["ids"] for e in picked], masks, policy.device)
        mask = batch.completion_mask[:, 1:]
        with autocast():
            logprobs, _ = token_logprobs(policy, batch.input_ids, batch.attention_mask, mask)
        total, tokens = total - logprobs.sum().item(), tokens + mask.sum().item()
    total, tokens = over_ranks(total, tokens)
    examples = examples[:500]
    longest = max(len(e["ids"]) - len(e["prompt_ids"]) for e in examples)
    limit = min(longest, context_of(policy.config) - max(len(e["prompt_ids"]) for e in examples))
    inputs = policy, examples, tokenizer, stop_ids, args.seed, autocast, (1, limit, 1.0), dict(gold=gold)
    metrics, rows = evaluate_samples(*inputs)
    return {"eval/loss": total / tokens} | metrics, rows


def main(args):
    device, autocast = setup(args)

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model) if args.model else tiny_tokenizer()
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "sft", args)
    held_out = load_held_out(tokenizer, "sft", args)
    gold = judge(find_gold(examples + held_out), tokenizer, stop_ids)
    options = dict(device=device, train=args)
    policy = load_policy(args.model, **options) if args.model else tiny_policy(tokenizer, **options)
    check_context(policy, max(len(e["ids"]) for e in examples + held_out), "--max-length")
    optimizer = make_optimizer([policy], args)
    steps = -(-args.epochs * len(examples) // args.batch_size)
    steps = min(steps, args.steps or steps)
    run = Run(args, steps)
    start, metrics = run.restore({"policy": policy}, optimizer), {}

    def evaluate(step):
        metrics, rows = evaluate_answers(policy, tokenizer, held_out, gold, stop_ids, args, autocast)
        run.samples(step, rows)
        return metrics

    if start == 0 and held_out:
        run.log(0, evaluate(0), show=[])
    for step in range(start, steps):
        # data: the next rows, in an order of its own for every epoch
        began = time.time()
        first = step * args.batch_size
        last = min(first + args.batch_size, args.epochs * len(examples))
        picked = shuffled(examples, args.seed, first, last)
        masks = [e["mask"] for e in picked]
        batch = pad_batch([e["ids"] for e in picked], masks, device)

        # update: one denominator for the whole batch, however it is cut into micro-batches
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
        run.stop_unless_finite(step + 1, picked, loss=loss_sum, grad_norm=grad_norm)
        learning_rate = set_learning_rate(optimizer, args, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log, eval, save
        metrics = {"loss": loss_sum, "grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics["padding"] = 1 - sum(batch.lengths) / padded_tokens
        metrics["seconds/train"] = time.time() - began
        metrics["tokens_per_second"] = sum(batch.lengths) / metrics["seconds/train"]
        if held_out and due(args.eval_every, step + 1, steps):
            metrics |= evaluate(step + 1)
        run.log(step + 1, metrics, show=["loss", "grad_norm", "tokens_per_second"])
        run.checkpoint_if_due(step + 1, {"policy": policy}, optimizer)
    is_laptop = args.model is None and args.output_dir == "runs/sft"
    then = "" if is_laptop else f" --model {args.output_dir} --dataset ..."
    run.finish(policy, tokenizer, stop_ids, f"python reward_model.py{then}")
    return metrics


if __name__ == "__main__":
    laptop = dict(epochs=120, learning_rate=1e-3, warmup_steps=20, overwrite=True)
    main(cli(Args, laptop=laptop))
