"""What test_processes.py starts, with python or with torchrun: all seven mains, and what there is to compare.

python tests/processes.py COMMAND FOLDER [CHAIN] [WAY]      COMMAND is the name of a function below

WAY: none, full (FSDP), or layers (FSDP, sampling layer by layer)."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import common

NAMES = ["sft", "reward_model", "dpo", "rejection_sampling", "ppo", "rloo", "grpo"]
PROMPTS = [[3, 9, 4], [12, 5, 8, 7, 6, 11, 2], [4], [9, 3, 9, 3], [7, 7]]


def flags(name, chain, folder, way):
    """Three steps, of 7 rows or of 5 prompts times 3, which 2 do not divide, nor 3 the rows."""
    args = dict(
        model=f"{chain}/sft", output_dir=str(folder), steps=3, warmup_steps=0, learning_rate=1e-4
    )
    args |= dict(lr_schedule="constant", max_grad_norm=0.0, micro_batch_tokens=60, save_every=2)
    args |= dict(shard="none" if way == "none" else "full", eval_every=2)
    if name in ("ppo", "rloo", "grpo"):
        args |= dict(prompts_per_step=5, num_generations=3, max_completion_length=6, kl_coef=0.05)
        args |= dict(reward=f"{__file__}:letters", minibatches=2, missing_eos_penalty=0.5)
    elif name == "rejection_sampling":
        args |= dict(
            reward=f"{chain}/reward_model", prompts=14, num_generations=3, max_completion_length=6
        )
        args |= dict(batch_size=7, epochs=2)
    else:
        args |= dict(batch_size=7)
    if name == "ppo":
        args |= dict(reward=f"{chain}/reward_model")
    if name == "grpo":  # and one without KL in the reward, whose update finds the old log-probs
        args |= dict(minibatches=1)
    if name == "dpo":
        args |= dict(precompute_ref=False)
    if name == "rloo":
        args |= dict(max_grad_norm=0.01)
    if name in ("sft", "ppo"):
        args |= dict(gradient_checkpointing=True)
    return args


def letters(prompts, completions, rows):
    """A reward that an untrained model gets some of; it runs in the first process alone."""
    assert common.rank() == 0
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def run(name, chain, folder, way, **changes):
    script = importlib.import_module(name)
    args = flags(name, chain, folder, way) | changes
    return script.main(script.Args(**args))


def layers_only():
    """No process gathers a whole model to sample from it; and models with a scalar head are not split."""
    split = common.shard

    def shard(model, device, train):
        common.SHARD = "none" if "Classification" in type(model).__name__ else "full"
        return split(model, device, train)

    common.shard = shard
    common.gathered = contextlib.contextmanager(lambda model: (yield False))


def record(name):
    """Gradients before clipping and what was sampled, of the script of that name, to be saved."""
    script, found = importlib.import_module(name), {"gradients": [], "sampled": []}
    clip, sample = common.clip_gradients, common.sample

    def spy_clip(model, max_norm):
        norm = clip(model, max_norm)
        grads = [common.whole(p.grad).flatten() for p in model.parameters()]
        found["gradients"].append(torch.cat(grads).clone())
        total = found["gradients"][-1].double().norm()
        total = norm if 0 < max_norm < norm else total  # (and then they are recorded as clipped)
        assert common.rank() > 0 or abs(total - norm) < 1e-4 * norm, (total, norm)
        return norm

    def spy_sample(*args, **kwargs):
        completions, logprobs = sample(*args, **kwargs)
        found["sampled"].append((completions, logprobs))
        return completions, logprobs

    script.clip_gradients = spy_clip
    if hasattr(script, "sample"):
        script.sample = spy_sample
    return found


def every_script(folder, chain, way):
    """Three steps of each; then the last of them again after two and --resume."""
    if way == "layers":
        layers_only()
    for name in NAMES:
        found = record(name)
        run(name, chain, Path(folder, name), way)
        policy = (
            common.load_policy(f"{folder}/{name}", torch.device("cpu"))
            if name != "reward_model"
            else None
        )
        if policy is not None:  # log-probs of fixed rows
            batch = common.completion_batch(PROMPTS, PROMPTS[::-1], torch.device("cpu"))
            script, part = importlib.import_module(name), (batch.input_ids, batch.attention_mask)
            found["logprobs"] = script.token_logprobs(policy, *part, batch.completion_mask[:, 1:])[
                0
            ].detach()
        if common.rank() == 0:
            torch.save(found, Path(folder, f"{name}.pt"))


def two_and_one(folder, chain, way):
    """Three steps; two steps, of which a copy can be taken elsewhere, and the third with --resume."""
    for name in ("sft", "ppo"):
        run(name, chain, Path(folder, "whole", name), way)
        run(name, chain, Path(folder, "halves", name), way, steps=2)
        if common.rank() == 0:
            shutil.copytree(Path(folder, "halves", name), Path(folder, "after two", name))
        run(name, chain, Path(folder, "halves", name), way, resume=True)


def go_on(folder, chain, way):
    """The third step of runs that have made two."""
    for name in ("sft", "ppo"):
        if Path(folder, name).is_dir():
            run(name, chain, Path(folder, name), way, resume=True)


def architectures(folder, chain, way):
    """Gradients and samples of each model in CHAIN, a folder of folders, with chunks of logits or not."""
    grpo, args = importlib.import_module("grpo"), importlib.import_module("grpo").Args(shard="full")
    device, autocast = common.setup(
        dataclasses.replace(args, output_dir=folder, micro_batch_tokens=20)
    )
    common.SHARD, found = "none" if way == "none" else "full", {}
    batch = common.completion_batch(PROMPTS, PROMPTS[::-1], device)
    for path, chunk in itertools.product(sorted(Path(chain).iterdir()), (common.CHUNK, 5 * 64)):
        common.CHUNK = chunk  # all logits at once, or five tokens at a time
        policy = common.load_policy(str(path), device, train=args)
        for rows in common.micro_batches(batch.lengths, 20):
            mb = batch.rows(rows)
            inputs = mb.input_ids, mb.attention_mask, mb.completion_mask[:, 1:]
            grpo.token_logprobs(policy, *inputs)[0].sum().backward()
        common.clip_gradients(policy, 0.0)
        gradient = torch.cat([common.whole(p.grad).flatten() for p in policy.parameters()])
        tokens = common.sample(policy, PROMPTS, 2, 6, 1.0, [1], common.generator(1, "test"))[0]
        found[f"{path.name} {chunk}"] = gradient, tokens
    if common.rank() == 0:
        torch.save(found, Path(folder, "found.pt"))
    if common.world() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def dies(folder, chain, way):
    """The last process is killed in the third step, after a checkpoint; it dies once."""
    log, ppo = common.Run.log, importlib.import_module("ppo")

    def spy(self, step, metrics, show):
        log(self, step, metrics, show)
        if step == 3 and common.rank() == common.world() - 1:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the last process has failed")

    common.Run.log = spy
    ppo.main(ppo.Args(**flags("ppo", chain, Path(folder, "ppo"), "full")))


def interrupted(folder, chain, way):
    """Many steps; a line when the first is done."""
    log, sft = common.Run.log, importlib.import_module("sft")

    def spy(self, step, metrics, show):
        log(self, step, metrics, show)
        if step == 1 and common.rank() == 0:
            Path(folder, "began").write_text(json.dumps(os.getpid()))

    common.Run.log = spy
    args = flags("sft", chain, Path(folder, "sft"), "none") | dict(
        steps=10**6, epochs=10**6, save_every=0
    )
    sft.main(sft.Args(**args))


def bad_file(folder, chain, way):
    """A data set that no process can read."""
    Path(folder).mkdir(exist_ok=True)
    bad = Path(folder, "bad.jsonl")
    if os.environ.get("RANK", "0") == "0":
        bad.write_text('{"prompt": "a"}\n')
    sft = importlib.import_module("sft")
    args = flags("sft", chain, Path(folder, "sft"), "none") | dict(dataset=str(bad))
    sft.main(sft.Args(**args))


def broken(prompts, completions, rows):
    """A reward that fails; no other process may call it."""
    Path(os.environ["CALLED"], f"{common.rank()}").touch()
    raise ValueError("the judge is away")


def bad_reward(folder, chain, way):
    """A reward function that raises."""
    os.environ["CALLED"] = folder
    run("grpo", chain, Path(folder, "grpo"), "none", reward=f"{__file__}:broken")


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.TASK_ROWS = {"sft": 64, "preference": 64, "prompt": 64, "held out": 13}
    command, folder, *more = sys.argv[1:]
    chain, way = (more + ["", "none"][len(more) :])[:2]
    globals()[command](folder, chain, way)
