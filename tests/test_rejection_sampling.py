"""rejection_sampling.py: selection, best-of-N against brute force, resuming; then main."""

import itertools
import json
import math

import pytest
import torch
from test_group import checker
from test_scripts import chain, metrics, refused, weights  # noqa: F401 (a fixture)

import common
import rejection_sampling as rs

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
    """Its text prints 19 for the last of the five, but index 19 holds 0.6 and index 11 holds 0.7."""
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


def test_best_of_n_metrics():
    """Rows that lack a score are in no mean, so that the same prompts are behind each N."""
    scores = torch.tensor([
        [0.0, 1.0, 2.0, 3.0],
        [NAN, 1.0, NAN, 9.0],
        [1.0, 1.0, 1.0, 1.0],
        [NAN] * 4,
    ])
    gold = torch.tensor([
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [1.0] * 4,
    ])
    found = rs.best_of_n_metrics(scores, gold)
    assert found["best_of_1/score"] == pytest.approx((1.5 + 1) / 2)
    assert found["best_of_2/score"] == pytest.approx((14 / 6 + 1) / 2)
    assert found["best_of_4/score"] == 2.0 and found["best_of_4/gold"] == 0.0
    assert found["best_of_2/gold"] == pytest.approx(2 / 6 / 2), (
        "with equal scores the first is taken"
    )
    assert found["best_of_4/kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert rs.best_of_n_metrics(scores[1:2], None) == {}


# ---------------------------------------------------------------- through main
def run_args(chain, output_dir, **changes):  # noqa: F811
    args = dict(
        model=str(chain / "sft"), reward=str(chain / "reward_model"), output_dir=str(output_dir)
    )
    args |= dict(
        num_generations=4, max_completion_length=6, prompts=10, batch_size=8, learning_rate=1e-3
    )
    return rs.Args(**(args | dict(warmup_steps=0) | changes))


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def trained_on(monkeypatch):
    """What main trains on: (prompt, completion) ids of every step."""
    seen, inner = [], rs.completion_batch

    def recorder(prompts, completions, device):
        if len(prompts) <= 8:  # (evaluations are larger)
            seen.append(list(zip(prompts, completions)))
        return inner(prompts, completions, device)

    monkeypatch.setattr(rs, "completion_batch", recorder)
    return seen


LETTERS = (
    "scores = [None if text[:1] in 'abcdefg' else float(len(set(text))) for text in completions]"
)


@pytest.mark.parametrize(
    "select, k",
    [("top-per-prompt", None), ("random-per-prompt", None), ("top-k", 9), ("random-k", 9)],
)
def test_what_is_selected_is_trained(chain, tmp_path, monkeypatch, capsys, select, k):  # noqa: F811
    seen = trained_on(monkeypatch)
    reward = checker(tmp_path, LETTERS)
    rs.main(run_args(chain, tmp_path / "run", reward=reward, select=select, select_k=k, prompts=16))
    rows, tokenizer = rollouts(tmp_path / "run"), common.load_tokenizer(str(chain / "sft"))
    flat = [
        (r["row"]["prompt"], tuple(ids), score)
        for r in rows
        for ids, score in zip(r["ids"], r["scores"])
    ]
    scores = {(prompt, ids): score for prompt, ids, score in flat}
    trained = [(tokenizer.decode(p), tuple(c)) for batch in seen for p, c in batch]
    known = sorted((s for *_, s in flat if s is not None), reverse=True)
    assert (
        trained
        and all(scores[pair] is not None for pair in trained)
        and len(set(trained)) == len(trained)
    )
    if select == "top-per-prompt":
        best = {
            r["row"]["prompt"]: max((s for s in r["scores"] if s is not None), default=None)
            for r in rows
        }
        assert {p: scores[p, c] for p, c in trained} == {
            p: s for p, s in best.items() if s is not None
        }
    if select == "random-per-prompt":
        assert sorted(p for p, _ in trained) == sorted(
            r["row"]["prompt"] for r in rows if any(s is not None for s in r["scores"])
        )
        assert sum(scores[pair] for pair in trained) < sum(
            max(s or 0 for s in r["scores"]) for r in rows
        )
    if select == "top-k":
        said = capsys.readouterr().out
        repeats = int(said.split(" repeats of")[0].split()[-1])
        assert len(trained) + repeats == 9 and min(scores[pair] for pair in trained) >= known[8]
    if select == "random-k":
        assert len(trained) <= 9 and sum(scores[pair] for pair in trained) < sum(known[:9])


def test_rows_without_a_usable_score_are_counted(chain, tmp_path, capsys):  # noqa: F811
    """--min-score leaves out what is below it; the controls see the same rows."""
    body = "scores = [1.0 if p[0] < 'n' else 0.0 for p in prompts]"
    for select in ("top-per-prompt", "random-per-prompt"):
        args = dict(reward=checker(tmp_path, body), min_score=0.5, select=select, prompts=20)
        rs.main(run_args(chain, tmp_path / select, **args))
        low = sum(r["row"]["prompt"][0] >= "n" for r in rollouts(tmp_path / select))
        assert 0 < low < 20
        assert (
            f"{20 - low} of 80 completions selected; {low} of 20 prompts without"
            in capsys.readouterr().out
        )


def test_chunks_of_prompts_draw_from_streams_of_their_own(chain, tmp_path):  # noqa: F811
    """A hundred rows of one prompt: the second chunk does not repeat the first."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "dbca>"}\n' * 100)
    reward = checker(tmp_path, "scores = [1.0] * len(prompts)")
    args = dict(dataset=str(tmp_path / "prompts.jsonl"), reward=reward, prompts=100, steps=1)
    rs.main(run_args(chain, tmp_path / "run", **args))
    ids = [r["ids"] for r in rollouts(tmp_path / "run")]
    assert ids[:36] != ids[64:]


def test_solve_rates_and_best_of_n_are_logged(chain, tmp_path):  # noqa: F811
    rs.main(run_args(chain, tmp_path / "run"))
    first = metrics(tmp_path / "run")[1]
    assert {
        "best_of_1/score",
        "best_of_4/score",
        "best_of_4/gold",
        "best_of_4/kl_bound",
    } <= first.keys()
    assert (
        first["best_of_4/score"]
        > first["best_of_1/score"]
        == pytest.approx(first["score"], rel=1e-5)
    )
    assert first["selected_score"] == pytest.approx(first["best_of_4/score"], rel=1e-4)
    rates = [r["solve_rate"] for r in rollouts(tmp_path / "run")]
    assert rates == [sum(r["gold"]) / 4 for r in rollouts(tmp_path / "run")]


def test_iterations_sample_from_the_policy_of_the_one_before(chain, tmp_path):  # noqa: F811
    reward = checker(tmp_path, "scores = [float(text.count('a')) for text in completions]")
    args = dict(
        reward=reward, iterations=3, prompts=48, num_generations=8, epochs=4, learning_rate=2e-3
    )
    rs.main(run_args(chain, tmp_path / "run", **args))
    rows = metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows if "score" in row] == [1, 2, 3]
    means = [row["score"] for row in rows if "score" in row]
    assert means[0] + 0.3 < means[1] < means[2], means
    assert len({r["row"]["prompt"] for r in rollouts(tmp_path / "run")}) > 60, (
        "other prompts in each iteration"
    )


@pytest.mark.parametrize("where", ["first", "sampling", "writing", "training"])
def test_resume_is_exact(chain, tmp_path, monkeypatch, where):  # noqa: F811
    """A stop in the second iteration's rollouts, in the middle of a line, or in training."""
    args = dict(
        reward="sort", iterations=2, prompts=70, num_generations=2, batch_size=16, save_every=3
    )
    args |= dict(steps=8)  # of 10
    rs.main(run_args(chain, tmp_path / "whole", **args))
    count, inner, log = [0], rs.sample, common.Run.log

    def broken_sample(*given):
        count[0] += given[2] == 2 and len(given[1]) in (64, 6)
        if count[0] == (2 if where == "first" else 4):
            raise KeyboardInterrupt
        return inner(*given)

    def broken_log(self, step, values, show):
        log(self, step, values, show)
        if step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "training":
            patch.setattr(common.Run, "log", broken_log)
        else:
            patch.setattr(rs, "sample", broken_sample)
        rs.main(run_args(chain, tmp_path / "halves", **args))
    file = tmp_path / "halves/rollouts.jsonl"
    if where == "writing":
        text = file.read_text()
        file.write_text(text[: len(text) - 700])
    rs.main(run_args(chain, tmp_path / "halves", resume=True, **args))
    assert file.read_text() == (tmp_path / "whole/rollouts.jsonl").read_text()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(one[key], other[key]) for key in one)
    clock = ("tokens_per_second", "seconds/sample", "seconds/train")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in metrics(tmp_path / name)]
        for name in ("whole", "halves")
    ]
    assert rows[0] == rows[1]


def test_rollouts_that_do_not_belong_are_refused(chain, tmp_path, capsys):  # noqa: F811
    """Rollouts pair with prompts by position: a file that has changed, or rollouts that are lost, are an
    error."""
    rows = [json.dumps({"prompt": f"{letter}a>"}) + "\n" for letter in "bcdefghijk"]
    data, reward = tmp_path / "prompts.jsonl", checker(tmp_path, "scores = [1.0] * len(prompts)")
    data.write_text("".join(rows))
    args = dict(dataset=str(data), reward=reward)
    rs.main(run_args(chain, tmp_path / "run", **args))
    data.write_text("".join(rows[::-1]))
    with pytest.raises(SystemExit):
        rs.main(run_args(chain, tmp_path / "run", **args, resume=True))
    refused(capsys, "--resume", "rollouts.jsonl was not sampled with", code=1)
    (tmp_path / "run/rollouts.jsonl").unlink()
    with pytest.raises(SystemExit):
        rs.main(run_args(chain, tmp_path / "run", **args, resume=True))
    refused(capsys, "--resume", "lacks rollouts")


def test_rows_are_not_merged_across_repeats_of_a_prompt(chain, tmp_path, monkeypatch):  # noqa: F811
    """Two rows of data, sampled five times each: ten rows are trained, whatever they say."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "ba>"}\n{"prompt": "dc>"}\n')
    seen = trained_on(monkeypatch)
    reward = checker(
        tmp_path, "scores = [-float(len(text)) for text in completions]"
    )  # often the empty text
    args = dict(dataset=str(data), reward=reward, prompts=10, num_generations=8)
    rs.main(run_args(chain, tmp_path / "a", **args))
    assert sum(map(len, seen)) == 10 and len({(*p, *c) for batch in seen for p, c in batch}) < 10
    seen.clear()
    rs.main(run_args(chain, tmp_path / "b", select="top-k", select_k=30, **args))
    top = sum(map(len, seen))
    seen.clear()
    rs.main(run_args(chain, tmp_path / "c", select="random-k", select_k=30, **args))
    assert 10 <= top < 30 and sum(map(len, seen)) == top, "the control trains on as many"


def test_the_schedule_starts_again_and_ends_at_zero(chain, tmp_path):  # noqa: F811
    for steps, ends in ((None, [0, 1, 2, 3]), (3, [0, 1, 2])):
        args = dict(iterations=2, prompts=16, steps=steps, lr_schedule="linear", warmup_steps=0)
        rs.main(run_args(chain, tmp_path / str(steps), reward="sort", **args))
        rates = [row["learning_rate"] for row in metrics(tmp_path / str(steps))[1:]]
        assert len(rates) == len(ends)
        assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4][: len(ends)])


def test_sampling_has_its_temperature_and_training_none(chain, tmp_path, monkeypatch):  # noqa: F811
    temperatures, inner, keys, generator = [], rs.token_logprobs, [], rs.generator
    monkeypatch.setattr(rs, "token_logprobs", lambda *a: temperatures.append(a[4:]) or inner(*a))
    monkeypatch.setattr(rs, "generator", lambda *key: keys.append(key) or generator(*key))
    asked, sampled = [], rs.sample
    monkeypatch.setattr(rs, "sample", lambda *a: asked.append(a[4]) or sampled(*a))
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "ba>", "answer": "ab"}\n')
    args = dict(prompts=2, iterations=2, select="random-per-prompt")
    rs.main(run_args(chain, tmp_path / "run", dataset=str(data), reward="sort", **args))
    assert asked == [0.8, 0.8] and set(temperatures) == {()}
    for purpose in ("sample", "select"):
        drawn = [key for key in keys if key[1] == purpose]
        assert len(set(drawn)) == len(drawn) == 2, "noise of its own for each iteration"


def test_rollouts_hold_each_completions_own_numbers(chain, tmp_path, monkeypatch):  # noqa: F811
    def length(examples, ids):
        return torch.tensor([float(len(i)) for i in ids])

    monkeypatch.setattr(
        rs, "load_reward", lambda *args: (length, lambda *given: length(*given) / 8)
    )
    rs.main(run_args(chain, tmp_path / "run", steps=1))
    records = rollouts(tmp_path / "run")
    assert len({len(i) for r in records for i in r["ids"]}) > 1
    for record in records:
        lengths = [len(i) for i in record["ids"]]
        assert record["scores"] == lengths and record["gold"] == [n / 8 for n in lengths]
        assert record["solve_rate"] == sum(record["gold"]) / len(lengths)


def test_evaluation_measures_the_kl_at_the_temperature_of_sampling(chain, tmp_path, monkeypatch):  # noqa: F811
    temperatures, inner = [], rs.token_logprobs
    monkeypatch.setattr(rs, "token_logprobs", lambda *a: temperatures.append(a[4:]) or inner(*a))
    rs.main(run_args(chain, tmp_path / "run", reward="sort", temperature=0.7, steps=1))
    assert set(temperatures) == {(), (0.7,)}, "training has none"


def test_micro_batches_change_nothing(chain, tmp_path):  # noqa: F811
    rows = []
    for budget in (20, 100_000):
        rs.main(run_args(chain, tmp_path / str(budget), reward="sort", micro_batch_tokens=budget))
        rows.append(metrics(tmp_path / str(budget)))
    for one, other in zip(*rows):
        for key in one.keys() & {"loss", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3)


@pytest.mark.parametrize(
    "changes, words, code",
    [
        (dict(select="top-k"), ["--select top-k", "--select-k"], 2),
        (dict(select_k=5), ["--select-k", "top-per-prompt"], 2),
        (dict(select="top-k", select_k=41), ["--select-k is 41", "40 completions"], 2),
        (dict(select="top-k", select_k=40, reward=LETTERS), ["--select-k is 40", "usable"], 1),
        (dict(reward="scores = [None] * len(prompts)"), ["no completion has a usable score"], 1),
        (dict(select="top-k", select_k=-3), ["--select-k is -3", "at least 1"], 2),
        (dict(prompts=0), ["--prompts is 0", "at least 1"], 2),
    ],
)
def test_refused(chain, tmp_path, capsys, changes, words, code):  # noqa: F811
    if "reward" in changes:
        changes = changes | dict(reward=checker(tmp_path, changes["reward"]))
    with pytest.raises(SystemExit) as stopped:
        rs.main(run_args(chain, tmp_path / "run", **changes))
    assert stopped.value.code == code
    refused(capsys, *words)
