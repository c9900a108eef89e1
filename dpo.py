"""Direct preference optimisation (DPO): learn from pairs of answers which people prefer, in one stage.

    loss = - log sigmoid(beta log pi/pi_ref(chosen) - beta log pi/pi_ref(rejected)), mean over pairs

Rafailov et al. 2023, equation 7. The optimum of RLHF, pi_ref exp(reward / beta) / Z, solved for the reward,
goes into the Bradley-Terry likelihood: no reward model, no sampling. Log-probs are sums over the
completion, EOS included. Its relatives are --loss-type, a line or three each in preference_loss. Left out:
making the pairs, a learnt or scheduled beta, LoRA.

    python dpo.py                     laptop run, after `python sft.py`: three quarters of a minute, two cores
    python dpo.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset held_out_pairs.jsonl

Data: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike; `margin` optional.
Expect `accuracy` and `margin` to rise from 0.5 and 0, the loss to fall from log 2."""

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from common import Run, as_forward, check_context, cli, clip_gradients, completion_batch, context_of, due
from common import eos_ids, evaluate_samples, find_gold, head_logits, head_rows, hidden_states, judge
from common import load_examples, load_held_out, load_policy, load_tokenizer, make_optimizer, micro_batches
from common import on_first_rank, over_micro_batches, over_ranks, rank, set_learning_rate, setup, shuffled
from common import stop, stream_logprobs, whole_weights


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
    output_dir: str = "runs/dpo"
    """folder of the run: model, logs, samples, checkpoint"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    overwrite: bool = False
    """move a run that is in --output-dir to <output-dir>.old first"""
    seed: int = 1
    """of data order, sampling and new weights"""
    steps: int | None = None
    """optimiser steps at most; without it, --epochs decides"""
    learning_rate: float = 5e-7
    """peak, of AdamW (5e-7: Zephyr, Tulu 3)"""
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
    beta: float | None = None
    """of the loss; without it 0.1, for simpo 2 (Rafailov et al.; Hong et al.; Meng et al.; ipo: TRL)"""
    loss_type: Literal["sigmoid", "ipo", "simpo", "orpo"] = "sigmoid"
    """preference_loss has the formula and the paper of each; simpo and orpo train without reference"""
    label_smoothing: float = 0.0
    """sigmoid: probability that a label is wrong (cDPO, Mitchell 2023)"""
    simpo_margin: float | None = None
    """simpo: how far the chosen reward should lead; without it 1 (Meng et al. 2024)"""
    sft_coef: float = 0.0
    """weight of the chosen completion's NLL per token (Pang et al. 2024, iterative reasoning: 1)"""
    precompute_ref: bool = True
    """reference log-probs once, before training; else the reference model stays in memory"""


# log-probs are means over a completion's tokens for these, as their papers or, for ipo, its authors have it
LENGTH_AVERAGED = ("ipo", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
BETA = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}  # ipo's is TRL's, the others their papers'


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


def preference_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
    margin=0.0,
):
    """Losses of B pairs and their implicit rewards, beta * log pi / pi_ref; all (B,). Log-probs, in nats, are
    means over tokens for the loss types in LENGTH_AVERAGED, the reference's 0 for those in REFERENCE_FREE.

    With h = chosen reward - rejected reward - margin, s the label smoothing and odds = p / (1 - p):
    sigmoid: - (1-s) log sigmoid(h) - s log sigmoid(-h) (Rafailov et al. 2023, equation 7; s > 0: cDPO,
        Mitchell 2023; a margin: ODPO, Amini et al. 2024)
    ipo: (difference of log-ratios - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)
    simpo: - log sigmoid(h) (Meng et al. 2024, equation 6)
    orpo: - log pi(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)) (Hong et al. 2024,
        equations 6 and 7)
    ipo and orpo have no margin. One line away: hinge (SLiC, Zhao et al. 2023), relu(1 - h); robust DPO
    (Chowdhury et al. 2024), sigmoid's with + s for - s and divided by 1 - 2s; REBEL (Gao et al. 2024),
    (h - (score of chosen - score of rejected))^2."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    h = chosen_rewards - rejected_rewards - margin
    if loss_type == "ipo":
        losses = ((chosen_rewards - rejected_rewards) / beta - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        pair = chosen_logps, rejected_logps
        log_odds, rejected_log_odds = (x - torch.log(-torch.expm1(x.clamp(max=-1e-6))) for x in pair)
        losses = -chosen_logps - beta * F.logsigmoid(log_odds - rejected_log_odds)
    elif loss_type in ("sigmoid", "simpo"):
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    else:
        raise ValueError(f"unknown loss type {loss_type}")
    return losses, chosen_rewards, rejected_rewards


def pair_batch(examples, device):
    """B pairs as one batch of 2B sequences, chosen ones first: one forward scores both."""
    prompts = [e["prompt_ids"] for e in examples]
    completions = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
    return completion_batch(prompts + prompts, completions, device)


def pair_length(example):
    """Tokens of the longer of the two sequences."""
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


@torch.no_grad()
def pair_logps(model, examples, args, autocast):
    """log pi of the chosen and of the rejected completions of N pairs, summed over tokens -> (N, 2), nats."""
    logps = torch.zeros(len(examples), 2)
    for rows in micro_batches([pair_length(e) for e in examples], args.micro_batch_tokens // 2):
        mb = pair_batch([examples[i] for i in rows], model.device)
        with autocast():
            logprobs, _ = token_logprobs(model, mb.input_ids, mb.attention_mask, mb.completion_mask[:, 1:])
        logps[rows] = torch.stack(logprobs.sum(1).chunk(2), 1).cpu()
    return over_ranks(logps)


def reference_logps(model, examples, args, autocast, file):
    """pair_logps of the reference, from `file` if it was written for this model, data and dtype."""
    weights = whole_weights(model).values()

    def find_cached():
        digest = hashlib.blake2b(f"{model.config.to_json_string()} {args.dtype} {model.device.type}".encode())
        for weight in weights:
            digest.update(weight.cpu().numpy().tobytes())
        for e in examples:  # tokens, after --max-length has dropped what it drops
            digest.update(str((e["prompt_ids"], e["chosen_ids"], e["rejected_ids"])).encode())
        cached = torch.load(file, weights_only=True) if file.exists() else {"key": None}
        return digest.hexdigest(), cached["logps"] if cached["key"] == digest.hexdigest() else None

    key, logps = on_first_rank(find_cached)
    if logps is not None:
        print(f"reference log-probs: read from {file}")
        return logps
    logps = pair_logps(model, examples, args, autocast)
    if rank() == 0:
        torch.save({"key": key, "logps": logps}, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
    return logps


def pair_losses(logps, ref_logps, examples, args):
    """Log-probs of N pairs, summed over tokens, each (N, 2): chosen, rejected -> losses (N,) and what is
    logged, a dict of (N,)."""
    lengths = [[len(e["chosen_ids"]), len(e["rejected_ids"])] for e in examples]
    lengths = torch.tensor(lengths).to(logps).view(-1, 2)
    margins = torch.tensor([e["margin"] for e in examples]).to(logps)
    if args.loss_type == "simpo":
        margins = margins + (1.0 if args.simpo_margin is None else args.simpo_margin)
    beta = BETA[args.loss_type] if args.beta is None else args.beta
    scale = lengths if args.loss_type in LENGTH_AVERAGED else torch.ones_like(lengths)
    inputs = *(logps / scale).unbind(1), *(ref_logps / scale).unbind(1)
    losses, chosen, rejected = preference_loss(*inputs, beta, args.loss_type, args.label_smoothing, margins)
    losses = losses - args.sft_coef * logps[:, 0] / lengths[:, 0]
    accuracy = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()  # a tie counts half
    # the chosen reward often falls with the rejected one: the loss sees only their difference, and the two
    # share most of their tokens. It is no harm while the margin grows and samples stay good; it is when
    # eval/kl runs away or samples get worse: the mass has gone to answers in neither (Razin et al. 2024)
    logged = {"loss": losses, "accuracy": accuracy, "margin": chosen - rejected}
    logged |= {"chosen_reward": chosen, "rejected_reward": rejected}
    if args.loss_type not in REFERENCE_FREE:
        ratios = logps - ref_logps
        logged |= {"chosen_logratio": ratios[:, 0], "rejected_logratio": ratios[:, 1]}
    return losses, {name: values.detach() for name, values in logged.items()}


@torch.no_grad()
def evaluate_preferences(policy, kl_from, tokenizer, examples, ref_logps, gold, stop_ids, args, autocast):
    """Of held-out pairs what training logs, with the accuracy's binomial standard error; of greedy and
    sampled answers to their prompts how many stop and are right; the sampled ones' KL from the reference, in
    nats."""
    logps = pair_logps(policy, examples, args, autocast)
    _, logged = pair_losses(logps, ref_logps, examples, args)
    metrics = {f"eval/{name}": values.mean().item() for name, values in logged.items()}
    accuracy = metrics["eval/accuracy"]
    metrics["eval/accuracy_stderr"] = (accuracy * (1 - accuracy) / len(examples)) ** 0.5
    examples = examples[:500]
    longest = max(pair_length(e) - len(e["prompt_ids"]) for e in examples)
    limit = min(longest, context_of(policy.config) - max(len(e["prompt_ids"]) for e in examples))

    def logprobs_of(model, batch):
        inputs = batch, args.micro_batch_tokens, autocast
        return over_micro_batches(lambda *x: token_logprobs(model, *x), *inputs)

    inputs = policy, examples, tokenizer, stop_ids, args.seed, autocast, (1, limit, 1.0), dict(gold=gold)
    more, rows = evaluate_samples(*inputs, (logprobs_of, kl_from))
    return metrics | more, rows


def main(args):
    device, autocast = setup(args)
    if args.label_smoothing and args.loss_type != "sigmoid":
        stop(f"--label-smoothing is for --loss-type sigmoid, not {args.loss_type}")
    if args.simpo_margin is not None and args.loss_type != "simpo":
        stop(f"--simpo-margin is for --loss-type simpo, not {args.loss_type}")
    if args.beta == 0 or args.label_smoothing > 0.5:
        stop(f"--beta is {args.beta}, --label-smoothing {args.label_smoothing}: above 0, at most 0.5 wanted")

    # load: data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model)
    stop_ids = eos_ids(tokenizer, args.model)
    examples = load_examples(tokenizer, args.dataset, "preference", args)
    held_out = load_held_out(tokenizer, "preference", args)
    gold = judge(find_gold(examples + held_out), tokenizer, stop_ids)
    policy = load_policy(args.model, device, train=args)
    check_context(policy, max(map(pair_length, examples + held_out)), "--max-length")
    optimizer = make_optimizer([policy], args)
    steps = -(-args.epochs * len(examples) // args.batch_size)
    steps = min(steps, args.steps or steps)
    run = Run(args, steps)
    reference, rows = None, (examples if args.precompute_ref else []) + held_out
    ref_logps = torch.zeros(len(rows), 2)  # of a loss without a reference
    if args.loss_type not in REFERENCE_FREE:
        reference = load_policy(args.model, device)
        with run.writing():
            ref_logps = reference_logps(reference, rows, args, autocast, run.dir / "reference.pt")
    if args.precompute_ref:
        reference, examples = None, [e | {"ref_logps": x} for e, x in zip(examples, ref_logps.tolist())]
    start, metrics = run.restore({"policy": policy}, optimizer), {}

    def evaluate(step):
        inputs = tokenizer, held_out, ref_logps[-len(held_out) :], gold, stop_ids, args, autocast
        models = policy, lambda: reference or load_policy(args.model, device)
        metrics, rows = evaluate_preferences(*models, *inputs)
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
        sums, tokens, padded_tokens = Counter(), 0, 0
        for rows in micro_batches([pair_length(e) for e in picked], args.micro_batch_tokens // 2):
            mb_examples = [picked[i] for i in rows]
            mb = pair_batch(mb_examples, device)
            mb_inputs = mb.input_ids, mb.attention_mask, mb.completion_mask[:, 1:]
            if reference is not None:  # before the policy's activations exist
                with torch.no_grad(), autocast():
                    mb_ref_logps, _ = token_logprobs(reference, *mb_inputs)
                mb_ref_logps = torch.stack(mb_ref_logps.sum(1).chunk(2), 1)  # (b, 2)
            else:
                mb_ref_logps = [e.get("ref_logps", (0.0, 0.0)) for e in mb_examples]
                mb_ref_logps = torch.tensor(mb_ref_logps, device=device).view(-1, 2)
            with autocast():
                logprobs, _ = token_logprobs(policy, *mb_inputs)
            mb_logps = torch.stack(logprobs.sum(1).chunk(2), 1)  # (b, 2)
            losses, logged = pair_losses(mb_logps, mb_ref_logps, mb_examples, args)
            (losses.sum() / len(picked)).backward()
            sums.update({name: values.sum() / len(picked) for name, values in logged.items()})
            tokens, padded_tokens = tokens + sum(mb.lengths), padded_tokens + mb.input_ids.numel()
        sums = {name: over_ranks(total) for name, total in sums.items()}
        tokens, padded_tokens = over_ranks(tokens, padded_tokens)
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        run.stop_unless_finite(step + 1, picked, loss=sums["loss"], grad_norm=grad_norm)
        learning_rate = set_learning_rate(optimizer, args, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log, eval, save
        metrics = sums | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics["padding"] = 1 - tokens / padded_tokens
        metrics["seconds/train"] = time.time() - began
        metrics["tokens_per_second"] = tokens / metrics["seconds/train"]
        if held_out and due(args.eval_every, step + 1, steps):
            metrics |= evaluate(step + 1)
        run.log(step + 1, metrics, show=["loss", "accuracy", "margin", "chosen_reward", "rejected_reward"])
        run.checkpoint_if_due(step + 1, {"policy": policy}, optimizer)
    run.finish(policy, tokenizer, stop_ids, f"look at {args.output_dir}/samples.jsonl")
    return metrics


if __name__ == "__main__":
    laptop = dict(model="runs/sft", steps=600, batch_size=32, learning_rate=1e-4, warmup_steps=20)
    main(cli(Args, laptop=laptop | dict(overwrite=True)))
