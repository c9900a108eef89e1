"""All seven mains on a device that is not the CPU: every tensor is where it must be, and they
compute what they do on the CPU. Rehearses test_gpu.py where there is no GPU."""

import background
import pytest
import torch
from processes import NAMES, launch
from test_processes import assert_close, one  # noqa: F401 (a fixture)
from test_resume import assert_same_run
from test_scripts import background_chain


@background.job
def rehearsal(folder, items):
    """What they leave."""

    def run():
        done = launch(1, "rehearsal", folder, background_chain())
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("device: 1 x rehearsal") == len(NAMES) + 4

    return run


@pytest.mark.parametrize("name", NAMES)
def test_computes_what_the_cpu_does(name, rehearsal, one):  # noqa: F811
    expected = torch.load(one / f"{name}.pt")
    found = torch.load(rehearsal / f"{name}.pt")
    assert found["sampled"] == expected["sampled"]
    for gradient, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert (gradient - other).norm() < 1e-5 * other.norm()
    assert_close(rehearsal / name, one / name)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_resume_ends_as_the_run_that_never_stopped(name, rehearsal):
    assert_same_run(rehearsal / name, rehearsal / "halves" / name)
