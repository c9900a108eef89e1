"""Logs as other programs read them: strict JSON, shares from 0 to 1, means that are not sums."""

import json
import math
import re

import pytest
import torch
from language import write_rows
from test_family import ROOT
from test_scripts import chain, metrics  # noqa: F401

import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

EOS = 1
SAMPLERS = [ppo, rloo, grpo, rejection_sampling]
SHARES = {
    *("accuracy", "brier", "clip_fraction", "dropped_groups", "eos_rate", "gold", "label_accuracy"),
    *("padding", "selected_gold", "solve_rate", "unscored", "value_clip_fraction"),
    *("zero_std_groups", "eval/accuracy", "eval/accuracy_stderr", "eval/brier", "eval/eos_rate"),
    *("eval/gold", "eval/gold_greedy", "eval/label_accuracy", "eval/pass@k", "eval/tied_pairs"),
    *("eval/top1_accuracy", "best_of_N/gold"),
}
# depend on the time, or on how rows are packed
NOT_MEANS = {"padding", "peak_memory_gib", "seconds/sample", "seconds/train", "tokens_per_second"}


def general(name):
    """A metric as in docs/metrics.md, with letters for numbers."""
    return re.sub(r"best_of_\d+", "best_of_N", re.sub(r"pass@\d+", "pass@k", name))


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def check_finite(value, where):
    """Fail for a number that other readers take for infinity, such as 1e999."""
    if isinstance(value, float):
        assert math.isfinite(value), where
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        check_finite(item, where)


def read_strictly(folder):
    """File name -> objects in it, for args.json and every .jsonl file of a run."""
    paths = [folder / "args.json", *sorted(folder.glob("*.jsonl"))]
    found = {}
    for path in paths:
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        found[path.name] = [json.loads(line, parse_constant=refuse_constant) for line in lines]
        for number, row in enumerate(found[path.name], 1):
            assert isinstance(row, dict), (path.name, number)
            check_finite(row, (path.name, number))
    return found


def check_shares(rows):
    """Every share is null or from 0 to 1, without a tolerance. Returns the names of the shares."""
    found = set()
    for row in rows:
        for name in [name for name in row if general(name) in SHARES]:
            values = row[name] if isinstance(row[name], list) else [row[name]]
            for value in values:
                assert value is None or 0 <= value <= 1, (name, value)
            found.add(general(name))
    return found


def test_list_of_shares_is_complete():
    """Every metric that docs/metrics.md calls a share is in SHARES."""
    documented = set()
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if line.startswith("| `") and re.match(r"(with `[^`]*`: )?share of", cells[-3]):
            documented |= set(re.findall(r"`([^`]+)`", cells[0]))
    assert len(documented) > 10 and documented <= SHARES


# ---------------------------------------------------------------- short runs of every script
ROWS = [
    dict(prompt="dbca>", answer="abcd", weight=0.5),
    dict(prompt="fe>", answer="ef", weight=None),
    dict(prompt="hgi>", answer="ghi", weight=2),
    dict(prompt="zyx>", answer="xyz", weight=1),
    dict(prompt="kj>", answer="jk", weight=1),
]
# no score for one row at all, and for some completions of the others
UNSCORED = (
    "return [None if r['weight'] is None or len(c) % 4 == 3 else float(len(c))"
    " for c, r in zip(completions, rows)]"
)


def reward_file(folder, body):
    path = folder / "reward.py"
    path.write_text(f"def reward(prompts, completions, rows):\n    {body}\n")
    return f"{path}:reward"


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory):  # noqa: F811
    """Folders of short runs of every script, with evaluations, ensembles and missing scores."""
    folder = tmp_path_factory.mktemp("logs")
    shared = dict(model=str(chain / "sft"), warmup_steps=0, learning_rate=1e-3, eval_every=1)
    sampling = shared | dict(
        dataset=write_rows(folder / "prompts.jsonl", ROWS),
        eval_dataset=write_rows(folder / "held_out.jsonl", ROWS[1:4]),
        reward=f"{chain / 'reward_model'},{reward_file(folder, UNSCORED)}",
        max_completion_length=6,
        num_generations=2,
    )
    online = sampling | dict(prompts_per_step=12, steps=2, update_epochs=2)
    plain = online | dict(reward="sort", dataset="sort", eval_dataset=None)
    several = dict(prompts_per_iteration=5, iterations=2, batch_size=4)
    ptx = dict(ptx_dataset="sort", ptx_coef=0.5)
    flags = {
        "ppo": (ppo, online | ptx),
        "ppo_sort": (ppo, plain | dict(num_generations=1, num_minibatches=3)),
        "rloo": (rloo, online | dict(kl_coef=0.0, reward_combine="min")),
        "rloo_sort": (rloo, plain),
        "grpo": (grpo, online | dict(reward_combine="mean-minus-std", mask_truncated=True)),
        "grpo_sort": (grpo, plain | dict(dynamic_sampling=True, overlong_buffer=2)),
        "rejection_sampling": (rejection_sampling, sampling | several),
        "rejection_sampling_sort": (
            rejection_sampling,
            sampling | dict(dataset="sort", eval_dataset=None, reward="sort", select_k=6, steps=2),
        ),
        "sft": (sft, shared | dict(steps=2, batch_size=4)),
        "dpo": (dpo, shared | dict(steps=2, batch_size=5)),
        "dpo_orpo": (dpo, shared | dict(steps=1, batch_size=5, loss_type="orpo")),
        "reward_model": (reward_model, shared | dict(steps=2, batch_size=5)),
        "reward_model_outcome": (
            reward_model,
            shared | dict(steps=2, batch_size=5, loss="outcome", outcome_tokens="all"),
        ),
    }
    for name, (script, args) in flags.items():
        script.main(script.Args(**args, output_dir=str(folder / name)))
    return {name: folder / name for name in flags}


RUNS = [
    *("ppo", "ppo_sort", "rloo", "rloo_sort", "grpo", "grpo_sort", "rejection_sampling"),
    *("rejection_sampling_sort", "sft", "dpo", "dpo_orpo", "reward_model", "reward_model_outcome"),
]


@pytest.mark.parametrize("name", RUNS)
def test_logs_are_strict_json(runs, name):
    """Each line of each log is JSON without NaN and Infinity, also in lists and nested values."""
    logs = read_strictly(runs[name])
    assert {"args.json", "metrics.jsonl", "samples.jsonl"} <= logs.keys()
    samples = name.startswith(("ppo", "rloo", "grpo", "rejection_sampling"))
    assert ("rollouts.jsonl" in logs) == samples
    assert check_shares(logs["metrics.jsonl"]) & {"padding"}
    for row in logs["metrics.jsonl"]:
        assert isinstance(row["step"], int)
        assert all(x is None or type(x) in (int, float) for x in row.values())
    evaluated = [row["step"] for row in logs["metrics.jsonl"] if "eval/accuracy" in row]
    evaluated += [row["step"] for row in logs["metrics.jsonl"] if "eval/eos_rate" in row]
    assert {row["step"] for row in logs["samples.jsonl"]} == set(evaluated)
    assert set(evaluated) >= {0, logs["metrics.jsonl"][-1]["step"]}
    for row in logs["samples.jsonl"]:
        assert isinstance(row["completion"], str) and row["prompt"]
        check_shares([row])
    for row in logs.get("rollouts.jsonl", []):
        check_shares([row])
        if not name.startswith("rejection_sampling"):
            assert isinstance(row["completion"], str) and row["advantage"] is not None
            continue
        N = len(row["completions"])
        for column in ("scores", "gold", "finished", "ids"):
            assert len(row[column]) == N
        assert all(len(scores) == N for scores in row["member_scores"])


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo", "rejection_sampling"])
def test_missing_scores_are_null(runs, name):
    """A sample without a score has null, and is in no mean; the other samples have numbers."""
    logs = read_strictly(runs[name])
    for row in logs["samples.jsonl"]:
        if row["prompt"] == "fe>":
            assert row["score"] is None
        assert row["score"] is None or isinstance(row["score"], float)
        assert isinstance(row["kl"], float)
    last = logs["metrics.jsonl"][-1]
    assert isinstance(last["eval/score"], float) and isinstance(last["eval/kl"], float)
    if name == "rejection_sampling":
        for row in logs["rollouts.jsonl"]:
            is_unscored = row["row"]["weight"] is None
            assert not is_unscored or row["scores"] == row["member_scores"][1] == [None, None]
            assert None not in row["member_scores"][0]
            assert row["gold"] == [None, None] and row["solve_rate"] is None
    else:
        assert last["unscored"] > 0.1
        assert isinstance(last["score"], float) and isinstance(last["score/1"], float)


@pytest.mark.parametrize("script", SAMPLERS)
def test_an_evaluation_without_any_score(script, chain, tmp_path):  # noqa: F811
    """The mean of no score is null, not 0 and not NaN."""
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "rows.jsonl", ROWS),
        eval_dataset=write_rows(tmp_path / "held_out.jsonl", ROWS[1:2] * 3),
        reward=reward_file(tmp_path, UNSCORED.replace(" or len(c) % 4 == 3", "")),
        max_completion_length=4,
        num_generations=2,
        output_dir=str(tmp_path / "run"),
    )
    args |= dict(batch_size=8) if script is rejection_sampling else dict(prompts_per_step=5)
    script.main(script.Args(**args, steps=1))
    logs = read_strictly(tmp_path / "run")
    for row in logs["metrics.jsonl"]:
        assert row["eval/score"] is None and row["eval/score_greedy"] is None
        assert isinstance(row["eval/kl"], float)
    assert {row["score"] for row in logs["samples.jsonl"]} == {None}


def test_a_row_that_is_not_strict_json(chain, tmp_path):  # noqa: F811
    """NaN and Infinity in a column of the data, also within lists, are null in rollouts.jsonl."""
    rows = [row | {"weight": math.nan, "more": [math.inf, {"x": -math.inf}]} for row in ROWS]
    rejection_sampling.main(
        rejection_sampling.Args(
            model=str(chain / "sft"),
            dataset=write_rows(tmp_path / "rows.jsonl", rows),
            reward=reward_file(tmp_path, "return [float(len(c)) for c in completions]"),
            max_completion_length=4,
            num_generations=2,
            steps=1,
            output_dir=str(tmp_path / "run"),
        )
    )
    records = read_strictly(tmp_path / "run")["rollouts.jsonl"]
    assert len(records) == len(ROWS)
    for record in records:
        assert record["row"]["weight"] is None and record["row"]["more"] == [None, {"x": None}]


# ---------------------------------------------------------------- given completions
def given_sample(monkeypatch, script, completion):
    """Patch `sample` of a script: completion(example, g) -> letters of the g-th completion."""

    def sample(policy, examples, *, num_generations=1, **kwargs):
        rollouts = []
        for example in examples:
            for g in range(num_generations):
                letters, finished = completion(example, g)
                ids = [sft.tiny_tokenizer().convert_tokens_to_ids(x) for x in letters]
                ids += [EOS] if finished else []
                rollouts.append(example | {"completion_ids": ids, "finished": finished})
        return rollouts

    monkeypatch.setattr(script, "sample", sample)


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("script", [*SAMPLERS, sft, dpo])
def test_shares_of_completions_at_their_limits(script, is_right, chain, tmp_path, monkeypatch):  # noqa: F811, PLR0917
    """All completions are right, or all are unfinished: the shares are exactly 1 or exactly 0.

    Nine completions per prompt: the sum of nine floats 1/9 exceeds 1."""
    given_sample(monkeypatch, script, lambda example, g: (example["row"]["answer"], is_right))
    args = dict(
        model=str(chain / "sft"), steps=1, learning_rate=0.0, output_dir=str(tmp_path / "run")
    )
    if script in SAMPLERS:
        data = write_rows(tmp_path / "rows.jsonl", ROWS)
        args |= dict(dataset=data, eval_dataset=data, reward="sort")
        args |= dict(num_generations=9, max_completion_length=6)
    args |= dict(batch_size=7) if script in (rejection_sampling, sft, dpo) else {}
    if script in (ppo, rloo, grpo):
        args |= dict(prompts_per_step=7)
    script.main(script.Args(**args))
    logs = read_strictly(tmp_path / "run")
    check_shares(logs["metrics.jsonl"] + logs.get("rollouts.jsonl", []))
    extreme = {"gold", "eos_rate", "selected_gold", "best_of_N/gold", "zero_std_groups"}
    extreme |= {"eval/gold", "eval/gold_greedy", "eval/pass@k", "eval/eos_rate"}
    found = set()
    for row in logs["metrics.jsonl"]:
        for name, value in row.items():
            if general(name) in extreme:
                found.add(general(name))
                expected = 1 if name == "zero_std_groups" else int(is_right)
                # the sum of rounded shares of best_of_n may be below 1
                assert value == pytest.approx(expected, abs=1e-12), name
    assert found >= {"eval/gold", "eval/gold_greedy", "eval/eos_rate"}
    for row in logs.get("rollouts.jsonl", []):
        assert row.get("solve_rate", row.get("score")) == int(is_right)


@pytest.mark.parametrize("loss", ["dpo", "bradley-terry", "outcome"])
def test_accuracy_of_all_pairs_is_at_most_one(loss, chain, tmp_path, monkeypatch):  # noqa: F811
    """All pairs are right, in batches of many sizes: float32 sums of weights may exceed 1."""
    script = dpo if loss == "dpo" else reward_model
    monkeypatch.setattr(script, "pair_accuracy", lambda chosen, rejected: torch.ones_like(chosen))
    if loss == "outcome":  # the sign of the score is the label
        inner = reward_model.token_scores
        monkeypatch.setattr(
            reward_model,
            "token_scores",
            lambda model, batch: inner(model, batch) * 0 + batch["mask"] * (batch["labels"] - 0.5),
        )
    rows = [{"prompt": "ba>", "chosen": "ab", "rejected": x} for x in "abcdefghijklmnopqrstuv"]
    worst = 0.0
    for size in (7, 10, 11, 13, 14, 18, 19, 20, 22):
        data = write_rows(tmp_path / f"{size}.jsonl", rows[:size])
        folder = tmp_path / str(size)
        args = dict(model=str(chain / "sft"), dataset=data, eval_dataset=data, steps=1)
        args |= dict(batch_size=size, learning_rate=0.0, save_every=0, output_dir=str(folder))
        args |= {} if loss == "dpo" else dict(loss=loss)
        script.main(script.Args(**args))
        for row in metrics(folder):
            check_shares([row])
            names = row.keys() & {"accuracy", "eval/accuracy", "label_accuracy"}
            worst = max([worst, *(abs(row[name] - 1) for name in names)])
    assert worst < 1e-5


# ---------------------------------------------------------------- means
def letters_of(example, g):
    """Four completions that depend on the row alone: right, unfinished, wrong, empty."""
    answer = example["row"]["answer"]
    return [(answer, True), (answer[::-1], False), (answer[1:], True), ("", True)][g % 4]


MEANS = [
    ("ppo", ppo, dict(ptx_coef=0.5, missing_eos_penalty=0.5, update_epochs=3)),
    ("ppo_whiten", ppo, dict(whiten_rewards=True, value_clip=0.05, update_epochs=2)),
    ("rloo", rloo, dict(update_epochs=3, missing_eos_penalty=0.5)),
    ("rloo_none", rloo, dict(baseline="none", kl_coef=0.0)),
    ("grpo", grpo, dict(update_epochs=3, mask_truncated=True)),
    ("grpo_token", grpo, dict(loss_aggregation="token", kl_estimator="k1", scale_rewards="none")),
    ("grpo_constant", grpo, dict(loss_aggregation="constant", kl_estimator="k2", update_epochs=2)),
    ("rejection_sampling", rejection_sampling, {}),
    ("sft", sft, {}),
    ("dpo", dpo, dict(sft_coef=0.5, label_smoothing=0.1)),
    ("dpo_orpo", dpo, dict(loss_type="orpo")),
    ("reward_model", reward_model, dict(center_coef=0.1)),
    ("reward_model_ranking", reward_model, dict(loss="plackett-luce")),
    ("reward_model_outcome", reward_model, dict(loss="outcome")),
]


@pytest.mark.parametrize("name, script, flags", MEANS, ids=[name for name, _, _ in MEANS])
def test_metrics_are_means(name, script, flags, chain, tmp_path, monkeypatch):  # noqa: F811, PLR0917
    """Every row three times, in micro-batches, gives the metrics of every row once.

    This holds for training and for evaluations, at the first step and after an update."""
    if script is not reward_model:
        given_sample(monkeypatch, script, letters_of)
    rows = ROWS[:4]
    pairs = [
        row | {"completion": row["answer"], "chosen": row["answer"], "rejected": row["answer"] * 2}
        for row in rows
    ]
    logs = {}
    for copies, budget in [(1, 10**6), (3, 30)]:
        args = flags | dict(
            model=str(chain / "sft"),
            dataset=write_rows(tmp_path / f"rows{copies}.jsonl", pairs),
            eval_dataset=write_rows(tmp_path / f"held_out{copies}.jsonl", pairs[1:] * copies),
            micro_batch_tokens=budget,
            learning_rate=1e-3,
            warmup_steps=0,
            lr_schedule="constant",
            eval_every=1,
            output_dir=str(tmp_path / str(copies)),
        )
        if script in SAMPLERS:
            body = (
                "return [None if 'z' in p else float(len(c)) for p, c in zip(prompts, completions)]"
            )
            args |= dict(
                reward=f"{chain / 'reward_model'},{reward_file(tmp_path, body)}",
                num_generations=4,
                max_completion_length=6,
            )
        if script is rejection_sampling:
            args |= dict(prompts_per_iteration=4 * copies, batch_size=4 * copies, iterations=2)
        elif script in SAMPLERS:
            args |= dict(prompts_per_step=4 * copies, steps=2)
            if flags.get("ptx_coef"):  # 4 prompts and 4 completions each are 16 rows
                args["ptx_dataset"] = write_rows(tmp_path / "ptx.jsonl", pairs * 4)
        else:
            args |= dict(batch_size=4 * copies, epochs=2 * copies)
        script.main(script.Args(**args))
        logs[copies] = read_strictly(tmp_path / str(copies))["metrics.jsonl"]
        check_shares(logs[copies])
    assert [row["step"] for row in logs[1]] == [0, 1, 2] == [row["step"] for row in logs[3]]
    num_tokens = 4 * 4 * 3  # of completions, at least
    for once, thrice in zip(logs[1], logs[3]):
        assert once.keys() == thrice.keys()
        for metric in once.keys() - NOT_MEANS:
            a, b = once[metric], thrice[metric]
            if metric == "eval/accuracy_stderr":
                b = b * math.sqrt(3)
            if metric == "ratio_max_dev":
                assert max(a, b) < 1e-4
                continue
            # while the policy is the reference, rounding decides which reward is higher
            before = 0 if metric.startswith("eval/") else 1
            if script is dpo and "accuracy" in metric and once["step"] == before:
                continue
            # a ratio at the end of the clip range may be on either side
            is_clip = metric.endswith("clip_fraction")
            tolerance = 2 / num_tokens if is_clip else 1e-3
            assert (a is None) == (b is None), metric
            assert a is None or b == pytest.approx(a, rel=2e-3, abs=tolerance), metric


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_metrics_are_means_over_updates(script, chain, tmp_path, monkeypatch):  # noqa: F811
    """With learning rate 0, three passes over the rollouts have the metrics of one."""
    given_sample(monkeypatch, script, letters_of)
    logs = []
    for update_epochs in (1, 3):
        args = dict(
            model=str(chain / "sft"),
            dataset=write_rows(tmp_path / "rows.jsonl", ROWS),
            reward=reward_file(tmp_path, "return [float(len(c)) for c in completions]"),
            num_generations=4,
            max_completion_length=6,
            prompts_per_step=5,
            steps=1,
            update_epochs=update_epochs,
            learning_rate=0.0,
            output_dir=str(tmp_path / str(update_epochs)),
        )
        if script is ppo:  # 20 rows of the pretraining loss are the same in every update
            rows = [row | {"completion": row["answer"]} for row in ROWS]
            data = write_rows(tmp_path / "ptx.jsonl", rows * 4)
            args |= dict(ptx_dataset=data, ptx_coef=0.5, value_clip=0.01)
        script.main(script.Args(**args))
        logs += read_strictly(tmp_path / str(update_epochs))["metrics.jsonl"]
    once, thrice = logs
    assert once.keys() == thrice.keys() and once["grad_norm"] > 0.01 and once["entropy"] > 0.1
    for metric in once.keys() - (NOT_MEANS - {"padding"}):
        assert thrice[metric] == pytest.approx(once[metric], rel=1e-4, abs=1e-5), metric
