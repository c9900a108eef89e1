"""The share of padded tokens that every script logs, and how small it is."""

import json

import pytest
import torch
from conftest import CPU

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

OFFLINE = {"sft": sft, "reward_model": reward_model, "dpo": dpo}
ONLINE = {"rejection_sampling": rejection_sampling, "ppo": ppo, "rloo": rloo, "grpo": grpo}
PAIRS = ("reward_model", "dpo")


def run_one_step(name, model, folder, budget):
    """One update of a script on the built-in task -> the padding that it logs."""
    script = (OFFLINE | ONLINE)[name]
    flags = {"model": model, "output_dir": str(folder), "micro_batch_tokens": budget, "steps": 1}
    if name in OFFLINE:
        flags |= {"batch_size": 16}
    else:
        flags |= {"reward": "sort", "num_generations": 2, "max_completion_length": 8}
    if name == "rejection_sampling":
        flags |= {"prompts_per_iteration": 16}
    elif name in ONLINE:
        flags |= {"prompts_per_step": 8, "update_epochs": 2, "num_minibatches": 2}
    script.main(script.Args(**flags))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [padding] = [row["padding"] for row in rows if "padding" in row]
    return padding


@pytest.mark.parametrize("name", OFFLINE | ONLINE)
def test_padding_is_the_share_of_what_the_update_computed(name, tiny_dirs, tmp_path, monkeypatch):
    """Counted from the micro-batches that were made with gradients on; 0 where each row stands
    alone (the two texts of a pair stand together); below a tenth where the budget is not what
    cuts."""
    monkeypatch.setattr(common, "TASK_ROWS", {"sft": 32, "pairs": 32, "prompt": 32, "held out": 4})
    masks = []
    take = common.take

    def spy(batch, rows):
        micro_batch = take(batch, rows)
        if torch.is_grad_enabled():
            masks.append(micro_batch["attention_mask"])
        return micro_batch

    monkeypatch.setattr(common, "take", spy)
    paddings = {}
    for cut, budget, small in (
        ("alone", 1, 0),
        ("even", 10**6, 0),
        ("together", 10**6, 10**9),
    ):
        masks.clear()
        monkeypatch.setattr(common, "SMALL_BATCH", small)
        paddings[cut] = run_one_step(name, tiny_dirs["llama"], tmp_path / cut, budget)
        padded_tokens = sum(mask.numel() for mask in masks)
        tokens = sum(int(mask.sum()) for mask in masks)
        assert paddings[cut] == pytest.approx(1 - tokens / padded_tokens, abs=1e-6)
    if name not in PAIRS:
        assert paddings["alone"] == pytest.approx(0, abs=1e-6)
    assert paddings["even"] < paddings["together"]
    assert paddings["even"] < paddings["alone"] + 0.1


@pytest.mark.parametrize("median, spread", [(96, 0.25), (322, 0.37)])
def test_padding_of_text_is_about_a_twentieth_at_most(median, spread, monkeypatch):
    """Lengths of texts are about log-normal: here those of short stories, and of GSM8K's questions
    and answers. Batches of 32 and of 512 rows, one after another; a few tokens in a batch of 32 are
    a small micro-batch, which may be uneven."""
    rng = torch.Generator().manual_seed(1)
    lengths = (median * (spread * torch.randn(2048, generator=rng)).exp()).long().tolist()
    for size, small, most in ((32, 0, 0.05), (32, 512, 0.06), (512, 512, 0.04)):
        monkeypatch.setattr(common, "SMALL_BATCH", small)
        padded_tokens = 0
        for first in range(0, len(lengths), size):
            masks = common.pad_rows([[1] * n for n in lengths[first : first + size]], CPU)
            for micro_batch in common.micro_batches({"attention_mask": masks}, 4096):
                padded_tokens += micro_batch["attention_mask"].numel()
        padding = 1 - sum(lengths) / padded_tokens
        assert 0 < padding < most
