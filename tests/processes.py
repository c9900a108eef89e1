"""Runs of all seven scripts in processes of their own, under python or torchrun.

python tests/processes.py COMMAND FOLDER CHAIN      COMMAND is the name of a function below

FOLDER gets the results. CHAIN holds the start models, sft/ and reward_model/."""

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
HALVED = ["sft", "ppo", "rejection_sampling"]
CPU = torch.device("cpu")
TASK_ROWS = {"sft": 64, "pairs": 64, "prompts": 64, "held out": 13}
task_rows = common.task_rows
IDS = [[3, 9, 4], [12, 5, 8, 7, 6, 11, 2], [4], [9, 3, 9, 3], [7, 7]]


# ---------------------------------------------------------------- start and fork
def end_with_parent():
    """Ask Linux to kill this process when its parent ends.

    The workers of torchrun are not in the process group of the test."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def start(processes, *args, gpu=False, **options):
    """Run this file in one process, or in several under torchrun; kill them at the end."""
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
    """Run this file to its end. Returns a CompletedProcess with stdout and stderr."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with start(processes, *args, gpu=gpu, **pipes) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def in_child(function, output):
    """Call function() in a fork of this process, output to a file. Returns the exit status."""
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
    """Call function(item) for each item, half of them in each of two forks."""
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
    """Four steps of a script, with a checkpoint after every second one."""
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
    elif name == "rejection_sampling":  # two iterations of two steps
        flags |= dict(
            reward="sort",
            prompts_per_iteration=12,
            num_generations=2,
            batch_size=6,
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
    """Kill this process at the number-th (from 0) of the moments in which it changes the disk.

    These are before, halfway through and after each write to a log or of a checkpoint, and after
    the logs are truncated, a file is renamed and the model is saved."""
    moments = itertools.count()
    append = common.Run.append
    finish = common.Run.finish
    replace = os.replace
    save = torch.save
    truncate = os.truncate

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def moment():
        if next(moments) == number:
            kill()

    def interrupted_write(path, write, old_size):
        moment()
        write()
        if next(moments) == number:
            truncate(path, (old_size + path.stat().st_size) // 2)
            kill()
        moment()

    def killed_append(self, name, row):
        path = self.dir / name
        old_size = path.stat().st_size if path.exists() else 0
        interrupted_write(path, lambda: append(self, name, row), old_size)

    def killed_save(state, path):
        interrupted_write(Path(path), lambda: save(state, path), 0)

    def killed_replace(*paths):
        replace(*paths)
        moment()

    def killed_truncate(*args):
        truncate(*args)
        moment()

    def killed_finish(*args):
        finish(*args)
        moment()

    common.Run.append = killed_append
    common.Run.finish = killed_finish
    os.replace = killed_replace
    os.truncate = killed_truncate
    torch.save = killed_save


def signal_after_step(number, step):
    """Make this process signal itself once the metrics of a step are logged."""
    log = common.Run.log

    def signaling_log(self, logged_step, *args, **kwargs):
        log(self, logged_step, *args, **kwargs)
        if logged_step == step:
            os.kill(os.getpid(), number)

    common.Run.log = signaling_log


SIGNALS = dict(zip(NAMES, itertools.cycle([[signal.SIGTERM], [signal.SIGINT]])))
SIGNALS["sft"] = [signal.SIGTERM, signal.SIGINT]


def resumes(folder, chain):
    """Runs of each script, and a JSON file of their exit statuses.

    The whole run is undisturbed. The killed run is killed again and again, each time a few moments
    later than before. The others get a signal after step 3, without other checkpoints."""
    folder = Path(folder)
    common.TASK_ROWS["held out"] = 3  # few lines of samples.jsonl, so few moments to be killed in

    def all_runs(name):
        def whole():
            run(name, chain, folder / "whole" / name)

        def killed():
            kill_at_write(number)
            run(name, chain, folder / "killed" / name, resume=number > 0)

        def stopped():
            signal_after_step(signal_number, 3)
            run(name, chain, folder / signal_number.name / name, save_every=0)

        def resumed():
            run(name, chain, folder / signal_number.name / name, save_every=0, resume=True)

        number = 0
        statuses = {"whole": in_child(whole, folder / f"{name}.whole")}
        statuses["killed"] = [in_child(killed, folder / f"{name}.killed")]
        while statuses["killed"][-1] == -signal.SIGKILL:
            number += 4 if name == "sft" else 8
            statuses["killed"].append(in_child(killed, folder / f"{name}.killed {number}"))
        for signal_number in SIGNALS[name]:
            output = folder / f"{name}.{signal_number.name}"
            statuses[signal_number.name] = in_child(stopped, output)
            statuses[f"{signal_number.name} resumed"] = in_child(resumed, f"{output} resumed")
        (folder / f"{name}.json").write_text(json.dumps(statuses))

    in_two_children(all_runs, NAMES)


# ---------------------------------------------------------------- any number of processes
def flags(name, chain, folder):
    """Flags for three steps of 7 rows, or of 5 prompts with 3 completions: odd numbers."""
    args = dict(
        model=f"{chain}/sft",
        output_dir=str(folder),
        seed=2,  # chosen for the margins that record() measures
        steps=3,
        warmup_steps=0,
        learning_rate=1e-4,
        lr_schedule="constant",
        max_grad_norm=0.01 if name == "rloo" else 0.0,
        micro_batch_tokens=90,
        dtype="float32",
        save_every=2,
        eval_every=2,
        log_every=2,
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
            num_minibatches=1 if name == "grpo" else 2,  # 1: the update computes old log-probs
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
    """Share of vowels: a reward that an untrained model sometimes gets. Called on rank 0 only."""
    assert common.rank() == 0
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def cut_off_pairs(kind, held_out, seed):
    """Pairs of the built-in task, the rejected completion cut off before EOS.

    If both scores of a pair are read at EOS, their gradients are nearly equal, and the difference
    loses digits. The gradients of 14 completions have norms that add up to 81, but the gradient of
    the loss has norm 1.5. Compared with float64, its error is 5e-6, 53 times float32 rounding. The
    first step of Adam divides by |gradient| + 1e-8, so weights with a gradient near 0 move by this
    noise: the next gradient is off by 1e-5 (AVX-512) or 4e-5 (SSE).
    If the rejected score is read at a letter, norms of 77 give one of 9.5, with an error of 7e-7
    and of 3e-7 after Adam."""
    return [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"]],
            "scores": [1.0, 0.0],
            "finished": [True, False],
        }
        for row in task_rows(kind, held_out, seed)
    ]


def run_flags(name, chain, folder, **changes):
    script = importlib.import_module(name)
    common.task_rows = cut_off_pairs if name == "reward_model" else task_rows
    return script.main(script.Args(**flags(name, chain, folder) | changes))


def gradient_of(model):
    """The gradient of a model, gathered from all ranks, as one vector on the CPU."""
    gradients = [p.grad for p in model.parameters()]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu()


@contextlib.contextmanager
def record(name):
    """Record the gradients of a script after clipping and the completions it samples.

    `margins` are the distances from which decisions would change: of random numbers from the CDF,
    of the two largest logits, and of the scores of a pair."""
    script = importlib.import_module(name)
    inner = vars(script).copy()
    sample_tokens = common.sample_tokens
    found = {"gradients": [], "sampled": [], "margins": []}

    def spy_clip(model, max_norm):
        norm = inner["clip_gradients"](model, max_norm).cpu()
        found["device"] = model.device.type
        found["gradients"].append(gradient_of(model))
        total = found["gradients"][-1].double().norm()
        expected = min(norm, max_norm) if max_norm else norm
        assert abs(total - expected) < 1e-4 * expected, (total, expected)
        return norm

    def spy_sample(*args, **kwargs):
        rollouts = inner["sample"](*args, **kwargs)
        found["sampled"].append([rollout["completion_ids"] for rollout in rollouts])
        return rollouts

    def spy_tokens(logits, temperature, noise):
        if temperature == 0:
            first, second = logits.topk(2).values.unbind(-1)
            distances = first - second
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            distances = (cdf - noise[:, None]).abs()
        found["margins"].append(distances.min().item())
        return sample_tokens(logits, temperature, noise)

    def spy_accuracy(chosen, rejected):
        if not policy_is_reference(name, len(found["gradients"])):
            found["margins"] += (chosen - rejected).abs().tolist()
        return inner["pair_accuracy"](chosen, rejected)

    spies = {"clip_gradients": spy_clip, "sample": spy_sample, "pair_accuracy": spy_accuracy}
    for function in spies.keys() & inner.keys():
        setattr(script, function, spies[function])
    common.sample_tokens = spy_tokens
    yield found
    for function in spies.keys() & inner.keys():
        setattr(script, function, inner[function])
    common.sample_tokens = sample_tokens


def policy_is_reference(name, num_updates):
    """True for DPO before its first update, when rounding decides which completion is preferred."""
    return name == "dpo" and num_updates == 0


def fixed_batch():
    """A batch of prompts and completions of unequal lengths."""
    rollouts = [{"prompt_ids": p, "completion_ids": c} for p, c in zip(IDS, IDS[::-1])]
    return grpo.completion_batch(rollouts, CPU)


def load_policy(path, trainable=False):
    """The policy of a directory, in float32 on the CPU."""
    tokenizer = common.load_tokenizer(str(path))
    args = grpo.Args(dtype="float32")
    return common.load_policy(str(path), tokenizer, args, CPU, trainable=trainable)


@torch.no_grad()
def logprobs_of(name, folder):
    """Log-probs of fixed_batch under the final policy of a run, by the function of its script."""
    script = importlib.import_module(name)
    policy = load_policy(folder)
    if name in ONLINE:
        return script.token_logprobs_and_entropy(policy, fixed_batch())[0]
    return script.token_logprobs(policy, fixed_batch())


def every_script(folder, chain):
    """Three steps of each script."""
    for name in NAMES:
        with record(name) as found:
            run_flags(name, chain, Path(folder, name))
        if name != "reward_model":
            common.broadcast_from_rank0(lambda: None)  # rank 0 has saved the model
            found["logprobs"] = logprobs_of(name, Path(folder, name))
        if common.rank() == 0:
            torch.save(found, Path(folder, f"{name}.pt"))


def ptx(folder, chain):
    """Three steps of PPO-ptx with 7 rows of chain/ptx.jsonl per update, in micro-batches."""
    changes = dict(ptx_dataset=f"{chain}/ptx.jsonl", ptx_coef=0.6, micro_batch_tokens=40)
    with record("ppo") as found:
        run_flags("ppo", chain, Path(folder, "ppo"), **changes)
    if common.rank() == 0:
        torch.save(found, Path(folder, "ppo.pt"))


def halves(folder, chain, names=HALVED):
    """Two steps, then the third with --resume. A copy is kept after the two steps.

    Before the third step, the logs get lines that a killed run could have written."""
    for name in names:
        half = Path(folder, "halves", name)
        run_flags(name, chain, half, steps=2)
        if common.rank() == 0:
            shutil.copytree(half, Path(folder, "after two", name))
            for log in half.glob("*.jsonl"):
                with open(log, "a") as file:
                    file.write(log.read_text() + '{"step": 3, "los')
        run_flags(name, chain, half, resume=True)


def architectures(folder, chain):
    """Gradients and completions of each of the tiny models in folder/models."""
    device = common.setup(grpo.Args(output_dir=f"{folder}/none"))
    assert device == CPU
    found = {}
    for path in sorted(Path(folder, "models").iterdir()):
        policy = load_policy(path, trainable=True)
        for mb in common.micro_batches(fixed_batch(), 20):
            grpo.token_logprobs_and_entropy(policy, mb)[0].sum().backward()
        rollouts = common.sample(
            policy,
            [{"prompt_ids": ids} for ids in IDS],
            num_generations=2,
            max_new_tokens=6,
            rng=common.generator(1, "test"),
        )
        found[path.name] = gradient_of(policy), [x["completion_ids"] for x in rollouts]
    if common.rank() == 0:
        torch.save(found, Path(folder, "architectures.pt"))


def everything(folder, chain):
    """All comparisons in one start, because a start takes seconds."""
    architectures(folder, chain)
    every_script(folder, chain)
    halves(folder, chain)


def bfloat16(folder, chain):
    """Three steps of each script in bfloat16, the default on a GPU."""
    for name in NAMES:
        with record(name) as found:
            run_flags(name, chain, Path(folder, name), dtype="bfloat16")
        torch.save(found, Path(folder, f"{name}.pt"))


def rehearsal(folder, chain):
    """every_script and halves on the second device of second_device.py."""
    second_device.start()
    setup = common.setup

    def setup_on_second_device(args):
        setup(args)
        return torch.device(second_device.NAME, 0)

    for name in NAMES:
        importlib.import_module(name).setup = setup_on_second_device
    every_script(folder, chain)
    halves(folder, chain, ["sft", "ppo"])  # this device is slow


def third_step(folder, chain):
    """The third step of the runs in folder, which have made two."""
    for name in HALVED:
        if Path(folder, name).is_dir():
            saved = json.loads(Path(folder, name, "args.json").read_text())
            flags = {"reward": saved["reward"]} if "reward" in saved else {}
            run_flags(name, chain, Path(folder, name), resume=True, **flags)


def killed(folder, chain):
    """A run in which the last process is killed after step 3 is logged, before its checkpoint."""
    log = common.Run.log

    def killed_log(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 3 and common.rank() == common.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.log = killed_log
    run_flags("ppo", chain, Path(folder, "ppo"))


def interrupted(folder, chain):
    """A run of many steps. The file `started` appears after the first."""
    log = common.Run.log

    def telling_log(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 1 and common.rank() == 0:
            Path(folder, "started").touch()

    common.Run.log = telling_log
    run_flags("sft", chain, Path(folder, "sft"), steps=10**6, epochs=10**6, save_every=0)


def bad_file(folder, chain):
    """A run on a dataset with a bad row."""
    run_flags("sft", chain, Path(folder, "sft"), dataset=f"{folder}/bad.jsonl")


if __name__ == "__main__":
    end_with_parent()
    torch.set_num_threads(1)
    common.TASK_ROWS = TASK_ROWS
    command, folder, chain = sys.argv[1:]
    globals()[command](folder, chain)
