"""Direct preference optimization (DPO): learn from preference pairs in one stage.

    loss = -log sigmoid(beta log pi/pi_ref(chosen) - beta log pi/pi_ref(rejected)), mean over pairs

Rafailov et al. 2023, equation 7. The optimum of the RLHF objective, pi_ref exp(reward / beta) / Z,
is solved for the reward and inserted into the Bradley-Terry likelihood. The resulting loss needs no
reward model and no sampling. Log-probs are sums over the completion, EOS included. --loss-type
selects variants of one to three lines each (see preference_loss). Not included: making the pairs, a
learned or scheduled beta, LoRA.

    python dpo.py                     demo, after sft.py: 45 seconds on two cores
    python dpo.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset more.jsonl

Data: rows with prompt, chosen and rejected, or with chosen and rejected that share a beginning;
`margin` is optional. Expect `accuracy` and `margin` to rise from 0.5 and 0, and the loss to fall
from log 2."""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    PROMPT_COLUMNS,
    DroppedRow,
    Run,
    all_reduce,
    check_fit,
    cli,
    clip_gradients,
    context_of,
    encode_completions,
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


@dataclass
class Args:
    loss_type: Literal["sigmoid", "sigmoid-norm", "ipo", "simpo", "orpo"] = "sigmoid"
    """loss (see preference_loss); simpo and orpo need no reference"""
    beta: float | None = None
    """scale of the implicit reward (default: as in the paper, see BETA)"""
    label_smoothing: float = 0.0
    """probability that a label is wrong, for sigmoid and sigmoid-norm (cDPO, Mitchell 2023)"""
    simpo_margin: float | None = None
    """target margin of simpo (Meng et al. 2024: 1)"""
    sft_coef: float = 0.0
    """weight of the NLL per token of the chosen completion (Pang et al. 2024: 1)"""
    batch_size: int = 64
    """pairs per optimizer step"""
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
    output_dir: str = "runs/dpo"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimizer steps at most (default: until --epochs ends)"""
    learning_rate: float = 5e-7
    """peak learning rate of AdamW (Zephyr, Tulu 3: 5e-7)"""
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


# losses of log-probs averaged over the tokens of a completion (for ipo, as its authors recommend)
LENGTH_AVERAGED = ("sigmoid-norm", "ipo", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
# from the papers, for ipo from TRL
BETA = {"sigmoid": 0.1, "sigmoid-norm": 5.0, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
SIMPO_MARGIN = 1.0


def preference_example(row, tokenizer, args):
    """Prompt, chosen, rejected; or chosen and rejected with a shared prefix. Optional margin."""
    chosen = text_or_messages(row, ["chosen"])
    rejected = text_or_messages(row, ["rejected"])
    # UltraFeedback: `prompt` is text that both conversations repeat as their first message
    repeats_prompt = isinstance(chosen, list) and isinstance(row.get("prompt"), str)
    has_prompt = row.keys() & PROMPT_COLUMNS and not repeats_prompt
    if args.prompt_template != "{prompt}" or has_prompt:
        prompt = prompt_of(row, args)
    else:
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    ids = encode_completions(tokenizer, prompt, [chosen, rejected])
    prompt_ids, (chosen_ids, rejected_ids) = ids
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    if chosen_ids == rejected_ids:
        raise DroppedRow("chosen and rejected have the same tokens")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "margin": float(row.get("margin", 0.0)),
    }


def split_shared_prefix(chosen, rejected):
    """Split a pair without a prompt column into prompt, chosen, rejected.

    The prompt of messages is all equal leading messages, but not the last one. The prompt of texts
    ends at the last shared "Assistant:" (Anthropic's format) or the last shared whitespace."""
    is_same = [a == b for a, b in zip(chosen, rejected)] + [False]
    cut = is_same.index(False)
    if isinstance(chosen, list):
        cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    else:
        match = re.match(r"(.*\n\nAssistant:)|(.*)(?=\s)", chosen[:cut], re.DOTALL)
        cut = match.end() if match else 0
    if cut == 0:
        raise ValueError("no prompt: `chosen` and `rejected` have no shared beginning")
    return chosen[:cut], chosen[cut:], rejected[cut:]


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


def preference_loss(  # noqa: PLR0917
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
    margin=0.0,
):
    """Losses of pairs and their implicit rewards, beta * log pi / pi_ref. Shapes: all (B,).

    Log-probs in nats are sums over tokens, or means for LENGTH_AVERAGED. Those of the reference are
    0 for REFERENCE_FREE. With h = chosen reward - rejected reward - margin, s = label smoothing and
    odds = p / (1 - p):
    sigmoid: -(1-s) log sigmoid(h) - s log sigmoid(-h) (Rafailov et al. 2023, equation 7; with s
        cDPO, Mitchell 2023; with a margin ODPO, Amini et al. 2024)
    sigmoid-norm: the same with means over tokens (Lambert et al. 2024, Tulu 3, equation 6)
    ipo: (difference of log-ratios - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)
    simpo: -log sigmoid(h) (Meng et al. 2024, equation 6)
    orpo: -log pi(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)) (Hong et al. 2024,
        equations 6 and 7; the authors' code includes the prompt)
    ipo and orpo ignore the margin. Not included, but one line each:
    hinge: relu(1 - h) (RSO, Liu et al. 2023; SLiC-HF, Zhao et al. 2023, has no reference)
    robust DPO: sigmoid with + s for -s, divided by 1 - 2s (Chowdhury et al. 2024)
    REBEL: (h - difference of scores)^2 with beta = 1 / eta (Gao et al. 2024)"""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    h = chosen_rewards - rejected_rewards - margin
    if loss_type in ("sigmoid", "sigmoid-norm", "simpo"):
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss_type == "ipo":
        difference = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        losses = (difference - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        log_odds_ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
        losses = -chosen_logps - beta * F.logsigmoid(log_odds_ratio)
    else:
        raise ValueError(f"unknown loss type {loss_type}")
    return losses, chosen_rewards, rejected_rewards


def log_odds(logps):
    """log(p / (1 - p)) from log p, which is clamped at -1e-6 in 1 - p to keep the odds finite."""
    return logps - torch.log(-torch.expm1(logps.clamp(max=-1e-6)))


def pair_accuracy(chosen, rejected):
    """1 if chosen > rejected, 0.5 for a tie, otherwise 0. Shapes: (B,), (B,) -> (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def pair_batch(examples, device):
    """Make a batch of 2B sequences from B pairs, each chosen one followed by its rejected one.

    ref_logps, margins and weights are (2B,), the last two equal for both sequences of a pair."""
    sequences = []
    for example in examples:
        for name in ("chosen_ids", "rejected_ids"):
            sequences.append({"prompt_ids": example["prompt_ids"], "completion_ids": example[name]})
    batch = completion_batch(sequences, device)
    ref_logps = [example.get("ref_logps", [0.0, 0.0]) for example in examples]
    margins = torch.tensor([example["margin"] for example in examples], device=device)
    batch["ref_logps"] = torch.tensor(ref_logps, device=device).flatten()
    batch["margins"] = margins.repeat_interleave(2)
    batch["weights"] = torch.full_like(batch["margins"], 1 / len(examples))
    # keeps the two sequences of a pair in one micro-batch
    batch["group"] = torch.arange(len(examples), device=device).repeat_interleave(2)
    return batch


def split_pairs(values):
    """Split chosen and rejected. Shapes: (2B,) -> (B,), (B,)."""
    return values[0::2], values[1::2]


def pair_losses(logprobs, batch, args):
    """Losses of the pairs of a batch, and values to log. Shapes: (2B, T) -> (B,), dict of (B,)."""
    sequence_logprobs = logprobs.sum(1)  # (2B,)
    ref_logprobs = batch["ref_logps"]
    lengths = batch["mask"].sum(1).clamp(min=1)
    scale = lengths if args.loss_type in LENGTH_AVERAGED else 1
    chosen_logps, rejected_logps = split_pairs(sequence_logprobs / scale)
    ref_chosen_logps, ref_rejected_logps = split_pairs(ref_logprobs / scale)
    margins, _ = split_pairs(batch["margins"])
    if args.loss_type == "simpo":
        margins = margins + (SIMPO_MARGIN if args.simpo_margin is None else args.simpo_margin)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        BETA[args.loss_type] if args.beta is None else args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        margin=margins,
    )
    chosen_nll, _ = split_pairs(-sequence_logprobs / lengths)
    losses = losses + args.sft_coef * chosen_nll

    # the chosen reward often falls too, since the loss only sees the difference and the two answers
    # share most tokens; watch eval/kl and the samples for mass on other answers (Razin et al. 2024)
    logged = {
        "loss": losses,
        "accuracy": pair_accuracy(chosen_rewards, rejected_rewards),
        "margin": chosen_rewards - rejected_rewards,
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
    }
    if args.loss_type not in REFERENCE_FREE:
        logratios = split_pairs(sequence_logprobs - ref_logprobs)
        logged |= {"chosen_logratio": logratios[0], "rejected_logratio": logratios[1]}
    return losses, logged


def add_reference(reference, examples, args):
    """Add ref_logps to the examples: log-probs of chosen and rejected, summed over tokens."""
    ref_logps = []
    for start in range(0, len(examples), 1000):
        batch = pair_batch(examples[start : start + 1000], reference.device)
        logprobs = in_micro_batches(token_logprobs, reference, batch, args.micro_batch_tokens)
        ref_logps += logprobs.sum(1).view(-1, 2).tolist()
    return [example | {"ref_logps": logps} for example, logps in zip(examples, ref_logps)]


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
def evaluate_preferences(policy, reference, gold, examples, run, step):  # noqa: PLR0917
    """Held-out pairs, and completions of the first 500 prompts with their KL; returns metrics.

    The standard error of the accuracy is binomial, the KL in nats per completion."""
    max_tokens = run.args.micro_batch_tokens
    sums = Counter()
    for start in range(0, len(examples), 1000):
        batch = pair_batch(examples[start : start + 1000], policy.device)
        logprobs = in_micro_batches(token_logprobs, policy, batch, max_tokens)
        _, logged = pair_losses(logprobs, batch, run.args)
        sums.update({name: values.sum().item() for name, values in logged.items()})
    pairs = {f"eval/{name}": total / len(examples) for name, total in sums.items()}
    accuracy = pairs["eval/accuracy"]
    pairs["eval/accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / len(examples))

    longest = max(len(x[name]) for x in examples for name in ("chosen_ids", "rejected_ids"))
    prompts = examples[:500]
    rollouts, samples = complete_prompts(policy, gold, prompts, longest, run=run, step=step)
    batch = completion_batch(rollouts, policy.device)
    logprobs = in_micro_batches(token_logprobs, policy, batch, max_tokens)
    ref_logprobs = in_micro_batches(token_logprobs, reference, batch, max_tokens)
    samples["eval/kl"] = (logprobs - ref_logprobs).sum(1).mean()
    # the most important metrics come first, because only eight are printed
    metrics = {name: pairs[name] for name in ("eval/loss", "eval/accuracy", "eval/margin")}
    return metrics | samples | pairs


def main(args):
    device = setup(args)
    if args.label_smoothing and not args.loss_type.startswith("sigmoid"):
        fail(f"--label-smoothing is for sigmoid and sigmoid-norm, not {args.loss_type}")
    if args.simpo_margin is not None and args.loss_type != "simpo":
        fail(f"--simpo-margin is for --loss-type simpo, not {args.loss_type}")
    if args.beta is not None and args.beta <= 0:
        fail(f"--beta {args.beta} must be above 0")
    if not 0 <= args.label_smoothing <= 0.5:
        fail(f"--label-smoothing {args.label_smoothing} must be from 0 to 0.5")

    # data first: a bad file fails before models are loaded
    tokenizer = load_tokenizer(args.model)
    examples = load_examples(args.dataset, "pairs", preference_example, tokenizer, args)
    held_out = load_held_out(examples, "pairs", preference_example, tokenizer, args)
    pairs = examples + held_out
    sequences = [x["prompt_ids"] + x["chosen_ids"] for x in pairs]
    sequences += [x["prompt_ids"] + x["rejected_ids"] for x in pairs]
    check_fit(args.model, sequences)
    gold = load_gold(args, args.eval_dataset or args.dataset, tokenizer)
    num_margins = sum(example["margin"] != 0 for example in examples)
    if num_margins:
        verb = "ignores" if args.loss_type in ("ipo", "orpo") else "subtracts"
        print(f"--loss-type {args.loss_type} {verb} the `margin` of {num_margins} rows")

    # models; the reference log-probs of the pairs never change
    reference = None
    if args.loss_type not in REFERENCE_FREE or held_out:
        reference = load_policy(args.model, tokenizer, args, device)
    if args.loss_type not in REFERENCE_FREE:
        examples = add_reference(reference, examples, args)
        held_out = add_reference(reference, held_out, args)
    if not held_out:
        reference = None  # frees its memory: only evaluation needs it now
    policy = load_policy(args.model, tokenizer, args, device, trainable=True)
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
        run.log(0, evaluate_preferences(policy, reference, gold, held_out, run=run, step=0))
    for step in range(start, steps):
        # batch: the next pairs of the shuffled data
        start_time = time.time()
        first = step * args.batch_size
        stop = min(first + args.batch_size, num_rows)
        batch = pair_batch(shuffled_examples(examples, args.seed, first, stop), device)

        # update: the weights of a pair carry the normalizer of the whole batch
        optimizer.param_groups[0]["lr"] = scheduled_learning_rate(step, steps, args)
        sums = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            logprobs = token_logprobs(policy, mb)
            losses, logged = pair_losses(logprobs, mb, args)
            weights, _ = split_pairs(mb["weights"])
            loss = (weights * losses).sum()
            loss.backward()
            sums.update({name: (weights * x.detach()).sum() for name, x in logged.items()})
            sums.update(padded_tokens=mb["inputs"].numel())
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        padded_tokens = sums.pop("padded_tokens")
        metrics = {name: all_reduce(total) for name, total in sums.items()}
        metrics["accuracy"] = metrics["accuracy"].clamp(max=1)  # a float32 sum may exceed 1
        metrics |= {"grad_norm": grad_norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= throughput(batch, padded_tokens, start_time)
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= evaluate_preferences(
                policy,
                reference,
                gold,
                held_out,
                run=run,
                step=step + 1,
            )
        run.log(step + 1, metrics, show=["loss", "accuracy", "margin", "chosen_reward"])
        run.checkpoint_if_due(step + 1)
    run.finish(policy)
    return metrics


if __name__ == "__main__":
    laptop = dict(
        model="runs/sft",
        steps=600,
        batch_size=32,
        learning_rate=1e-4,
        warmup_steps=20,
        overwrite=True,
    )
    main(cli(Args, laptop=laptop))
