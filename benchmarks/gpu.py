"""One step of each script on a model of a real architecture's shape with random weights: seconds
and peak memory.

    python benchmarks/gpu.py           Qwen2.5-0.5B's shape, bfloat16 autocast; needs a GPU
    python benchmarks/gpu.py --tiny    the same on a CPU, 2 layers: only to see that it runs
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402

SHAPE = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
SHAPE |= dict(
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6
)
TINY = SHAPE | dict(vocab_size=512, hidden_size=56, intermediate_size=64, num_hidden_layers=2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        sys.exit("no GPU here: --tiny runs the same path on the CPU")
    completion = "16" if tiny else "512"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(TINY if tiny else SHAPE)))
        model.generation_config.eos_token_id = 1
        model.save_pretrained(f"{folder}/model")
        sft.tiny_tokenizer().save_pretrained(f"{folder}/model")
        shared = ["--steps", "2", "--dtype", "bfloat16", "--eval-every", "0"]
        scored = ["--reward", f"{folder}/reward_model", "--max-completion-length", completion]
        group = [*scored, "--prompts-per-step", "8", "--num-generations", "8"]
        jobs = {
            "sft": ["--model", f"{folder}/model"],
            "reward_model": ["--model", f"{folder}/model"],
            "dpo": ["--model", f"{folder}/model"],
            "ppo": [
                "--model",
                f"{folder}/model",
                *scored,
                "--prompts-per-step",
                "64",
                "--update-epochs",
                "1",
            ],
            "rloo": ["--model", f"{folder}/model", *group],
            "grpo": ["--model", f"{folder}/model", *group],
            "rejection_sampling": [
                "--model",
                f"{folder}/model",
                *scored,
                "--prompts-per-iteration",
                "128",
            ],
        }
        for script, flags in jobs.items():
            command = [
                sys.executable,
                ROOT / f"{script}.py",
                *flags,
                *shared,
                "--output-dir",
                f"{folder}/{script}",
            ]
            subprocess.run(command, check=True)
            last = json.loads(Path(folder, script, "metrics.jsonl").read_text().splitlines()[-1])
            names = ("tokens_per_second", "seconds/sample", "seconds/train", "peak_memory_gib")
            print(script, {name: round(last[name], 2) for name in names if name in last})


if __name__ == "__main__":
    main()
