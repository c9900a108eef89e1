"""What a person sees: --help, a run in a terminal of 80 columns, a run in a pipe."""

import importlib
import os
import re
import struct
import subprocess
import sys

import pytest
from test_family import ROOT, SCRIPTS, field_docs

import common


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help(name, columns, monkeypatch, capsys):
    """The docstring, every flag with its default under a heading, in at most 110 columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stopped:
        common.cli(script.Args, laptop=dict(steps=7, overwrite=True))
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and max(map(len, text.splitlines())) <= 110
    assert script.__doc__.split() == text.split()[: len(script.__doc__.split())]
    assert " --steps 7 --overwrite model and data " in " ".join(text.split())
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert flags == [f"--{flag.replace('_', '-')}" for flag in field_docs(name)]
    assert " ".join(text.split()).count("(default: ") == len(flags)
    headings = [
        "model and data",
        "the run",
        "optimiser",
        "memory and precision",
        "several processes",
    ]
    at = [text.index(f"\n\n{heading}\n") for heading in headings]
    assert at == sorted(at) and text.count("\n\nthe method\n") == 1


def test_own_data_needs_a_model(monkeypatch, capsys):
    import sft

    for flag in ("--dataset", "--eval-dataset"):
        monkeypatch.setattr(sys, "argv", ["sft.py", flag, "mine.jsonl"])
        with pytest.raises(SystemExit) as stopped:
            common.cli(sft.Args, laptop={})
        assert stopped.value.code == 2 and "needs --model" in capsys.readouterr().err


COMMAND = [sys.executable, str(ROOT / "sft.py"), *"--steps 4 --eval-every 2 --log-every 1".split()]


def test_a_terminal_of_80_columns(tmp_path):
    """A bar with what is left, numbers and samples that fit, a last line that says what to run next."""
    pty, fcntl, termios = (
        pytest.importorskip(name, reason=f"no {name} here: no terminals of this kind")
        for name in ("pty", "fcntl", "termios")
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        COMMAND, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        out += part
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out.decode()).replace("\r", "\n").split("\n")
    lines = [line for line in lines if line.strip()]
    assert max(map(len, lines)) <= 80
    assert re.search(
        r"^100%\|\S+ *\| 4/4, 00:00 left, loss [0-9.]+  grad_norm [0-9.]+$", "\n".join(lines), re.M
    )
    assert any(line.startswith("step 4/4  held out: loss") for line in lines)
    assert sum(line.startswith("  goly>    | ") for line in lines) == 3
    assert lines[-1].endswith("the model is in runs/sft; next: python reward_model.py")


def test_a_pipe_gets_plain_lines(tmp_path):
    found = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stderr == "" and "\r" not in found.stdout and "\x1b" not in found.stdout
    steps = re.findall(
        r"^step (\d)/4  loss [0-9.]+  grad_norm [0-9.]+  tokens_per_second", found.stdout, re.M
    )
    assert steps == ["1", "2", "3", "4"]
    assert (
        len(re.findall(r"^step \d/4  held out: .* completion_length [0-9.]+$", found.stdout, re.M))
        == 3
    )


def test_a_terminal_of_30_columns(tmp_path, monkeypatch):
    """No number fits beside the bar, and nothing stops for it."""
    import sft

    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = common.Run(sft.Args(output_dir=str(tmp_path / "run")), 1)
    run.restore_handlers()
    run.log(0, {"eval/loss": 1.0}, show=[])
    run.log(1, {"loss": 1.0}, show=["loss"])


def test_samples_show_newlines_and_cut_long_text(tmp_path, capsys, monkeypatch):
    import sft

    monkeypatch.setenv("COLUMNS", "80")
    run = common.Run(sft.Args(output_dir=str(tmp_path / "run")), 1)
    run.restore_handlers()
    long = "one\ntwo " + "word " * 100
    run.samples(
        1,
        [dict(prompt=long, completion=long, score=1.0, kl=-2.5), dict(prompt="p", completion="c")],
    )
    first, second = capsys.readouterr().out.splitlines()
    assert (
        len(first) <= 80
        and first.startswith("  one\\ntwo ")
        and first.endswith("| score 1.00 kl -2.50")
    )
    assert first.count("…") == 2 and first.index(" | ") == second.index(" | ")
