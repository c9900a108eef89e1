"""How near each script comes to the closed form of its own objective, step by step, on the language
that tests/language.py lists: the runs of tests/theorems.py, in their long form.

    python benchmarks/closed_form.py --seeds 1 2 3    about six minutes a seed and core
    python benchmarks/closed_form.py --seeds          draws and prints what is there

It writes benchmarks/closed_form.jsonl and draws closed_form.png.

The scripts run as they are. To see the distance at a step, and not at the end only, the loading of
the model that is trained and the setting of the learning rate, once before each update, are
watched."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
from language import kl, law  # noqa: E402
from theorems import theorem  # noqa: E402

NAMES = {  # theorem -> what table and figure call it, and where it must end
    "sft": ("sft.py", "the law of its data"),
    "reward_model": ("reward_model.py", "the rewards behind the Bradley-Terry odds"),
    "dpo": ("dpo.py", "p_ref exp(r / beta) / Z, given letters, EOS"),
    "rejection_sampling": ("rejection_sampling.py", "the best-of-4 law of p_ref"),
    "ppo": ("ppo.py", "p_ref exp(r / beta) / Z"),
    "rloo": ("rloo.py", "p_ref exp(r / beta) / Z"),
    "grpo k1": ("grpo.py --kl-estimator k1 --kl-in reward", "p_ref exp(r / beta) / Z"),
    "grpo k3": ("grpo.py --kl-estimator k3 --kl-in loss", "b p_ref / (lambda - r), one token"),
}
OTHER = "kl to p_ref exp(r / beta) / Z"


def watch(proof, every):
    """Run it -> rows of step and distance, the last after the last update."""
    script, models, rows = proof.script, [], []
    loader = "load_scorer" if hasattr(script, "sequence_scores") else "load_policy"
    load, scheduled_learning_rate = getattr(script, loader), script.scheduled_learning_rate

    def measure(step, model):
        row = {"step": step, "kl": proof.distance(model)}
        if proof.elsewhere is not None:
            row[OTHER] = kl(proof.law(model), proof.elsewhere)
        if (
            script.__name__ == "dpo"
        ):  # what preferences between completions that EOS ended do not speak of
            logps = law(model, proof.world.tokenizer, proof.world.completions)[:, proof.world.ended]
            row["mass elsewhere"] = 1 - logps.exp().sum(1).mean().item()
        rows.append(row)

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        if kwargs.get("trainable"):
            models.append(model)
        return model

    def before_update(step, steps, args):
        if step % every == 0:
            measure(step, models[0])
        return scheduled_learning_rate(step, steps, args)

    setattr(script, loader, loaded)
    script.scheduled_learning_rate = before_update
    try:
        proof.run()
    finally:
        setattr(script, loader, load)
        script.scheduled_learning_rate = scheduled_learning_rate
    lines = (Path(proof.flags["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    measure(json.loads(lines[-1])["step"], proof.flags["output_dir"])
    return rows


def draw(rows, file):
    try:
        import matplotlib
    except ImportError:
        print("no figure: `pip install matplotlib` draws it")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    seed = min(row["seed"] for row in rows)
    for i, (name, (label, _)) in enumerate(NAMES.items()):
        mine = [row for row in rows if row["name"] == name and row["seed"] == seed]
        axes.plot([r["step"] for r in mine], [r["kl"] for r in mine], label=label, color=f"C{i}")
        other = [row[OTHER] for row in mine if OTHER in row]
        if other:
            label = "   the same run, to p_ref exp(r / beta) / Z"
            axes.plot([r["step"] for r in mine], other, "--", label=label, color=f"C{i}")
    axes.set(
        yscale="log", xlabel="optimiser steps", ylabel="KL to the closed form, nats", xlim=(0, None)
    )
    axes.legend(fontsize=8, loc="upper right", framealpha=0.9)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def table(rows):
    """Table: distances at the start and at the end, mean over seeds and range."""
    print("| file | must converge to | KL before | KL after, mean (range) | steps |")
    print("|---|---|---|---|---|")
    for name, (label, target) in NAMES.items():
        runs = {}
        for row in rows:
            if row["name"] == name:
                runs.setdefault(row["seed"], []).append(row)
        if not runs:
            continue
        first, last = ([run[i]["kl"] for run in runs.values()] for i in (0, -1))
        spread = f"{statistics.mean(last):.4f} ({min(last):.4f} to {max(last):.4f})"
        steps = sorted({run[-1]["step"] for run in runs.values()})
        steps = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        print(f"| `{label}` | {target} | {statistics.mean(first):.2f} | {spread} | {steps} |")
        if away := [run[-1][OTHER] for run in runs.values() if OTHER in run[-1]]:
            spread = f"{min(away):.2f} to {max(away):.2f}"
            print(f"| the same runs | to p_ref exp(r / beta) / Z | | {spread} | |")
        if mass := [
            [run[i]["mass elsewhere"] for run in runs.values()] for i in (0, -1) if name == "dpo"
        ]:
            before, after = (f"{min(x):.2f} to {max(x):.2f}" for x in mass)
            print(f"| the same runs | mass that no preference speaks of | {before} | {after} | |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(NAMES))
    args = parser.parse_args()
    file = HERE / "closed_form.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    torch.set_num_threads(1)  # these models are too small to share
    for seed in args.seeds:
        for name in args.only:
            began = time.time()
            with tempfile.TemporaryDirectory() as folder:
                proof = theorem(name, folder, seed, short=False)
                found = [dict(name=name, seed=seed) | row for row in watch(proof, every=5)]
            rows = [row for row in rows if (row["name"], row["seed"]) != (name, seed)] + found
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(
                f"{name} seed {seed}: {found[-1]['kl']:.4f} nats in {time.time() - began:.0f} s",
                flush=True,
            )
    draw(rows, HERE / "closed_form.png")
    table(rows)


if __name__ == "__main__":
    main()
