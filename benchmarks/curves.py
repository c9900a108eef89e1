"""All methods from one start, at as many sampled completions each, over seeds: what they reach, in
what time, how far from where they began.

    OMP_NUM_THREADS=1 python benchmarks/curves.py --seeds 1 2 3    about half an hour a seed
    python benchmarks/curves.py --draw                 table and figures of what is there

Times are of one CPU core. Each evaluation of a run is a line of benchmarks/curves.jsonl, written
when the run ends; runs that are there are not run again, so that a benchmark that was killed goes
on when it is started again. Figures need matplotlib."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
POINTS = HERE / "curves.jsonl"

# 40,960 completions each: rejection sampling trains on right ones only, DPO sees 20,480 pairs; DAPO
# throws two thirds away and so samples as many in 13 steps, of four updates each, since with one
# nothing is clipped
EXACT = "--reward sort --learning-rate 3e-4"
GROUPS = f"{EXACT} --num-generations 8 --prompts-per-step 32 --steps 160 --eval-every 20"
DR_GRPO = "--scale-rewards none --loss-aggregation constant --kl-coef 0"
DAPO = (
    "--loss-aggregation token --epsilon-high 0.28 --kl-coef 0 --dynamic-sampling "
    "--num-generations 8"
)
METHODS = {  # method -> script, flags
    "PPO, learned reward": ("ppo", "--eval-every 10"),
    "PPO": (
        "ppo",
        f"{EXACT} --kl-coef 0.02 --value-model runs/sft --missing-eos-penalty 0 --eval-every 10",
    ),
    "RLOO": ("rloo", GROUPS),
    "REINFORCE, no baseline": ("rloo", f"{GROUPS} --baseline none"),
    "GRPO": ("grpo", GROUPS),
    "Dr. GRPO": ("grpo", f"{GROUPS} {DR_GRPO}"),
    "DAPO": (
        "grpo",
        f"{EXACT} {DAPO} --prompts-per-step 128 --num-minibatches 4 --steps 13 "
        "--warmup-steps 1 --eval-every 1",
    ),
    "rejection sampling": (
        "rejection_sampling",
        "--reward sort --min-score 1 --temperature 1 --prompts-per-iteration 640 "
        "--iterations 4 --epochs 4",
    ),
    "DPO": ("dpo", "--steps 640 --eval-every 80"),
}
STAGES = ["sft", "reward_model"]  # before, once a seed


def process(script, flags, seed, folder, out):
    """One script as a user would run it, in the folder of a seed."""
    flags = [*flags.split(), "--seed", str(seed), "--output-dir", str(out), "--overwrite"]
    print(f"\n$ python {script}.py {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True)


def run(method, seed, folder):
    """One run -> its points, a dict for each evaluation."""
    for stage in STAGES:
        if not (folder / "runs" / stage / "config.json").exists():
            process(stage, "", seed, folder, Path("runs", stage))
    script, flags = METHODS[method]
    out = folder / "runs/method"
    process(script, flags, seed, folder, out)
    args = json.loads((out / "args.json").read_text())
    rows = read_lines(out / "metrics.jsonl")
    name = dict(method=method, seed=seed)
    return [name | point for point in evaluations(rows, script, args)]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(rows, script, args):
    """Each evaluation of a run, with what had been sampled and trained on until then."""
    completions = seconds = tokens = 0.0
    points = []
    for row in rows:
        if row["step"] > 0:
            step = row["seconds/train"] + row.get("seconds/sample", 0.0)
            seconds += step
            if script == "rejection_sampling":  # whose tokens per second leave sampling out
                step = row["seconds/train"]
            tokens += row["tokens_per_second"] * step * args.get("update_epochs", 1)
            completions += completions_of(row, script, args)
        found = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        if found:
            point = dict(step=row["step"], completions=completions)
            points.append(point | dict(seconds=seconds, trained_tokens=tokens) | found)
    return points


def completions_of(row, script, args):
    """How many were sampled for a step."""
    if script == "dpo":
        return 2 * args["batch_size"]
    if script == "rejection_sampling":
        samples = "seconds/sample" in row  # at an iteration's first step
        return samples * args["prompts_per_iteration"] * args["num_generations"]
    groups = args["prompts_per_step"] / (1 - row.get("dropped_groups", 0.0))
    return groups * args["num_generations"]


def at(points, axis, where, name):
    """Linear interpolation of a value at a place on an axis (the last value beyond its end)."""
    for before, after in zip(points, points[1:]):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before[name] + share * (after[name] - before[name])
    return points[-1][name]


def spread(values, digits=3):
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def load():
    """method -> a list of runs, each a list of points."""
    runs = {}
    for point in read_lines(POINTS) if POINTS.exists() else ():
        of_method = runs.setdefault(point["method"], {})
        of_method.setdefault(point["seed"], []).append(point)
    return {method: list(runs[method].values()) for method in METHODS if method in runs}


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def print_methods(methods):
    """What each reaches with as many completions, and in as much time."""
    runs = [run for runs in methods.values() for run in runs]
    budget = statistics.median(run[-1]["completions"] for run in runs)
    seconds = statistics.median(run[-1]["seconds"] for run in runs)
    print()
    print_row(
        [
            f"{max(map(len, methods.values()))} seeds, {budget:,.0f} completions",
            "gold",
            f"after {seconds:.0f} s",
            "at the end, greedy",
            "seconds",
            "KL, nats",
            "tokens trained, thousand",
        ]
    )
    print("|" + "---|" * 7)
    start = [run[0] for run in next(iter(methods.values()))]
    before = spread([point["gold"] for point in start])
    print_row(["before", before, "", spread([point["gold_greedy"] for point in start]), "", "", ""])
    for method, runs in methods.items():
        ends = [run[-1] for run in runs]
        print_row(
            [
                method,
                spread([at(run, "completions", budget, "gold") for run in runs]),
                spread([at(run, "seconds", seconds, "gold") for run in runs]),
                spread([end["gold_greedy"] for end in ends]),
                spread([end["seconds"] for end in ends], digits=0),
                spread([end["kl"] for end in ends], digits=2),
                f"{statistics.mean(end['trained_tokens'] for end in ends) / 1000:.0f}",
            ]
        )


COLOURS = dict(zip(METHODS, ("#222222", "C0", "C2", "C6", "C1", "C3", "C4", "C5", "C9")))
DASHED = ("REINFORCE, no baseline", "PPO, learned reward", "DPO", "rejection sampling")
AXES = {
    "completions": "completions the policy sampled (DPO: answers in its pairs)",
    "seconds": "seconds of training on one CPU core",
    "kl": "KL from the SFT model, nats per completion",
}


def draw_mean(axes, runs, axis, method):
    """Mean over seeds of what is right, and the range from the lowest to the highest."""
    import numpy as np

    n = min(map(len, runs))
    x = np.array([[point[axis] for point in run[:n]] for run in runs])
    y = np.array([[point["gold"] for point in run[:n]] for run in runs])
    colour = COLOURS[method]
    line = "--" if method in DASHED else "-"
    axes.plot(x.mean(0), y.mean(0), label=method, marker="o", ms=2.5, lw=1.4, color=colour, ls=line)
    if axis != "kl":
        axes.fill_between(x.mean(0), y.min(0), y.max(0), alpha=0.12, lw=0, color=colour)
    else:
        axes.plot(x[:, -1], y[:, -1], ".", ms=4, alpha=0.5, color=colour)


def draw(name, methods, panels):
    """A PNG file on white, which light and dark pages show alike."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels) + 2, 4.2),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for panel, axis in zip(axes[0], panels):
        for method, runs in methods.items():
            draw_mean(panel, runs, axis, method)
        panel.set(xlabel=AXES[axis], xlim=(0, None))
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out prompts answered right")
    axes[0][0].set_title("Sorting letters, from one half-trained model", loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(HERE / f"{name}.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--methods", nargs="+", help="as they are named in the tables; without it all"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/curves", help="folder of the runs"
    )
    parser.add_argument("--draw", action="store_true", help="only draw and print what is there")
    args = parser.parse_args()
    known = {(method, run[0]["seed"]) for method, runs in load().items() for run in runs}
    for seed in args.seeds if not args.draw else ():
        for method in args.methods or METHODS:
            if (method, seed) in known:
                continue
            folder = args.runs.resolve() / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            points = run(method, seed, folder)
            with open(POINTS, "a") as file:
                file.write("".join(json.dumps(point) + "\n" for point in points))
    methods = load()
    print_methods(methods)
    draw("curves", methods, ["completions", "seconds"])
    draw("frontier", methods, ["kl"])


if __name__ == "__main__":
    main()
