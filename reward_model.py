"""Reward model (RM): learn from pairs of answers which one people prefer, as one number for any
answer.

    loss = - log sigmoid(r(prompt, chosen) - r(prompt, rejected) - margin), mean over pairs
    (Bradley-Terry)

The second stage of RLHF (Ouyang et al. 2022, equation 1; Stiennon et al. 2020). The score is a
scalar head on the hidden state of the last real token, EOS. Left out: ensembles, and shifting the
scores to mean 0 after training (Stiennon et al. do): a constant changes no advantage once PPO's
values have learnt it. `eval/score_mean` is logged.

    python reward_model.py            after sft.py: three quarters of a minute, two cores
    python reward_model.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset more.jsonl

Data: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike; `margin`
optional. One epoch: a second learns the pairs by heart. Expect 60 to 75% held-out accuracy on human
preferences, more in the laptop run."""

import math
import numbers
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from common import (
    PROMPT_COLUMNS,
    BadRow,
    DroppedRow,
    Run,
    all_reduce,
    as_forward,
    check_fit,
    check_length,
    cli,
    clip_gradients,
    completion_text,
    encode_completions,
    fail,
    find_eos_ids,
    generator,
    in_micro_batches,
    is_due,
    load_examples,
    load_held_out,
    load_scorer,
    load_tokenizer,
    micro_batches,
    pad_rows,
    prompt_of,
    setup,
    stream,
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
    output_dir: str = "runs/reward_model"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 9e-6
    """peak, of AdamW (9e-6: Ouyang et al. 2022)"""
    warmup_steps: int = 10
    """steps of linear warm-up (PyTorch's Adam takes large steps at first)"""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """from the peak down to 0, which would be reached one step after the last; or not"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm; 0: never (1: the RLHF book)"""
    micro_batch_tokens: int | None = None
    """tokens, with padding, of one forward and backward (without it GPU: 16,384, CPU: 4,096)"""
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
    batch_size: int = 64
    """pairs per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    center_coef: float = 0.0
    """weight of (score of chosen + score of rejected)^2, which keeps scores near 0 (Eisenstein et
    al. 2023: 0.01)"""


def preference_example(row, tokenizer, end_id, args):
    """Prompt, chosen, rejected, or chosen and rejected that begin alike; `margin` is optional."""
    chosen = text_or_messages(row, ["chosen"])
    rejected = text_or_messages(row, ["rejected"])
    # UltraFeedback's form: a text, which stands in both conversations, too
    is_whole = isinstance(chosen, list) and isinstance(row.get("prompt"), str)
    if args.prompt_template != "{prompt}" or row.keys() & PROMPT_COLUMNS and not is_whole:
        prompt = prompt_of(row, args)
    else:
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    margin = row.get("margin") or 0.0
    if not (isinstance(margin, numbers.Real) and abs(margin) < 1e9):  # nor NaN
        raise BadRow(f"`margin` must be a number, found {margin!r:.60}")
    prompt_ids, (chosen_ids, rejected_ids) = encode_completions(
        tokenizer, prompt, [chosen, rejected], end_id
    )
    check_length(
        prompt_ids + max(chosen_ids, rejected_ids, key=len), args.max_length, "--max-length"
    )
    if chosen_ids == rejected_ids:
        raise DroppedRow("whose chosen and rejected are the same in tokens")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "margin": float(margin),
    }


def split_shared_prefix(chosen, rejected):
    """chosen and rejected that begin alike -> prompt, chosen, rejected.

    Of messages all equal ones but the last are the prompt; of texts all up to the last "Assistant:"
    that they share (Anthropic's form), or up to the last white space."""
    is_same = [a == b for a, b in zip(chosen, rejected)] + [False]
    cut = is_same.index(False)
    if isinstance(chosen, list):
        cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    else:
        match = re.match(r"(.*\n\nAssistant:)|(.*)(?=\s)", chosen[:cut], re.DOTALL)
        cut = match.end() if match else 0
    if cut == 0:
        raise BadRow("has no prompt, and `chosen` and `rejected` do not begin alike")
    return chosen[:cut], chosen[cut:], rejected[cut:]


@as_forward
def sequence_scores(model, batch):
    """The scalar head at the last real token, found by length: neither padding nor a PAD inside the
    text moves it.

    batch: inputs, here whole sequences, and attention_mask, (B, T), right-padded -> (B,) float32.
    The head's product is in float32 under autocast too: in bfloat16 scores near 4 would be 0.03
    apart at least, and close pairs ties."""
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state  # (B, T, H)
    last = batch["attention_mask"].sum(1) - 1  # (B,)
    hidden = hidden[torch.arange(len(last), device=last.device), last]  # (B, H)
    return (hidden.float() * model.score.weight[0]).sum(-1)


def bradley_terry_loss(chosen_scores, rejected_scores, margin=None):
    """- log sigmoid(r_chosen - r_rejected - margin), each (B,) -> (B,). Ouyang et al. 2022,
    equation 1; the margin, how much better the chosen one was judged, is Llama 2's (Touvron et al.
    2023, equation 2)."""
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)


def pair_accuracy(chosen, rejected):
    """1 where chosen > rejected, 0.5 in a tie, else 0: each (B,) -> (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def pair_length(example):
    """Tokens of the longer of the two sequences."""
    return len(example["prompt_ids"]) + max(
        len(example["chosen_ids"]), len(example["rejected_ids"])
    )


def score_batch(examples, device):
    """B pairs -> a batch of 2B whole sequences, each chosen one followed by its rejected one;
    margins and weights, those of the mean over pairs, are (2B,), the same for the two."""
    sequences = []
    for example in examples:
        sequences.append(example["prompt_ids"] + example["chosen_ids"])
        sequences.append(example["prompt_ids"] + example["rejected_ids"])
    margins = torch.tensor([example["margin"] for example in examples], device=device)
    return {
        "inputs": pad_rows(sequences, device),
        "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], device),
        "margins": margins.repeat_interleave(2),
        "weights": torch.full((len(sequences),), 1 / len(examples), device=device),
    }


def choose_pad(model, tokenizer, eos_ids):
    """Give a reward model a PAD that is no EOS: transformers scores at the last id but PAD."""
    if tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last: of the step
    alone."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


def of_pairs(values):
    """Values of B pairs side by side (2B,) -> of the chosen ones (B,), of the rejected ones
    (B,)."""
    return values[0::2], values[1::2]


@torch.no_grad()
def evaluate_pairs(model, examples, *, tokenizer, args, autocast):
    """Held-out accuracy (a tie counts half), its binomial standard error, margin and the scores'
    spread -> metrics, and a row for each sequence of the first 500 pairs with its score."""
    scores = []
    for start in range(0, len(examples), 1000):
        batch = score_batch(examples[start : start + 1000], model.device)
        with autocast():
            batch_scores = in_micro_batches(
                lambda mb: sequence_scores(model, mb),
                batch,
                args.micro_batch_tokens,
            )
        scores.append(batch_scores)
    scores = torch.cat(scores)
    chosen, rejected = of_pairs(scores)
    margins = torch.tensor([example["margin"] for example in examples], device=scores.device)
    accuracy = pair_accuracy(chosen, rejected).mean().item()
    metrics = {
        "eval/loss": bradley_terry_loss(chosen, rejected, margins).mean(),
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(examples)),
        "eval/margin": (chosen - rejected).mean(),
        "eval/score_mean": scores.mean(),
        "eval/score_std": scores.std(correction=0),
    }
    rows = []
    for i, example in enumerate(examples[:500]):
        for kind, score in [("chosen", chosen[i]), ("rejected", rejected[i])]:
            text = completion_text(tokenizer, example["prompt_ids"], example[f"{kind}_ids"])
            rows.append(
                {
                    "prompt": example["prompt"],
                    "completion": text,
                    "kind": kind,
                    "score": score.item(),
                }
            )
    return metrics, rows


def main(args):
    device, autocast = setup(args)

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    eos_ids = find_eos_ids(tokenizer, args.model)
    examples = load_examples(args.dataset, preference_example, tokenizer, args)
    held_out = load_held_out(preference_example, tokenizer, args)
    longest = max(map(pair_length, examples + held_out))
    check_fit(args.model, examples + held_out, longest, "--max-length")

    def init(model, has_new_head):
        """A head of variance 1 / (H + 1) (Stiennon et al. 2020), a PAD that is no EOS."""
        if has_new_head:
            std = 1 / math.sqrt(model.score.in_features + 1)
            nn.init.normal_(model.score.weight, std=std, generator=generator(args.seed, "head"))
        choose_pad(model, tokenizer, eos_ids)

    model = load_scorer(
        args.model,
        device,
        "--model",
        trainable=True,
        gradient_checkpointing=args.gradient_checkpointing,
        init=init,
    )
    models = nn.ModuleDict({"model": model})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    steps = min(steps, args.steps or steps)
    run = Run(args, models, optimizer, steps, examples)

    def evaluate_and_log(step):
        metrics, rows = evaluate_pairs(
            model,
            held_out,
            tokenizer=tokenizer,
            args=args,
            autocast=autocast,
        )
        run.log_samples(step, rows)
        return metrics

    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, evaluate_and_log(0))
    for step in range(start, steps):
        # take the next pairs, in an order of its own for every epoch
        began = time.time()
        first = step * args.batch_size
        last = min(first + args.batch_size, args.epochs * len(examples))
        batch = score_batch(stream(examples, args.seed, first, last), device)

        # update: one normaliser for the whole batch, however it is cut into micro-batches
        totals = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens, together=2):
            with autocast():
                scores = sequence_scores(model, mb)
            chosen_scores, rejected_scores = of_pairs(scores)
            mb_margins, _ = of_pairs(mb["margins"])
            mb_weights, _ = of_pairs(mb["weights"])
            losses = bradley_terry_loss(chosen_scores, rejected_scores, mb_margins)
            losses = losses + args.center_coef * (chosen_scores + rejected_scores) ** 2
            loss = (mb_weights * losses).sum()
            loss.backward()
            totals["loss"] += loss.detach()
            totals["accuracy"] += (mb_weights * pair_accuracy(chosen_scores, rejected_scores)).sum()
            totals["margin"] += (mb_weights * (chosen_scores - rejected_scores).detach()).sum()
            totals["padded_tokens"] += mb["inputs"].numel()
        learning_rate = scheduled_learning_rate(step, steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        grad_norm = clip_gradients(model, args.max_grad_norm)
        if not grad_norm.isfinite():
            fail(f"step {step + 1}: the gradient's norm is {grad_norm}; no update was made")
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        seconds = time.time() - began
        batch_tokens = batch["attention_mask"].sum()
        metrics = {
            "loss": all_reduce(totals["loss"]),
            "accuracy": all_reduce(totals["accuracy"]),
            "margin": all_reduce(totals["margin"]),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "padding": 1 - batch_tokens / all_reduce(totals["padded_tokens"]),
            "tokens_per_second": batch_tokens / seconds,
            "seconds/train": seconds,
        }
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= evaluate_and_log(step + 1)
        run.log(step + 1, metrics, show=["loss", "accuracy", "margin", "grad_norm"])
        run.checkpoint_if_due(step + 1)
    is_laptop = (
        args.model == "runs/sft"
        and args.output_dir == "runs/reward_model"
        and args.dataset == "sort"
    )
    flags = "" if is_laptop else f" --model {args.model} --reward {args.output_dir} --dataset ..."
    run.finish(model, tokenizer, eos_ids, f"python ppo.py{flags}")
    return metrics


if __name__ == "__main__":
    # Bradley-Terry leaves a constant per prompt open, which PPO would have to learn first: centre
    # the scores
    laptop = dict(
        model="runs/sft",
        steps=1100,
        batch_size=32,
        learning_rate=4e-4,
        warmup_steps=100,
        center_coef=0.03,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
