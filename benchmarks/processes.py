"""Seconds of a GRPO step on one process, and on two that split the models between them (FSDP2).

    python benchmarks/processes.py           two CPU cores, a process on each (two minutes)
    python benchmarks/processes.py --repeats 1 --steps 4      to see that it runs

The model and rows of speed.py's smallest case: a Llama of 4 layers, 1M parameters; 8 prompts x 8
completions of at most 32 tokens, no EOS. gloo on one machine says what the messages cost there, not
how a network of GPUs would do."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def length(prompts, completions, rows):
    """Any reward will do."""
    return [float(len(text)) for text in completions]


def child(folder, steps):
    """One process of a run."""
    import torch

    import grpo

    torch.set_num_threads(1)
    grpo.main(
        grpo.Args(
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
    )


def make_start(folder):
    """Model, tokenizer and prompts."""
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
    rows = [json.dumps({"prompt": letters[i:] * 4 + letters[:i] * 4}) for i in range(8)]
    Path(folder, "rows.jsonl").write_text("\n".join(rows))


def run(folder, processes, steps):
    """One run -> mean seconds of sampling, and of the rest of a step; the first two steps warm
    up."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    command += [__file__, "--child", folder, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()[2:]
    metrics = [json.loads(line) for line in lines]
    sampling = statistics.mean(row["seconds/sample"] for row in metrics)
    training = statistics.mean(row["seconds/train"] for row in metrics)
    return sampling, training


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    print("| processes | sampling, s | the rest of a step, s |\n|---|---|---|")
    for processes, runs in seconds.items():
        columns = [f"{statistics.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in zip(*runs)]
        print(f"| {processes} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
