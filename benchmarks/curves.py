"""All methods from one start, at as many sampled completions each, over seeds: what they reach, in
what time, how far from where they began.

    python benchmarks/curves.py --seeds 1 2 3          the built-in task, about 12 minutes a seed
    python benchmarks/curves.py --study proxy          PPO against a learned reward, about 9
    python benchmarks/curves.py --draw                 tables and figures of what is there

Times are of two CPU cores. Each evaluation of a run is a line of benchmarks/curves.jsonl, written
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
PROXY = "--steps 160 --eval-every 20"  # 81,920 completions
DR_GRPO = "--scale-rewards none --loss-aggregation constant --kl-coef 0"
DAPO = (
    "--loss-aggregation token --epsilon-high 0.28 --kl-coef 0 --dynamic-sampling "
    "--num-generations 8"
)
STUDIES = {  # study -> method -> script, flags
    "sort": {
        "PPO, learned reward": ("ppo", "--eval-every 10"),
        "PPO": (
            "ppo",
            f"{EXACT} --kl-coef 0.02 --value-model runs/sft --missing-eos-penalty 0 "
            "--eval-every 10",
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
    },
    "proxy": {
        "PPO, KL coefficient 0": ("ppo", f"{PROXY} --kl-coef 0"),
        "PPO, KL coefficient 0.03": ("ppo", f"{PROXY} --kl-coef 0.03"),
        "PPO, KL coefficient 0.3": ("ppo", f"{PROXY} --kl-coef 0.3"),
        "best of N": (
            "rejection_sampling",
            "--temperature 1 --prompts-per-iteration 500 --num-generations 128 --steps 1 "
            "--iterations 1",
        ),
    },
}
STAGES = ["sft", "reward_model"]  # before, once a seed


def process(script, flags, seed, folder, out):
    """One script as a user would run it, in a folder of the study and seed."""
    flags = [*flags.split(), "--seed", str(seed), "--output-dir", str(out), "--overwrite"]
    print(f"\n$ python {script}.py {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True)


def run(study, method, seed, folder):
    """One run -> its points, a dict for each evaluation."""
    for stage in STAGES:
        if not (folder / "runs" / stage / "config.json").exists():
            process(stage, "", seed, folder, Path("runs", stage))
    script, flags = STUDIES[study][method]
    out = folder / "runs/method"
    process(script, flags, seed, folder, out)
    args = json.loads((out / "args.json").read_text())
    rows = read_lines(out / "metrics.jsonl")
    name = dict(study=study, method=method, seed=seed)
    if method == "best of N":
        points = best_of_n(rows)
    else:
        points = evaluations(rows, script, args)
    if study == "proxy":
        first = [row for row in read_lines(out / "samples.jsonl") if row["step"] == 0]
        name["score_deviation"] = statistics.stdev(row["score"] for row in first)
    return [name | point for point in points]


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


def best_of_n(rows):
    """For each N what the best of N samples scores, and how often it is right."""
    points = []
    for name, gold in [item for row in rows for item in row.items()]:
        if name.startswith("best_of_") and name.endswith("/gold"):
            best = name.removesuffix("/gold")
            row = next(row for row in rows if name in row)
            points.append(
                dict(
                    N=int(best.removeprefix("best_of_")),
                    kl=row[f"{best}/kl_bound"],
                    score=row[f"{best}/score"],
                    gold=gold,
                )
            )
    return points


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
    """study -> method -> a list of runs, each a list of points."""
    lines = POINTS.read_text().splitlines() if POINTS.exists() else []
    runs = {}
    for point in map(json.loads, lines):
        of_method = runs.setdefault(point["study"], {}).setdefault(point["method"], {})
        of_method.setdefault(point["seed"], []).append(point)
    return {
        study: {
            method: list(methods[method].values()) for method in STUDIES[study] if method in methods
        }
        for study, methods in runs.items()
    }


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def print_tables(studies):
    if "sort" in studies:
        print_methods(studies["sort"])
    if "proxy" in studies:
        print_proxy(studies["proxy"])


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


def proxy(point, run):
    """A score, in standard deviations of the SFT model's above their mean."""
    return (point["score"] - run[0]["score"]) / run[0]["score_deviation"]


def print_proxy(methods):
    """The learned reward and the truth at the end."""
    print()
    print_row(
        [
            "proxy and truth",
            "completions or N",
            "KL, nats",
            "proxy, deviations",
            "gold",
            "largest gold",
        ]
    )
    print("|" + "---|" * 6)
    for method, runs in methods.items():
        completions = [run[-1].get("completions", run[-1].get("N")) for run in runs]
        print_row(
            [
                method,
                f"{statistics.mean(completions):,.0f}",
                spread([run[-1]["kl"] for run in runs], digits=2),
                spread([proxy(run[-1], run) for run in runs], digits=2),
                spread([run[-1]["gold"] for run in runs]),
                spread([max(point["gold"] for point in run) for run in runs]),
            ]
        )


COLOURS = dict(zip(STUDIES["sort"], ("#222222", "C0", "C2", "C6", "C1", "C3", "C4", "C5", "C9")))
DASHED = ("REINFORCE, no baseline", "PPO, learned reward", "DPO", "rejection sampling")
AXES = {
    "completions": "completions the policy sampled (DPO: answers in its pairs)",
    "seconds": "seconds of training on two CPU cores",
    "kl": "KL from the SFT model, nats per completion",
}


def draw_mean(axes, runs, axis, value, method, **style):
    """Mean over seeds, and the range from the lowest to the highest."""
    import numpy as np

    n = min(map(len, runs))
    x = np.array([[point[axis] for point in run[:n]] for run in runs])
    y = np.array([[point[value] for point in run[:n]] for run in runs])
    style = dict(color=COLOURS.get(method), ls="--" if method in DASHED else "-") | style
    axes.plot(x.mean(0), y.mean(0), label=method, marker="o", ms=2.5, lw=1.4, **style)
    if axis != "kl":
        axes.fill_between(x.mean(0), y.min(0), y.max(0), alpha=0.12, lw=0, color=style["color"])
    else:
        axes.plot(x[:, -1], y[:, -1], ".", ms=4, alpha=0.5, color=style["color"])


def draw(studies):
    """PNG files on white, which light and dark pages show alike."""
    if "sort" in studies:
        draw_methods("curves", studies["sort"], ["completions", "seconds"])
        draw_methods("frontier", studies["sort"], ["kl"])
    if "proxy" in studies:
        draw_proxy(studies["proxy"])


def draw_methods(name, methods, panels):
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
            draw_mean(panel, runs, axis, "gold", method)
        panel.set(xlabel=AXES[axis], xlim=(0, None))
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out prompts answered right")
    axes[0][0].set_title("Sorting letters, from one half-trained model", loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(HERE / f"{name}.png", dpi=130)


def draw_proxy(methods):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, (method, runs) in enumerate(methods.items()):
        runs = [[point | {"proxy": proxy(point, run)} for point in run] for run in runs]
        style = dict(color=f"C{i}", ls="-")
        if method == "best of N":
            style = dict(color="k", ls=":")
        for panel, value in zip(axes, ("proxy", "gold")):
            for run in runs:
                panel.plot(
                    [point["kl"] for point in run],
                    [point[value] for point in run],
                    lw=0.6,
                    alpha=0.45,
                    **style,
                )
            draw_mean(panel, runs, "kl", value, method, **style)
    axes[0].set_ylabel("reward model's score, deviations above SFT")
    axes[1].set_ylabel("held-out prompts answered right")
    for panel in axes:
        panel.set(xlabel=f"{AXES['kl']} (best of N: upper bound)", xlim=(0, None))
        panel.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(HERE / "proxy.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--study", choices=list(STUDIES), default="sort")
    parser.add_argument(
        "--methods", nargs="+", help="as they are named in the tables; without it all"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/curves", help="folder of the runs"
    )
    parser.add_argument("--draw", action="store_true", help="only draw and print what is there")
    args = parser.parse_args()
    known = {
        (s, m, r[0]["seed"])
        for s, methods in load().items()
        for m, runs in methods.items()
        for r in runs
    }
    for seed in args.seeds if not args.draw else ():
        for method in args.methods or STUDIES[args.study]:
            if (args.study, method, seed) in known:
                continue
            folder = args.runs.resolve() / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            points = run(args.study, method, seed, folder)
            with open(POINTS, "a") as file:
                file.write("".join(json.dumps(point) + "\n" for point in points))
    studies = load()
    print_tables(studies)
    draw(studies)


if __name__ == "__main__":
    main()
