"""Never lose a run: what happens when one is stopped, killed, starved of disk or memory, or fed a bad reward.

pytest tests/test_resume.py && pytest -m slow tests/test_resume.py      three minutes"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import chain, metrics, refused  # noqa: F401 (a fixture)

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

SCRIPTS = dict(sft=sft, reward_model=reward_model, dpo=dpo, rejection_sampling=rejection_sampling)
SCRIPTS |= dict(ppo=ppo, rloo=rloo, grpo=grpo)
ONLINE = ["ppo", "rloo", "grpo"]
CLOCK = ("tokens_per_second", "seconds/sample", "seconds/train")


def run(name, chain, folder, **changes):  # noqa: F811
    """Four steps of a script, a checkpoint after every second one."""
    flags = dict(
        model=str(chain / "sft"), output_dir=str(folder), save_every=2, warmup_steps=0, eval_every=3
    )
    flags |= dict(learning_rate=1e-3)
    if name in ONLINE:
        flags |= dict(
            steps=4, reward="sort", prompts_per_step=6, num_generations=3, max_completion_length=6
        )
        flags |= dict(update_epochs=2, minibatches=2)
    elif name == "rejection_sampling":
        flags |= dict(reward="sort", prompts=32, num_generations=2, batch_size=16, iterations=2)
        flags |= dict(max_completion_length=6)
    else:
        flags |= dict(steps=4, batch_size=16)
    return SCRIPTS[name].main(SCRIPTS[name].Args(**(flags | changes)))


def states(one, other):
    """Pairs of dicts of tensors of the same names, of two runs: final weights, and Adam's state."""
    for file in ("model.safetensors", "checkpoint/optimizer.pt"):
        load = load_file if file.endswith("safetensors") else torch.load
        a, b = load(one / file), load(other / file)
        if file.endswith("pt"):
            assert a["param_groups"] == b["param_groups"]
            a, b = (
                {f"{i} {k}": v for i, s in x["state"].items() for k, v in s.items()} for x in (a, b)
            )
        assert a.keys() == b.keys()
        yield a, b


def assert_same_run(one, other):
    """Weights, optimiser, metrics and samples, bit for bit; the clock apart."""
    for a, b in states(one, other):
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(f)]
        for f in (one, other)
    ]
    assert rows[0] == rows[1]
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): action() once, after step n has been logged."""

    def patch(step, action):
        inner, done = common.Run.log, []

        def log(self, number, values, show):
            inner(self, number, values, show)
            if number == step and not done:
                done.append(number)
                action()

        monkeypatch.setattr(common.Run, "log", log)

    return patch


def interrupt():
    raise KeyboardInterrupt


def step_of(folder):
    return json.loads((folder / "checkpoint/state.json").read_text())["step"]


# ---------------------------------------------------------------- exact resume
@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_is_exact(name, chain, tmp_path, at_step):  # noqa: F811
    """Four steps equal two, a death in the middle of the third, and --resume."""
    changes = dict(dynamic_sampling=True) if name == "grpo" else {}
    run(name, chain, tmp_path / "whole", **changes)
    at_step(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(name, chain, tmp_path / "halves", **changes)
    assert step_of(tmp_path / "halves") == 2
    run(name, chain, tmp_path / "halves", resume=True, **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_save(name, number, chain, tmp_path, at_step, capsys):  # noqa: F811
    """With no regard to --save-every; then the run goes on as if nothing had happened."""
    run(name, chain, tmp_path / "whole", save_every=0)
    at_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        run(name, chain, tmp_path / "halves", save_every=0)
    assert stopped.value.code == 128 + number
    assert (
        "stopped after step 3 of 4; go on with the same command and --resume"
        in capsys.readouterr().err
    )
    assert step_of(tmp_path / "halves") == 3
    run(name, chain, tmp_path / "halves", save_every=0, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest, back in their place after each test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_handlers(chain, tmp_path, at_step):  # noqa: F811
    """After the first signal a second one of either kind stops at once; whoever called main gets theirs back,
    whether the run has finished or was stopped."""
    numbers, seen = (signal.SIGTERM, signal.SIGINT), []
    before = [signal.getsignal(number) for number in numbers]
    run("sft", chain, tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before
    at_step(
        2,
        lambda: os.kill(os.getpid(), signal.SIGINT) or seen.extend(map(signal.getsignal, numbers)),
    )
    with pytest.raises(SystemExit):
        run("sft", chain, tmp_path / "other")
    assert seen == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_process_that_a_reward_forks_can_be_ended(chain, tmp_path):  # noqa: F811
    """A pool of workers is ended by SIGTERM, which is none of the run's business."""
    lines = [
        "import multiprocessing, time",
        "p = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))",
    ]
    lines += [
        "p.start()",
        "time.sleep(0.2)",
        "p.terminate()",
        "p.join(20)",
        "return [-float(p.exitcode)] * len(prompts)",
    ]
    body = "\n    ".join(lines)
    run("rloo", chain, tmp_path / "run", reward=checker(tmp_path, body), steps=1, eval_every=0)
    assert metrics(tmp_path / "run")[-1]["score"] == signal.SIGTERM


@pytest.mark.parametrize("end", ["2>&1 | head -n 3", "| head -n 3"])
def test_ctrl_c_where_the_output_goes_through_a_pipe(end, tmp_path):
    """`| tee log` dies of Ctrl-C before the run does: the step is saved all the same."""
    command = f"{sys.executable} {sft.__file__} --output-dir run --save-every 0 --log-every 1 {end}"
    shell = subprocess.Popen(
        ["bash", "-c", command],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    lines, deadline = tmp_path / "run/metrics.jsonl", time.time() + 40
    while not lines.exists() or lines.read_text().count("\n") < 9:
        assert time.time() < deadline, "the run has died with its pipe"
        time.sleep(0.05)
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(30)
    for _ in range(200):
        if (tmp_path / "run/checkpoint").exists():
            break
        time.sleep(0.05)
    assert step_of(tmp_path / "run") >= 8


def test_a_signal_in_the_middle_of_sampling(chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    """rejection_sampling.py stops after the chunk of 64 prompts, not after all of them."""
    drawn, inner = [], rejection_sampling.sample

    def sample(*args):
        drawn.append(args)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{a}{b}>"}) + "\n"
            for a in "abcdefghijkl"
            for b in "mnopqrstuvwxyz"
        )
    )
    reward = checker(tmp_path, "return [float(len(c)) for c in completions]")
    flags = dict(dataset=str(rows), prompts=168, reward=reward)
    run("rejection_sampling", chain, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rejection_sampling, "sample", sample)
        run("rejection_sampling", chain, tmp_path / "halves", **flags)
    assert "stopped after 128 of 168 prompts of iteration 1" in capsys.readouterr().err
    run("rejection_sampling", chain, tmp_path / "halves", resume=True, **flags)
    one, other = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "halves")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "whole/rollouts.jsonl").read_text() == (
        tmp_path / "halves/rollouts.jsonl"
    ).read_text()


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    """SIGKILL at random moments, every third in the middle of writing a checkpoint; then it ends as an
    undisturbed run does. Real processes: `python sft.py`."""
    command = [
        sys.executable,
        Path(sft.__file__),
        "--steps",
        "40",
        "--save-every",
        "1",
        "--seed",
        "3",
    ]
    command += ["--micro-batch-tokens", "600", "--eval-every", "10"]
    quiet = dict(
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    subprocess.run([*command, "--output-dir", tmp_path / "whole"], check=True, **quiet)
    draw, folder, saved, writing = random.Random(1), tmp_path / "killed", [0], 0

    def last_saved():
        try:
            return json.loads((common.find_checkpoint(folder) / "state.json").read_text())["step"]
        except (FileNotFoundError, TypeError):  # none yet, or just being renamed
            return 0

    for kill in range(10):
        resume = ["--resume"] if kill else []
        process = subprocess.Popen([*command, "--output-dir", folder, *resume], **quiet)
        while process.poll() is None and last_saved() == saved[-1]:
            time.sleep(0.002)
        if kill % 3 == 0:
            while process.poll() is None and not (folder / "checkpoint.new").exists():
                pass
        else:
            time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it must not have ended before it was killed"
        writing += (folder / "checkpoint.new").exists()
        saved.append(last_saved())
        assert len(list(folder.glob("checkpoint*"))) <= 2
    assert saved == sorted(saved) and saved[0] < saved[-1] and writing >= 3
    subprocess.run([*command, "--output-dir", folder, "--resume"], check=True, **quiet)
    assert_same_run(tmp_path / "whole", folder)
    print(f"killed after steps {saved}, {writing} times while a checkpoint was being written")


# ---------------------------------------------------------------- what --resume refuses
@pytest.mark.parametrize(
    "name, flag, value",
    [
        ("sft", "batch_size", 8),
        ("sft", "seed", 2),
        ("sft", "weight_decay", 0.1),
        ("rejection_sampling", "epochs", 2),
        ("dpo", "beta", 0.3),
        ("ppo", "reward", "gsm8k"),
        ("grpo", "kl", "k1-reward"),
        ("rloo", "model", "elsewhere"),
    ],
)
def test_a_changed_flag_is_named(name, flag, value, chain, tmp_path, at_step, capsys):  # noqa: F811
    at_step(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(name, chain, tmp_path / "run")
    before = (tmp_path / "run/args.json").read_text()
    with pytest.raises(SystemExit) as stopped:
        run(name, chain, tmp_path / "run", resume=True, **{flag: value})
    assert stopped.value.code == 2
    refused(capsys, f"--{flag.replace('_', '-')} was", f"now {value}")
    assert (tmp_path / "run/args.json").read_text() == before


def test_flags_that_may_change(chain, tmp_path):  # noqa: F811
    run("sft", chain, tmp_path / "run")
    changes = dict(
        epochs=2, steps=5, save_every=1, micro_batch_tokens=64, log_every=1, learning_rate=1e-4
    )
    run("sft", chain, tmp_path / "run", resume=True, **changes)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_the_run_of_another_script_is_not_resumed(chain, tmp_path, capsys):  # noqa: F811
    run("grpo", chain, tmp_path / "run")
    with pytest.raises(SystemExit):
        run("rloo", chain, tmp_path / "run", resume=True)
    refused(capsys, "--resume", "another script")


def test_the_start_is_not_overwritten(chain, tmp_path, capsys):  # noqa: F811
    for flag in ("model", "reward"):
        with pytest.raises(SystemExit):
            run("ppo", chain, chain / "sft", **{flag: f"{chain}/sft/"}, overwrite=True)
        refused(
            capsys, f"--output-dir is --{flag}" if flag == "model" else "--output-dir is --model"
        )


def test_a_folder_that_cannot_be_written(chain, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run("sft", chain, tmp_path / "file/run")
    refused(capsys, "cannot be written", "no step is saved", code=1)


def test_nothing_to_resume_from(chain, tmp_path, capsys):  # noqa: F811
    (tmp_path / "run/checkpoint.new").mkdir(parents=True)  # a half-written one is none
    (tmp_path / "run/checkpoint.new/state.json").write_text('{"step": 2}')
    with pytest.raises(SystemExit):
        run("sft", chain, tmp_path / "run", resume=True)
    refused(capsys, "--resume", "no checkpoint")


# ---------------------------------------------------------------- a full disk
@pytest.mark.parametrize(
    "name, kilobytes", [("sft", 1), ("sft", 1000), ("sft", 4000), ("ppo", 4000)]
)
def test_a_full_disk_keeps_the_last_good_checkpoint(
    name, kilobytes, chain, tmp_path, at_step, capsys
):  # noqa: F811
    """No file can grow over a limit: the weights, the optimiser's state, or the logs. Then there is room
    again."""
    run(name, chain, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, hard)))
    try:
        with pytest.raises(SystemExit) as stopped:
            run(name, chain, tmp_path / "halves")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == 1
    refused(capsys, "cannot be written", "step 2 is saved", "--resume", code=1)
    assert step_of(tmp_path / "halves") == 2
    assert [x.name for x in (tmp_path / "halves").glob("checkpoint*")] == ["checkpoint"]
    run(name, chain, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("name", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_memory_and_file_handles_do_not_grow(name, chain, tmp_path, monkeypatch):  # noqa: F811
    seen, inner = [], common.Run.log

    def log(self, step, values, show):
        inner(self, step, values, show)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(common.Run, "log", log)
    changes = dict(epochs=50) if name == "sft" else {}
    run(
        name,
        chain,
        tmp_path / "run",
        steps=200,
        save_every=20,
        eval_every=50,
        learning_rate=1e-5,
        **changes,
    )
    half, end = max(memory for memory, _ in seen[:100]), max(memory for memory, _ in seen[100:])
    assert len(seen) == 201 and end - half < 16 * 2**20
    assert seen[-1][1] <= seen[50][1]


# ---------------------------------------------------------------- faults in the middle of a step
def test_a_loss_that_is_not_finite_stops_the_run(chain, tmp_path, capsys):  # noqa: F811
    """Before the update is applied, the last good checkpoint in place and the batch on disk."""
    with pytest.raises(SystemExit) as stopped:
        run(
            "sft", chain, tmp_path / "run", save_every=1, learning_rate=1e30, lr_schedule="constant"
        )
    assert stopped.value.code == 1
    refused(capsys, "step 2: loss is nan", "that update was not made", "bad_batch.json")
    assert step_of(tmp_path / "run") == 1
    assert len(json.loads((tmp_path / "run/bad_batch.json").read_text())) == 16


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("poisoned", ["policy", "reference"])
def test_a_log_prob_that_is_nan_stops_it(
    name, poisoned, chain, tmp_path, monkeypatch, at_step, capsys
):  # noqa: F811
    models, script = [], SCRIPTS[name]
    load = script.load_policy
    monkeypatch.setattr(
        script, "load_policy", lambda *a, **k: models.append(load(*a, **k)) or models[-1]
    )

    def poison():
        with torch.no_grad():
            models[poisoned == "reference"].get_output_embeddings().weight[5] = float("nan")

    at_step(2, poison)
    with pytest.raises(SystemExit):
        run(name, chain, tmp_path / "run", eval_every=0, save_every=1)
    refused(
        capsys, f"step 3: {'ref_' * (poisoned == 'reference')}logprobs is nan", "bad_batch.json"
    )
    assert step_of(tmp_path / "run") == 2 and len(metrics(tmp_path / "run")) == 3
    batch = json.loads((tmp_path / "run/bad_batch.json").read_text())
    assert len(batch) == 18 and {"prompt", "where", "completion_ids"} <= batch[0].keys()


def checker(folder, body):
    (folder / "reward.py").write_text(f"def reward(prompts, completions, rows):\n    {body}\n")
    return f"{folder}/reward.py:reward"


@pytest.mark.parametrize("name", [*ONLINE, "rejection_sampling"])
def test_a_reward_that_raises_names_the_row(name, chain, tmp_path, capsys):  # noqa: F811
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        '{"prompt": "ba>", "n": 1}\n{"prompt": "dc>", "n": 0}\n{"prompt": "fe>", "n": 2}\n'
    )
    reward = checker(tmp_path, "return [1 / row['n'] for row in rows]")
    changes = dict(prompts=3) if name == "rejection_sampling" else {}
    with pytest.raises(SystemExit) as stopped:
        run(
            name, chain, tmp_path / "run", dataset=str(rows), reward=reward, eval_every=0, **changes
        )
    assert stopped.value.code == 2
    refused(capsys, "ZeroDivisionError", "reward.py line 2", f"{rows} line 2", "completion")
    assert not (tmp_path / "run/metrics.jsonl").exists(), "nothing of the step is applied or logged"


def test_a_reward_that_raises_for_all_rows_together_only(chain, tmp_path, capsys):  # noqa: F811
    reward = checker(tmp_path, "return [1.0] if len(prompts) == 1 else prompts.none")
    with pytest.raises(SystemExit):
        run("ppo", chain, tmp_path / "run", reward=reward)
    refused(capsys, "AttributeError", "rows alone")


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    "body, flags",
    [
        ("return [None] * len(prompts)", {}),
        ("return [1.0] * len(prompts)", dict(kl_coef=0.0)),
        ("return [float(len(c)) for c in completions]", dict(max_completion_length=1)),
    ],
    ids=["none judged", "all equal", "all cut"],
)
def test_steps_that_teach_nothing(name, body, flags, chain, tmp_path, capsys):  # noqa: F811
    """No crash and no NaN: the step is counted, and the log says why nothing was learnt."""
    flags = dict(eval_every=0, log_every=1) | flags
    if name == "grpo":
        flags |= dict(mask_truncated=True, dynamic_sampling=True)
    run(name, chain, tmp_path / "run", reward=checker(tmp_path, body), **flags)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all(
        torch.isfinite(w).all() for w in load_file(tmp_path / "run/model.safetensors").values()
    )
    said = capsys.readouterr().out
    if "None" in body:
        assert rows[-1]["score"] is None and "score nan" in said
        one, other = (load_file(f / "model.safetensors") for f in (tmp_path / "run", chain / "sft"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    elif name != "ppo":
        assert rows[-1]["zero_std_groups"] == 1.0 or flags.get("max_completion_length") == 1
        assert "zero_std_groups 1" in said or flags.get("max_completion_length") == 1


@pytest.mark.parametrize("name", ONLINE)
def test_completions_of_eos_alone(name, chain, tmp_path, monkeypatch):  # noqa: F811
    """The shortest there are."""
    eos = common.load_tokenizer(str(chain / "sft")).eos_token_id
    monkeypatch.setattr(
        SCRIPTS[name],
        "sample",
        lambda model, prompts, n, *rest: ([[eos] for _ in prompts * n], None),
    )
    run(name, chain, tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert last["completion_length"] == last["eos_rate"] == 1
    assert all(
        torch.isfinite(w).all() for w in load_file(tmp_path / "run/model.safetensors").values()
    )


@pytest.mark.parametrize(
    "where, words",
    [
        ("_sample_wave", ["in sampling", "--max-completion-length"]),
        ("score", ["in scoring", "--micro-batch-tokens"]),
        ("policy_loss", ["in training", "--micro-batch-tokens", "--gradient-checkpointing"]),
    ],
)
def test_out_of_memory_says_in_what(where, words, chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    changes = {}
    if where == "score":  # the reward model's forward
        changes["reward"] = str(chain / "reward_model")
        monkeypatch.setattr(common, "pad_batch", full)
    elif where == "_sample_wave":
        monkeypatch.setattr(common.transformers, "DynamicCache", full)
    else:
        monkeypatch.setattr(ppo, where, full)
    try:
        run("ppo", chain, tmp_path / "run", eval_every=0, **changes)
    except torch.OutOfMemoryError:
        common.explain(*sys.exc_info())
    refused(capsys, "out of GPU memory", "a checkpoint", *words)
