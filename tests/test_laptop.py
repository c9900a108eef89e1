"""The laptop run with its defaults reaches the numbers of README."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_chain_learns(tmp_path):
    """SFT ends between 25% and 50%, the reward model above 90%, PPO 20 points above SFT."""
    last = {}
    for name in ("sft", "reward_model", "ppo"):
        subprocess.run([sys.executable, ROOT / f"{name}.py"], cwd=tmp_path, check=True)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        last[name] = json.loads(lines[-1])
    for gold in ("eval/gold", "eval/gold_greedy"):
        assert 0.25 <= last["sft"][gold] <= 0.5
        assert last["ppo"][gold] >= last["sft"][gold] + 0.2
    assert last["reward_model"]["eval/accuracy"] >= 0.9
