"""Data, results and tables of benchmarks/smollm2.sh: all seven scripts on SmolLM2-135M-Instruct.

    python benchmarks/smollm2.py data FOLDER     write the datasets, as chat messages
    python benchmarks/smollm2.py point RUN       add a finished run to benchmarks/smollm2.jsonl
    python benchmarks/smollm2.py table           print the tables of the finished runs

The sums are generated. Preferences and instructions come from ../shared/data, which is not in this
repository."""

import json
import math
import random
import sys
from pathlib import Path

from helpers import HERE, ROOT, print_header, print_row, read_lines, write_lines

from common import gsm8k_checker

DATA = ROOT.parent / "shared" / "data"
POINTS = HERE / "smollm2.jsonl"


# ---------------------------------------------------------------- data
def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def write_data(folder):
    """Write all datasets; those from ../shared/data are empty if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    pairs = set()
    while len(pairs) < 6000:
        pairs.add((rng.randint(100, 999), rng.randint(100, 999)))
    pairs = sorted(pairs)
    rng.shuffle(pairs)
    sums = []
    for a, b in pairs:
        answer = f"{a} + {b} = {a + b}\n#### {a + b}"
        sums.append({"prompt": user(f"What is {a} plus {b}?"), "answer": answer})
    worked = [
        {"prompt": row["prompt"], "completion": assistant(row["answer"])} for row in sums[100:600]
    ]
    write_lines(folder / "sums-test.jsonl", sums[:100])
    write_lines(folder / "sums-sft.jsonl", worked)
    write_lines(folder / "sums.jsonl", sums[600:])

    for name, source in [("polite", "pref_polite_short"), ("people", "pref_pandalm_human")]:
        rows = []
        for row in read_lines(DATA / f"{source}.jsonl"):
            answers = {key: assistant(row[key]) for key in ("chosen", "rejected")}
            rows.append({"prompt": user(row["prompt"])} | answers)
        write_parts(folder, name, rows)
    rows = []
    for row in read_lines(DATA / "sft_short_instructions.jsonl"):
        request = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        rows.append({"prompt": user(request), "completion": assistant(row["output"])})
    write_parts(folder, "instructions", rows)


def write_parts(folder, name, rows):
    """Write two files; every fifth row is held out."""
    write_lines(folder / f"{name}.jsonl", [row for i, row in enumerate(rows) if i % 5 != 4])
    write_lines(folder / f"{name}-test.jsonl", rows[4::5])


# ---------------------------------------------------------------- points
def add_point(run):
    """Append the first and last evaluation of a finished run, and five of its samples each."""
    rows = read_lines(run / "metrics.jsonl")
    samples = read_lines(run / "samples.jsonl")
    args = json.loads((run / "args.json").read_text())
    held_out = read_lines(args["eval_dataset"]) if args["eval_dataset"] else []
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    point = {"run": run.name, "steps": rows[-1]["step"]}
    for when, i in [("before", 0), ("after", -1)]:
        if evaluated:
            metrics = evaluated[i].items()
            point[when] = {name[5:]: x for name, x in metrics if name.startswith("eval/")}
        if samples:
            of_step = [row for row in samples if row["step"] == samples[i]["step"]]
            point[f"samples_{when}"] = of_step[:5]
            if "answer" in held_out[0] and "gold" not in point[when]:  # a learned reward
                texts = [row["completion"] for row in of_step]
                point[when]["gold"] = sum(gsm8k_checker(None, texts, held_out)) / len(texts)
    pairs = [row for row in held_out if "chosen" in row]
    if pairs:
        point["longer_is_chosen"] = sum(map(longer, pairs)) / len(pairs)
        point["pairs"] = len(pairs)
    write_lines(POINTS, [point], mode="a")


def longer(pair):
    """1 if the chosen answer is the longer one, 0.5 for equal lengths, otherwise 0."""
    chosen = len(pair["chosen"][0]["content"])
    rejected = len(pair["rejected"][0]["content"])
    return (chosen > rejected) + 0.5 * (chosen == rejected)


# ---------------------------------------------------------------- tables
KEYS = {
    "gold": "correct, sampled",
    "gold_greedy": "correct, greedy",
    "pass@8": "pass@8",
    "score": "score",
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "kl": "KL, nats",
    "completion_length": "tokens per sample",
    "eos_rate": "EOS rate",
}


def print_table():
    """Print metrics before and after each run, and samples."""
    points = [point for point in read_lines(POINTS) if "after" in point]
    print_header(["run", "steps", *KEYS.values()])
    for point in points:
        print_row([point["run"], str(point["steps"]), *(cell(point, key) for key in KEYS)])
    print_header(["held-out pairs", "accuracy", "longer answer"])
    for point in points:
        if "longer_is_chosen" in point:
            accuracy = point["after"]["accuracy"]
            error = math.sqrt(accuracy * (1 - accuracy) / point["pairs"])
            longer_share = f"{point['longer_is_chosen']:.3f}"
            print_row([point["run"], f"{accuracy:.3f} ± {error:.3f}", longer_share])
    for point in points:
        if point["run"] in ("grpo-1", "ppo-learned", "dpo-polite") and "samples_after" in point:
            print_header([f"{point['run']}: prompt", "before", "after"])
            for before, after in zip(point["samples_before"], point["samples_after"]):
                texts = [before["prompt"], before["completion"], after["completion"]]
                if isinstance(texts[0], list):
                    texts[0] = texts[0][-1]["content"]
                print_row(map(in_one_line, texts))


def cell(point, key):
    before = point.get("before", {}).get(key)
    after = point.get("after", {}).get(key)
    if after is None:
        return ""
    return f"{after:.3f}" if before is None else f"{before:.3f} to {after:.3f}"


def in_one_line(text):
    return text.strip().replace("\n", " ⏎ ").replace("|", "\\|")


def main(command="table", folder=None):
    if command == "data":
        write_data(Path(folder))
    elif command == "point":
        add_point(Path(folder))
    elif command == "table":
        print_table()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
