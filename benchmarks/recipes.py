"""Measure every stage of the chains of commands in docs/recipes.md.

    python benchmarks/recipes.py --seeds 1 2 3    12 minutes per seed on one core
    python benchmarks/recipes.py --table          the table of finished stages

Commands are read from the page. Seed 1 runs them as they are there, seed n adds 10 * (n - 1) to
every --seed. Runs are in runs/recipes, results in recipes.jsonl; finished stages are skipped."""

import os
import re
import resource
import shlex
import statistics
import subprocess
import sys

from book import metrics_of, solved
from helpers import HERE, ROOT, make_parser, print_header, print_row, read_lines, write_lines

POINTS = HERE / "recipes.jsonl"
PAGE = ROOT / "docs" / "recipes.md"
CHAINS = ("Start", "InstructGPT", "Llama 2", "Tulu 3", "R1")


def section(chain):
    """Text of the page below the heading of a chain."""
    return PAGE.read_text().split(f"\n### {chain}\n")[1].split("\n##")[0]


def chain_commands(chain):
    """Commands of a chain as lists of words, without `python`."""
    block = re.search(r"```\n(.*?)```", section(chain), re.DOTALL)[1]
    return [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]


def flag(words, name, default=None):
    """Value of a flag in the words of a command."""
    return words[words.index(name) + 1] if name in words else default


def run(words, folder):
    """Run a command in a folder on one thread; returns its CPU seconds."""
    print(f"$ python {shlex.join(words)}", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = folder / words[0]
    command = [sys.executable, str(script if script.exists() else ROOT / words[0]), *words[1:]]
    with open(folder / "log", "a") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def stage(words, folder, seed):
    """Run the command of a stage, then evaluate its policy on the 500 held-out prompts."""
    out = flag(words, "--output-dir", f"runs/{words[0].removesuffix('.py')}")
    own_seed = int(flag(words, "--seed", 1)) + 10 * (seed - 1)
    seconds = run([*words, "--seed", str(own_seed), "--overwrite"], folder)
    point = {"seconds": seconds}
    if words[0] == "reward_model.py":
        point["accuracy"] = metrics_of(folder, out)[-1]["eval/accuracy"]
    elif flag(words, "--steps") != "1":  # with one step, only the rollouts or the start are used
        point |= solved(folder, out, own_seed, teacher="runs/sft")
        point["kl"] = point.pop("kl_teacher")
    return point


def run_chain(chain, seed):
    """Run the stages of a chain that are not in the results."""
    folder = ROOT / "runs" / "recipes" / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kept = re.search(r"```python\n(.*?)```", section("R1"), re.DOTALL)[1]
    (folder / "kept.py").write_text(kept)
    known = {(point["command"], point["seed"]) for point in read_lines(POINTS)}
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(revision, cwd=ROOT, text=True).strip()
    for words in chain_commands(chain):
        command = f"python {shlex.join(words)}"
        if words[0] == "kept.py":
            run(words, folder)
        elif (command, seed) not in known:
            point = {"chain": chain, "seed": seed, "commit": commit, "command": command}
            write_lines(POINTS, [point | stage(words, folder, seed)], mode="a")


def mean_and_deviation(values, digits):
    """Mean ± standard deviation, only the mean of one value, otherwise an empty string."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(points):
    """Print gold, KL and CPU seconds after each stage: mean ± standard deviation over seeds."""
    print_header(["chain", "stage", "gold", "gold, greedy", "KL, nats", "accuracy", "CPU seconds"])
    for chain in CHAINS:
        for words in chain_commands(chain):
            command = f"python {shlex.join(words)}"
            runs = [point for point in points if point["command"] == command]
            if not runs:
                continue

            def cell(name, digits, runs=runs):
                values = [point[name] for point in runs if name in point]
                return mean_and_deviation(values, digits)

            out = flag(words, "--output-dir", f"runs/{words[0].removesuffix('.py')}")
            cells = [cell("gold", 2), cell("gold_greedy", 2), cell("kl", 1), cell("accuracy", 2)]
            print_row([chain, f"`{out.removeprefix('runs/')}`", *cells, cell("seconds", 0)])
            chain = ""


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=CHAINS[1:], default=list(CHAINS[1:]))
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    for seed in args.seeds if not args.table else ():
        for chain in ["Start", *args.only]:
            run_chain(chain, seed)
    table(read_lines(POINTS))


if __name__ == "__main__":
    main()
