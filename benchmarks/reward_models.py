"""Reward models that learn from rollouts, and ensembles against over-optimisation, on the built-in
task, where the truth is known.

    python benchmarks/reward_models.py --seeds 1 2 3       about half an hour a seed on two cores
    python benchmarks/reward_models.py --table             prints what is in reward_models.jsonl
    python benchmarks/reward_models.py --draw              benchmarks/overoptimisation.png

The loop: rejection_sampling.py samples 4 completions of each of 20,000 prompts from the SFT model,
and the exact checker judges them; reward_model.py learns from that file by --loss outcome,
bradley-terry (all pairs) and plackett-luce; each, and the reward model of the laptop run (pairs of
right and wrong answers), picks the best of N of 64 completions of the 500 held-out prompts, beside
the majority vote; the outcome model is PPO's reward.

Label noise, after Coste et al. 2023: 35,200 pairs with 25% of their labels flipped; four reward
models of other seeds; PPO against the first alone and against the ensemble's mean, lowest score and
mean less one standard deviation, with KL coefficients 0 and 0.03; best of N by the same.

Runs stand in runs/reward_models, one line of reward_models.jsonl each; what is there is not run
again. --jobs processes at a time, of one thread each."""

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
RUNS = ROOT / "runs" / "reward_models"
POINTS = HERE / "reward_models.jsonl"
MEMBERS = 4
NOISE = 0.25
LOSSES = ["outcome", "bradley-terry", "plackett-luce"]
TRAINED = "--model runs/sft --learning-rate 4e-4 --warmup-steps 100"
COMBINED = {  # name -> members, --reward-combine
    "one reward model": (1, "mean"),
    "mean of four": (MEMBERS, "mean"),
    "lowest of four": (MEMBERS, "min"),
    "mean less deviation": (MEMBERS, "mean-minus-std"),
}


def script(name, flags, folder, out, seed):
    """One script as a user runs it, in the folder of a seed, unless its model is there."""
    if (folder / out / "config.json").exists():
        return
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags.split()]
    command += ["--seed", str(seed), "--output-dir", out, "--overwrite"]
    print(f"$ {' '.join(command[1:])}", flush=True)
    with open(folder / f"{Path(out).name}.log", "w") as log:
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, env=environment)


def noisy(i):
    return f"runs/noisy_{i}"


# ---------------------------------------------------------------- jobs
def start(seed):
    """SFT, pairs and labels with noise."""
    folder = RUNS / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    script("sft", "", folder, "runs/sft", seed)
    if not (folder / "noisy.jsonl").exists():
        sys.path.insert(0, str(ROOT))
        import common

        rng = random.Random(seed)
        lines = ""
        for row in common.task_rows("preference", False, seed)[:35_200]:
            pair = [row["chosen"], row["rejected"]]
            if rng.random() < NOISE:
                pair.reverse()
            lines += json.dumps(dict(prompt=row["prompt"], chosen=pair[0], rejected=pair[1])) + "\n"
        (folder / "noisy.jsonl").write_text(lines)


def rollouts(seed):
    flags = "--reward sort --temperature 1 --prompts-per-iteration 20000 --num-generations 4 "
    flags += "--iterations 1 --steps 1"
    script("rejection_sampling", flags, RUNS / str(seed), "runs/rollouts", seed)


def reward_models(seed):
    """Jobs, one a reward model."""
    folder = RUNS / str(seed)
    yield lambda: script("reward_model", "", folder, "runs/reward_model", seed)
    for loss in LOSSES:
        flags = f"{TRAINED} --dataset runs/rollouts/rollouts.jsonl --loss {loss} --epochs 2 "
        flags += "--batch-size 32"
        yield lambda loss=loss, flags=flags: script(
            "reward_model", flags, folder, f"runs/{loss}", seed
        )
    for i in range(MEMBERS):
        flags = f"{TRAINED} --dataset noisy.jsonl --eval-dataset sort --batch-size 32 "
        flags += "--center-coef 0.03"
        yield lambda i=i, flags=flags: script(
            "reward_model", flags, folder, noisy(i), 100 * seed + i
        )


def ppo(seed, name, rewards, flags):
    """A run of PPO -> a point, with score and truth on its own samples at every step."""
    folder = RUNS / str(seed)
    out = f"runs/ppo_{name.replace(' ', '_')}"
    flags = f"--reward {','.join(rewards)} --value-model {rewards[0]} --eval-every 0 {flags}"
    script("ppo", flags, folder, out, seed)
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    keys = ("step", "score", "gold", "disagreement")
    return {
        "name": name,
        "seed": seed,
        "steps": [{key: row[key] for key in keys if key in row} for row in rows[1:]],
        "before": {key: value for key, value in rows[0].items() if "eval/" in key},
        "after": {key: value for key, value in rows[-1].items() if "eval/" in key},
    }


def points(seed):
    """Names and jobs that give a point."""
    yield "best of N", lambda: best_of_n(seed)
    yield "PPO, outcome", lambda: ppo(seed, "PPO, outcome", ["runs/outcome"], "")
    for kl_coef in (0.0, 0.03):
        for combined, (members, how) in COMBINED.items():
            name = f"{combined}, KL {kl_coef}"
            rewards = [noisy(i) for i in range(members)]
            flags = f"--kl-coef {kl_coef} --reward-combine {how}"
            yield (
                name,
                lambda name=name, rewards=rewards, flags=flags: ppo(seed, name, rewards, flags),
            )
    yield "PPO, pairs", lambda: ppo(seed, "PPO, pairs", ["runs/reward_model"], "")


def best_of_n(seed):
    """The same command in a process of its own -> a point."""
    command = [sys.executable, __file__, "--best-of-n", str(seed)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def best_of_n_curves(seed):
    """Truth of the best of N by each reward model, of majority votes, and held-out accuracy."""
    sys.path.insert(0, str(ROOT))
    import torch

    import common
    import ppo
    import rejection_sampling

    os.chdir(RUNS / str(seed))
    names = ["reward_model", *LOSSES, *(f"noisy_{i}" for i in range(MEMBERS))]
    args = rejection_sampling.Args(
        model="runs/sft",
        reward=",".join(f"runs/{name}" for name in names),
        max_completion_length=10,
        micro_batch_tokens=16_384,
        seed=seed,
    )
    tokenizer = common.load_tokenizer(args.model)
    eos_ids = common.find_eos_ids(tokenizer, args.model)
    examples = common.load_examples(
        "sort", rejection_sampling.prompt_example, tokenizer, args, held_out=True
    )
    cpu = torch.device("cpu")
    ensemble = common.load_rewards(
        args, examples, tokenizer, eos_ids, device=cpu, autocast=contextlib.nullcontext
    )
    N = 64
    completions = common.sample(
        common.load_policy(args.model, cpu),
        [example["prompt_ids"] for example in examples],
        num_generations=N,
        max_new_tokens=10,
        eos_ids=eos_ids,
        rng=common.generator(seed, "best of N"),
    )
    repeated = [example for example in examples for _ in range(N)]
    gold = common.load_gold(args, "sort", tokenizer, eos_ids)(repeated, completions).view(-1, N)
    scores = dict(zip(names, [member(repeated, completions) for member in ensemble]))
    members = torch.stack([scores[f"noisy_{i}"] for i in range(MEMBERS)])
    for name, (number, how) in COMBINED.items():
        args.reward_combine = how
        scores[name] = ppo.combine_scores(members[:number], args)
    curves = {}
    for name, values in scores.items():
        values = values.view(-1, N)
        curves[name] = rejection_sampling.best_of_n_metrics(values, gold, "gold")
        curves[name] |= rejection_sampling.best_of_n_metrics(values, values, "score")
    curves["majority vote"] = {}
    for n in [2**i for i in range(7)]:
        won = []
        for i, row in enumerate(gold.tolist()):
            texts = [tuple(ids) for ids in completions[i * N : (i + 1) * N]]
            for first in range(0, N, n):
                votes = texts[first : first + n]
                won.append(row[first + votes.index(max(votes, key=votes.count))])
        curves["majority vote"][f"best_of_{n}/gold"] = statistics.mean(won)
    # held-out pairs of a right and a slightly wrong answer
    pairs = common.task_rows("preference", True, seed)
    examples = []
    completions = []
    for row in pairs:
        for text in (row["chosen"], row["rejected"]):
            prompt_ids, (ids,) = common.encode_completions(
                tokenizer, row["prompt"], [text], tokenizer.eos_token_id
            )
            examples.append({"prompt": row["prompt"], "prompt_ids": prompt_ids, "row": row})
            completions.append(ids)
    accuracy = {}
    for name, member in zip(names, ensemble):
        chosen, rejected = member(examples, completions).view(-1, 2).T
        accuracy[name] = (chosen > rejected).float().mean().item()
    point = {"name": "best of N", "seed": seed, "curves": curves, "accuracy": accuracy}
    print(json.dumps(point))


# ---------------------------------------------------------------- all of them, tables, a figure
def measure(seeds, jobs):
    known = {(point["name"], point["seed"]) for point in read_points()}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, seeds))
        list(pool.map(rollouts, seeds))
        list(pool.map(lambda job: job(), [job for seed in seeds for job in reward_models(seed)]))

        def run(named):
            seed, name, job = named
            if (name, seed) not in known:
                with open(POINTS, "a") as file:
                    file.write(json.dumps(job()) + "\n")

        # seed by seed within each kind, so that what is there early is of all seeds
        named = zip(*[[(seed, *named) for named in points(seed)] for seed in seeds])
        list(pool.map(run, [each for kind in named for each in kind]))


def read_points():
    lines = POINTS.read_text().splitlines() if POINTS.exists() else []
    return [json.loads(line) for line in lines]


def mean_and_range(values):
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table():
    """Markdown: means and ranges over seeds."""
    found = read_points()
    best = [point for point in found if point["name"] == "best of N"]
    if best:
        ns = [1, 4, 16, 64]
        print(f"\n| best of N by | {' | '.join(map(str, ns))} |\n|{'---|' * (len(ns) + 1)}")
        for name in best[0]["curves"]:
            cells = [
                mean_and_range([point["curves"][name][f"best_of_{n}/gold"] for point in best])
                for n in ns
            ]
            print(f"| {name} | {' | '.join(cells)} |")
        print("\n| reward model | held-out accuracy over pairs |\n|---|---|")
        for name in best[0]["accuracy"]:
            print(f"| {name} | {mean_and_range([p['accuracy'][name] for p in best])} |")
    print("\n| PPO | seeds | gold, best step | gold, last 10 steps | held out, greedy | KL |")
    print(f"|{'---|' * 6}")
    for name in dict.fromkeys(point["name"] for point in found if "steps" in point):
        runs = [point for point in found if point["name"] == name]
        smooth = [smoothed([step["gold"] for step in point["steps"]]) for point in runs]
        cells = [
            str(len(runs)),
            mean_and_range([max(curve) for curve in smooth]),
            mean_and_range([curve[-1] for curve in smooth]),
            mean_and_range([point["after"]["eval/gold_greedy"] for point in runs]),
            mean_and_range([point["after"]["eval/kl"] for point in runs]),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def smoothed(values, width=10):
    """Means over the last `width` values."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [point for point in read_points() if "KL" in point["name"]]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), sharex=True)
    for column, kl_coef in enumerate(("0.0", "0.03")):
        for i, combined in enumerate(COMBINED):
            runs = [p for p in found if p["name"] == f"{combined}, KL {kl_coef}"]
            for offset, key in enumerate(("score", "gold")):
                curves = [smoothed([step[key] for step in p["steps"]]) for p in runs]
                if curves:
                    middle = [statistics.mean(values) for values in zip(*curves)]
                    axis = axes[2 * column + offset]
                    axis.plot(middle, color=f"C{i}", label=combined)
                    low = [min(values) for values in zip(*curves)]
                    high = [max(values) for values in zip(*curves)]
                    axis.fill_between(range(len(low)), low, high, color=f"C{i}", alpha=0.15)
                    axis.set_title(f"{'proxy' if key == 'score' else 'truth'}, KL {kl_coef}")
                    axis.set_xlabel("step of PPO")
    axes[0].legend(fontsize=8)
    axes[1].set_ylim(0, 1)
    axes[3].set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(HERE / "overoptimisation.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--best-of-n", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.best_of_n is not None:
        return best_of_n_curves(args.best_of_n)
    if args.draw:
        return draw()
    if not args.table:
        measure(args.seeds, args.jobs)
    table()


if __name__ == "__main__":
    main()
