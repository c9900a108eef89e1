"""Seconds and memory of a GRPO step, a lower bound of the seconds, and their growth with size.

    python benchmarks/speed.py                              a Llama of 1M parameters, two CPU cores
    python benchmarks/speed.py --model ../models/smollm2    a real model, minutes per step
    python benchmarks/speed.py --growth                     larger sizes: speed_growth.png
    python benchmarks/speed.py --table                      the table of finished runs

Steps of grpo.main with a reference and a cheap reward: 8 prompts of 32 tokens, 8 completions of 32
tokens each, EOS ignored. The bound counts matrix products only: 2 FLOPs per weight and token of a
forward pass, 4 more of a backward pass (the LM head at completion tokens only), at the measured
rate of a product of square matrices. `model.generate` samples the same number of tokens for
comparison. Seconds are medians and ranges. Peak memory is the resident memory that a run adds to
its process, on a GPU the allocated tensors. Uses a GPU if there is one."""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from helpers import (
    HERE,
    make_parser,
    median_and_range,
    print_header,
    print_row,
    read_lines,
    write_lines,
)

import common
import grpo
import sft

RESULTS = HERE / "speed.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = dict(prompts=8, prompt=32, group=8, new=32, vocab=1024)
AXES = {
    "prompts": ("completions per step", [2, 4, 8, 16, 32]),
    "new": ("tokens per completion", [32, 64, 128, 256, 512]),
    "vocab": ("vocabulary", [512, 4096, 32_768, 262_144]),
}


# ---------------------------------------------------------------- one step
def save_model(folder, vocab):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)


def reward(prompts, completions, rows):
    """Share of the letter a in each completion."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def matmul_rate():
    """FLOPs per second of a product of square matrices, the best of seven."""
    n = 8192 if DEVICE == "cuda" else 2048
    x = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else None)
    return 2 * n**3 / min(seconds_of(lambda: x @ x) for _ in range(7))


def seconds_of(function):
    start_time = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def flops(model, sizes):
    """FLOPs of sampling, and of reference and update together."""
    head = model.get_output_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = matrices - (head if is_tied else 2 * head)  # an embedding lookup is no product
    prompt_tokens = sizes["prompts"] * sizes["prompt"]
    completions = sizes["prompts"] * sizes["group"]
    completion_tokens = completions * sizes["new"]
    sampling = 2 * body * (prompt_tokens + completion_tokens) + 2 * head * completion_tokens
    tokens = completions * (sizes["prompt"] + sizes["new"])
    training = (2 + 6) * (body * tokens + head * completion_tokens)
    return {"sampling": sampling, "training": training}


def resident(name):
    """VmRSS or VmHWM of this process, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**20


def measure(sizes, model, steps):
    """Seconds of the parts of a step, their lower bounds, seconds of generate, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = f"{folder}/model"
            save_model(model, sizes["vocab"])
        tokenizer = common.load_tokenizer(model)
        ids = tokenizer("abcdefgh" * sizes["prompt"]).input_ids[: sizes["prompt"]]
        rows = [{"prompt": tokenizer.decode(ids)}] * sizes["prompts"]
        write_lines(f"{folder}/rows.jsonl", rows)
        args = grpo.Args(
            model=model,
            dataset=f"{folder}/rows.jsonl",
            reward=f"{__file__}:reward",
            output_dir=f"{folder}/run",
            steps=steps,
            save_every=0,
            prompts_per_step=sizes["prompts"],
            num_generations=sizes["group"],
            max_prompt_length=2 * sizes["prompt"],
            max_completion_length=sizes["new"],
        )
        before = resident("VmRSS")
        found, prompts = run_grpo(args)
        peak = resident("VmHWM") - before
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        policy = common.load_policy(model, tokenizer, args, torch.device(DEVICE))
        rate = matmul_rate()
        return found | {
            "bound": {name: value / rate for name, value in flops(policy, sizes).items()},
            "generate": [
                seconds_of(lambda: generate(policy, prompts, sizes, args)) for _ in range(3)
            ],
            "peak": peak,
        }


def run_grpo(args):
    """Seconds of each part of each step except the first two and the last, which saves; prompts."""
    sample = grpo.sample
    sampling = []
    prompts = []

    def timed_sample(policy, examples, **options):
        prompts[:] = [example["prompt_ids"] for example in examples]
        rollouts = []
        # no token ends a completion
        with patch.object(policy.generation_config, "eos_token_id", [-1]):
            seconds = seconds_of(lambda: rollouts.extend(sample(policy, examples, **options)))
        sampling.append(seconds)
        return rollouts

    with patch.object(grpo, "sample", timed_sample), contextlib.redirect_stdout(io.StringIO()):
        grpo.main(args)
    rows = read_lines(Path(args.output_dir, "metrics.jsonl"))
    parts = {
        "sampling": sampling,
        "scoring": [row["seconds/sample"] - s for row, s in zip(rows, sampling)],
        "training": [row["seconds/train"] for row in rows],
    }
    return {name: seconds[2:-1] for name, seconds in parts.items()}, prompts


@torch.no_grad()
def generate(policy, prompts, sizes, args):
    """Sample as many tokens with model.generate."""
    ids = torch.tensor(prompts, device=DEVICE).repeat_interleave(sizes["group"], 0)
    with common.autocast(policy):
        policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sizes["new"],
            min_new_tokens=sizes["new"],
            pad_token_id=0,
        )


# ---------------------------------------------------------------- results, table, figure
def write(case, **values):
    line = {
        "case": case,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    write_lines(RESULTS, [line | values], mode="a")
    print(line | values, flush=True)


def grow():
    """Measure each size in its own process, because memory is per process."""
    for axis, (_, values) in AXES.items():
        for value in values:
            command = [sys.executable, __file__, "--point", axis, str(value)]
            subprocess.run(command, check=True)


def print_table(lines):
    print_header(["GRPO step", "part", "seconds", "lower bound", "peak, GiB"])
    for line in lines:
        if line["case"] != "step":
            continue
        label = f"{line['model']}, {line['device']}"
        for part in ("sampling", "generate", "training"):
            bound = line["bound"]["sampling" if part == "generate" else part]
            seconds = median_and_range(line[part])
            print_row([label, part, seconds, f"{bound:.3f}", f"{line['peak']:.2f}"])


def draw(lines):
    from matplotlib.figure import Figure

    newest = {(line["axis"], line["value"]): line for line in lines if line["case"] == "growth"}
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, len(AXES), sharey="row")
    for column, (axis, (label, values)) in enumerate(AXES.items()):
        points = [newest[axis, value] for value in values]
        x = [value * SIZES["group"] if axis == "prompts" else value for value in values]
        time_panel, memory_panel = axes[:, column]
        for part in ("sampling", "training"):
            seconds = [statistics.median(point[part]) for point in points]
            time_panel.plot(x, seconds, "o-", label=part)
        memory_panel.plot(x, [point["peak"] for point in points], "o-", color="tab:gray")
        for panel in (time_panel, memory_panel):
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(x, [f"{value:,}" for value in x])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        memory_panel.set_xlabel(label)
    axes[0, 0].set_ylabel("seconds of a GRPO step")
    axes[1, 0].set_ylabel("memory added by the run, GiB")
    axes[0, 0].legend()
    figure.savefig(HERE / "speed_growth.png", dpi=110)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if args.point:
        axis, value = args.point[0], int(args.point[1])
        found = measure(SIZES | {axis: value}, None, args.steps)
        return write("growth", axis=axis, value=value, **found)
    if args.growth and not args.table:
        grow()
    elif not args.table:
        name = "Llama, 1M" if args.model is None else Path(args.model).name
        write("step", model=name, **measure(SIZES, args.model, args.steps))
    lines = read_lines(RESULTS)
    if args.growth:
        draw(lines)
    print_table(lines)


if __name__ == "__main__":
    main()
