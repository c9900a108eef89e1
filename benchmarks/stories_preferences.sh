#!/usr/bin/env bash
# DPO and rejection sampling on real text, after stories.sh: preferences of mood and of politeness, human ones, and
# the exact mood checker with its random control. About eight minutes on two cores.
#   benchmarks/stories_preferences.sh [folder of the data, default ../shared] [folder of the runs, default runs/stories]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared}/data
runs=${2:-runs/stories}
if [ ! -d "$runs/sft" ] || [ ! -d "$data" ]; then
    echo "no $runs/sft or no $data here: run benchmarks/stories.sh first"
    exit 0
fi
export MOOD_LEXICON=$data/opinion_lexicon.json
for name in polite_short pandalm_human; do # neither has a held-out part of its own: every fifth row
    awk 'NR % 5 != 0' "$data/pref_$name.jsonl" > "$runs/$name.jsonl"
    awk 'NR % 5 == 0' "$data/pref_$name.jsonl" > "$runs/$name-held-out.jsonl"
done
dpo() {
    python dpo.py --model "$runs/sft" --overwrite --batch-size 32 --learning-rate 1e-4 --max-length 500 "$@"
}
dpo --output-dir "$runs/dpo-mood" --dataset "$data/stories_mood_pairs_train.jsonl" \
    --eval-dataset "$data/stories_mood_pairs_test.jsonl"
for name in polite_short pandalm_human; do
    dpo --output-dir "$runs/dpo-$name" --dataset "$runs/$name.jsonl" --eval-dataset "$runs/$name-held-out.jsonl" \
        --prompt-template $'{prompt}\n' # (a space would merge with the answer's first word)
done
for select in top-per-prompt random-per-prompt; do
    python rejection_sampling.py --model "$runs/sft" --reward benchmarks/mood.py:mood --select "$select" --overwrite \
        --output-dir "$runs/rejection-sampling-$select" --dataset "$data/stories_sft_train.jsonl" \
        --eval-dataset "$data/stories_sft_test.jsonl" --max-completion-length 160 --num-generations 8 \
        --prompts-per-iteration 800 --epochs 3 --batch-size 32 --learning-rate 5e-4
done
{
    python - "$runs"/dpo-{mood,polite_short,pandalm_human} << 'PYTHON'
import json, sys
from pathlib import Path

print("| pairs | held-out accuracy | margin | chosen, rejected log-ratio | KL, nats |\n|" + "---|" * 5)
for run in map(Path, sys.argv[1:]):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    row = {name[5:]: value for name, value in last.items() if name.startswith("eval/")}
    print(f"| {run.name} | {row['accuracy']:.3f} +- {row['accuracy_stderr']:.3f} | {row['margin']:.3f} ", end="")
    print(f"| {row['chosen_logratio']:.2f}, {row['rejected_logratio']:.2f} | {row['kl']:.2f} |")
PYTHON
    echo
    python benchmarks/mood.py "$runs"/rejection-sampling-{top,random}-per-prompt
} | tee benchmarks/stories_preferences.md
