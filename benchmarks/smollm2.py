"""Data, points and tables of benchmarks/smollm2.sh: all seven scripts on SmolLM2-135M-Instruct.

    python benchmarks/smollm2.py data FOLDER     writes the data sets, as chat messages
    python benchmarks/smollm2.py point RUN       adds a finished run to benchmarks/smollm2.jsonl
    python benchmarks/smollm2.py table           prints what is there

Sums are made up here. Preferences and instructions come from ../shared/data, which is not part of
this repository."""

import json
import math
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import gsm8k_checker  # noqa: E402

DATA = HERE.parents[1] / "shared" / "data"
POINTS = HERE / "smollm2.jsonl"


# ---------------------------------------------------------------- data
def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def write(folder, name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


def write_data(folder):
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
    write(folder, "sums-test", sums[:100])
    write(folder, "sums", sums[600:])
    worked = [
        {"prompt": row["prompt"], "completion": assistant(row["answer"])} for row in sums[100:600]
    ]
    write(folder, "sums-sft", worked)

    for name, source in (("polite", "pref_polite_short"), ("people", "pref_pandalm_human")):
        rows = []
        for row in read(DATA / f"{source}.jsonl"):
            compared = {key: assistant(row[key]) for key in ("chosen", "rejected")}
            rows.append({"prompt": user(row["prompt"])} | compared)
        write_parts(folder, name, rows)
    rows = []
    for row in read(DATA / "sft_short_instructions.jsonl"):
        asked = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        rows.append({"prompt": user(asked), "completion": assistant(row["output"])})
    write_parts(folder, "instructions", rows)


def read(path):
    if not path.exists():
        print(f"no {path} here: its data sets stay empty")
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_parts(folder, name, rows):
    """Every fifth row is held out."""
    write(folder, name, [row for i, row in enumerate(rows) if i % 5 != 4])
    write(folder, f"{name}-test", rows[4::5])


# ---------------------------------------------------------------- points
def add_point(run):
    """What a finished run said of its held-out data before and after, and five of its samples."""
    rows = read(run / "metrics.jsonl")
    evaluated = [row for row in rows if any("eval/" in name for name in row)]
    point = {"run": run.name, "steps": rows[-1]["step"]}
    if evaluated:
        for when, row in (("before", evaluated[0]), ("after", evaluated[-1])):
            point[when] = {name[5:]: v for name, v in row.items() if name.startswith("eval/")}
    if (run / "samples.jsonl").exists():
        samples = read(run / "samples.jsonl")
        for when, step in (("before", samples[0]["step"]), ("after", samples[-1]["step"])):
            point[f"samples_{when}"] = [row for row in samples if row["step"] == step][:5]
    args = json.loads((run / "args.json").read_text())
    held_out = read(Path(args["eval_dataset"])) if args["eval_dataset"] else []
    if evaluated and "answer" in held_out[0] and "gold" not in point["after"]:  # a learned reward
        for when, step in (("before", 0), ("after", point["steps"])):
            texts = [row["completion"] for row in samples if row["step"] == step]
            point[when]["gold"] = sum(gsm8k_checker(None, texts, held_out)) / len(texts)
    pairs = [row for row in held_out if "chosen" in row]
    if pairs:
        point["longer_is_chosen"] = sum(map(longer, pairs)) / len(pairs)
        point["pairs"] = len(pairs)
    with open(POINTS, "a") as file:
        file.write(json.dumps(point) + "\n")


def longer(pair):
    """1 where the longer answer is the chosen one, one half where both are as long."""
    chosen, rejected = (len(pair[key][0]["content"]) for key in ("chosen", "rejected"))
    return (chosen > rejected) + 0.5 * (chosen == rejected)


# ---------------------------------------------------------------- tables
KEYS = {
    "gold": "right",
    "gold_greedy": "greedy",
    "pass@8": "pass@8",
    "score": "score",
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "kl": "KL, nats",
    "completion_length": "tokens",
    "eos_rate": "ended",
}


def print_table():
    """Markdown: before and after of each number, and samples as they are."""
    points = [point for point in read(POINTS) if "after" in point]
    print(f"| run | steps | {' | '.join(KEYS.values())} |\n|{'---|' * (len(KEYS) + 2)}")
    for point in points:
        cells = [cell(point, key) for key in KEYS]
        print(f"| {point['run']} | {point['steps']} | {' | '.join(cells)} |")
    print("\n| held-out pairs | accuracy | the longer one |\n|---|---|---|")
    for point in points:
        if "longer_is_chosen" in point:
            accuracy = point["after"]["accuracy"]
            error = math.sqrt(accuracy * (1 - accuracy) / point["pairs"])
            print(f"| {point['run']} | {accuracy:.3f} ± {error:.3f} ", end="")
            print(f"| {point['longer_is_chosen']:.3f} |")
    for point in points:
        if point["run"] in ("grpo-1", "ppo-learned", "dpo-polite") and "samples_after" in point:
            print(f"\n| {point['run']}: prompt | before | after |\n|---|---|---|")
            for before, after in zip(point["samples_before"], point["samples_after"]):
                texts = [before["prompt"], before["completion"], after["completion"]]
                if isinstance(texts[0], list):
                    texts[0] = texts[0][-1]["content"]
                print(f"| {' | '.join(map(in_one_line, texts))} |")


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
