"""Mood of a story, an exact checker, and what PPO did to it.

    --reward benchmarks/mood.py:mood             positive minus negative words, as a reward
    python benchmarks/mood.py runs/stories/ppo   the first against the last evaluation of that run
    python benchmarks/mood.py runs/stories/*     several runs, a line each

Words are those of the opinion lexicon of Hu and Liu (2004), read from
../shared/data/opinion_lexicon.json, which is not part of this repository; the environment variable
MOOD_LEXICON names another place."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

LEXICON = Path(
    os.environ.get("MOOD_LEXICON", Path(__file__).parents[2] / "shared/data/opinion_lexicon.json")
)


def words(text):
    return re.findall(r"[a-z][a-z'+-]*", text.lower())


def mood(prompts, completions, rows):
    """Positive minus negative words of each completion."""
    lexicon = json.loads(LEXICON.read_text())
    signs = dict.fromkeys(lexicon["positive"], 1.0) | dict.fromkeys(lexicon["negative"], -1.0)
    return [sum(signs.get(word, 0.0) for word in words(text)) for text in completions]


def paired(before, after):
    """Mean before, mean after, difference, its standard error and their ratio."""
    difference = np.subtract(after, before)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return [np.mean(before), np.mean(after), difference.mean(), error, difference.mean() / error]


def evaluations(folder):
    """samples.jsonl -> first and last step, prompts, the rows of both, and what is measured, as
    pairs."""
    rows = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
    by_step = {}
    for row in rows:  # one per distinct prompt and step
        by_step.setdefault(row["step"], {}).setdefault(row["prompt"], row)
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    prompts = [prompt for prompt in first if prompt in last]
    texts = [[group[prompt]["completion"] for prompt in prompts] for group in (first, last)]
    moods = [mood(prompts, t, None) for t in texts]
    lengths = [[len(words(text)) for text in t] for t in texts]
    per_hundred = [[100 * m / max(1, n) for m, n in zip(*pair)] for pair in zip(moods, lengths)]
    columns = {
        "mood per story": moods,
        "mood per hundred words": per_hundred,
        "length, words": lengths,
    }
    for name, key in (("score", "score"), ("KL, nats per sequence", "kl")):
        columns[name] = [
            [group[prompt].get(key, math.nan) for prompt in prompts] for group in (first, last)
        ]
    return min(by_step), max(by_step), prompts, (first, last), columns


def main(folder, *more):
    if not LEXICON.is_file():
        wanted = "set MOOD_LEXICON to a file with lists `positive` and `negative`"
        sys.exit(f"{LEXICON} is not there: {wanted}")
    if more:
        names = ["mood per story", "mood per hundred words", "length, words"]
        print("| run | " + " | ".join(names) + " | KL, nats per sequence |\n|" + "---|" * 5)
        for run in (folder, *more):
            columns = evaluations(run)[4]
            cells = [
                "{:.2f} to {:.2f} ({:.1f} SE)".format(*np.array(paired(*columns[n]))[[0, 1, 4]])
                for n in names
            ]
            print(
                f"| {Path(run).name} | "
                + " | ".join(cells)
                + f" | {np.mean(columns['KL, nats per sequence'][1]):.1f} |"
            )
        return
    start, end, prompts, (first, last), columns = evaluations(folder)
    print(f"{len(prompts)} distinct held-out prompts, step {start} against step {end}\n")
    print("| | before | after | difference | standard error | difference / error |")
    print("|---|---|---|---|---|---|")
    for name, pair in columns.items():
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in paired(*pair)) + " |")
    print("\n| prompt | before | after |\n|---|---|---|")
    for prompt in prompts[:5]:
        cells = [prompt, first[prompt]["completion"], last[prompt]["completion"]]
        cells = [text.replace("\n", " ⏎ ").replace("|", "\\|") for text in cells]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
