"""Results do not depend on the pieces that a script works through.

Each test has more than two pieces with a smaller last one, and compares with a single piece or with
a direct computation."""

import copy
import functools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ARGS, CPU
from language import write_rows
from test_scripts import chain, metrics  # noqa: F401

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

close = dict(rtol=1e-5, atol=1e-5)
EOS = 1


def is_uneven(sizes):
    """True for more than two pieces, all of one size but a smaller last one."""
    return len(sizes) > 2 and len(set(sizes[:-1])) == 1 and 0 < sizes[-1] < sizes[0]


def spy(monkeypatch, module, name, size):
    """Record size(*args, **kwargs) of every call of a function."""
    inner = getattr(module, name)
    sizes = []

    def call(*args, **kwargs):
        sizes.append(size(*args, **kwargs))
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return sizes


def number_of_rows(first, *args, **kwargs):
    return len(first)


def letters(draw, low, high):
    """Random token ids of letters."""
    return [draw.randrange(4, 30) for _ in range(draw.randint(low, high))]


def fake_run(**changes):
    """A run that only records its samples."""
    args = SimpleNamespace(**vars(ARGS) | {"seed": 1} | changes)
    samples = []

    def log_samples(step, rollouts, values):
        samples.append((rollouts, values))

    return SimpleNamespace(
        args=args,
        samples=samples,
        log_samples=log_samples,
        tokenizer=sft.tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def other_policy(tiny_llama):
    """The tiny model with noise, as a reference."""
    other = copy.deepcopy(tiny_llama)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=noise)
    return other


@torch.no_grad()
def sequence_logprob(model, prompt_ids, completion_ids):
    """log p(completion | prompt) of one sequence, by model.forward. Returns a float."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return logprobs[len(prompt_ids) - 1 :].sum().item()


# ---------------------------------------------------------------- micro-batches and sampling
def test_micro_batches_of_many_rows(tiny_llama, monkeypatch):
    """Eleven rows of one length in pieces of four, and forty ragged rows, against single rows."""
    draw = random.Random(1)
    even = [{"prompt_ids": letters(draw, 3, 3), "completion_ids": letters(draw, 4, 4)}] * 11
    ragged = [
        {"prompt_ids": letters(draw, 1, 9), "completion_ids": letters(draw, 1, 9)}
        for _ in range(41)
    ]
    for rollouts, budget, small_batch in [(even, 24, 512), (ragged, 60, 30), (ragged, 90, 512)]:
        monkeypatch.setattr(common, "SMALL_BATCH", small_batch)
        batch = ppo.completion_batch(rollouts, CPU)
        sizes = spy(monkeypatch, common, "take", lambda batch, rows: len(rows))
        result = common.in_micro_batches(
            ppo.logprobs_without_gradient, tiny_llama, batch, budget, 1.0
        )
        assert len(sizes) > 2 and sum(sizes) == len(rollouts)
        assert rollouts is not even or is_uneven(sizes)
        expected = [
            sequence_logprob(tiny_llama, x["prompt_ids"], x["completion_ids"]) for x in rollouts
        ]
        torch.testing.assert_close(result.sum(1), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sampling_in_pieces(temperature, tiny_llama, monkeypatch):
    """Seven prompts, three at a time, give the rollouts of seven at a time."""
    draw = random.Random(2)
    examples = [{"row": {"i": i}, "prompt_ids": letters(draw, 1, 9)} for i in range(7)]
    longest = max(len(example["prompt_ids"]) for example in examples)
    results = []
    sizes = spy(
        monkeypatch, common, "sample_rows", lambda policy, prompts, *args, **kwargs: len(prompts)
    )
    for at_a_time in (3, 7):
        results.append(
            common.sample(
                tiny_llama,
                examples,
                num_generations=2,
                max_new_tokens=5,
                temperature=temperature,
                rng=common.generator(1, "noise"),
                token_budget=at_a_time * 2 * (longest + 5),
            )
        )
    assert sizes == [3, 3, 1, 7] and is_uneven(sizes[:3])
    assert results[0] == results[1]
    assert [rollout["row"]["i"] for rollout in results[0]] == [i // 2 for i in range(14)]


# ---------------------------------------------------------------- evaluations
@pytest.mark.parametrize("script", [ppo, rloo, grpo, rejection_sampling])
def test_evaluation_of_a_policy_in_pieces(script, tiny_llama, other_policy, monkeypatch):  # noqa: PLR0917
    """Small pieces for sampling and log-probs give the metrics and samples of a single piece."""
    draw = random.Random(3)
    held_out = [
        {"row": {"i": i}, "prompt": str(i), "prompt_ids": letters(draw, 3, 3)} for i in range(11)
    ]

    def length(rollouts):
        """One prompt in four has no score."""
        scores = [
            math.nan if x["row"]["i"] % 4 == 1 else len(x["completion_ids"]) for x in rollouts
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def gold(rollouts):
        return torch.tensor([float(sum(x["completion_ids"]) % 3 == 0) for x in rollouts])

    evaluate = script.evaluate_policy if script is rejection_sampling else script.evaluate
    pieces = spy(
        monkeypatch,
        script,
        "in_micro_batches",
        lambda function, model, batch, max_tokens, *options: len(
            common.micro_batch_rows(batch, max_tokens)
        ),
    )
    sizes = spy(
        monkeypatch, common, "sample_rows", lambda policy, prompts, *args, **kwargs: len(prompts)
    )
    results = []
    for max_tokens, at_a_time in [(40, 4), (10**6, 11)]:
        run = fake_run(
            micro_batch_tokens=max_tokens,
            num_generations=3,
            max_completion_length=6,
            temperature=0.9,
        )
        budget = at_a_time * 3 * (3 + 6)
        monkeypatch.setattr(script, "sample", functools.partial(common.sample, token_budget=budget))
        scorers = {"score": length, "gold": gold}
        found = evaluate(tiny_llama, other_policy, scorers, held_out, run=run, step=1)
        results.append(({name: float(x) for name, x in found.items()}, run.samples))
    # the greedy pass has a third of the tokens per prompt, so its pieces have more prompts
    assert sizes == [11, 4, 4, 3, 11, 11] and min(pieces[:2]) > 5 and pieces[2:] == [1, 1]
    (small, small_samples), (whole, whole_samples) = results
    assert small == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert whole["eval/kl"] > 0.1 and 0 < whole["eval/gold"] < whole["eval/pass@3"]
    ((small_rollouts, small_values),) = small_samples
    ((rollouts, values),) = whole_samples
    assert small_rollouts == rollouts and len(rollouts) == 11
    for name, numbers in values.items():
        assert small_values[name] == pytest.approx(numbers, rel=1e-4, abs=1e-4, nan_ok=True)
    for rollout, kl in zip(rollouts, values["kl"]):  # at the temperature of sampling
        ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
        with torch.no_grad():
            both = [
                (model(ids).logits[0, 2:-1] / 0.9).log_softmax(-1).gather(-1, ids[0, 3:, None])
                for model in (tiny_llama, other_policy)
            ]
        assert kl == pytest.approx((both[0] - both[1]).sum().item(), rel=1e-3, abs=1e-3)


def test_evaluation_of_sft_on_more_rows_than_are_sampled(tiny_llama, monkeypatch):
    """The loss is over all rows in every piece; the first 500 prompts are completed."""
    draw = random.Random(4)
    examples = []
    for i in range(1203):
        prompt_ids = letters(draw, 2, 2)
        # the last rows are shorter, so a mean over fewer rows is another one
        completion_ids = letters(draw, 1, 5) if i < 900 else []
        ids = prompt_ids + completion_ids + [EOS]
        mask = [0] * 2 + [1] * (len(ids) - 2)
        examples.append({"row": {"i": i}, "prompt": str(i), "prompt_ids": prompt_ids})
        examples[-1] |= {"ids": ids, "mask": mask}
    total = 0.0
    for example in examples:
        total -= sequence_logprob(tiny_llama, example["ids"][:2], example["ids"][2:])
    expected = total / sum(len(example["ids"]) - 2 for example in examples)
    for max_tokens, is_one_piece in [(700, False), (10**6, True)]:
        run = fake_run(micro_batch_tokens=max_tokens)
        monkeypatch.setattr(common, "SMALL_BATCH", 10**6)
        sizes = spy(monkeypatch, common, "take", lambda batch, rows: len(rows))
        found = sft.evaluate_answers(tiny_llama, {}, examples, run, step=0)
        assert sum(sizes) == 1203 and (len(sizes) == 1) == is_one_piece
        assert is_one_piece or sizes[-1] < sizes[-2]
        assert float(found["eval/loss"]) == pytest.approx(expected, rel=1e-5)
        ((rollouts, _),) = run.samples
        assert [rollout["row"]["i"] for rollout in rollouts] == list(range(500))
        lengths = [len(rollout["completion_ids"]) for rollout in rollouts]
        assert found["eval/completion_length"] == sum(lengths) / 500
        assert found["eval/eos_rate"] == sum(rollout["finished"] for rollout in rollouts) / 500


def many_pairs(number):
    """Pairs of uneven lengths; the last tenth is shorter and has larger margins."""
    draw = random.Random(5)
    pairs = []
    for i in range(number):
        is_late = i >= 0.9 * number
        chosen = letters(draw, 1, 2 if is_late else 5)
        rejected = letters(draw, 1, 3)
        pairs.append(
            {
                "row": {"i": i},
                "prompt": str(i),
                "prompt_ids": letters(draw, 1, 3),
                "chosen_ids": [*chosen, EOS],
                "rejected_ids": [*rejected, EOS],
                "margin": 3.0 * is_late,
            }
        )
    return pairs


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_evaluation_of_dpo_in_pieces(loss_type, tiny_llama, other_policy, monkeypatch):
    """2,300 pairs in pieces of 1,000 have the metrics of one batch of 2,300, and its log-probs."""
    sizes = spy(monkeypatch, dpo, "pair_batch", number_of_rows)
    args = dict(loss_type=loss_type, beta=None, label_smoothing=0.1, sft_coef=0.2)
    run = fake_run(**args, simpo_margin=None)
    run.args.label_smoothing = 0.1 if loss_type == "sigmoid" else 0.0
    pairs = many_pairs(2300)
    if loss_type == "sigmoid":
        pairs = dpo.add_reference(other_policy, pairs, run.args)
        assert is_uneven(sizes) and sum(sizes) == 2300
        for i in (0, 999, 1000, 1001, 1999, 2000, 2299):
            for name, logprob in zip(("chosen_ids", "rejected_ids"), pairs[i]["ref_logps"]):
                expected = sequence_logprob(other_policy, pairs[i]["prompt_ids"], pairs[i][name])
                assert logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)
        sizes.clear()
    found = dpo.evaluate_preferences(tiny_llama, other_policy, {}, pairs, run=run, step=0)
    assert is_uneven(sizes) and sum(sizes) == 2300

    batch = dpo.pair_batch(pairs, CPU)
    with torch.no_grad():
        _, logged = dpo.pair_losses(dpo.token_logprobs(tiny_llama, batch), batch, run.args)
    assert {f"eval/{name}" for name in logged} < found.keys()
    for name, values in logged.items():
        assert len(values) == 2300
        # a pair whose rewards are equal up to rounding may be right or wrong
        tolerance = 2 / 2300 if name == "accuracy" else 1e-5
        expected = values.double().mean().item()
        assert found[f"eval/{name}"] == pytest.approx(expected, rel=1e-5, abs=tolerance), name
    assert logged["margin"][:2000].mean().item() != pytest.approx(found["eval/margin"], rel=1e-4)
    accuracy = found["eval/accuracy"]
    stderr = math.sqrt(accuracy * (1 - accuracy) / 2300)
    assert found["eval/accuracy_stderr"] == pytest.approx(stderr, rel=1e-6)

    ((rollouts, _),) = run.samples
    assert [rollout["row"]["i"] for rollout in rollouts] == list(range(500))
    kl = 0.0
    for rollout in rollouts:
        sequence = rollout["prompt_ids"], rollout["completion_ids"]
        kl += sequence_logprob(tiny_llama, *sequence) - sequence_logprob(other_policy, *sequence)
    assert float(found["eval/kl"]) == pytest.approx(kl / 500, rel=1e-3, abs=1e-3)


def many_comparisons(number, largest, labels_of):
    """Prompts with 2 to `largest` completions; labels_of(draw, K) are their labels."""
    draw = random.Random(6)
    examples = []
    for i in range(number):
        K = draw.choice([2, largest])
        completion_ids = [[*letters(draw, 1, 4), EOS] for _ in range(K)]
        examples.append(
            {
                "row": {"i": i},
                "prompt": str(i),
                "prompt_ids": letters(draw, 1, 3),
                "completion_ids": completion_ids,
                "ends": [[len(ids) - 1] for ids in completion_ids],
                "labels": [[label] for label in labels_of(draw, K)],
                "margin": 0.5 * (i % 3),
            }
        )
    return examples


def pairs_or_rankings(draw, K):
    """Distinct labels for two completions, and labels with a tie for more."""
    return [1.0, 0.0] if K == 2 else [float(i // 2) for i in range(K)]


def right_or_wrong(draw, K):
    """Labels of 0 and 1, all equal for some prompts."""
    return [float(draw.random() < 0.4) for _ in range(K)]


@pytest.mark.parametrize(
    "loss, largest, labels_of",
    [
        ("bradley-terry", 2, pairs_or_rankings),
        ("bradley-terry", 5, pairs_or_rankings),
        ("plackett-luce", 5, pairs_or_rankings),
        ("outcome", 4, right_or_wrong),
    ],
)
def test_evaluation_of_a_reward_model_in_pieces(loss, largest, labels_of, scorers, monkeypatch):  # noqa: PLR0917
    """Pieces of about 1,000 completions have the metrics of all pairs, by plain loops."""
    scorer = scorers["llama"]
    examples = many_comparisons(1130 if largest == 2 else 530, largest, labels_of)
    run = fake_run(loss=loss, center_coef=0.0)
    sizes = spy(monkeypatch, reward_model, "score_batch", number_of_rows)
    found = reward_model.evaluate_scores(scorer, examples, run, step=0)
    found = {name: float(value) for name, value in found.items()}
    assert is_uneven(sizes) and sum(sizes) == len(examples)

    sequences = [x["prompt_ids"] + ids for x in examples for ids in x["completion_ids"]]
    with torch.no_grad():
        scores = reward_model.sequence_scores(
            scorer,
            {
                "inputs": common.pad_rows(sequences, CPU),
                "attention_mask": common.pad_rows([[1] * len(ids) for ids in sequences], CPU),
            },
        )
    remaining = iter(scores.tolist())
    losses, accuracies, margins, tops, flat, all_labels = [], [], [], [], [], []
    num_pairs = 0
    num_tied = 0
    for example in examples:
        labels = [label for (label,) in example["labels"]]
        own = [next(remaining) for _ in labels]
        flat += own
        all_labels += labels
        pairs = [
            own[i] - own[j]
            for i in range(len(own))
            for j in range(len(own))
            if labels[i] > labels[j]
        ]
        num_pairs += len(own) * (len(own) - 1) // 2
        num_tied += len(own) * (len(own) - 1) // 2 - len(pairs)
        if loss == "outcome":
            losses += [math.log1p(math.exp(-r if y else r)) for r, y in zip(own, labels)]
        elif loss == "plackett-luce":
            terms = 0.0
            for r, y in zip(own, labels):
                below = [math.exp(s) for s, z in zip(own, labels) if z < y]
                terms += math.log(math.exp(r) + sum(below)) - r
            losses.append(terms)
        else:
            nll = [math.log1p(math.exp(-(x - example["margin"]))) for x in pairs]
            losses.append(sum(nll) / len(pairs))
        if pairs:
            accuracies.append(sum(x > 0 for x in pairs) / len(pairs))
            margins.append(sum(pairs) / len(pairs))
            tops.append(labels[own.index(max(own))] == max(labels))

    def mean(values):
        return sum(values) / len(values)

    assert found["eval/loss"] == pytest.approx(mean(losses), rel=1e-4)
    # scores that differ by rounding only may be in either order
    assert found["eval/accuracy"] == pytest.approx(mean(accuracies), abs=2 / len(accuracies))
    assert found["eval/top1_accuracy"] == pytest.approx(mean(tops), abs=2 / len(tops))
    assert found["eval/margin"] == pytest.approx(mean(margins), rel=1e-4, abs=1e-5)
    assert found["eval/tied_pairs"] == pytest.approx(num_tied / num_pairs)
    assert found["eval/score_mean"] == pytest.approx(mean(flat), rel=1e-4, abs=1e-5)
    variance = mean([(x - mean(flat)) ** 2 for x in flat])
    assert found["eval/score_std"] == pytest.approx(math.sqrt(variance), rel=1e-4)
    p = found["eval/accuracy"]
    expected = math.sqrt(p * (1 - p) / len(accuracies))
    assert found["eval/accuracy_stderr"] == pytest.approx(expected, rel=1e-4)
    if loss == "outcome":
        squares = [(1 / (1 + math.exp(-r)) - y) ** 2 for r, y in zip(flat, all_labels)]
        right = [(r > 0) == (y == 1) for r, y in zip(flat, all_labels)]
        assert found["eval/brier"] == pytest.approx(mean(squares), rel=1e-4)
        assert found["eval/label_accuracy"] == pytest.approx(mean(right), abs=2 / len(right))

    ((completions, values),) = run.samples
    assert len(completions) == 1000
    assert [x["prompt_ids"] + x["completion_ids"] for x in completions] == sequences[:1000]
    for score, label, logged, logged_labels in zip(
        flat[:1000],
        all_labels,
        values["scores"],
        values["labels"],
    ):
        assert logged == pytest.approx([score], rel=1e-4, abs=1e-4)
        assert logged_labels == [label]


# ---------------------------------------------------------------- rejection sampling
def test_rollouts_of_an_iteration_in_pieces(tmp_path, monkeypatch):
    """150 prompts in pieces of 64 have the completions, scores and labels of their own rows."""
    N = 3
    draw = random.Random(7)
    prompts = [
        {"row": {"prompt": str(i), "i": i}, "prompt": str(i), "prompt_ids": letters(draw, 2, 4)}
        for i in range(150)
    ]
    sizes = []

    def sample(policy, examples, *, num_generations, **kwargs):
        """The number of the row, as letters, and the number of the generation."""
        sizes.append(len(examples))
        rollouts = []
        for example in examples:
            for g in range(num_generations):
                i = example["row"]["i"]
                ids = [4 + i // 26, 4 + i % 26, 4 + g, EOS]
                rollouts.append(example | {"completion_ids": ids, "finished": g > 0})
        return rollouts

    def score_of(i, g):
        return math.nan if (i + g) % 7 == 0 else float((i * 5 + g * 3) % 11)

    def reward(rollouts):
        scores = []
        for rollout in rollouts:
            i, g = rollout["row"]["i"], rollout["completion_ids"][2] - 4
            rollout["member_scores"] = torch.tensor([score_of(i, g), i + 0.5])
            scores.append(score_of(i, g))
        return torch.tensor(scores)

    def gold(rollouts):
        return torch.tensor(
            [float(x["row"]["i"] % 4 < x["completion_ids"][2] - 4) for x in rollouts]
        )

    monkeypatch.setattr(rejection_sampling, "sample", sample)
    args = SimpleNamespace(num_generations=N, max_completion_length=4, temperature=1.0, seed=1)
    lines = []
    run = SimpleNamespace(
        args=args,
        dir=tmp_path,
        tokenizer=sft.tiny_tokenizer(),
        append=lambda name, row: lines.append((name, row)),
        bar=SimpleNamespace(set_postfix_str=lambda text: None),
    )
    records = rejection_sampling.iteration_records(
        None, reward, {"gold": gold}, prompts, iteration=4, run=run
    )
    assert is_uneven(sizes) and sum(sizes) == 150
    assert [row for _, row in lines] == records and {name for name, _ in lines} == {
        "rollouts.jsonl"
    }

    for i, record in enumerate(records):
        golds = [float(i % 4 < g) for g in range(N)]
        scores = pytest.approx([score_of(i, g) for g in range(N)], nan_ok=True)
        assert record["iteration"] == 4 and record["row"]["i"] == i
        assert record["ids"] == [[4 + i // 26, 4 + i % 26, 4 + g, EOS] for g in range(N)]
        assert record["scores"] == scores and record["member_scores"][0] == scores
        assert record["member_scores"][1] == [i + 0.5] * N
        assert record["gold"] == golds and record["solve_rate"] == sum(golds) / N
        assert record["finished"] == [False, True, True]

    # means over all prompts of the iteration
    pairs = [(i, 0) for i in range(1, 150) if i % 7]
    found = rejection_sampling.selection_metrics(records, pairs)
    known = [x for record in records for x in record["scores"] if not math.isnan(x)]
    assert float(found["score"]) == pytest.approx(sum(known) / len(known), rel=1e-5)
    selected = [score_of(i, 0) for i, _ in pairs]
    assert float(found["selected_score"]) == pytest.approx(sum(selected) / len(selected), rel=1e-5)
    assert float(found["score/2"]) == pytest.approx(149 / 2 + 0.5, rel=1e-5)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("script", [reward_model, dpo])
def test_a_smaller_last_batch_is_a_mean_too(script, chain, tmp_path):  # noqa: F811
    """Five pairs in batches of two, learning rate 0: the batch means are those of single pairs."""
    pairs = [("dbca>", "abcd"), ("b>", "b"), ("gf>", "fg"), ("zya>", "ayz"), ("k>", "kk")]
    rows = [{"prompt": p, "chosen": c, "rejected": c[::-1] + "x"} for p, c in pairs]
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
        learning_rate=0.0,
    )
    if script is dpo:  # of one model, losses with a reference are all equal
        args |= dict(loss_type="simpo")
    logs = {}
    for batch_size in (1, 2, 5):
        folder = tmp_path / str(batch_size)
        script.main(script.Args(**args, batch_size=batch_size, output_dir=str(folder)))
        logs[batch_size] = metrics(folder)
    assert [len(logs[size]) for size in (1, 2, 5)] == [5, 3, 1]
    for name in ("loss", "accuracy", "margin"):
        single = [row[name] for row in logs[1]]
        means = [sum(single[i : i + 2]) / len(single[i : i + 2]) for i in (0, 2, 4)]
        assert [row[name] for row in logs[2]] == pytest.approx(means, rel=1e-4, abs=1e-5)
        assert [row[name] for row in logs[5]] == pytest.approx(
            [sum(single) / 5], rel=1e-4, abs=1e-5
        )
    assert len({row["loss"] for row in logs[1]}) == 5


def test_ptx_loss_in_pieces(tiny_llama):
    """Seven rows, two per micro-batch, over the end of an epoch of five: one mean over tokens."""
    draw = random.Random(8)
    examples = [
        {"prompt_ids": letters(draw, 3, 3), "completion_ids": letters(draw, 3 + i, 3 + i)}
        for i in range(5)
    ]
    args = SimpleNamespace(
        prompts_per_step=7,
        num_generations=2,
        num_minibatches=2,
        ptx_coef=0.5,
        seed=1,
        micro_batch_tokens=20,
    )
    batch_size = 7
    for update in (0, 1, 2):
        first = update * batch_size
        rows = common.shuffled_examples(examples, "1 ptx", first, first + batch_size)
        number = len(common.micro_batch_rows(ppo.completion_batch(rows, CPU), 20))
        assert len(rows) == 7 and number > 2
        total = ppo.ptx_backward(tiny_llama, examples, update, args)
        tiny_llama.zero_grad(set_to_none=True)
        nll = [-sequence_logprob(tiny_llama, x["prompt_ids"], x["completion_ids"]) for x in rows]
        expected = sum(nll) / sum(len(x["completion_ids"]) for x in rows)
        assert float(total) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- whole runs
def test_every_held_out_row_is_completed_once(chain, tmp_path):  # noqa: F811
    """Every held-out row of an evaluation is in samples.jsonl once, in order."""
    rows = [{"prompt": f"{a}{b}>", "completion": a} for a in "abcdefg" for b in "hijkl"]
    sft.main(
        sft.Args(
            model=str(chain / "sft"),
            dataset="sort",
            eval_dataset=write_rows(tmp_path / "rows.jsonl", rows),
            output_dir=str(tmp_path / "run"),
            steps=1,
            micro_batch_tokens=30,
        )
    )
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    logged = [(json.loads(line)["step"], json.loads(line)["prompt"]) for line in lines]
    assert logged == [(step, row["prompt"]) for step in (0, 1) for row in rows]
