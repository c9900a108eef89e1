"""Reward models of more than pairs: rankings, outcomes, steps, and ensembles that use them. What a
step of `main` computes is in test_steps.py; here are data, identities, closed forms and scores."""

import contextlib
import itertools
import json
import math
import random
import types
from fractions import Fraction

import pytest
import torch
from conftest import CPU
from language import PROMPTS, save_start, write_rows
from test_data import letters, load, talk  # noqa: F401 (load: a fixture)
from test_rewards import (  # noqa: F401 (save: a fixture)
    example,
    other_tokenizer,
    refused,  # noqa: F401 (a fixture)
    save,
)
from test_scripts import chain, metrics  # noqa: F401 (chain: a fixture)

import common
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
from reward_model import better_pairs, plackett_luce_loss, weighted_loss

COMPARISON = ("loss", "outcome_tokens", "step_separator")


# ---------------------------------------------------------------- data
def comparisons(load, rows, loss="bradley-terry", kind="comparison", **given):  # noqa: F811
    defaults = dict(loss=loss, outcome_tokens="last", step_separator="\n")
    return load(rows, kind, **defaults | given)


def decoded(examples):
    tokenizer = letters()
    return [[tokenizer.decode(ids) for ids in x["completion_ids"]] for x in examples]


def test_forms_of_comparisons(load):  # noqa: F811
    """Pairs, several completions with scores, and rows of rollouts.jsonl are one form."""
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
    examples = comparisons(load, rows)
    assert decoded(examples) == [
        ["yes[EOS]", "no[EOS]"],
        ["a[EOS]", "bc[EOS]"],  # what has no score is left out
        ["x[EOS]", "xx", "y[EOS]"],  # what was cut has no EOS
    ]
    assert [x["labels"] for x in examples] == [[[1], [0]], [[1], [2.5]], [[1], [0], [0]]]
    assert [x["prompt"] for x in examples] == ["p>", "p>", "q>"]
    assert [x["margin"] for x in examples] == [0.5, 0, 0]
    for x in examples:
        assert x["ends"] == [[len(ids) - 1] for ids in x["completion_ids"]]


def test_completions_may_be_messages(load):  # noqa: F811
    row = {"prompt": talk("hi"), "completions": ["yes", talk("no", first="assistant")]}
    (got,) = comparisons(load, [row | {"scores": [1, 0]}], tokenizer=letters(chat=True))
    assert decoded([got]) == [["yes<|im_end|>", "no<|im_end|>"]]


def test_outcome_reads_every_token_if_asked(load):  # noqa: F811
    row = {"prompt": "p>", "completions": ["ab"], "scores": [1]}
    (last,) = comparisons(load, [row], "outcome")
    (every,) = comparisons(load, [row], "outcome", outcome_tokens="all")
    assert (last["ends"], last["labels"]) == ([[2]], [[1]])
    assert (every["ends"], every["labels"]) == ([[0, 1, 2]], [[1, 1, 1]])


def test_steps_end_at_the_separator_and_at_eos(load):  # noqa: F811
    row = {"prompt": "p\n>", "completions": ["ab", "c", "def"], "labels": [True, 1, False]}
    (got,) = comparisons(load, [row], "process", kind="step")
    assert decoded([got]) == [["ab\nc\ndef[EOS]"]]
    assert got["ends"] == [[2, 4, 8]] and got["labels"] == [[1, 1, 0]]
    (got,) = comparisons(load, [row], "process", kind="step", step_separator=". ")
    assert decoded([got]) == [["ab. c. def[EOS]"]] and got["ends"] == [[3, 6, 10]]


def test_rows_that_say_nothing_are_dropped_and_counted(load, capsys):  # noqa: F811
    good = {"prompt": "p>", "completions": ["a", "b"], "scores": [1, 0]}
    equal = good | {"scores": [2, 2]}
    unknown = good | {"scores": [1, None]}
    assert len(comparisons(load, [good, equal, unknown, equal])) == 1
    assert "3 dropped whose scores are all equal" in capsys.readouterr().out
    # of right and wrong they do say something
    right = good | {"scores": [1, 1]}
    assert len(comparisons(load, [good, right, unknown], "outcome")) == 3
    nothing = good | {"scores": [None, None]}
    assert len(comparisons(load, [good, nothing], "outcome")) == 1
    assert "1 dropped without a score" in capsys.readouterr().out
    step = {"prompt": "p>", "completions": ["a", "b"], "labels": [1, 0]}
    inside = step | {"completions": ["a\nb", "c"]}
    assert len(comparisons(load, [step, inside], "process", kind="step")) == 1
    assert "1 dropped whose steps contain --step-separator" in capsys.readouterr().out


BAD = {  # change of a good row, --loss, words
    "unequal lengths": ({"scores": [1]}, "bradley-terry", ["`completions` has 2", "`scores` 1"]),
    "one completion": ({"completions": ["a"], "scores": [1]}, "plackett-luce", ["compares"]),
    "no list": ({"completions": "ab"}, "bradley-terry", ["`completions`", "list"]),
    "scores are text": ({"scores": ["1", "0"]}, "bradley-terry", ["`scores`", "numbers", "'1'"]),
    "no scores": ({"scores": None}, "bradley-terry", ["`scores` must be a list"]),
    "not right or wrong": ({"scores": [0.5, 1]}, "outcome", ["scores", "0 and 1", "0.5"]),
    "a completion is a number": ({"completions": ["a", 3]}, "bradley-terry", ["`completions`"]),
    "finished is short": ({"finished": [True]}, "bradley-terry", ["`finished` 1"]),
    "labels are of steps": ({"scores": ..., "labels": [1, 0]}, "outcome", ["--loss process"]),
    "scores are not of steps": ({}, "process", ["`labels` must be a list"]),
    "labels are not 0 or 1": ({"labels": [1, 0.5]}, "process", ["`labels`", "0.5"]),
    "steps are no texts": ({"completions": [1, 2], "labels": [1, 0]}, "process", ["steps"]),
    "margin": ({"margin": 1.0}, "bradley-terry", ["`margin`", "pairs"]),
}


@pytest.mark.parametrize("change, loss, words", BAD.values(), ids=BAD)
def test_bad_comparisons(load, capsys, change, loss, words):  # noqa: F811
    good = {"prompt": "p>", "completions": ["a", "b"], "scores": [1, 0]}
    row = {name: value for name, value in (good | change).items() if value is not ...}
    kind = "step" if loss == "process" else "comparison"
    first = good | {"labels": [1, 0]} if loss == "process" else good
    with pytest.raises(SystemExit) as stopped:
        comparisons(load, [first, row], loss, kind=kind)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "line 2: " in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("loss", ["plackett-luce", "outcome"])
def test_a_margin_is_for_bradley_terry(load, capsys, loss):  # noqa: F811
    row = {"prompt": "p>", "chosen": "a", "rejected": "b", "margin": 1.0}
    with pytest.raises(SystemExit):
        comparisons(load, [row], loss)
    assert "`margin` is for --loss bradley-terry alone" in capsys.readouterr().err


# ---------------------------------------------------------------- identities
def scored_batch(labels, seed=1, lengths=None):
    """Prompts whose completions have these labels -> a score_batch, and scores (B, T) float64 at
    its last tokens."""
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


def test_of_two_plackett_luce_is_bradley_terry():
    _, batch, scores = scored_batch([[1.0, 0.0]] * 7)
    losses = [weighted_loss(scores, batch, name) for name in ("bradley-terry", "plackett-luce")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_pairs_are_what_they_were_bit_for_bit():
    """K = 2: the mean of -log sigmoid over pairs side by side, as it was before there was K."""
    _, batch, scores = scored_batch([[1.0, 0.0]] * 7)
    scores = scores.detach().float()
    read = scores.sum(1)
    weights = torch.full((7,), 1 / 7)
    before = (weights * -torch.nn.functional.logsigmoid(read[0::2] - read[1::2])).sum()
    assert torch.equal(weighted_loss(scores, batch, "bradley-terry"), before)


def test_all_pairs_are_the_mean_of_their_pairs():
    """Of each prompt: its gradient is the mean of those of its pairs, each as a prompt of its own;
    one with many completions counts as much as one with two."""
    labels = [[3.0, 1.0, 2.0, 2.0], [0.0, 1.0]]
    _, batch, scores = scored_batch(labels)
    (gradient,) = torch.autograd.grad(weighted_loss(scores, batch, "bradley-terry"), scores)
    read = reward_model.at_last_token(scores, batch)
    total = 0.0
    first = 0
    for prompt_labels in labels:
        n = range(len(prompt_labels))
        pairs = [(i, j) for i in n for j in n if prompt_labels[i] > prompt_labels[j]]
        for i, j in pairs:
            loss = -torch.nn.functional.logsigmoid(read[first + i] - read[first + j])
            total = total + loss / len(pairs) / len(labels)
        first += len(prompt_labels)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, scores)[0])


def test_plackett_luce_is_the_probability_of_the_ranking():
    """Against all permutations: they sum to 1, and each is the product over ranks."""
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    group = torch.zeros(4)
    total = 0.0
    for order in itertools.permutations(range(4)):  # best first
        labels = torch.tensor([4.0 - order.index(i) for i in range(4)])
        ours = (-plackett_luce_loss(scores, labels, group).sum()).exp()
        worth = scores.exp()
        left = list(order)
        product = 1.0
        while left:
            product *= worth[left[0]] / worth[left].sum()
            left.pop(0)
        assert ours.item() == pytest.approx(product.item(), rel=1e-12)
        total += ours.item()
    assert total == pytest.approx(1, rel=1e-12)


def test_ties_of_plackett_luce():
    """Two that share the first rank: each against itself and what is below, not against the other;
    two that share the last say nothing."""
    scores = torch.tensor([1.0, 2.0, 0.5, -0.5], dtype=torch.float64)
    losses = plackett_luce_loss(scores, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.zeros(4))
    below = scores[2:].exp().sum()
    for i in (0, 1):
        expected = -(scores[i].exp() / (scores[i].exp() + below)).log()
        assert losses[i].item() == pytest.approx(expected.item())
    assert losses[2:].tolist() == [0, 0]


@pytest.mark.parametrize("loss", ["bradley-terry", "plackett-luce", "outcome"])
def test_order_changes_nothing(loss):
    """Neither that of a prompt's completions, equal ones among them, nor that of prompts."""
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
    """A model of random weights, and worths of answers of one and of two letters: 1, 2 or 4."""
    folder = tmp_path_factory.mktemp("comparisons")
    tokenizer = save_start(f"{folder}/start", seed=1)
    draw = random.Random(2)
    texts = ["a", "b", "c", *(x + y for x in "abc" for y in "abc")]
    worth = {(prompt, text): draw.choice([1, 2, 4]) for prompt in PROMPTS for text in texts}
    return types.SimpleNamespace(
        folder=folder, start=f"{folder}/start", tokenizer=tokenizer, texts=texts, worth=worth
    )


def train(world, name, rows, **flags):
    """reward_model.py's main on these rows -> the model."""
    defaults = dict(
        model=world.start,
        dataset=write_rows(world.folder / f"{name}.jsonl", rows),
        output_dir=str(world.folder / name),
        learning_rate=3e-3,
        save_every=0,
        log_every=10**6,
    )
    reward_model.main(reward_model.Args(**defaults | flags))
    return common.load_scorer(defaults["output_dir"], CPU, "--reward")


def ids_of(world, text):
    return world.tokenizer.convert_tokens_to_ids(list(text)) + [world.tokenizer.eos_token_id]


def score_of(world, model, prompt, text):
    """By transformers' own class."""
    ids = ids_of(world, prompt)[:-1] + ids_of(world, text)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def rankings(world):
    """Triples of answers in every order, as often as Plackett and Luce have it, exactly -> worths
    (1 or 2) of six answers to each of two prompts, rows."""
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
    """Their logs, up to a constant for each prompt. All pairs of rankings that Plackett and Luce
    drew are Bradley and Terry's pairs."""
    worths, rows = rankings(world)
    flags = dict(loss=loss, batch_size=60, epochs=60, learning_rate=5e-3)
    model = train(world, loss, rows, **flags)
    scores = []
    logs = []
    for prompt, worth in worths.items():
        row = torch.tensor([score_of(world, model, prompt, text) for text in worth])
        scores.append(row - row.mean())
        row = torch.tensor(list(worth.values())).log()
        logs.append(row - row.mean())
    scores = torch.cat(scores)
    logs = torch.cat(logs)
    assert torch.corrcoef(torch.stack([scores, logs]))[0, 1] > 0.999
    assert abs((scores @ logs) / (logs @ logs) - 1) < 0.02


@pytest.mark.parametrize("outcome_tokens", ["last", "all"])
def test_outcome_ends_at_the_log_odds_of_being_right(outcome_tokens, world):
    """An answer of worth w is right w times in five. At a token before the last it is that of all
    answers that begin so."""
    rows = []
    for (prompt, text), worth in world.worth.items():
        right = [1] * worth + [0] * (5 - worth)
        rows.append({"prompt": prompt, "completions": [text] * 5, "scores": right})
    flags = dict(loss="outcome", outcome_tokens=outcome_tokens, batch_size=len(rows), epochs=150)
    model = train(world, f"outcome {outcome_tokens}", rows, **flags)
    for (prompt, text), worth in world.worth.items():
        score = score_of(world, model, prompt, text)
        assert score == pytest.approx(math.log(worth / (5 - worth)), abs=0.05)
    if outcome_tokens == "all":
        batch = {"attention_mask": None}
        for prompt in PROMPTS:
            ids = torch.tensor([ids_of(world, prompt)[:-1] + ids_of(world, "a")[:-1]])
            batch = {"inputs": ids, "attention_mask": torch.ones_like(ids)}
            begins = [world.worth[prompt, text] for text in world.texts if text[0] == "a"]
            share = sum(begins) / 5 / len(begins)
            score = reward_model.sequence_scores(model, batch).item()
            assert score == pytest.approx(math.log(share / (1 - share)), abs=0.05)


def test_process_ends_at_the_log_odds_of_each_step(world, capsys):
    """Two steps with d between them; the saved model then scores by the worse one."""
    rows = []
    answers = [(prompt, x, y) for prompt in PROMPTS for x in "abc" for y in "abc"]
    for prompt, x, y in answers:
        first = world.worth[prompt, x]
        second = world.worth[prompt, x + y]
        for i in range(5):
            labels = [i < first, i < second]
            rows.append({"prompt": prompt, "completions": [x, y], "labels": labels})
    flags = dict(loss="process", step_separator="d", batch_size=len(rows), epochs=150)
    train(world, "process", rows, **flags)
    reward = common.RewardModel(
        str(world.folder / "process"),
        types.SimpleNamespace(micro_batch_tokens=100, max_completion_length=5),
        [],
        world.tokenizer,
        eos_ids=[world.tokenizer.eos_token_id],
        device=CPU,
        autocast=contextlib.nullcontext,
    )
    examples = [{"prompt": p, "prompt_ids": ids_of(world, p)[:-1]} for p, _, _ in answers]
    completions = [ids_of(world, f"{x}d{y}") for _, x, y in answers]
    for (prompt, x, y), score in zip(answers, reward(examples, completions)):
        worst = min(world.worth[prompt, x], world.worth[prompt, x + y])
        assert score.exp().item() == pytest.approx(worst / 5, abs=0.02)


# ---------------------------------------------------------------- a process reward model's scores
@pytest.mark.parametrize("theirs", ["same", "other", "chat"])
def test_a_process_reward_is_its_worst_step(theirs, save):  # noqa: F811
    """In the policy's tokens or its own; of a completion that was cut the steps that have ended.
    Line breaks of the prompt end no step."""
    policy = other_tokenizer(chat=theirs == "chat")
    tokenizer = letters(chat=theirs == "chat") if theirs != "same" else policy
    path = save(tokenizer, step_separator="\n", vocab_size=128)
    eos_ids = [common.end_of_turn_id(policy)]
    prompt = talk("a\nb?") if theirs == "chat" else "a\nb?"
    asked = example(policy, prompt)
    texts = ["x\nyz\n\nw", "x", "xy\n", "\n\nx\ny"]
    completions = [policy(text, add_special_tokens=False).input_ids for text in texts]
    completions = [ids + eos_ids for ids in completions] + completions[:1]
    scorer = common.RewardModel(
        path,
        types.SimpleNamespace(micro_batch_tokens=64, max_completion_length=20),
        [asked],
        policy,
        eos_ids=eos_ids,
        device=CPU,
        autocast=contextlib.nullcontext,
    )
    got = scorer([asked] * 5, completions)
    steps = [["x", "yz", "w"], ["x"], ["xy"], ["x", "y"], ["x", "yz"]]
    for ids, wanted, score in zip(completions, steps, got):
        sequence = scorer.ids_of(asked, ids)
        mask = scorer.mask_of(asked, sequence)
        assert sum(mask) == len(wanted) and mask[-1] == int(ids[-1] in eos_ids)
        # each step ends behind its last letter, at its line break or at the end
        text = [tokenizer.decode([token]) for token in sequence]
        for t in [t for t in range(len(mask) - 1) if mask[t]]:
            assert text[t] == "\n" and text[t - 1] == wanted.pop(0)[-1]
        with torch.no_grad():
            hidden = scorer.model.base_model(torch.tensor([sequence])).last_hidden_state[0]
        scores = hidden[torch.tensor(mask).bool()] @ scorer.model.score.weight[0]
        assert score.item() == pytest.approx(torch.sigmoid(scores).log().min().item(), abs=1e-5)


# ---------------------------------------------------------------- ensembles
def combined(member_scores, **flags):
    args = types.SimpleNamespace(**dict(reward_combine="mean", reward_std_coef=1.0) | flags)
    return ppo.combine_scores(torch.tensor(member_scores), args).tolist()


def test_combine_scores():
    scores = [[1.0, -2.0, 0.0], [3.0, 4.0, 0.0], [5.0, 1.0, 0.0]]
    assert combined(scores) == [3, 1, 0]
    assert combined(scores, reward_combine="min") == [1, -2, 0]
    spread = [math.sqrt(8 / 3), math.sqrt(6), 0]
    for coef in (1.0, 0.3):
        got = combined(scores, reward_combine="mean-minus-std", reward_std_coef=coef)
        assert got == pytest.approx([3 - coef * spread[0], 1 - coef * spread[1], 0])
    for how in ("mean", "min", "mean-minus-std"):  # one alone is itself, bit for bit
        assert combined([[0.1, 0.7]], reward_combine=how) == torch.tensor([0.1, 0.7]).tolist()
        # what one member cannot judge, the ensemble cannot
        assert math.isnan(combined([[1.0], [math.nan]], reward_combine=how)[0])


@pytest.mark.parametrize(
    "script", [ppo, grpo, rloo, rejection_sampling], ids=lambda script: script.__name__
)
def test_an_ensemble_through_main(script, chain, tmp_path):  # noqa: F811
    """A reward model, a checker of one's own and the same model again: what each says, their
    spread, and the mean of them (rejection_sampling: the lowest) as the score."""
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


def test_ppo_values_start_from_the_first_of_an_ensemble(chain, tmp_path, monkeypatch):  # noqa: F811
    loaded = []
    load_scorer = ppo.load_scorer

    def spy(path, *args, **more):
        loaded.append(path)
        return load_scorer(path, *args, **more)

    monkeypatch.setattr(ppo, "load_scorer", spy)
    scorer = str(chain / "reward_model")
    args = dict(model=str(chain / "sft"), prompts_per_step=4, max_completion_length=6, steps=1)
    ppo.main(ppo.Args(**args, reward=f"{scorer},sort", output_dir=str(tmp_path / "one")))
    ppo.main(ppo.Args(**args, reward=f"sort,{scorer}", output_dir=str(tmp_path / "two")))
    assert loaded == [scorer, str(chain / "sft")]


def test_a_member_that_is_not_there_is_named(chain, tmp_path, refused):  # noqa: F811
    args = ppo.Args(
        model=str(chain / "sft"),
        reward=f"{chain}/reward_model,runs/nothing",
        max_completion_length=8,
        output_dir=str(tmp_path / "run"),
    )
    refused(["--reward runs/nothing"], ppo.main, args)
    assert not (tmp_path / "run").exists()


def test_overwrite_moves_no_member(chain, tmp_path, refused):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text("{}")
    (folder / "reward.py").write_text("")
    args = ppo.Args(
        model=str(chain / "sft"),
        reward=f"sort,{folder}/reward.py:f",
        output_dir=str(folder),
        overwrite=True,
    )
    refused(["--reward", "lies in --output-dir"], ppo.main, args)


def test_overwrite_moves_no_member_of_the_home_folder(chain, tmp_path, refused, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    (tmp_path / "run/reward.py").write_text("")
    args = ppo.Args(
        model=str(chain / "sft"),
        reward="sort,~/run/reward.py:f",
        output_dir=str(tmp_path / "run"),
        overwrite=True,
    )
    refused(["--reward", "lies in --output-dir"], ppo.main, args)


def test_top1_of_ties_is_their_mean(chain):  # noqa: F811
    """Else a model that gives all the same score would seem perfect on pairs, whose chosen answer
    comes first."""
    model = common.load_scorer(str(chain / "reward_model"), CPU, "--model")
    with torch.no_grad():
        model.score.weight.zero_()
    args = reward_model.Args(dataset="sort", micro_batch_tokens=1000)
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    examples = common.load_examples("sort", reward_model.comparison_example, tokenizer, args)
    metrics, _ = reward_model.evaluate_scores(
        model, examples, tokenizer=tokenizer, args=args, autocast=contextlib.nullcontext
    )
    assert metrics["eval/accuracy"] == metrics["eval/top1_accuracy"] == 0.5


# ---------------------------------------------------------------- from rollouts to a reward
def test_rollouts_train_a_reward_model_that_ppo_takes(chain, tmp_path):  # noqa: F811
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
