"""GPU memory of ppo.py with a learned reward, by part, for models and numbers of cards, and its check.

    python benchmarks/memory.py                      the tables of the README (half a minute, nothing is run)
    python benchmarks/memory.py --check              the same sums for small models, beside what ppo.py really
                                                     allocates: 1 process, and 2 that split (five minutes)

Parameters are counted and activations traced on models without memory (torch's FakeTensorMode), in the
script's own forward, bfloat16 autocast included; the rest is arithmetic that stands below. What a GPU needs
besides (its context, NCCL, fragmentation: 1 to 3 GiB) is left out. No GPU was at hand: the check runs on a
CPU, where the peak is the sum of all live tensors' storages, looked at after every operation of a step."""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import common

GIB = 2**30
QWEN = dict(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, model_type="qwen2")
MODELS = {
    "0.5B": QWEN
    | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "1.5B": QWEN
    | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "8B": dict(model_type="llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336)
    | dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
}
SMALL = {
    "12M": dict(model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=768)
    | dict(num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=512),
    "46M": dict(model_type="llama", vocab_size=16_384, hidden_size=512, intermediate_size=1536)
    | dict(num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=512),
}
PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "reference",
    "reward model",
    "gathered",
    "activations",
    "logits",
)
PARTS += ("bf16 copy", "cache")
# cards, memory of each, models, flags: rows of the table
CASES = [(1, 24, "0.5B", True), (1, 80, "0.5B", False), (1, 80, "1.5B", True), (1, 80, "8B", True)]
CASES += [(cards, 80, size, True) for size in MODELS for cards in (8, 64)]


# ---------------------------------------------------------------- the calculator
def fake(shape, layers, kind="CausalLM"):
    """A model of that shape without memory."""
    config = transformers.AutoConfig.for_model(
        **shape | dict(num_hidden_layers=layers, num_labels=1)
    )
    return (
        getattr(transformers, f"AutoModelFor{kind}")
        .from_config(config, attn_implementation="sdpa")
        .train()
    )


def count(shape, layers, kind="CausalLM"):
    with FakeTensorMode():
        return sum(p.numel() for p in fake(shape, layers, kind).parameters())


def saved_bytes(shape, layers, rows, length):
    """What a forward keeps for its backward pass -> bytes of activations, of weights' bfloat16 copies."""
    kept = {}

    def pack(x):
        kept[id(x.untyped_storage())] = x, x.untyped_storage()
        return x

    with FakeTensorMode():
        model = fake(shape, layers)
        sizes = {p.shape[::-1] for p in model.parameters()} | {p.shape for p in model.parameters()}
        weights = {id(p.untyped_storage()) for p in model.parameters()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        # (transformers looks whether anything is padded, which a tensor without memory cannot say: a mask)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model.base_model(ids, attention_mask=mask, use_cache=False)
        found = [(x, s.nbytes()) for key, (x, s) in kept.items() if key not in weights]
        copies = sum(n for x, n in found if x.shape in sizes and x.dtype == torch.bfloat16)
        return sum(n for _, n in found) - copies, copies


def memory(shape, cards, size, rows, length, new, batch, checkpointing):
    """Bytes on each card, by part, in the sampling and in the training phase of a step of ppo.py, all models
    split. size: a card's memory, in bytes.

    rows x length: a micro-batch, whose last `new` columns are completion; batch: completions of a step."""
    rows = min(rows, -(-batch // cards))
    layers, hidden, vocab = (shape[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    one, two = (saved_bytes(shape, n, rows, length) for n in (1, 2))
    layer, copies = (b - a for a, b in zip(one, two))  # of one layer
    outside = one[0] - layer
    policy, scorer = count(shape, layers), count(shape, layers, "SequenceClassification")
    block, head, tokens = policy - count(shape, layers - 1), vocab * hidden, rows * length
    root = policy - layers * block  # embedding, last norm, head
    parts = Counter()
    # policy and value model: float32 weights, gradients, and Adam's two moments
    parts["weights"], parts["gradients"], parts["optimiser"] = (
        n * (policy + scorer) / cards for n in (4, 4, 8)
    )
    parts["reference"], parts["reward model"] = 4 * policy / cards, 4 * scorer / cards
    # the head's gradient is there, whole, before it is added to that of earlier micro-batches
    parts["gradients"] += 4 * head
    # FSDP: what lies outside the layers, two layers (one comes while the other computes), a layer's gradient
    # whole and as it is sent
    parts["gathered"] = (4 * root + 16 * block) * (cards > 1)
    parts["activations"] = outside + layers * (layer + copies)
    if checkpointing:  # the input of each layer, and one layer computed again
        parts["activations"] = outside + layers * 4 * tokens * hidden + layer + copies
    # the head and its gradient in bfloat16; two chunks of logits, or all of them, four times
    logits = rows * new * vocab
    parts["logits"] = 4 * head + (8 * common.CHUNK if logits > common.CHUNK else 16 * logits)
    sampling = Counter({k: parts[k] for k in ("weights", "optimiser", "reference", "reward model")})
    copy = 2 * (policy - head)  # of what is no embedding, for all steps
    width = shape.get("num_key_value_heads", shape["num_attention_heads"])
    width *= hidden // shape["num_attention_heads"]
    together = min(-(-batch // cards), 512)  # rows of a wave
    cache = (4 * layers * width * length + 32 * vocab) * together
    sampling["cache"] = min(cache, size / 4)  # more goes in waves
    if (
        cards == 1 or 6 * policy + size / 4 < size - sum(sampling.values()) + sampling["cache"]
    ):  # common.gathered
        sampling["gathered"], sampling["bf16 copy"] = 4 * policy * (cards > 1), copy
    else:
        sampling["gathered"] = 4 * root + 8 * block
    return sampling, parts


def table(tokens, length, new, batch):
    print(
        f"\nppo.py, --micro-batch-tokens {tokens}, sequences of {length} tokens, {batch} completions a step;"
    )
    print("GiB on each card, in the phase that takes more\n")
    print("| model | cards | flags | phase | " + " | ".join(PARTS) + " | together |")
    print("|---" * (len(PARTS) + 5) + "|")
    for cards, size, name, checkpointing in sorted(
        CASES, key=lambda c: (list(MODELS).index(c[2]), c[0], c[1])
    ):
        flags, budget = (
            ["--shard full"] * (cards > 1) + ["--gradient-checkpointing"] * checkpointing,
            tokens,
        )
        if size < 40:
            budget = 4096
            flags.append(f"--micro-batch-tokens {budget}")
        sizes = size * GIB, max(1, budget // length), length, new, batch
        phases = memory(MODELS[name], cards, *sizes, checkpointing)
        worst = max(phases, key=lambda parts: sum(parts.values()))
        whole, phase = sum(worst.values()) / GIB, "training" if worst is phases[1] else "sampling"
        if cards > 1 and not phases[0]["bf16 copy"]:
            phase += (
                ", layer by layer" if phase == "sampling" else " (sampling goes layer by layer)"
            )
        numbers = " | ".join(f"{worst[p] / GIB:.1f}" if worst[p] else "" for p in PARTS)
        fits = "" if whole < 0.92 * size else " (does not fit)"
        print(
            f"| {name} | {cards} x {size} GB | {' '.join(flags)} | {phase} | {numbers} | {whole:.1f}{fits} |"
        )


def communication():
    """Where gathering parameters takes longer than computing with them, from data sheets, not measured."""
    flops, links = (
        0.35 * 989e12,
        {"NVLink, 450 GB/s a card": 450e9, "400 Gb/s a card between machines": 50e9},
    )
    print(
        "\nAn update sends 12 bytes a parameter and micro-batch (float32: gathered twice, its gradient once)"
    )
    print(
        "and computes 8 FLOPs a parameter and token (with checkpointing), at 35% of an H100's bfloat16 rate:"
    )
    for name, rate in links.items():
        print(
            f"- {name}: sending takes as long as computing at {12 / rate * flops / 8:,.0f} tokens"
        )


# ---------------------------------------------------------------- the check
class Peak(TorchDispatchMode):
    """The most bytes that live tensors' storages have held after any operation, earlier ones included."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes = weakref.WeakSet(), 0
        for x in gc.get_objects():
            if isinstance(x, torch.Tensor):
                self.see(x)

    def see(self, x):
        if isinstance(x, DTensor):
            x = x._local_tensor
        if isinstance(x, torch.Tensor):
            self.storages.add(x.untyped_storage())

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        torch.utils._pytree.tree_map(self.see, (args, result))
        self.bytes = max(self.bytes, sum(s.nbytes() for s in self.storages))
        return result


def child(name, folder, checkpointing):
    """Two steps of ppo.py, the second of them watched."""
    import ppo

    torch.set_num_threads(1)
    log, peak = ppo.Run.log, []

    def after(run, *args, **kwargs):
        log(run, *args, **kwargs)
        if peak:
            peak[0].__exit__(None, None, None)
        else:
            peak.append(Peak())
            peak[0].__enter__()

    ppo.Run.log = after
    sample, sampling = ppo.sample, []

    def watched(*args):
        result = sample(*args)
        if peak:
            sampling.append(peak[0].bytes)
            peak[0].bytes = 0
        return result

    ppo.sample = watched
    flags = dict(
        model=f"{folder}/{name}",
        reward=f"{folder}/{name} reward",
        output_dir=f"{folder}/run {name}",
    )
    flags |= dict(
        steps=2,
        prompts_per_step=32,
        max_completion_length=64,
        micro_batch_tokens=1024,
        shard="full",
    )
    flags |= dict(
        dtype="bfloat16", save_every=0, eval_every=0, dataset=f"{folder}/rows.jsonl", overwrite=True
    )
    flags |= dict(gradient_checkpointing=checkpointing, update_epochs=1)
    ppo.main(ppo.Args(**flags, num_generations=1))
    if common.rank() == 0:
        print("PEAK", sampling[0], peak[0].bytes, file=sys.stderr)


def check():
    print("| model | processes | flags | phase | sum, MiB | measured, MiB | ratio |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = common.tiny_tokenizer()
        prompt = "abcdefgh" * 8
        length = len(tokenizer(prompt).input_ids) + 64
        Path(folder, "rows.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        for name, shape in SMALL.items():
            ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
            config = transformers.AutoConfig.for_model(**shape | ids)
            for kind in ("CausalLM", "SequenceClassification"):
                config.num_labels = 1
                model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
                path = Path(folder, name + " reward" * (kind != "CausalLM"))
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)
            for processes in (1, 2):
                for checkpointing in (False, True):
                    start = [
                        "-m",
                        "torch.distributed.run",
                        "--standalone",
                        f"--nproc-per-node={processes}",
                    ]
                    command = [
                        sys.executable,
                        *(start if processes > 1 else []),
                        __file__,
                        "--child",
                        name,
                    ]
                    command += [folder, str(int(checkpointing))]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if "PEAK" not in done.stderr:
                        sys.exit(done.stderr[-3000:])
                    measured = map(int, done.stderr.rpartition("PEAK ")[2].split()[:2])
                    sizes = 4 * 2**34, 1024 // length, length, 64, 32
                    flags = "--gradient-checkpointing" if checkpointing else ""
                    phases = memory(shape, processes, *sizes, checkpointing)
                    for phase, parts, real in zip(("sampling", "training"), phases, measured):
                        if os.environ.get("PARTS"):
                            print({k: round(v / 2**20) for k, v in parts.items()})
                        total = sum(parts.values())
                        numbers = f"{total / 2**20:.0f} | {real / 2**20:.0f} | {total / real:.2f}"
                        print(
                            f"| {name} | {processes} | {flags} | {phase} | {numbers} |", flush=True
                        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.child:
        return child(args.child[0], args.child[1], bool(int(args.child[2])))
    if args.check:
        return check()
    table(16_384, 768, 512, 512)
    communication()


if __name__ == "__main__":
    main()
