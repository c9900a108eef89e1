"""Seconds of a GRPO step on one process, and on two that shard the models (FSDP2).

    python benchmarks/processes.py                            two CPU cores: two minutes
    python benchmarks/processes.py --repeats 1 --steps 4      a test run

Model and rows are the smallest case of speed.py: a Llama with 4 layers and 1M parameters; 8 prompts
x 8 completions of at most 32 tokens. The processes communicate by gloo on one machine, so the
result does not transfer to a network of GPUs."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import (
    make_parser,
    median_and_range,
    print_header,
    print_row,
    read_lines,
    write_lines,
)


def length(prompts, completions, rows):
    """A reward that costs no time."""
    return [float(len(text)) for text in completions]


def child(folder, steps):
    """One process of a run."""
    import torch

    import grpo

    torch.set_num_threads(1)
    args = grpo.Args(
        model=f"{folder}/model",
        dataset=f"{folder}/rows.jsonl",
        reward=f"{__file__}:length",
        output_dir=f"{folder}/run",
        overwrite=True,
        steps=steps,
        save_every=0,
        prompts_per_step=8,
        num_generations=8,
        max_completion_length=32,
        kl_coef=0.04,
    )
    grpo.main(args)


def make_start(folder):
    """Save a model, its tokenizer and prompts."""
    import torch
    import transformers

    import sft

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    sft.tiny_tokenizer().save_pretrained(f"{folder}/model")
    letters = "abcdefgh"
    rows = [{"prompt": letters[i:] * 4 + letters[:i] * 4} for i in range(8)]
    write_lines(f"{folder}/rows.jsonl", rows)


def run(folder, processes, steps):
    """Mean seconds of sampling and of the rest of a step, without the first two steps."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    command += [__file__, "--child", folder, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    rows = read_lines(Path(folder, "run/metrics.jsonl"))[2:]
    sampling = statistics.mean(row["seconds/sample"] for row in rows)
    training = statistics.mean(row["seconds/train"] for row in rows)
    return sampling, training


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.steps)
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        make_start(folder)
        for _ in range(args.repeats):
            for processes, runs in seconds.items():
                runs.append(run(folder, processes, args.steps))
    print_header(["processes", "sampling, s", "rest of a step, s"])
    for processes, runs in seconds.items():
        print_row([str(processes), *map(median_and_range, zip(*runs))])


if __name__ == "__main__":
    main()
