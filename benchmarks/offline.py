"""DPO and rejection sampling in the laptop run, with the matched random control, for several seeds:
seconds (whole processes) and held-out results.

    python benchmarks/offline.py --seeds 1 2 3     about four minutes a seed on two cores; writes
    benchmarks/offline.jsonl"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {  # name -> script, flags
    "sft": ("sft", []),
    "reward_model": ("reward_model", []),
    "dpo": ("dpo", []),
    "rejection sampling": ("rejection_sampling", []),
    "random control": ("rejection_sampling", ["--select", "random-per-prompt"]),
}


def run(seed, folder):
    row = {"seed": seed}
    for name, (script, flags) in RUNS.items():
        began = time.time()
        command = [sys.executable, HERE.parent / f"{script}.py", "--seed", str(seed), *flags]
        subprocess.run(command, cwd=folder, check=True)
        lines = [
            json.loads(line)
            for line in (folder / "runs" / script / "metrics.jsonl").read_text().splitlines()
        ]
        row[f"{name} seconds"] = time.time() - began
        row |= {
            f"{name} {k}": lines[-1][f"eval/{k}"]
            for k in ("gold", "gold_greedy", "kl")
            if f"eval/{k}" in lines[-1]
        }
        row |= {
            f"{name} {k} at first": lines[0][f"eval/{k}"]
            for k in ("gold",)
            if f"eval/{k}" in lines[0]
        }
        best = next((line for line in lines if "best_of_1/gold" in line), {})
        row |= {f"{name} {k}": v for k, v in best.items() if k.startswith("best_of")}
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    rows = []
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(seed, Path(folder)))
        (HERE / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(rows)


def report(rows):
    print(
        "\n| | "
        + " | ".join(f"seed {row['seed']}" for row in rows)
        + " |\n|"
        + "---|" * (len(rows) + 1)
    )
    for name in ("dpo", "rejection sampling", "random control"):
        for what in ("seconds", "gold at first", "gold", "gold_greedy"):
            cells = [f"{row[f'{name} {what}']:.{0 if what == 'seconds' else 3}f}" for row in rows]
            print(f"| {name} {what.replace('_', ' ')} | " + " | ".join(cells) + " |")
    gains = [row["rejection sampling gold"] - row["random control gold"] for row in rows]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    gain = statistics.mean(gains)
    print(f"\nselection less its control: {gain:.3f}, standard error over seeds {error:.3f}\n")
    print("| best of N, no training | N = 1 | 2 | 4 | 8 | 16 |\n|" + "---|" * 6)
    for what in ("score", "gold", "kl_bound"):
        cells = [
            statistics.mean(row[f"rejection sampling best_of_{n}/{what}"] for row in rows)
            for n in (1, 2, 4, 8, 16)
        ]
        print(f"| {what.replace('_', ' ')} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
