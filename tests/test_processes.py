"""Several processes compute what one does: torchrun on the CPU with gloo, two and three of them.

One launch for each way runs all seven mains; a minute and a half in all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import NAMES
from test_resume import assert_same_run, states
from test_scripts import chain, metrics  # noqa: F401 (a fixture)

import common

WAYS = [(2, "full"), (3, "none"), (3, "layers")]
CLOCK = (
    "tokens_per_second",
    "seconds/sample",
    "seconds/train",
    "padding",
)  # and what micro-batches decide


def command(processes, *args):
    worker = [str(Path(__file__).with_name("processes.py")), *map(str, args)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), *worker]


def launch(processes, *args, timeout=300):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    options = dict(capture_output=True, text=True, env=environment, timeout=timeout)
    return subprocess.run(command(processes, *args), **options)


def assert_close(run, other):
    """Final weights and Adam's state, to rounding."""
    for a, b in states(run, other):
        assert all(
            a[key].shape == b[key].shape and torch.allclose(a[key], b[key], atol=1e-5) for key in a
        )


@pytest.fixture(scope="module")
def one(chain, tmp_path_factory):  # noqa: F811
    """What one process computes."""
    folder = tmp_path_factory.mktemp("one")
    done = launch(1, "every_script", folder, chain)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def several(request, chain, tmp_path_factory):  # noqa: F811
    """What several compute."""
    folder, (processes, way) = tmp_path_factory.mktemp("several"), request.param
    done = launch(processes, "every_script", folder, chain, way)
    assert done.returncode == 0, done.stderr[-2000:]
    # the first process alone speaks
    assert done.stdout.count("device: ") == len(NAMES) and f"{processes} processes" in done.stdout
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_compute_what_one_does(name, one, several):
    """Gradients, samples, log-probs of fixed rows after three steps, metrics and checkpoints."""
    expected, found = (torch.load(folder / f"{name}.pt") for folder in (one, several))
    assert len(found["gradients"]) == len(expected["gradients"]) >= 3
    for mine, theirs in zip(found["gradients"], expected["gradients"]):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    assert len(found["sampled"]) == len(expected["sampled"])
    for (completions, logprobs), theirs in zip(found["sampled"], expected["sampled"]):
        assert completions == theirs[0]
        for row, other in zip(logprobs, theirs[1]):
            assert row == pytest.approx(other, abs=1e-4)
    if name != "reward_model":
        assert (found["logprobs"] - expected["logprobs"]).abs().max() < 1e-5
    rows, others = metrics(several / name), metrics(one / name)
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row.keys() - set(CLOCK):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key
    assert_close(several / name, one / name)
    texts = [
        (folder / name / "samples.jsonl").read_text().splitlines() for folder in (several, one)
    ]
    keep = ("step", "prompt", "completion")
    rows, others = ([{k: json.loads(line)[k] for k in keep} for line in lines] for lines in texts)
    assert rows == others


def test_resume_is_exact_and_goes_on_elsewhere(one, chain, tmp_path):  # noqa: F811
    """Bit for bit with as many processes; to rounding with one or three, sharded or not."""
    done = launch(2, "two_and_one", tmp_path, chain, "full")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("sft", "ppo"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "halves" / name)
    for processes in (1, 3):
        folder = tmp_path / f"{processes}"
        shutil.copytree(tmp_path / "after two", folder)
        done = launch(processes, "go_on", folder, chain)
        assert done.returncode == 0, done.stderr[-2000:]
        for name in ("sft", "ppo"):
            assert_close(folder / name, one / name)


def test_architectures(tiny_dirs, tmp_path):
    """Layers are found in any model, tied heads, caps and biases included: GPT-2, GPT-NeoX, Gemma, Qwen."""
    models, found = tmp_path / "models", []
    for name, path in tiny_dirs.items():
        shutil.copytree(path, models / name)
    for processes, way in ((1, "none"), (2, "full"), (2, "none")):
        folder = tmp_path / f"{processes} {way}"
        folder.mkdir()
        done = launch(processes, "architectures", folder, models, way)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(folder / "found.pt"))
    expected = found.pop(0)
    for each in found:
        assert each.keys() == expected.keys() and len(each) == 2 * len(tiny_dirs)
        for name, (gradient, tokens) in expected.items():
            assert (each[name][0] - gradient).norm() < 1e-5 * gradient.norm(), name
            assert each[name][1] == tokens, name


@pytest.mark.parametrize("way", ["killed", "raises"])
def test_one_that_dies_ends_all(way, one, chain, tmp_path):  # noqa: F811
    """Soon, with its message first; and --resume goes on."""
    began = time.time()
    done = launch(2, "dies", tmp_path, chain, way)
    assert done.returncode != 0 and time.time() - began < 60
    if way == "raises":
        words = "ValueError: the last process has failed", "process 0 lost the others"
        found = [done.stderr.find(text) for text in words]
        assert found[0] >= 0 and (found[1] < 0 or found[1] > found[0])
    assert json.loads((tmp_path / "ppo/checkpoint/state.json").read_text())["step"] == 2
    if way == "killed":
        done = launch(2, "go_on", tmp_path, chain, "full")
        assert done.returncode == 0, done.stderr[-2000:]
        assert_close(tmp_path / "ppo", one / "ppo")


def test_a_signal_to_torchrun_saves(chain, tmp_path):  # noqa: F811
    """All processes stop after the same step, and the line that says so comes once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    process = subprocess.Popen(command(2, "interrupted", tmp_path, chain), **options)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    step = json.loads((tmp_path / "sft/checkpoint/state.json").read_text())["step"]
    assert step >= 1 and errors.count(f"stopped after step {step} of ") == 1


def test_bad_data_is_said_once(chain, tmp_path):  # noqa: F811
    done = launch(3, "bad_file", tmp_path, chain)
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "bad.jsonl line 1" in done.stderr


def test_a_reward_that_raises_is_called_by_one_and_said_once(chain, tmp_path):  # noqa: F811
    done = launch(2, "bad_reward", tmp_path, chain)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the judge is away" in line and "broken" in line
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["0"]


# ---------------------------------------------------------------- without starting any
@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_micro_batches(world, monkeypatch):
    """Every row once, as many lists in each process, about as many tokens."""
    lengths = [3, 9, 4, 12, 7, 1, 5, 30, 2, 8, 6, 6, 5, 9, 14, 3, 21]
    shares = []
    for rank in range(world):
        monkeypatch.setattr(common, "world", lambda: world)
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        shares.append(common.micro_batches(lengths, 40, list(range(0, 17, 2))))
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(0, 17, 2))
    counts = [sum(len(rows) for rows in share) for share in shares]
    assert max(counts) - min(counts) <= 1
