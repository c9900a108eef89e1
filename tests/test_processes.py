"""Two processes compute what one does: torchrun on the CPU with gloo and FSDP2.

One start runs all seven scripts."""

import importlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter

import background
import processes
import pytest
import torch
from conftest import MORE, save_tiny
from conftest import NAMES as TINY
from processes import HALVED, NAMES, ONLINE, launch, policy_is_reference, start
from test_resume import assert_same_run, states, step_of
from test_scripts import background_chain, chain, metrics  # noqa: F401 (a fixture)

import common

# metrics that depend on the clock or on how rows are cut into micro-batches
CLOCK = ("tokens_per_second", "seconds/sample", "seconds/train", "padding")


def assert_close(run, other):
    """Compare final weights and the state of Adam by norms.

    Where a gradient is nearly 0, Adam can move a single weight the other way."""
    a = states(run)
    b = states(other)
    assert a.keys() == b.keys()
    for key in a:
        ours, theirs = a[key].double(), b[key].double()
        assert ours.shape == theirs.shape, key
        assert (ours - theirs).norm() <= 5e-5 * theirs.norm(), key


def everything(number, folder):
    for name in [*TINY, *MORE]:
        save_tiny(name, folder / "models" / name)
    done = launch(number, "everything", folder, background_chain())
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@background.job
def one(folder, items):
    """Results of one process."""
    return lambda: everything(1, folder)


@background.job
def two(folder, items):
    """Results of two processes, of which only rank 0 prints."""

    def run():
        done = everything(2, folder)
        num_starts = 1 + len(NAMES) + 2 * len(HALVED)  # 1: architectures
        assert done.stdout.count("device: ") == num_starts

    return run


@background.job
def killed(folder, items):
    """A run of two processes, one of which is killed."""

    def run():
        done = launch(2, "killed", folder, background_chain())
        assert done.returncode != 0

    return run


@background.job
def interrupted(folder, items):
    """A run that is stopped by SIGTERM to torchrun after the first step, and its output."""

    def run():
        flags = dict(stdout=subprocess.PIPE)
        with start(2, "interrupted", folder, background_chain(), **flags) as process:
            deadline = time.time() + 300
            while not (folder / "started").exists():
                assert process.poll() is None and time.time() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=300)[0]
        assert process.returncode != 0
        (folder / "output").write_text(output)

    return run


@background.job
def bad_data(folder, items):
    """Error messages of a run on a dataset with a bad row."""
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n')

    def run():
        done = launch(2, "bad_file", folder, background_chain())
        assert done.returncode != 0
        (folder / "errors").write_text(done.stderr)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_compute_what_one_does(name, one, two):
    """Gradients, completions, log-probs of fixed rows after three steps, metrics, checkpoints."""
    expected = torch.load(one / f"{name}.pt")
    found = torch.load(two / f"{name}.pt")
    assert len(found["gradients"]) == len(expected["gradients"]) >= 3
    for gradient, other in zip(found["gradients"], expected["gradients"]):
        assert (gradient - other).norm() < 1e-5 * other.norm()
    # rounding, below 1e-6, decides no token and no pair
    assert min(expected["margins"]) > 1e-5
    assert found["sampled"] == expected["sampled"]
    assert bool(found["sampled"]) == (name != "reward_model")
    if name != "reward_model":
        assert (found["logprobs"] - expected["logprobs"]).abs().max() < 1e-5
    rows = metrics(two / name)
    others = metrics(one / name)
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row.keys() - set(CLOCK):
            if "accuracy" in key and policy_is_reference(name, max(0, row["step"] - 1)):
                continue  # margins are rounding errors
            # rounding could move a token or two of about 60 across the clip range
            tolerance = 0.05 if "clip_fraction" in key else 1e-4
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=tolerance), key
    assert_close(two / name, one / name)
    keep = ("step", "prompt", "completion")
    texts = [(folder / name / "samples.jsonl").read_text().splitlines() for folder in (two, one)]
    rows, others = ([{k: json.loads(line)[k] for k in keep} for line in lines] for lines in texts)
    assert rows == others


@pytest.mark.parametrize("name", HALVED)
def test_resume_is_exact(name, two):
    """Bit for bit with as many processes, after dropping lines logged since the checkpoint."""
    assert_same_run(two / name, two / "halves" / name)


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_with_another_number_of_processes(  # noqa: PLR0917
    number,
    one,
    two,
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    folder = tmp_path / "run"
    names = HALVED if number == 1 else ["ppo"]
    for name in names:
        shutil.copytree(two / "after two" / name, folder / name)
    if number == 1:  # in this process
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(common, "TASK_ROWS", processes.TASK_ROWS)
        processes.third_step(folder, chain)
    else:
        done = launch(number, "third_step", folder, chain)
        assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        assert_close(folder / name, one / name)


def test_every_architecture_is_sharded_and_computes_the_same(one, two):
    """Tied heads, logit caps and biases included."""
    expected = torch.load(one / "architectures.pt")
    found = torch.load(two / "architectures.pt")
    assert found.keys() == expected.keys() and len(found) >= 5
    for name, (gradient, completions) in expected.items():
        assert (found[name][0] - gradient).norm() < 1e-5 * gradient.norm(), name
        assert found[name][1] == completions, name


def test_killing_one_process_ends_all(killed, one, chain, tmp_path, monkeypatch):  # noqa: F811
    """The checkpoint of step 2 is intact; resuming drops the metrics of step 3 and ends right."""
    folder = tmp_path / "run"
    shutil.copytree(killed / "ppo", folder / "ppo")
    assert step_of(folder / "ppo") == 2
    assert [row["step"] for row in metrics(folder / "ppo")] == [0, 1, 2, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "TASK_ROWS", processes.TASK_ROWS)
    processes.third_step(folder, chain)
    assert [row["step"] for row in metrics(folder / "ppo")] == [0, 1, 2, 3]
    assert_close(folder / "ppo", one / "ppo")


def test_signal_to_torchrun_saves(interrupted):
    """All processes stop after the same step, and one of them prints a message."""
    step = step_of(interrupted / "sft")
    output = (interrupted / "output").read_text()
    assert step >= 1 and output.count(f"stopped after step {step};") == 1
    assert step == metrics(interrupted / "sft")[-1]["step"]


def test_bad_row_ends_all_processes(bad_data):
    errors = (bad_data / "errors").read_text().splitlines()
    assert [line for line in errors if line.startswith("error: ") and "bad.jsonl row 1" in line]


# ---------------------------------------------------------------- in this process
@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_ratio_is_a_tensor_on_every_rank(name, value):
    """Also where it is exactly 1, otherwise all_reduce gets two types; NaN is not hidden."""
    sums = Counter()
    logprobs = torch.full((2, 3), value)
    importlib.import_module(name).track_ratio(sums, logprobs, torch.zeros(2, 3))
    deviation = torch.as_tensor(sums["ratio_max_dev"])
    assert deviation.dtype == torch.float32
    assert torch.equal(deviation.isnan(), torch.tensor(value).isnan())


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_micro_batches_of_each_rank(world_size, group_size, monkeypatch):
    """Every row once, equally many micro-batches on each rank, groups together, equal shares."""
    lengths = torch.tensor([3, 9, 4, 12, 7, 1, 5, 30, 2, 8, 6, 6, 5, 9, 14, 3, 21, 2])
    batch = {
        "attention_mask": (torch.arange(30) < lengths[:, None]).long(),
        "group": torch.arange(len(lengths)) // group_size,
    }
    monkeypatch.setattr(common, "world_size", lambda: world_size)
    numbers = []

    def lists_of(rank, largest):
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "all_reduce", lambda n, op: numbers.append(n) or largest or n)
        return common.micro_batch_rows(batch, 40)

    for rank in range(world_size):
        lists_of(rank, None)
    shares = [lists_of(rank, max(numbers)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(18))
    for rows in (rows for share in shares for rows in share):
        assert rows[::group_size] == [i - i % group_size for i in rows[::group_size]]
    counts = [sum(len(rows) for rows in share) for share in shares]
    assert max(counts) - min(counts) <= group_size
