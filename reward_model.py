"""Reward model (RM): learn a score of completions from preferences, rankings or labels.

    bradley-terry   -log sigmoid(r(chosen) - r(rejected) - margin), mean over the pairs of a prompt
    plackett-luce   -log P(ranking): each completion against all that are ranked below it
    outcome         cross-entropy of sigmoid(r) with right or wrong
    process         the same at the end of each step of a completion

The second stage of RLHF (Ouyang et al. 2022, equation 1; Stiennon et al. 2020). --loss also offers
rankings of K completions (Plackett 1975; Zhu et al. 2023), and outcome and process reward models
(Cobbe et al. 2021; Lightman et al. 2023). Every example is a prompt with K completions and a label
wherever a score is read. All completions of a prompt are in one batch: as separate pairs in several
batches they overfit (Ouyang et al., section 3.5). The score is a scalar head at the last real
token, EOS. Not included: shifting the scores to mean 0 after training (Stiennon et al.); a constant
changes no advantage once PPO's values have learned it. An ensemble is several runs with different
seeds, used as `--reward a,b,c`; pairs and rankings leave a constant undetermined, so train its
members with --center-coef 0.01 (Eisenstein et al. 2023).

    python reward_model.py            demo, after sft.py: 45 seconds on two cores
    python reward_model.py --model runs/my_sft --dataset pairs.jsonl --eval-dataset more.jsonl
    python reward_model.py --model runs/my_sft --loss outcome --dataset rollouts.jsonl

Data: rows with prompt, chosen and rejected, or with chosen and rejected that share a beginning;
`margin` is optional. Or prompt, completions and scores, two lists, as in rollouts.jsonl of
rejection_sampling.py (--loss outcome needs scores of 0 and 1). Or for --loss process prompt,
completions and labels: the steps of one completion, and whether each is right. One epoch: with a
second, the model overfits. Expect 60 to 75% held-out accuracy on human preferences, more in the
demo."""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from common import (
    PROMPT_COLUMNS,
    DroppedRow,
    Run,
    all_reduce,
    check_fit,
    cli,
    clip_gradients,
    encode_completions,
    end_of_turn_id,
    fail,
    generator,
    hidden_states,
    in_micro_batches,
    is_due,
    load_examples,
    load_held_out,
    load_scorer,
    load_tokenizer,
    micro_batches,
    model_forward,
    pad_rows,
    prompt_of,
    setup,
    shuffled_examples,
    text_or_messages,
)

LABEL_LOSSES = ["outcome", "process"]  # the others compare the completions of a prompt


@dataclass
class Args:
    loss: Literal["bradley-terry", "plackett-luce", "outcome", "process"] = "bradley-terry"
    """loss on pairs, rankings, labels of completions, or labels of their steps"""
    center_coef: float = 0.0
    """weight of (chosen + rejected score)^2 of pairs (Eisenstein et al. 2023: 0.01)"""
    outcome_tokens: Literal["last", "all"] = "last"
    """tokens at which outcome reads the score: EOS, or all (Cobbe et al. 2021)"""
    step_separator: str = "\n"
    """text between the steps of a completion; saved in the config with --loss process"""
    batch_size: int = 64
    """prompts, each with all its completions, per optimizer step"""
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
    output_dir: str = "runs/reward_model"
    """run directory: model, logs, samples, checkpoint"""
    resume: bool = False
    """resume from --output-dir with its saved flags"""
    overwrite: bool = False
    """move an earlier run in --output-dir aside"""
    seed: int = 1
    """seed of data order, sampling and new weights"""
    steps: int | None = None
    """optimizer steps at most (default: until --epochs ends)"""
    learning_rate: float = 9e-6
    """peak learning rate of AdamW (Ouyang et al. 2022: 9e-6)"""
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


def comparison_example(row, tokenizer, args):
    """A prompt with K completions and a label for each.

    From prompt, chosen and rejected (labels 1 and 0) or prompt, completions and scores. In
    rollouts.jsonl the columns of the prompt are in `row`. A `score` of the data is a label here; a
    score is the output of the model."""
    if args.loss == "process":
        return step_example(row, tokenizer, args)
    margin = 0.0
    if "completions" in row:
        prompt = prompt_of(row.get("row", {}) | row, args)
        completions, scores, finished = scored_completions(row, args)
        prompt_ids, completion_ids = encode_completions(tokenizer, prompt, completions)
        for ids, is_finished in zip(completion_ids, finished):
            if not is_finished and len(ids) > 1:
                ids.pop()  # it was cut off: the last token is the EOS that was just added
    else:
        pair = preference_example(row, tokenizer, args)
        prompt = pair["prompt"]
        prompt_ids = pair["prompt_ids"]
        completion_ids = [pair["chosen_ids"], pair["rejected_ids"]]
        scores = [1.0, 0.0]
        margin = pair["margin"]
    if margin and args.loss != "bradley-terry" or "completions" in row and row.get("margin"):
        raise ValueError("`margin` needs pairs and --loss bradley-terry")
    ends = [[len(ids) - 1] for ids in completion_ids]
    if args.loss == "outcome" and args.outcome_tokens == "all":
        ends = [list(range(len(ids))) for ids in completion_ids]
    labels = [[score] * len(tokens) for score, tokens in zip(scores, ends)]
    example = labeled_example(prompt, prompt_ids, completion_ids, ends, labels=labels, args=args)
    return example | {"margin": margin}


def labeled_example(prompt, prompt_ids, completion_ids, ends, labels, args):  # noqa: PLR0917
    """An example; `ends` are the token indices, in each completion, where a score is read."""
    if len(prompt_ids) + max(map(len, completion_ids)) > args.max_length:
        raise DroppedRow(f"longer than --max-length {args.max_length}")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,  # K lists
        "ends": ends,  # K lists
        "labels": labels,  # K lists
        "margin": 0.0,
    }


def scored_completions(row, args):
    """Columns completions, scores and optionally finished -> three lists, without null scores."""
    completions, scores = equal_lists(row, "completions", "scores")
    finished = [True] * len(scores)
    if "finished" in row:
        _, finished = equal_lists(row, "completions", "finished")
    known = [i for i, score in enumerate(scores) if score is not None]
    completions = [
        text_or_messages({"completions": completions[i]}, ["completions"]) for i in known
    ]
    scores = [float(scores[i]) for i in known]
    if any(map(math.isnan, scores)):
        raise ValueError(f"`scores` must be numbers or null, found {scores}")
    if args.loss == "outcome" and not set(scores) <= {0.0, 1.0}:
        raise ValueError(f"--loss outcome needs scores of 0 and 1, found {scores}")
    if len(set(scores)) < (1 if args.loss == "outcome" else 2):
        raise DroppedRow("no scores, or all equal")
    return completions, scores, [finished[i] for i in known]


def step_example(row, tokenizer, args):
    """A prompt, one completion, and a label at the end of each of its steps.

    From prompt, completions (the steps) and labels: 1 or true is right, 0 wrong, and a number in
    between the probability that the step is right, such as 0.5 for a neutral one."""
    steps, labels = equal_lists(row, "completions", "labels")
    if not all(0 <= label <= 1 for label in labels):
        raise ValueError(f"`labels` must be true, false or from 0 to 1, found {labels}")
    prompt = prompt_of(row, args)
    completion = args.step_separator.join(steps)
    prompt_ids, completion_ids = encode_completions(tokenizer, prompt, [completion])
    ends = step_ends(tokenizer, completion_ids[0], args.step_separator)
    if len(ends) != len(labels):
        raise DroppedRow("steps that contain --step-separator or do not end at it in tokens")
    labels = [[float(label) for label in labels]]
    return labeled_example(prompt, prompt_ids, completion_ids, [ends], labels=labels, args=args)


def step_ends(tokenizer, ids, separator):
    """Token indices at which the steps of a completion end; blank steps are ignored.

    A step ends at the token that completes a separator, the last step at EOS."""
    ends = []
    text = ""
    for t, token_id in enumerate(ids):
        text += tokenizer.decode([token_id], skip_special_tokens=True)
        if separator in text.lstrip():
            ends.append(t)
            text = text.rpartition(separator)[2]
    if ends and not text.strip():
        ends.pop()
    return [*ends, len(ids) - 1]


def equal_lists(row, column, other):
    """Two columns that must be lists of equal length."""
    if not isinstance(row[column], list) or not isinstance(row[other], list):
        raise ValueError(f"`{column}` and `{other}` must be lists")
    if len(row[column]) != len(row[other]) or not row[column]:
        raise ValueError(f"`{column}` has {len(row[column])} items, `{other}` {len(row[other])}")
    return row[column], row[other]


@model_forward
def token_scores(model, batch):
    """Scores of the scalar head, float32 and 0 outside the mask. Shapes: batch of (B, T) -> (B, T).

    inputs are whole sequences, right-padded. The head runs in float32 under autocast too: bfloat16
    scores near 4 are at least 0.03 apart, which makes close pairs ties."""
    mask = batch["mask"].bool()
    hidden = hidden_states(model, batch)  # (N, H)
    scores = (hidden.float() * model.score.weight[0]).sum(-1)
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores)


def at_last_token(x, batch):
    """Values at the last real token, found by length. Shapes: (B, T) -> (B,)."""
    last = batch["attention_mask"].sum(1) - 1
    return x[torch.arange(len(x), device=x.device), last]


def sequence_scores(model, batch):
    """Scores of whole sequences, for use in other code. Shapes: batch of (B, T) -> (B,)."""
    names = ["inputs", "attention_mask"]
    batch = {name: batch[name] for name in names} | {"mask": batch["attention_mask"]}
    scores = token_scores(model, batch)
    return at_last_token(scores, batch)


def bradley_terry_loss(chosen_scores, rejected_scores, margin=None):
    """-log sigmoid(r_chosen - r_rejected - margin). Shapes: all (B,).

    Ouyang et al. 2022, equation 1; with the margin Touvron et al. 2023 (Llama 2), equation 2."""
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)


def pair_accuracy(chosen, rejected):
    """1 if chosen > rejected, 0.5 for a tie, otherwise 0. Shapes: (B,), (B,) -> (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def better_pairs(labels, group):
    """Rows of the better and of the worse completion of all pairs with different labels.

    Only completions of one prompt (group) are paired. Shapes: (B,), (B,) -> (pairs,), (pairs,)."""
    is_better = (group[:, None] == group) & (labels[:, None] > labels)
    return is_better.nonzero(as_tuple=True)


def plackett_luce_loss(scores, labels, group):
    """Negative log-probability that each completion beats all that are ranked below it.

    The sum over a prompt (group) is -log P(its ranking) (Plackett 1975; Zhu et al. 2023, K-wise).
    Completions with equal labels do not compete. Shapes: all (B,)."""
    is_below = (group[:, None] == group) & (labels[:, None] > labels)
    is_own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    candidates = scores.expand(len(scores), -1).masked_fill(~(is_below | is_own), -torch.inf)
    return candidates.logsumexp(1) - scores


def binary_cross_entropy(scores, labels):
    """-log P(label) with P(1) = sigmoid(score), for any shape (Cobbe et al. 2021)."""
    return -(labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores))


def score_batch(examples, device, full_batch=None):
    """Make a batch of whole sequences from prompts with all their completions.

    mask is 1 where a score is read, labels is the label there, both (B, T); group is the index of
    the prompt. Weights carry the normalizers of full_batch (default: examples): weights (B, T) of a
    mean over labels; pair_weights (B,) of a pair of that prompt; prompt_weights (B,) of a mean over
    prompts, so a prompt counts once, whatever its number of completions."""
    full_batch = full_batch or examples
    num_labels = sum(len(labels) for example in full_batch for labels in example["labels"])
    num_compared = sum(count_pairs(example) > 0 for example in full_batch)
    sequences = []
    masks = []
    labels = []
    groups = []
    margins = []
    pair_weights = []
    prompt_lengths = []
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
            prompt_lengths.append(len(example["prompt_ids"]))
            pair_weights.append(1 / (num_pairs * num_compared) if num_pairs else 0.0)
    mask = pad_rows(masks, device)
    return {
        "inputs": pad_rows(sequences, device),
        "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], device),
        "mask": mask,
        "labels": pad_rows(labels, device),
        "weights": mask / num_labels,
        "group": torch.tensor(groups, device=device),
        "prompt_length": torch.tensor(prompt_lengths, device=device),
        "margins": torch.tensor(margins, device=device),
        "pair_weights": torch.tensor(pair_weights, device=device),
        "prompt_weights": torch.full((len(sequences),), 1 / len(full_batch), device=device),
    }


def count_pairs(example):
    """Number of pairs of completions with different last labels."""
    labels = [completion_labels[-1] for completion_labels in example["labels"]]
    ties = sum(math.comb(number, 2) for number in Counter(labels).values())
    return math.comb(len(labels), 2) - ties


def weighted_loss(scores, batch, loss_type, center_coef=0.0):
    """Loss of a (micro-)batch; weights carry the normalizer. Shapes: scores (B, T) -> scalar."""
    if loss_type in LABEL_LOSSES:
        return (batch["weights"] * binary_cross_entropy(scores, batch["labels"])).sum()
    scores = at_last_token(scores, batch)
    labels = at_last_token(batch["labels"], batch)
    better, worse = better_pairs(labels, batch["group"])
    centering = center_coef * (scores[better] + scores[worse]) ** 2
    pair_weights = batch["pair_weights"][better]
    if loss_type == "plackett-luce":
        losses = plackett_luce_loss(scores, labels, batch["group"])
        return (batch["prompt_weights"] * losses).sum() + (pair_weights * centering).sum()
    losses = bradley_terry_loss(scores[better], scores[worse], batch["margins"][better])
    return (pair_weights * (losses + centering)).sum()


def pair_metrics(scores, batch):
    """Accuracy and margin, weighted sums over pairs. Shapes: scores (B, T)."""
    scores = at_last_token(scores, batch)
    better, worse = better_pairs(at_last_token(batch["labels"], batch), batch["group"])
    weights = batch["pair_weights"][better]
    return {
        "accuracy": (weights * pair_accuracy(scores[better], scores[worse])).sum(),
        "margin": (weights * (scores[better] - scores[worse])).sum(),
    }


def label_metrics(scores, batch):
    """Accuracy at threshold 1/2 and Brier score, weighted sums over labels. Shapes: scores (B, T).

    The Brier score is the mean squared error of the probability, a measure of calibration."""
    probabilities = scores.sigmoid()
    is_right = (probabilities > 0.5) == (batch["labels"] > 0.5)
    return {
        "label_accuracy": (batch["weights"] * is_right).sum(),
        "brier": (batch["weights"] * (probabilities - batch["labels"]) ** 2).sum(),
    }


def clamp_shares(metrics):
    """The metrics with shares of at most 1, which a float32 sum of weights may exceed."""
    shares = metrics.keys() & {"accuracy", "label_accuracy"}
    return dict(metrics) | {name: metrics[name].clamp(max=1) for name in shares}


def find_eos_ids(tokenizer, path):
    """Ids that may end a completion, from tokenizer, chat template and generation config."""
    try:
        configured = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the checkpoint has no generation_config.json
        configured = None
    configured = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, end_of_turn_id(tokenizer), *configured}


def choose_pad(model, tokenizer, eos_ids):
    """Make sure PAD is not an EOS: transformers reads the score at the last id that is not PAD."""
    if tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    num_embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        nn.init.zeros_(model.get_input_embeddings().weight[num_embeddings:])
    model.config.pad_token_id = tokenizer.pad_token_id


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


def top1_accuracy(examples, scores):
    """Share of prompts where a best label has the highest score; scores: one per completion.

    Ties between highest scores count by share; prompts without a pair are skipped."""
    remaining = iter(scores)
    accuracies = []
    for example in examples:
        labels = [completion_labels[-1] for completion_labels in example["labels"]]
        example_scores = [next(remaining) for _ in labels]
        tied = [
            label for score, label in zip(example_scores, labels) if score == max(example_scores)
        ]
        if count_pairs(example):
            accuracies.append(sum(label == max(labels) for label in tied) / len(tied))
    return sum(accuracies) / len(accuracies)


@torch.no_grad()
def evaluate_scores(model, examples, run, step):
    """Loss, accuracy and scores of held-out prompts; returns metrics.

    The standard error of the accuracy is binomial, with one trial per prompt. The first 1,000
    completions are written to samples.jsonl."""
    args = run.args
    # all completions of a batch are compared with each other, so batches are small
    at_a_time = max(1, 1000 // max(len(example["labels"]) for example in examples))
    num_compared = sum(count_pairs(example) > 0 for example in examples)
    sums = Counter()
    parts = []
    for start in range(0, len(examples), at_a_time):
        batch = score_batch(examples[start : start + at_a_time], model.device, full_batch=examples)
        batch_scores = in_micro_batches(token_scores, model, batch, args.micro_batch_tokens)
        sums["loss"] += weighted_loss(batch_scores, batch, args.loss)
        if num_compared:
            sums.update(pair_metrics(batch_scores, batch))
        if args.loss in LABEL_LOSSES:
            sums.update(label_metrics(batch_scores, batch))
        parts.append(batch_scores[batch["mask"] > 0])
    scores = torch.cat(parts)
    metrics = {f"eval/{name}": total for name, total in clamp_shares(sums).items()}
    metrics["eval/score_mean"] = scores.mean()
    metrics["eval/score_std"] = scores.std(correction=0)

    completions = []
    labels = []
    for example in examples:
        completions += [example | {"completion_ids": ids} for ids in example["completion_ids"]]
        labels += example["labels"]
    completion_scores = [x.tolist() for x in scores.split([len(x) for x in labels])]
    run.log_samples(step, completions[:1000], {"labels": labels, "scores": completion_scores})
    if num_compared:
        accuracy = metrics["eval/accuracy"].item()
        num_pairs = sum(math.comb(len(example["labels"]), 2) for example in examples)
        num_unequal = sum(count_pairs(example) for example in examples)
        last_scores = [x[-1] for x in completion_scores]
        metrics["eval/accuracy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / num_compared)
        metrics["eval/top1_accuracy"] = top1_accuracy(examples, last_scores)
        metrics["eval/tied_pairs"] = 1 - num_unequal / num_pairs
    return metrics


def main(args):
    device = setup(args)
    if args.outcome_tokens == "all" and args.loss != "outcome":
        fail(f"--outcome-tokens all is for --loss outcome, not {args.loss}")
    if args.center_coef and args.loss in LABEL_LOSSES:
        fail(f"--center-coef {args.center_coef} must be 0 with --loss {args.loss}")

    # data first: a bad file fails before the model is loaded
    tokenizer = load_tokenizer(args.model)
    # in single quotes, a shell passes \\n as two characters
    args.step_separator = args.step_separator.replace("\\n", "\n")
    examples = load_examples(args.dataset, "pairs", comparison_example, tokenizer, args)
    held_out = load_held_out(examples, "pairs", comparison_example, tokenizer, args)
    pairs = [(x["prompt_ids"], ids) for x in examples + held_out for ids in x["completion_ids"]]
    check_fit(args.model, [prompt_ids + ids for prompt_ids, ids in pairs])

    # model
    def init(model, has_new_head):
        if has_new_head:  # variance 1 / (H + 1) (Stiennon et al. 2020)
            std = 1 / math.sqrt(model.score.in_features + 1)
            nn.init.normal_(model.score.weight, std=std, generator=generator(args.seed, "head"))
        choose_pad(model, tokenizer, find_eos_ids(tokenizer, args.model))
        model.config.step_separator = args.step_separator if args.loss == "process" else None

    model = load_scorer(args.model, args, device, trainable=True, init=init)
    models = nn.ModuleDict({"model": model})
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

    metrics_of = label_metrics if args.loss in LABEL_LOSSES else pair_metrics
    metrics = {}
    start = run.restore()
    if start == 0 and held_out:
        run.log(0, evaluate_scores(model, held_out, run, step=0))
    for step in range(start, steps):
        # batch: the next prompts of the shuffled data
        start_time = time.time()
        first = step * args.batch_size
        stop = min(first + args.batch_size, num_rows)
        batch = score_batch(shuffled_examples(examples, args.seed, first, stop), device)
        if args.loss in LABEL_LOSSES:  # completions are not compared, so they may be separated
            del batch["group"]

        # update: the weights carry the normalizers of the whole batch
        optimizer.param_groups[0]["lr"] = scheduled_learning_rate(step, steps, args)
        sums = Counter()
        for mb in micro_batches(batch, args.micro_batch_tokens):
            scores = token_scores(model, mb)
            loss = weighted_loss(scores, mb, args.loss, args.center_coef)
            loss.backward()
            sums.update(loss=loss.detach(), padded_tokens=mb["inputs"].numel())
            sums.update(metrics_of(scores.detach(), mb))
        grad_norm = clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # log, evaluate, save
        padded_tokens = sums.pop("padded_tokens")
        metrics = clamp_shares({name: all_reduce(total) for name, total in sums.items()})
        metrics |= {"grad_norm": grad_norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= throughput(batch, padded_tokens, start_time)
        if held_out and is_due(args.eval_every, step + 1, steps):
            metrics |= evaluate_scores(model, held_out, run, step=step + 1)
        run.log(step + 1, metrics, show=["loss", "accuracy", "label_accuracy", "margin"])
        run.checkpoint_if_due(step + 1)
    run.finish(model)
    return metrics


if __name__ == "__main__":
    # Bradley-Terry leaves a constant per prompt undetermined, which PPO's values would have to
    # learn first; centering removes it
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
