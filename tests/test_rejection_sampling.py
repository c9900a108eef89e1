"""rejection_sampling.py: selection, best-of-N against brute force, resuming; then main."""

import functools
import itertools
import json
import math
import os
import signal
import types

import pytest
import torch
import transformers
from conftest import CPU
from language import write_rows

import common
import rejection_sampling as rs
import sft

NAN = math.nan
BOOK = [
    [0.7, 0.3, 0.5, 0.2],
    [0.4, 0.8, 0.6, 0.5],
    [0.9, 0.3, 0.4, 0.7],
    [0.2, 0.5, 0.8, 0.6],
    [0.5, 0.4, 0.3, 0.6],
]


# ---------------------------------------------------------------- selection
def test_worked_example_of_the_book():
    """It prints 19 for the last of the five, but index 19 holds 0.6 and index 11 holds 0.7."""
    rewards = torch.tensor(BOOK)
    assert (rs.select_top_per_prompt(rewards) + 1).tolist() == [1, 2, 1, 3, 4]
    assert rs.select_top_k(rewards, 5).tolist() == [8, 5, 14, 0, 11]


def test_ties_and_missing_scores():
    rewards = torch.tensor([[NAN, 1.0, 1.0], [NAN, NAN, NAN], [-5.0, NAN, -7.0], [1.0, 0.0, 1.0]])
    assert rs.select_top_per_prompt(rewards).tolist() == [1, -1, 0, 0]
    assert rs.select_top_k(rewards, 5).tolist() == [1, 2, 9, 11, 10]
    assert rs.select_top_k(rewards, 7).tolist() == [1, 2, 9, 11, 10, 6, 8]
    many = torch.ones(40, 50)  # ties go to the lower index, however many
    assert rs.select_top_k(many, 100).tolist() == list(range(100))
    assert not rs.select_top_per_prompt(many).any()


# ---------------------------------------------------------------- best of N
def test_best_of_n_against_all_subsets():
    draw = torch.Generator().manual_seed(1)
    for n in (1, 2, 5, 8):
        scores = torch.randint(4, (n,), generator=draw).float()  # ties
        values = torch.rand(n, generator=draw)
        for ours, what in (
            (rs.best_of_n(scores, scores), scores),
            (rs.best_of_n(scores, values), values),
        ):
            assert list(ours) == [N for N in (1, 2, 4, 8) if N <= n]
            for N, mean in ours.items():
                subsets = list(itertools.combinations(range(n), N))
                picked = [max(subset, key=lambda i: (scores[i].item(), -i)) for subset in subsets]
                assert mean == pytest.approx(
                    sum(what[i].item() for i in picked) / len(subsets), rel=1e-5
                )


def test_best_of_n_of_many():
    """The number of subsets is beyond any float."""
    curve = rs.best_of_n(torch.arange(1100.0), torch.full((1100,), 100.0))
    assert curve == pytest.approx({2**i: 100.0 for i in range(11)})


def test_best_of_n_metrics():
    """Rows that lack a score are in no mean, so that the same prompts are behind each N."""
    scores = torch.tensor(
        [
            [0.0, 1.0, 2.0, 3.0],
            [NAN, 1.0, NAN, 9.0],
            [1.0, 1.0, 1.0, 1.0],
            [NAN] * 4,
        ]
    )
    gold = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
            [1.0] * 4,
        ]
    )
    metrics = rs.best_of_n_metrics(scores, scores, "score")
    assert metrics["best_of_1/score"] == pytest.approx((1.5 + 1) / 2)
    assert metrics["best_of_2/score"] == pytest.approx((14 / 6 + 1) / 2)
    assert metrics["best_of_4/score"] == 2.0
    assert metrics["best_of_4/kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    metrics = rs.best_of_n_metrics(scores, gold, "gold")
    assert metrics["best_of_4/gold"] == 0.0
    # with equal scores the first is taken
    assert metrics["best_of_2/gold"] == pytest.approx(2 / 6 / 2)
    assert rs.best_of_n_metrics(scores[1:2], scores[1:2], "score") == {}


# ---------------------------------------------------------------- what a run selects
def choose(rewards, ids=None, iteration=0, **changes):
    """select() with these flags; without ids all completions are different."""
    rewards = torch.tensor(rewards)
    M, N = rewards.shape
    ids = ids or [[[row * N + column] for column in range(N)] for row in range(M)]
    flags = dict(select="top-per-prompt", select_k=None, min_score=None, seed=1) | changes
    return rs.select(rewards, ids, iteration, types.SimpleNamespace(**flags))


HOLES = [
    [NAN, 2.0, 5.0, 5.0],
    [NAN, NAN, NAN, NAN],
    [1.0, 0.0, NAN, -2.0],
    [4.0, 4.0, 4.0, 4.0],
]


def test_select_per_prompt():
    """The best of each row, or one at random: of those with a score of --min-score at least."""
    assert choose(HOLES) == [(0, 2), (2, 0), (3, 0)]
    assert choose(HOLES, min_score=4.0) == [(0, 2), (3, 0)]
    drawn = [
        choose(HOLES, select="random-per-prompt", iteration=i, min_score=0.0) for i in range(60)
    ]
    assert all([row for row, _ in pairs] == [0, 2, 3] for pairs in drawn)
    pairs = {pair for pairs in drawn for pair in pairs}
    assert pairs == {(0, 1), (0, 2), (0, 3), (2, 0), (2, 1), *((3, i) for i in range(4))}
    assert choose(HOLES, select="random-per-prompt", iteration=7, min_score=0.0) == drawn[7]


def test_select_of_all():
    """The k best, or as many at random of those with a score of --min-score at least."""
    assert choose(HOLES, select="top-k", select_k=4) == [(0, 2), (0, 3), (3, 0), (3, 1)]
    drawn = [
        choose(HOLES, select="random-k", select_k=3, min_score=0.0, iteration=i) for i in range(60)
    ]
    assert all(len(set(pairs)) == 3 for pairs in drawn)
    usable = {(row, i) for row in range(4) for i in range(4) if HOLES[row][i] >= 0}
    assert {pair for pairs in drawn for pair in pairs} == usable
    counts = [sum(pair in pairs for pairs in drawn) for pair in usable]
    assert min(counts) > 60 * 3 / len(usable) / 3, "each is as likely as any other"


def test_of_equal_completions_of_a_row_the_first_is_selected():
    """Of one row; the same ids are something else after another prompt."""
    ids = [[[7], [7], [8], [7]], [[7], [8], [8], [9]]]
    assert rs.distinct(torch.tensor([3, 1, 4, 6, 5, 2]), ids) == [(0, 3), (1, 0), (1, 2), (0, 2)]
    rewards = [[3.0, 3.0, 1.0, 3.0], [3.0, 2.0, 2.0, 0.0]]
    top = choose(rewards, ids, select="top-k", select_k=6)
    assert top == [(0, 0), (1, 0), (1, 1)], "six, of which three are repeats"
    for iteration in range(20):
        control = choose(rewards, ids, iteration, select="random-k", select_k=6)
        assert len(control) == 3, "the control is as many, whatever was repeated"
        assert len({(row, *ids[row][column]) for row, column in control}) == 3
    assert choose(rewards, ids) == [(0, 0), (1, 0)], "one a row stays one a row"


# ---------------------------------------------------------------- through main
@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a policy and a reward model of random weights; the built-in data is small."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = sft.tiny_tokenizer()
    config = sft.tiny_config(tokenizer)
    for name, value in dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2).items():
        setattr(config, name, value)
    config.initializer_range = 0.1
    for name, cls in [
        ("policy", transformers.LlamaForCausalLM),
        ("reward_model", transformers.LlamaForSequenceClassification),
    ]:
        torch.manual_seed(0)
        config.num_labels = 1
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "TASK_ROWS", {"prompt": 128, "held out": 16})
        yield folder


@pytest.fixture(autouse=True)
def signals():
    """A run that ends in the middle leaves its own handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_args(start, output_dir, **changes):
    flags = dict(
        model=str(start / "policy"),
        reward=str(start / "reward_model"),
        output_dir=str(output_dir),
        num_generations=4,
        max_completion_length=6,
        prompts_per_iteration=10,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    return rs.Args(**flags | changes)


def checker(tmp_path, body):
    """A file with a checker; `body` computes `scores` from prompts, completions and rows."""
    path = tmp_path / "reward.py"
    path.write_text(f"def f(prompts, completions, rows):\n    {body}\n    return scores\n")
    return f"{path}:f"


def read_log(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def training_rows(folder):
    """Lines of metrics.jsonl after the one of step 0."""
    return [row for row in read_log(folder) if "loss" in row]


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def trained_on(monkeypatch):
    """What main trains on: (prompt, completion) ids of every step."""
    steps = []
    inner = rs.completion_batch

    def recorder(prompts, completions, device):
        if len(prompts) <= 8:  # (evaluations are larger)
            pairs = zip(map(tuple, prompts), map(tuple, completions))
            steps.append(list(pairs))
        return inner(prompts, completions, device)

    monkeypatch.setattr(rs, "completion_batch", recorder)
    return steps


# a score for none of the first prompt's three, and for most of the others'
HALF = (
    "scores = [float(len(set(t))) if i > 2 and i % 5 else None for i, t in enumerate(completions)]"
)


def test_what_is_selected_is_trained(start, tmp_path, monkeypatch, capsys):
    """Each selected completion once an epoch; the first loss is their mean NLL over all tokens."""
    steps = trained_on(monkeypatch)
    args = dict(reward=checker(tmp_path, HALF), prompts_per_iteration=16, epochs=2)
    rs.main(run_args(start, tmp_path / "run", num_generations=3, micro_batch_tokens=40, **args))
    tokenizer = common.load_tokenizer(str(start / "policy"))
    expected = []
    for record in read_log(tmp_path / "run", "rollouts"):
        known = [x for x in record["scores"] if x is not None]
        if known:
            best = record["ids"][record["scores"].index(max(known))]
            expected.append((tuple(tokenizer(record["row"]["prompt"]).input_ids), tuple(best)))
    trained = [pair for pairs in steps for pair in pairs]
    assert len(expected) == 15
    assert sorted(trained[: len(expected)]) == sorted(trained[len(expected) :]) == sorted(expected)
    said = capsys.readouterr().out
    assert f"{len(expected)} of 48 completions selected; {16 - len(expected)} of 16 prompts" in said

    policy = common.load_policy(str(start / "policy"), CPU).double()
    nll = []
    for prompt, completion in steps[0]:
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        nll += [-logits.log_softmax(-1)[t, i].item() for t, i in enumerate(completion)]
    first = training_rows(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_rows_are_not_merged_across_repeats_of_a_prompt(start, tmp_path, monkeypatch):
    """Two rows of data, sampled five times each: ten rows are trained, whatever they say."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "ba>"}\n{"prompt": "dc>"}\n')
    steps = trained_on(monkeypatch)
    reward = checker(tmp_path, "scores = [float(t > 'd') for t in completions]")
    args = dict(dataset=str(data), reward=reward, num_generations=8, max_completion_length=1)
    rs.main(run_args(start, tmp_path / "run", **args))
    trained = [pair for pairs in steps for pair in pairs]
    assert len(trained) == 10 > len(set(trained))


def test_chunks_of_prompts_draw_from_streams_of_their_own(start, tmp_path):
    """A hundred rows of one prompt: the second chunk does not repeat the first."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "dbca>"}\n' * 100)
    reward = checker(tmp_path, "scores = [1.0] * len(prompts)")
    args = dict(dataset=str(tmp_path / "prompts.jsonl"), reward=reward, steps=1)
    rs.main(run_args(start, tmp_path / "run", prompts_per_iteration=100, **args))
    ids = [record["ids"] for record in read_log(tmp_path / "run", "rollouts")]
    assert ids[:36] != ids[64:]


def test_scores_and_best_of_n_are_logged(start, tmp_path):
    rs.main(run_args(start, tmp_path / "run"))
    first = training_rows(tmp_path / "run")[0]
    assert {"best_of_4/gold", "best_of_4/kl_bound", "gold", "selected_gold"} <= first.keys()
    assert first["best_of_4/score"] > first["best_of_1/score"]
    assert first["best_of_1/score"] == pytest.approx(first["score"], rel=1e-5)
    assert first["selected_score"] == pytest.approx(first["best_of_4/score"], rel=1e-4)
    records = read_log(tmp_path / "run", "rollouts")
    scores = [score for record in records for score in record["scores"]]
    assert first["score"] == pytest.approx(sum(scores) / 40, rel=1e-5)


def test_rollouts_hold_each_completions_own_numbers(start, tmp_path, monkeypatch):
    def length(examples, completions):
        return torch.tensor([float(len(ids)) for ids in completions])

    def gold(examples, completions):
        return length(examples, completions) / 8

    monkeypatch.setattr(rs, "load_rewards", lambda *args, **kwargs: [length])
    monkeypatch.setattr(rs, "load_gold", lambda *args: gold)
    rs.main(run_args(start, tmp_path / "run", steps=1))
    records = read_log(tmp_path / "run", "rollouts")
    assert len({len(ids) for record in records for ids in record["ids"]}) > 1
    for record in records:
        lengths = [len(ids) for ids in record["ids"]]
        assert record["scores"] == lengths
        assert record["gold"] == [n / 8 for n in lengths]
        assert record["solve_rate"] == pytest.approx(sum(record["gold"]) / len(lengths))


def test_iterations_sample_from_the_policy_of_the_one_before(start, tmp_path):
    reward = checker(tmp_path, "scores = [float(t.count('a')) for t in completions]")
    args = dict(iterations=3, prompts_per_iteration=48, num_generations=8, epochs=4)
    rs.main(run_args(start, tmp_path / "run", reward=reward, learning_rate=5e-3, **args))
    rows = [row for row in training_rows(tmp_path / "run") if "score" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    means = [row["score"] for row in rows]
    assert means[0] + 0.3 < means[1] < means[2], means
    prompts = {record["row"]["prompt"] for record in read_log(tmp_path / "run", "rollouts")}
    assert len(prompts) > 60, "other prompts in each iteration"


# ---------------------------------------------------------------- resuming
IN_TWO = dict(reward="sort", iterations=2, prompts_per_iteration=70, num_generations=2)
IN_TWO |= dict(batch_size=16, save_every=3, steps=8)  # of 10


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    rs.main(run_args(start, folder, **IN_TWO))
    return folder


class Broken(Exception):
    """What ends a run in the middle."""


def break_rollouts(monkeypatch, call, action):
    """Do that at the call of sample() for a rollout with that number."""
    inner = rs.sample
    calls = []

    def sample(model, prompts, **kwargs):
        if len(prompts) in (64, 6):  # (an evaluation has 16)
            calls.append(len(prompts))
            if len(calls) == call:
                action()
        return inner(model, prompts, **kwargs)

    monkeypatch.setattr(rs, "sample", sample)


def fail_now():
    raise Broken


def test_rollouts_of_other_data_are_not_taken(start, tmp_path, monkeypatch, capsys):
    """A stop in the first rollouts, before any checkpoint, and --resume with other prompts."""
    with monkeypatch.context() as patch:
        break_rollouts(patch, 2, fail_now)
        with pytest.raises(Broken):
            rs.main(run_args(start, tmp_path / "run", **IN_TWO))
    rollouts = (tmp_path / "run/rollouts.jsonl").read_text()
    assert rollouts and not (tmp_path / "run/checkpoint/state.pt").exists()
    with pytest.raises(SystemExit):
        rs.main(run_args(start, tmp_path / "run", **IN_TWO, resume=True, seed=2))
    assert "data, their order or start model differ" in capsys.readouterr().err
    assert (tmp_path / "run/rollouts.jsonl").read_text() == rollouts


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(seed=2), "their order"),
        (dict(prompts_per_iteration=69), "their order"),
        (dict(num_generations=3), "--num-generations 3"),
    ],
)
def test_rollouts_of_other_flags_are_not_taken(  # noqa: PLR0917
    changes, words, start, tmp_path, monkeypatch, capsys
):
    """Another order of the same rows would pair prompts with the completions of others."""
    rows = common.task_rows("prompt", held_out=False, seed=1)
    flags = IN_TWO | dict(dataset=write_rows(tmp_path / "rows.jsonl", rows))
    with monkeypatch.context() as patch:
        break_rollouts(patch, 2, fail_now)
        with pytest.raises(Broken):
            rs.main(run_args(start, tmp_path / "run", **flags))
    rollouts = (tmp_path / "run/rollouts.jsonl").read_text()
    assert rollouts
    with pytest.raises(SystemExit):
        rs.main(run_args(start, tmp_path / "run", **flags | changes, resume=True))
    assert words in capsys.readouterr().err
    assert (tmp_path / "run/rollouts.jsonl").read_text() == rollouts
    rs.main(run_args(start, tmp_path / "run", **flags, resume=True))


@pytest.mark.parametrize("where", ["first", "sampling", "writing", "signal", "training"])
def test_resume_is_exact(start, whole, tmp_path, monkeypatch, where):
    """A stop in the first iteration's rollouts, in the second's, in the middle of a line, by a
    signal, or in training."""
    args = functools.partial(run_args, start, tmp_path / "run", **IN_TWO)
    file = tmp_path / "run/rollouts.jsonl"
    log = common.Run.log

    def broken_log(run, step, metrics, show=()):
        log(run, step, metrics, show)
        if step == 7:
            fail_now()

    with monkeypatch.context() as patch:
        if where == "training":
            patch.setattr(common.Run, "log", broken_log)
        elif where == "signal":
            break_rollouts(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        else:
            break_rollouts(patch, 2 if where == "first" else 4, fail_now)
        with pytest.raises(SystemExit if where == "signal" else Broken) as stopped:
            rs.main(args())
    if where == "signal":
        assert stopped.value.code == 128 + signal.SIGINT
    if where == "writing":
        text = file.read_text()
        file.write_text(text[: len(text) - 700])
    if where != "training":
        left = file.read_text()
        assert 0 < len(left) < len((whole / "rollouts.jsonl").read_text())
    rs.main(args(resume=True))

    assert file.read_text() == (whole / "rollouts.jsonl").read_text()
    theirs = weights(tmp_path / "run")
    assert all(torch.equal(value, theirs[key]) for key, value in weights(whole).items())
    clock = {"tokens_per_second", "seconds/sample", "seconds/train"}
    logs = [
        [{key: row[key] for key in row.keys() - clock} for row in read_log(folder)]
        for folder in (whole, tmp_path / "run")
    ]
    assert logs[0] == logs[1]
    assert read_log(whole, "samples") == read_log(tmp_path / "run", "samples")


def test_rollouts_from_before_a_stop_are_not_sampled_again(start, tmp_path, monkeypatch):
    asked = []
    inner = rs.sample
    with monkeypatch.context() as patch:
        break_rollouts(patch, 2, fail_now)
        with pytest.raises(Broken):
            rs.main(run_args(start, tmp_path / "run", **IN_TWO))
    monkeypatch.setattr(
        rs, "sample", lambda m, prompts, **k: asked.append(len(prompts)) or inner(m, prompts, **k)
    )
    rs.main(run_args(start, tmp_path / "run", **IN_TWO | dict(steps=1), resume=True))
    assert [number for number in asked if number != 16] == [6]


# ---------------------------------------------------------------- training and evaluation
def test_the_schedule_starts_again_and_ends_at_zero(start, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "ba>", "answer": "ab"}\n')
    for steps in (None, 3):
        args = dict(iterations=2, prompts_per_iteration=16, steps=steps, reward="sort")
        rs.main(run_args(start, tmp_path / str(steps), dataset=str(data), **args))
        rates = [row["learning_rate"] for row in read_log(tmp_path / str(steps))]
        assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4][:steps])


def test_temperature_is_of_sampling_and_of_the_kl_and_not_of_training(start, tmp_path, monkeypatch):
    temperatures = []
    inner = rs.token_logprobs
    asked = []
    sample = rs.sample
    keys = []
    generator = rs.generator

    def logprobs(model, batch, temperature=1.0):
        temperatures.append((temperature, torch.is_grad_enabled()))
        return inner(model, batch, temperature)

    def recorder(*args, **kwargs):
        asked.append((len(args[1]), kwargs["temperature"]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(rs, "token_logprobs", logprobs)
    monkeypatch.setattr(rs, "sample", recorder)
    monkeypatch.setattr(rs, "generator", lambda *key: keys.append(key) or generator(*key))
    args = dict(reward="sort", temperature=0.7, iterations=2, select="random-per-prompt")
    rs.main(run_args(start, tmp_path / "run", **args))
    assert set(temperatures) == {(1.0, True), (0.7, False)}
    assert set(asked) == {(10, 0.7), (16, 0.0), (16, 0.7)}
    for purpose in ("sample", "select"):
        drawn = [key for key in keys if key[1] == purpose]
        assert len(set(drawn)) == len(drawn) == 2, "noise of its own for each iteration"


def test_evaluate_policy(start):
    """Each metric is what its name says, by the completions judged; at the start KL is 0."""
    seen = []
    tokenizer = common.load_tokenizer(str(start / "policy"))
    eos_ids = [1, *range(4, 12)]  # (random weights would hardly ever end)
    examples = [{"prompt": p, "prompt_ids": tokenizer(p).input_ids} for p in ("dbca>", "ba>", "c>")]

    def score(repeated, completions):
        assert len(repeated) == len(completions)
        seen.append([example["prompt"] for example in repeated])
        seen.append(completions)
        numbers = [float(len(ids)) for ids in completions]
        return torch.tensor([NAN, *numbers[1:]])

    def gold(repeated, completions):
        return torch.tensor([float(len(ids) == 1) for ids in completions])

    policy = common.load_policy(str(start / "policy"), CPU)
    metrics, rows = rs.evaluate_policy(
        policy,
        examples,
        ensemble=[score],
        gold=gold,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        args=run_args(start, "unused", micro_batch_tokens=50),
        autocast=functools.partial(torch.autocast, "cpu", enabled=False),
    )
    _, greedy, prompts, sampled = seen
    assert prompts == [p for p in ("dbca>", "ba>", "c>") for _ in range(4)]
    assert len(greedy) == 3 and len({len(ids) for ids in sampled}) > 1
    lengths = [len(ids) for ids in sampled]
    mean_without_first = sum(lengths[1:]) / 11
    assert metrics["eval/score"].item() == pytest.approx(mean_without_first)
    assert metrics["eval/score_greedy"].item() == pytest.approx(sum(map(len, greedy[1:])) / 2)
    assert metrics["eval/completion_length"].item() == pytest.approx(sum(lengths) / 12)
    assert metrics["eval/gold"].item() == pytest.approx(sum(n == 1 for n in lengths) / 12)
    solved = [1 in lengths[i : i + 4] for i in (0, 4, 8)]
    assert metrics["eval/pass@4"].item() == pytest.approx(sum(solved) / 3)
    ended = [ids[-1] in eos_ids for ids in sampled]
    assert metrics["eval/eos_rate"] == pytest.approx(sum(ended) / 12)
    assert metrics["eval/kl"] == 0
    assert [row["prompt"] for row in rows] == ["dbca>", "ba>", "c>"]
    assert [row["score"] for row in rows[1:]] == [lengths[4], lengths[8]]
    for row, ids in zip(rows, sampled[::4]):
        assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_micro_batches_change_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SMALL_BATCH", 10**9)
    logs = []
    for budget in (20, 100_000):
        rs.main(run_args(start, tmp_path / str(budget), reward="sort", micro_batch_tokens=budget))
        logs.append(training_rows(tmp_path / str(budget)))
    assert len(logs[0]) == len(logs[1]) == 2
    for small, large in zip(*logs):
        for key in ("loss", "grad_norm"):
            assert small[key] == pytest.approx(large[key], rel=1e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(select="top-k"), ["--select top-k", "--select-k"]),
        (dict(select_k=5), ["--select-k", "top-per-prompt"]),
        (dict(select="top-k", select_k=41), ["--select-k is 41", "40 completions"]),
        (dict(select="top-k", select_k=-3), ["--select-k is -3", "40 completions"]),
        (dict(select="random-k", select_k=0), ["--select-k is 0", "40 completions"]),
        (dict(select="random-k", select_k=40, reward=HALF), ["usable score", "40 are wanted"]),
        (dict(reward="scores = [None] * len(prompts)"), ["0 completions", "usable score"]),
        (dict(min_score=1e9), ["0 completions", "usable score"]),
    ],
)
def test_flags_that_contradict_are_refused(start, tmp_path, capsys, changes, words):
    if "reward" in changes:
        changes = changes | dict(reward=checker(tmp_path, changes["reward"]))
    with pytest.raises(SystemExit) as stopped:
        rs.main(run_args(start, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert all(word in line for word in words), line
