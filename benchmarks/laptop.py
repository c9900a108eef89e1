"""The laptop run, sft -> reward_model -> ppo, for several seeds: seconds (whole processes) and
held-out results.

    python benchmarks/laptop.py --seeds 1 2 3     about three minutes a seed on two cores; writes
                                                  benchmarks/laptop.jsonl"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
COLUMNS = {
    "sft.py": ["eval/gold", "eval/gold_greedy"],
    "reward_model.py": ["eval/accuracy"],
    "ppo.py": ["eval/gold", "eval/gold_greedy", "eval/score", "eval/kl"],
}


def run(seed, folder):
    row = {
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    for script, names in COLUMNS.items():
        began = time.time()
        subprocess.run(
            [sys.executable, HERE.parent / script, "--seed", str(seed)], cwd=folder, check=True
        )
        stage = script.removesuffix(".py")
        last = (Path(folder) / "runs" / stage / "metrics.jsonl").read_text().splitlines()[-1]
        row[f"{stage} seconds"] = time.time() - began
        row |= {f"{stage} {name[5:]}": json.loads(last)[name] for name in names}
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    rows = []
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(seed, folder))
    (HERE / "laptop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [name for name in rows[0] if name.split()[0] in ("seed", "sft", "reward_model", "ppo")]
    print("\n| " + " | ".join(["", *(f"seed {row['seed']}" for row in rows)]) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for name in names[1:]:
        numbers = [f"{row[name]:.0f}" if "seconds" in name else f"{row[name]:.3f}" for row in rows]
        print("| " + " | ".join([name.replace("_", " "), *numbers]) + " |")


if __name__ == "__main__":
    main()
