"""Speed and memory of sampling, of the head, of training and of a whole GRPO step, and how they
grow.

    python benchmarks/speed.py                  two CPU cores, about a quarter of an hour
    python benchmarks/speed.py --only sampling head
    python benchmarks/speed.py --gpu            Qwen2.5-0.5B's shape, bfloat16; needs a GPU
    python benchmarks/speed.py --growth         time and memory against sizes: speed_growth.png
    python benchmarks/speed.py --table          prints what is there; with --growth redraws it

Models have random weights; nothing ends with EOS. Runs alternate within one process; seconds are
the median, and the range stands beside it. Bandwidth and matrix products are measured on this
machine, by a sum over 1 GiB and a product of square matrices. The bound of sampling: a step reads
all weights once, and the keys and values of all rows. Model FLOPs: 6 for each weight and token (the
head's at trained tokens only), and those of causal attention. Peak memory is above what was there
before: on a CPU resident (it holds what the allocator keeps), on a GPU that of tensors."""

import argparse
import contextlib
import ctypes
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
GIB = 2**30
QWEN = dict(
    vocab=151_936, hidden=896, inner=4864, layers=24, heads=14, kv_heads=2
)  # Qwen2.5-0.5B's shape
LLAMA = dict(vocab=1024, hidden=128, inner=384, layers=4, heads=4, kv_heads=4)  # 1M parameters
SIZES = {
    "cpu": dict(model=LLAMA, prompts=8, prompt=32, group=8, new=32),
    "gpu": dict(model=QWEN, prompts=64, prompt=256, group=8, new=512),
}


# ---------------------------------------------------------------- tools
def build(shape, device):
    torch.manual_seed(1)
    config = transformers.Qwen2Config if shape["layers"] == 24 else transformers.LlamaConfig
    sizes = dict(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["inner"]
    )
    sizes |= dict(num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"])
    sizes |= dict(
        num_hidden_layers=shape["layers"], tie_word_embeddings=True, eos_token_id=1, pad_token_id=0
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config(**sizes, max_position_embeddings=4096)
        )


def autocast(device):
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(cases, repeats, device):
    """Each of the functions `repeats` times, in turn, after one that does not count -> seconds of
    each."""
    seconds = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, function in cases.items():
            wait(device)
            began = time.perf_counter()
            function()
            wait(device)
            seconds[name] += [time.perf_counter() - began] if repeat else []
    return seconds


def peak_memory(function, device):
    """GiB above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / GIB
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier cases left (Linux, glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024 / GIB


def bandwidth(device):
    """Bytes a second of reading 1 GiB, the best of several."""
    x = torch.ones(GIB // 4, device=device)
    return GIB / min(alternate({"read": x.sum}, 7, device)["read"])


def matmul_flops(device):
    """FLOPs a second of a product of square matrices, the best of several: bfloat16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(alternate({"product": lambda: x @ x}, 7, device)["product"])


def write(case, **values):
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    line = dict(case=case, device=name, threads=torch.get_num_threads(), torch=torch.__version__)
    line |= dict(date=f"{date.today()}") | values
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


# ---------------------------------------------------------------- the cases
def sampling(label, sizes, device, repeats):
    """Ours beside model.generate and transformers' continuous batching."""
    shape = sizes["model"]
    model = build(shape, device).eval()
    rng = torch.Generator().manual_seed(1)
    shape_of_prompts = (sizes["prompts"], sizes["prompt"])
    prompts = torch.randint(2, shape["vocab"], shape_of_prompts, generator=rng).tolist()
    new = sizes["new"]
    rows = sizes["prompts"] * sizes["group"]

    def ours():
        with autocast(device):
            return common.sample(
                model,
                prompts,
                num_generations=sizes["group"],
                max_new_tokens=new,
                temperature=1.0,
                eos_ids=[],
                rng=torch.Generator().manual_seed(1),
            )

    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=0,
        pad_token_id=0,
        eos_token_id=-1,
    )
    ids = torch.tensor(prompts, device=device).repeat_interleave(sizes["group"], 0)

    @torch.no_grad()
    def generate():
        with autocast(device):
            sequences = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        assert sequences.shape == (rows, sizes["prompt"] + new)

    cases = {"ours": ours, "generate": generate}
    seconds = alternate(cases, repeats, device)
    if label != "0.5B":  # it takes minutes there
        batching = transformers.ContinuousBatchingConfig(
            page_size=64, num_blocks=96, max_batch_tokens=2048
        )

        def generate_batch():
            with autocast(device), contextlib.redirect_stderr(io.StringIO()):
                model.generate_batch(
                    ids.tolist(),
                    settings,
                    continuous_batching_config=batching,
                    progress_bar=False,
                )

        seconds |= alternate({"generate_batch": generate_batch}, min(2, repeats), device)
    bytes_each = 2 if device == "cuda" else 4
    weights = sum(p.numel() for p in model.parameters()) * bytes_each
    head_width = shape["hidden"] // shape["heads"]
    width = 2 * shape["layers"] * shape["kv_heads"] * head_width * bytes_each
    cache = rows * width * (sizes["prompt"] + new / 2)
    bound = rows / ((weights + cache) / bandwidth(device))
    for name, times in seconds.items():
        rate = rows * new / statistics.median(times)
        peak = peak_memory(cases[name], device) if name in cases else None
        ratios = [a / b for a, b in zip(times, seconds["generate"])]
        write(
            "sampling",
            label=label,
            variant=name,
            seconds=times,
            tokens_per_second=rate,
            bound=bound,
            share=rate / bound,
            of_generate=statistics.median(ratios),
            peak_gib=peak,
        )


def random_batch(vocab, rows, prompt, completion, device):
    """Sequences of one length, trained on their completions."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocab, (rows, prompt + completion), generator=rng).tolist()
    return grpo.completion_batch([x[:prompt] for x in ids], [x[prompt:] for x in ids], device)


def hidden_and_targets(model, batch):
    """The body's last hidden states (N, H) and the targets (N,) at mask positions."""
    mask = batch["mask"].bool()
    outputs = model.base_model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    return outputs.last_hidden_state[mask], batch["targets"][mask]


def linear_cross_entropy(model, batch):
    """Log-probs by torch's own fused head, which has no entropy, temperature or cap."""
    hidden, targets = hidden_and_targets(model, batch)
    return -torch.nn.functional.linear_cross_entropy(
        hidden,
        model.get_output_embeddings().weight,
        targets,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256),
    )


def unchunked(model, batch):
    """Log-probs and entropy from all logits at once."""
    hidden, targets = hidden_and_targets(model, batch)
    logps = model.get_output_embeddings()(hidden).float().log_softmax(-1)
    entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy


def head(label, device, repeats):
    """Log-probs, forward and backward, with a head of 151,936 tokens and no layers below it."""
    model = build(QWEN | dict(layers=0), device)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().requires_grad_(False)

    def run(function, length):
        batch = random_batch(1000, 8, 1, length, device)
        with autocast(device):
            logprobs = function(model, batch)
        logprobs.sum().backward()
        model.zero_grad(set_to_none=True)

    cases = {
        "ours": lambda *x: grpo.token_logprobs_and_entropy(*x)[0],
        "unchunked": lambda *x: unchunked(*x)[0],
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        cases["linear_cross_entropy"] = linear_cross_entropy
    short = 2048 if device == "cuda" else 128
    timed = {name: lambda f=f: run(f, short) for name, f in cases.items()}
    seconds = alternate(timed, repeats, device)
    gradient = model.lm_head.weight.numel() * 4 / GIB
    for name, times in seconds.items():
        peak = None
        if name != "unchunked":  # (it takes minutes there, or does not fit)
            peak = peak_memory(lambda name=name: run(cases[name], 2048), device) - gradient
        write(
            "head",
            label=label,
            variant=name,
            tokens=8 * short,
            seconds=times,
            of_unchunked=[a / b for a, b in zip(times, seconds["unchunked"])],
            peak_gib_at_16k=peak,
        )


def training(label, sizes, device, repeats):
    """Forward, backward and AdamW on sequences of one length, trained on their completions."""
    shape = sizes["model"]
    length = sizes["prompt"] + sizes["new"]
    model = build(shape, device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows = max(1, (16_384 if device == "cuda" else 4096) // length)
    batch = random_batch(shape["vocab"], rows, sizes["prompt"], sizes["new"], device)

    def step():
        with autocast(device):
            logprobs, _ = grpo.token_logprobs_and_entropy(model, batch)
        (-logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = alternate({"step": step}, repeats, device)["step"]
    peak = peak_memory(step, device)
    tokens = batch["inputs"].numel()
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head  # (tied)
    flops = 6 * (body * tokens + head * batch["mask"].sum().item())
    flops += 6 * shape["layers"] * shape["hidden"] * length * tokens
    seconds = statistics.median(times)
    write(
        "training",
        label=label,
        seconds=times,
        tokens_per_second=tokens / seconds,
        share=flops / seconds / matmul_flops(device),
        peak_gib=peak,
    )


def reward(prompts, completions, rows):
    """A cheap checker: the share of `a` in a completion."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def run_grpo(sizes, device, steps):
    """grpo.main on a model of this shape -> metrics of its steps, seconds of sampling alone among
    them."""
    sample = grpo.sample
    spent = []

    def timed(*args, **kwargs):
        wait(device)
        began = time.perf_counter()
        result = sample(*args, **kwargs)
        wait(device)
        spent.append(time.perf_counter() - began)
        return result

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        build(sizes["model"], "cpu").save_pretrained(f"{folder}/model")
        sft.tiny_tokenizer().save_pretrained(f"{folder}/model")
        row = json.dumps({"prompt": "abcdefgh" * (sizes["prompt"] // 8)}) + "\n"
        Path(folder, "rows.jsonl").write_text(row * sizes["prompts"])
        args = grpo.Args(
            model=f"{folder}/model",
            dataset=f"{folder}/rows.jsonl",
            reward=f"{__file__}:reward",
            output_dir=f"{folder}/run",
            steps=steps,
            save_every=0,
            prompts_per_step=sizes["prompts"],
            num_generations=sizes["group"],
            max_prompt_length=2048,
            max_completion_length=sizes["new"],
        )
        grpo.sample = timed
        try:
            grpo.main(args)
        finally:
            grpo.sample = sample
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return [row | {"sampling": seconds} for row, seconds in zip(metrics, spent, strict=True)]


def step(label, sizes, device, repeats):
    """A whole GRPO step with a reference: sampling, scoring, and log-probs with the update."""
    found = []
    peak = peak_memory(lambda: found.extend(run_grpo(sizes, device, repeats + 3)), device)
    rows = found[2:-1]  # the first two warm up, the last one saves
    parts = dict(
        sampling=[row["sampling"] for row in rows], training=[row["seconds/train"] for row in rows]
    )
    parts["scoring"] = [row["seconds/sample"] - row["sampling"] for row in rows]
    whole = [sum(times) for times in zip(*parts.values())]
    write("step", label=label, seconds=whole, padding=rows[-1]["padding"], peak_gib=peak, **parts)


# ---------------------------------------------------------------- growth
AXES = {
    "prompts per step (8 completions each)": ("prompts", [2, 4, 8, 16, 32, 64]),
    "tokens of a completion": ("new", [8, 16, 32, 64, 128, 256]),
    "tokens of the vocabulary": ("vocab", [1024, 4096, 16_384, 65_536, 151_936]),
    "parameters of the layers, millions": ("hidden", [64, 128, 256, 512, 768]),
}


def point(axis, value, device):
    """One size changed -> seconds of a step and its parts, and peak memory, by a process of its
    own."""
    sizes = SIZES["cpu"] | dict(model=dict(LLAMA))
    if axis == "vocab":
        sizes["model"]["vocab"] = value
    elif axis == "hidden":
        sizes["model"] |= dict(hidden=value, inner=3 * value)
    else:
        sizes[axis] = value
    found = []
    peak = peak_memory(lambda: found.extend(run_grpo(sizes, device, 8)), device)
    rows, middle = found[2:-1], statistics.median
    sampling, training = (
        middle(r["sampling"] for r in rows),
        middle(r["seconds/train"] for r in rows),
    )
    print(
        json.dumps(
            dict(axis=axis, value=value, sampling=sampling, training=training, peak_gib=peak)
        )
    )


def growth(device):
    for axis, values in AXES.values():
        for value in values:
            command = [sys.executable, __file__, "--point", axis, str(value)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(done.stderr)
            write("growth", **json.loads(done.stdout.splitlines()[-1]))


def plot(lines):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    newest = {(line["axis"], line["value"]): line for line in lines if line["case"] == "growth"}
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), sharey="row", facecolor="white")
    for column, (axis, _) in enumerate(AXES.values()):
        rows = [newest[key] for key in sorted(newest) if key[0] == axis]
        x = [
            r["value"] * r["value"] * 13 * 4 / 1e6 if axis == "hidden" else r["value"] for r in rows
        ]
        for name, color in (("sampling", "tab:blue"), ("training", "tab:orange")):
            axes[0, column].plot(x, [r[name] for r in rows], "o-", color=color, label=name)
        axes[1, column].plot(x, [r["peak_gib"] for r in rows], "o-", color="tab:gray")
        for row in (0, 1):
            axes[row, column].set(xscale="log", yscale="log")
            ticks = [f"{v / 1000:.0f}k" if v > 999 else f"{v:.{int(v < 1)}f}" for v in x]
            axes[row, column].set_xticks(x, ticks)
            axes[row, column].minorticks_off()
            axes[row, column].grid(alpha=0.3)
    for row, ticks in enumerate(((0.03, 0.1, 0.3, 1, 3), (0.25, 0.5, 1, 2))):
        axes[row, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for column, label in enumerate(AXES):
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("seconds of a GRPO step")
    axes[1, 0].set_ylabel("peak memory above the start, GiB")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "speed_growth.png", dpi=90)


def spread(values, digits=3):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(lines):
    """Markdown, of the newest line of each case."""
    newest = {(x["case"], x["device"], x.get("label"), x.get("variant")): x for x in lines}
    titles = {
        "sampling": ["sampling", "", "seconds", "tokens/s", "of the bound", "of generate's time"],
        "head": ["head", "", "seconds", "of unchunked", "peak at 16,384 tokens, GiB"],
        "training": ["training", "seconds", "tokens/s", "of measured FLOP/s"],
        "step": ["GRPO step", "seconds", "sampling", "scoring", "log-probs and update", "padding"],
    }
    for case, names in titles.items():
        names = names if case == "head" else [*names, "peak, GiB"]
        print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for (kind, device, label, variant), x in newest.items():
            if kind != case:
                continue
            cells = [f"{label}, {device}"]
            cells += [variant] if variant else []
            cells.append(spread(x["seconds"]))
            if case in ("sampling", "training"):
                cells += [f"{x['tokens_per_second']:,.0f}", f"{x['share']:.2f}"]
            if case == "sampling":
                cells.append(f"{x['of_generate']:.2f}")
            if case == "head":
                cells.append(spread(x["of_unchunked"], 2))
            if case == "step":
                for part in ("sampling", "scoring", "training"):
                    cells.append(f"{statistics.median(x[part]):.3f}")
                cells.append(f"{x['padding']:.3f}")
            peak = x["peak_gib_at_16k" if case == "head" else "peak_gib"]
            cells.append("" if peak is None else f"{peak:.2f}")
            print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["sampling", "head", "training", "step"])
    parser.add_argument("--repeats", type=int, default=9)
    for flag in ("--gpu", "--growth", "--table"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, label = ("cuda", "0.5B") if args.gpu else ("cpu", "1M")
    if args.gpu and not torch.cuda.is_available():
        sys.exit("no GPU here: leave out --gpu")
    if args.point:
        return point(args.point[0], int(args.point[1]), device)
    sizes = SIZES["gpu" if args.gpu else "cpu"]
    if args.growth and not args.table:
        growth(device)
    elif not args.table:
        if "sampling" in args.only:
            sampling(label, sizes, device, args.repeats)
            if not args.gpu:  # too large for a cache: here memory is what limits
                sampling("0.5B", dict(model=QWEN, prompts=2, prompt=32, group=4, new=16), device, 3)
        if "head" in args.only:
            head("151,936 x 896", device, args.repeats if args.gpu else 5)
        if "training" in args.only:
            training(label, sizes, device, args.repeats)
        if "step" in args.only:
            step(label, sizes, device, args.repeats)
    text = RESULTS.read_text() if RESULTS.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    if args.growth:
        plot(lines)
    table(lines)


if __name__ == "__main__":
    main()
