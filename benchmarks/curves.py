"""Compare all methods from one SFT model, at as many sampled completions each, over seeds.

    python benchmarks/curves.py --seeds 1 2 3    half an hour per seed
    python benchmarks/curves.py --draw           table and figures of finished runs

Times are of one CPU core. A finished run adds a line per evaluation to benchmarks/curves.jsonl.
Runs in that file are skipped, so a second call resumes. Figures need matplotlib."""

import json
import statistics
from pathlib import Path

from helpers import (
    HERE,
    ROOT,
    make_parser,
    print_header,
    print_row,
    read_lines,
    run_script,
    write_lines,
)

POINTS = HERE / "curves.jsonl"

# 40,960 completions each. Rejection sampling trains on correct ones only, DPO on 20,480 pairs. DAPO
# drops two thirds, so it samples as many in 13 steps, each of four updates: with one update nothing
# would be clipped
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


def run(method, seed, folder):
    """Run a method, after the stages that it needs; returns a point per evaluation."""
    for stage in ["sft", "reward_model"]:
        run_script(stage, "", folder, f"runs/{stage}", seed)
    script, flags = METHODS[method]
    out = f"runs/{method}"
    run_script(script, flags, folder, out, seed)
    args = json.loads((folder / out / "args.json").read_text())
    rows = read_lines(folder / out / "metrics.jsonl")
    return [{"method": method, "seed": seed} | point for point in evaluations(rows, script, args)]


def evaluations(rows, script, args):
    """Evaluations of a run, each with completions, seconds and trained tokens until then."""
    completions = seconds = tokens = 0.0
    points = []
    for row in rows:
        if row["step"] > 0:
            step_seconds = row["seconds/train"] + row.get("seconds/sample", 0.0)
            seconds += step_seconds
            if script == "rejection_sampling":  # its tokens_per_second excludes sampling
                step_seconds = row["seconds/train"]
            tokens += row["tokens_per_second"] * step_seconds * args.get("update_epochs", 1)
            completions += completions_of(row, script, args)
        metrics = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        if metrics:
            point = {"step": row["step"], "completions": completions}
            points.append(point | {"seconds": seconds, "trained_tokens": tokens} | metrics)
    return points


def completions_of(row, script, args):
    """Number of completions sampled for a step."""
    if script == "dpo":
        return 2 * args["batch_size"]
    if script == "rejection_sampling":
        is_first_step = "seconds/sample" in row  # of an iteration
        return is_first_step * args["prompts_per_iteration"] * args["num_generations"]
    groups = args["prompts_per_step"] / (1 - row.get("dropped_groups", 0.0))
    return groups * args["num_generations"]


def at(points, axis, where, name):
    """A value at a place on an axis, by linear interpolation; beyond the end, the last value."""
    for before, after in zip(points, points[1:]):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before[name] + share * (after[name] - before[name])
    return points[-1][name]


def spread(values, digits=2):
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def load():
    """Finished runs: method -> list of runs, each a list of points."""
    runs = {}
    for point in read_lines(POINTS):
        method_runs = runs.setdefault(point["method"], {})
        method_runs.setdefault(point["seed"], []).append(point)
    return {method: list(runs[method].values()) for method in METHODS if method in runs}


def print_methods(methods):
    """Print results at equal completions, at equal time, and at the end."""
    runs = [run for runs in methods.values() for run in runs]
    budget = statistics.median(run[-1]["completions"] for run in runs)
    seconds = statistics.median(run[-1]["seconds"] for run in runs)
    num_seeds = max(map(len, methods.values()))
    print_header(
        [
            f"{num_seeds} seeds, {budget:,.0f} completions",
            "gold",
            f"after {seconds:.0f} s",
            "at the end, greedy",
            "seconds",
            "KL, nats",
            "tokens trained on, thousand",
        ]
    )
    start = [run[0] for run in next(iter(methods.values()))]
    before = [spread([point[name] for point in start]) for name in ("gold", "gold_greedy")]
    print_row(["before", before[0], "", before[1], "", "", ""])
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


COLORS = dict(zip(METHODS, ("#222222", "C0", "C2", "C6", "C1", "C3", "C4", "C5", "C9")))
DASHED = ("REINFORCE, no baseline", "PPO, learned reward", "DPO", "rejection sampling")


def mean_of(runs, axis):
    """Mean over seeds of an axis and of gold, for each evaluation."""
    points = list(zip(*runs))
    x = [statistics.mean(point[axis] for point in seeds) for seeds in points]
    return x, [statistics.mean(point["gold"] for point in seeds) for seeds in points]


def draw_methods(path, methods):
    """A panel per method: its seeds and their mean, with the other means in gray."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey=True)
    for panel, (method, runs) in zip(axes.flat, methods.items()):
        for other in methods.values():
            panel.plot(*mean_of(other, "completions"), color="0.85", lw=1)
        for run in runs:
            gold = [point["gold"] for point in run]
            panel.plot([point["completions"] for point in run], gold, color="C0", lw=0.8, alpha=0.5)
        panel.plot(*mean_of(runs, "completions"), color="C0", lw=2)
        seconds = statistics.mean(run[-1]["seconds"] for run in runs)
        panel.set_title(f"{method}: {seconds:.0f} s", loc="left", fontsize=10)
        panel.set(xlim=(0, None), ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(lambda x, position: f"{x / 1000:.0f}k")
    figure.supylabel("share of held-out prompts solved", fontsize=10)
    figure.supxlabel("completions sampled from the policy (DPO: answers in its pairs)", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_frontier(path, methods):
    """Mean of gold over the mean KL, with the end of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, runs in methods.items():
        style = dict(color=COLORS[method], ls="--" if method in DASHED else "-")
        axes.plot(*mean_of(runs, "kl"), label=method, marker="o", ms=2.5, lw=1.4, **style)
        ends = [(run[-1]["kl"], run[-1]["gold"]) for run in runs]
        axes.plot(*zip(*ends), ".", ms=4, alpha=0.5, color=COLORS[method])
    axes.set(xlabel="KL from the SFT model, nats per completion", xlim=(0, None))
    axes.set_ylabel("share of held-out prompts solved")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/curves", help="folder of runs")
    parser.add_argument("--draw", action="store_true", help="only draw finished runs")
    args = parser.parse_args()
    known = {(method, run[0]["seed"]) for method, runs in load().items() for run in runs}
    for seed in args.seeds if not args.draw else ():
        folder = args.runs.resolve() / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for method in args.methods:
            if (method, seed) not in known:
                write_lines(POINTS, run(method, seed, folder), mode="a")
    methods = load()
    print_methods(methods)
    draw_methods(HERE / "curves.png", methods)
    draw_frontier(HERE / "frontier.png", methods)


if __name__ == "__main__":
    main()
