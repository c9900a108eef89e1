"""Methods side by side on the built-in task, each from the same sft.py start: held-out exact match against
completions sampled and against seconds of training (evaluations left out), two CPU cores.

    python benchmarks/curves.py --seeds 1 2 3 --methods ppo rloo grpo

takes one to two minutes a run, adds to benchmarks/curves.jsonl and prints a table. Runs that are in that file
are not run again."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
POINTS = HERE / "curves.jsonl"
CHECKER = "--reward sort --kl-coef 0.02 --learning-rate 3e-4".split()
GROUP = "--eval-every 20 --num-generations 8 --prompts-per-step 32 --steps 160".split()
METHODS = {  # 40,960 completions each: name -> script, flags
    "ppo": ("ppo", [*CHECKER, *"--value-model runs/sft --missing-eos-penalty 0 --eval-every 10".split()]),
    "rloo": ("rloo", [*CHECKER, *GROUP]),
    "grpo": ("grpo", [*CHECKER, *GROUP]),
    "dr-grpo": ("grpo", [*CHECKER, *GROUP, *"--scale-rewards none --loss-aggregation constant".split()]),
    "dapo": (
        "grpo",
        [
            *CHECKER,
            *GROUP,
            *"--loss-aggregation token --epsilon-high 0.28 --kl-coef 0 --dynamic-sampling".split(),
        ],
    ),
    "reinforce": ("rloo", [*CHECKER, *GROUP, "--baseline", "none"]),
    "rloo, learned reward": ("rloo", "--reward runs/reward_model --missing-eos-penalty 5".split() + GROUP),
    "grpo, learned reward": ("grpo", "--reward runs/reward_model --missing-eos-penalty 5".split() + GROUP),
    "ppo, learned reward": ("ppo", ["--eval-every", "10"]),
}


def stage(folder, script, *flags):
    if not (folder / "runs" / script / "config.json").exists():
        print(f"$ python {script}.py {' '.join(flags)}", flush=True)
        subprocess.run([sys.executable, HERE.parent / f"{script}.py", *flags], cwd=folder, check=True)


def run(method, seed, folder):
    """One run -> its points, a dict an evaluation."""
    script, flags = METHODS[method]
    stage(folder, "sft", "--seed", str(seed))
    if "learned" in method:
        stage(folder, "reward_model", "--seed", str(seed))
    out = folder / "runs" / script
    command = [*flags, "--seed", str(seed), "--overwrite", "--save-every", "0"]
    print(f"$ python {script}.py {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, HERE.parent / f"{script}.py", *command], cwd=folder, check=True)
    args = json.loads((out / "args.json").read_text())
    points, completions, seconds = [], 0.0, 0.0
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] > 0:
            groups = args["prompts_per_step"] / (1 - row.get("dropped_groups", 0.0))
            completions += groups * args["num_generations"]
            seconds += row["seconds/sample"] + row["seconds/train"]
        if "eval/gold" in row:
            point = {"method": method, "seed": seed, "completions": completions, "seconds": seconds}
            point |= {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
            points.append(point)
    return points


def at(points, axis, where):
    """Linear interpolation of gold at a place on an axis (the last value beyond its end)."""
    for before, after in zip(points, points[1:]):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return points[-1]["gold"]


def spread(values):
    return f"{statistics.mean(values):.3f} ({' '.join(f'{v:.3f}' for v in values)})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    known = [json.loads(line) for line in POINTS.read_text().splitlines()] if POINTS.exists() else []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for method in args.methods:
                if not any(p["method"] == method and p["seed"] == seed for p in known):
                    points = run(method, seed, Path(folder))
                    known += points
                    with open(POINTS, "a") as file:
                        file.write("".join(json.dumps(point) + "\n" for point in points))
    runs = {
        m: [[p for p in known if (p["method"], p["seed"]) == (m, s)] for s in args.seeds]
        for m in args.methods
    }
    seconds = min(points[-1]["seconds"] for group in runs.values() for points in group)
    completions = min(points[-1]["completions"] for group in runs.values() for points in group)
    names = ["SFT", f"{completions / 2:,.0f} completions", f"{completions:,.0f} completions"]
    names += [f"{seconds:.0f} s of training", "at the end, greedy", "KL, nats", "seconds"]
    print("\n| " + " | ".join([f"seeds {args.seeds}", *names]) + " |\n|" + "---|" * 8)
    for method, group in runs.items():
        columns = [
            [points[0]["gold"] for points in group],
            [at(points, "completions", completions / 2) for points in group],
            [at(points, "completions", completions) for points in group],
            [at(points, "seconds", seconds) for points in group],
            [points[-1]["gold_greedy"] for points in group],
        ]
        kl = " ".join(f"{points[-1]['kl']:.2f}" if "kl" in points[-1] else "-" for points in group)
        took = " ".join(f"{points[-1]['seconds']:.0f}" for points in group)
        print(f"| {method} | " + " | ".join(map(spread, columns)) + f" | {kl} | {took} |")


if __name__ == "__main__":
    main()
