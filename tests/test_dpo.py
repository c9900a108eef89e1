"""dpo.py: every loss against float64 loops and its formula's gradient, pairs; then main."""

import contextlib
import json
import math

import pytest
import torch
from conftest import CPU
from test_scripts import chain, metrics, refused  # noqa: F401 (a fixture)

import common
import dpo

TYPES = ["sigmoid", "ipo", "simpo", "orpo"]


def logps(seed, n=5):
    draw = torch.Generator().manual_seed(seed)
    return [-(torch.rand(n, generator=draw, dtype=torch.float64) * 3 + 0.05) for _ in range(4)]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def slow_loss(w, l, ref_w, ref_l, beta, kind, s=0.0, margin=0.0):  # noqa: E741, PLR0917
    h = beta * ((w - ref_w) - (l - ref_l)) - margin
    if kind == "sigmoid":
        return -(1 - s) * log_sigmoid(h) - s * log_sigmoid(-h)
    if kind == "ipo":
        return ((w - ref_w) - (l - ref_l) - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return -log_sigmoid(beta * w - beta * l - margin)
    odds_w, odds_l = (math.exp(x) / (1 - math.exp(x)) for x in (w, l))
    return -w - beta * log_sigmoid(math.log(odds_w / odds_l))


def inputs(kind, seed=1):
    """Log-probs of chosen, rejected and of the reference's, which are 0 without one."""
    chosen, rejected, ref_chosen, ref_rejected = logps(seed)
    if kind in dpo.REFERENCE_FREE:
        return chosen, rejected, torch.zeros(5), torch.zeros(5)
    return chosen, rejected, ref_chosen, ref_rejected


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_preference_loss(kind, beta):
    chosen, rejected, ref_chosen, ref_rejected = inputs(kind)
    s = 0.1 if kind == "sigmoid" else 0.0
    margin = 0.7 if kind in ("sigmoid", "simpo") else 0.0
    losses, chosen_rewards, rejected_rewards = dpo.preference_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta,
        loss_type=kind,
        label_smoothing=s,
        margin=margin,
    )
    slow = [
        slow_loss(*[x.item() for x in four], beta, kind, s, margin)
        for four in zip(chosen, rejected, ref_chosen, ref_rejected)
    ]
    assert losses.tolist() == pytest.approx(slow, rel=1e-9)
    assert torch.allclose(chosen_rewards, beta * (chosen - ref_chosen))
    assert torch.allclose(rejected_rewards, beta * (rejected - ref_rejected))


def test_gradients_are_those_of_the_papers():
    """At one point: d loss / d log pi(chosen) of each type, by its closed form."""
    w, l, ref_w, ref_l = (torch.tensor([x], dtype=torch.float64) for x in (-0.9, -1.4, -1.1, -1.2))  # noqa: E741
    w.requires_grad_(), l.requires_grad_()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    h = (w - ref_w - l + ref_l).item()
    expected = {
        "sigmoid": -0.3 * sigmoid(-0.3 * h),  # Rafailov et al. 2023: beta * sigmoid(- h), on both
        "ipo": 2 * (h - 1 / 0.6),
        "simpo": -0.3 * sigmoid(-(0.3 * (w - l).item() - 0.5)),
    }
    for kind, slope in expected.items():
        ref = (0 * ref_w, 0 * ref_l) if kind == "simpo" else (ref_w, ref_l)
        losses, *_ = dpo.preference_loss(
            w, l, *ref, 0.3, kind, margin=0.5 if kind == "simpo" else 0.0
        )
        up, down = torch.autograd.grad(losses.sum(), (w, l))
        assert up.item() == pytest.approx(slope, rel=1e-9) and down.item() == pytest.approx(
            -slope, rel=1e-9
        )
    losses, *_ = dpo.preference_loss(w, l, 0 * w, 0 * l, 0.3, "orpo")
    up, down = torch.autograd.grad(losses.sum(), (w, l))
    odds = [math.exp(x.item()) / (1 - math.exp(x.item())) for x in (w, l)]
    pull = 0.3 / (1 + odds[0] / odds[1])  # Hong et al. 2024, equation 8: 1 / (1 + odds ratio)
    assert up.item() == pytest.approx(-1 - pull / (1 - math.exp(w.item())), rel=1e-9)
    assert down.item() == pytest.approx(pull / (1 - math.exp(l.item())), rel=1e-9)


def test_an_unknown_loss_type_is_an_error():
    with pytest.raises(ValueError, match="kto"):
        dpo.preference_loss(*logps(1), 0.1, "kto")


def test_preference_loss_at_half_smoothing_and_at_beta_zero():
    given = logps(2)
    plain, smoothed = (dpo.preference_loss(*given, 0.1, "sigmoid", s)[0] for s in (0.0, 0.5))
    assert torch.equal(plain, dpo.preference_loss(*given, 0.1)[0])
    h = 0.1 * (given[0] - given[2] - given[1] + given[3])
    assert torch.allclose(smoothed, plain + h / 2), "half of the labels wrong: symmetric in h"
    assert torch.allclose(
        dpo.preference_loss(*given, 1e-9)[0], torch.full((5,), math.log(2.0)).double()
    )
    same = dpo.preference_loss(given[0], given[0], given[2], given[2], 0.1)
    assert torch.allclose(same[0], torch.full((5,), math.log(2.0)).double()) and torch.equal(
        same[1], same[2]
    )
    tiny = torch.tensor([-1e-9, -30.0])
    assert (
        dpo.preference_loss(tiny, tiny.flip(0), 0 * tiny, 0 * tiny, 0.1, "orpo")[0].isfinite().all()
    )

    for p_one in (torch.zeros(2), torch.tensor([0.0, -3.0])):  # a mean log-prob that rounds to 0
        logps_of_one = p_one.clone().requires_grad_()
        losses, *_ = dpo.preference_loss(
            logps_of_one, logps_of_one.flip(0), 0 * p_one, 0 * p_one, 0.1, "orpo"
        )
        losses.sum().backward()
        assert losses.isfinite().all() and logps_of_one.grad.isfinite().all()


PAIRS = [  # tokens of chosen and rejected, margin, log-probs of policy and reference
    dict(lengths=(2, 5), margin=0.0, logps=(-3.0, -8.0), ref_logps=(-4.0, -6.0)),
    dict(lengths=(3, 3), margin=0.0, logps=(-2.0, -2.0), ref_logps=(-2.0, -2.0)),
    dict(lengths=(4, 1), margin=0.25, logps=(-9.0, -4.0), ref_logps=(-4.0, -6.0)),
]


def examples_of(pairs):
    return [
        {
            "prompt_ids": [7, 8],
            "chosen_ids": [5] * pair["lengths"][0],
            "rejected_ids": [6] * pair["lengths"][1],
            "margin": pair["margin"],
            "ref_logps": list(pair["ref_logps"]),
        }
        for pair in pairs
    ]


def test_chosen_and_rejected_stand_side_by_side():
    """Chosen and rejected stand side by side; margins and weights are the pair's."""
    batch = dpo.pair_batch(examples_of(PAIRS), CPU)
    assert batch["mask"].sum(1).tolist() == [2, 5, 3, 3, 4, 1]
    assert batch["targets"][batch["mask"].bool()].tolist() == [
        *[5, 5, 6, 6, 6, 6, 6],
        *[5, 5, 5, 6, 6, 6],
        *[5, 5, 5, 5, 6],
    ]
    assert batch["inputs"][:, 0].tolist() == [7] * 6
    assert batch["ref_logps"].tolist() == [-4.0, -6.0, -2.0, -2.0, -4.0, -6.0]
    assert batch["margins"].tolist() == [0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    assert batch["weights"].tolist() == pytest.approx([1 / 3] * 6)
    chosen, rejected = dpo.of_pairs(batch["ref_logps"])
    assert chosen.tolist() == [-4.0, -2.0, -4.0]
    assert rejected.tolist() == [-6.0, -2.0, -6.0]
    examples = [{k: v for k, v in e.items() if k != "ref_logps"} for e in examples_of(PAIRS)]
    assert not dpo.pair_batch(examples, CPU)["ref_logps"].any(), "0 where nothing refers to it"


@pytest.mark.parametrize("kind", TYPES)
def test_pair_losses(kind):
    """Averages by each side's own length, default beta and margin, margins of the data, ties."""
    pairs = [dict(pair) for pair in PAIRS]
    if kind in ("simpo", "orpo"):
        pairs = [pair | dict(ref_logps=(0.0, 0.0)) for pair in pairs]
    batch = dpo.pair_batch(examples_of(pairs), CPU)
    sums = torch.tensor([pair["logps"] for pair in pairs]).flatten()
    logprobs = batch["mask"] * (sums / batch["mask"].sum(1))[:, None]
    s = 0.2 if kind == "sigmoid" else 0.0
    args = dpo.Args(loss_type=kind, sft_coef=0.3, label_smoothing=s)
    losses, logged = dpo.pair_losses(logprobs, batch, args)

    beta = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}[kind]
    for i, pair in enumerate(pairs):
        c, r = (1, 1) if kind == "sigmoid" else pair["lengths"]
        w, l = pair["logps"][0] / c, pair["logps"][1] / r  # noqa: E741
        ref_w, ref_l = pair["ref_logps"][0] / c, pair["ref_logps"][1] / r
        margin = pair["margin"] + (1.0 if kind == "simpo" else 0.0)
        slow = slow_loss(w, l, ref_w, ref_l, beta, kind, s, margin)
        slow -= 0.3 * pair["logps"][0] / pair["lengths"][0]
        assert losses[i].item() == pytest.approx(slow, rel=1e-4)
        assert logged["chosen_reward"][i].item() == pytest.approx(beta * (w - ref_w), abs=1e-6)
        assert logged["rejected_reward"][i].item() == pytest.approx(beta * (l - ref_l), abs=1e-6)
        is_right = float(w - ref_w > l - ref_l)
        assert logged["accuracy"][i] == (0.5 if i == 1 else is_right), (
            "in the second both are alike"
        )
    assert torch.equal(logged["loss"], losses)
    assert torch.allclose(logged["margin"], logged["chosen_reward"] - logged["rejected_reward"])
    if kind in ("sigmoid", "ipo"):
        assert logged["chosen_logratio"].tolist() == pytest.approx([1.0, 0.0, -5.0])
        assert logged["rejected_logratio"].tolist() == pytest.approx([-2.0, 0.0, 2.0])
    else:
        assert not any("logratio" in name for name in logged)


def test_simpo_margin_and_beta_are_those_of_the_flags():
    """--beta 3 --simpo-margin 0.5, beside the margins of the data."""
    batch = dpo.pair_batch([e | dict(ref_logps=[0.0, 0.0]) for e in examples_of(PAIRS)], CPU)
    sums = torch.tensor([pair["logps"] for pair in PAIRS]).flatten()
    logprobs = batch["mask"] * (sums / batch["mask"].sum(1))[:, None]
    args = dpo.Args(loss_type="simpo", beta=3.0, simpo_margin=0.5)
    losses, _ = dpo.pair_losses(logprobs, batch, args)
    slow = [
        slow_loss(-3 / 2, -8 / 5, 0, 0, 3.0, "simpo", margin=0.5),
        slow_loss(-2 / 3, -2 / 3, 0, 0, 3.0, "simpo", margin=0.5),
        slow_loss(-9 / 4, -4 / 1, 0, 0, 3.0, "simpo", margin=0.75),
    ]
    assert losses.tolist() == pytest.approx(slow, rel=1e-5)


# ---------------------------------------------------------------- through main
def run_args(chain, output_dir, **changes):  # noqa: F811
    args = dict(
        model=str(chain / "sft"),
        output_dir=str(output_dir),
        batch_size=16,
        steps=3,
        warmup_steps=0,
        learning_rate=1e-3,
        micro_batch_tokens=4096,
    )
    return dpo.Args(**args | changes)


def load_pairs(chain, args, held_out=False):  # noqa: F811
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    return common.load_examples("sort", dpo.preference_example, tokenizer, args, held_out)


def test_add_reference(chain, tmp_path):  # noqa: F811
    """Log-probs of chosen and rejected, summed over the completion: row by row the same, and in
    order."""
    args = run_args(chain, tmp_path, micro_batch_tokens=60)
    examples = load_pairs(chain, args)[:20]
    model = common.load_policy(str(chain / "sft"), CPU)
    with_reference = dpo.add_reference(model, examples, args, contextlib.nullcontext)
    for example, extended in zip(examples, with_reference, strict=True):
        for ids, ref_logps in zip(
            (example["chosen_ids"], example["rejected_ids"]), extended["ref_logps"]
        ):
            sequence = torch.tensor([example["prompt_ids"] + ids])
            with torch.no_grad():
                logps = model(sequence).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, sequence[0, 1:, None])[-len(ids) :].sum()
            assert ref_logps == pytest.approx(logps.item(), rel=1e-4)
        assert {k: v for k, v in extended.items() if k != "ref_logps"} == example


@pytest.mark.parametrize("kind", TYPES)
def test_first_step_and_learning(chain, tmp_path, kind):  # noqa: F811
    """The first loss is known; then accuracy and margin rise, and nothing is logged that is not
    there."""
    dpo.main(run_args(chain, tmp_path / "run", loss_type=kind, steps=20, batch_size=32, epochs=10))
    start, first, *_, last = metrics(tmp_path / "run")
    if kind in ("sigmoid", "ipo"):
        first_loss = {"sigmoid": math.log(2), "ipo": 25.0}[kind]
        assert first["margin"] == pytest.approx(0, abs=1e-5) == first["chosen_logratio"]
        assert start["eval/margin"] == pytest.approx(0, abs=1e-5)
        assert start["eval/loss"] == pytest.approx(first_loss, abs=1e-4)
        assert first["loss"] == pytest.approx(first_loss, abs=1e-4)
    else:
        assert not any("logratio" in key for key in first.keys() | last.keys())
    assert start["eval/kl"] == 0 < last["eval/kl"]
    assert last["margin"] > first["margin"] + 0.01 and last["loss"] < first["loss"]
    assert last["accuracy"] > 0.6
    expected = {"eval/accuracy", "eval/accuracy_stderr", "eval/gold"}
    assert expected <= start.keys() & last.keys()
    assert {"chosen_reward", "rejected_reward"} <= first.keys() & last.keys()


def test_micro_batches_change_nothing(chain, tmp_path, cut_by_budget_alone):  # noqa: F811
    """Neither what is minimised nor what the steps lead to."""
    for budget in (40, 100_000):
        folder = tmp_path / str(budget)
        dpo.main(run_args(chain, folder, micro_batch_tokens=budget, sft_coef=0.3, steps=2))
    names = {"loss", "grad_norm", "chosen_logratio", "eval/loss", "eval/rejected_logratio"}
    for small, large in zip(metrics(tmp_path / "40"), metrics(tmp_path / "100000"), strict=True):
        for name in small.keys() & names:
            assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-5), name


def test_sft_coef_adds_the_nll_per_token(chain, tmp_path):  # noqa: F811
    losses = {}
    for coef in (0.0, 0.5):
        dpo.main(run_args(chain, tmp_path / str(coef), sft_coef=coef, steps=1))
        losses[coef] = metrics(tmp_path / str(coef))[0]["eval/loss"]
    policy = common.load_policy(str(chain / "sft"), CPU)
    nlls = []
    for example in load_pairs(chain, run_args(chain, tmp_path), held_out=True):
        batch = dpo.completion_batch([example["prompt_ids"]], [example["chosen_ids"]], CPU)
        with torch.no_grad():
            logprobs = dpo.token_logprobs(policy, batch)
        nlls.append(-logprobs.sum().item() / len(example["chosen_ids"]))
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * sum(nlls) / len(nlls), rel=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss_type="ipo", label_smoothing=0.1), ["--label-smoothing", "ipo"]),
        (dict(simpo_margin=0.5), ["--simpo-margin", "sigmoid"]),
        (dict(beta=0.0), ["--beta"]),
        (dict(beta=-1.0), ["--beta"]),
        (dict(label_smoothing=0.7), ["--label-smoothing 0.7"]),
        (dict(label_smoothing=-0.3), ["--label-smoothing -0.3"]),
    ],
)
def test_flags_that_contradict_are_refused(chain, tmp_path, capsys, changes, words):  # noqa: F811
    """What would train on something else than it says."""
    with pytest.raises(SystemExit) as stopped:
        dpo.main(run_args(chain, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    refused(capsys, *words)


def test_empty_answers_train_eos_only(chain, tmp_path, capsys):  # noqa: F811
    """They are legal, and stay; a pair without a difference is dropped, and counted."""
    rows = [
        dict(prompt="ba>", chosen="ab", rejected=""),
        dict(prompt="ba>", chosen="a", rejected="a"),
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo.main(run_args(chain, tmp_path / "run", dataset=str(file), steps=2, epochs=2, batch_size=1))
    assert "1 rows; 1 dropped whose chosen and rejected are the same" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["margin"] != 0
