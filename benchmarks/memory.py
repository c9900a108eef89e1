"""GPU memory of a step of ppo.py with a learned reward, by part, and a check against measurements.

    python benchmarks/memory.py            the table of docs/scale.md: half a minute
    python benchmarks/memory.py --check    computed and measured peaks of small models, on 1 and 2
                                           processes: five minutes
    python benchmarks/memory.py --check --models 12M --processes 1

Parameters are counted and activations traced on models without memory (torch's FakeTensorMode), in
the forward pass of the scripts under bfloat16 autocast. The rest is arithmetic. The CUDA context,
NCCL and fragmentation (1 to 3 GiB) are not included. The check runs on a CPU: the peak is the
largest sum of the storages of all live tensors after any operation of a step."""

import argparse
import gc
import itertools
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path

import torch
import transformers
from helpers import make_parser, print_header, print_row, write_lines
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import common
import sft

GIB = 2**30
MODELS = {
    "0.5B": dict(
        model_type="qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "1.5B": dict(
        model_type="qwen2",
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "8B": dict(
        model_type="llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
SMALL = {
    "12M": dict(
        model_type="llama",
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "46M": dict(
        model_type="llama",
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
    ),
    "135M": dict(  # SmolLM2-135M
        model_type="llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}
PARTS = [
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "reward model",
    "gathered",
    "activations",
    "logits",
    "bf16 copy",
    "cache",
]
# rows of the table: model, cards, GB of each, --gradient-checkpointing
CASES = [
    ("0.5B", 1, 24, True),
    ("0.5B", 1, 80, False),
    ("0.5B", 8, 80, True),
    ("0.5B", 64, 80, True),
    ("1.5B", 1, 80, True),
    ("1.5B", 8, 80, True),
    ("1.5B", 64, 80, True),
    ("8B", 1, 80, True),
    ("8B", 8, 80, True),
    ("8B", 16, 80, True),
    ("8B", 64, 80, True),
]
CHUNK = 40_000_000  # logits of a chunk of the head, as in token_logprobs_and_entropy
SAMPLED_TOKENS = 262_144  # common.TOKEN_BUDGET on a GPU


# ---------------------------------------------------------------- computed
def fake(shape, layers, kind="CausalLM"):
    """A model without memory."""
    sizes = dict(num_hidden_layers=layers, num_labels=1)
    config = transformers.AutoConfig.for_model(**shape | sizes)
    Model = getattr(transformers, f"AutoModelFor{kind}")
    return Model.from_config(config, attn_implementation="sdpa").eval()


def count(shape, layers, kind="CausalLM"):
    """Number of parameters."""
    with FakeTensorMode():
        return sum(p.numel() for p in fake(shape, layers, kind).parameters())


def saved_bytes(shape, layers, rows, length):
    """Bytes kept for the backward pass: activations, and bfloat16 copies of weights."""
    kept = {}

    def pack(x):
        kept[id(x.untyped_storage())] = x, x.untyped_storage()
        return x

    with FakeTensorMode():
        model = fake(shape, layers)
        sizes = {p.shape[::-1] for p in model.parameters()} | {p.shape for p in model.parameters()}
        weights = {id(p.untyped_storage()) for p in model.parameters()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        # transformers inspects a mask (B, T) for padding, and a tensor without memory has no values
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model.base_model(ids, attention_mask=mask, use_cache=False)
        found = [(x, s.nbytes()) for key, (x, s) in kept.items() if key not in weights]
        copies = sum(n for x, n in found if x.shape in sizes and x.dtype == torch.bfloat16)
        return sum(n for _, n in found) - copies, copies


def memory(shape, *, cards, rows, length, new, batch, checkpointing):
    """Bytes on each card, by part: in the sampling phase, and in the training phase of a step.

    A micro-batch has rows x length tokens, the last `new` columns are the completion. batch is the
    number of completions per step."""
    layers = shape["num_hidden_layers"]
    hidden = shape["hidden_size"]
    vocab = shape["vocab_size"]
    heads = shape["num_attention_heads"]
    rows = min(rows, math.ceil(batch / cards))
    policy = count(shape, layers)
    scorer = count(shape, layers, "SequenceClassification")
    block = policy - count(shape, layers - 1)
    head = vocab * hidden
    root = policy - layers * block  # embedding, last norm, head

    # both phases: Adam has two moments for policy and value model
    sampling = Counter()
    sampling["weights"] = 4 * (policy + scorer) / cards
    sampling["optimizer"] = 8 * (policy + scorer) / cards
    sampling["reference"] = 4 * policy / cards
    sampling["reward model"] = 4 * scorer / cards
    training = Counter(sampling)

    # sampling: the whole policy on each card, and autocast's copy of all weights but embeddings
    sampled_rows = min(math.ceil(batch / cards), max(1, SAMPLED_TOKENS // length))  # at a time
    width = shape.get("num_key_value_heads", heads) * hidden // heads
    sampling["gathered"] = 4 * policy * (cards > 1)
    sampling["bf16 copy"] = 2 * (policy - (0 if shape.get("tie_word_embeddings") else head))
    # float32 keys (after the rotary embedding), bfloat16 values; softmax and CDF of one token
    sampling["cache"] = (6 * layers * width * length + 32 * vocab) * sampled_rows

    # training: the head's gradient exists twice while micro-batches are accumulated
    training["gradients"] = 4 * (policy + scorer) / cards + 4 * head
    # FSDP: root weights, two layers (one is prefetched), a layer's gradient before and after its
    # copy to the communication buffer
    training["gathered"] = (4 * root + 16 * block) * (cards > 1)
    one, two = (saved_bytes(shape, n, rows, length) for n in (1, 2))
    layer, copies = (b - a for a, b in zip(one, two))  # of one layer
    outside = one[0] - layer
    training["activations"] = outside + layers * (layer + copies)
    if checkpointing:  # the input of each layer, and one recomputed layer
        training["activations"] = outside + 4 * layers * rows * length * hidden + layer + copies
    # the head and its gradient in bfloat16; four copies of the logits of a chunk
    training["logits"] = 4 * head + 16 * min(rows * new * vocab, CHUNK)
    return sampling, training


def table(tokens, length, new, batch):
    """Print the phase that needs more memory, for each of CASES."""
    print(f"\nppo.py, --micro-batch-tokens {tokens}, sequences of {length} tokens, {batch}")
    print("completions per step; GiB on each card in the phase that needs more")
    print_header(["model", "cards", "flags", "phase", *PARTS, "total"])
    for name, cards, size, checkpointing in CASES:
        flags = ["--gradient-checkpointing"] if checkpointing else []
        budget = tokens
        if size < 40:
            budget = 4096
            flags.append(f"--micro-batch-tokens {budget}")
        sampling, training = memory(
            MODELS[name],
            cards=cards,
            rows=max(1, budget // length),
            length=length,
            new=new,
            batch=batch,
            checkpointing=checkpointing,
        )
        phase, parts = "sampling", sampling
        if sum(training.values()) > sum(sampling.values()):
            phase, parts = "training", training
        total = sum(parts.values()) / GIB
        cells = [name, f"{cards} x {size} GB", " ".join(flags), phase]
        cells += [f"{parts[part] / GIB:.1f}" if parts[part] else "" for part in PARTS]
        cells.append(f"{total:.1f}" if total < 0.92 * size else f"{total:.1f} (does not fit)")
        print_row(cells)


def communication():
    """Print the micro-batch size at which communication takes as long as computation."""
    flops = 0.35 * 989e12
    links = {"NVLink, 450 GB/s per card": 450e9, "400 Gb/s per card between machines": 50e9}
    print(
        "\nAn update sends 12 bytes per parameter and micro-batch (float32 weights gathered twice,"
    )
    print(
        "the gradient once). It computes 8 FLOPs per parameter and token (with checkpointing), at"
    )
    print("35% of an H100's bfloat16 peak. From data sheets, communication takes as long")
    for name, rate in links.items():
        print(f"- with {name}: at {12 / rate * flops / 8:,.0f} tokens")


# ---------------------------------------------------------------- measured
class Peak(TorchDispatchMode):
    """Largest number of bytes of all live tensors after any operation."""

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakSet()
        self.bytes = 0
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


def child(folder, name, checkpointing):
    """Run two steps of ppo.py and print the peaks of the second."""
    import ppo

    torch.set_num_threads(1)
    log = ppo.Run.log
    sample = ppo.sample
    peak = None
    sampling_peak = 0

    def watched_log(run, step, *args, **kwargs):
        nonlocal peak
        log(run, step, *args, **kwargs)
        if step == 1:
            peak = Peak()
            peak.__enter__()
        else:
            peak.__exit__(None, None, None)

    def watched_sample(*args, **kwargs):
        nonlocal sampling_peak
        rollouts = sample(*args, **kwargs)
        if peak is not None:
            sampling_peak = peak.bytes
            peak.bytes = 0
        return rollouts

    ppo.Run.log = watched_log
    ppo.sample = watched_sample
    ppo.main(
        ppo.Args(
            model=f"{folder}/{name}",
            reward=f"{folder}/{name} reward",
            dataset=f"{folder}/rows.jsonl",
            output_dir=f"{folder}/run {name}",
            overwrite=True,
            steps=2,
            save_every=0,
            dtype="bfloat16",
            gradient_checkpointing=checkpointing,
            micro_batch_tokens=1024,
            prompts_per_step=32,
            num_generations=1,
            max_completion_length=64,
            update_epochs=1,
        )
    )
    if common.rank() == 0:
        print("PEAK", sampling_peak, peak.bytes, file=sys.stderr)


def save_models(folder, name, tokenizer):
    """Save a policy and a reward model with random weights."""
    config = transformers.AutoConfig.for_model(
        **SMALL[name],
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    for kind, path in [("CausalLM", name), ("SequenceClassification", f"{name} reward")]:
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        model.save_pretrained(Path(folder, path))
        tokenizer.save_pretrained(Path(folder, path))


def measure(folder, name, processes, checkpointing):
    """Peaks of sampling and of training in bytes, of a run in its own processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    command += [__file__, "--child", folder, name, str(int(checkpointing))]
    done = subprocess.run(command, capture_output=True, text=True)
    if "PEAK" not in done.stderr:
        sys.exit(done.stderr[-3000:])
    return map(int, done.stderr.rpartition("PEAK ")[2].split()[:2])


def check(names, numbers_of_processes):
    names_of_cells = "model", "processes", "flags", "phase", "computed, MiB", "measured, MiB"
    print_header([*names_of_cells, "ratio"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = sft.tiny_tokenizer()
        tokenizer.model_max_length = 512
        prompt = "abcdefgh" * 8
        write_lines(Path(folder, "rows.jsonl"), [{"prompt": prompt}])
        length = len(prompt) + 64
        for name in names:
            save_models(folder, name, tokenizer)
            for processes, checkpointing in itertools.product(numbers_of_processes, (False, True)):
                measured = measure(folder, name, processes, checkpointing)
                phases = memory(
                    SMALL[name],
                    cards=processes,
                    rows=1024 // length,
                    length=length,
                    new=64,
                    batch=32,
                    checkpointing=checkpointing,
                )
                flags = "--gradient-checkpointing" if checkpointing else ""
                for phase, parts, real in zip(("sampling", "training"), phases, measured):
                    total = sum(parts.values())
                    cells = [name, str(processes), flags, phase, f"{total / 2**20:.0f}"]
                    cells += [f"{real / 2**20:.0f}", f"{total / real:.2f}"]
                    print_row(cells)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.child:
        folder, name, checkpointing = args.child
        return child(folder, name, checkpointing == "1")
    if args.check:
        return check(args.models, args.processes)
    table(tokens=16_384, length=768, new=512, batch=512)
    communication()


if __name__ == "__main__":
    main()
