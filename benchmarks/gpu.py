"""Steps of each script on a GPU, on a model of a real one's shape with random weights: seconds and
peak memory, one JSON line a script.

    python benchmarks/gpu.py                   Qwen2.5-0.5B's shape, prompts of 256 tokens,
                                               completions of 512, bfloat16 autocast
    python benchmarks/gpu.py --shape 1.5B      with --gradient-checkpointing
    python benchmarks/gpu.py --shape tiny      2 layers, on a CPU too: only to see that it runs
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from memory import MODELS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402

SHAPES = MODELS | {
    "tiny": MODELS["0.5B"]
    | dict(vocab_size=512, hidden_size=56, intermediate_size=64, num_hidden_layers=2)
}
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


def write_data(folder, prompt_length, completion_length):
    """A model's worth of letters: prompts, answers and pairs of those lengths."""
    letters = torch.randint(97, 123, (64, 2 * completion_length + prompt_length)).tolist()
    texts = ["".join(map(chr, row)) for row in letters]
    with open(folder / "rows.jsonl", "w") as file:
        for text in texts:
            row = {
                "prompt": text[:prompt_length],
                "chosen": text[prompt_length : prompt_length + completion_length],
                "rejected": text[prompt_length + completion_length :],
            }
            file.write(json.dumps(row | {"completion": row["chosen"]}) + "\n")


def flags_of(name, folder, args, completion_length):
    """The flags of two steps of a script."""
    flags = {
        "--model": folder / "model",
        "--dataset": folder / "rows.jsonl",
        "--output-dir": folder / name,
        "--dtype": "bfloat16",
        "--eval-every": 0,
    }
    if name in ("sft", "reward_model", "dpo"):
        flags |= {"--steps": 3, "--batch-size": 32, "--max-length": 2048}
    else:
        flags |= {
            "--reward": folder / "reward",
            "--max-completion-length": completion_length,
        }
    if name in ("ppo", "rloo", "grpo"):
        group = 1 if name == "ppo" else 8
        flags |= {
            "--steps": 2,
            "--prompts-per-step": args.completions // group,
            "--num-generations": group,
            "--kl-coef": 0.05,
        }
    if name == "ppo":
        flags |= {"--update-epochs": 1}
    if name == "rejection_sampling":
        flags |= {"--prompts-per-iteration": 32, "--iterations": 1, "--batch-size": 16}
    words = [str(word) for pair in flags.items() for word in pair]
    return words + ["--gradient-checkpointing"] * (args.shape == "1.5B")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5B")
    parser.add_argument("--scripts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--completions", type=int, default=128)
    args = parser.parse_args()
    if args.shape != "tiny" and not torch.cuda.is_available():
        sys.exit("no GPU here: --shape tiny runs the same path on the CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    prompt_length, completion_length = (32, 16) if args.shape == "tiny" else (256, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(1)
        write_data(folder, prompt_length, completion_length)
        tokenizer = sft.tiny_tokenizer()
        tokenizer.model_max_length = 2048
        config = transformers.AutoConfig.for_model(
            **SHAPES[args.shape], num_labels=1, pad_token_id=0, eos_token_id=1, bos_token_id=None
        )
        for kind, path in [("CausalLM", "model"), ("SequenceClassification", "reward")]:
            # (made on the GPU: random weights take a CPU a while)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
            model.to(torch.bfloat16).save_pretrained(folder / path)
            tokenizer.save_pretrained(folder / path)
            del model
        torch.cuda.empty_cache()
        for name in args.scripts:
            flags = flags_of(name, folder, args, completion_length)
            command = [sys.executable, ROOT / f"{name}.py", *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(json.dumps({"script": name, "error": done.stderr[-1500:]}), flush=True)
                continue
            lines = (folder / name / "metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])
            row = {"script": name, "shape": args.shape, "device": device}
            row |= {key: round(last[key], 4) for key in SHOWN if key in last}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
