"""Reward models of rankings, outcomes and steps, and reward ensembles.

test_steps.py covers what a step of `main` computes. Here: data, identities, closed forms."""

import copy
import itertools
import json
import math
import random
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ARGS, CPU
from language import PROMPTS, save_start, write_rows
from test_data import letters, talk
from test_data import refused as refused  # a fixture
from test_rewards import reward_args, wordlevel
from test_scripts import chain as chain  # a fixture
from test_scripts import metrics

import common
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft
from reward_model import better_pairs, plackett_luce_loss, step_ends, weighted_loss


# ---------------------------------------------------------------- data
@pytest.fixture
def load(tmp_path):
    """Load rows as reward_model.py does."""

    def function(rows, loss="bradley-terry", tokenizer=None, **changes):
        flags = dict(loss=loss, outcome_tokens="last", step_separator="\n", max_length=500)
        flags |= dict(prompt_template="{prompt}", seed=1)
        path = write_rows(tmp_path / "rows.jsonl", rows)
        args = SimpleNamespace(**flags | changes)
        make_example = reward_model.comparison_example
        return common.load_examples(path, "pairs", make_example, tokenizer or letters(), args)

    return function


def decoded(examples):
    tokenizer = letters()
    return [[tokenizer.decode(ids) for ids in x["completion_ids"]] for x in examples]


def test_forms_of_comparisons(load):
    """Pairs, completions with scores, and rows of rollouts.jsonl make the same kind of example."""
    rows = [
        {"prompt": "p>", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {"prompt": "p>", "completions": ["a", "bc", "d"], "scores": [1, 2.5, None]},
        {
            "iteration": 0,
            "row": {"prompt": "q>", "answer": "x", "chosen": "x", "rejected": "y", "margin": 1.0},
            "completions": ["x", "xx", "y"],
            "scores": [1.0, 0.0, 0.0],
            "finished": [True, False, True],
            "ids": [[1], [1], [1]],
        },
    ]
    examples = load(rows)
    assert decoded(examples) == [
        ["yes[EOS]", "no[EOS]"],
        ["a[EOS]", "bc[EOS]"],  # without the completion that has no score
        ["x[EOS]", "xx", "y[EOS]"],  # the completion that was cut has no EOS
    ]
    assert [x["labels"] for x in examples] == [[[1], [0]], [[1], [2.5]], [[1], [0], [0]]]
    assert [x["prompt"] for x in examples] == ["p>", "p>", "q>"]
    assert [x["margin"] for x in examples] == [0.5, 0, 0]
    for x in examples:
        assert x["ends"] == [[len(ids) - 1] for ids in x["completion_ids"]]


def test_finished_belongs_to_the_completion_of_a_score(load):
    """A completion without a score does not shift `finished`. A cut empty completion keeps EOS."""
    row = {"prompt": "p>", "completions": ["a", "b", "c", ""], "scores": [None, 1, 0, 2]}
    (example,) = load([row | {"finished": [False, True, False, False]}])
    assert decoded([example]) == [["b[EOS]", "c", "[EOS]"]]
    assert example["labels"] == [[1], [0], [2]]


def test_null_columns_inside_rollouts_count_as_missing(load):
    """As in the rows of the data that rejection_sampling.py read."""
    row = {"completions": ["a", "b"], "scores": [1, 0]}
    (example,) = load([row | {"row": {"prompt": None, "question": "q>"}}])
    assert example["prompt"] == "q>"


def test_completions_may_be_messages(load):
    row = {"prompt": talk("hi"), "completions": ["yes", talk("no", first="assistant")]}
    examples = load([row | {"scores": [1, 0]}], tokenizer=letters(chat=True))
    assert decoded(examples) == [["yes<|im_end|>", "no<|im_end|>"]]


def test_outcome_reads_the_last_token_or_every_token(load):
    row = {"prompt": "p>", "completions": ["ab"], "scores": [1]}
    (last,) = load([row], "outcome")
    (every,) = load([row], "outcome", outcome_tokens="all")
    assert (last["ends"], last["labels"]) == ([[2]], [[1]])
    assert (every["ends"], every["labels"]) == ([[0, 1, 2]], [[1, 1, 1]])


def test_steps_end_at_the_separator_and_at_eos(load):
    row = {"prompt": "p\n>", "completions": ["ab", "c", "def"], "labels": [True, 0.5, False]}
    (example,) = load([row], "process")
    assert decoded([example]) == [["ab\nc\ndef[EOS]"]]
    assert example["ends"] == [[2, 4, 8]] and example["labels"] == [[1, 0.5, 0]]
    (example,) = load([row], "process", step_separator=". ")
    assert decoded([example]) == [["ab. c. def[EOS]"]] and example["ends"] == [[3, 6, 10]]


@pytest.mark.parametrize(
    "tokens, ends",
    [
        (["x", "\n", "y", "[EOS]"], [1, 3]),
        (["x", "[EOS]"], [1]),
        (["x", "\n", "[EOS]"], [2]),  # the last step ends at EOS, not at a separator before it
        (["\n", "\n", "x", "\n", "y", "[EOS]"], [3, 5]),  # blank lines are not steps
        (["x", "\n", "\n", "y", "[EOS]"], [1, 4]),
        (["x", "\n\n", "y", "\n\n", "[EOS]"], [1, 4]),
        (["x", "\ny", "y", "\n", "x", "[EOS]"], [1, 3, 5]),  # a token that also begins a step
        (["x", "\ny", "[EOS]"], [1, 2]),
        (["x", "\n", "y"], [1, 2]),  # cut: without EOS, the last step ends at the last token
    ],
)
def test_step_ends(tokens, ends):
    tokenizer = wordlevel(["[EOS]", "[UNK]", "x", "y", "\n", "\n\n", "\ny"], eos_token="[EOS]")
    assert step_ends(tokenizer, tokenizer.convert_tokens_to_ids(tokens), "\n") == ends


def test_rows_without_a_comparison_are_dropped_and_counted(load, capsys):
    good = {"prompt": "p>", "completions": ["a", "b"], "scores": [1, 0]}
    equal = good | {"scores": [2, 2]}
    unknown = good | {"scores": [1, None]}
    single = good | {"completions": ["a"], "scores": [1]}
    assert len(load([good, equal, unknown, equal, single])) == 1
    out = capsys.readouterr().out
    assert "dropped 4 rows: no scores, or all equal, first at" in out and "row 2" in out
    # equal labels of right and wrong are still labels
    right = good | {"scores": [1, 1]}
    assert len(load([good, right, unknown, single], "outcome")) == 4
    nothing = good | {"scores": [None, None]}
    assert len(load([good, nothing], "outcome")) == 1
    assert "dropped 1 rows: no scores" in capsys.readouterr().out
    step = {"prompt": "p>", "completions": ["a", "b"], "labels": [1, 0]}
    inside = step | {"completions": ["a\nb", "c"]}
    assert len(load([step, inside], "process")) == 1
    assert "dropped 1 rows: steps that contain --step-separator" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["bradley-terry", "outcome", "process"])
def test_long_rows_are_dropped_and_counted(load, capsys, loss):
    row = {"prompt": "p>", "completions": ["a", "b"], "scores": [1, 0], "labels": [1, 0]}
    long = row | {"completions": ["a", "b" * 8]}
    assert len(load([row, long], loss, max_length=7)) == 1
    assert "dropped 1 rows: longer than --max-length 7" in capsys.readouterr().out


BAD = {  # change of a good row, --loss, words
    "unequal lengths": ({"scores": [1]}, "bradley-terry", ["`completions` has 2", "`scores` 1"]),
    "no list": ({"completions": "ab"}, "bradley-terry", ["`completions`", "lists"]),
    "no scores": ({"scores": None}, "bradley-terry", ["scores"]),
    "a score is NaN": ({"scores": [math.nan, 1]}, "bradley-terry", ["nan"]),
    "a score is text": ({"scores": ["good", 1]}, "bradley-terry", ["good"]),
    "not right or wrong": ({"scores": [0.5, 1]}, "outcome", ["scores of 0 and 1", "0.5"]),
    "a completion is a number": ({"completions": ["a", 3]}, "bradley-terry", ["int"]),
    "finished is short": ({"finished": [True]}, "bradley-terry", ["`finished` 1"]),
    "labels are of steps": ({"scores": ..., "labels": [1, 0]}, "outcome", ["scores"]),
    "scores are not of steps": ({}, "process", ["labels"]),
    "labels are above 1": ({"labels": [1, 1.5]}, "process", ["`labels`", "1.5"]),
    "labels are below 0": ({"labels": [-1, 0]}, "process", ["`labels`", "-1"]),
    "labels are not numbers": ({"labels": [1, math.nan]}, "process", ["`labels`", "nan"]),
    "steps are not texts": ({"completions": [1, 2], "labels": [1, 0]}, "process", ["int"]),
    "margin": ({"margin": 1.0}, "bradley-terry", ["`margin` needs pairs"]),
    "margin of a ranking": (
        {"completions": ..., "scores": ..., "chosen": "a", "rejected": "b", "margin": 1.0},
        "plackett-luce",
        ["`margin` needs", "--loss bradley-terry"],
    ),
    "margin of an outcome": (
        {"completions": ..., "scores": ..., "chosen": "a", "rejected": "b", "margin": 1.0},
        "outcome",
        ["`margin` needs", "--loss bradley-terry"],
    ),
}


@pytest.mark.parametrize("change, loss, words", BAD.values(), ids=BAD)
def test_bad_comparisons(load, refused, change, loss, words):
    good = {"prompt": "p>", "completions": ["a", "b"], "scores": [1, 0]}
    row = {name: value for name, value in (good | change).items() if value is not ...}
    first = good | {"labels": [1, 0]} if loss == "process" else good
    refused(["rows.jsonl row 2: ", *words], load, [first, row], loss)


# ---------------------------------------------------------------- identities
def scored_batch(labels, seed=1):
    """A score_batch of prompts with these labels, and scores (B, T) float64 at last tokens."""
    rng = random.Random(seed)
    examples = []
    for prompt_labels in labels:
        ids = [[5] * rng.randint(1, 4) for _ in prompt_labels]
        examples.append(
            {
                "prompt_ids": [3] * rng.randint(1, 3),
                "completion_ids": ids,
                "ends": [[len(x) - 1] for x in ids],
                "labels": [[label] for label in prompt_labels],
                "margin": 0.0,
            }
        )
    batch = reward_model.score_batch(examples, CPU)
    noise = torch.randn(
        batch["inputs"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return examples, batch, (noise * batch["mask"]).requires_grad_()


def test_plackett_luce_of_two_is_bradley_terry():
    _, batch, scores = scored_batch([[1.0, 0.0]] * 7)
    losses = [weighted_loss(scores, batch, name) for name in ("bradley-terry", "plackett-luce")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_loss_of_a_prompt_is_the_mean_over_its_pairs():
    """A prompt with many completions counts as much as a prompt with two."""
    labels = [[3.0, 1.0, 2.0, 2.0], [0.0, 1.0]]
    _, batch, scores = scored_batch(labels)
    ours = weighted_loss(scores, batch, "bradley-terry")
    (gradient,) = torch.autograd.grad(ours, scores, retain_graph=True)
    read = (scores * batch["mask"]).sum(1)  # the only score of each row
    total = 0.0
    first = 0
    for prompt_labels in labels:
        n = range(len(prompt_labels))
        pairs = [(i, j) for i in n for j in n if prompt_labels[i] > prompt_labels[j]]
        for i, j in pairs:
            loss = -torch.nn.functional.logsigmoid(read[first + i] - read[first + j])
            total = total + loss / len(pairs) / len(labels)
        first += len(prompt_labels)
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, scores)[0])


def test_plackett_luce_is_the_probability_of_the_ranking():
    """Each probability is a product over ranks. The probabilities of all permutations sum to 1."""
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    group = torch.zeros(4)
    total = 0.0
    for order in itertools.permutations(range(4)):  # best first
        labels = torch.tensor([4.0 - order.index(i) for i in range(4)])
        ours = (-plackett_luce_loss(scores, labels, group).sum()).exp()
        worth = scores.exp()
        remaining = list(order)
        product = 1.0
        while remaining:
            product *= worth[remaining[0]] / worth[remaining].sum()
            remaining.pop(0)
        assert ours.item() == pytest.approx(product.item(), rel=1e-12)
        total += ours.item()
    assert total == pytest.approx(1, rel=1e-12)


def test_ties_of_plackett_luce():
    """Two completions that share the first rank do not compete with each other.

    Two that share the last rank have no loss."""
    scores = torch.tensor([1.0, 2.0, 0.5, -0.5], dtype=torch.float64)
    losses = plackett_luce_loss(scores, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.zeros(4))
    below = scores[2:].exp().sum()
    for i in (0, 1):
        expected = -(scores[i].exp() / (scores[i].exp() + below)).log()
        assert losses[i].item() == pytest.approx(expected.item())
    assert losses[2:].tolist() == [0, 0]


@pytest.mark.parametrize("loss", ["bradley-terry", "plackett-luce", "outcome"])
def test_order_of_prompts_and_completions_changes_nothing(loss):
    labels = [[1.0, 0.0, 1.0], [0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    examples, batch, scores = scored_batch(labels)
    loss_before = weighted_loss(scores, batch, loss)
    (before,) = torch.autograd.grad(loss_before, scores)
    rng = random.Random(5)
    numbered = list(enumerate(examples))
    rng.shuffle(numbered)
    firsts = [0, 3, 5]
    order = []
    shuffled = []
    for number, item in numbered:
        inside = list(range(len(item["labels"])))
        rng.shuffle(inside)
        order += [firsts[number] + i for i in inside]
        keys = ("completion_ids", "ends", "labels")
        shuffled.append(item | {key: [item[key][i] for i in inside] for key in keys})
    moved = scores.detach()[order].requires_grad_()
    loss_after = weighted_loss(moved, reward_model.score_batch(shuffled, CPU), loss)
    (after,) = torch.autograd.grad(loss_after, moved)
    torch.testing.assert_close(loss_after, loss_before)
    torch.testing.assert_close(after, before[order])


def test_no_pair_spans_two_prompts():
    better, worse = better_pairs(
        torch.tensor([1.0, 0.0, 5.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1, 1])
    )
    assert list(zip(better.tolist(), worse.tolist())) == [(0, 1), (2, 3), (2, 4)]


# ---------------------------------------------------------------- closed forms, through main
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model, and a worth of 1, 2 or 4 for each answer of one or two letters."""
    folder = tmp_path_factory.mktemp("comparisons")
    tokenizer = save_start(f"{folder}/start", seed=1)
    draw = random.Random(2)
    texts = ["a", "b", "c", *(x + y for x in "abc" for y in "abc")]
    worth = {(prompt, text): draw.choice([1, 2, 4]) for prompt in PROMPTS for text in texts}
    return SimpleNamespace(
        folder=folder, start=f"{folder}/start", tokenizer=tokenizer, texts=texts, worth=worth
    )


def train(world, name, rows, **flags):
    """Run reward_model.main on these rows; returns the model."""
    defaults = dict(
        model=world.start,
        dataset=write_rows(world.folder / f"{name}.jsonl", rows),
        output_dir=str(world.folder / name),
        learning_rate=3e-3,
        save_every=0,
        log_every=10**6,
    )
    reward_model.main(reward_model.Args(**defaults | flags))
    return common.load_scorer(defaults["output_dir"], ARGS, CPU)


def ids_of(world, text):
    return world.tokenizer.convert_tokens_to_ids(list(text))


@torch.no_grad()
def scores_at(world, model, prompt, text, eos=True):
    """Scores at the tokens of a completion, computed without the code of the scripts."""
    ids = ids_of(world, prompt) + ids_of(world, text) + [world.tokenizer.eos_token_id] * eos
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return (hidden @ model.score.weight[0])[len(prompt) :].tolist()


def log_odds(worth):
    """Log-odds of a completion that is right `worth` times in five."""
    return math.log(worth / (5 - worth))


def rankings(world):
    """Rankings of triples of answers, each as often as Plackett-Luce says.

    Returns worths (1 or 2) of six answers to each of two prompts, and rows."""
    draw = random.Random(2)
    texts = world.texts[:6]
    worths = {prompt: {text: draw.choice([1, 2]) for text in texts} for prompt in PROMPTS[:2]}
    rows = []
    for prompt in worths:
        ring = draw.sample(texts, len(texts))
        for first in range(len(ring)):
            triple = [ring[(first + i) % len(ring)] for i in range(3)]
            shares = {}
            for order in itertools.permutations(triple):
                worth = [worths[prompt][text] for text in order]
                share = Fraction(worth[0], sum(worth)) * Fraction(worth[1], sum(worth[1:]))
                shares[order] = share
            scale = math.lcm(*(share.denominator for share in shares.values()))
            for order, share in shares.items():
                row = {"prompt": prompt, "completions": order, "scores": [3, 2, 1]}
                rows += [row] * int(share * scale)
    return worths, rows


@pytest.mark.parametrize(
    "loss", ["plackett-luce", pytest.param("bradley-terry", marks=pytest.mark.slow)]
)
def test_rankings_end_at_the_worths_behind_them(loss, world):
    """Scores converge to log worths, up to a constant per prompt.

    All pairs of Plackett-Luce rankings are distributed as Bradley-Terry says."""
    worths, rows = rankings(world)
    flags = dict(loss=loss, batch_size=60, epochs=60, learning_rate=5e-3)
    model = train(world, loss, rows, **flags)
    scores = []
    logs = []
    for prompt, worth in worths.items():
        row = torch.tensor([scores_at(world, model, prompt, text)[-1] for text in worth])
        scores.append(row - row.mean())
        row = torch.tensor(list(worth.values())).log()
        logs.append(row - row.mean())
    scores = torch.cat(scores)
    logs = torch.cat(logs)
    assert torch.corrcoef(torch.stack([scores, logs]))[0, 1] > 0.999
    assert abs((scores @ logs) / (logs @ logs) - 1) < 0.02


@pytest.mark.parametrize("outcome_tokens", ["last", "all"])
def test_outcome_ends_at_the_log_odds_of_being_right(outcome_tokens, world):
    """Before the last token, the log-odds are of all answers with the same beginning."""
    rows = []
    for (prompt, text), worth in world.worth.items():
        right = [1] * worth + [0] * (5 - worth)
        rows.append({"prompt": prompt, "completions": [text] * 5, "scores": right})
    flags = dict(loss="outcome", outcome_tokens=outcome_tokens, batch_size=len(rows), epochs=150)
    model = train(world, f"outcome {outcome_tokens}", rows, **flags)
    for (prompt, text), worth in world.worth.items():
        scores = scores_at(world, model, prompt, text)
        assert scores[-1] == pytest.approx(log_odds(worth), abs=0.05)
    if outcome_tokens == "all":
        for prompt in PROMPTS:
            (score,) = scores_at(world, model, prompt, "a", eos=False)
            worths = [world.worth[prompt, text] for text in world.texts if text[0] == "a"]
            assert score == pytest.approx(log_odds(sum(worths) / len(worths)), abs=0.05)


def test_process_ends_at_the_log_odds_of_each_step(world):
    """Answers of two steps, separated by d."""
    rows = []
    answers = [(prompt, x, y) for prompt in PROMPTS for x in "abc" for y in "abc"]
    for prompt, x, y in answers:
        first = world.worth[prompt, x]
        second = world.worth[prompt, x + y]
        for i in range(5):
            labels = [i < first, i < second]
            rows.append({"prompt": prompt, "completions": [x, y], "labels": labels})
    flags = dict(loss="process", step_separator="d", batch_size=len(rows), epochs=150)
    model = train(world, "process", rows, **flags)
    assert model.config.step_separator == "d"
    for prompt, x, y in answers:
        _, first, _, second = scores_at(world, model, prompt, f"{x}d{y}")
        assert first == pytest.approx(log_odds(world.worth[prompt, x]), abs=0.05)
        assert second == pytest.approx(log_odds(world.worth[prompt, x + y]), abs=0.05)


# ---------------------------------------------------------------- evaluation
RUN = SimpleNamespace(
    args=reward_model.Args(micro_batch_tokens=1000), log_samples=lambda *args: None
)


def test_ties_of_top1_accuracy_count_by_share(scorers):
    """Otherwise a constant model would seem perfect on pairs: the chosen completion comes first."""
    model = copy.deepcopy(scorers["llama"])
    with torch.no_grad():
        model.score.weight.zero_()
    examples, _, _ = scored_batch([[1.0, 0.0]] * 4)
    results = reward_model.evaluate_scores(model, examples, run=RUN, step=0)
    assert results["eval/accuracy"] == results["eval/top1_accuracy"] == 0.5

    examples, _, _ = scored_batch([[2.0, 1.0, 0.0], [1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0]])
    scores = [5, 5, 1, *[7, 2], *[3, 3, 3], *[1, 4]]
    expected = (1 / 2 + 2 / 3 + 1) / 3  # the second prompt has no pair
    assert reward_model.top1_accuracy(examples, scores) == pytest.approx(expected)


def test_standard_error_of_a_perfect_model_is_zero(scorers, monkeypatch):
    """For some numbers of pairs, an accuracy of 1 is 1.0000001 in float32."""
    monkeypatch.setattr(reward_model, "in_micro_batches", lambda *args: args[2]["labels"])
    for num_prompts in range(1, 40):
        examples, _, _ = scored_batch([[1.0, 0.0]] * num_prompts)
        results = reward_model.evaluate_scores(scorers["llama"], examples, run=RUN, step=0)
        assert results["eval/accuracy"].item() == pytest.approx(1)
        assert results["eval/accuracy_stderr"] == pytest.approx(0, abs=1e-3)


def test_samples_hold_the_scores_of_each_completion(scorers):
    """Also with several scores per completion, in batches and micro-batches."""
    rng = random.Random(1)
    examples = []
    for num_completions in (3, 1, 400, 400, 2):  # 1,000 // 400 = 2 prompts per batch
        ids = [
            [rng.randrange(64) for _ in range(rng.randint(2, 5))] for _ in range(num_completions)
        ]
        ends = [sorted(rng.sample(range(len(x)), rng.randint(1, 2))) for x in ids]
        labels = [[float(rng.randint(0, 1)) for _ in x] for x in ends]
        shared = {"prompt": "p", "prompt_ids": [3] * rng.randint(1, 3), "margin": 0.0}
        examples.append(shared | {"completion_ids": ids, "ends": ends, "labels": labels})
    logged = []
    args = reward_model.Args(loss="process", micro_batch_tokens=100)
    run = SimpleNamespace(args=args, log_samples=lambda *call: logged.append(call))
    model = scorers["llama"]
    results = reward_model.evaluate_scores(model, examples, run=run, step=3)
    ((step, rollouts, values),) = logged
    completions = [(x, i) for x in examples for i in range(len(x["labels"]))]
    assert step == 3 and len(rollouts) == len(completions) == 806
    assert values["labels"] == [x["labels"][i] for x, i in completions]
    total = []
    for rollout, scores, (x, i) in zip(rollouts, values["scores"], completions, strict=True):
        assert rollout["completion_ids"] == x["completion_ids"][i]
        total += scores
        if i % 50 == 0:
            ids = torch.tensor([x["prompt_ids"] + x["completion_ids"][i]])
            with torch.no_grad():
                hidden = model.base_model(ids).last_hidden_state[0, len(x["prompt_ids"]) :]
            expected = hidden[x["ends"][i]] @ model.score.weight[0]
            assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert results["eval/score_mean"].item() == pytest.approx(sum(total) / len(total), abs=1e-5)


# ---------------------------------------------------------------- ensembles
def combined(member_scores, **flags):
    """Scores of an ensemble with these scores (members, B)."""
    args = reward_args(",".join(["sort"] * len(member_scores)), **flags)
    members = iter([lambda _, scores=scores: torch.tensor(scores) for scores in member_scores])
    with mock.patch.object(common, "checker_reward", lambda *_: next(members)):
        reward = common.load_reward(args, [], sft.tiny_tokenizer(), CPU)
    rollouts = [{} for _ in member_scores[0]]
    scores = reward(rollouts).tolist()
    kept = torch.stack([rollout["member_scores"] for rollout in rollouts], dim=1)
    torch.testing.assert_close(kept, torch.tensor(member_scores), rtol=0, atol=0, equal_nan=True)
    return scores


def test_ensemble_scores():
    scores = [[1.0, -2.0, 0.0], [3.0, 4.0, 0.0], [5.0, 1.0, 0.0]]
    assert combined(scores) == [3, 1, 0]
    assert combined(scores, combine="min") == [1, -2, 0]
    std = [math.sqrt(8 / 3), math.sqrt(6), 0]
    for coef in (1.0, 0.3):
        result = combined(scores, combine="mean-minus-std", coef=coef)
        assert result == pytest.approx([3 - coef * std[0], 1 - coef * std[1], 0])
    for how in ("mean", "min", "mean-minus-std"):
        # one member alone is unchanged, bit for bit
        assert combined([[0.1, 0.7]], combine=how) == torch.tensor([0.1, 0.7]).tolist()
        # no score if one member has none
        assert math.isnan(combined([[1.0], [math.nan]], combine=how)[0])


@pytest.mark.parametrize(
    "script", [ppo, grpo, rloo, rejection_sampling], ids=lambda script: script.__name__
)
def test_an_ensemble_through_main(script, chain, tmp_path):
    """A reward model, a function and the same model again: metrics, records and the score.

    rejection_sampling.py takes the minimum, the others take the mean."""
    (tmp_path / "long.py").write_text(
        "def long(prompts, completions, rows):\n    return [len(x) / 2 for x in completions]\n"
    )
    scorer = str(chain / "reward_model")
    flags = dict(
        model=str(chain / "sft"),
        reward=f"{scorer},{tmp_path}/long.py:long,{scorer}",
        reward_combine="min" if script is rejection_sampling else "mean",
        output_dir=str(tmp_path / "run"),
        num_generations=4,
        max_completion_length=8,
    )
    if script is rejection_sampling:
        flags |= dict(prompts_per_iteration=6)
    else:
        flags |= dict(prompts_per_step=6, steps=1)
    script.main(script.Args(**flags))
    row = next(row for row in metrics(tmp_path / "run") if "disagreement" in row)
    assert row["score/1"] == row["score/3"] != row["score/2"]
    assert row["disagreement"] > 0
    if script is not rejection_sampling:
        mean = (row["score/1"] + row["score/2"] + row["score/3"]) / 3
        assert row["score"] == pytest.approx(mean, abs=1e-5)
    if script is rejection_sampling:
        lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            for i, text in enumerate(record["completions"]):
                members = [scores[i] for scores in record["member_scores"]]
                assert record["scores"][i] == min(members) and members[1] == len(text) / 2
                assert record["finished"][i] == (record["ids"][i][-1] == 1)


def test_ppo_values_start_from_the_first_of_an_ensemble(chain, tmp_path, monkeypatch):
    paths = []
    load_scorer = ppo.load_scorer

    def spy(path, *args, **options):
        paths.append(path)
        return load_scorer(path, *args, **options)

    monkeypatch.setattr(ppo, "load_scorer", spy)
    scorer = str(chain / "reward_model")
    args = dict(model=str(chain / "sft"), prompts_per_step=4, max_completion_length=6, steps=1)
    ppo.main(ppo.Args(**args, reward=f"{scorer},sort", output_dir=str(tmp_path / "one")))
    ppo.main(ppo.Args(**args, reward=f"sort,{scorer}", output_dir=str(tmp_path / "two")))
    assert paths == [scorer, str(chain / "sft")]


def test_a_missing_member_is_named(chain, tmp_path, refused):
    args = ppo.Args(
        model=str(chain / "sft"),
        reward=f"{chain}/reward_model,runs/nothing",
        max_completion_length=8,
        output_dir=str(tmp_path / "run"),
    )
    refused(["runs/nothing does not exist"], ppo.main, args)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- from rollouts to a reward
def test_rollouts_train_a_reward_model_for_ppo(chain, tmp_path):
    """rollouts.jsonl as it is -> reward_model.py -> ppo.py."""
    (tmp_path / "short.py").write_text(
        "def short(prompts, completions, rows):\n    return [len(x) < 4 for x in completions]\n"
    )
    shared = dict(model=str(chain / "sft"), max_completion_length=8)
    rollouts = tmp_path / "rs"
    rejection_sampling.main(
        rejection_sampling.Args(
            **shared,
            reward=f"{tmp_path}/short.py:short",
            prompts_per_iteration=12,
            output_dir=str(rollouts),
            steps=1,
        )
    )
    for loss in ("outcome", "bradley-terry", "plackett-luce"):
        reward_model.main(
            reward_model.Args(
                model=str(chain / "sft"),
                dataset=str(rollouts / "rollouts.jsonl"),
                loss=loss,
                batch_size=4,
                output_dir=str(tmp_path / loss),
            )
        )
    trained = metrics(tmp_path / "outcome")[-1]
    assert 0 <= trained["label_accuracy"] <= 1 and "accuracy" not in trained
    ppo.main(
        ppo.Args(
            **shared,
            reward=str(tmp_path / "outcome"),
            prompts_per_step=4,
            steps=1,
            output_dir=str(tmp_path / "ppo"),
        )
    )
    assert "score" in metrics(tmp_path / "ppo")[-1]
