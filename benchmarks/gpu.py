"""Seconds and peak memory of a step of each script on a GPU, one JSON line per script.

python benchmarks/gpu.py                   Qwen2.5-0.5B's shape with random weights, prompts of
                                           256 tokens, completions of 512, bfloat16 compute
python benchmarks/gpu.py --shape 1.5B      with --gradient-checkpointing
python benchmarks/gpu.py --shape tiny      2 layers, on a GPU or CPU: a test run
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from helpers import ROOT, make_parser, read_lines, write_lines
from memory import MODELS

import sft

TINY = dict(vocab_size=512, hidden_size=56, intermediate_size=64, num_hidden_layers=2)
SHAPES = MODELS | {"tiny": MODELS["0.5B"] | TINY}
NAMES = ["sft", "reward_model", "dpo", "ppo", "rloo", "grpo", "rejection_sampling"]
SHOWN = [
    "tokens_per_second",
    "seconds/sample",
    "seconds/train",
    "peak_memory_gib",
    "completion_length",
    "ratio_max_dev",
    "padding",
]


def save_model(folder, shape):
    """Save a policy and a reward model with random weights."""
    tokenizer = sft.tiny_tokenizer()
    tokenizer.model_max_length = 2048
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = transformers.AutoConfig.for_model(**SHAPES[shape], **ids, num_labels=1)
    for kind, path in [("CausalLM", "model"), ("SequenceClassification", "reward")]:
        # random weights are slow to draw on a CPU
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        model.to(torch.bfloat16).save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
        del model
    torch.cuda.empty_cache()


def write_data(folder, prompt_length, completion_length):
    """Write 64 rows of random letters, one token each: prompts, completions and pairs."""
    rows = []
    end = prompt_length + completion_length
    for codes in torch.randint(97, 123, (64, end + completion_length)).tolist():
        text = "".join(map(chr, codes))
        chosen = text[prompt_length:end]
        row = {"prompt": text[:prompt_length], "chosen": chosen, "rejected": text[end:]}
        rows.append(row | {"completion": chosen})
    write_lines(folder / "rows.jsonl", rows)


def flags_of(name, folder, args, completion_length):
    """Flags for two or three steps of a script."""
    flags = {
        "--model": folder / "model",
        "--dataset": folder / "rows.jsonl",
        "--output-dir": folder / name,
        "--dtype": "bfloat16",
    }
    if name in ("sft", "reward_model", "dpo"):
        flags |= {"--steps": 3, "--batch-size": 32, "--max-length": 2048}
    else:
        flags |= {"--reward": folder / "reward", "--max-completion-length": completion_length}
    if name in ("ppo", "rloo", "grpo"):
        group_size = 1 if name == "ppo" else 8
        flags |= {
            "--steps": 2,
            "--prompts-per-step": args.completions // group_size,
            "--num-generations": group_size,
            "--kl-coef": 0.05,
        }
    if name == "ppo":
        flags |= {"--update-epochs": 1}
    if name == "rejection_sampling":
        flags |= {"--prompts-per-iteration": 32, "--batch-size": 16}
    words = [str(word) for pair in flags.items() for word in pair]
    return words + ["--gradient-checkpointing"] * (args.shape == "1.5B")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5B")
    parser.add_argument("--scripts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--completions", type=int, default=128)
    args = parser.parse_args()
    if args.shape != "tiny" and not torch.cuda.is_available():
        sys.exit("error: no GPU; --shape tiny also runs on a CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    prompt_length, completion_length = (32, 16) if args.shape == "tiny" else (256, 512)
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, args.shape)
        write_data(folder, prompt_length, completion_length)
        for script in args.scripts:
            row = {"script": script, "shape": args.shape, "device": device}
            flags = flags_of(script, folder, args, completion_length)
            command = [sys.executable, ROOT / f"{script}.py", *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                row["error"] = done.stderr[-1500:]
            else:
                last = read_lines(folder / script / "metrics.jsonl")[-1]
                row |= {name: round(last[name], 4) for name in SHOWN if name in last}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
