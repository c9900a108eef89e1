"""KL from each script's policy to the closed form of its objective, step by step.

    python benchmarks/closed_form.py --seeds 1 2 3    six minutes per seed on one core
    python benchmarks/closed_form.py --seeds          table and figure of finished runs

Long versions of the runs in tests/theorems.py, on the language that tests/language.py enumerates.
Writes closed_form.jsonl and closed_form.png in benchmarks/.

The scripts run unmodified. To measure the distance during training, functions of the script that
load the model and set the learning rate, once before each update, are wrapped."""

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
from language import kl, law  # noqa: E402
from theorems import theorem  # noqa: E402

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


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(NAMES))
    args = parser.parse_args()
    rows = read_lines(POINTS)
    torch.set_num_threads(1)  # these models are too small for more
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
