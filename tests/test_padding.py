"""The share of padding that every script logs."""

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
    """Make one step of a script on the built-in task and return the padding that it logs."""
    script = (OFFLINE | ONLINE)[name]
    flags = {"model": model, "output_dir": str(folder), "micro_batch_tokens": budget, "steps": 1}
    if name in OFFLINE:
        flags |= {"batch_size": 16}
    else:
        reward = folder.with_suffix(".py")  # unequal, so no completion is skipped
        reward.write_text(
            "def score(prompts, texts, rows): return [i % 2 for i in range(len(rows))]"
        )
        flags |= {"reward": f"{reward}:score", "num_generations": 2, "max_completion_length": 8}
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
    """The share of padding in the micro-batches that are computed with gradient.

    It is 0 if every row has a micro-batch of its own, except for the two texts of a pair."""
    task_rows = {"sft": 32, "pairs": 32, "prompts": 32, "held out": 4}
    monkeypatch.setattr(common, "TASK_ROWS", task_rows)
    masks = []
    take = common.take

    def spy(batch, rows):
        micro_batch = take(batch, rows)
        if torch.is_grad_enabled():
            masks.append(micro_batch["attention_mask"])
        return micro_batch

    monkeypatch.setattr(common, "take", spy)
    paddings = []
    for budget in (1, 10**6):
        masks.clear()
        paddings.append(run_one_step(name, tiny_dirs["llama"], tmp_path / str(budget), budget))
        num_computed = sum(mask.numel() for mask in masks)
        num_tokens = sum(int(mask.sum()) for mask in masks)
        assert paddings[-1] == pytest.approx(1 - num_tokens / num_computed, abs=1e-6)
    row_by_row, together = paddings
    assert row_by_row < together - 0.05
    if name not in PAIRS:
        assert row_by_row == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("median, spread", [(96, 0.25), (322, 0.37)])
def test_padding_of_text_is_about_a_twentieth_at_most(median, spread, monkeypatch):
    """Batches of 32 and 512 rows with log-normal lengths, as of stories or GSM8K solutions."""
    rng = torch.Generator().manual_seed(1)
    lengths = (median * (spread * torch.randn(2048, generator=rng)).exp()).long().tolist()
    for size, small, most in ((32, 0, 0.05), (32, 512, 0.06), (512, 512, 0.04)):
        monkeypatch.setattr(common, "SMALL_BATCH", small)
        num_computed = 0
        for first in range(0, len(lengths), size):
            mask = common.pad_rows([[1] * n for n in lengths[first : first + size]], CPU)
            for micro_batch in common.micro_batches({"attention_mask": mask}, 4096):
                num_computed += micro_batch["attention_mask"].numel()
        assert 0 < 1 - sum(lengths) / num_computed < most
