"""Never lose a run: what happens when one is stopped, killed, starved of disk, or fed a bad reward.

pytest tests/test_resume.py && pytest -m slow tests/test_resume.py"""

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
from types import SimpleNamespace

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
    refused,
    reward_file,
)

import common
import rejection_sampling
import sft

SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
CLOCK = ("tokens_per_second", "seconds/sample", "seconds/train")


def states(folder):
    """The tensors of a run: its final weights, and the last checkpoint's."""
    checkpoint = torch.load(folder / "checkpoint/state.pt", weights_only=True)
    tensors = load_file(folder / "model.safetensors") | checkpoint["models"]
    for name, state in checkpoint["optimizer"]["state"].items():
        tensors |= {f"{name} {key}": value for key, value in state.items()}
    return tensors


def lines_of(folder):
    """What a run logged, the clock apart."""
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(folder)]
    names = [name for name in ("samples.jsonl", "rollouts.jsonl") if (folder / name).exists()]
    return rows, {name: (folder / name).read_text() for name in names}


def assert_same_run(one, other):
    """Weights, optimiser, metrics, samples and rollouts, bit for bit; the clock apart."""
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
    """at_step(n, action): action() once, after step n has been logged."""

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
    """The runs of processes.resumes."""

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
    """SIGKILL before, in the middle of, and after writes of logs and checkpoints, with a checkpoint
    already there or none: before the first step, in training, in a rollout, and at the end."""
    *killed, last = statuses_of(name, ended)["killed"]
    assert len(killed) >= 3 and set(killed) == {-signal.SIGKILL} and last == 0
    assert_same_run(ended / "whole" / name, ended / "killed" / name)


@pytest.mark.parametrize("name, number", [(name, n) for name in NAMES for n in SIGNALS[name]])
def test_signals_finish_the_step_and_save(name, number, ended):
    """With no regard to --save-every; then the run goes on as if nothing had happened."""
    statuses = statuses_of(name, ended)
    assert statuses[number.name] == 128 + number
    said = (ended / f"{name}.{number.name}").read_text()
    assert "stopped after step 3 of 4; go on with --resume" in said
    said = (ended / f"{name}.{number.name} resumed").read_text()
    assert statuses[f"{number.name} resumed"] == 0 and "resumed after step 3 of 4" in said
    assert_same_run(ended / "whole" / name, ended / number.name / name)


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest, back in their place after each test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_signal_while_the_processes_agree_is_not_lost(monkeypatch):
    """It comes during the all-reduce: too late for this step, in time for the next."""
    run = SimpleNamespace(signal=0)

    def interrupted_all_reduce(value, op):
        run.signal = signal.SIGTERM
        return value

    monkeypatch.setattr(common, "all_reduce", interrupted_all_reduce)
    assert not common.Run.is_interrupted(run)
    assert common.Run.is_interrupted(run)


@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo", "rejection_sampling"])
def test_no_steps_train_nothing(name, chain, tmp_path):  # noqa: F811
    """--steps 0: the start is evaluated and saved."""
    run(name, chain, tmp_path / "run", steps=0, epochs=1, eval_every=0)
    assert {row["step"] for row in metrics(tmp_path / "run")} == {0}
    start = load_file(chain / "sft/model.safetensors")
    saved = load_file(tmp_path / "run/model.safetensors")
    common_names = start.keys() & saved.keys()
    assert len(common_names) > 5
    assert all(torch.equal(start[key], saved[key]) for key in common_names)


def test_a_second_signal_stops_at_once_and_handlers_come_back(chain, tmp_path, at_step):  # noqa: F811
    """After the first signal a second one of either kind stops at once; whoever called main gets
    theirs back, whether the run has finished or was stopped."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    run("sft", chain, tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before
    seen = []

    def send():
        os.kill(os.getpid(), signal.SIGINT)
        seen.extend(map(signal.getsignal, numbers))

    at_step(2, send)
    with pytest.raises(SystemExit):
        run("sft", chain, tmp_path / "other")
    assert seen == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("end", ["killed", "SIGTERM"])
def test_a_rollout_goes_on_where_it_ended(end, chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    """In rejection_sampling.py: whole chunks of prompts are read back with what was sampled; one
    that was cut off is sampled again."""
    monkeypatch.setattr(rejection_sampling, "CHUNK", 8)
    inner = rejection_sampling.sample
    drawn = []
    resumed = []

    def sample(*args, **kwargs):
        drawn.append(len(args[1]))
        if len(drawn) == 5 and not resumed:  # after two for the evaluation, the third chunk of four
            if end == "killed":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **kwargs)

    run("rejection_sampling", chain, tmp_path / "whole")
    folder = tmp_path / "halves"
    monkeypatch.setattr(rejection_sampling, "sample", sample)
    with pytest.raises(KeyboardInterrupt if end == "killed" else SystemExit) as stopped:
        run("rejection_sampling", chain, folder)
    rows = (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
    if end == "killed":
        assert len(rows) == 16
        cut = [rows[0], rows[1], rows[2][:40]]  # two more of its rows and a half
        (folder / "rollouts.jsonl").write_text("".join(rows + cut))
    else:
        assert stopped.value.code == 143 and len(rows) == 24
        assert "stopped after 24 of 32 prompts of iteration 1" in capsys.readouterr().out
    drawn.clear()
    resumed.append(True)
    run("rejection_sampling", chain, folder, resume=True)
    chunks = {"killed": 2 + 4, "SIGTERM": 1 + 4}[end]
    evaluations = 4  # before the first step, after the third, and after each iteration
    assert len(drawn) == chunks + 2 * evaluations
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.slow
def test_killed_five_times(tmp_path):
    """SIGKILL at random moments, every other one in the middle of writing a checkpoint; then it
    ends as an undisturbed run does. Real processes: `python sft.py`."""
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
        assert process.wait() == -signal.SIGKILL, "it must not have ended before it was killed"
        writing += half_written.exists()
        half_written.unlink(missing_ok=True)
        saved.append(last_saved())
    assert saved == sorted(saved) and saved[0] < saved[-1] and writing >= 2
    subprocess.run([*command, "--output-dir", folder, "--resume"], check=True, **quiet)
    assert_same_run(tmp_path / "whole", folder)
    print(f"killed after steps {saved}, {writing} times while a checkpoint was being written")


# ---------------------------------------------------------------- flags of --resume
def resume(script, *argv):
    """python script.py --resume ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--resume", *map(str, argv)])
        args = common.cli(script.Args, laptop=dict(learning_rate=0.5, seed=9))
        return args, script.main(args)


def test_saved_flags_hold_and_the_command_line_wins(chain, tmp_path):  # noqa: F811
    """With no other flag it is the same run, to the bit; what else is given holds from there on."""
    run("sft", chain, tmp_path / "whole", steps=4, seed=3)
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
    assert saved == vars(args) | {"resume": False}
    a = states(tmp_path / "more")
    b = states(tmp_path / "few")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_that_is_resumed_stays_as_it_is(chain, tmp_path):  # noqa: F811
    run("sft", chain, tmp_path / "run", steps=2)
    before = states(tmp_path / "run")
    logs = lines_of(tmp_path / "run")
    assert run("sft", chain, tmp_path / "run", steps=2, resume=True) == {}
    after = states(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lines_of(tmp_path / "run") == logs


def test_what_cannot_be_resumed(chain, tmp_path, capsys):  # noqa: F811
    """The run of another script, and no run."""
    run("grpo", chain, tmp_path / "run", steps=1)
    before = (tmp_path / "run/args.json").read_text()
    with pytest.raises(SystemExit):
        resume(SCRIPTS["rloo"], "--output-dir", tmp_path / "run")
    refused(capsys, "--resume", "another script")
    assert (tmp_path / "run/args.json").read_text() == before
    with pytest.raises(SystemExit):
        resume(sft, "--output-dir", tmp_path / "nowhere")
    refused(capsys, "--resume", "nowhere holds no run")
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- a full disk
def test_a_full_disk_keeps_the_last_good_checkpoint(chain, tmp_path, at_step):  # noqa: F811
    """No file can grow over a megabyte, too little for a checkpoint. Then there is room again."""
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


# ---------------------------------------------------------------- faults in the middle of a step
def test_a_gradient_that_is_not_finite_stops_the_run(chain, tmp_path, capsys):  # noqa: F811
    """Before the update is made, the last good checkpoint in place."""
    flags = dict(save_every=1, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(SystemExit) as stopped:
        run("sft", chain, tmp_path / "run", **flags)
    assert stopped.value.code == 2
    refused(capsys, "step 2: ", "nan", "no update")
    assert step_of(tmp_path / "run") == 1 and len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("poisoned", ["policy", "reference"])
def test_a_weight_that_is_nan_stops_it(  # noqa: PLR0917
    name,
    poisoned,
    chain,  # noqa: F811
    tmp_path,
    monkeypatch,
    at_step,
    capsys,
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
    flags = dict(dataset=str(prompts_file(tmp_path)), save_every=1)
    with pytest.raises(SystemExit):
        run(name, chain, tmp_path / "run", **flags)
    refused(capsys, "step 2: ", "nan", "no update")
    assert step_of(tmp_path / "run") == 1 and len(metrics(tmp_path / "run")) == 1


def prompts_file(folder):
    """Prompts of the built-in task without held-out rows, which take time."""
    path = folder / "prompts.jsonl"
    rows = common.task_rows("prompt", False, 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    "body, flags",
    [
        ("return [1.0] * len(prompts)", dict(kl_coef=0.0)),
        ("return [float(len(c)) for c in completions]", dict(max_completion_length=1)),
    ],
    ids=["all equal", "all cut"],
)
def test_steps_that_teach_nothing(name, body, flags, chain, tmp_path):  # noqa: F811, PLR0917
    """No crash and no NaN: the step is counted, and the log says why nothing was learnt."""
    changes = dict(dataset=str(prompts_file(tmp_path)), steps=2) | flags
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
def test_completions_of_eos_alone(name, chain, tmp_path, monkeypatch):  # noqa: F811
    """The shortest there are."""
    eos = common.load_tokenizer(str(chain / "sft")).eos_token_id

    def sample(model, prompts, *, num_generations, **options):
        return [[eos] for _ in range(len(prompts) * num_generations)]

    monkeypatch.setattr(SCRIPTS[name], "sample", sample)
    run(name, chain, tmp_path / "run", steps=2)
    last = metrics(tmp_path / "run")[-1]
    assert last["completion_length"] == last["eos_rate"] == 1
    weights = load_file(tmp_path / "run/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
