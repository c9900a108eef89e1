"""A GPU computes what a CPU does: all seven mains on both, in float32 and, as a GPU has it by
default, in bfloat16."""

import pytest
import torch
from processes import NAMES, ONLINE, launch
from test_processes import CLOCK
from test_resume import states
from test_scripts import chain, metrics  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def run(command, folder, chain, gpu):  # noqa: F811
    done = launch(1, command, folder, chain, gpu=gpu)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def on_cpu(chain, tmp_path_factory):  # noqa: F811
    return run("every_script", tmp_path_factory.mktemp("cpu"), chain, gpu=False)


@pytest.fixture(scope="module")
def on_gpu(chain, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("gpu")
    run("every_script", folder, chain, gpu=True)
    return run("halves", folder, chain, gpu=True)


@pytest.fixture(scope="module")
def in_bfloat16(chain, tmp_path_factory):  # noqa: F811
    return run("bfloat16", tmp_path_factory.mktemp("bfloat16"), chain, gpu=True)


@pytest.mark.parametrize("name", NAMES)
def test_float32_computes_what_the_cpu_does(name, on_cpu, on_gpu):
    """Gradients, samples, log-probs after three steps, metrics."""
    expected = torch.load(on_cpu / f"{name}.pt")
    found = torch.load(on_gpu / f"{name}.pt")
    assert len(found["gradients"]) == len(expected["gradients"]) >= 3
    for gradient, other in zip(found["gradients"], expected["gradients"]):
        assert (gradient - other).norm() < 1e-4 * other.norm()
    assert found["sampled"] == expected["sampled"]
    if name != "reward_model":
        assert (found["logprobs"] - expected["logprobs"]).abs().max() < 1e-4
    for row, other in zip(metrics(on_gpu / name), metrics(on_cpu / name), strict=True):
        for key in other.keys() - set(CLOCK):
            tolerance = 0.1 if "accuracy" in key or "clip_fraction" in key else 1e-3
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=tolerance), key


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_resume_ends_as_the_run_that_never_stopped(name, on_gpu):
    """Two steps and, with --resume, the third: the run that never stopped, to rounding (kernels
    that add in no fixed order differ in the last bits)."""
    whole = states(on_gpu / name)
    halves = states(on_gpu / "halves" / name)
    assert whole.keys() == halves.keys()
    for key in whole:
        assert torch.allclose(whole[key], halves[key], atol=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_points_where_float32_does(name, on_cpu, in_bfloat16):
    """The first gradient points where float32's does; before the first update the ratio is 1."""
    expected = torch.load(on_cpu / f"{name}.pt")
    found = torch.load(in_bfloat16 / f"{name}.pt")
    if found["sampled"][:1] == expected["sampled"][:1]:
        cosine = torch.cosine_similarity(found["gradients"][0], expected["gradients"][0], dim=0)
        assert cosine > 0.99
    if name in ONLINE:
        for row in metrics(in_bfloat16 / name)[1:]:
            assert row["ratio_max_dev"] < 0.05
