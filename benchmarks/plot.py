"""A figure of your own runs: score, truth, KL, entropy, length and EOS rate over steps or seconds.

    python benchmarks/plot.py runs/ppo runs/grpo
    python benchmarks/plot.py runs/ppo runs/ppo_2 --out curves.png --over seconds

A line a run, from its metrics.jsonl; dots are evaluations of held-out prompts. Needs matplotlib."""

import argparse
import json
import sys
from pathlib import Path

PANELS = {
    "score": "score (what is optimised)",
    "gold": "solved (the exact checker)",
    "kl": "KL from the reference, nats",
    "entropy": "entropy, nats a token",
    "completion_length": "tokens of a completion",
    "eos_rate": "completions that end by themselves",
}
LOSSES = {"loss": "loss", "accuracy": "pairs ranked rightly", "margin": "margin of the chosen"}


def read_run(folder):
    """Rows of metrics.jsonl, each with the seconds of sampling and training so far."""
    path = Path(folder, "metrics.jsonl")
    if not path.is_file():
        sys.exit(f"error: {path} is not there: name folders of runs")
    rows = []
    seconds = 0.0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        seconds += row.get("seconds/sample", 0.0) + row.get("seconds/train", 0.0)
        rows.append(row | {"seconds": seconds})
    return rows


def points_of(rows, name, over):
    """Where a run has that metric: places, values."""
    found = [(row[over], row[name]) for row in rows if row.get(name) is not None]
    return list(zip(*found)) or [(), ()]


def draw(runs, over, out):
    try:
        import matplotlib
    except ImportError:
        sys.exit("to draw, run `pip install matplotlib`")

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        name: title
        for name, title in (PANELS | LOSSES).items()
        if any(name in row or f"eval/{name}" in row for rows in runs.values() for row in rows)
    }
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (4.5 * columns, 3 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, (name, title) in zip(axes.flat, panels.items()):
        for i, (label, rows) in enumerate(runs.items()):
            axis.plot(*points_of(rows, name, over), color=f"C{i}", alpha=0.8, label=label)
            axis.plot(*points_of(rows, f"eval/{name}", over), "o", color=f"C{i}", markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step" if over == "step" else "seconds of sampling and training")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"{len(panels)} panels of {len(runs)} runs: {out}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--over", choices=["step", "seconds"], default="step")
    parser.add_argument("--out", default="runs.png")
    args = parser.parse_args()
    draw({folder: read_run(folder) for folder in args.runs}, args.over, args.out)


if __name__ == "__main__":
    main()
