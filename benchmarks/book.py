"""Measure flags and recipes of the RLHF book: distillation, PPO-ptx, length bias, online DPO.

    python benchmarks/book.py --seeds 1 2 3             an hour per seed on one core
    python benchmarks/book.py --seeds 1 --study ptx     one of the four studies
    python benchmarks/book.py --table                   the tables of finished runs

distillation  The teacher is trained by PPO, the student of half its size by sft.py. The student
              learns from the teacher's log-probs on its own samples (grpo.py per token, rloo.py
              per completion), or by SFT on as many samples of the teacher.
ptx           PPO on stories with the mood checker, at several values of --ptx-coef and with a KL
              instead.
length        DPO, DPO normalized by length, and SimPO on pairs in which the chosen answer is
              usually the longer one: human preferences (PandaLM), and selected pairs of stories.
online        DPO on samples of the policy, labeled by the reward model: two rounds, or one round
              on as many prompts.

Runs are in runs/book, results in book.jsonl; finished ones are skipped. Stories and human
preferences need ../shared, which is not in this repository."""

import os
import statistics
import subprocess
import sys

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

SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
RUNS = ROOT / "runs" / "book"
POINTS = HERE / "book.jsonl"

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
ROLLOUTS = "--temperature 1 --num-generations 8 --max-completion-length 10 --iterations 1 --steps 1"
ONLINE = "--eval-dataset sort --learning-rate 3e-4 --batch-size 32"


def metrics_of(folder, out):
    return read_lines(folder / out / "metrics.jsonl")


def recipe(name, folder, *arguments):
    """Run the Python block of docs/recipes.md that contains `name`."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    code = next(block for block in blocks if name in block)
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, check=True)


def load(folder, out):
    """Tokenizer and policy of a run, and flags to go with them."""
    import torch

    import common
    import rloo

    path = str(folder / out)
    args = rloo.Args(model=path, dtype="float32", micro_batch_tokens=4096)
    tokenizer = common.load_tokenizer(path)
    return tokenizer, common.load_policy(path, tokenizer, args, torch.device("cpu")), args


def solved(folder, out, seed, teacher=None):
    """Share of the 500 held-out prompts that a model sorts, and its KL from a teacher in nats."""
    import common
    import rloo

    tokenizer, policy, args = load(folder, out)
    gold = common.load_gold(args, "sort", tokenizer)["gold"]
    examples = common.load_examples(
        "sort",
        "prompts",
        common.prompt_example,
        tokenizer,
        args,
        held_out=True,
    )
    point = {}
    for name, temperature in [("gold_greedy", 0.0), ("gold", 1.0)]:
        rollouts = common.sample(
            policy,
            examples,
            max_new_tokens=10,
            temperature=temperature,
            rng=common.generator(seed, "book"),
        )
        point[name] = gold(rollouts).mean().item()
    if teacher is not None:
        batch = rloo.completion_batch(rollouts, policy.device)
        _, teacher_policy, _ = load(folder, teacher)
        logprobs = rloo.batch_logprobs(policy, batch, args)
        teacher_logprobs = rloo.batch_logprobs(teacher_policy, batch, args)
        point["kl_teacher"] = (logprobs - teacher_logprobs).sum(1).mean().item()
    return point


# ---------------------------------------------------------------- studies: yield name, job
def distillation(folder, seed):
    run_script("sft", "", folder, "runs/sft", seed)
    teacher = "--reward sort --value-model runs/sft --learning-rate 3e-4 --kl-coef 0.02 "
    teacher += "--missing-eos-penalty 0 --eval-every 0"
    run_script("ppo", teacher, folder, "runs/teacher", seed)
    save_half(folder, "runs/sft", "runs/half", seed)
    student = "--model runs/half --dataset sort --epochs 120 --learning-rate 1e-3 --warmup-steps 20"
    run_script("sft", student, folder, "runs/student", seed)

    def on_policy(script, flags, out):
        run_script(script, flags, folder, out, seed)
        rows = metrics_of(folder, out)
        lengths = [row["completion_length"] for row in rows if "completion_length" in row]
        tokens = 256 * sum(lengths)
        return solved(folder, out, seed, "runs/teacher") | {"tokens": tokens}

    def taught(batch_size, out):
        flags = f"--model runs/teacher --reward sort {ROLLOUTS} --prompts-per-iteration 5120"
        run_script("rejection_sampling", flags, folder, "runs/teacher_samples", seed)
        rows = []
        for record in read_lines(folder / "runs/teacher_samples/rollouts.jsonl"):
            for text, finished in zip(record["completions"], record["finished"]):
                if finished:
                    rows.append({"prompt": record["row"]["prompt"], "completion": text})
        write_lines(folder / "taught.jsonl", rows)
        run_script("sft", f"{TAUGHT} --batch-size {batch_size}", folder, out, seed)
        tokens = sum(len(row["completion"]) + 1 for row in rows)  # one per letter, and EOS
        return solved(folder, out, seed, "runs/teacher") | {"tokens": tokens}

    yield "teacher", lambda: solved(folder, "runs/teacher", seed)
    yield "student", lambda: solved(folder, "runs/student", seed, "runs/teacher")
    flags = f"{DISTILLED} --scale-rewards none --kl-estimator k2"
    yield "on-policy, per token", lambda: on_policy("grpo", flags, "runs/on_policy_token")
    name = "on-policy, whole completions"
    yield name, lambda: on_policy("rloo", DISTILLED, "runs/on_policy_whole")
    yield "SFT, batches of 256", lambda: taught(256, "runs/taught_256")
    yield "SFT, batches of 32", lambda: taught(32, "runs/taught_32")


def save_half(folder, original, out, seed):
    """Save a new model of half the size with the same tokenizer."""
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
    run_script("sft", f"{flags} --batch-size 32", folder, "runs/stories", seed)


def held_out_loss(folder, model, seed):
    """Loss on the held-out stories in nats per token: the evaluation before sft.py's first step."""
    out = f"{model}_loss"
    run_script("sft", f"--model {model} {STORIES} --steps 1", folder, out, seed)
    return metrics_of(folder, out)[0]["eval/loss"]


def ptx(folder, seed):
    start_stories(folder, seed)

    def point(kl_coef, ptx_coef):
        out = f"runs/ptx_{kl_coef}_{ptx_coef}"
        flags = f"{MOOD} --kl-coef {kl_coef}"
        if ptx_coef:
            flags += f" --ptx-coef {ptx_coef} --ptx-dataset {DATA}/stories_sft_train.jsonl"
        run_script("ppo", flags, folder, out, seed)
        first, *_, last = metrics_of(folder, out)
        return {
            "mood_before": first["eval/score"],
            "mood": last["eval/score"],
            "tokens": last["eval/completion_length"],
            "kl": last["eval/kl"],
            "loss_before": held_out_loss(folder, "runs/stories", seed),
            "loss": held_out_loss(folder, out, seed),
        }

    for coefs in [(0.0, 0.0), (0.0, 0.1), (0.0, 1.0), (0.2, 0.0)]:
        yield "KL {}, ptx {}".format(*coefs), lambda coefs=coefs: point(*coefs)


def write_pairs(folder):
    """Hold out every fifth row of PandaLM; drop 2/3 of story pairs with a shorter chosen one."""
    rows = read_lines(DATA / "pref_pandalm_human.jsonl")
    write_lines(folder / "people.jsonl", [row for i, row in enumerate(rows) if i % 5 != 4])
    write_lines(folder / "people_test.jsonl", rows[4::5])
    for name, part in [("stories", "train"), ("stories_test", "test")]:
        rows = read_lines(DATA / f"stories_mood_pairs_{part}.jsonl")
        longer = [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
        others = [row for row in rows if len(row["chosen"]) <= len(row["rejected"])]
        write_lines(folder / f"{name}.jsonl", longer + others[::3])


def length(folder, seed):
    start_stories(folder, seed)
    write_pairs(folder)

    def point(pairs, loss_type):
        out = f"runs/{pairs}_{loss_type}"
        flags = f"{PAIRS} --dataset {pairs}.jsonl --eval-dataset {pairs}_test.jsonl "
        flags += f"--loss-type {loss_type}"
        if pairs == "people":  # its answers do not begin with white space
            flags += " --prompt-template '{prompt}\n'"
        run_script("dpo", flags, folder, out, seed)
        last = metrics_of(folder, out)[-1]
        metrics = {"accuracy": last["eval/accuracy"], "kl": last["eval/kl"]}
        return metrics | lengths(folder, out, pairs, seed)

    for pairs in ("stories", "people"):
        yield f"{pairs}, before", lambda pairs=pairs: lengths(folder, "runs/stories", pairs, seed)
        for loss_type in ("sigmoid", "sigmoid-norm", "simpo"):
            job = (pairs, loss_type)
            yield f"{pairs}, {loss_type}", lambda job=job: point(*job)


def lengths(folder, out, pairs, seed):
    """Length, EOS rate and mood of one sample per held-out prompt, and the training pairs' bias."""
    import mood

    import common

    tokenizer, policy, _ = load(folder, out)
    rows = read_lines(folder / f"{pairs}_test.jsonl")
    end = "\n" if pairs == "people" else ""
    texts = dict.fromkeys(row["prompt"] + end for row in rows)
    prompts = [{"prompt_ids": tokenizer(text).input_ids} for text in texts]
    rng = common.generator(seed, "book")
    rollouts = common.sample(policy, prompts, max_new_tokens=160, rng=rng)
    answers = [common.completion_text(tokenizer, rollout) for rollout in rollouts]
    num_words = sum(len(mood.words(answer)) for answer in answers)
    trained = read_lines(folder / f"{pairs}.jsonl")
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in trained]
    return {
        "tokens": statistics.mean(len(rollout["completion_ids"]) for rollout in rollouts),
        "ended": statistics.mean(rollout["finished"] for rollout in rollouts),
        "mood_per_hundred_words": 100 * sum(mood.mood(None, answers, None)) / num_words,
        "chosen_longer": statistics.mean(longer),
    }


def online(folder, seed):
    run_script("sft", "", folder, "runs/sft", seed)
    run_script("reward_model", "", folder, "runs/reward_model", seed)

    def one_round(model, num_prompts, number, order, out):
        """Sample, make pairs, and train by DPO."""
        rollouts = f"runs/rollouts_{number}"
        flags = f"--model {model} --reward runs/reward_model {ROLLOUTS} "
        flags += f"--prompts-per-iteration {num_prompts}"
        run_script("rejection_sampling", flags, folder, rollouts, order)
        recipe("rollouts, pairs", folder, rollouts, f"pairs_{number}.jsonl")
        flags = f"--model {model} --dataset pairs_{number}.jsonl {ONLINE}"
        run_script("dpo", flags, folder, out, seed)
        num_pairs = len(read_lines(folder / f"pairs_{number}.jsonl"))
        return solved(folder, out, seed) | {"pairs": num_pairs}

    def two_rounds():
        first = one_round("runs/sft", 8000, "first", seed, "runs/online_first")
        # another seed, for other prompts
        second = one_round("runs/online_first", 8000, "second", 100 + seed, "runs/online_second")
        return second | {"pairs": first["pairs"] + second["pairs"], "after_one": first["gold"]}

    yield "before", lambda: solved(folder, "runs/sft", seed)
    yield "one round", lambda: one_round("runs/sft", 16_000, "only", seed, "runs/online_one")
    yield "two rounds", two_rounds


STUDIES = {"distillation": distillation, "ptx": ptx, "length": length, "online": online}
COLUMNS = {
    "distillation": {
        "gold": "correct, sampled",
        "gold_greedy": "correct, greedy",
        "kl_teacher": "KL from the teacher, nats",
        "tokens": "tokens trained on",
    },
    "ptx": {
        "mood_before": "mood before",
        "mood": "mood after",
        "tokens": "tokens per sample",
        "kl": "KL, nats",
        "loss_before": "held-out loss before",
        "loss": "after",
    },
    "length": {
        "chosen_longer": "chosen is longer, training pairs",
        "accuracy": "held-out accuracy on pairs",
        "tokens": "tokens per sample",
        "ended": "EOS rate",
        "mood_per_hundred_words": "mood per hundred words",
        "kl": "KL, nats",
    },
    "online": {
        "pairs": "pairs",
        "after_one": "correct after the first round",
        "gold": "correct, sampled",
        "gold_greedy": "correct, greedy",
    },
}


# ---------------------------------------------------------------- all studies, tables
def measure(seeds, studies):
    known = {(point["study"], point["name"], point["seed"]) for point in read_lines(POINTS)}
    for seed in seeds:
        folder = RUNS / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for study in studies:
            for name, job in STUDIES[study](folder, seed):
                if (study, name, seed) not in known:
                    point = {"study": study, "name": name, "seed": seed} | job()
                    print(point, flush=True)
                    write_lines(POINTS, [point], mode="a")


def table(studies):
    """Print means and ranges over seeds."""
    for study in studies:
        points = [point for point in read_lines(POINTS) if point["study"] == study]
        columns = COLUMNS[study]
        print_header([study, *columns.values()])
        for name in dict.fromkeys(point["name"] for point in points):
            cells = [name]
            for column in columns:
                values = [p[column] for p in points if p["name"] == name and column in p]
                digits = 0 if max(values, default=0) > 1000 else 3
                cells.append(mean_and_range(values, digits))
            print_row(cells)


def main():
    parser = make_parser(__doc__)
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
