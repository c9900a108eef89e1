"""All seven scripts on a device other than the CPU compute what they do on the CPU.

Every tensor must be on the right device. Stands in for test_gpu.py on machines without a GPU."""

import background
import pytest
import torch
from processes import NAMES, launch
from second_device import NAME
from test_processes import assert_close, one  # noqa: F401 (a fixture)
from test_resume import assert_same_run
from test_scripts import background_chain


@background.job
def rehearsal(folder, items):
    """Results on the second device."""

    def run():
        done = launch(1, "rehearsal", folder, background_chain())
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_second_device_computes_what_the_cpu_does(name, rehearsal, one):  # noqa: F811
    expected = torch.load(one / f"{name}.pt")
    found = torch.load(rehearsal / f"{name}.pt")
    assert expected["device"] == "cpu" and found["device"] == NAME
    assert found["sampled"] == expected["sampled"]
    for gradient, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert (gradient - other).norm() < 1e-5 * other.norm()
    assert_close(rehearsal / name, one / name)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_resume_is_exact_on_the_second_device(name, rehearsal):
    assert_same_run(rehearsal / name, rehearsal / "halves" / name)
