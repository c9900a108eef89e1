"""Plot score, gold, KL, entropy, length and EOS rate of runs over steps or seconds.

    python benchmarks/plot.py runs/ppo runs/grpo
    python benchmarks/plot.py runs/ppo runs/ppo_2 --out curves.png --over seconds

One line per run, from its metrics.jsonl. Dots are evaluations on held-out prompts. Needs
matplotlib."""

import sys
from pathlib import Path

from helpers import make_parser, read_lines

PANELS = {
    "score": "score",
    "gold": "gold (exact checker)",
    "kl": "KL from the reference, nats per completion",
    "entropy": "entropy, nats per token",
    "completion_length": "tokens per completion",
    "eos_rate": "share of completions with EOS",
    "loss": "loss",
    "accuracy": "accuracy on pairs",
    "margin": "chosen minus rejected",
}


def read_run(folder):
    """Rows of metrics.jsonl, each with the seconds of sampling and training until then."""
    rows = read_lines(Path(folder, "metrics.jsonl"))
    if not rows:
        sys.exit(f"error: {folder} has no metrics.jsonl")
    seconds = 0.0
    for row in rows:
        seconds += row.get("seconds/sample", 0.0) + row.get("seconds/train", 0.0)
        row["seconds"] = seconds
    return rows


def points_of(rows, name, over):
    """Steps or seconds, and values of a metric, from the rows that have it."""
    found = [(row[over], row[name]) for row in rows if row.get(name) is not None]
    return list(zip(*found)) or [(), ()]


def draw(runs, over, out):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("error: plot.py needs `pip install matplotlib`")

    names = {name.removeprefix("eval/") for rows in runs.values() for row in rows for name in row}
    panels = {name: title for name, title in PANELS.items() if name in names}
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4.5 * num_columns, 3 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
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
    figure.savefig(out, dpi=110)
    print(f"{len(panels)} panels of {len(runs)} runs: {out}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--over", choices=["step", "seconds"], default="step")
    parser.add_argument("--out", default="runs.png")
    args = parser.parse_args()
    draw({folder: read_run(folder) for folder in args.runs}, args.over, args.out)


if __name__ == "__main__":
    main()
