"""Seconds of a training step and peak memory, these scripts beside TRL's trainers: same model,
rows, batch, lengths, learning rate and precision.

    pip install trl==1.16.0
    python benchmarks/versus_trl.py                    two CPU cores (OMP_NUM_THREADS)
    python benchmarks/versus_trl.py --only grpo sft    these only
    python benchmarks/versus_trl.py --repeats 1 --steps 8      to see that it runs
    python benchmarks/versus_trl.py --model ../models/smollm2 --repeats 2 --steps 4    a real model
    python benchmarks/versus_trl.py --gpu              Qwen2.5-0.5B's shape, bfloat16 autocast
    python benchmarks/versus_trl.py --table            prints what is in benchmarks/versus_trl.jsonl

Sizes, fixed before anything was measured: a Llama of 4 layers, hidden 128, intermediate 384, 4
heads, 1,024 tokens, tied embeddings, 1M random float32 weights. rloo, grpo: 8 prompts of 32 tokens
x 8 completions of at most 32 (3% end before), one update per rollout, temperature 1, KL 0.04 with a
reference, a reward that counts words. sft, reward_model, dpo: 32 rows or pairs, prompts of 32
tokens; completions of 96 tokens ("equal"), or of 8 to 256, log-uniformly ("ragged"). AdamW at 1e-4,
constant; gradients clipped at 1; no dropout and no gradient checkpointing; DPO's reference
log-probs are computed before the steps that are timed. With --model, and a tokenizer that has
spaces in its words: 8 rows or pairs of 50 to 300 tokens ("ragged" alone), 2 prompts x 8 completions
of at most 128 by generate.

Both run at their defaults otherwise. "TRL by length": with TRL's group_by_length, which is off by
default and changes the rows that share a batch; ours cuts the same batch into micro-batches of
about one length. Not measured: what needs another package or a kernel for GPUs (vLLM, padding_free
with FlashAttention, Liger).

Runs alternate, ours, TRL, ours, TRL, each a process of its own: 25 steps, the first 5 of which do
not count. A step lasts from the end of one to the end of the next, with data and sampling; its
seconds are the mean over the steps, as batches of about one length are not alike. With --model all
steps count, and their rows are all of the data, so that both sides see each row once.
Memory is that of the process, resident, or of the GPU's tensors. Ratios are ours / TRL: below 1,
ours needs less."""

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "versus_trl.jsonl"
STEPS = 25
# group_by_length sorts 10 batches at a time, longest first: steps 6 to 25 see all lengths alike
BATCHES = 40
SIZES = dict(
    vocab=1024, prompt=32, completion=96, ragged=(8, 256), batch=32, prompts=8, group=8, new=32
)
REAL_SIZES = SIZES | dict(completion=118, ragged=(18, 268), batch=8, prompts=2, new=128)
GPU_SIZES = SIZES | dict(vocab=151_936, completion=224, ragged=(16, 480), batch=16, new=256)
LLAMA = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
QWEN = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
QWEN |= dict(num_key_value_heads=2, rope_theta=1e6)

SIDES = "ours", "trl"
TRL_FLAGS = {  # what differs between the cases
    "equal": {},
    "ragged": {},
    "ragged, TRL by length": dict(train_sampling_strategy="group_by_length"),
    # TRL's ways to sample, of those that need no other package
    "generate": {},
    "continuous batching": dict(use_transformers_continuous_batching=True),
}
OFFLINE = ["equal", "ragged", "ragged, TRL by length"]
BACKENDS = ["generate", "continuous batching"]
CACHE = dict(page_size=64, num_blocks=96, max_batch_tokens=2048)  # of continuous batching
CASES = [(method, variant) for method in ("sft", "reward_model", "dpo") for variant in OFFLINE]
CASES += [(method, variant) for method in ("rloo", "grpo") for variant in BACKENDS]
TRAINERS = dict(sft="SFT", reward_model="Reward", dpo="DPO", rloo="RLOO", grpo="GRPO")


# ---------------------------------------------------------------- the same model and rows for both
def count_words(prompts, completions, rows=None, **more):
    """Share of words that end in 7: a reward function as both take it."""
    words = [text.split() for text in completions]
    return [sum(word[-1] == "7" for word in each) / max(1, len(each)) for each in words]


def words_of(args):
    """Words of which each is one token."""
    if args.model is None:
        return [f"w{i} " for i in range(2, sizes_of(args)["vocab"])]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    words = [f" {token[1:]}" for token in sorted(tokenizer.get_vocab()) if token[1:].isalpha()]
    words = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    if not words:
        sys.exit(f"--model {args.model}: its tokenizer has no words that begin with a space")
    return words


def sizes_of(args):
    if args.gpu:
        return GPU_SIZES
    return SIZES if args.model is None else REAL_SIZES


def warm_up(args):
    """Steps that do not count."""
    return 5 if args.model is None else 0


def make_rows(method, variant, sizes, words, batches):
    """Rows of a data set; a completion's last token is EOS, which both add."""
    draw = random.Random(1)

    def text(tokens):
        return "".join(draw.choice(words) for _ in range(tokens))

    def completion():
        low, high = sizes["ragged"]
        ragged = round(math.exp(draw.uniform(math.log(low), math.log(high))))
        return text((sizes["completion"] if variant == "equal" else ragged) - 1)

    columns = dict(
        sft=["completion"], reward_model=["chosen", "rejected"], dpo=["chosen", "rejected"]
    )
    rows = []
    for _ in range(batches * sizes["prompts" if method in ("rloo", "grpo") else "batch"]):
        row = {"prompt": text(sizes["prompt"])} | {
            name: completion() for name in columns.get(method, [])
        }
        longest = max(
            (len(value.split()) for name, value in row.items() if name != "prompt"), default=0
        )
        rows.append(row | {"length": sizes["prompt"] + longest + 1})  # group_by_length reads it
    return rows


def make_model(folder, sizes, gpu):
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(1)
    shape = dict(vocab_size=sizes["vocab"], tie_word_embeddings=True, max_position_embeddings=1024)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    if gpu:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN, **shape, **ids))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **shape, **ids))
    model.save_pretrained(folder)
    vocab = {"[PAD]": 0, "[EOS]": 1} | {f"w{i}": i for i in range(2, sizes["vocab"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[PAD]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="[PAD]", eos_token="[EOS]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


# ---------------------------------------------------------------- one run, in a process of its own
def memory(gpu):
    """Peak of this process so far, MiB: of the GPU's tensors, or resident."""
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def load(folder, gpu):
    """Peak with imports and the model, which is then dropped: its classes are imported when it is
    loaded."""
    import transformers

    if not gpu:
        transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    return memory(gpu)


def run_ours(method, sizes, *, folder, steps, gpu, step_ended, begin):
    """One of our scripts, through its main -> peak with imports and the model, MiB."""
    sys.path.insert(0, str(HERE.parent))
    script = importlib.import_module(method)
    loaded = load(folder, gpu)
    log = script.Run.log
    restore = script.Run.restore

    def timed_restore(*args, **kwargs):  # the last thing before the steps
        start = restore(*args, **kwargs)
        begin()
        return start

    def timed_log(*args, **kwargs):  # the end of every step
        log(*args, **kwargs)
        step_ended()

    script.Run.restore = timed_restore
    script.Run.log = timed_log
    flags = dict(
        model=f"{folder}/model",
        dataset=f"{folder}/rows.jsonl",
        output_dir=f"{folder}/ours",
        overwrite=True,
        steps=steps,
        learning_rate=1e-4,
        warmup_steps=0,
        lr_schedule="constant",
        save_every=0,
        log_every=10**6,
    )
    if method in ("rloo", "grpo"):
        flags |= dict(
            reward=f"{__file__}:count_words",
            prompts_per_step=sizes["prompts"],
            num_generations=sizes["group"],
            max_completion_length=sizes["new"],
            kl_coef=0.04,
        )
    else:
        flags |= dict(batch_size=sizes["batch"])
    script.main(script.Args(**flags))
    return loaded


def run_trl(method, sizes, *, variant, folder, steps, gpu, step_ended, begin):
    """TRL's trainer of that method -> peak with imports and the model, MiB."""
    import transformers
    import trl
    from datasets import Dataset

    Trainer = getattr(trl, f"{TRAINERS[method]}Trainer")
    Config = getattr(trl, f"{TRAINERS[method]}Config")
    loaded = load(folder, gpu)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            begin()

        def on_step_end(self, *args, **kwargs):
            step_ended()

    # its defaults would be gradient checkpointing and a log every 10 steps; its AdamW is fused
    flags = dict(
        output_dir=f"{folder}/trl",
        max_steps=steps,
        per_device_train_batch_size=sizes["batch"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        bf16=gpu,
        use_cpu=not gpu,
        seed=1,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rewards = {}
    if method in ("rloo", "grpo"):
        rewards = dict(reward_funcs=count_words)
        flags |= dict(  # one optimiser step a rollout; by default all tokens may be drawn
            per_device_train_batch_size=sizes["prompts"] * sizes["group"],
            num_generations=sizes["group"],
            max_completion_length=sizes["new"],
            temperature=1.0,
            beta=0.04,
        )
        if method == "grpo":
            flags |= dict(loss_type="grpo")  # (its default is DAPO's)
        if not gpu:
            # else half of the free memory becomes the cache, and a step takes 3 to 4 times longer
            flags |= dict(transformers_continuous_batching_config=CACHE)
    if method == "dpo":
        flags |= dict(precompute_ref_log_probs=True)
    if "by length" in variant and method != "sft":
        flags |= dict(remove_unused_columns=False)  # else the column of lengths is gone too early
    lines = Path(folder, "rows.jsonl").read_text().splitlines()
    trainer = Trainer(
        model=f"{folder}/model",
        args=Config(**flags | TRL_FLAGS[variant]),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        callbacks=[Clock()],
        **rewards,
    )
    trainer.train()
    return loaded


def child(args):
    """Run `steps` steps, print one line of JSON: seconds of each after the warm-up, memory in
    MiB."""
    sizes = sizes_of(args)
    method, variant = args.case
    began = []
    ended = []
    if args.child == "model":
        return make_model(args.folder, sizes, args.gpu)

    def step_ended():
        ended.append((time.perf_counter(), memory(args.gpu)))

    common = dict(folder=args.folder, steps=args.steps, gpu=args.gpu)
    common |= dict(step_ended=step_ended, begin=lambda: began.append(time.perf_counter()))
    if args.child == "ours":
        loaded = run_ours(method, sizes, **common)
    else:
        loaded = run_trl(method, sizes, variant=variant, **common)
    assert len(ended) == args.steps, f"{len(ended)} steps of {args.steps}"
    times = [began[-1], *(moment for moment, _ in ended)][warm_up(args) :]
    peak = ended[-1][1]
    seconds = [round(after - before, 5) for before, after in zip(times, times[1:])]
    print("\n" + json.dumps(dict(seconds=seconds, peak=round(peak), loaded=round(loaded))))


# ---------------------------------------------------------------- pairs of runs, and the table
def start(side, folder, args, case=("sft", "equal"), steps=0):
    """This file as another process -> what it reports; where it fails, its last words, and an
    end."""
    command = [sys.executable, __file__, "--child", side, "--folder", folder, "--case", *case]
    command += ["--steps", str(steps), *(["--gpu"] if args.gpu else [])]
    command += [] if args.model is None else ["--model", args.model]
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=f"{folder}/hub", TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    if done.returncode != 0:
        print("\n".join((done.stdout + done.stderr).splitlines()[-25:]), file=sys.stderr)
        sys.exit(f"{side} failed in {' '.join(case)}")
    return json.loads(done.stdout.splitlines()[-1]) if steps else None


def measure(args):
    """Pairs of runs, ours and TRL's in turn, each pair a line of versus_trl.jsonl."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    setting = dict(device="GPU" if args.gpu else "CPU", threads=int(os.environ["OMP_NUM_THREADS"]))
    setting |= dict(model="random" if args.model is None else Path(args.model).name)
    setting |= dict(steps=args.steps) | versions
    today = dict(date=f"{datetime.date.today()}")
    variants = [*OFFLINE, *args.backends] if args.model is None else [*OFFLINE[1:], BACKENDS[0]]
    cases = [case for case in CASES if case[0] in args.only and case[1] in variants]
    batches = BATCHES if args.model is None else args.steps
    words = words_of(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            start("model", f"{folder}/model", args)
        else:
            Path(folder, "model").symlink_to(Path(args.model).resolve())
        for pair in range(1, args.repeats + 1):
            for method, variant in cases:
                rows = make_rows(method, variant, sizes_of(args), words, batches)
                Path(folder, "rows.jsonl").write_text(
                    "".join(json.dumps(row) + "\n" for row in rows)
                )
                line = dict(method=method, variant=variant, pair=pair)
                for side in SIDES:
                    found = start(side, folder, args, (method, variant), args.steps)
                    line |= {f"{side}_seconds": statistics.mean(found["seconds"])}
                    line |= {f"{side}_median": statistics.median(found["seconds"])}
                    line |= {f"{side}_peak": found["peak"], f"{side}_loaded": found["loaded"]}
                line["ratio"] = line["ours_seconds"] / line["trl_seconds"]
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(line | dict(setting=setting) | today) + "\n")
                print(f"{pair}/{args.repeats} {method}, {variant}: {line['ratio']:.2f}", flush=True)


def table(lines):
    """Markdown: medians over pairs, and the range of the ratio of seconds."""
    for setting in {str(line["setting"]): line["setting"] for line in lines}.values():
        print("\n" + ", ".join(f"{name} {value}" for name, value in setting.items()))
        names = [
            "method",
            "rows",
            "ours, s",
            "TRL, s",
            "ratio (range)",
            "peak: ours, TRL, MiB",
            "ratio",
        ]
        names += ["less imports and model: ours, TRL, MiB", "ratio"]
        print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for method, variant in CASES:
            key = dict(method=method, variant=variant, setting=setting)
            pairs = [line for line in lines if key.items() <= line.items()]
            if not pairs:
                continue

            def middle(name, pairs=pairs):
                return statistics.median(pair[name] for pair in pairs)

            ratios = [pair["ratio"] for pair in pairs]
            seconds = [f"{middle(f'{side}_seconds'):.3f}" for side in SIDES]
            cells = [f"`{method}.py`", variant, *seconds]
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
            for less in (0, 1):
                peaks = [middle(f"{side}_peak") - less * middle(f"{side}_loaded") for side in SIDES]
                cells += [f"{peaks[0]:,.0f}, {peaks[1]:,.0f}", f"{peaks[0] / peaks[1]:.2f}"]
            print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--table", action="store_true")
    for name in ("--child", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    if args.child:
        return child(args)
    if not args.table:
        if importlib.util.find_spec("trl") is None:
            sys.exit("TRL is not installed: run `pip install trl==1.16.0`")
        if not warm_up(args) < args.steps <= BATCHES:
            sys.exit(f"--steps is {args.steps}: wanted are {warm_up(args) + 1} to {BATCHES}")
        measure(args)
    table(
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


if __name__ == "__main__":
    main()
