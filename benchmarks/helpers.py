"""Functions that several benchmarks share: command lines, JSONL files, runs of scripts, tables."""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # benchmarks import the scripts


def make_parser(docstring):
    """A parser that prints a docstring as it is."""
    return argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def read_lines(path):
    """Rows of a JSONL file, [] if it does not exist."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path, rows, mode="w"):
    """Write rows to a JSONL file, or append them with mode "a"."""
    with open(path, mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def run_script(name, flags, folder, out, seed):
    """Run a script in a folder on one thread, unless its model exists; its log is OUT.log."""
    if (folder / out / "config.json").exists():
        return
    command = [sys.executable, str(ROOT / f"{name}.py"), *shlex.split(flags)]
    command += ["--seed", str(seed), "--output-dir", out, "--overwrite"]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / f"{Path(out).name}.log", "w") as log:
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, env=env)


def print_row(cells):
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(cells):
    """The first two rows of a Markdown table."""
    print()
    print_row(cells)
    print("|" + "---|" * len(cells))


def mean_and_range(values, digits=3):
    """Mean (lowest to highest) of the values that are numbers, otherwise an empty string."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return ""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def median_and_range(values, digits=3):
    """Median (lowest to highest)."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
