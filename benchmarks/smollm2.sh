#!/usr/bin/env bash
# Run all seven scripts on SmolLM2-135M-Instruct, a chat model: hours on two cores. A second call resumes.
# Tables: python benchmarks/smollm2.py table
#   benchmarks/smollm2.sh [MODEL, default ../models/smollm2] [RUNS, default runs/smollm2] [pattern of run names]
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-../models/smollm2}
runs=${2:-runs/smollm2}
which=${3:-.}
data=$runs/data
if [ ! -f "$model/config.json" ]; then
    echo "no model in $model"
    exit 0
fi
python benchmarks/smollm2.py data "$data"

run() { # name script flags; resumes an interrupted run, skips a finished one
    local name=$1 script=$2 folder=$runs/$1
    shift 2
    if [[ $name =~ $which ]] && [ ! -f "$folder/config.json" ]; then
        if [ -f "$folder/args.json" ]; then
            python "$script" --resume --output-dir "$folder"
        else
            python "$script" --output-dir "$folder" --save-every 10 --micro-batch-tokens 1024 "$@"
        fi
        python benchmarks/smollm2.py point "$folder"
    fi
}

# sums of two three-digit numbers: SFT on 500 worked answers, then an exact reward
sums="--dataset $data/sums.jsonl --eval-dataset $data/sums-test.jsonl --max-completion-length 32"
run sft-sums sft.py --model "$model" --dataset "$data/sums-sft.jsonl" --batch-size 32 --warmup-steps 2
for dtype in float32 bfloat16; do # the SFT model in both dtypes (docs/scale.md)
    run "sft-sums-$dtype" sft.py --model "$runs/sft-sums" --dataset "$data/sums-sft.jsonl" \
        --eval-dataset "$data/sums-test.jsonl" --steps 1 --batch-size 8 --dtype "$dtype"
done
start="--model $runs/sft-sums $sums --learning-rate 1e-5 --warmup-steps 2"
groups="$start --reward gsm8k --prompts-per-step 8 --num-generations 8 --steps 30"
run grpo-1 grpo.py $groups --seed 1
run rejection-sampling rejection_sampling.py $start --reward gsm8k --temperature 1 --num-generations 8 \
    --prompts-per-iteration 128 --iterations 2 --min-score 1 --batch-size 16
ppo="$start --prompts-per-step 64 --update-epochs 2 --steps 20"
run ppo-exact ppo.py $ppo --reward gsm8k
# a reward model of the rollouts of rejection sampling, and PPO with this reward
if [ -f "$runs/rejection-sampling/config.json" ]; then
    head -n 208 "$runs/rejection-sampling/rollouts.jsonl" >"$data/rollouts.jsonl"
    tail -n +209 "$runs/rejection-sampling/rollouts.jsonl" >"$data/rollouts-test.jsonl"
fi
run rm-sums reward_model.py --model "$runs/sft-sums" --dataset "$data/rollouts.jsonl" \
    --eval-dataset "$data/rollouts-test.jsonl" --loss outcome --batch-size 16 --learning-rate 1e-5
run ppo-learned ppo.py $ppo --reward "$runs/rm-sums"
run rloo rloo.py $groups
run grpo-2 grpo.py $groups --seed 2
run grpo-3 grpo.py $groups --seed 3

# human preferences, politeness, short instructions; every fifth row is held out
if [ ! -s "$data/polite.jsonl" ]; then
    echo "no ../shared/data: skipped the runs on it"
    exit 0
fi
polite="--dataset $data/polite.jsonl --eval-dataset $data/polite-test.jsonl --batch-size 32 --max-length 400"
people="--dataset $data/people.jsonl --eval-dataset $data/people-test.jsonl --batch-size 32 --max-length 400"
run rm-polite reward_model.py --model "$model" $polite --learning-rate 1e-5
run dpo-polite dpo.py --model "$model" $polite --learning-rate 5e-6
run rm-people reward_model.py --model "$model" $people --learning-rate 1e-5
run sft-instructions sft.py --model "$model" --dataset "$data/instructions.jsonl" \
    --eval-dataset "$data/instructions-test.jsonl" --batch-size 32
