"""All seven scripts on a GPU against the CPU, in float32 and in bfloat16."""

import pytest
import torch
from processes import HALVED, NAMES, ONLINE, launch
from test_resume import states
from test_scripts import chain, metrics  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
# rounding decides single tokens and pairs of the counted metrics
NOT_COMPARED = ("second", "accuracy", "clip_fraction")


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
    assert (expected["device"], found["device"]) == ("cpu", "cuda")
    assert len(found["gradients"]) == len(expected["gradients"]) >= 3
    for gradient, other in zip(found["gradients"], expected["gradients"]):
        assert (gradient - other).norm() < 1e-4 * other.norm()
    assert found["sampled"] == expected["sampled"]
    if name != "reward_model":
        assert (found["logprobs"] - expected["logprobs"]).abs().max() < 1e-4
    for row, other in zip(metrics(on_gpu / name), metrics(on_cpu / name), strict=True):
        for key in other:
            if not any(word in key for word in NOT_COMPARED):
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), key


@pytest.mark.parametrize("name", HALVED)
def test_resumed_run_ends_as_an_uninterrupted_run(name, on_gpu):
    """Weights and optimizer agree to rounding: some kernels add in no fixed order."""
    whole = states(on_gpu / name)
    halves = states(on_gpu / "halves" / name)
    assert whole.keys() == halves.keys()
    for key in whole:
        assert torch.allclose(whole[key], halves[key], atol=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gradient_points_where_the_float32_gradient_does(name, on_cpu, in_bfloat16):
    """Cosine of the first gradients, if the samples agree; the ratio before the first update."""
    expected = torch.load(on_cpu / f"{name}.pt")
    found = torch.load(in_bfloat16 / f"{name}.pt")
    if found["sampled"][:1] == expected["sampled"][:1]:
        cosine = torch.cosine_similarity(found["gradients"][0], expected["gradients"][0], dim=0)
        assert cosine > 0.99
    if name in ONLINE:
        for row in metrics(in_bfloat16 / name)[1:]:
            assert row["ratio_max_dev"] < 0.05
