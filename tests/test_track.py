"""--track, with the packages for real where they are installed: what arrives is what metrics.jsonl
holds."""

import json

import pytest
from test_scripts import chain, metrics  # noqa: F401

import common
import sft


def run(chain, folder, track):  # noqa: F811
    args = dict(model=str(chain / "sft"), steps=2, batch_size=8, warmup_steps=0)
    sft.main(sft.Args(**args, output_dir=str(folder), track=track))
    return metrics(folder)


def test_tensorboard(chain, tmp_path, monkeypatch):  # noqa: F811
    reason = "tensorboard is not installed: pip install tensorboard"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at_exit = []
    monkeypatch.setattr(common.atexit, "register", at_exit.append)
    rows = run(chain, tmp_path / "run", "tensorboard")
    for function in at_exit:
        function()
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    names = {name for row in rows for name in row} - {"step"}
    assert {"loss", "eval/gold", "learning_rate"} <= names
    for name in names:
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert expected
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]


def test_wandb_offline(chain, tmp_path, monkeypatch):  # noqa: F811
    reason = "wandb is not installed: pip install wandb"
    wandb = pytest.importorskip("wandb", reason=reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = run(chain, tmp_path / "run", "wandb")
    wandb.finish()  # as its own atexit would
    (file,) = tmp_path.glob("**/wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    for name, value in [
        (name, value) for row in rows for name, value in row.items() if name != "step"
    ]:
        assert name.encode() in data and json.dumps(value).encode() in data, name
