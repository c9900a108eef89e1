"""Supervised fine-tuning (SFT): teach a language model to answer, by maximum likelihood of given
completions.

    loss = - sum over completion tokens of log pi(token | what stands before it) / number of
    completion tokens

The first stage of RLHF (Ouyang et al. 2022, section 3.5). Prompt tokens are not trained (Huang et
al. 2024 train them too); EOS is, so that the model learns to stop. Left out: packing several rows
into one sequence (sorting by length saves most of the padding), LoRA and 8-bit optimisers (a few
lines of peft or bitsandbytes at load_policy).

    python sft.py                     a tiny model from scratch: a quarter of a minute, two cores
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset data.jsonl --eval-dataset held_out.jsonl

Data: rows of prompt and completion (or instruction and output, question and answer), or of
messages. Expect the held-out loss to fall, and to rise again once the rows are learnt by heart:
stop there. The laptop run ends near 35% exact match (`gold`): 165 demonstrations do not teach more,
the later stages do."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import tokenizers
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    COMPLETION_COLUMNS,
    LETTERS,
    BadRow,
    DroppedRow,
    Run,
    all_reduce,
    as_forward,
    check_fit,
    cli,
    clip_gradients,
    completion_text,
    context_of,
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
    load_tokenizer,
    micro_batches,
    pad_rows,
    prepare,
    prompt_of,
    sample,
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
    chat_template_kwargs: str | None = None
    """JSON object of variables of the chat template, as {"enable_thinking": false} of Qwen3's; they
    are saved in the template"""
    output_dir: str = "runs/sft"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, with the flags that it was started with"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 2e-5
    """peak, of AdamW (2e-5: Alpaca, Tulu)"""
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
    batch_size: int = 64
    """sequences per optimiser step"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    train_on: Literal["last", "all"] = "last"
    """assistant turns of `messages` that are trained"""


def sft_example(row, tokenizer, end_id, args):
    """Prompt and completion, or messages, of which the last assistant turn is trained, or all of
    them."""
    if "messages" in row:
        messages = text_or_messages(row, ["messages"])
        roles = [] if isinstance(messages, str) else [message["role"] for message in messages]
        turns = [i for i, role in enumerate(roles) if role == "assistant" and i > 0]
        if not turns:
            raise BadRow(
                "`messages` has no assistant turn after the first message: nothing to train on"
            )
        if args.train_on == "last":
            turns = turns[-1:]
        pairs = [(messages[:i], messages[i : i + 1]) for i in turns]
    else:
        pairs = [(prompt_of(row, args), text_or_messages(row, COMPLETION_COLUMNS))]
    ids = []
    mask = []
    for prompt, completion in pairs:
        prompt_ids, (completion_ids,) = encode_completions(tokenizer, prompt, [completion], end_id)
        if prompt_ids[: len(ids)] != ids:
            raise DroppedRow(
                "whose turns the chat template rewrites once others follow (it strips reasoning, "
                "say): use --train-on last"
            )
        mask += [0] * (len(prompt_ids) - len(ids)) + [1] * len(completion_ids)
        ids = prompt_ids + completion_ids
    if len(ids) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "mask": mask}


def tiny_tokenizer():
    """One token a letter, `>`, PAD, EOS and UNK; no BOS, no chat template."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[EOS]", "[UNK]", ">", *LETTERS])}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=64,
    )


def tiny_config(tokenizer):
    """A Llama of 0.8M parameters."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def make_batch(sequences, masks, device):
    """Lists of T+1 ids, and of as many 0 and 1 (trained) -> a batch: a dict of tensors (B, T).

    inputs is all but a sequence's last token, targets all but its first, and mask is 1 where the
    target is trained: column t of anything speaks of targets[:, t]. Masks come from lengths, so
    that PAD, which is never read, may be any id, EOS too."""
    return {
        "inputs": pad_rows([ids[:-1] for ids in sequences], device),
        "targets": pad_rows([ids[1:] for ids in sequences], device),
        "attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),
        "mask": pad_rows([mask[1:] for mask in masks], device),
    }


@as_forward
def token_logprobs(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) of softmax(logits / temperature).

    batch: inputs, targets, attention_mask, mask, each (B, T) -> (B, T) float32, in nats, 0 outside
    the mask. Head and softmax run at mask positions only, and where these are many in chunks,
    computed again in the backward pass, so that memory does not grow with B * T * V."""
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
        return in_micro_batches(
            lambda mb: token_logprobs(model, mb, temperature),
            batch,
            args.micro_batch_tokens,
        )


def sft_loss(logprobs, weights):
    """- sum of weights * logprobs; with weights = mask / number of trained tokens of the whole
    batch, their mean NLL. logprobs, weights (B, T) -> scalar, nats per token."""
    return -(weights * logprobs).sum()


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


@torch.no_grad()
def complete_prompts(policy, examples, longest, *, gold, tokenizer, eos_ids, args, autocast):
    """A greedy and a sampled completion, of `longest` tokens at most, of each held-out prompt ->
    the sampled ones, metrics (how many are right, how many of the sampled ones stop), and a row for
    each prompt with the sampled one."""
    prompts = [example["prompt_ids"] for example in examples]
    room = context_of(policy.config) - max(map(len, prompts))
    metrics = {}
    # the sampled completions come second: what follows the loop is about them
    for suffix, temperature in [("_greedy", 0.0), ("", 1.0)]:
        with autocast():
            completions = sample(
                policy,
                prompts,
                num_generations=1,
                max_new_tokens=min(longest, room),
                temperature=temperature,
                eos_ids=eos_ids,
                rng=generator(args.seed, "evaluate"),
            )
        if gold is not None:
            golds = gold(examples, completions)
            metrics[f"eval/gold{suffix}"] = golds.mean()
    metrics["eval/eos_rate"] = sum(ids[-1] in eos_ids for ids in completions) / len(completions)
    metrics["eval/completion_length"] = sum(map(len, completions)) / len(completions)

    rows = []
    for i, example in enumerate(examples):
        text = completion_text(tokenizer, example["prompt_ids"], completions[i])
        row = {"prompt": example["prompt"], "completion": text}
        if gold is not None:
            row["gold"] = golds[i].item()
        rows.append(row)
    return completions, metrics, rows


@torch.no_grad()
def evaluate_answers(policy, examples, *, gold, tokenizer, eos_ids, args, autocast):
    """Held-out loss, in nats per token, and what complete_prompts says of the first 500 prompts ->
    metrics, rows."""
    batch = make_batch(
        [example["ids"] for example in examples],
        [example["mask"] for example in examples],
        policy.device,
    )
    logprobs = batch_token_logprobs(policy, batch, args, autocast)
    loss = sft_loss(logprobs, batch["mask"] / batch["mask"].sum())
    _, metrics, rows = complete_prompts(
        policy,
        examples[:500],
        max(len(example["ids"]) - len(example["prompt_ids"]) for example in examples),
        gold=gold,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        args=args,
        autocast=autocast,
    )
    return {"eval/loss": loss} | metrics, rows


def main(args):
    device, autocast = setup(args)
    if args.model is None and args.chat_template_kwargs is not None:
        fail("--chat-template-kwargs needs --model: the laptop run has no chat template")

    # load the data first, so that a bad file costs no time
    tokenizer = tiny_tokenizer()
    if args.model:
        tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model) if args.model else [tokenizer.eos_token_id]
    examples = load_examples(args.dataset, sft_example, tokenizer, args)
    held_out = load_held_out(sft_example, tokenizer, args)
    longest = max(len(example["ids"]) for example in examples + held_out)
    if args.model is not None:
        check_fit(
            args.model,
            "--model",
            examples=examples + held_out,
            tokens=longest,
            lengths="--max-length",
        )
    gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer, eos_ids)
    if args.model is None:  # new weights
        torch.manual_seed(args.seed)
        model = transformers.LlamaForCausalLM(tiny_config(tokenizer))
        policy = prepare(
            model,
            device,
            trainable=True,
            gradient_checkpointing=args.gradient_checkpointing,
        )
    else:
        policy = load_policy(
            args.model,
            device,
            trainable=True,
            gradient_checkpointing=args.gradient_checkpointing,
        )
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    if args.steps is not None:
        if args.steps > steps:
            print(f"--steps {args.steps}: the run ends after {steps}, which are all --epochs")
        steps = min(steps, args.steps)
    run = Run(args, models, optimizer, steps, examples)

    def held_out_metrics(step):
        metrics, rows = evaluate_answers(
            policy,
            held_out,
            gold=gold,
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
    for step in range(start, steps):
        # take the next rows, in an order of its own for every epoch
        began = time.time()
        first_row = step * args.batch_size
        stop_row = min(first_row + args.batch_size, args.epochs * len(examples))
        batch_examples = stream(examples, args.seed, first_row, stop_row)
        batch = make_batch(
            [example["ids"] for example in batch_examples],
            [example["mask"] for example in batch_examples],
            device,
        )

        # update: one normaliser for the whole batch, however it is cut into micro-batches
        batch["weights"] = batch["mask"] / batch["mask"].sum()
        totals = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            with autocast():
                mb_logprobs = token_logprobs(policy, mb)
            loss = sft_loss(mb_logprobs, mb["weights"])
            loss.backward()
            totals["loss"] += loss.detach()
            totals["padded_tokens"] += mb["inputs"].numel()
        learning_rate = scheduled_learning_rate(step, steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        if not grad_norm.isfinite():
            fail(f"step {step + 1}: the gradient's norm is {grad_norm}; no update was made")
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        seconds = time.time() - began
        batch_tokens = batch["attention_mask"].sum()
        metrics = {
            "loss": all_reduce(totals["loss"]),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "padding": 1 - batch_tokens / all_reduce(totals["padded_tokens"]),
            "tokens_per_second": batch_tokens / seconds,
            "seconds/train": seconds,
        }
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= held_out_metrics(step + 1)
        run.log(step + 1, metrics, show=["loss", "grad_norm", "tokens_per_second"])
        run.checkpoint_if_due(step + 1)
    is_laptop = args.model is None and args.output_dir == "runs/sft"
    flags = "" if is_laptop else f" --model {args.output_dir} --dataset ..."
    run.finish(policy, tokenizer, eos_ids, f"python reward_model.py{flags}")
    return metrics


if __name__ == "__main__":
    laptop = dict(
        epochs=120,
        learning_rate=1e-3,
        warmup_steps=20,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
