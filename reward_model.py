"""Reward model (RM): learn from pairs of answers which one people prefer, as one number for any answer.

    loss = - log sigmoid(r(prompt, chosen) - r(prompt, rejected) - margin), mean over pairs   (Bradley-Terry)

The second stage of RLHF (Ouyang et al. 2022, equation 1; Stiennon et al. 2020). The score is a scalar head on
the hidden state of the last real token, EOS. Left out: ensembles, and shifting the scores to mean 0 after
training (Stiennon et al. do): a constant changes no advantage once PPO's values have learnt it.
`eval/score_mean` is logged.

    python reward_model.py            laptop run, after `python sft.py`: three quarters of a minute, two cores
    python reward_model.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset held_out_pairs.jsonl

Data: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike; `margin` optional. One
epoch: a second learns the pairs by heart. Expect 60 to 75% held-out accuracy on human preferences, more in
the laptop run."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from common import Run, as_forward, backbone, check_context, cli, clip_gradients, completion_batch
from common import completion_text, due, eos_ids, load_examples, load_held_out, load_scorer, load_tokenizer
from common import make_optimizer, micro_batches, over_ranks, set_learning_rate, setup, shuffled


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
    output_dir: str = "runs/reward_model"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 9e-6
    """peak, of AdamW (9e-6: Ouyang et al. 2022)"""
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
    """pairs per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    center_coef: float = 0.0
    """weight of (score of chosen + of rejected)^2, which keeps scores near 0 (Eisenstein et al. 2023:
    0.01)"""


@as_forward
def sequence_scores(model, input_ids, attention_mask):
    """The scalar head at the last real token, found by length: neither padding nor a PAD inside the text
    moves it.

    input_ids, attention_mask (B, L), right-padded -> (B,) float32. The head's product is in float32 under
    autocast too: in bfloat16 scores near 4 would be 0.03 apart at least, and close pairs ties."""
    hidden = backbone(model, input_ids, attention_mask)
    last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]  # (B, H)
    return (last.float() * model.score.weight[0]).sum(-1)


def bradley_terry_loss(chosen_scores, rejected_scores, margin=None):
    """- log sigmoid(r_chosen - r_rejected - margin), each (B,) -> (B,). Ouyang et al. 2022, equation 1; the
    margin, how much better the chosen one was judged, is Llama 2's (Touvron et al. 2023, equation 2)."""
    difference = chosen_scores - rejected_scores
    return -F.logsigmoid(difference if margin is None else difference - margin)


def pair_batch(examples, device):
    """B pairs as one batch of 2B sequences, chosen ones first: one forward scores both."""
    prompts = [e["prompt_ids"] for e in examples]
    completions = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
    return completion_batch(prompts + prompts, completions, device)


def pair_length(example):
    """Tokens of the longer of the two sequences."""
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


@torch.no_grad()
def evaluate_pairs(model, tokenizer, examples, args, autocast):
    """Held-out accuracy (a tie counts half), its binomial standard error, margin, the scores' spread."""
    chosen, rejected = torch.zeros(len(examples)), torch.zeros(len(examples))
    for rows in micro_batches([pair_length(e) for e in examples], args.micro_batch_tokens // 2):
        batch = pair_batch([examples[i] for i in rows], model.device)
        with autocast():
            scores = sequence_scores(model, batch.input_ids, batch.attention_mask).cpu()
        chosen[rows], rejected[rows] = scores.chunk(2)
    chosen, rejected = over_ranks(chosen, rejected)
    scores = torch.cat([chosen, rejected])
    accuracy = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()
    margins = torch.tensor([e["margin"] for e in examples])
    metrics = {
        "eval/loss": bradley_terry_loss(chosen, rejected, margins).mean().item(),
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": (accuracy * (1 - accuracy) / len(examples)) ** 0.5,
        "eval/margin": (chosen - rejected).mean().item(),
        "eval/score_mean": scores.mean().item(),
        "eval/score_std": scores.std(correction=0).item(),
    }
    rows = []
    for i, example in enumerate(examples[:500]):
        for kind, score in (("chosen", chosen[i]), ("rejected", rejected[i])):
            text = completion_text(tokenizer, example["prompt_ids"], example[f"{kind}_ids"])
            rows.append(
                {"prompt": example["prompt"], "completion": text, "kind": kind, "score": score.item()}
            )
    return metrics, rows


def main(args):
    device, autocast = setup(args)

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "preference", args)
    held_out = load_held_out(tokenizer, "preference", args)
    pad = tokenizer, stop_ids
    model = load_scorer(args.model, device, "--model", train=args, new_head="normal", pad=pad)
    check_context(model, max(map(pair_length, examples + held_out)), "--max-length")
    optimizer = make_optimizer([model], args)
    steps = -(-args.epochs * len(examples) // args.batch_size)
    steps = min(steps, args.steps or steps)
    run = Run(args, steps)
    start, metrics = run.restore({"model": model}, optimizer), {}

    def evaluate(step):
        metrics, rows = evaluate_pairs(model, tokenizer, held_out, args, autocast)
        run.samples(step, rows)
        return metrics

    if start == 0 and held_out:
        run.log(0, evaluate(0), show=[])
    for step in range(start, steps):
        # data: the next pairs, in an order of its own for every epoch
        began = time.time()
        first = step * args.batch_size
        last = min(first + args.batch_size, args.epochs * len(examples))
        picked = shuffled(examples, args.seed, first, last)

        # update: one denominator for the whole batch, however it is cut into micro-batches
        loss_sum, accuracy, margin, tokens, padded_tokens = 0.0, 0.0, 0.0, 0, 0
        for rows in micro_batches([pair_length(e) for e in picked], args.micro_batch_tokens // 2):
            mb = pair_batch([picked[i] for i in rows], device)
            with autocast():
                scores = sequence_scores(model, mb.input_ids, mb.attention_mask)
            chosen_scores, rejected_scores = scores.chunk(2)
            margins = torch.tensor([picked[i]["margin"] for i in rows], device=device)
            losses = bradley_terry_loss(chosen_scores, rejected_scores, margins)
            losses = losses + args.center_coef * (chosen_scores + rejected_scores) ** 2
            loss = losses.sum() / len(picked)
            loss.backward()
            difference = (chosen_scores - rejected_scores).detach()
            loss_sum += loss.detach()
            accuracy += ((difference > 0).float() + 0.5 * (difference == 0).float()).sum() / len(picked)
            margin += difference.sum() / len(picked)
            tokens, padded_tokens = tokens + sum(mb.lengths), padded_tokens + mb.input_ids.numel()
        sums = over_ranks(loss_sum, accuracy, margin, tokens, padded_tokens)
        loss_sum, accuracy, margin, tokens, padded_tokens = sums
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.stop_unless_finite(step + 1, picked, loss=loss_sum, grad_norm=grad_norm)
        learning_rate = set_learning_rate(optimizer, args, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log, eval, save
        metrics = {"loss": loss_sum, "accuracy": accuracy, "margin": margin, "grad_norm": grad_norm}
        metrics |= {"learning_rate": learning_rate, "padding": 1 - tokens / padded_tokens}
        metrics["seconds/train"] = time.time() - began
        metrics["tokens_per_second"] = tokens / metrics["seconds/train"]
        if held_out and due(args.eval_every, step + 1, steps):
            metrics |= evaluate(step + 1)
        run.log(step + 1, metrics, show=["loss", "accuracy", "margin", "grad_norm"])
        run.checkpoint_if_due(step + 1, {"model": model}, optimizer)
    is_laptop = args.model == "runs/sft" and args.output_dir == "runs/reward_model" and args.dataset == "sort"
    then = "" if is_laptop else f" --model {args.model} --reward {args.output_dir} --dataset ..."
    run.finish(model, tokenizer, stop_ids, f"python ppo.py{then}")
    return metrics


if __name__ == "__main__":
    # Bradley-Terry leaves a constant per prompt open, which PPO would have to learn first: centre the scores
    laptop = dict(model="runs/sft", steps=1100, batch_size=32, learning_rate=4e-4, warmup_steps=100)
    main(cli(Args, laptop=laptop | dict(center_coef=0.03, overwrite=True)))
