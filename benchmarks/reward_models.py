"""Reward models trained on rollouts, and ensembles under label noise, on the built-in task.

    python benchmarks/reward_models.py --seeds 1 2 3       half an hour per seed on two cores
    python benchmarks/reward_models.py --table             tables of finished runs
    python benchmarks/reward_models.py --draw              figure of finished runs

Rollouts: rejection_sampling.py samples 4 completions of each of 20,000 prompts from the SFT model,
scored by the exact checker. reward_model.py is trained on them with --loss outcome, bradley-terry
(all pairs) and plackett-luce. Each of the three, and the reward model of the demo, selects
the best of N of 64 completions of the 500 held-out prompts; majority voting is the baseline. PPO
uses the outcome model as its reward.

Label noise, after Coste et al. 2023: 35,200 pairs with 25% of the labels flipped train four reward
models with different seeds. PPO uses the first one, or the ensemble's mean, minimum, and mean minus
one standard deviation, with KL coefficients 0 and 0.03. Best of N uses the same four rewards.

Runs are in runs/reward_models, results in reward_models.jsonl; finished ones are skipped. --jobs is
the number of processes, each of one thread."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from helpers import (
    HERE,
    ROOT,
    make_parser,
    mean_and_range,
    print_header,
    print_row,
    read_lines,
    run_script,
    write_lines,
)

RUNS = ROOT / "runs" / "reward_models"
POINTS = HERE / "reward_models.jsonl"
MEMBERS = 4
NOISE = 0.25
LOSSES = ["outcome", "bradley-terry", "plackett-luce"]
TRAINED = "--model runs/sft --learning-rate 4e-4 --warmup-steps 100 --batch-size 32"
NOISY = [f"runs/noisy_{i}" for i in range(MEMBERS)]
COMBINED = {  # name -> members, --reward-combine
    "one reward model": (1, "mean"),
    "mean of four": (MEMBERS, "mean"),
    "lowest of four": (MEMBERS, "min"),
    "mean minus std": (MEMBERS, "mean-minus-std"),
}


# ---------------------------------------------------------------- jobs
def start(seed):
    """Train the SFT model and write the noisy pairs."""
    import common

    folder = RUNS / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run_script("sft", "", folder, "runs/sft", seed)
    rng = random.Random(seed)
    rows = []
    for row in common.task_rows("pairs", False, seed)[:35_200]:
        chosen, rejected = row["chosen"], row["rejected"]
        if rng.random() < NOISE:
            chosen, rejected = rejected, chosen
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write_lines(folder / "noisy.jsonl", rows)


def sample_rollouts(seed):
    flags = "--reward sort --temperature 1 --prompts-per-iteration 20000 --num-generations 4 "
    flags += "--iterations 1 --steps 1"
    run_script("rejection_sampling", flags, RUNS / str(seed), "runs/rollouts", seed)


def reward_models(seed):
    """Arguments of run_script, one tuple per reward model."""
    folder = RUNS / str(seed)
    yield "reward_model", "", folder, "runs/reward_model", seed
    for loss in LOSSES:
        flags = f"{TRAINED} --dataset runs/rollouts/rollouts.jsonl --loss {loss} --epochs 2"
        yield "reward_model", flags, folder, f"runs/{loss}", seed
    for i, out in enumerate(NOISY):
        flags = f"{TRAINED} --dataset noisy.jsonl --eval-dataset sort --center-coef 0.03"
        yield "reward_model", flags, folder, out, 100 * seed + i


def ppo(seed, name, rewards, flags):
    """Run PPO; returns a point with score and gold of every step."""
    folder = RUNS / str(seed)
    out = f"runs/ppo_{name.replace(' ', '_')}"
    flags = f"--reward {','.join(rewards)} --value-model {rewards[0]} --eval-every 0 {flags}"
    run_script("ppo", flags, folder, out, seed)
    rows = read_lines(folder / out / "metrics.jsonl")
    keys = ("step", "score", "gold", "disagreement")
    return {
        "name": name,
        "seed": seed,
        "steps": [{key: row[key] for key in keys if key in row} for row in rows[1:]],
        "before": {key: value for key, value in rows[0].items() if "eval/" in key},
        "after": {key: value for key, value in rows[-1].items() if "eval/" in key},
    }


def points(seed):
    """Names of the points, and jobs that return them."""
    yield "best of N", lambda: best_of_n(seed)
    yield "PPO, outcome", lambda: ppo(seed, "PPO, outcome", ["runs/outcome"], "")
    for kl_coef in (0.0, 0.03):
        for combined, (members, how) in COMBINED.items():
            name = f"{combined}, KL {kl_coef}"
            job = (seed, name, NOISY[:members], f"--kl-coef {kl_coef} --reward-combine {how}")
            yield name, lambda job=job: ppo(*job)
    yield "PPO, pairs", lambda: ppo(seed, "PPO, pairs", ["runs/reward_model"], "")


def best_of_n(seed):
    """Run best_of_n_curves in its own process; returns its point."""
    command = [sys.executable, __file__, "--best-of-n", str(seed)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def best_of_n_curves(seed, N=64):
    """Print best of N by each reward model, majority votes, and accuracies on held-out pairs."""
    import torch

    import common
    import dpo
    import rejection_sampling

    os.chdir(RUNS / str(seed))
    paths = ["runs/reward_model", *(f"runs/{loss}" for loss in LOSSES), *NOISY]
    names = [path.removeprefix("runs/") for path in paths]
    args = rejection_sampling.Args(
        model="runs/sft",
        reward=",".join(paths),
        max_completion_length=10,
        micro_batch_tokens=16_384,
        dtype="float32",
        seed=seed,
    )
    tokenizer = common.load_tokenizer(args.model)
    examples = common.load_examples(
        "sort",
        "prompts",
        common.prompt_example,
        tokenizer,
        args,
        held_out=True,
    )
    cpu = torch.device("cpu")
    reward = common.load_reward(args, examples, tokenizer, cpu)
    rollouts = common.sample(
        common.load_policy(args.model, tokenizer, args, cpu),
        examples,
        num_generations=N,
        max_new_tokens=10,
        rng=common.generator(seed, "best of N"),
    )
    gold = common.load_gold(args, "sort", tokenizer)["gold"](rollouts).view(-1, N)
    reward(rollouts)
    member_scores = torch.stack([rollout["member_scores"] for rollout in rollouts], dim=1)
    scores = dict(zip(names, member_scores))
    for name, (number, how) in COMBINED.items():
        args.reward_combine = how
        args.reward = ",".join(NOISY[:number])
        scores[name] = common.load_reward(args, examples, tokenizer, cpu)(rollouts)
    curves = {}
    for name, values in scores.items():
        values = values.view(-1, N)
        curves[name] = rejection_sampling.best_of_n_metrics(values, gold, "gold")
        curves[name] |= rejection_sampling.best_of_n_metrics(values, values, "score")
    curves["majority vote"] = majority_votes(rollouts, gold)

    pairs = common.load_examples(
        "sort",
        "pairs",
        dpo.preference_example,
        tokenizer,
        dpo.Args(),
        held_out=True,
    )
    answers = [
        pair | {"completion_ids": pair[key], "finished": True}
        for pair in pairs
        for key in ("chosen_ids", "rejected_ids")
    ]
    accuracy = {}
    reward(answers)
    for i, name in enumerate(names):
        member_scores = torch.stack([answer["member_scores"][i] for answer in answers])
        chosen, rejected = dpo.split_pairs(member_scores)
        accuracy[name] = (chosen > rejected).float().mean().item()
    point = {"name": "best of N", "seed": seed, "curves": curves, "accuracy": accuracy}
    print(json.dumps(point))


def majority_votes(rollouts, gold):
    """Mean gold of the most frequent of n completions, n = 1, 2, 4, ...; gold (M, N)."""
    N = gold.shape[1]
    curve = {}
    for n in [2**i for i in range(N.bit_length())]:
        values = []
        for i, row in enumerate(gold.tolist()):
            group = [tuple(rollout["completion_ids"]) for rollout in rollouts[i * N : (i + 1) * N]]
            for first in range(0, N, n):
                votes = group[first : first + n]
                values.append(row[first + votes.index(max(votes, key=votes.count))])
        curve[f"best_of_{n}/gold"] = statistics.mean(values)
    return curve


# ---------------------------------------------------------------- all runs, tables, figure
def measure(seeds, jobs):
    known = {(point["name"], point["seed"]) for point in read_lines(POINTS)}

    def run(seed, name, job):
        if (name, seed) not in known:
            write_lines(POINTS, [job()], mode="a")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, seeds))
        list(pool.map(sample_rollouts, seeds))
        arguments = [each for seed in seeds for each in reward_models(seed)]
        list(pool.map(lambda each: run_script(*each), arguments))
        # all seeds of a point before the next point
        per_seed = [[(seed, *named) for named in points(seed)] for seed in seeds]
        arguments = [each for same_name in zip(*per_seed) for each in same_name]
        list(pool.map(lambda each: run(*each), arguments))


def table():
    """Print means and ranges over seeds."""
    found = read_lines(POINTS)
    best = [point for point in found if point["name"] == "best of N"]
    if best:
        ns = [1, 4, 16, 64]
        print_header(["best of N by", *map(str, ns)])
        members = [path.removeprefix("runs/") for path in NOISY]
        for name in [x for x in best[0]["curves"] if x not in members]:
            keys = [f"best_of_{n}/gold" for n in ns]
            cells = [mean_and_range([p["curves"][name][key] for p in best]) for key in keys]
            print_row([name, *cells])
        print_header(["reward model", "held-out accuracy on pairs"])
        for name in best[0]["accuracy"]:
            print_row([name, mean_and_range([point["accuracy"][name] for point in best])])
    print_header(
        ["PPO", "seeds", "gold, best step", "gold, last 10 steps", "held out, greedy", "KL"]
    )
    for name in dict.fromkeys(point["name"] for point in found if "steps" in point):
        runs = [point for point in found if point["name"] == name]
        curves = [smoothed([step["gold"] for step in point["steps"]]) for point in runs]
        cells = [
            mean_and_range([max(curve) for curve in curves]),
            mean_and_range([curve[-1] for curve in curves]),
            mean_and_range([point["after"]["eval/gold_greedy"] for point in runs]),
            mean_and_range([point["after"]["eval/kl"] for point in runs]),
        ]
        print_row([name, str(len(runs)), *cells])


def smoothed(values, width=10):
    """Means over the last `width` values."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw(file):
    """Draw score and gold over the steps of PPO, means and ranges over seeds."""
    from matplotlib.figure import Figure

    found = read_lines(POINTS)
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, 4, sharex=True)
    panels = [(kl_coef, key) for kl_coef in (0.0, 0.03) for key in ("score", "gold")]
    for axis, (kl_coef, key) in zip(axes, panels):
        for i, combined in enumerate(COMBINED):
            runs = [point for point in found if point["name"] == f"{combined}, KL {kl_coef}"]
            curves = [smoothed([step[key] for step in point["steps"]]) for point in runs]
            values = list(zip(*curves))  # one tuple per step
            axis.plot([statistics.mean(x) for x in values], color=f"C{i}", label=combined)
            low = [min(x) for x in values]
            high = [max(x) for x in values]
            axis.fill_between(range(len(values)), low, high, color=f"C{i}", alpha=0.15)
        axis.set_title(f"{key}, KL coefficient {kl_coef}")
        axis.set_xlabel("step of PPO")
        if key == "gold":
            axis.set_ylim(0, 1)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--best-of-n", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.best_of_n is not None:
        return best_of_n_curves(args.best_of_n)
    if args.draw:
        return draw(HERE / "overoptimization.png")
    if not args.table:
        measure(args.seeds, args.jobs)
    table()


if __name__ == "__main__":
    main()
