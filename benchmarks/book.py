"""What the flags and recipes from the RLHF book do, measured: on-policy distillation, PPO-ptx, the
length bias of DPO, online DPO.

    python benchmarks/book.py --seeds 1 2 3             about an hour a seed on one core
    python benchmarks/book.py --seeds 1 --study ptx     one of the four
    python benchmarks/book.py --table                   prints what is in book.jsonl

distillation  A teacher by PPO, a student of half its size from sft.py. The student learns from the
              teacher's log-probs on its own samples (grpo.py per token, rloo.py whole completions),
              or by SFT on as many samples of the teacher, of as many prompts.
ptx           PPO from the mood checker on stories, by --ptx-coef, and with a KL term instead: does
              it hold the language while the reward rises?
length        DPO, its length-normalised form and SimPO on pairs whose chosen answer is mostly the
              longer one: people's (PandaLM), and pairs of stories made so; how long samples get.
online        Pairs of the policy's own samples, labelled by the reward model: two rounds of DPO
              against one round on as many prompts.

Runs stand in runs/book, one line of book.jsonl each; what is there is not run again. Stories and
human preferences need ../shared, which is not part of this repository."""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
RUNS = ROOT / "runs" / "book"
POINTS = HERE / "book.jsonl"
sys.path[:0] = [str(ROOT), str(HERE)]

SORTED = "--dataset sort --max-completion-length 10 --learning-rate 3e-4 --warmup-steps 5"
GROUPS = f"{SORTED} --prompts-per-step 32 --num-generations 8 --steps 160"
DISTILLED = f"{GROUPS} --model runs/student --reference runs/teacher --reward none --kl-coef 1"
TAUGHT = "--model runs/student --dataset taught.jsonl --learning-rate 3e-4 --warmup-steps 5"
STORIES = f"--dataset {DATA}/stories_sft_train.jsonl --eval-dataset {DATA}/stories_sft_test.jsonl"
MOOD = (
    f"--model runs/stories {STORIES} --reward {HERE}/mood.py:mood --max-completion-length 160 "
    "--learning-rate 2e-4 --prompts-per-step 64 --update-epochs 2 --num-minibatches 2 "
    "--value-clip 2 --steps 60"
)
PAIRS = "--model runs/stories --batch-size 32 --learning-rate 1e-4 --max-length 500"
ROLLOUTS = (
    "--reward runs/reward_model --temperature 1 --num-generations 8 --max-completion-length 10 "
    "--iterations 1 --steps 1"
)
ONLINE = "--eval-dataset sort --learning-rate 3e-4 --batch-size 32"


def script(name, flags, folder, out, seed):
    """One script as a user runs it, in the folder of a seed, unless its model is there."""
    if (folder / out / "config.json").exists():
        return
    command = [sys.executable, str(ROOT / f"{name}.py"), *shlex.split(flags)]
    command += ["--seed", str(seed), "--output-dir", out, "--overwrite"]
    print(f"$ {' '.join(command[1:])}", flush=True)
    with open(folder / f"{Path(out).name}.log", "w") as log:
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log)


def metrics_of(folder, out):
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def recipe(name, folder, *arguments):
    """Run the Python of docs/recipes.md that holds `name`."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    code = next(block for block in blocks if name in block)
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, check=True)


def sampled(path, prompt_ids, max_new_tokens, seed, temperature=1.0):
    """Completions of prompts by the model in a folder -> lists of ids, its tokenizer, EOS ids."""
    import torch

    import common

    tokenizer = common.load_tokenizer(path)
    eos_ids = common.find_eos_ids(tokenizer, path)
    completions = common.sample(
        common.load_policy(path, torch.device("cpu")),
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_ids=eos_ids,
        rng=common.generator(seed, "book"),
    )
    return completions, tokenizer, eos_ids


def solved(folder, out, seed, teacher=None):
    """Share of the 500 held-out prompts that a model sorts, and its KL to a teacher, in nats."""
    import torch

    import common
    import rloo

    path = str(folder / out)
    args = rloo.Args(model=path, micro_batch_tokens=4096)
    tokenizer = common.load_tokenizer(path)
    eos_ids = common.find_eos_ids(tokenizer, path)
    gold = common.load_gold(args, "sort", tokenizer, eos_ids)
    examples = common.load_examples("sort", rloo.prompt_example, tokenizer, args, held_out=True)
    prompt_ids = [example["prompt_ids"] for example in examples]
    found = {}
    for name, temperature in (("gold_greedy", 0.0), ("gold", 1.0)):
        completions, _, _ = sampled(path, prompt_ids, 10, seed, temperature)
        found[name] = gold(examples, completions).mean().item()
    if teacher is not None:
        device = torch.device("cpu")
        batch = rloo.completion_batch(prompt_ids, completions, device)
        student, teacher = (
            rloo.batch_logprobs(
                common.load_policy(str(model), device), batch, args, contextlib.nullcontext
            )
            for model in (path, folder / teacher)
        )
        found["kl_teacher"] = (student - teacher).sum(1).mean().item()
    return found


# ---------------------------------------------------------------- studies: name -> job of a point
def distillation(folder, seed):
    script("sft", "", folder, "runs/sft", seed)
    teacher = "--reward sort --value-model runs/sft --learning-rate 3e-4 --kl-coef 0.02 "
    teacher += "--missing-eos-penalty 0 --eval-every 0"
    script("ppo", teacher, folder, "runs/teacher", seed)
    half_of(folder, "runs/sft", "runs/half", seed)
    student = "--model runs/half --dataset sort --epochs 120 --learning-rate 1e-3 --warmup-steps 20"
    script("sft", student, folder, "runs/student", seed)

    def point(name, flags, out):
        script(name, flags, folder, out, seed)
        tokens = sum(
            256 * row["completion_length"]
            for row in metrics_of(folder, out)
            if "completion_length" in row
        )
        if name == "sft":
            rows = [json.loads(line) for line in open(folder / "taught.jsonl")]
            tokens = sum(len(row["completion"]) + 1 for row in rows)  # a letter is a token
        return solved(folder, out, seed, "runs/teacher") | {"tokens": tokens}

    def teach():
        flags = "--model runs/teacher --reward sort --temperature 1 --num-generations 8 "
        flags += "--prompts-per-iteration 5120 --max-completion-length 10 --iterations 1 --steps 1"
        script("rejection_sampling", flags, folder, "runs/teacher_samples", seed)
        with open(folder / "taught.jsonl", "w") as file:
            for line in open(folder / "runs/teacher_samples/rollouts.jsonl"):
                record = json.loads(line)
                for text, ended in zip(record["completions"], record["finished"]):
                    if ended:
                        row = {"prompt": record["row"]["prompt"], "completion": text}
                        file.write(json.dumps(row) + "\n")

    def taught(batch_size, out):
        teach()
        return point("sft", f"{TAUGHT} --batch-size {batch_size}", out)

    yield "teacher", lambda: solved(folder, "runs/teacher", seed)
    yield "student", lambda: solved(folder, "runs/student", seed, "runs/teacher")
    flags = f"{DISTILLED} --scale-rewards none --kl-estimator k2"
    yield "on-policy, per token", lambda: point("grpo", flags, "runs/on_policy_token")
    yield "on-policy, whole completions", lambda: point("rloo", DISTILLED, "runs/on_policy_whole")
    yield "SFT, batches of 256", lambda: taught(256, "runs/taught_256")
    yield "SFT, batches of 32", lambda: taught(32, "runs/taught_32")


def half_of(folder, original, out, seed):
    """New weights for a model of half the size, with the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder / original)
    config.hidden_size = 96
    config.intermediate_size = 384
    config.num_attention_heads = 3
    config.num_key_value_heads = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / out)
    AutoTokenizer.from_pretrained(folder / original).save_pretrained(folder / out)


def start_stories(folder, seed):
    flags = f"--model {SHARED}/models/stories260K {STORIES} --learning-rate 1e-3 --epochs 4 "
    script("sft", f"{flags} --batch-size 32", folder, "runs/stories", seed)


def held_out_loss(folder, model, seed):
    """Of the stories, in nats a token, as sft.py says before its first step."""
    out = f"{model}_loss"
    script("sft", f"--model {model} {STORIES} --steps 1", folder, out, seed)
    return metrics_of(folder, out)[0]["eval/loss"]


def ptx(folder, seed):
    start_stories(folder, seed)

    def point(kl_coef, ptx_coef):
        out = f"runs/ptx_{kl_coef}_{ptx_coef}"
        flags = f"{MOOD} --kl-coef {kl_coef}"
        if ptx_coef:
            flags += f" --ptx-coef {ptx_coef} --ptx-dataset {DATA}/stories_sft_train.jsonl"
        script("ppo", flags, folder, out, seed)
        first, *_, last = metrics_of(folder, out)
        return {
            "mood_before": first["eval/score"],
            "mood": last["eval/score"],
            "tokens": last["eval/completion_length"],
            "kl": last["eval/kl"],
            "loss_before": held_out_loss(folder, "runs/stories", seed),
            "loss": held_out_loss(folder, out, seed),
        }

    for kl_coef, ptx_coef in [(0.0, 0.0), (0.0, 0.1), (0.0, 1.0), (0.2, 0.0)]:
        name = f"KL {kl_coef}, ptx {ptx_coef}"
        yield name, lambda kl_coef=kl_coef, ptx_coef=ptx_coef: point(kl_coef, ptx_coef)


def write_pairs(folder):
    """Every fifth row of PandaLM held out; of the stories' pairs with a shorter chosen one every
    third is kept."""
    rows = [json.loads(line) for line in open(DATA / "pref_pandalm_human.jsonl")]
    parts = {"people": rows, "people_test": rows[4::5]}
    parts["people"] = [row for i, row in enumerate(rows) if i % 5 != 4]
    for name, part in (("stories", "train"), ("stories_test", "test")):
        rows = [json.loads(line) for line in open(DATA / f"stories_mood_pairs_{part}.jsonl")]
        longer = [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
        others = [row for row in rows if len(row["chosen"]) <= len(row["rejected"])]
        parts[name] = longer + others[::3]
    for name, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def length(folder, seed):
    start_stories(folder, seed)
    write_pairs(folder)

    def point(pairs, loss_type):
        out = f"runs/{pairs}_{loss_type}"
        flags = f"{PAIRS} --dataset {pairs}.jsonl --eval-dataset {pairs}_test.jsonl "
        flags += f"--loss-type {loss_type}"
        if pairs == "people":
            # the answers begin without the space that would part them from the prompt
            flags += " --prompt-template '{prompt}\n'"
        script("dpo", flags, folder, out, seed)
        last = metrics_of(folder, out)[-1]
        found = {"accuracy": last["eval/accuracy"], "kl": last["eval/kl"]}
        return found | lengths(folder, out, pairs, seed)

    for pairs in ("stories", "people"):
        yield f"{pairs}, before", lambda pairs=pairs: lengths(folder, "runs/stories", pairs, seed)
        for loss_type in ("sigmoid", "sigmoid-norm", "simpo"):
            yield (
                f"{pairs}, {loss_type}",
                lambda pairs=pairs, loss_type=loss_type: point(pairs, loss_type),
            )


def lengths(folder, out, pairs, seed):
    """Of one sample for each held-out prompt: tokens, share that ends by itself, mood per hundred
    words; and how often the chosen answer of the training pairs is the longer one."""
    import mood

    import common

    rows = [json.loads(line) for line in open(folder / f"{pairs}_test.jsonl")]
    end = "\n" if pairs == "people" else ""
    texts = list(dict.fromkeys(row["prompt"] + end for row in rows))
    path = str(folder / out)
    tokenizer = common.load_tokenizer(path)
    prompt_ids = [tokenizer(text).input_ids for text in texts]
    completions, _, eos_ids = sampled(path, prompt_ids, 160, seed)
    answers = [common.completion_text(tokenizer, *each) for each in zip(prompt_ids, completions)]
    moods = mood.mood(None, answers, None)
    words = sum(len(mood.words(answer)) for answer in answers)
    trained = [json.loads(line) for line in open(folder / f"{pairs}.jsonl")]
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in trained]
    return {
        "tokens": statistics.mean(map(len, completions)),
        "ended": statistics.mean(ids[-1] in eos_ids for ids in completions),
        "mood_per_hundred_words": 100 * sum(moods) / words,
        "chosen_longer": statistics.mean(longer),
    }


def online(folder, seed):
    script("sft", "", folder, "runs/sft", seed)
    script("reward_model", "", folder, "runs/reward_model", seed)

    def round_of(model, prompts, number, order, out):
        """Rollouts, pairs and DPO from a model."""
        rollouts = f"runs/rollouts_{number}"
        flags = f"--model {model} {ROLLOUTS} --prompts-per-iteration {prompts}"
        script("rejection_sampling", flags, folder, rollouts, order)
        recipe("rollouts, pairs", folder, rollouts, f"pairs_{number}.jsonl")
        flags = f"--model {model} --dataset pairs_{number}.jsonl {ONLINE}"
        script("dpo", flags, folder, out, seed)
        pairs = sum(1 for _ in open(folder / f"pairs_{number}.jsonl"))
        return solved(folder, out, seed) | {"pairs": pairs}

    def two_rounds():
        first = round_of("runs/sft", 8000, "first", seed, "runs/online_first")
        # another order: other prompts
        second = round_of("runs/online_first", 8000, "second", 100 + seed, "runs/online_second")
        return second | {"pairs": first["pairs"] + second["pairs"], "after_one": first["gold"]}

    yield "before", lambda: solved(folder, "runs/sft", seed)
    yield "one round", lambda: round_of("runs/sft", 16_000, "only", seed, "runs/online_one")
    yield "two rounds", two_rounds


STUDIES = {"distillation": distillation, "ptx": ptx, "length": length, "online": online}
COLUMNS = {
    "distillation": {
        "gold": "right, sampled",
        "gold_greedy": "right, greedy",
        "kl_teacher": "KL from the teacher, nats",
        "tokens": "tokens learnt from",
    },
    "ptx": {
        "mood_before": "mood before",
        "mood": "mood after",
        "tokens": "tokens",
        "kl": "KL, nats",
        "loss_before": "held-out loss before",
        "loss": "after",
    },
    "length": {
        "chosen_longer": "chosen is longer, training pairs",
        "accuracy": "held-out accuracy",
        "tokens": "tokens of samples",
        "ended": "that end by themselves",
        "mood_per_hundred_words": "mood per hundred words",
        "kl": "KL, nats",
    },
    "online": {
        "pairs": "pairs",
        "after_one": "right after the first round",
        "gold": "right, sampled",
        "gold_greedy": "right, greedy",
    },
}


# ---------------------------------------------------------------- all of them, tables
def measure(seeds, studies):
    known = {(point["study"], point["name"], point["seed"]) for point in read_points()}
    for seed in seeds:
        folder = RUNS / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for study in studies:
            for name, job in STUDIES[study](folder, seed):
                if (study, name, seed) not in known:
                    point = {"study": study, "name": name, "seed": seed} | job()
                    print(point, flush=True)
                    with open(POINTS, "a") as file:
                        file.write(json.dumps(point) + "\n")


def read_points():
    lines = POINTS.read_text().splitlines() if POINTS.exists() else []
    return [json.loads(line) for line in lines]


def table(studies):
    """Markdown: means and ranges over seeds."""
    for study in studies:
        found = [point for point in read_points() if point["study"] == study]
        columns = COLUMNS[study]
        print(f"\n| {study} | {' | '.join(columns.values())} |\n|{'---|' * (len(columns) + 1)}")
        for name in dict.fromkeys(point["name"] for point in found):
            points = [point for point in found if point["name"] == name]
            cells = [mean_and_range([p[c] for p in points if c in p]) for c in columns]
            print(f"| {name} | {' | '.join(cells)} |")


def mean_and_range(values):
    if not values:
        return ""
    digits = 0 if max(values) > 1000 else 3
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--study", choices=STUDIES, action="append")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    studies = args.study or list(STUDIES)
    os.environ.setdefault("MOOD_LEXICON", str(DATA / "opinion_lexicon.json"))
    if not args.table:
        measure(args.seeds, studies)
    table(studies)


if __name__ == "__main__":
    main()
