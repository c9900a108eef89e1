"""Long runs that tests only look at: two processes make them, each the next one, on the core that
the tests leave free and on theirs while they wait. conftest.py starts those that the collected
tests need before the first test; each is a fixture, which waits for it."""

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

JOBS = {}  # name of a fixture -> function(folder, collected tests) that returns what is to be run
STATE = SimpleNamespace(folder=None, pids=[])


def job(function):
    """Makes it a fixture: the folder of the job, after its end."""
    name = function.__name__
    JOBS[name] = function

    @pytest.fixture(scope="module", name=name)
    def folder():
        return wait(name)

    return folder


def start(items):
    """Start the jobs that these tests need."""
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
    """Those that the other process has not begun, in a child of this one."""
    end_with_parent()
    with open(STATE.folder / f"output {os.getpid()}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # what a job started ends too
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
    """The folder of a job, after its end."""
    done = STATE.folder / f"{name}.done"
    failed = STATE.folder / "failed"
    while not done.exists():
        STATE.pids = [pid for pid in STATE.pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        assert not failed.exists(), failed.read_text()
        assert STATE.pids or done.exists(), f"what was to make {name} was killed"
        time.sleep(0.05)
    return STATE.folder / name


def end():
    """Whatever happened, nothing of them stays."""
    for pid in STATE.pids:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    STATE.pids.clear()
    if STATE.folder is not None:
        shutil.rmtree(STATE.folder, ignore_errors=True)
