"""The share of padded tokens that every script logs, and how small it is on real text."""

import json
from pathlib import Path

import pytest
import torch
from test_resume import SCRIPTS, run
from test_scripts import chain, metrics  # noqa: F401 (a fixture)

import common

SHARED = Path(__file__).parents[2] / "shared"
PAIRS = ("reward_model", "dpo")


@pytest.mark.parametrize("name", SCRIPTS)
def test_padding_is_the_share_of_what_the_update_computed(name, chain, tmp_path, monkeypatch):  # noqa: F811
    """Counted from the micro-batches that were made with gradients on; 0 where each row stands alone (the two
    texts of a pair stand together); below a tenth where the budget is not what cuts."""
    seen, where = [], (SCRIPTS[name], "pair_batch") if name in PAIRS else (common.Batch, "rows")
    make = getattr(*where)

    def spy(*args):
        batch = make(*args)
        if torch.is_grad_enabled():
            seen.append((batch.input_ids.numel(), sum(batch.lengths)))
        return batch

    monkeypatch.setattr(*where, spy)
    found = {}
    for budget, small in ((1, 0), (10**6, 0), (10**6, 10**9)):
        seen.clear()
        monkeypatch.setattr(common, "SMALL_BATCH", small)
        folder = tmp_path / f"{budget} {small}"
        run(name, chain, folder, micro_batch_tokens=budget, eval_every=0, steps=1)
        (padding,) = (row["padding"] for row in metrics(folder) if "padding" in row)
        padded, tokens = map(sum, zip(*seen))
        assert padding == pytest.approx(1 - tokens / padded)
        found[budget, small] = padding
    alone, even, together = found.values()
    assert alone == 0 or name in PAIRS
    assert alone <= even < together and even < alone + 0.1


@pytest.mark.parametrize("size", [32, 512])
@pytest.mark.parametrize("name, columns", [("stories_sft_train", 2), ("gsm8k_train", 2)])
def test_padding_of_real_text_is_below_a_twentieth(name, columns, size):
    """Batches of 32 and of 512 rows, one after another, in tokens of the stories model."""
    file = SHARED / "data" / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    tokenizer = common.load_tokenizer(str(SHARED / "models" / "stories260K"))
    rows = [json.loads(line) for line in file.read_text().splitlines()[:2016]]
    keys = [key for key in ("prompt", "question", "completion", "answer") if key in rows[0]]
    assert len(keys) == columns
    lengths = [
        len(ids) for ids in tokenizer(["".join(row[key] for key in keys) for row in rows]).input_ids
    ]
    padded = 0
    for first in range(0, len(rows), size):
        batch = lengths[first : first + size]
        padded += sum(
            len(cut) * max(batch[i] for i in cut) for cut in common.micro_batches(batch, 4096)
        )
    assert 0 < 1 - sum(lengths) / padded < 0.05
