"""Seconds and memory of a GRPO step, beside the least that its matrix products take, and how they
grow with its sizes.

    python benchmarks/speed.py                          a Llama of 1M parameters, two CPU cores
    python benchmarks/speed.py --model ../models/smollm2    a real one, minutes a step
    python benchmarks/speed.py --growth                 sizes up to 256 times: speed_growth.png
    python benchmarks/speed.py --table                  prints what is in speed.jsonl

Steps of grpo.main with a reference and a cheap reward: 8 prompts of 32 tokens, 8 completions of 32
tokens each, none of which ends before. The bound: 2 FLOPs for each weight and token of a forward
pass, 4 more for a backward one (the head's at completions alone), at the rate of a product of
square matrices measured on the same machine; attention and sums are left out. Sampling is measured
beside `model.generate` too. Seconds are medians, with the range. Peak memory is what a run adds to
its process, resident, or on a GPU that of tensors. A GPU is used where there is one."""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402

RESULTS = HERE / "speed.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = dict(prompts=8, prompt=32, group=8, new=32, vocab=1024)
AXES = {
    "prompts": ("completions a step", [2, 4, 8, 16, 32]),
    "new": ("tokens of a completion", [32, 64, 128, 256, 512]),
    "vocab": ("tokens of the vocabulary", [512, 4096, 32_768, 262_144]),
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
    """The share of `a` in a completion."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def matmul_rate():
    """FLOPs a second of a product of square matrices, the best of seven."""
    n = 8192 if DEVICE == "cuda" else 2048
    x = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else None)
    return 2 * n**3 / min(seconds_of(lambda: x @ x) for _ in range(7))


def seconds_of(function):
    began = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def flops(model, sizes):
    """Of sampling, and of reference and update."""
    head = model.get_output_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = matrices - (head if is_tied else 2 * head)  # to look up a token is no product
    prompt_tokens = sizes["prompts"] * sizes["prompt"]
    completions = sizes["prompts"] * sizes["group"]
    completion_tokens = completions * sizes["new"]
    sampling = 2 * body * (prompt_tokens + completion_tokens) + 2 * head * completion_tokens
    tokens = completions * (sizes["prompt"] + sizes["new"])
    training = (2 + 6) * (body * tokens + head * completion_tokens)
    return dict(sampling=sampling, training=training)


def resident(name):
    """VmRSS or VmHWM of this process, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**20


def measure(sizes, model, steps):
    """Seconds of the steps of grpo.main after the second, their bound, and what sampling takes
    beside generate."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = f"{folder}/model"
            save_model(model, sizes["vocab"])
        words = "abcdefgh" * sizes["prompt"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        prompt = tokenizer.decode(tokenizer(words).input_ids[: sizes["prompt"]])
        row = json.dumps({"prompt": prompt}) + "\n"
        Path(folder, "rows.jsonl").write_text(row * sizes["prompts"])
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
        found, samples = run_grpo(args)
        peak = resident("VmHWM") - before
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        policy = common.load_policy(model, DEVICE)
        least = flops(policy, sizes)
        rate = matmul_rate()
        generate = [seconds_of(lambda: generated(policy, samples, sizes)) for _ in range(3)]
        return found | dict(
            bound={name: value / rate for name, value in least.items()},
            generate=generate,
            peak=peak,
        )


def run_grpo(args):
    """Seconds of each part of each step but the first two and the last, which saves; prompts."""
    sample = grpo.sample
    sampling = []
    prompts = []

    def timed(model, prompt_ids, **options):
        prompts[:] = prompt_ids
        found = []
        options["eos_ids"] = []  # all are as long as they may be
        sampling.append(seconds_of(lambda: found.extend(sample(model, prompt_ids, **options))))
        return found

    grpo.sample = timed
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            grpo.main(args)
    finally:
        grpo.sample = sample
    lines = Path(args.output_dir, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    parts = dict(
        sampling=sampling[2:-1],
        scoring=[row["seconds/sample"] - s for row, s in zip(rows, sampling)][2:-1],
        training=[row["seconds/train"] for row in rows][2:-1],
    )
    return parts, prompts


@torch.no_grad()
def generated(policy, prompts, sizes):
    """The same number of tokens from model.generate."""
    ids = torch.tensor(prompts, device=DEVICE).repeat_interleave(sizes["group"], 0)
    policy.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sizes["new"],
        min_new_tokens=sizes["new"],
        pad_token_id=0,
    )


# ---------------------------------------------------------------- lines, table, figure
def write(case, **values):
    line = dict(
        case=case,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=str(date.today()),
    )
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line | values) + "\n")
    print(json.dumps(line | values), flush=True)


def grow():
    """Each size in turn, in a process of its own, so that its memory is its own."""
    for axis, (_, values) in AXES.items():
        for value in values:
            command = [sys.executable, __file__, "--point", axis, str(value)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(done.stderr)
            print(done.stdout, end="", flush=True)


def spread(values):
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_table(lines):
    names = ["GRPO step", "part", "seconds", "least", "peak, GiB"]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for line in lines:
        if line["case"] != "step":
            continue
        label = f"{line['model']}, {line['device']}"
        for part in ("sampling", "generate", "training"):
            least = f"{line['bound']['sampling' if part == 'generate' else part]:.3f}"
            cells = [label, part, spread(line[part]), least, f"{line['peak']:.2f}"]
            print(f"| {' | '.join(cells)} |")


def draw(lines):
    import matplotlib.pyplot as plt

    newest = {(line["axis"], line["value"]): line for line in lines if line["case"] == "growth"}
    figure, axes = plt.subplots(
        2,
        len(AXES),
        figsize=(12, 6.5),
        sharey="row",
        layout="constrained",
    )
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
    axes[1, 0].set_ylabel("memory that the run adds, GiB")
    axes[0, 0].legend()
    figure.savefig(HERE / "speed_growth.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        axis, value = args.point[0], int(args.point[1])
        found = measure(SIZES | {axis: value}, None, args.steps)
        return write("growth", axis=axis, value=value, **found)
    if args.growth and not args.table:
        grow()
    elif not args.table:
        name = "Llama, 1M" if args.model is None else Path(args.model).name
        write("step", model=name, **measure(SIZES, args.model, args.steps))
    lines = []
    if RESULTS.exists():
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    if args.growth:
        draw(lines)
    print_table(lines)


if __name__ == "__main__":
    main()
