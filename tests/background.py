"""Long runs in the background, for tests that inspect their results.

conftest.py starts the jobs of the collected tests before the first test. Two processes take one job
after another. Each job is also a fixture, which waits for its end."""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import end_with_parent

JOBS = {}  # name of a fixture -> function(folder, collected tests), which returns a function to run
STATE = SimpleNamespace(folder=None, pids=[])


def job(function):
    """Turn a function into a job and a fixture, which is the folder of the finished job."""
    name = function.__name__
    JOBS[name] = function

    @pytest.fixture(scope="module", name=name)
    def folder():
        return wait(name)

    return folder


def start(items):
    """Start the jobs of these tests."""
    names = [name for name in JOBS if any(name in item.fixturenames for item in items)]
    if not names:
        return
    STATE.folder = Path(tempfile.mkdtemp(prefix="background-"))
    runs = {}
    for name in names:
        (STATE.folder / name).mkdir()
        runs[name] = JOBS[name](STATE.folder / name, items)
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            run_all(runs)
        STATE.pids.append(pid)


def run_all(runs):
    """Run the jobs that the other process has not begun. Called in a fork."""
    end_with_parent()
    with open(STATE.folder / f"output {os.getpid()}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # unwinds processes.start
    try:
        for name, run in runs.items():
            try:
                (STATE.folder / f"{name}.begun").touch(exist_ok=False)
            except FileExistsError:
                continue
            run()
            (STATE.folder / f"{name}.done").touch()
    except BaseException:
        (STATE.folder / "failed").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def wait(name):
    """Wait for a job. Returns its folder."""
    done = STATE.folder / f"{name}.done"
    failed = STATE.folder / "failed"
    while not done.exists():
        STATE.pids = [pid for pid in STATE.pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        assert not failed.exists(), failed.read_text()
        assert STATE.pids or done.exists(), f"the processes of job {name} were killed"
        time.sleep(0.05)
    return STATE.folder / name


def end():
    """Stop all jobs and delete their folders."""
    for pid in STATE.pids:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    STATE.pids.clear()
    if STATE.folder is not None:
        shutil.rmtree(STATE.folder, ignore_errors=True)
