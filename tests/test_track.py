"""--wandb, with the package for real where it is installed: what arrives is what metrics.jsonl
holds."""

import json

import pytest
from test_scripts import chain, metrics  # noqa: F401

import sft


def run(chain, folder):  # noqa: F811
    args = dict(model=str(chain / "sft"), steps=2, batch_size=8, warmup_steps=0)
    sft.main(sft.Args(**args, output_dir=str(folder), wandb=True))
    return metrics(folder)


def test_wandb_offline(chain, tmp_path, monkeypatch):  # noqa: F811
    reason = "wandb is not installed: pip install wandb"
    wandb = pytest.importorskip("wandb", reason=reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = run(chain, tmp_path / "run")
    wandb.finish()  # as its own atexit would
    (file,) = tmp_path.glob("**/wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    for name, value in [
        (name, value) for row in rows for name, value in row.items() if name != "step"
    ]:
        assert name.encode() in data and json.dumps(value).encode() in data, name
