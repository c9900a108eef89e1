"""How often a chat model as judge (docs/recipes.md, AI feedback) agrees with people.

    JUDGE=../models/smollm2 python benchmarks/judge.py pairs.jsonl --rows 100

The file has rows of prompt, chosen and rejected, all texts. Printed are the pairs in which the
judge prefers the chosen one, over both orders, and how often it says A, whatever stands there."""

import argparse
import json
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/recipes.md"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs")
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    judge = {}
    exec(next(block for block in blocks if "log_odds" in block), judge)
    agreed = 0
    said_a = 0
    rows = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()[: args.rows]]
    for row in rows:
        one_order = judge["log_odds"](row["prompt"], row["chosen"], row["rejected"])
        other_order = judge["log_odds"](row["prompt"], row["rejected"], row["chosen"])
        agreed += one_order > other_order
        said_a += (one_order > 0) + (other_order > 0)
    print(f"agrees in {agreed} of {len(rows)} pairs; says A {said_a} times of {2 * len(rows)}")


if __name__ == "__main__":
    main()
