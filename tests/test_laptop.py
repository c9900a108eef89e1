"""The laptop run as a stranger types it: the whole chain must learn what README says."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from laptop import run  # noqa: E402


@pytest.mark.slow
def test_the_chain_learns(tmp_path):
    """SFT ends between 25% and 50%, the reward model at 90% or more, PPO 20 points above SFT."""
    row = run(1, tmp_path)
    assert 0.25 <= row["sft gold"] <= 0.5 and 0.25 <= row["sft gold_greedy"] <= 0.5
    assert row["reward_model accuracy"] >= 0.9
    assert row["ppo gold"] >= row["sft gold"] + 0.2
    assert row["ppo gold_greedy"] >= row["sft gold_greedy"] + 0.2
