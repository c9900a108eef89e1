"""KL from each script's policy to the closed form of its objective, step by step.

    python benchmarks/closed_form.py --seeds 1 2 3    six minutes per seed on one core
    python benchmarks/closed_form.py --seeds          table and figure of finished runs
    python benchmarks/closed_form.py --study frontier --seeds 1 2 3    eight minutes per seed
    python benchmarks/closed_form.py --study frontier --seeds          finished runs

Long versions of the runs in tests/theorems.py, on the language that tests/language.py enumerates.
Writes closed_form.jsonl and closed_form.png in benchmarks/.

The study "frontier" runs short versions of the methods at five strengths each. It compares their
expected reward with the best one at the same KL from the reference. Finished runs are skipped.
Writes reward_kl.jsonl and reward_kl.png.

The scripts run unmodified. To measure the distance during training, functions of the script that
load the model and set the learning rate, once before each update, are wrapped."""

import bisect
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from helpers import (
    HERE,
    ROOT,
    make_parser,
    mean_and_range,
    print_header,
    print_row,
    read_lines,
    write_lines,
)

sys.path.insert(0, str(ROOT / "tests"))
from language import best_of_n_law, gibbs, kl, law  # noqa: E402
from theorems import theorem  # noqa: E402

import grpo  # noqa: E402
import rloo  # noqa: E402

POINTS = HERE / "closed_form.jsonl"
NAMES = {  # theorem -> label and limit in table and figure
    "sft": ("sft.py", "the distribution of its data"),
    "reward_model": ("reward_model.py", "the rewards behind the Bradley-Terry odds"),
    "dpo": ("dpo.py", "p_ref exp(r / beta) / Z, given letters, EOS"),
    "rejection_sampling": ("rejection_sampling.py", "the best-of-4 distribution of p_ref"),
    "ppo": ("ppo.py", "p_ref exp(r / beta) / Z"),
    "rloo": ("rloo.py", "p_ref exp(r / beta) / Z"),
    "grpo k1": ("grpo.py --kl-estimator k1", "p_ref exp(r / beta) / Z"),
    "grpo k3": ("grpo.py --kl-estimator k3", "b p_ref / (lambda - r), one token"),
}
OTHER = "kl to p_ref exp(r / beta) / Z"


def watch(proof, every):
    """Run a theorem; returns rows of step and distance, the last after the last update."""
    script = proof.script
    rows = []
    models = []
    loader = "load_scorer" if script.__name__ == "reward_model" else "load_policy"
    load = getattr(script, loader)
    scheduled_learning_rate = script.scheduled_learning_rate

    def measure(step, model):
        row = {"step": step, "kl": proof.distance(model)}
        if proof.elsewhere is not None:
            row[OTHER] = kl(proof.law(model), proof.elsewhere)
        if script.__name__ == "dpo":  # probability of completions that are in no pair
            logps = law(model, proof.world.tokenizer, proof.world.completions)[:, proof.world.ended]
            row["mass elsewhere"] = 1 - logps.exp().sum(1).mean().item()
        rows.append(row)

    def watched_load(*args, **kwargs):
        model = load(*args, **kwargs)
        if kwargs.get("trainable"):
            models.append(model)
        return model

    def before_update(step, steps, args):
        if step % every == 0:
            measure(step, models[0])
        return scheduled_learning_rate(step, steps, args)

    wrapped = {loader: watched_load, "scheduled_learning_rate": before_update}
    with patch.multiple(script, **wrapped):
        proof.run()
    folder = Path(proof.flags["output_dir"])
    measure(read_lines(folder / "metrics.jsonl")[-1]["step"], str(folder))
    return rows


def draw(rows, file):
    """Draw the runs of the lowest seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs `pip install matplotlib`")
        return

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    seed = min(row["seed"] for row in rows)
    for i, (name, (label, _)) in enumerate(NAMES.items()):
        run = [row for row in rows if row["name"] == name and row["seed"] == seed]
        steps = [row["step"] for row in run]
        axes.plot(steps, [row["kl"] for row in run], label=label, color=f"C{i}")
        if run and OTHER in run[0]:
            label = "   the same run, to p_ref exp(r / beta) / Z"
            axes.plot(steps, [row[OTHER] for row in run], "--", label=label, color=f"C{i}")
    axes.set(yscale="log", xlim=(0, None))
    axes.set(xlabel="optimizer steps", ylabel="KL to the closed form, nats")
    axes.legend(fontsize=8, loc="upper right", framealpha=0.9)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def table(rows):
    """Print distances before and after training, means and ranges over seeds."""
    print_header(["file", "must converge to", "KL before", "KL after, mean (range)", "steps"])
    for name, (label, target) in NAMES.items():
        runs = {}
        for row in rows:
            if row["name"] == name:
                runs.setdefault(row["seed"], []).append(row)
        if not runs:
            continue
        first = [run[0] for run in runs.values()]
        last = [run[-1] for run in runs.values()]
        before = sum(row["kl"] for row in first) / len(first)
        after = mean_and_range([row["kl"] for row in last], digits=4)
        steps = range_of([row["step"] for row in last], digits=0)
        print_row([f"`{label}`", target, f"{before:.2f}", after, steps])
        if OTHER in last[0]:
            distances = range_of([row[OTHER] for row in last])
            print_row(["the same runs", "to p_ref exp(r / beta) / Z", "", distances, ""])
        if name == "dpo":
            masses = [range_of([row["mass elsewhere"] for row in part]) for part in (first, last)]
            print_row(["the same runs", "mass on completions in no pair", *masses, ""])


def range_of(values, digits=2):
    """Lowest and highest value, or one value if they are equal."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


END_POINTS = HERE / "reward_kl.jsonl"
BETAS = (0.1, 0.2, 0.35, 0.7, 1.5)
STRENGTHS = {  # method -> values of beta, or of N
    "PPO": BETAS,
    "RLOO": BETAS,
    "GRPO, k1": BETAS,
    "GRPO, k3": BETAS,
    "DPO": BETAS,
    "best-of-N fine-tuning": (32, 16, 8, 4, 2),
}


def method_theorem(method, strength, folder):
    """A theorem with the flags of a method; all methods share the world of seed 1."""
    if method == "DPO":
        proof = theorem("dpo", folder)
        proof.flags["beta"] = strength
    elif method == "best-of-N fine-tuning":
        proof = theorem("rejection_sampling", folder)
        proof.flags["num_generations"] = strength
    else:
        proof = theorem("ppo", folder)
        proof.flags["kl_coef"] = strength
    if method in {"RLOO", "GRPO, k1", "GRPO, k3"}:
        proof.script = rloo if method == "RLOO" else grpo
        del proof.flags["gae_lambda"]
    if proof.script is grpo:
        proof.flags |= dict(scale_rewards="none", kl_estimator=method[-2:])
    return proof


def reward_and_kl(world, logps):
    """Expected reward and KL from the reference of a policy, means over prompts."""
    ref = law(world.ref, world.tokenizer, world.completions)
    return (logps.exp() * world.rewards).sum(1).mean().item(), kl(logps, ref)


def end_point(method, strength, seed, folder):
    """Train, then calculate expected reward and KL of the final policy."""
    proof = method_theorem(method, strength, folder)
    world = proof.world
    proof.run(seed=seed, output_dir=f"{folder}/{method} {strength} {seed}")
    logps = law(f"{folder}/{method} {strength} {seed}", world.tokenizer, world.completions)
    reward, kl_from_reference = reward_and_kl(world, logps)
    revision = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "method": method,
        "strength": strength,
        "seed": seed,
        "reward": reward,
        "kl": kl_from_reference,
        "mass elsewhere": 1 - logps[:, world.ended].exp().sum(1).mean().item(),
        "commit": subprocess.check_output(revision, cwd=ROOT, text=True).strip(),
        "command": f"python benchmarks/closed_form.py --study frontier --seeds {seed}",
    }


def exact_points(world):
    """Points of the optimal curve and of best of N, calculated without a run."""
    ref = law(world.ref, world.tokenizer, world.completions)
    betas = [10 ** (1 - i / 80) for i in range(221)]  # 10 to 0.018
    laws = [("optimum", beta, gibbs(ref, world.rewards, beta)) for beta in betas]
    laws += [("best of N", n, best_of_n_law(ref, world.rewards, n)) for n in range(1, 65)]
    rows = []
    for method, strength, logps in laws:
        reward, kl_from_reference = reward_and_kl(world, logps)
        point = {"method": method, "strength": strength}
        rows.append(point | {"reward": reward, "kl": kl_from_reference})
    return rows


def run_frontier(seeds):
    """Write end points of all methods and the exact points, unless the file has them."""
    known = {(row["method"], row["strength"], row.get("seed")) for row in read_lines(END_POINTS)}
    jobs = [(seed, method, x) for seed in seeds for method in STRENGTHS for x in STRENGTHS[method]]
    with tempfile.TemporaryDirectory() as folder:
        for seed, method, strength in jobs:
            if (method, strength, seed) not in known:
                row = end_point(method, strength, seed, folder)
                write_lines(END_POINTS, [row], mode="a")
                print(f"{method} {strength} seed {seed}: {row['reward']:.3f}", flush=True)
        if jobs and ("best of N", 1, None) not in known:
            world = method_theorem("PPO", BETAS[0], folder).world
            write_lines(END_POINTS, exact_points(world), mode="a")


def curve(rows, method):
    """KL and reward of the points of a method in order of KL, two lists."""
    points = sorted((row["kl"], row["reward"]) for row in rows if row["method"] == method)
    return [list(values) for values in zip(*points)]


def add_shares(rows):
    """Add `share` to rows: gain over the reference, relative to the best gain at the same KL."""
    kls, rewards = curve(rows, "optimum")
    reference = min(row["reward"] for row in rows if row["method"] == "best of N")  # N = 1
    for row in rows:
        if row["kl"] > kls[0]:
            i = bisect.bisect(kls, row["kl"], hi=len(kls) - 1)
            slope = (rewards[i] - rewards[i - 1]) / (kls[i] - kls[i - 1])
            best = rewards[i - 1] + slope * (row["kl"] - kls[i - 1])
            row["share"] = (row["reward"] - reference) / (best - reference)


def draw_frontier(rows, file):
    """Draw reward against KL, and the share of the best gain."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs `pip install matplotlib`")
        return

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot(*curve(rows, "optimum"), color="black", lw=1)
    axes[0].text(0.8, 4.31, "best possible", ha="right")
    axes[1].axhline(1, color="black", lw=1)
    labels = []  # height, KL, text and color
    for i, method in enumerate(["best of N", *STRENGTHS]):
        points = [row for row in rows if row["method"] == method and "share" in row]
        if not points:
            continue
        is_exact = method == "best of N"
        style = dict(color="0.5" if is_exact else f"C{i - 1}", ms=2 if is_exact else 4)
        ends = {}  # strength -> KL and share of each seed
        for row in points:
            axes[0].plot(row["kl"], row["reward"], "o", **style)
            axes[1].plot(row["kl"], row["share"], "o", **style)
            ends.setdefault(row["strength"], []).append((row["kl"], row["share"]))
        means = sorted([statistics.mean(x) for x in zip(*pairs)] for pairs in ends.values())
        axes[1].plot(*zip(*means), color=style["color"], lw=1)
        label = "best of N, exact" if is_exact else method
        labels.append((means[-1][1], means[-1][0] + 0.08, label, style["color"]))
    highest = 1.01
    for height, x, label, color in sorted(labels, reverse=True):
        highest = min(height - 0.01, highest - 0.033)  # labels do not overlap
        axes[1].text(max(x, 1.85), highest, label, color=color, fontsize=8)
    axes[0].set(ylabel="expected reward", xlim=(-0.05, 2.7))
    axes[1].set(ylabel="gain / best gain at the same KL", xlim=(0, 3))
    for panel in axes:
        panel.set_xlabel("KL from the reference, nats")
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def frontier_table(rows):
    """Print the share of the best gain, mean ± standard deviation over seeds."""
    names = [f"beta {x} (N = {n})" for x, n in zip(BETAS, STRENGTHS["best-of-N fine-tuning"])]
    print_header(["share of the best gain", *names])
    for method, strengths in STRENGTHS.items():
        cells = [method]
        for strength in strengths:
            key = (method, strength)
            shares = [row["share"] for row in rows if (row["method"], row["strength"]) == key]
            spread = f" ± {statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.2f}{spread}" if shares else "")
        print_row(cells)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--study", choices=("distance", "frontier"), default="distance")
    args = parser.parse_args()
    torch.set_num_threads(1)  # these models are too small for more
    if args.study == "frontier":
        run_frontier(args.seeds)
        rows = read_lines(END_POINTS)
        add_shares(rows)
        draw_frontier(rows, HERE / "reward_kl.png")
        frontier_table(rows)
        return
    rows = read_lines(POINTS)
    for seed in args.seeds:
        for name in args.only:
            start_time = time.time()
            with tempfile.TemporaryDirectory() as folder:
                proof = theorem(name, folder, seed, short=False)
                points = [{"name": name, "seed": seed} | row for row in watch(proof, every=5)]
            rows = [row for row in rows if (row["name"], row["seed"]) != (name, seed)] + points
            write_lines(POINTS, rows)
            seconds = time.time() - start_time
            print(f"{name} seed {seed}: {points[-1]['kl']:.4f} nats in {seconds:.0f} s", flush=True)
    draw(rows, HERE / "closed_form.png")
    table(rows)


if __name__ == "__main__":
    main()
