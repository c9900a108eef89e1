"""--track, with the packages for real where they are installed: what arrives is what metrics.jsonl holds."""

import json

import pytest
from test_scripts import chain, metrics  # noqa: F401

import sft


def run(chain, folder, track):  # noqa: F811
    args = dict(steps=2, batch_size=8, warmup_steps=0, output_dir=str(folder), track=track)
    sft.main(sft.Args(model=str(chain / "sft"), **args))
    return metrics(folder)


def test_tensorboard(chain, tmp_path):  # noqa: F811
    reason = "tensorboard is not installed: pip install tensorboard"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(chain, tmp_path / "run", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("loss", "eval/gold", "learning_rate"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert len(expected) > 1
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]


def test_wandb_offline(chain, tmp_path, monkeypatch):  # noqa: F811
    reason = "wandb is not installed: pip install wandb"
    pytest.importorskip("wandb", reason=reason)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = run(chain, tmp_path / "run", "wandb")
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    for name, value in [
        (name, value) for row in rows for name, value in row.items() if name != "step"
    ]:
        assert name.encode() in data and json.dumps(value).encode() in data, name
