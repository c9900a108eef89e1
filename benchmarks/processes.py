"""Seconds of a GRPO step on several processes, and of its sampling by each way to reach split weights.

    python benchmarks/processes.py           two CPU cores: 1 and 2 processes of one thread (two minutes)

The model and rows of speed.py's smallest case: a Llama of 4 layers, 1M parameters; 8 prompts x 8 completions
of at most 32 tokens, no EOS. "full" splits it (FSDP2) and gathers it once for a rollout; "layers" gathers
layer by layer at every step of sampling, as where a GPU has no room for the whole. gloo on one machine says
how much the ways differ, not how a network of GPUs would do."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WAYS = [(1, "none"), (2, "none"), (2, "full"), (2, "layers")]
REPEATS, STEPS = 3, 12


def child(folder, way):
    import torch

    import common
    import grpo

    torch.set_num_threads(1)
    common.SMALL_BATCH = 10**9  # no way shares prompts: split models never do
    if way == "layers":
        common.gathered = contextlib.contextmanager(lambda model: (yield False))
    flags = dict(
        model=f"{folder}/model", dataset=f"{folder}/rows.jsonl", output_dir=f"{folder}/run"
    )
    flags |= dict(reward=f"{__file__}:length", prompts_per_step=8, num_generations=8, steps=STEPS)
    flags |= dict(
        max_completion_length=32, shard="none" if way == "none" else "full", overwrite=True
    )
    grpo.main(grpo.Args(**flags, kl_coef=0.04, save_every=0))


def length(prompts, completions, rows):
    """Any reward will do."""
    return [float(len(text)) for text in completions]


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    import torch
    import transformers

    import common

    os.environ["OMP_NUM_THREADS"] = "1"
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        shape = dict(
            hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
        )
        ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=256)
        config = transformers.LlamaConfig(vocab_size=1024, tie_word_embeddings=True, **shape, **ids)
        transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
        common.tiny_tokenizer().save_pretrained(f"{folder}/model")
        rows = [json.dumps({"prompt": "abcdefgh"[i:] * 4 + "abcdefgh"[:i] * 4}) for i in range(8)]
        Path(folder, "rows.jsonl").write_text("\n".join(rows))
        for _ in range(REPEATS):
            for processes, way in WAYS:
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
                    folder,
                    way,
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
                steps = [json.loads(line) for line in lines][2:]
                sampling, training = (
                    [row[f"seconds/{k}"] for row in steps] for k in ("sample", "train")
                )
                found[processes, way].append((statistics.mean(sampling), statistics.mean(training)))
    print("| processes | --shard | sampling, s | the rest of a step, s |\n|---|---|---|---|")
    for (processes, way), runs in found.items():
        columns = [f"{statistics.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in zip(*runs)]
        name = "full, layer by layer" if way == "layers" else way
        print(f"| {processes} | {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
