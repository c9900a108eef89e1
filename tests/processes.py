"""What test_processes.py and test_resume.py start, with python or with torchrun: all seven mains,
and what there is to compare.

python tests/processes.py COMMAND FOLDER CHAIN      COMMAND is the name of a function below"""

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import second_device
import torch
from torch.distributed.tensor import DTensor

import common
import grpo

NAMES = ["sft", "reward_model", "dpo", "rejection_sampling", "ppo", "rloo", "grpo"]
ONLINE = ["ppo", "rloo", "grpo"]
CPU = torch.device("cpu")
TASK_ROWS = {"sft": 64, "pairs": 64, "prompt": 64, "held out": 13}
PROMPTS = [[3, 9, 4], [12, 5, 8, 7, 6, 11, 2], [4], [9, 3, 9, 3], [7, 7]]


# ---------------------------------------------------------------- starting them
def end_with_parent():
    """Die when the process that started this one does: torchrun's workers are not in its group."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def start(processes, *args, gpu=False, **options):
    """One process, or several under torchrun, that run this file; what is left is killed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *map(str, args)]
    settings = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if not gpu:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    options |= dict(text=True, env=os.environ | settings, start_new_session=True)
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(processes, *args, gpu=False, timeout=600):
    """The finished process, with what it printed."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with start(processes, *args, gpu=gpu, **pipes) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def in_child(function, output):
    """function() in a fork of this process, output to a file -> exit status, -9 if killed."""
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        status = 1
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            function()
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_two_children(function, items):
    """function(item) of each item, in two processes at a time."""
    pids = []
    for half in (items[::2], items[1::2]):
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            for item in half:
                function(item)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


# ---------------------------------------------------------------- exact resume
def run(name, chain, folder, **changes):
    """Four steps of a script, a checkpoint after every second one."""
    flags = dict(
        model=str(Path(chain, "sft")),
        output_dir=str(folder),
        save_every=2,
        eval_every=3,
        warmup_steps=0,
        learning_rate=1e-3,
    )
    if name in ONLINE:
        flags |= dict(
            steps=4,
            reward="sort",
            prompts_per_step=6,
            num_generations=3,
            max_completion_length=6,
            update_epochs=2,
            num_minibatches=2,
        )
    elif name == "rejection_sampling":
        flags |= dict(
            reward="sort",
            prompts_per_iteration=32,
            num_generations=2,
            batch_size=16,
            iterations=2,
            max_completion_length=6,
        )
    else:
        flags |= dict(steps=4, batch_size=16)
    if name == "grpo":
        flags |= dict(dynamic_sampling=True)
    script = importlib.import_module(name)
    return script.main(script.Args(**flags | changes))


def kill_at_write(number):
    """SIGKILL at the number-th moment that changes the disk, from 0: before, in the middle of, or
    after writing a file or the lines of a log."""
    moments = itertools.count()
    replace_file = common.replace_file

    def moment():
        if next(moments) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed_replace_file(path, write):
        def write_half(file):
            write(file)
            file.flush()
            size = file.tell()
            whole = Path(file.name).read_bytes()
            file.seek(0)
            file.truncate(size // 2)
            moment()
            file.write(whole)

        moment()
        replace_file(path, write_half)
        moment()

    def killed_append(self, name, rows):
        moment()
        text = common.json_lines(rows)
        with open(self.dir / name, "a") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            moment()
            file.write(text[len(text) // 2 :])
        moment()

    common.replace_file = killed_replace_file
    common.Run.append = killed_append


def signal_after_step(number, step):
    """The process signals itself once the metrics of a step are logged."""
    log = common.Run.log

    def signalling_log(self, logged_step, *args, **kwargs):
        log(self, logged_step, *args, **kwargs)
        if logged_step == step:
            os.kill(os.getpid(), number)

    common.Run.log = signalling_log


SIGNALS = dict(zip(NAMES, itertools.cycle([[signal.SIGTERM], [signal.SIGINT]])))
SIGNALS["sft"] = [signal.SIGTERM, signal.SIGINT]


def resumes(folder, chain):
    """Of each script: an undisturbed run; one killed again and again, each time a little later than
    the time before; one that gets SIGTERM or SIGINT after step 3, sft.py one of each. With exit
    statuses."""
    folder = Path(folder)

    def all_runs(name):
        def whole():
            run(name, chain, folder / "whole" / name)

        def killed():
            kill_at_write(number)
            run(name, chain, folder / "killed" / name, resume=number > FIRST)

        def stopped():
            signal_after_step(signal_number, 3)
            run(name, chain, folder / signal_number.name / name, save_every=0)

        def resumed():
            run(name, chain, folder / signal_number.name / name, save_every=0, resume=True)

        FIRST = 3  # (the moments of args.json are over)
        number = FIRST
        statuses = {"whole": in_child(whole, folder / f"{name}.whole")}
        statuses["killed"] = [in_child(killed, folder / f"{name}.killed")]
        while statuses["killed"][-1] == -signal.SIGKILL:
            number += 4 if name == "sft" else 11
            statuses["killed"].append(in_child(killed, folder / f"{name}.killed {number}"))
        for signal_number in SIGNALS[name]:
            output = folder / f"{name}.{signal_number.name}"
            statuses[signal_number.name] = in_child(stopped, output)
            statuses[f"{signal_number.name} resumed"] = in_child(resumed, f"{output} resumed")
        (folder / f"{name}.json").write_text(json.dumps(statuses))

    in_two_children(all_runs, NAMES)


# ---------------------------------------------------------------- as many processes as you like
def flags(name, chain, folder):
    """Three steps, of 7 rows or of 5 prompts times 3, neither of which 2 processes can divide."""
    args = dict(
        model=f"{chain}/sft",
        output_dir=str(folder),
        steps=3,
        warmup_steps=0,
        learning_rate=1e-4,
        lr_schedule="constant",
        max_grad_norm=0.01 if name == "rloo" else 0.0,
        micro_batch_tokens=90,
        dtype="float32",
        save_every=2,
        eval_every=2,
        gradient_checkpointing=name in ("sft", "ppo"),
    )
    if name in ONLINE:
        args |= dict(
            reward=f"{chain}/reward_model" if name == "ppo" else f"{__file__}:letters",
            prompts_per_step=5,
            num_generations=3,
            max_completion_length=6,
            kl_coef=0.05,
            update_epochs=2 if name == "ppo" else 1,
            missing_eos_penalty=0.5,
            num_minibatches=1 if name == "grpo" else 2,  # with 1 the update finds the old log-probs
        )
    elif name == "rejection_sampling":
        args |= dict(
            reward=f"{chain}/reward_model",
            prompts_per_iteration=14,
            num_generations=3,
            max_completion_length=6,
            batch_size=7,
            epochs=2,
        )
    else:
        args |= dict(batch_size=7)
    return args


def letters(prompts, completions, rows):
    """A reward that an untrained model gets some of; it runs in the first process alone."""
    assert common.rank() == 0
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def run_flags(name, chain, folder, **changes):
    script = importlib.import_module(name)
    return script.main(script.Args(**flags(name, chain, folder) | changes))


def gradient_of(model):
    """Its gradient, gathered from all processes, as one vector."""
    gradients = [p.grad for p in model.parameters()]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu()


@contextlib.contextmanager
def record(name):
    """Gradients, after clipping, and what was sampled, of the script of that name."""
    script = importlib.import_module(name)
    clip_gradients = script.clip_gradients
    sample = getattr(script, "sample", None)
    found = {"gradients": [], "sampled": []}

    def spy_clip(model, max_norm):
        norm = clip_gradients(model, max_norm).cpu()
        found["gradients"].append(gradient_of(model))
        total = found["gradients"][-1].double().norm()
        expected = min(norm, max_norm) if max_norm else norm
        assert abs(total - expected) < 1e-4 * expected, (total, expected)
        return norm

    def spy_sample(*args, **kwargs):
        completions = sample(*args, **kwargs)
        found["sampled"].append(completions)
        return completions

    script.clip_gradients = spy_clip
    if sample is not None:
        script.sample = spy_sample
    yield found
    script.clip_gradients = clip_gradients
    if sample is not None:
        script.sample = sample


def logprobs_of(name, folder):
    """Log-probs of fixed rows, of a run's final policy."""
    script = importlib.import_module(name)
    policy = common.load_policy(str(folder), CPU)
    batch = grpo.completion_batch(PROMPTS, PROMPTS[::-1], CPU)
    if name in ONLINE:
        return script.token_logprobs_and_entropy(policy, batch)[0].detach()
    return script.token_logprobs(policy, batch).detach()


def every_script(folder, chain):
    """Three steps of each."""
    for name in NAMES:
        with record(name) as found:
            run_flags(name, chain, Path(folder, name))
        if name != "reward_model":
            found["logprobs"] = logprobs_of(name, Path(folder, name))
        if common.rank() == 0:
            torch.save(found, Path(folder, f"{name}.pt"))


def halves(folder, chain):
    """Two steps, of which a copy can be taken elsewhere, and the third with --resume."""
    for name in ("sft", "ppo"):
        run_flags(name, chain, Path(folder, "halves", name), steps=2)
        if common.rank() == 0:
            shutil.copytree(Path(folder, "halves", name), Path(folder, "after two", name))
        run_flags(name, chain, Path(folder, "halves", name), resume=True)


def architectures(folder, chain):
    """Gradients and samples of each of the tiny models, whose folders stand in folder/models."""
    common.start_processes()
    batch = grpo.completion_batch(PROMPTS, PROMPTS[::-1], CPU)
    found = {}
    for path in sorted(Path(folder, "models").iterdir()):
        policy = common.load_policy(str(path), CPU, trainable=True)
        for mb in common.micro_batches(batch, 20):
            grpo.token_logprobs_and_entropy(policy, mb)[0].sum().backward()
        tokens = common.sample(
            policy,
            PROMPTS,
            num_generations=2,
            max_new_tokens=6,
            eos_ids=[1],
            rng=common.generator(1, "test"),
        )
        found[path.name] = gradient_of(policy), tokens
    if common.rank() == 0:
        torch.save(found, Path(folder, "architectures.pt"))


def everything(folder, chain):
    """One start for all that is compared: it takes seconds."""
    architectures(folder, chain)
    every_script(folder, chain)
    halves(folder, chain)


def bfloat16(folder, chain):
    """Three steps of each in bfloat16, as a GPU has it by default."""
    for name in NAMES:
        with record(name) as found:
            run_flags(name, chain, Path(folder, name), dtype="bfloat16")
        torch.save(found, Path(folder, f"{name}.pt"))


def rehearsal(folder, chain):
    """Three steps of each, and resume, on a device that is not the CPU."""
    second_device.start()
    common.start_processes = lambda: torch.device(second_device.NAME, 0)
    every_script(folder, chain)
    halves(folder, chain)


def go_on(folder, chain):
    """The third step of runs that have made two."""
    for name in ("sft", "ppo"):
        if Path(folder, name).is_dir():
            run_flags(name, chain, Path(folder, name), resume=True)


def dies(folder, chain):
    """The last process is killed in the third step, after a checkpoint."""
    log = common.Run.log

    def killed_log(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 3 and common.rank() == common.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.log = killed_log
    run_flags("ppo", chain, Path(folder, "ppo"))


def interrupted(folder, chain):
    """Many steps; a file when the first is done."""
    log = common.Run.log

    def telling_log(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 1 and common.rank() == 0:
            Path(folder, "began").touch()

    common.Run.log = telling_log
    run_flags("sft", chain, Path(folder, "sft"), steps=10**6, epochs=10**6, save_every=0)


def bad_file(folder, chain):
    """A data set that no process can read."""
    run_flags("sft", chain, Path(folder, "sft"), dataset=f"{folder}/bad.jsonl")


if __name__ == "__main__":
    end_with_parent()
    torch.set_num_threads(1)
    common.TASK_ROWS = TASK_ROWS
    command, folder, chain = sys.argv[1:]
    globals()[command](folder, chain)
