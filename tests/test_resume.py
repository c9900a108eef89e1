"""No run is lost: signals, kills, full disks, non-finite gradients; --resume is exact."""

import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import background
import processes
import pytest
import torch
from processes import NAMES, ONLINE, SIGNALS, run
from safetensors.torch import load_file
from test_scripts import (
    background_chain,
    chain,  # noqa: F401 (a fixture)
    metrics,
    reward_file,
    write_rows,
)

import common
import rejection_sampling
import sft

SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
CLOCK = ("tokens_per_second", "seconds/sample", "seconds/train")


def states(folder):
    """All tensors of a run: final weights, and models and optimizer of the last checkpoint."""
    checkpoint = torch.load(folder / "checkpoint/state.pt", weights_only=True)
    tensors = load_file(folder / "model.safetensors") | checkpoint["models"]
    for name, state in checkpoint["optimizer"]["state"].items():
        tensors |= {f"{name} {key}": value for key, value in state.items()}
    return tensors


def lines_of(folder):
    """Contents of the logs of a run, without metrics that depend on the clock."""
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(folder)]
    names = [name for name in ("samples.jsonl", "rollouts.jsonl") if (folder / name).exists()]
    return rows, {name: (folder / name).read_text() for name in names}


def assert_same_run(one, other):
    """Compare weights, optimizer, metrics, samples and rollouts bit for bit."""
    a = states(one)
    b = states(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines_of(one) == lines_of(other)
    assert step_of(one) == step_of(other)


def step_of(folder):
    return torch.load(folder / "checkpoint/state.pt", weights_only=True)["step"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action) calls action() once, after step n is logged."""

    def patch(step, action):
        inner = common.Run.log
        done = []

        def log(self, number, *args, **kwargs):
            inner(self, number, *args, **kwargs)
            if number == step and not done:
                done.append(number)
                action()

        monkeypatch.setattr(common.Run, "log", log)

    return patch


def interrupt():
    raise KeyboardInterrupt


# ---------------------------------------------------------------- exact resume
@background.job
def ended(folder, items):
    """The directory of processes.resumes."""

    def run():
        done = processes.launch(1, "resumes", folder, background_chain())
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def statuses_of(name, folder):
    statuses = json.loads((folder / f"{name}.json").read_text())
    outputs = [path for path in sorted(folder.glob(f"{name}.*")) if path.suffix != ".json"]
    assert statuses["whole"] == 0, [path.read_text()[-500:] for path in outputs]
    return statuses


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_as_an_undisturbed_one(name, ended):
    """SIGKILL before, during and after writes of logs and checkpoints, from start to end."""
    *killed, last = statuses_of(name, ended)["killed"]
    assert len(killed) >= 4 and set(killed) == {-signal.SIGKILL} and last == 0
    assert_same_run(ended / "whole" / name, ended / "killed" / name)


@pytest.mark.parametrize("name, number", [(name, n) for name in NAMES for n in SIGNALS[name]])
def test_signals_finish_the_step_and_save(name, number, ended):
    """Independently of --save-every. The resumed run ends like the undisturbed one."""
    statuses = statuses_of(name, ended)
    assert statuses[number.name] == 128 + number
    output = (ended / f"{name}.{number.name}").read_text()
    assert "stopped after step 3; --resume continues" in output
    assert statuses[f"{number.name} resumed"] == 0
    assert not list((ended / number.name).glob(f"{name}.*")), "resuming started over"
    assert_same_run(ended / "whole" / name, ended / number.name / name)


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers of pytest after each test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_signal_during_the_all_reduce_is_not_lost(chain, tmp_path, monkeypatch):  # noqa: F811
    """It comes too late for step 2, so the run stops after step 3."""
    calls = []

    def interrupted_all_reduce(value, op="sum"):
        if op == "max":
            calls.append(op)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return value

    # sft.py reduces maxima in checkpoint_if_due only: micro_batch_rows gets the real one
    checkpoint_if_due = common.Run.checkpoint_if_due

    def interrupted_checkpoint(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "all_reduce", interrupted_all_reduce)
            checkpoint_if_due(self, *args, **kwargs)

    monkeypatch.setattr(common.Run, "checkpoint_if_due", interrupted_checkpoint)
    with pytest.raises(SystemExit) as stopped:
        run("sft", chain, tmp_path / "run", save_every=0)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert step_of(tmp_path / "run") == 3


@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo", "rejection_sampling"])
def test_no_steps_train_nothing(name, chain, tmp_path):  # noqa: F811
    """--steps 0 evaluates and saves the start model."""
    run(name, chain, tmp_path / "run", steps=0, epochs=1, eval_every=0)
    assert {row["step"] for row in metrics(tmp_path / "run")} == {0}
    start = load_file(chain / "sft/model.safetensors")
    saved = load_file(tmp_path / "run/model.safetensors")
    common_names = start.keys() & saved.keys()
    assert len(common_names) > 5
    assert all(torch.equal(start[key], saved[key]) for key in common_names)


def test_a_finished_run_restores_the_signal_handlers(chain, tmp_path):  # noqa: F811
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    run("sft", chain, tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("when", ["sampling", "writing", "training"])
def test_rollouts_of_an_interrupted_iteration(when, chain, tmp_path, monkeypatch, at_step):  # noqa: F811, PLR0917
    """rejection_sampling.py reads rollouts of before the checkpoint and samples later ones again.

    The second iteration is interrupted while it samples, after it has written 5 of 12 rollouts, or
    after the first of its two steps."""
    run("rejection_sampling", chain, tmp_path / "whole", save_every=1)
    folder = tmp_path / "run"
    iterations = []
    sample = rejection_sampling.sample
    append = common.Run.append

    def spy_sample(policy, examples, **options):
        if len(examples) == 12:  # the evaluation has 16
            iterations.append(step_of(folder) if iterations else 0)
            if when == "sampling" and len(iterations) == 2:
                interrupt()
        return sample(policy, examples, **options)

    def interrupted_append(self, name, row):
        append(self, name, row)
        if when == "writing" and len(iterations) == 2 and name == "rollouts.jsonl":
            if len((folder / name).read_text().splitlines()) == 12 + 5:
                interrupt()

    monkeypatch.setattr(rejection_sampling, "sample", spy_sample)
    monkeypatch.setattr(common.Run, "append", interrupted_append)
    if when == "training":  # after logging step 4, which has no checkpoint yet
        at_step(4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("rejection_sampling", chain, folder, save_every=1)
    assert iterations == [0, 2]
    monkeypatch.setattr(common.Run, "append", append)
    run("rejection_sampling", chain, folder, save_every=1, resume=True)
    assert iterations == ([0, 2] if when == "training" else [0, 2, 2])
    assert_same_run(tmp_path / "whole", folder)


def test_resuming_leaves_other_files_alone(chain, tmp_path):  # noqa: F811
    """A user's own .jsonl files in the run directory are not logs."""
    run("sft", chain, tmp_path / "run", steps=2)
    own = tmp_path / "run/my_notes.jsonl"
    own.write_text('{"note": 1}\n')
    run("sft", chain, tmp_path / "run", resume=True)
    assert own.read_text() == '{"note": 1}\n'


@pytest.mark.slow
def test_killed_five_times(tmp_path):
    """SIGKILL of `python sft.py` at random moments, every other one during a checkpoint write."""
    command = [sys.executable, sft.__file__, "--steps", "40", "--save-every", "1", "--seed", "3"]
    command += ["--micro-batch-tokens", "600", "--eval-every", "10"]
    quiet = dict(
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    subprocess.run([*command, "--output-dir", tmp_path / "whole"], check=True, **quiet)
    draw = random.Random(1)
    folder = tmp_path / "killed"
    half_written = folder / "checkpoint/state.pt.new"
    saved = [0]
    writing = 0

    def last_saved():
        try:
            return step_of(folder)
        except FileNotFoundError:  # none yet
            return 0

    for kill in range(5):
        resume = ["--resume"] if kill else []
        process = subprocess.Popen([*command, "--output-dir", folder, *resume], **quiet)
        try:
            while process.poll() is None and last_saved() == saved[-1]:
                time.sleep(0.002)
            if kill % 2 == 0:
                while process.poll() is None and not half_written.exists():
                    pass
            else:
                time.sleep(draw.uniform(0.0, 0.3))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        writing += half_written.exists()
        half_written.unlink(missing_ok=True)
        saved.append(last_saved())
    assert saved == sorted(saved) and saved[0] < saved[-1] and writing >= 2
    subprocess.run([*command, "--output-dir", folder, "--resume"], check=True, **quiet)
    assert_same_run(tmp_path / "whole", folder)
    print(f"killed after steps {saved}, {writing} times while a checkpoint was being written")


# ---------------------------------------------------------------- flags of --resume
def resume(script, *argv):
    """Run `python script.py --resume ARGV` in this process. Returns its args and metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--resume", *map(str, argv)])
        args = common.cli(script.Args, laptop=dict(learning_rate=0.5, seed=9))
        return args, script.main(args)


def test_saved_flags_hold_and_the_command_line_wins(chain, tmp_path):  # noqa: F811
    """Flags on the command line hold from the checkpoint on, to the bit."""
    run("sft", chain, tmp_path / "half", steps=2, seed=3)
    flags = json.loads((tmp_path / "half/args.json").read_text())
    args, _ = resume(sft, "--output-dir", tmp_path / "half")
    assert vars(args) == flags | {"resume": True}
    run("sft", chain, tmp_path / "more", steps=4, seed=3, lr_schedule="constant")
    run("sft", chain, tmp_path / "few", steps=2, seed=3, lr_schedule="constant")
    more = ["--steps", 4, "--save-every", 1, "--log-every", 1]
    args, _ = resume(sft, "--output-dir", tmp_path / "few", *more)
    assert (args.steps, args.save_every, args.seed, args.batch_size) == (4, 1, 3, 16)
    saved = json.loads((tmp_path / "few/args.json").read_text())
    assert saved == vars(args)
    a = states(tmp_path / "more")
    b = states(tmp_path / "few")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_a_finished_run_changes_nothing(chain, tmp_path):  # noqa: F811
    run("sft", chain, tmp_path / "run", steps=2)
    before = states(tmp_path / "run")
    logs = lines_of(tmp_path / "run")
    assert run("sft", chain, tmp_path / "run", steps=2, resume=True) == {}
    after = states(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lines_of(tmp_path / "run") == logs


def test_runs_that_cannot_be_resumed(chain, tmp_path):  # noqa: F811
    """A run of another script, and a directory without a run."""
    run("grpo", chain, tmp_path / "run", steps=1)
    before = lines_of(tmp_path / "run")
    with pytest.raises(TypeError, match="scale_rewards|kl_estimator"):
        resume(SCRIPTS["rloo"], "--output-dir", tmp_path / "run")
    assert lines_of(tmp_path / "run") == before
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resume(sft, "--output-dir", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- a full disk
def test_a_full_disk_keeps_the_last_good_checkpoint(chain, tmp_path, at_step):  # noqa: F811
    """The size limit of files is a megabyte, less than a checkpoint. Later it is lifted."""
    run("sft", chain, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard)))
    try:
        with pytest.raises((OSError, RuntimeError)):
            run("sft", chain, tmp_path / "halves")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step_of(tmp_path / "halves") == 2
    run("sft", chain, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


# ---------------------------------------------------------------- memory
def test_memory_and_file_handles_do_not_grow(chain, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    inner = common.Run.log

    def log(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(common.Run, "log", log)
    flags = dict(steps=80, epochs=40, batch_size=8, save_every=20, eval_every=40)
    run("sft", chain, tmp_path / "run", **flags, learning_rate=1e-5)
    half = max(memory for memory, _ in seen[:40])
    end = max(memory for memory, _ in seen[40:])
    assert len(seen) == 81 and end - half < 16 * 2**20
    assert seen[-1][1] <= seen[20][1]


# ---------------------------------------------------------------- steps that fail or teach nothing
def test_a_gradient_that_is_not_finite_stops_the_run(chain, tmp_path):  # noqa: F811
    """No update is made, and the last checkpoint stays."""
    flags = dict(save_every=1, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(RuntimeError, match="norm.*non-finite"):
        run("sft", chain, tmp_path / "run", **flags)
    assert step_of(tmp_path / "run") == 1 and len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("poisoned", ["policy", "reference"])
def test_a_weight_that_is_nan_stops_the_run(  # noqa: PLR0917
    name,
    poisoned,
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    at_step,
):
    models = []
    load_policy = SCRIPTS[name].load_policy

    def load(*args, **kwargs):
        models.append(load_policy(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(SCRIPTS[name], "load_policy", load)

    def poison():
        model = models[0 if poisoned == "policy" else 1]
        with torch.no_grad():
            model.get_output_embeddings().weight[5] = float("nan")

    at_step(1, poison)
    flags = dict(dataset=prompts_file(tmp_path), save_every=1)
    with pytest.raises(RuntimeError, match="norm.*non-finite"):
        run(name, chain, tmp_path / "run", **flags)
    assert step_of(tmp_path / "run") == 1 and len(metrics(tmp_path / "run")) == 1


def prompts_file(folder):
    """Prompts of the built-in task as a file: no evaluation, which takes time."""
    return write_rows(folder / "prompts.jsonl", common.task_rows("prompts", False, 1))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    "body, flags",
    [
        ("return [1.0] * len(prompts)", dict(kl_coef=0.0)),
        ("return [float(len(c)) for c in completions]", dict(max_completion_length=1)),
    ],
    ids=["equal rewards", "no EOS"],
)
def test_steps_that_teach_nothing(name, body, flags, chain, tmp_path):  # noqa: F811, PLR0917
    """No crash and no NaN. The step counts, and zero_std_groups is 1 if all rewards are equal."""
    changes = dict(dataset=prompts_file(tmp_path), steps=2) | flags
    if name == "grpo":
        changes |= dict(mask_truncated=True)
    run(name, chain, tmp_path / "run", reward=reward_file(tmp_path, body), **changes)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all("loss" in row for row in rows)
    after = load_file(tmp_path / "run/model.safetensors")
    assert all(weight.isfinite().all() for weight in after.values())
    if name != "ppo" and "max_completion_length" not in flags:
        assert rows[-1]["zero_std_groups"] == 1.0 and rows[-1]["loss"] == 0
        before = load_file(chain / "sft/model.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ONLINE)
def test_completions_of_eos_only(name, chain, tmp_path, monkeypatch):  # noqa: F811
    def sample(policy, examples, *, num_generations, **options):
        eos_ids = policy.generation_config.eos_token_id
        rollout = {"completion_ids": eos_ids[:1], "finished": True}
        return [example | rollout for example in examples for _ in range(num_generations)]

    monkeypatch.setattr(SCRIPTS[name], "sample", sample)
    run(name, chain, tmp_path / "run", steps=2)
    last = metrics(tmp_path / "run")[-1]
    assert last["completion_length"] == last["eos_rate"] == 1
    weights = load_file(tmp_path / "run/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
