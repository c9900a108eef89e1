"""All methods from one start, at as many sampled completions each, over seeds: what they reach, in
what time, how far from where they began.

    python benchmarks/curves.py --seeds 1 2 3          the built-in task, about 12 minutes a seed
    python benchmarks/curves.py --study proxy          PPO against a learned reward, about 9
    python benchmarks/curves.py --study stories        real text with the mood checker, about 10
    python benchmarks/curves.py --draw                 tables and figures of what is there

Times are of two CPU cores. Each evaluation of a run is a line of benchmarks/curves.jsonl, written
when the run ends; runs that are there are not run again, so that a benchmark that was killed goes
on when it is started again. Figures need matplotlib; the stories need ../shared (see
stories.sh)."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
POINTS = HERE / "curves.jsonl"

# 40,960 completions each: rejection sampling trains on right ones only, DPO sees 20,480 pairs; DAPO
# throws two thirds away and so samples as many in 13 steps, of four updates each, since with one
# nothing is clipped
EXACT = "--reward sort --learning-rate 3e-4"
GROUPS = f"{EXACT} --num-generations 8 --prompts-per-step 32 --steps 160 --eval-every 20"
PROXY = "--steps 160 --eval-every 20"  # 81,920 completions
# 1,920 completions each; DPO sees 960 pairs
STORIES = "--dataset {data}/stories_sft_train.jsonl --eval-dataset {data}/stories_sft_test.jsonl"
STORY = f"--model {{runs}}/sft {STORIES}"
MOOD = f"{STORY} --reward {HERE}/mood.py:mood --max-completion-length 160 --learning-rate 2e-4"
MOODS = f"{MOOD} --num-generations 8 --prompts-per-step 8 --steps 30 --eval-every 10"
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
    "stories": {
        "PPO": (
            "ppo",
            f"{MOOD} --kl-coef 0.2 --prompts-per-step 64 --update-epochs 2 --num-minibatches 2 "
            "--value-clip 2 --steps 30 --eval-every 10",
        ),
        "RLOO": ("rloo", f"{MOODS} --kl-coef 0.2"),
        "REINFORCE, no baseline": ("rloo", f"{MOODS} --kl-coef 0.2 --baseline none"),
        "GRPO": ("grpo", f"{MOODS} --kl-coef 0.2"),
        "Dr. GRPO": ("grpo", f"{MOODS} {DR_GRPO}"),
        "DAPO": (
            "grpo",
            f"{MOOD} {DAPO} --prompts-per-step 24 --num-minibatches 3 --steps 10 "
            "--warmup-steps 3 --eval-every 2",
        ),
        "rejection sampling": (
            "rejection_sampling",
            f"{MOOD} --temperature 1 --num-generations 8 --prompts-per-iteration 60 "
            "--iterations 4 --epochs 3 --batch-size 15",
        ),
        "DPO": (
            "dpo",
            "--model {runs}/sft --dataset {data}/stories_mood_pairs_train.jsonl "
            "--eval-dataset {data}/stories_mood_pairs_test.jsonl --batch-size 32 "
            "--learning-rate 1e-4 --max-length 500 --steps 30 --eval-every 10",
        ),
    },
}
STARTS = {  # study -> stages before, once a seed
    "sort": [("sft", ""), ("reward_model", "")],
    "proxy": [("sft", ""), ("reward_model", "")],
    "stories": [
        (
            "sft",
            f"--model {SHARED}/models/stories260K {STORIES} --learning-rate 1e-3 --epochs 4 "
            "--batch-size 32",
        )
    ],
}


def process(script, flags, seed, folder, out):
    """One script as a user would run it, in a folder of the study and seed."""
    flags = flags.format(runs=folder / "runs", data=SHARED / "data").split()
    flags += ["--seed", str(seed), "--output-dir", str(out), "--overwrite"]
    print(f"\n$ python {script}.py {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True)


def run(study, method, seed, folder):
    """One run -> its points, a dict for each evaluation."""
    for script, flags in STARTS[study]:
        if not (folder / "runs" / script / "config.json").exists():
            process(script, flags, seed, folder, Path("runs", script))
    script, flags = STUDIES[study][method]
    out = folder / "runs/method"
    process(script, flags, seed, folder, out)
    args, points = json.loads((out / "args.json").read_text()), []
    totals = dict.fromkeys(["completions", "trained_tokens", "seconds"], 0.0)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] > 0:
            seconds = row["seconds/train"]
            if script == "dpo":
                totals["completions"] += 2 * args["batch_size"]
            elif script == "rejection_sampling":
                totals["completions"] += (
                    args["prompts_per_iteration"]
                    * args["num_generations"]
                    * ("seconds/sample" in row)
                )
                totals["seconds"] += row.get("seconds/sample", 0.0)
            else:
                groups = args["prompts_per_step"] / (1 - row.get("dropped_groups", 0.0))
                totals["completions"] += groups * args["num_generations"]
                seconds += row["seconds/sample"]
            totals["seconds"] += seconds
            totals["trained_tokens"] += (
                row["tokens_per_second"] * seconds * args.get("update_epochs", 1)
            )
        found = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        best = {name: value for name, value in row.items() if name.startswith("best_of_")}
        if found:
            points.append(
                dict(study=study, method=method, seed=seed, step=row["step"]) | totals | found
            )
        for name in best:
            if method == "best of N" and name.endswith("/gold"):
                N, gold = name.split("/")[0], best[name]
                values = dict(kl=best[f"{N}/kl_bound"], score=best[f"{N}/score"], gold=gold)
                points.append(
                    dict(study=study, method=method, seed=seed, N=int(N.split("_")[-1])) | values
                )
    if method == "best of N":
        points = [point for point in points if "N" in point]
    add_samples(points, out, study)
    return points


def add_samples(points, out, study):
    """What the samples say: the spread of scores before training, moods of stories."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for point in points:
        mine = [row for row in rows if row["step"] == point.get("step", 0)]
        if study == "proxy":
            point["score_deviation"] = statistics.stdev(
                row["score"] for row in rows if row["step"] == 0
            )
        if study == "stories":
            sys.path.insert(0, str(HERE))
            from mood import mood, words

            distinct = list({row["prompt"]: row["completion"] for row in mine}.values())
            point["mood"] = statistics.mean(mood(None, distinct, None))
            point["words"] = statistics.mean(len(words(text)) for text in distinct)


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


def tables(studies):
    """README's tables."""
    for study, value in (("sort", "gold"), ("stories", "mood")):
        if study not in studies:
            continue
        methods = studies[study]
        budget = statistics.median(r[-1]["completions"] for runs in methods.values() for r in runs)
        seconds = statistics.median(r[-1]["seconds"] for runs in methods.values() for r in runs)
        seeds = max(map(len, methods.values()))
        names = {
            "sort": [f"after {seconds:.0f} s", "at the end, greedy", "seconds"],
            "stories": ["words"],
        }[study]
        names = [value, *names, "KL, nats", "tokens trained, thousand"]
        print(f"\n| {seeds} seeds, {budget:,.0f} completions | " + " | ".join(names) + " |")
        print("|" + "---|" * (len(names) + 1))
        first = [r[0][value] for r in next(iter(methods.values()))]
        print(f"| before | {spread(first)} |" + " |" * (len(names) - 1))
        for method, runs in methods.items():
            ends = [r[-1] for r in runs]
            cells = [spread([at(r, "completions", budget, value) for r in runs])]
            if study == "sort":
                cells += [spread([at(r, "seconds", seconds, value) for r in runs])]
                cells += [spread([end["gold_greedy"] for end in ends])]
                cells += [spread([end["seconds"] for end in ends], 0)]
            else:
                cells += [spread([end["words"] for end in ends], 1)]
            cells += [spread([end["kl"] for end in ends], 2)]
            cells += [f"{statistics.mean(end['trained_tokens'] for end in ends) / 1000:.0f}"]
            print(f"| {method} | " + " | ".join(cells) + " |")
    if "proxy" in studies:
        names = ["proxy and truth", "completions or N", "KL, nats", "proxy, deviations"]
        names += ["gold", "largest gold"]
        print(f"\n| {' | '.join(names)} |\n|" + "---|" * 6)
        for method, runs in studies["proxy"].items():
            where = [r[-1].get("completions", r[-1].get("N")) for r in runs]
            proxies = [(r[-1]["score"] - r[0]["score"]) / r[0]["score_deviation"] for r in runs]
            cells = [f"{statistics.mean(where):,.0f}", spread([r[-1]["kl"] for r in runs], 2)]
            cells += [spread(proxies, 2), spread([r[-1]["gold"] for r in runs])]
            cells += [spread([max(p["gold"] for p in r) for r in runs])]
            print(f"| {method} | " + " | ".join(cells) + " |")


COLOURS = dict(zip(STUDIES["sort"], ("#222222", "C0", "C2", "C6", "C1", "C3", "C4", "C5", "C9")))
DASHED = ("REINFORCE, no baseline", "PPO, learned reward", "DPO", "rejection sampling")


def draw_mean(axes, runs, axis, value, method, **style):
    """Mean over seeds, and the range from the lowest to the highest."""
    import numpy as np

    n = min(map(len, runs))
    x, y = (np.array([[p[name] for p in r[:n]] for r in runs]) for name in (axis, value))
    style = dict(color=COLOURS.get(method), ls="--" if method in DASHED else "-") | style
    axes.plot(x.mean(0), y.mean(0), label=method, marker="o", ms=2.5, lw=1.4, **style)
    if axis != "kl":
        axes.fill_between(x.mean(0), y.min(0), y.max(0), alpha=0.12, lw=0, color=style["color"])
    else:
        axes.plot(x[:, -1], y[:, -1], ".", ms=4, alpha=0.5, color=style["color"])


def figures(studies):
    """PNG files on white, which light and dark pages show alike."""
    import matplotlib.pyplot as plt

    words = dict(
        completions="completions sampled (DPO: in its pairs)",
        seconds="seconds, evaluations left out",
    )
    words["kl"] = "KL from the SFT model, nats per completion"
    reached = dict(gold="held-out prompts solved, sampled", mood="mood of held-out stories (words)")
    plots = [
        ("curves", "sort", ("completions", "seconds"), "gold"),
        ("frontier", "sort", ("kl",), "gold"),
    ]
    plots += [("stories", "stories", ("completions", "kl"), "mood")]
    for name, study, panels, value in plots:
        if study not in studies:
            continue
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(5 * len(panels) + 2, 4.2),
            layout="constrained",
            squeeze=False,
            sharey=True,
        )
        for panel, axis in zip(axes[0], panels):
            for method, runs in studies[study].items():
                draw_mean(panel, runs, axis, value, method)
            panel.set(xlabel=words[axis], xlim=(0, None))
            panel.grid(alpha=0.3)
        axes[0][0].set_ylabel(reached[value])
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
        figure.savefig(HERE / f"{name}.png", dpi=130)
    if "proxy" in studies:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for i, (method, runs) in enumerate(studies["proxy"].items()):
            for r in runs:
                for p in r:
                    p["proxy"] = (p["score"] - r[0]["score"]) / r[0]["score_deviation"]
            for panel, value in zip(axes, ("proxy", "gold")):
                style = (
                    dict(color="k", ls=":")
                    if method == "best of N"
                    else dict(color=f"C{i}", ls="-")
                )
                for r in runs:
                    panel.plot(
                        [p["kl"] for p in r], [p[value] for p in r], lw=0.6, alpha=0.45, **style
                    )
                draw_mean(panel, runs, "kl", value, method, **style)
        axes[0].set_ylabel("proxy: reward model's score, deviations above SFT")
        axes[1].set_ylabel("truth: held-out prompts solved, sampled")
        for panel in axes:
            panel.set(xlabel="KL from the SFT model, nats (best of N: upper bound)", xlim=(0, None))
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
            name = "stories" if args.study == "stories" else "sort"
            folder = args.runs.resolve() / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            points = run(args.study, method, seed, folder)
            with open(POINTS, "a") as file:
                file.write("".join(json.dumps(point) + "\n" for point in points))
    studies = load()
    tables(studies)
    figures(studies)


if __name__ == "__main__":
    main()
