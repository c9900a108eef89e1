"""Several processes compute what one does: torchrun on the CPU with gloo, FSDP2 over two or three.

One start runs all seven mains, and what else is compared."""

import json
import shutil
import signal
import subprocess
import time

import background
import processes
import pytest
import torch
from conftest import MORE, save_tiny
from conftest import NAMES as TINY
from processes import NAMES, launch, start
from test_resume import assert_same_run, states, step_of
from test_scripts import background_chain, chain, metrics  # noqa: F401 (a fixture)

import common

# and what depends on how rows are cut into micro-batches
CLOCK = ("tokens_per_second", "seconds/sample", "seconds/train", "padding")


def assert_close(run, other):
    """Final weights and Adam's state, to rounding, by their norms: where a gradient is nearly 0
    Adam can take a single weight another way."""
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
    """What one process computes."""
    return lambda: everything(1, folder)


@background.job
def two(folder, items):
    """What two compute."""

    def run():
        done = everything(2, folder)
        # the first process alone speaks: in seven runs, and twice in sft's and ppo's two halves
        assert done.stdout.count("device: 2 x cpu") == len(NAMES) + 4

    return run


@background.job
def dies(folder, items):
    """One of two processes is killed."""

    def run():
        done = launch(2, "dies", folder, background_chain())
        assert done.returncode != 0

    return run


@background.job
def interrupted(folder, items):
    """SIGTERM to torchrun after the first step; what was said."""

    def run():
        flags = dict(stdout=subprocess.PIPE)
        with start(2, "interrupted", folder, background_chain(), **flags) as process:
            deadline = time.time() + 300
            while not (folder / "began").exists():
                assert process.poll() is None and time.time() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=300)[0]
        assert process.returncode != 0
        (folder / "said").write_text(said)

    return run


@background.job
def bad_data(folder, items):
    """A data set that no process can read; the errors."""
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n')

    def run():
        done = launch(2, "bad_file", folder, background_chain())
        assert done.returncode != 0
        (folder / "errors").write_text(done.stderr)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_compute_what_one_does(name, one, two):
    """Gradients, samples, log-probs of fixed rows after three steps, metrics and checkpoints."""
    expected = torch.load(one / f"{name}.pt")
    found = torch.load(two / f"{name}.pt")
    assert len(found["gradients"]) == len(expected["gradients"]) >= 3
    for gradient, other in zip(found["gradients"], expected["gradients"]):
        assert (gradient - other).norm() < 1e-5 * other.norm()
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
            # a count is off by one token or pair where rounding decides it
            tolerance = 0.1 if "accuracy" in key or "clip_fraction" in key else 1e-4
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=tolerance), key
    assert_close(two / name, one / name)
    keep = ("step", "prompt", "completion")
    texts = [(folder / name / "samples.jsonl").read_text().splitlines() for folder in (two, one)]
    rows, others = ([{k: json.loads(line)[k] for k in keep} for line in lines] for lines in texts)
    assert rows == others


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_resume_is_exact(name, two):
    """Bit for bit with as many processes."""
    assert_same_run(two / name, two / "halves" / name)


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_goes_on_with_more_processes_or_fewer(  # noqa: PLR0917
    number,
    one,
    two,
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    folder = tmp_path / "run"
    names = ["sft", "ppo"] if number == 1 else ["ppo"]
    for name in names:
        shutil.copytree(two / "after two" / name, folder / name)
    if number == 1:  # which needs no start
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(common, "TASK_ROWS", processes.TASK_ROWS)
        processes.go_on(folder, chain)
    else:
        done = launch(number, "go_on", folder, chain)
        assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        assert_close(folder / name, one / name)


def test_every_architecture_is_split_and_computes_the_same(one, two):
    """Layers are found in any model, tied heads, caps and biases included, and split."""
    expected = torch.load(one / "architectures.pt")
    found = torch.load(two / "architectures.pt")
    assert found.keys() == expected.keys() and len(found) >= 5
    for name, (gradient, completions) in expected.items():
        assert (found[name][0] - gradient).norm() < 1e-5 * gradient.norm(), name
        assert found[name][1] == completions, name


def test_one_that_dies_ends_all(dies):
    """Soon, and the last checkpoint is whole: the run goes on as any other would."""
    assert step_of(dies / "ppo") == 2
    assert [row["step"] for row in metrics(dies / "ppo")] == [0, 1, 2, 3]


def test_a_signal_to_torchrun_saves(interrupted):
    """All processes stop after the same step, and the line that says so comes once."""
    step = step_of(interrupted / "sft")
    said = (interrupted / "said").read_text()
    assert step >= 1 and said.count(f"stopped after step {step} of ") == 1
    assert step == metrics(interrupted / "sft")[-1]["step"]


def test_bad_data_is_said_once(bad_data):
    errors = (bad_data / "errors").read_text()
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert "bad.jsonl line 1" in errors


# ---------------------------------------------------------------- without starting any
@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_shares_of_micro_batches(world_size, together, monkeypatch):
    """Every row once, as many micro-batches in each process, about as many rows."""
    lengths = torch.tensor([3, 9, 4, 12, 7, 1, 5, 30, 2, 8, 6, 6, 5, 9, 14, 3, 21, 2])
    batch = {
        "attention_mask": (torch.arange(30) < lengths[:, None]).long(),
        "group": torch.arange(len(lengths)) // together,
    }
    monkeypatch.setattr(common, "world_size", lambda: world_size)
    numbers = []

    def lists_of(rank, most):
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "all_reduce", lambda n, op: numbers.append(n) or most or n)
        return common.micro_batch_rows(batch, 40)

    for rank in range(world_size):
        lists_of(rank, None)
    shares = [lists_of(rank, max(numbers)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(18))
    for rows in (rows for share in shares for rows in share):
        assert rows[::together] == [i - i % together for i in rows[::together]]
    counts = [sum(len(rows) for rows in share) for share in shares]
    assert max(counts) - min(counts) <= together
