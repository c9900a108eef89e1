"""Seconds of a training step and peak memory of these scripts and of TRL's trainers.

    pip install trl==1.16.0
    python benchmarks/versus_trl.py                    two CPU cores (OMP_NUM_THREADS)
    python benchmarks/versus_trl.py --only grpo sft    some of the methods
    python benchmarks/versus_trl.py --repeats 1 --steps 8      a test run
    python benchmarks/versus_trl.py --model ../models/smollm2 --repeats 2 --steps 4    a real model
    python benchmarks/versus_trl.py --model ../models/smollm2 --steps 3 --prompt 64 --new 64
                                                       prompts and completions of these lengths
    python benchmarks/versus_trl.py --gpu              Qwen2.5-0.5B's shape, bfloat16 compute
    python benchmarks/versus_trl.py --table            the tables of finished runs

Both sides get the same model, rows, batch, lengths, learning rate and precision; the sizes were
fixed before any measurement. The model is a Llama with 4 layers, hidden size 128, intermediate size
384, 4 heads, 1,024 tokens and tied embeddings: 1M random float32 weights. rloo and grpo: 8 prompts
of 32 tokens x 8 completions of at most 32 (3% end earlier), one update per rollout, temperature 1,
KL coefficient 0.04, a reward that counts words. sft, reward_model and dpo: 32 rows or pairs,
prompts of 32 tokens, completions of 96 tokens ("equal") or of 8 to 256, log-uniformly distributed
("ragged"). AdamW at a constant 1e-4, gradients clipped at 1, no dropout, no gradient checkpointing.
DPO's reference log-probs are computed before the measured steps. --model needs a tokenizer that
keeps spaces in its words. It has 8 rows or pairs of 50 to 300 tokens ("ragged" only), or 2 prompts
x 8 completions of at most 128 tokens, sampled by `generate` in TRL. With --new, completions of
rows and pairs have a quarter to twice as many tokens ("ragged").

Everything else is the default of each side. "TRL by length" is TRL's group_by_length, which is off
by default and changes the rows that share a batch; our scripts sort rows by length within a batch.
Options that need another package or a GPU kernel are not measured (vLLM, padding_free with
FlashAttention, Liger).

Runs alternate between the sides, each in its own process: 25 steps, of which the first 5 are
skipped. A step includes data and sampling. Its seconds are the mean over the steps, because the
lengths of batches differ. With --model, all steps count, and there are as many batches of rows as
steps, so both sides see each row once. Memory is resident memory of the process, or allocated GPU
memory. Ratios are ours / TRL: below 1, our script needs less."""

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

from helpers import HERE, make_parser, print_header, print_row, read_lines, write_lines

RESULTS = HERE / "versus_trl.jsonl"
STEPS = 25
# group_by_length sorts 10 batches at a time, longest first; steps 6 to 25 cover all lengths
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
TRL_FLAGS = {  # flags that differ between the cases
    "equal": {},
    "ragged": {},
    "ragged, TRL by length": dict(train_sampling_strategy="group_by_length"),
    # TRL's two samplers that need no other package
    "generate": {},
    "continuous batching": dict(use_transformers_continuous_batching=True),
}
OFFLINE = ["equal", "ragged", "ragged, TRL by length"]
BACKENDS = ["generate", "continuous batching"]
CACHE = dict(page_size=64, num_blocks=96, max_batch_tokens=2048)  # for continuous batching
CASES = [(method, variant) for method in ("sft", "reward_model", "dpo") for variant in OFFLINE]
CASES += [(method, variant) for method in ("rloo", "grpo") for variant in BACKENDS]
TRAINERS = dict(sft="SFT", reward_model="Reward", dpo="DPO", rloo="RLOO", grpo="GRPO")


# ---------------------------------------------------------------- model and rows of both sides
def count_words(prompts, completions, rows=None, **more):
    """Share of words that end in 7, a reward function of both sides."""
    words = [text.split() for text in completions]
    return [sum(word[-1] == "7" for word in each) / max(1, len(each)) for each in words]


def words_of(args):
    """Words of one token each."""
    if args.model is None:
        return [f"w{i} " for i in range(2, sizes_of(args)["vocab"])]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    words = [f" {token[1:]}" for token in sorted(tokenizer.get_vocab()) if token[1:].isalpha()]
    words = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    if not words:
        sys.exit(f"error: --model {args.model}: its tokenizer has no words with a leading space")
    return words


def sizes_of(args):
    if args.gpu:
        sizes = GPU_SIZES
    else:
        sizes = SIZES if args.model is None else REAL_SIZES
    if args.new is not None:
        ragged = (args.new // 4, 2 * args.new)
        sizes = sizes | dict(prompt=args.prompt, new=args.new, ragged=ragged)
    return sizes


def warm_up(args):
    """Number of steps that are skipped."""
    return 5 if args.model is None else 0


def make_rows(method, variant, sizes, words, batches):
    """Rows of a dataset; both sides append EOS, the last token of a completion."""
    rng = random.Random(1)

    def text(tokens):
        return "".join(rng.choice(words) for _ in range(tokens))

    def completion():
        low, high = sizes["ragged"]
        ragged = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        return text((sizes["completion"] if variant == "equal" else ragged) - 1)

    pair = ["chosen", "rejected"]
    columns = {"sft": ["completion"], "reward_model": pair, "dpo": pair}.get(method, [])
    rows = []
    for _ in range(batches * sizes["batch" if columns else "prompts"]):
        prompt = text(sizes["prompt"])
        completions = {name: completion() for name in columns}
        longest = max((len(value.split()) for value in completions.values()), default=0)
        # group_by_length reads the column `length`
        rows.append({"prompt": prompt} | completions | {"length": sizes["prompt"] + longest + 1})
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


# ---------------------------------------------------------------- one run, in its own process
def memory(gpu):
    """Peak memory of this process in MiB, resident or allocated on the GPU."""
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def load(folder, gpu):
    """Peak memory of imports and one copy of the model, in MiB."""
    import transformers

    if not gpu:
        transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    return memory(gpu)


def run_ours(method, sizes, *, folder, steps, gpu, step_ended, begin):
    """Run the main of a script; returns the peak memory of imports and model in MiB."""
    script = importlib.import_module(method)
    loaded = load(folder, gpu)
    log = script.Run.log
    restore = script.Run.restore

    def timed_restore(run):  # called just before the first step
        start = restore(run)
        begin()
        return start

    def timed_log(*args, **kwargs):  # called at the end of every step
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
    """Run TRL's trainer; returns the peak memory of imports and model in MiB."""
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

    # TRL's defaults are gradient checkpointing and a log every 10 steps; its AdamW is fused
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
        flags |= dict(  # one optimizer step per rollout; no top-k or top-p by default
            per_device_train_batch_size=sizes["prompts"] * sizes["group"],
            num_generations=sizes["group"],
            max_completion_length=sizes["new"],
            temperature=1.0,
            beta=0.04,
        )
        if method == "grpo":
            flags |= dict(loss_type="grpo")  # TRL's default is DAPO's loss
        if not gpu:
            # by default, half of the free memory is the cache and a step takes 3 to 4 times longer
            flags |= dict(transformers_continuous_batching_config=CACHE)
    if method == "dpo":
        flags |= dict(precompute_ref_log_probs=True)
    if "by length" in variant and method != "sft":
        flags |= dict(remove_unused_columns=False)  # keeps the column `length`
    trainer = Trainer(
        model=f"{folder}/model",
        args=Config(**flags | TRL_FLAGS[variant]),
        train_dataset=Dataset.from_list(read_lines(f"{folder}/rows.jsonl")),
        callbacks=[Clock()],
        **rewards,
    )
    trainer.train()
    return loaded


def child(args):
    """Run the steps and print a JSON line: seconds of each after the warm-up, memory in MiB."""
    sizes = sizes_of(args)
    method, variant = args.case
    if args.child == "model":
        return make_model(args.folder, sizes, args.gpu)
    times = []
    peaks = []

    def begin():
        times[:] = [time.perf_counter()]

    def step_ended():
        times.append(time.perf_counter())
        peaks.append(memory(args.gpu))

    options = dict(folder=args.folder, steps=args.steps, gpu=args.gpu)
    options |= dict(step_ended=step_ended, begin=begin)
    if args.child == "ours":
        loaded = run_ours(method, sizes, **options)
    else:
        loaded = run_trl(method, sizes, variant=variant, **options)
    assert len(peaks) == args.steps, f"{len(peaks)} steps of {args.steps}"
    times = times[warm_up(args) :]
    seconds = [round(after - before, 5) for before, after in zip(times, times[1:])]
    print("\n" + json.dumps(dict(seconds=seconds, peak=round(peaks[-1]), loaded=round(loaded))))


# ---------------------------------------------------------------- pairs of runs, table
def start(side, folder, args, case=("sft", "equal"), steps=0):
    """Run `child` in another process; returns its report."""
    command = [sys.executable, __file__, "--child", side, "--folder", folder, "--case", *case]
    command += ["--steps", str(steps), *(["--gpu"] if args.gpu else [])]
    command += [] if args.model is None else ["--model", args.model]
    if args.new is not None:
        command += ["--prompt", str(args.prompt), "--new", str(args.new)]
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=f"{folder}/hub", TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    if done.returncode != 0:
        print("\n".join((done.stdout + done.stderr).splitlines()[-25:]), file=sys.stderr)
        sys.exit(f"error: {side} failed in {' '.join(case)}")
    return json.loads(done.stdout.splitlines()[-1]) if steps else None


def measure(args):
    """Append one line per pair of runs, ours and TRL's, to versus_trl.jsonl."""
    setting = dict(
        device="GPU" if args.gpu else "CPU",
        threads=int(os.environ["OMP_NUM_THREADS"]),
        model="random" if args.model is None else Path(args.model).name,
        steps=args.steps,
    )
    setting |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    variants = [*OFFLINE, *args.backends] if args.model is None else [*OFFLINE[1:], BACKENDS[0]]
    if args.new is not None:
        setting |= dict(prompt=args.prompt, new=args.new)
        variants = ["ragged", "generate"]
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
                write_lines(f"{folder}/rows.jsonl", rows)
                line = dict(method=method, variant=variant, pair=pair)
                for side in SIDES:
                    report = start(side, folder, args, (method, variant), args.steps)
                    line[f"{side}_seconds"] = statistics.mean(report["seconds"])
                    line[f"{side}_median"] = statistics.median(report["seconds"])
                    line[f"{side}_peak"] = report["peak"]
                    line[f"{side}_loaded"] = report["loaded"]
                line["ratio"] = line["ours_seconds"] / line["trl_seconds"]
                line |= dict(setting=setting, date=f"{datetime.date.today()}")
                write_lines(RESULTS, [line], mode="a")
                print(f"{pair}/{args.repeats} {method}, {variant}: {line['ratio']:.2f}", flush=True)


def table(lines):
    """Print medians over pairs of runs, and the range of the ratio of seconds.

    A table per setting; runs with --new, of several lengths, share one."""
    lengths = ("prompt", "new")
    settings = {}
    for line in lines:
        shared = {k: v for k, v in line["setting"].items() if k not in lengths}
        settings.setdefault(f"{shared}, {'new' in line['setting']}", (shared, []))[1].append(line)
    for shared, found in settings.values():
        print("\n" + ", ".join(f"{name} {value}" for name, value in shared.items()))
        names = ["method", "rows", "ours, s", "TRL, s", "ratio (range)"]
        names += ["peak: ours, TRL, MiB", "ratio"]
        print_header([*names, "minus imports and model: ours, TRL, MiB", "ratio"])
        for method, variant in CASES:
            rows = {}
            for line in found:
                if (line["method"], line["variant"]) == (method, variant):
                    label = " + ".join(
                        str(line["setting"][x]) for x in lengths if x in line["setting"]
                    )
                    rows.setdefault(label or variant, []).append(line)
            for label, pairs in rows.items():
                print_row([f"`{method}.py`", label, *cells_of(pairs)])


def cells_of(pairs):
    """Seconds and memory of a method, medians over pairs of runs."""

    def median(name):
        return statistics.median(pair[name] for pair in pairs)

    ratios = [pair["ratio"] for pair in pairs]
    cells = [f"{median(f'{side}_seconds'):.3f}" for side in SIDES]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for share in (0, 1):  # of imports and model to subtract
        ours, trl = (median(f"{side}_peak") - share * median(f"{side}_loaded") for side in SIDES)
        cells += [f"{ours:,.0f}, {trl:,.0f}", f"{ours / trl:.2f}"]
    return cells


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, with --new")
    parser.add_argument("--new", type=int, help="tokens of a completion (at most, in RL)")
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
            sys.exit("error: TRL is missing: `pip install trl==1.16.0`")
        if not warm_up(args) < args.steps <= BATCHES:
            sys.exit(f"error: --steps {args.steps} must be from {warm_up(args) + 1} to {BATCHES}")
        measure(args)
    table(read_lines(RESULTS))


if __name__ == "__main__":
    main()
