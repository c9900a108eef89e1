"""dpo.py: losses against float64 loops and the gradients of the papers; pairs; then main."""

import math

import pytest
import torch
from conftest import CPU, load_policy
from test_scripts import chain, check_refused, metrics, write_rows  # noqa: F401

import common
import dpo

TYPES = ["sigmoid", "ipo", "simpo", "orpo"]


def random_logps(seed, n=5):
    """Log-probs of chosen and rejected by the policy, then by the reference."""
    draw = torch.Generator().manual_seed(seed)
    return [-(torch.rand(n, generator=draw, dtype=torch.float64) * 3 + 0.05) for _ in range(4)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_preference_loss(kind, beta):
    chosen, rejected, ref_chosen, ref_rejected = random_logps(1)
    if kind in dpo.REFERENCE_FREE:
        ref_chosen, ref_rejected = torch.zeros(5), torch.zeros(5)
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


def test_gradients_of_the_papers():
    """Derivatives in both log-probs at one point equal their closed forms."""
    w, l, ref_w, ref_l = (torch.tensor([x], dtype=torch.float64) for x in (-0.9, -1.4, -1.1, -1.2))  # noqa: E741
    w.requires_grad_(), l.requires_grad_()
    h = (w - ref_w - l + ref_l).item()
    odds_w, odds_l = (math.exp(x.item()) / (1 - math.exp(x.item())) for x in (w, l))
    pull = 0.3 / (1 + odds_w / odds_l)  # Hong et al. 2024, equation 8
    simpo = 0.3 * sigmoid(-(0.3 * (w - l).item() - 0.5))
    expected = {
        "sigmoid": (-0.3 * sigmoid(-0.3 * h), 0.3 * sigmoid(-0.3 * h)),  # Rafailov et al. 2023
        "ipo": (2 * (h - 1 / 0.6), -2 * (h - 1 / 0.6)),
        "simpo": (-simpo, simpo),
        "orpo": (-1 - pull / (1 - math.exp(w.item())), pull / (1 - math.exp(l.item()))),
    }
    for kind, slopes in expected.items():
        ref = (0 * ref_w, 0 * ref_l) if kind in dpo.REFERENCE_FREE else (ref_w, ref_l)
        margin = 0.5 if kind == "simpo" else 0.0
        losses, *_ = dpo.preference_loss(w, l, *ref, 0.3, kind, margin=margin)
        gradients = [x.item() for x in torch.autograd.grad(losses.sum(), (w, l))]
        assert gradients == pytest.approx(slopes, rel=1e-9), kind


def test_an_unknown_loss_type_is_an_error():
    with pytest.raises(ValueError, match="kto"):
        dpo.preference_loss(*random_logps(1), 0.1, "kto")


def test_limits_of_the_sigmoid_loss():
    """The defaults; a smoothing of 1/2 is symmetric in h; log 2 at beta 0 and for equal answers."""
    given = random_logps(2)
    plain, smoothed = (dpo.preference_loss(*given, 0.1, "sigmoid", s)[0] for s in (0.0, 0.5))
    assert torch.equal(plain, dpo.preference_loss(*given, 0.1)[0])
    h = 0.1 * (given[0] - given[2] - given[1] + given[3])
    assert torch.allclose(smoothed, plain + h / 2)
    log_2 = torch.full((5,), math.log(2.0)).double()
    assert torch.allclose(dpo.preference_loss(*given, 1e-9)[0], log_2)
    losses, *rewards = dpo.preference_loss(given[0], given[0], given[2], given[2], 0.1)
    assert torch.allclose(losses, log_2) and torch.equal(*rewards)


@pytest.mark.parametrize("logps", [(-1e-9, -30.0), (0.0, 0.0), (0.0, -3.0)])
def test_orpo_is_finite_at_probability_one(logps):
    """A mean log-prob can round to 0, where the odds are infinite."""
    logps = torch.tensor(logps, requires_grad=True)
    zeros = torch.zeros(2)
    losses, *_ = dpo.preference_loss(logps, logps.flip(0), zeros, zeros, 0.1, "orpo")
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()


PAIRS = [  # tokens of chosen and rejected, margin, log-probs of policy and reference
    dict(lengths=(2, 5), margin=0.0, logps=(-3.0, -8.0), ref_logps=(-4.0, -6.0)),
    dict(lengths=(3, 3), margin=0.0, logps=(-3.0, -3.0), ref_logps=(-3.0, -3.0)),
    dict(lengths=(4, 1), margin=0.25, logps=(-9.0, -4.0), ref_logps=(-4.0, -6.0)),
]


def pair_examples(has_reference=True):
    examples = []
    for pair in PAIRS:
        example = {
            "prompt_ids": [7, 8],
            "chosen_ids": [5] * pair["lengths"][0],
            "rejected_ids": [6] * pair["lengths"][1],
            "margin": pair["margin"],
        }
        if has_reference:
            example["ref_logps"] = list(pair["ref_logps"])
        examples.append(example)
    return examples


def pair_logprobs(batch):
    """The log-probs of PAIRS, spread evenly over tokens."""
    sums = torch.tensor([pair["logps"] for pair in PAIRS]).flatten()
    return batch["mask"] * (sums / batch["mask"].sum(1))[:, None]


def test_chosen_and_rejected_are_adjacent():
    """Both have the margin and weight of their pair; without a reference, its log-probs are 0."""
    batch = dpo.pair_batch(pair_examples(), CPU)
    assert batch["mask"].sum(1).tolist() == [2, 5, 3, 3, 4, 1]
    assert batch["targets"][batch["mask"].bool()].tolist() == [
        *[5, 5, 6, 6, 6, 6, 6],
        *[5, 5, 5, 6, 6, 6],
        *[5, 5, 5, 5, 6],
    ]
    assert batch["inputs"][:, 0].tolist() == [7] * 6
    assert batch["ref_logps"].tolist() == [-4.0, -6.0, -3.0, -3.0, -4.0, -6.0]
    assert batch["margins"].tolist() == [0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    assert batch["weights"].tolist() == pytest.approx([1 / 3] * 6)
    chosen, rejected = dpo.split_pairs(batch["ref_logps"])
    assert chosen.tolist() == [-4.0, -3.0, -4.0]
    assert rejected.tolist() == [-6.0, -3.0, -6.0]
    assert not dpo.pair_batch(pair_examples(has_reference=False), CPU)["ref_logps"].any()


@pytest.mark.parametrize("kind", TYPES)
def test_pair_losses(kind):
    """Lengths of both completions, default beta and margin, margins of the data, a tie."""
    has_reference = kind in ("sigmoid", "ipo")
    batch = dpo.pair_batch(pair_examples(has_reference), CPU)
    s = 0.2 if kind == "sigmoid" else 0.0
    args = dpo.Args(loss_type=kind, sft_coef=0.3, label_smoothing=s)
    losses, logged = dpo.pair_losses(pair_logprobs(batch), batch, args)

    beta = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}[kind]
    for i, pair in enumerate(PAIRS):
        c, r = (1, 1) if kind == "sigmoid" else pair["lengths"]
        w, l = pair["logps"][0] / c, pair["logps"][1] / r  # noqa: E741
        refs = pair["ref_logps"] if has_reference else (0.0, 0.0)
        ref_w, ref_l = refs[0] / c, refs[1] / r
        margin = pair["margin"] + (1.0 if kind == "simpo" else 0.0)
        slow = slow_loss(w, l, ref_w, ref_l, beta, kind, s, margin)
        slow -= 0.3 * pair["logps"][0] / pair["lengths"][0]
        assert losses[i].item() == pytest.approx(slow, rel=1e-4)
        assert logged["chosen_reward"][i].item() == pytest.approx(beta * (w - ref_w), abs=1e-6)
        assert logged["rejected_reward"][i].item() == pytest.approx(beta * (l - ref_l), abs=1e-6)
        is_right = float(w - ref_w > l - ref_l)
        assert logged["accuracy"][i] == (0.5 if i == 1 else is_right), "the second pair is a tie"
    assert torch.equal(logged["loss"], losses)
    assert torch.allclose(logged["margin"], logged["chosen_reward"] - logged["rejected_reward"])
    if has_reference:
        assert logged["chosen_logratio"].tolist() == pytest.approx([1.0, 0.0, -5.0])
        assert logged["rejected_logratio"].tolist() == pytest.approx([-2.0, 0.0, 2.0])
    else:
        assert not any("logratio" in name for name in logged)


def test_simpo_margin_and_beta_of_the_flags():
    """--beta 3 --simpo-margin 0.5; the margins of the data are added."""
    batch = dpo.pair_batch(pair_examples(has_reference=False), CPU)
    args = dpo.Args(loss_type="simpo", beta=3.0, simpo_margin=0.5)
    losses, _ = dpo.pair_losses(pair_logprobs(batch), batch, args)
    slow = [
        slow_loss(-3 / 2, -8 / 5, 0, 0, 3.0, "simpo", margin=0.5),
        slow_loss(-3 / 3, -3 / 3, 0, 0, 3.0, "simpo", margin=0.5),
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
    return common.load_examples("sort", "pairs", dpo.preference_example, tokenizer, args, held_out)


def test_add_reference(chain, tmp_path):  # noqa: F811
    """Log-probs equal sums over the completion by model.forward, in the order of the examples."""
    args = run_args(chain, tmp_path, micro_batch_tokens=60)
    examples = load_pairs(chain, args)[:20]
    model = load_policy(chain / "sft")
    for example, extended in zip(examples, dpo.add_reference(model, examples, args), strict=True):
        expected = []
        for ids in (example["chosen_ids"], example["rejected_ids"]):
            sequence = torch.tensor([example["prompt_ids"] + ids])
            with torch.no_grad():
                logprobs = model(sequence).logits[0, :-1].log_softmax(-1)
            logprobs = logprobs.gather(1, sequence[0, 1:, None])
            expected.append(logprobs[-len(ids) :].sum().item())
        assert extended["ref_logps"] == pytest.approx(expected, rel=1e-4)
        assert {k: v for k, v in extended.items() if k != "ref_logps"} == example


@pytest.mark.parametrize("kind", TYPES)
def test_first_step_and_learning(chain, tmp_path, kind):  # noqa: F811
    """The first loss has a closed form; then accuracy and margin rise."""
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


def test_sft_coef_adds_the_nll_per_token(chain, tmp_path):  # noqa: F811
    losses = {}
    for coef in (0.0, 0.5):
        dpo.main(run_args(chain, tmp_path / str(coef), sft_coef=coef, steps=1))
        losses[coef] = metrics(tmp_path / str(coef))[0]["eval/loss"]
    policy = load_policy(chain / "sft")
    nlls = []
    for example in load_pairs(chain, run_args(chain, tmp_path), held_out=True):
        rollout = {"prompt_ids": example["prompt_ids"], "completion_ids": example["chosen_ids"]}
        with torch.no_grad():
            logprobs = dpo.token_logprobs(policy, dpo.completion_batch([rollout], CPU))
        nlls.append(-logprobs.sum().item() / len(example["chosen_ids"]))
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * sum(nlls) / len(nlls), rel=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss_type="ipo", label_smoothing=0.1), ["--label-smoothing", "ipo"]),
        (dict(simpo_margin=0.5), ["--simpo-margin", "sigmoid"]),
        (dict(beta=0.0), ["--beta 0.0", "above 0"]),
        (dict(beta=-1.0), ["--beta -1.0", "above 0"]),
        (dict(label_smoothing=0.7), ["--label-smoothing 0.7"]),
        (dict(label_smoothing=-0.3), ["--label-smoothing -0.3"]),
    ],
)
def test_contradicting_flags_are_refused(chain, tmp_path, capsys, changes, words):  # noqa: F811
    check_refused(dpo, run_args(chain, tmp_path / "run", **changes), capsys, *words)


def test_an_empty_answer_is_trained(chain, tmp_path, capsys):  # noqa: F811
    """An empty answer is its EOS; a pair of equal answers is dropped and counted."""
    rows = [
        dict(prompt="ba>", chosen="ab", rejected=""),
        dict(prompt="ba>", chosen="a", rejected="a"),
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    dpo.main(run_args(chain, tmp_path / "run", dataset=data, steps=2, epochs=2, batch_size=1))
    printed = capsys.readouterr().out
    assert f"{data}: 1 rows\n" in printed
    assert f"dropped 1 rows: chosen and rejected have the same tokens, first at {data}" in printed
    assert metrics(tmp_path / "run")[-1]["margin"] != 0
