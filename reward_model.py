"""Reward model (RM): learn from what is known of answers, as one number for any answer.

    bradley-terry   - log sigmoid(r(chosen) - r(rejected) - margin), mean over a prompt's pairs
    plackett-luce   - log P(ranking): each answer against all that are ranked below it
    outcome         cross-entropy of sigmoid(r) against right or wrong
    process         the same at the end of each step of an answer

The second stage of RLHF (Ouyang et al. 2022, equation 1; Stiennon et al. 2020), by default from
pairs; --loss chooses the others: rankings of K answers (Plackett 1975; Zhu et al. 2023), outcome
and process reward models (Cobbe et al. 2021; Lightman et al. 2023). All take one form of example, a
prompt with K completions and a label wherever a score is read, and all completions of a prompt
stand in one batch: as separate pairs in many batches they are learnt by heart (Ouyang et al.,
section 3.5). The score is a scalar head on the hidden state of the last real token, EOS. Left out:
shifting the scores to mean 0 after training (Stiennon et al. do): a constant of one model changes
no advantage once PPO's values have learnt it. `eval/score_mean` is logged. An ensemble is several
runs with other seeds, and `--reward a,b,c` in the scripts that use them; pairs and rankings leave a
constant open, so train its members with --center-coef 0.01 (Eisenstein et al. 2023).

    python reward_model.py            after sft.py: three quarters of a minute, two cores
    python reward_model.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset more.jsonl
    python reward_model.py --model runs/my_sft --loss outcome --dataset rollouts.jsonl

Data: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike, `margin`
optional; or prompt, completions and scores, two lists, as rejection_sampling.py writes them (with
an exact checker for --loss outcome, which needs scores of 0 and 1); or for --loss process prompt,
completions and labels: the steps of one answer, and whether each is right. One epoch: a second
learns the pairs by heart. Expect 60 to 75% held-out accuracy on human preferences, more in the
laptop run."""

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
    step_ends,
    stream,
    text_or_messages,
)

LABEL_LOSSES = ["outcome", "process"]  # the others compare the completions of a prompt


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
    """prompts (pairs) per optimiser step, each with all its completions"""
    epochs: int = 1
    """passes over the data"""
    max_length: int = 1024
    """tokens of prompt and completion; longer rows are dropped and counted"""
    loss: Literal["bradley-terry", "plackett-luce", "outcome", "process"] = "bradley-terry"
    """from pairs; from rankings; from right or wrong, of answers or of their steps"""
    center_coef: float = 0.0
    """of pairs and rankings: weight of (score of chosen + score of rejected)^2, which keeps scores
    near 0 (Eisenstein et al. 2023: 0.01)"""
    outcome_tokens: Literal["last", "all"] = "last"
    """where outcome reads the score: at EOS, or at every completion token (Cobbe et al. 2021)"""
    step_separator: str = "\n"
    """what stands between the steps of an answer; process saves it with the model"""


def preference_example(row, tokenizer, end_id, args):
    """Prompt, chosen, rejected, or chosen and rejected that begin alike; `margin` is optional."""
    chosen = text_or_messages(row, ["chosen"])
    rejected = text_or_messages(row, ["rejected"])
    # UltraFeedback: `prompt` is a text that both conversations repeat as their first message
    repeats_prompt = isinstance(chosen, list) and isinstance(row.get("prompt"), str)
    has_prompt = row.keys() & PROMPT_COLUMNS and not repeats_prompt
    if args.prompt_template != "{prompt}" or has_prompt:
        prompt = prompt_of(row, args)
    else:
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    margin = row.get("margin") or 0.0
    if not (isinstance(margin, numbers.Real) and abs(margin) < 1e9):  # nor NaN
        raise BadRow(f"`margin` must be a number, found {margin!r:.60}")
    prompt_ids, (chosen_ids, rejected_ids) = encode_completions(
        tokenizer,
        prompt,
        [chosen, rejected],
        end_id,
    )
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
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
        raise BadRow(
            "`chosen` and `rejected` do not begin alike, with a prompt (beside a text as `prompt` "
            "they are texts, or conversations that begin with it)"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def comparison_example(row, tokenizer, end_id, args):
    """A prompt with K completions and a score of each: of prompt, chosen and rejected (1 and 0), or
    of prompt, completions and scores. rollouts.jsonl has the prompt's own row inside its rows. From
    here on a score of the data is a label, and a score is the model's."""
    if args.loss == "process":
        return step_example(row, tokenizer, end_id, args)
    margin = 0.0
    if "completions" in row:
        if row.get("margin"):
            raise BadRow("`margin` is for pairs, chosen and rejected, alone")
        if isinstance(row.get("row"), dict):
            row = row["row"] | row
        prompt = prompt_of(row, args)
        completions, scores, finished = scored_completions(row, args)
        prompt_ids, completion_ids = encode_completions(tokenizer, prompt, completions, end_id)
        for ids, is_finished in zip(completion_ids, finished):
            if not is_finished and ids[-1] == end_id and len(ids) > 1:
                ids.pop()  # it was cut while it was sampled, and has no EOS
    else:
        pair = preference_example(row, tokenizer, end_id, args)
        prompt = pair["prompt"]
        prompt_ids = pair["prompt_ids"]
        completion_ids = [pair["chosen_ids"], pair["rejected_ids"]]
        scores = [1.0, 0.0]
        margin = pair["margin"]
        if margin and args.loss != "bradley-terry":
            raise BadRow("`margin` is for --loss bradley-terry alone")
    if len(prompt_ids) + max(map(len, completion_ids)) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    ends = [[len(ids) - 1] for ids in completion_ids]
    if args.loss == "outcome" and args.outcome_tokens == "all":
        ends = [list(range(len(ids))) for ids in completion_ids]
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,  # K lists
        "ends": ends,  # K lists: the tokens of a completion at which its score is read
        "labels": [[score] * len(tokens) for score, tokens in zip(scores, ends)],  # K lists
        "margin": margin,
    }


def scored_completions(row, args):
    """Columns completions, scores and perhaps finished -> three lists, of those with a score."""
    if "labels" in row and "scores" not in row:
        raise BadRow("`labels`, of the steps of an answer, are for --loss process")
    completions, scores = equal_lists(row, "completions", "scores")
    completions = [text_or_messages({"completions": x}, ["completions"]) for x in completions]
    finished = [True] * len(scores)
    if "finished" in row:
        _, finished = equal_lists(row, "completions", "finished")
    for score in scores:
        if score is not None and not (isinstance(score, numbers.Real) and abs(score) < 1e9):
            raise BadRow(f"`scores` must be numbers or null, found {score!r:.60}")
        if args.loss == "outcome" and score not in (0, 1, None):
            raise BadRow(f"--loss outcome needs `scores` of 0 and 1, found {score!r:.60}")
    if len(scores) < 2 and args.loss != "outcome":
        raise BadRow(f"`completions` is one, and --loss {args.loss} compares two or more")
    known = [i for i, score in enumerate(scores) if score is not None]
    if args.loss == "outcome" and not known:
        raise DroppedRow("without a score")
    if args.loss != "outcome" and len({scores[i] for i in known}) < 2:
        raise DroppedRow("whose scores are all equal")
    return (
        [completions[i] for i in known],
        [float(scores[i]) for i in known],
        [finished[i] for i in known],
    )


def step_example(row, tokenizer, end_id, args):
    """A prompt with one completion and a label at the end of each of its steps: of prompt,
    completions (the steps) and labels (is it right?)."""
    steps, labels = equal_lists(row, "completions", "labels")
    if not all(isinstance(step, str) for step in steps):
        raise BadRow("`completions` are the steps of an answer, and must be texts")
    if not all(label in (0, 1) for label in labels):
        raise BadRow(f"`labels` must be true or false, 1 or 0, found {labels!r:.60}")
    prompt = prompt_of(row, args)
    prompt_ids, completion_ids = encode_completions(
        tokenizer,
        prompt,
        [args.step_separator.join(steps)],
        end_id,
    )
    ends = step_ends(tokenizer, completion_ids[0], args.step_separator)
    if len(ends) != len(labels):
        raise DroppedRow("whose steps contain --step-separator, or do not end at it in tokens")
    if len(prompt_ids) + len(completion_ids[0]) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "ends": [ends],
        "labels": [[float(label) for label in labels]],
        "margin": 0.0,
    }


def equal_lists(row, column, other):
    """Two columns that must be lists of equal length."""
    for name in (column, other):
        if not isinstance(row.get(name), list):
            raise BadRow(f"`{name}` must be a list, found {row.get(name)!r:.60}")
    if len(row[column]) != len(row[other]) or not row[column]:
        raise BadRow(f"`{column}` has {len(row[column])} entries and `{other}` {len(row[other])}")
    return row[column], row[other]


@as_forward
def token_scores(model, batch):
    """The scalar head where the mask is 1.

    batch: inputs, here whole sequences, attention_mask and mask, (B, T), right-padded -> (B, T)
    float32, 0 outside the mask. The head's product is in float32 under autocast too: in bfloat16
    scores near 4 would be 0.03 apart at least, and close pairs ties."""
    mask = batch["mask"].bool()
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state[mask]  # (N, H)
    scores = (hidden.float() * model.score.weight[0]).sum(-1)
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores)


def at_last_token(x, batch):
    """x (B, T) at the last real token, found by length: neither padding nor a PAD inside the text
    moves it -> (B,)."""
    last = batch["attention_mask"].sum(1) - 1
    return x[torch.arange(len(x), device=x.device), last]


def sequence_scores(model, batch):
    """The score of each whole sequence: inputs and attention_mask (B, T) -> (B,) float32, for those
    who import it."""
    scores = token_scores(model, batch | {"mask": batch["attention_mask"]})
    return at_last_token(scores, batch)


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


def better_pairs(labels, group):
    """All pairs of a prompt whose labels differ: labels, group (the prompt's number), each (B,) ->
    rows of the better ones, rows of the worse ones."""
    is_better = (group[:, None] == group) & (labels[:, None] > labels)
    return is_better.nonzero(as_tuple=True)


def plackett_luce_loss(scores, labels, group):
    """Each completion against all of its prompt that are ranked below it: logsumexp of their scores
    and its own, less its own. scores, labels, group (B,) -> (B,); a prompt's sum is - log P(its
    ranking) (Plackett 1975; Zhu et al. 2023, K-wise).

    Equal labels share a rank: none of them stands among those that another had to beat."""
    is_below = (group[:, None] == group) & (labels[:, None] > labels)
    is_own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    candidates = scores.expand(len(scores), -1).masked_fill(~(is_below | is_own), -torch.inf)
    return candidates.logsumexp(1) - scores


def binary_cross_entropy(scores, labels):
    """- log P(label), with sigmoid(score) the probability of "right", label 1: any shape (Cobbe et
    al. 2021; Lightman et al. 2023)."""
    return -(labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores))


def score_batch(examples, device, whole=None):
    """Prompts with all their completions -> a batch of whole sequences, "group" their prompt's
    number. mask is 1 where a score is read, labels what is known there, each (B, T).

    Weights carry the normalisers of `whole`, the optimisation batch if `examples` are a part of it:
    weights (B, T) of a mean over labels; pair_weights (B,), of a pair of that prompt, and
    prompt_weights (B,) of a mean over prompts, so that one with many completions counts once."""
    whole = whole or examples
    num_labels = sum(len(labels) for example in whole for labels in example["labels"])
    num_compared = sum(count_pairs(example) > 0 for example in whole)
    sequences = []
    masks = []
    labels = []
    groups = []
    margins = []
    pair_weights = []
    for group, example in enumerate(examples):
        num_pairs = count_pairs(example)
        for i, completion_ids in enumerate(example["completion_ids"]):
            sequence = example["prompt_ids"] + completion_ids
            mask = [0] * len(sequence)
            row_labels = [0.0] * len(sequence)
            for t, label in zip(example["ends"][i], example["labels"][i]):
                mask[len(example["prompt_ids"]) + t] = 1
                row_labels[len(example["prompt_ids"]) + t] = label
            sequences.append(sequence)
            masks.append(mask)
            labels.append(row_labels)
            groups.append(group)
            margins.append(example["margin"])
            pair_weights.append(1 / (num_pairs * num_compared) if num_pairs else 0.0)
    mask = pad_rows(masks, device)
    return {
        "inputs": pad_rows(sequences, device),
        "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], device),
        "mask": mask,
        "labels": pad_rows(labels, device),
        "weights": mask / num_labels,
        "group": torch.tensor(groups, device=device),
        "margins": torch.tensor(margins, device=device),
        "pair_weights": torch.tensor(pair_weights, device=device),
        "prompt_weights": torch.full((len(sequences),), 1 / len(whole), device=device),
    }


def count_pairs(example):
    """Pairs of completions whose last labels differ."""
    labels = [completion_labels[-1] for completion_labels in example["labels"]]
    ties = sum(math.comb(number, 2) for number in Counter(labels).values())
    return math.comb(len(labels), 2) - ties


def weighted_loss(scores, batch, loss_type, center_coef=0.0):
    """scores (B, T) of a batch or of a part of it -> loss, scalar: a sum whose weights carry the
    normaliser."""
    if loss_type in LABEL_LOSSES:
        return (batch["weights"] * binary_cross_entropy(scores, batch["labels"])).sum()
    scores = at_last_token(scores, batch)
    labels = at_last_token(batch["labels"], batch)
    better, worse = better_pairs(labels, batch["group"])
    centring = center_coef * (scores[better] + scores[worse]) ** 2
    pair_weights = batch["pair_weights"][better]
    if loss_type == "plackett-luce":
        losses = plackett_luce_loss(scores, labels, batch["group"])
        return (batch["prompt_weights"] * losses).sum() + (pair_weights * centring).sum()
    losses = bradley_terry_loss(scores[better], scores[worse], batch["margins"][better])
    return (pair_weights * (losses + centring)).sum()


def pair_metrics(scores, batch):
    """scores (B, T) -> weighted sums over pairs of completions."""
    scores = at_last_token(scores, batch)
    better, worse = better_pairs(at_last_token(batch["labels"], batch), batch["group"])
    weights = batch["pair_weights"][better]
    return {
        "accuracy": (weights * pair_accuracy(scores[better], scores[worse])).sum(),
        "margin": (weights * (scores[better] - scores[worse])).sum(),
    }


def label_metrics(scores, batch):
    """scores (B, T) -> weighted sums over labels: how many are on the right side of 1/2, and the
    Brier score, the squared error of the probability, in which calibration shows."""
    probabilities = scores.sigmoid()
    is_right = (probabilities > 0.5) == (batch["labels"] > 0.5)
    return {
        "label_accuracy": (batch["weights"] * is_right).sum(),
        "brier": (batch["weights"] * (probabilities - batch["labels"]) ** 2).sum(),
    }


def choose_pad(model, tokenizer, eos_ids):
    """Give a reward model a PAD that is no EOS: transformers scores at the last id but PAD."""
    if tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def scheduled_learning_rate(step, steps, args):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last. A function
    of the step alone, so that --resume has no state to restore."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    return args.learning_rate * decay[args.lr_schedule] * warmup


@torch.no_grad()
def evaluate_scores(model, examples, *, tokenizer, args, autocast):
    """Held-out loss; accuracy over pairs of unequal labels (a tie of scores counts half), its
    binomial standard error as if a prompt were one trial, and margin; for outcome and process
    accuracy and Brier score of labels; the scores' spread -> metrics, and a row for each of the
    first 1,000 completions with its scores."""
    # (pairs are looked for in a table of all completions with all)
    at_a_time = max(1, 1000 // max(len(example["labels"]) for example in examples))
    num_compared = sum(count_pairs(example) > 0 for example in examples)
    totals = Counter()
    score_parts = []
    for start in range(0, len(examples), at_a_time):
        batch = score_batch(examples[start : start + at_a_time], model.device, whole=examples)
        with autocast():
            batch_scores = in_micro_batches(
                lambda mb: token_scores(model, mb),
                batch,
                args.micro_batch_tokens,
            )
        totals["loss"] += weighted_loss(batch_scores, batch, args.loss)
        if num_compared:
            totals.update(pair_metrics(batch_scores, batch))
        if args.loss in LABEL_LOSSES:
            totals.update(label_metrics(batch_scores, batch))
        score_parts.append(batch_scores[batch["mask"] > 0])
    scores = torch.cat(score_parts)
    metrics = {f"eval/{name}": total for name, total in totals.items()}
    metrics["eval/score_mean"] = scores.mean()
    metrics["eval/score_std"] = scores.std(correction=0)

    rows = []
    top1_accuracies = []
    remaining = iter(scores.tolist())
    for example in examples:
        last_scores = []
        last_labels = []
        for completion_ids, labels in zip(example["completion_ids"], example["labels"]):
            completion_scores = [next(remaining) for _ in labels]
            last_scores.append(completion_scores[-1])
            last_labels.append(labels[-1])
            if len(rows) < 1000:
                rows.append(
                    {
                        "prompt": example["prompt"],
                        "completion": completion_text(
                            tokenizer,
                            example["prompt_ids"],
                            completion_ids,
                        ),
                        "labels": labels,
                        "scores": completion_scores,
                    }
                )
        if count_pairs(example):
            best = max(last_scores)
            tied = [label for score, label in zip(last_scores, last_labels) if score == best]
            top1_accuracies.append(sum(label == max(last_labels) for label in tied) / len(tied))
    if num_compared:
        accuracy = totals["accuracy"].item()
        num_all = sum(math.comb(len(example["labels"]), 2) for example in examples)
        num_unequal = sum(count_pairs(example) for example in examples)
        metrics["eval/accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / num_compared)
        metrics["eval/top1_accuracy"] = sum(top1_accuracies) / num_compared
        metrics["eval/tied_pairs"] = 1 - num_unequal / num_all
    return metrics, rows


def main(args):
    device, autocast = setup(args)
    if args.outcome_tokens == "all" and args.loss != "outcome":
        fail(f"--outcome-tokens all is for --loss outcome, not {args.loss}")

    # load the data first, so that a bad file costs no time
    tokenizer = load_tokenizer(args.model, template_kwargs=args.chat_template_kwargs)
    eos_ids = find_eos_ids(tokenizer, args.model)
    args.step_separator = args.step_separator.replace("\\n", "\n")  # as a shell's '...' gives it
    examples = load_examples(args.dataset, comparison_example, tokenizer, args)
    held_out = load_held_out(comparison_example, tokenizer, args)
    sequences = [
        {"ids": example["prompt_ids"] + ids}
        for example in examples + held_out
        for ids in example["completion_ids"]
    ]
    longest = max(len(sequence["ids"]) for sequence in sequences)
    check_fit(
        args.model,
        "--model",
        examples=sequences,
        tokens=longest,
        lengths="--max-length",
    )

    def init(model, has_new_head):
        """A head of variance 1 / (H + 1) (Stiennon et al. 2020), a PAD that is no EOS, and what
        those who score by the steps of an answer must know."""
        if has_new_head:
            std = 1 / math.sqrt(model.score.in_features + 1)
            nn.init.normal_(model.score.weight, std=std, generator=generator(args.seed, "head"))
        choose_pad(model, tokenizer, eos_ids)
        model.config.step_separator = args.step_separator if args.loss == "process" else None

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
    if args.steps is not None:
        if args.steps > steps:
            print(f"--steps {args.steps}: the run ends after {steps}, which are all --epochs")
        steps = min(steps, args.steps)
    run = Run(args, models, optimizer, steps, examples)

    def held_out_metrics(step):
        metrics, rows = evaluate_scores(
            model,
            held_out,
            tokenizer=tokenizer,
            args=args,
            autocast=autocast,
        )
        run.log_samples(step, rows)
        return metrics

    metrics_of = label_metrics if args.loss in LABEL_LOSSES else pair_metrics
    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, held_out_metrics(0))
    for step in range(start, steps):
        # take the next prompts, in an order of its own for every epoch
        began = time.time()
        first_row = step * args.batch_size
        stop_row = min(first_row + args.batch_size, args.epochs * len(examples))
        batch = score_batch(stream(examples, args.seed, first_row, stop_row), device)
        if args.loss in LABEL_LOSSES:  # each row stands alone
            del batch["group"]

        # update: one normaliser for the whole batch, however it is cut into micro-batches
        totals = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            with autocast():
                mb_scores = token_scores(model, mb)
            loss = weighted_loss(mb_scores, mb, args.loss, args.center_coef)
            loss.backward()
            totals["loss"] += loss.detach()
            totals.update(metrics_of(mb_scores.detach(), mb))
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
        totals = {name: all_reduce(total) for name, total in totals.items()}
        metrics = {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "padding": 1 - batch_tokens / totals.pop("padded_tokens"),
            "tokens_per_second": batch_tokens / seconds,
            "seconds/train": seconds,
        }
        metrics = totals | metrics
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= held_out_metrics(step + 1)
        run.log(
            step + 1,
            metrics,
            show=["loss", "accuracy", "label_accuracy", "margin", "grad_norm"],
        )
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
