#!/usr/bin/env bash
# PPO, RLOO and GRPO on real text with an exact reward, the mood checker: 1,920 completions each, after stories.sh.
# About two minutes on two cores.
#   benchmarks/stories_checker.sh [folder of the data, default ../shared] [folder of the runs, default runs/stories]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared}/data
runs=${2:-runs/stories}
if [ ! -d "$runs/sft" ] || [ ! -d "$data" ]; then
    echo "no $runs/sft or no $data here: run benchmarks/stories.sh first"
    exit 0
fi
export MOOD_LEXICON=$data/opinion_lexicon.json
run() {
    script=$1
    shift
    python "$script.py" --model "$runs/sft" --reward benchmarks/mood.py:mood --output-dir "$runs/$script-checker" \
        --dataset "$data/stories_sft_train.jsonl" --eval-dataset "$data/stories_sft_test.jsonl" --overwrite \
        --max-completion-length 160 --steps 30 --learning-rate 2e-4 "$@"
}
run ppo --prompts-per-step 64 --update-epochs 2 --minibatches 2 --kl-coef 0.2 --value-clip 2
run rloo --prompts-per-step 16 --num-generations 4 --kl-coef 0.2
run grpo --prompts-per-step 8 --num-generations 8 --kl-coef 0.1
python benchmarks/mood.py "$runs"/{ppo,rloo,grpo}-checker | tee benchmarks/stories_checker.md
