#!/usr/bin/env bash
# The three scripts on real text: TinyStories and a 260K-parameter Llama trained on it. About five minutes on two cores.
#   benchmarks/stories.sh [folder of the data, default ../shared] [folder of the runs, default runs/stories]
set -euo pipefail
cd "$(dirname "$0")/.."
shared=${1:-../shared}
runs=${2:-runs/stories}
if [ ! -d "$shared/models/stories260K" ]; then
    echo "no $shared/models/stories260K here: nothing to run"
    exit 0
fi
data=$shared/data
python sft.py --model "$shared/models/stories260K" --overwrite --output-dir "$runs/sft" \
    --dataset "$data/stories_sft_train.jsonl" --eval-dataset "$data/stories_sft_test.jsonl" \
    --learning-rate 1e-3 --epochs 4 --batch-size 32
python reward_model.py --model "$runs/sft" --overwrite --output-dir "$runs/reward_model" \
    --dataset "$data/stories_mood_pairs_train.jsonl" --eval-dataset "$data/stories_mood_pairs_test.jsonl" \
    --learning-rate 1e-3 --batch-size 32
python ppo.py --model "$runs/sft" --reward "$runs/reward_model" --overwrite --output-dir "$runs/ppo" \
    --dataset "$data/stories_sft_train.jsonl" --eval-dataset "$data/stories_sft_test.jsonl" \
    --max-completion-length 160 --prompts-per-step 64 --update-epochs 2 --num-minibatches 2 --steps 30 \
    --learning-rate 2e-4 --kl-coef 0.5 --value-clip 2
MOOD_LEXICON=$data/opinion_lexicon.json python benchmarks/mood.py "$runs/ppo" | tee benchmarks/stories.md
