"""Supervised fine-tuning (SFT): maximum likelihood of given completions.

    loss = -sum over completion tokens of log pi(token | previous tokens) / number of these tokens

The first stage of RLHF (Ouyang et al. 2022, section 3.5). Prompt tokens are not trained (Huang et
al. 2024 train them too). The mean runs over the tokens of the batch; some lecture notes divide by
the length of each completion. EOS is trained, so the model learns to stop. Not included: packing
several rows into one sequence (sorting by length saves most of the padding), LoRA, 8-bit
optimizers.

    python sft.py                     demo, a tiny model from scratch: 15 seconds on two cores
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset data.jsonl --eval-dataset held_out.jsonl

Data: rows with prompt and completion (or instruction and output, question and answer), or with
messages. Expect the held-out loss to fall, then rise as the model overfits: stop at the minimum.
The demo, a run without --model, ends near 35% exact match (`gold`), since it has only 165 rows. The
later stages improve on that."""

import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    COMPLETION_COLUMNS,
    LETTERS,
    DroppedRow,
    Run,
    all_reduce,
    check_fit,
    cli,
    clip_gradients,
    context_of,
    encode_completions,
    generator,
    head_logits,
    hidden_states,
    in_micro_batches,
    is_due,
    load_examples,
    load_gold,
    load_held_out,
    load_policy,
    load_tokenizer,
    micro_batches,
    model_forward,
    pad_rows,
    prompt_of,
    sample,
    setup,
    shuffled_examples,
    text_or_messages,
)

# Roles in plain text and EOS after each answer, as in Tulu (Wang et al. 2023): no token is added
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '') + '\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)


@dataclass
class Args:
    train_on: Literal["last", "all"] = "last"
    """assistant turns of `messages` that are trained"""
    chat_template: str | None = None
    """plain (built in) or a .jinja file, saved with the tokenizer of a base model"""
    batch_size: int = 64
    """sequences per optimizer step"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    # shared by all scripts
    model: str | None = None
    """directory or Hub id to start from (default: the tiny demo model)"""
    dataset: str = "sort"
    """sort (built in), a .jsonl or .json file, or a Hub id (name:split)"""
    eval_dataset: str | None = None
    """held-out data in the same formats (sort brings its own)"""
    prompt_template: str = "{prompt}"
    """text prompt from columns, such as "Q: {question} A:" """
    output_dir: str = "runs/sft"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimizer steps at most (default: until --epochs ends)"""
    learning_rate: float = 2e-5
    """peak learning rate of AdamW (Alpaca, Tulu: 2e-5)"""
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


def sft_example(row, tokenizer, args):
    """Prompt and completion; or messages, of which the last or all assistant turns are trained."""
    if "messages" in row:
        messages = text_or_messages(row, ["messages"])
        turns = [i for i, m in enumerate(messages) if i > 0 and m["role"] == "assistant"]
        if not turns:
            raise ValueError("`messages` has no assistant turn after the first message")
        if args.train_on == "last":
            turns = turns[-1:]
        pairs = [(messages[:i], messages[i : i + 1]) for i in turns]
    else:
        pairs = [(prompt_of(row, args), text_or_messages(row, COMPLETION_COLUMNS))]
    ids = []
    mask = []
    for prompt, completion in pairs:
        prompt_ids, (completion_ids,) = encode_completions(tokenizer, prompt, [completion])
        if prompt_ids[: len(ids)] != ids:  # for example, it strips reasoning from earlier turns
            raise DroppedRow("the chat template rewrites earlier turns; use --train-on last")
        mask += [0] * (len(prompt_ids) - len(ids)) + [1] * len(completion_ids)
        ids = prompt_ids + completion_ids
    if row.get("label") is False:  # rows for KTO
        raise DroppedRow("labeled false")
    if len(ids) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "mask": mask}


def set_chat_template(tokenizer, name):
    """Set the chat template: PLAIN_TEMPLATE, after BOS if the model has one, or a .jinja file."""
    if name != "plain":
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        return
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = (tokenizer.bos_token if has_bos else "") + PLAIN_TEMPLATE


def tiny_tokenizer():
    """One token per letter, `>`, PAD, EOS and UNK; no BOS, no chat template."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[EOS]", "[UNK]", ">", *LETTERS])}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


def save_tiny_model(folder, seed):
    """Save the model of the demo, a new Llama of 0.8M parameters, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(
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
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_batch(examples, device):
    """Make a batch, a dict of (B, T) tensors, from ids and mask (1: trained).

    inputs is all but the last token of each sequence, targets all but the first. mask is 1 where
    the target is trained. Column t of every (B, T) tensor refers to targets[:, t]. Masks come from
    lengths, so PAD may be any id, even EOS."""
    sequences = [example["ids"] for example in examples]
    return {
        "inputs": pad_rows([ids[:-1] for ids in sequences], device),
        "targets": pad_rows([ids[1:] for ids in sequences], device),
        "attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),
        "mask": pad_rows([example["mask"][1:] for example in examples], device),
    }


@model_forward
def token_logprobs(model, batch, temperature=1.0):
    """log pi(targets[:, t] | inputs[:, : t + 1]) in nats, with pi = softmax(logits / temperature).

    The result is float32 and 0 outside the mask. The LM head runs on masked positions only, in
    checkpointed chunks, so memory does not scale with B * T * V.
    Shapes: batch of (B, T) -> (B, T)."""
    mask = batch["mask"].bool()
    hidden = hidden_states(model, batch)  # (N, H)
    targets = batch["targets"][mask]  # (N,)

    def chunk_logprobs(hidden, targets):
        log_softmax = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (n, V) float32
        return log_softmax.gather(-1, targets[:, None])[:, 0]

    chunk = 40_000_000 // model.config.get_text_config().vocab_size
    if len(targets) <= chunk:
        logprobs = chunk_logprobs(hidden, targets)
    else:
        chunks = [
            checkpoint(chunk_logprobs, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk))
        ]
        logprobs = torch.cat(chunks)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def nll_loss(logprobs, weights):
    """Negative log-likelihood: -sum of weights * logprobs, in nats per token.

    The weights are mask / number of trained tokens in the whole batch.
    Shapes: (B, T), (B, T) -> scalar."""
    return -(weights * logprobs).sum()


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


def throughput(batch, padded_tokens, start_time):
    """Padding, speed and memory of a step that ends now."""
    num_tokens = batch["attention_mask"].sum()
    seconds = time.time() - start_time
    metrics = {
        "padding": 1 - num_tokens / all_reduce(padded_tokens),
        "tokens_per_second": num_tokens / seconds,
        "seconds/train": seconds,
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


@torch.no_grad()
def complete_prompts(policy, gold, examples, max_new_tokens, run, step):  # noqa: PLR0917
    """Greedy and sampled completions of held-out prompts; returns the sampled ones and metrics.

    gold is {"gold": reward} or {}. The sampled completions are written to samples.jsonl."""
    longest_prompt = max(len(example["prompt_ids"]) for example in examples)
    metrics = {}
    # the rollouts used below the loop are the sampled ones
    for suffix, temperature in [("_greedy", 0.0), ("", 1.0)]:
        rollouts = sample(
            policy,
            examples,
            max_new_tokens=min(max_new_tokens, context_of(policy.config) - longest_prompt),
            temperature=temperature,
            rng=generator(run.args.seed, "evaluate"),
        )
        values = {name: score(rollouts) for name, score in gold.items()}
        metrics |= {f"eval/{name}{suffix}": x.mean() for name, x in values.items()}
    n = len(rollouts)
    metrics["eval/eos_rate"] = sum(rollout["finished"] for rollout in rollouts) / n
    metrics["eval/completion_length"] = sum(len(x["completion_ids"]) for x in rollouts) / n
    run.log_samples(step, rollouts, {name: x.tolist() for name, x in values.items()})
    return rollouts, metrics


@torch.no_grad()
def evaluate_answers(policy, gold, examples, run, step):
    """Held-out loss in nats per token and completions of the first 500 prompts; returns metrics."""
    batch = make_batch(examples, policy.device)
    logprobs = in_micro_batches(token_logprobs, policy, batch, run.args.micro_batch_tokens)
    loss = nll_loss(logprobs, batch["mask"] / batch["mask"].sum())
    longest = max(len(example["ids"]) - len(example["prompt_ids"]) for example in examples)
    _, metrics = complete_prompts(policy, gold, examples[:500], longest, run=run, step=step)
    return {"eval/loss": loss} | metrics


def main(args):
    device = setup(args)

    path = args.model
    if path is None:
        folder = tempfile.TemporaryDirectory()
        path = folder.name
        save_tiny_model(path, args.seed)

    # data first: a bad file fails before the model is loaded
    tokenizer = load_tokenizer(path)
    if args.chat_template is not None:
        set_chat_template(tokenizer, args.chat_template)
    examples = load_examples(args.dataset, "sft", sft_example, tokenizer, args)
    held_out = load_held_out(examples, "sft", sft_example, tokenizer, args)
    gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer)

    # model
    check_fit(path, [example["ids"] for example in examples + held_out])
    policy = load_policy(path, tokenizer, args, device, trainable=True)
    models = nn.ModuleDict({"policy": policy})
    optimizer = torch.optim.AdamW(
        models.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    num_rows = args.epochs * len(examples)
    steps = math.ceil(num_rows / args.batch_size)
    if args.steps is not None:
        steps = min(steps, args.steps)
    run = Run(args, models, optimizer, tokenizer, steps=steps, examples=examples)

    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, evaluate_answers(policy, gold, held_out, run, step=0))
    for step in range(start, steps):
        # batch: the next rows of the shuffled data
        start_time = time.time()
        first = step * args.batch_size
        stop = min(first + args.batch_size, num_rows)
        batch = make_batch(shuffled_examples(examples, args.seed, first, stop), device)
        batch["weights"] = batch["mask"] / batch["mask"].sum()

        # update: one normalizer for the whole batch, however it is cut into micro-batches
        optimizer.param_groups[0]["lr"] = scheduled_learning_rate(step, steps, args)
        sums = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            logprobs = token_logprobs(policy, mb)
            loss = nll_loss(logprobs, mb["weights"])
            loss.backward()
            sums.update(loss=loss.detach(), padded_tokens=mb["inputs"].numel())
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        metrics = {
            "loss": all_reduce(sums["loss"]),
            "grad_norm": grad_norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        metrics |= throughput(batch, sums["padded_tokens"], start_time)
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= evaluate_answers(policy, gold, held_out, run, step=step + 1)
        run.log(step + 1, metrics, show=["loss", "grad_norm", "tokens_per_second"])
        run.checkpoint_if_due(step + 1)
    run.finish(policy)
    return metrics


if __name__ == "__main__":
    laptop = dict(
        epochs=120,
        learning_rate=1e-3,
        warmup_steps=20,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
