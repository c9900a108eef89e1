"""Agreement of a chat model as judge (docs/recipes.md, AI feedback) with human preferences.

    JUDGE=../models/smollm2 python benchmarks/judge.py pairs.jsonl --rows 100

The file has rows of prompt, chosen and rejected, all plain text. Prints the number of pairs in
which the judge prefers the chosen answer, averaged over both orders, and how often it says A."""

import re

from helpers import ROOT, make_parser, read_lines


def main():
    parser = make_parser(__doc__)
    parser.add_argument("pairs")
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    page = (ROOT / "docs/recipes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    judge = {}
    exec(next(block for block in blocks if "log_odds" in block), judge)
    num_agreed = 0
    num_a = 0
    rows = read_lines(args.pairs)[: args.rows]
    for row in rows:
        one_order = judge["log_odds"](row["prompt"], row["chosen"], row["rejected"])
        other_order = judge["log_odds"](row["prompt"], row["rejected"], row["chosen"])
        num_agreed += one_order > other_order
        num_a += (one_order > 0) + (other_order > 0)
    print(f"agrees on {num_agreed} of {len(rows)} pairs; says A {num_a} times of {2 * len(rows)}")


if __name__ == "__main__":
    main()
