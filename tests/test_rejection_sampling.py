"""rejection_sampling.py: selection, best-of-N against brute force, main, resuming."""

import functools
import itertools
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARGS, CPU
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
    """The book prints 19 for the last index, but index 19 holds 0.6 and index 11 holds 0.7."""
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
        scores = torch.randint(4, (n,), generator=draw).float()  # with ties
        for values in (scores, torch.rand(n, generator=draw)):
            curve = rs.best_of_n(scores, values)
            assert list(curve) == [N for N in (1, 2, 4, 8) if N <= n]
            for N, mean in curve.items():
                subsets = list(itertools.combinations(range(n), N))
                best = [max(subset, key=lambda i: (scores[i].item(), -i)) for subset in subsets]
                expected = sum(values[i].item() for i in best) / len(subsets)
                assert mean == pytest.approx(expected, rel=1e-5)


def test_best_of_n_of_many():
    """The number of subsets exceeds the range of floats."""
    curve = rs.best_of_n(torch.arange(1100.0), torch.full((1100,), 100.0))
    assert curve == pytest.approx({2**i: 100.0 for i in range(11)})
    # of equal scores, the first of a subset wins: index 0, if it is one of the N
    curve = rs.best_of_n(torch.ones(1100), torch.eye(1100)[0])
    assert curve == pytest.approx({2**i: 2**i / 1100 for i in range(11)})


def test_best_of_n_metrics():
    """Rows with a missing score are in no mean, so every N has the same prompts."""
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
    # of equal scores, the first wins
    assert metrics["best_of_2/gold"] == pytest.approx(2 / 6 / 2)
    assert rs.best_of_n_metrics(scores[1:2], scores[1:2], "score") == {}


# ---------------------------------------------------------------- --select
def choose(scores, ids=None, iteration=0, **changes):
    """select() with these flags; without ids, all completions differ."""
    scores = torch.tensor(scores)
    M, N = scores.shape
    ids = ids or [[[row * N + column] for column in range(N)] for row in range(M)]
    flags = dict(select="top", select_per_prompt=1, select_k=None, min_score=None, seed=1) | changes
    return rs.select(scores, ids, iteration, SimpleNamespace(**flags))


HOLES = [
    [NAN, 2.0, 5.0, 5.0],
    [NAN, NAN, NAN, NAN],
    [1.0, 0.0, NAN, -2.0],
    [4.0, 4.0, 4.0, 4.0],
]


def test_select_per_prompt():
    """The best or a random completion of each row, from scores of at least --min-score."""
    assert choose(HOLES) == [(0, 2), (2, 0), (3, 0)]
    assert choose(HOLES, min_score=4.0) == [(0, 2), (3, 0)]
    runs = [choose(HOLES, select="random", iteration=i, min_score=0.0) for i in range(60)]
    assert all([row for row, _ in pairs] == [0, 2, 3] for pairs in runs)
    pairs = {pair for pairs in runs for pair in pairs}
    assert pairs == {(0, 1), (0, 2), (0, 3), (2, 0), (2, 1), *((3, i) for i in range(4))}
    assert choose(HOLES, select="random", iteration=7, min_score=0.0) == runs[7]


def test_select_several_per_prompt():
    """The best of each prompt, each completion once; fewer if fewer have a score."""
    assert choose(HOLES, select_per_prompt=2) == [(0, 2), (0, 3), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert choose(HOLES, select_per_prompt=4, min_score=1.5) == [
        *[(0, 2), (0, 3), (0, 1)],
        *[(3, i) for i in range(4)],
    ]
    ids = [[[7], [7], [8], [7]], [[7], [8], [8], [9]]]
    scores = [[3.0, 3.0, 1.0, 3.0], [3.0, 2.0, 2.0, 0.0]]
    assert choose(scores, ids, select_per_prompt=2) == [(0, 0), (0, 2), (1, 0), (1, 1)]
    runs = [choose(HOLES, select="random", iteration=i, select_per_prompt=3) for i in range(30)]
    assert all([row for row, _ in pairs] == [0] * 3 + [2] * 3 + [3] * 3 for pairs in runs)
    assert {pair for pairs in runs for pair in pairs if pair[0] == 3} == {(3, i) for i in range(4)}


@pytest.mark.parametrize("select", ["top", "random"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_with_one_prompt_both_selections_agree(select, k):
    scores = [[0.5, NAN, 2.0, -1.0, 2.0, 0.7, 0.1]]
    per_prompt = choose(scores, select=select, select_per_prompt=k)
    assert per_prompt == choose(scores, select=select, select_k=k) and len(per_prompt) == k


def test_select_k_of_all():
    """The k best or k random completions, from scores of at least --min-score."""
    assert choose(HOLES, select_k=4) == [(0, 2), (0, 3), (3, 0), (3, 1)]
    flags = dict(select="random", select_k=3, min_score=0.0)
    runs = [choose(HOLES, iteration=i, **flags) for i in range(60)]
    assert all(len(set(pairs)) == 3 for pairs in runs)
    usable = {(row, i) for row in range(4) for i in range(4) if HOLES[row][i] >= 0}
    assert {pair for pairs in runs for pair in pairs} == usable
    counts = [sum(pair in pairs for pairs in runs) for pair in usable]
    assert min(counts) > 60 * 3 / len(usable) / 3, "all are equally likely"


def test_repeated_completions_of_a_prompt_are_selected_once():
    """The first is selected. The same ids after another prompt are not a repetition."""
    ids = [[[7], [7], [8], [7]], [[7], [8], [8], [9]]]
    assert rs.distinct(torch.tensor([3, 1, 4, 6, 5, 2]), ids) == [(0, 3), (1, 0), (1, 2), (0, 2)]
    scores = [[3.0, 3.0, 1.0, 3.0], [3.0, 2.0, 2.0, 0.0]]
    top = choose(scores, ids, select_k=6)
    assert top == [(0, 0), (1, 0), (1, 1)], "six, of which three are repeated"
    for iteration in range(20):
        control = choose(scores, ids, iteration, select="random", select_k=6)
        assert len(control) == 3, "the control has the same size, whatever it repeats"
        assert len({(row, *ids[row][column]) for row, column in control}) == 3
    assert choose(scores, ids) == [(0, 0), (1, 0)], "still one per prompt without --select-k"


# ---------------------------------------------------------------- through main
@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a random policy and a random reward model; the built-in task is small."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = sft.tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    for name, cls in [
        ("policy", transformers.LlamaForCausalLM),
        ("reward_model", transformers.LlamaForSequenceClassification),
    ]:
        torch.manual_seed(0)
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "TASK_ROWS", {"prompts": 128, "held out": 16})
        yield folder


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that an interrupted run leaves."""
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


def load_policy(start):
    tokenizer = common.load_tokenizer(str(start / "policy"))
    return tokenizer, common.load_policy(str(start / "policy"), tokenizer, ARGS, CPU)


def checker(tmp_path, body):
    """--reward of a function that sets `scores` from prompts, completions and rows."""
    path = tmp_path / "reward.py"
    path.write_text(f"def f(prompts, completions, rows):\n    {body}\n    return scores\n")
    return f"{path}:f"


def read_log(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def training_rows(folder):
    """Lines of metrics.jsonl without the evaluation before training."""
    return [row for row in read_log(folder) if "loss" in row]


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def record_batches(monkeypatch):
    """Record what main trains on: (prompt, completion) ids of every step."""
    steps = []
    inner = rs.completion_batch

    def recorder(rollouts, device):
        if len(rollouts) <= 8:  # evaluations are larger
            steps.append([(tuple(x["prompt_ids"]), tuple(x["completion_ids"])) for x in rollouts])
        return inner(rollouts, device)

    monkeypatch.setattr(rs, "completion_batch", recorder)
    return steps


# no score for the first three completions and for a fifth of the others
HALF = (
    "scores = [float(len(set(t))) if i > 2 and i % 5 else None for i, t in enumerate(completions)]"
)


def test_selected_completions_are_trained(start, tmp_path, monkeypatch, capsys):
    """Each once per epoch. The first loss is the mean NLL over all their tokens."""
    steps = record_batches(monkeypatch)
    args = dict(reward=checker(tmp_path, HALF), prompts_per_iteration=16, epochs=2)
    rs.main(run_args(start, tmp_path / "run", num_generations=3, micro_batch_tokens=40, **args))
    tokenizer, policy = load_policy(start)
    expected = []
    for record in read_log(tmp_path / "run", "rollouts"):
        known = [x for x in record["scores"] if x is not None]
        if known:
            best = record["ids"][record["scores"].index(max(known))]
            expected.append((tuple(tokenizer(record["row"]["prompt"]).input_ids), tuple(best)))
    trained = [pair for pairs in steps for pair in pairs]
    assert len(expected) == 15
    assert sorted(trained[: len(expected)]) == sorted(trained[len(expected) :]) == sorted(expected)
    assert "iteration 1: selected 15 of 48 completions" in capsys.readouterr().out

    policy = policy.double()
    nll = []
    for prompt, completion in steps[0]:
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        nll += [-logits.log_softmax(-1)[t, i].item() for t, i in enumerate(completion)]
    first = training_rows(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_repeated_prompts_are_separate_rows(start, tmp_path, monkeypatch):
    """Two rows of data, each sampled five times, are ten rows, even with equal completions."""
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "ba>"}, {"prompt": "dc>"}])
    steps = record_batches(monkeypatch)
    reward = checker(tmp_path, "scores = [float(t > 'd') for t in completions]")
    args = dict(dataset=data, reward=reward, num_generations=8, max_completion_length=1)
    rs.main(run_args(start, tmp_path / "run", **args))
    trained = [pair for pairs in steps for pair in pairs]
    assert len(trained) == 10 > len(set(trained))


def test_each_chunk_of_prompts_has_its_own_noise(start, tmp_path):
    """For 100 rows with the same prompt, the second chunk does not repeat the first."""
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "dbca>"}] * 100)
    reward = checker(tmp_path, "scores = [1.0] * len(prompts)")
    args = dict(dataset=data, reward=reward, steps=1)
    rs.main(run_args(start, tmp_path / "run", prompts_per_iteration=100, **args))
    ids = [record["ids"] for record in read_log(tmp_path / "run", "rollouts")]
    assert len(ids) == 100 and ids[:36] != ids[64:]


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


def test_rollouts_hold_the_scores_of_each_completion(start, tmp_path, monkeypatch):
    """Including scores of ensemble members. A number that is missing is null."""

    def length(rollouts):
        scores = torch.tensor([float(len(x["completion_ids"])) for x in rollouts])
        for rollout, score in zip(rollouts, scores):
            is_short = score < 6
            rollout["member_scores"] = torch.stack(
                [score + 1, torch.tensor(NAN) if is_short else score]
            )
        return scores.masked_fill(scores == 5, NAN)

    def gold(rollouts):
        return torch.tensor([len(x["completion_ids"]) / 8 for x in rollouts])

    monkeypatch.setattr(rs, "load_reward", lambda *args: length)
    monkeypatch.setattr(rs, "load_gold", lambda *args: {"gold": gold})
    rs.main(run_args(start, tmp_path / "gold", steps=1, num_generations=16))
    records = read_log(tmp_path / "gold", "rollouts")
    assert {len(ids) for record in records for ids in record["ids"]} > {5, 6}
    for record in records:
        lengths = [len(ids) for ids in record["ids"]]
        assert record["iteration"] == 0 and record["row"].keys() == {"prompt", "answer"}
        assert record["scores"] == [None if n == 5 else n for n in lengths]
        assert record["member_scores"][0] == [n + 1 for n in lengths]
        assert record["member_scores"][1] == [None if n < 6 else n for n in lengths]
        assert record["gold"] == [n / 8 for n in lengths]
        assert record["solve_rate"] == pytest.approx(sum(record["gold"]) / len(lengths))
        assert record["finished"] == [ids[-1] == 1 for ids in record["ids"]]
        assert [len(text) for text in record["completions"]] == [
            sum(i > 2 for i in ids) for ids in record["ids"]
        ]
    monkeypatch.setattr(rs, "load_gold", lambda *args: {})
    rs.main(run_args(start, tmp_path / "none", steps=1))
    for record in read_log(tmp_path / "none", "rollouts"):
        assert record["gold"] == [None] * 4 and record["solve_rate"] is None
    assert not any("gold" in name for row in read_log(tmp_path / "none") for name in row)


def test_each_iteration_samples_from_the_policy_of_the_one_before(start, tmp_path):
    """And from other prompts."""
    reward = checker(tmp_path, "scores = [float(t.count('a')) for t in completions]")
    args = dict(iterations=3, prompts_per_iteration=48, num_generations=8, epochs=4)
    rs.main(run_args(start, tmp_path / "run", reward=reward, learning_rate=5e-3, **args))
    rows = [row for row in training_rows(tmp_path / "run") if "score" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    means = [row["score"] for row in rows]
    assert means[0] + 0.3 < means[1] < means[2], means
    prompts = {record["row"]["prompt"] for record in read_log(tmp_path / "run", "rollouts")}
    assert len(prompts) > 60


# ---------------------------------------------------------------- resuming
IN_TWO = dict(reward="sort", iterations=2, prompts_per_iteration=70, num_generations=2)
IN_TWO |= dict(batch_size=16, save_every=3, steps=8)  # of 10, 5 per iteration


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    rs.main(run_args(start, folder, **IN_TWO))
    return folder


class Broken(Exception):
    """Ends a run before its time."""


def break_run():
    raise Broken


def count_rollouts(monkeypatch, call=None, action=None):
    """Count the calls of sample() for rollouts, and call action() at one of them."""
    inner = rs.sample
    calls = []

    def sample(policy, examples, **options):
        if len(examples) in (64, 6):  # an evaluation has 16 prompts
            calls.append(len(examples))
            if len(calls) == call:
                action()
        return inner(policy, examples, **options)

    monkeypatch.setattr(rs, "sample", sample)
    return calls


def break_in_training(monkeypatch, last_step):
    log = common.Run.log

    def broken_log(run, step, metrics, show=()):
        log(run, step, metrics, show)
        if step == last_step:
            break_run()

    monkeypatch.setattr(common.Run, "log", broken_log)


@pytest.mark.parametrize(
    "stop, chunks_to_sample",
    [
        ("first rollouts", [64, 6, 64, 6]),  # no checkpoint yet
        ("first training", [64, 6]),
        ("second rollouts", [64, 6]),
        ("half a line", [64, 6]),
        ("signal", []),  # a step was made before the run ended
        ("second training", []),
    ],
)
def test_resume_is_exact(start, whole, tmp_path, monkeypatch, stop, chunks_to_sample):  # noqa: PLR0917
    """Rollouts are read from disk if a checkpoint was made after them, otherwise sampled again."""
    args = functools.partial(run_args, start, tmp_path / "run", **IN_TWO)
    rollouts = tmp_path / "run/rollouts.jsonl"
    with monkeypatch.context() as patch:
        if stop == "signal":
            count_rollouts(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        elif "training" in stop:
            break_in_training(patch, last_step=4 if stop == "first training" else 7)
        else:
            count_rollouts(patch, 2 if stop == "first rollouts" else 4, break_run)
        with pytest.raises(SystemExit if stop == "signal" else Broken) as stopped:
            rs.main(args())
    if stop == "signal":
        assert stopped.value.code == 128 + signal.SIGINT
        assert read_log(tmp_path / "run")[-1]["step"] == 6
    if stop == "half a line":
        with open(rollouts, "a") as file:
            file.write('{"iteration": 1, "row": {"pro')
    calls = count_rollouts(monkeypatch)
    rs.main(args(resume=True))

    assert calls == chunks_to_sample
    assert rollouts.read_text() == (whole / "rollouts.jsonl").read_text()
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(value, resumed[key]) for key, value in weights(whole).items())
    clock = {"tokens_per_second", "seconds/sample", "seconds/train", "peak_memory_gib"}
    logs = [
        [{key: row[key] for key in row.keys() - clock} for row in read_log(folder)]
        for folder in (whole, tmp_path / "run")
    ]
    assert logs[0] == logs[1]
    assert read_log(whole, "samples") == read_log(tmp_path / "run", "samples")


@pytest.fixture(scope="module")
def broken(start, tmp_path_factory):
    """Flags of a run on a file that ended within an iteration."""
    folder = tmp_path_factory.mktemp("broken")
    rows = common.task_rows("prompts", held_out=False, seed=1)
    flags = IN_TWO | dict(dataset=write_rows(folder / "rows.jsonl", rows))
    with pytest.MonkeyPatch.context() as patch:
        break_in_training(patch, last_step=4)
        with pytest.raises(Broken):
            rs.main(run_args(start, folder / "run", **flags))
    return folder / "run", flags


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(seed=2), "--seed cannot change"),
        (dict(prompts_per_iteration=69), "--prompts-per-iteration cannot change"),
        ({}, "data or initial weights differ"),  # other rows
    ],
)
def test_rollouts_of_other_prompts_are_refused(start, broken, tmp_path, capsys, changes, words):  # noqa: PLR0917
    """A new order of the same rows would pair prompts with the completions of other prompts."""
    folder, flags = broken
    if not changes:
        rows = Path(flags["dataset"]).read_text().splitlines(keepends=True)
        (tmp_path / "reversed.jsonl").write_text("".join(rows[::-1]))
        changes = dict(dataset=str(tmp_path / "reversed.jsonl"))
    rollouts = (folder / "rollouts.jsonl").read_text()
    assert rollouts
    with pytest.raises(SystemExit):
        rs.main(run_args(start, folder, **flags | changes, resume=True))
    assert words in capsys.readouterr().err
    assert (folder / "rollouts.jsonl").read_text() == rollouts


# ---------------------------------------------------------------- training and evaluation
@pytest.mark.parametrize("steps", [None, 3])
def test_the_schedule_of_each_iteration_decays_to_zero(start, tmp_path, steps):
    """It would be zero one step after the last."""
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "ba>", "answer": "ab"}])
    args = dict(iterations=2, prompts_per_iteration=16, steps=steps, reward="sort", dataset=data)
    rs.main(run_args(start, tmp_path / "run", **args))
    rates = [row["learning_rate"] for row in read_log(tmp_path / "run")]
    # with --steps 3, the second iteration has one step
    assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4][:steps])


def test_temperature_is_for_sampling_and_kl_but_not_for_training(start, tmp_path, monkeypatch):
    forwards = []
    samples = []
    keys = []
    token_logprobs = rs.token_logprobs
    sample = rs.sample
    generator = rs.generator

    def record_logprobs(model, batch, temperature=1.0):
        forwards.append((temperature, torch.is_grad_enabled()))
        return token_logprobs(model, batch, temperature)

    def record_sample(policy, examples, **options):
        samples.append((len(examples), options["temperature"]))
        return sample(policy, examples, **options)

    monkeypatch.setattr(rs, "token_logprobs", record_logprobs)
    monkeypatch.setattr(rs, "sample", record_sample)
    monkeypatch.setattr(rs, "generator", lambda *key: keys.append(key) or generator(*key))
    args = dict(reward="sort", temperature=0.7, iterations=2, select="random")
    rs.main(run_args(start, tmp_path / "run", **args))
    assert set(forwards) == {(1.0, True), (0.7, False)}
    assert set(samples) == {(10, 0.7), (16, 0.0), (16, 0.7)}
    for purpose in ("sample", "select"):
        used = [key for key in keys if key[1] == purpose]
        assert len(set(used)) == len(used) == 2, "each iteration has its own noise"


def test_evaluate_policy(start):
    """Each metric is computed from the completions that were scored."""
    tokenizer, policy = load_policy(start)
    # random weights hardly ever sample the only EOS
    eos_ids = policy.generation_config.eos_token_id = [1, *range(4, 12)]
    prompts = ["dbca>", "ba>", "c>"]
    examples = [{"prompt": p, "prompt_ids": tokenizer(p).input_ids} for p in prompts]
    scored = []
    logged = []

    def score(rollouts):
        scored.append(rollouts)
        return torch.tensor([NAN, *(float(len(x["completion_ids"])) for x in rollouts[1:])])

    def gold(rollouts):
        return torch.tensor([float(len(x["completion_ids"]) == 1) for x in rollouts])

    args = run_args(start, "unused", micro_batch_tokens=50)
    run = SimpleNamespace(args=args, log_samples=lambda *call: logged.append(call))
    scorers = {"score": score, "gold": gold}
    metrics = rs.evaluate_policy(policy, policy, scorers, examples, run=run, step=7)
    greedy, sampled = scored
    assert [x["prompt"] for x in greedy] == prompts
    assert [x["prompt"] for x in sampled] == [p for p in prompts for _ in range(4)]
    lengths = [len(x["completion_ids"]) for x in sampled]
    greedy_lengths = [len(x["completion_ids"]) for x in greedy]
    assert len(set(lengths)) > 1
    assert metrics["eval/score"].item() == pytest.approx(sum(lengths[1:]) / 11)
    assert metrics["eval/score_greedy"].item() == pytest.approx(sum(greedy_lengths[1:]) / 2)
    assert metrics["eval/completion_length"].item() == pytest.approx(sum(lengths) / 12)
    assert metrics["eval/gold"].item() == pytest.approx(sum(n == 1 for n in lengths) / 12)
    solved = [1 in lengths[i : i + 4] for i in (0, 4, 8)]
    assert metrics["eval/pass@4"].item() == pytest.approx(sum(solved) / 3)
    assert metrics["eval/pass@1"].item() == pytest.approx(metrics["eval/gold"].item())
    ended = [x["completion_ids"][-1] in eos_ids for x in sampled]
    assert 0 < sum(ended) < 12
    assert metrics["eval/eos_rate"] == pytest.approx(sum(ended) / 12)
    assert metrics["eval/kl"] == 0, "the policy is its own reference"
    ((step, rollouts, values),) = logged
    assert step == 7 and rollouts == sampled[::4]
    assert values["score"][1:] == [lengths[4], lengths[8]]
    assert values["gold"] == [float(n == 1) for n in lengths[::4]]
    assert values["kl"] == [0, 0, 0]


def test_micro_batches_change_nothing(start, tmp_path):
    logs = []
    for tokens in (20, 100_000):
        rs.main(run_args(start, tmp_path / str(tokens), reward="sort", micro_batch_tokens=tokens))
        logs.append(training_rows(tmp_path / str(tokens)))
    assert len(logs[0]) == len(logs[1]) == 2
    assert logs[0][0]["padding"] < logs[1][0]["padding"], "rows of similar length are together"
    for small, large in zip(*logs):
        for key in ("loss", "grad_norm"):
            assert small[key] == pytest.approx(large[key], rel=1e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(select_k=41), ["--select-k 41", "from 1 to 40"]),
        (dict(select_k=-3), ["--select-k -3", "from 1 to 40"]),
        (dict(select_per_prompt=0), ["--select-per-prompt 0", "from 1"]),
        (dict(select_per_prompt=9), ["--select-per-prompt 9", "--num-generations"]),
        (dict(select="random", select_k=0), ["--select-k 0", "from 1 to 40"]),
        (dict(select="random", select_k=40, reward=HALF), ["only 30 completions have a score"]),
        (dict(reward="scores = [None] * len(prompts)"), ["only 0 completions have a score"]),
        (dict(min_score=1e9), ["only 0 completions have a score", "--min-score"]),
    ],
)
def test_selections_that_are_impossible_are_refused(start, tmp_path, capsys, changes, words):
    if "reward" in changes:
        changes = changes | dict(reward=checker(tmp_path, changes["reward"]))
    with pytest.raises(SystemExit) as stopped:
        rs.main(run_args(start, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert all(word in line for word in words), line
