"""dpo.py: every loss against float64 loops and its formula's gradient, the cache; then main."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from test_scripts import chain, metrics, refused, weights  # noqa: F401 (a fixture)

import common
import dpo

TYPES = ["sigmoid", "ipo", "simpo", "orpo"]


def logps(seed, n=5):
    draw = torch.Generator().manual_seed(seed)
    return [-(torch.rand(n, generator=draw, dtype=torch.float64) * 3 + 0.05) for _ in range(4)]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def slow_loss(w, l, ref_w, ref_l, beta, kind, s=0.0, margin=0.0):  # noqa: E741
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
    given = logps(seed)
    return given if kind not in dpo.REFERENCE_FREE else [*given[:2], torch.zeros(5), torch.zeros(5)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_preference_loss(kind, beta):
    given, options = (
        inputs(kind),
        {"simpo": dict(margin=0.7), "sigmoid": dict(label_smoothing=0.1)}.get(kind, {}),
    )
    losses, chosen, rejected = dpo.preference_loss(*given, beta, kind, **options)
    s, margin = options.get("label_smoothing", 0.0), options.get("margin", 0.0)
    slow = [slow_loss(*(x[i].item() for x in given), beta, kind, s, margin) for i in range(5)]
    assert losses.tolist() == pytest.approx(slow, rel=1e-9)
    assert torch.allclose(chosen, beta * (given[0] - given[2])) and torch.allclose(
        rejected, beta * (given[1] - given[3])
    )


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


def test_limits():
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


@pytest.mark.parametrize("kind", TYPES)
def test_pair_losses(kind):
    """Averages by each side's own length, default beta and margin, margins of the data, ties."""
    logps_, ref = (
        torch.tensor([[-3.0, -8.0], [-2.0, -2.0], [-9.0, -4.0]]),
        torch.tensor([[-4.0, -6.0]] * 3),
    )
    ref[1] = -2.0
    lengths, margins = [(2, 5), (3, 3), (4, 1)], [0.0, 0.0, 0.25]
    rows = [
        dict(chosen_ids=[5] * c, rejected_ids=[5] * r, margin=m)
        for (c, r), m in zip(lengths, margins)
    ]
    ref = ref * 0 if kind in ("simpo", "orpo") else ref
    args = dpo.Args(loss_type=kind, sft_coef=0.3, label_smoothing=0.2 if kind == "sigmoid" else 0.0)
    losses, logged = dpo.pair_losses(logps_, ref, rows, args)
    beta = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}[kind]
    for i, ((c, r), m) in enumerate(zip(lengths, margins)):
        c, r = (c, r) if kind != "sigmoid" else (1, 1)
        w, l, rw, rl = (
            x / n for x, n in zip([*logps_[i].tolist(), *ref[i].tolist()], (c, r, c, r))
        )  # noqa: E741
        m = m + 1.0 if kind == "simpo" else m
        slow = (
            slow_loss(w, l, rw, rl, beta, kind, args.label_smoothing, m)
            - 0.3 * logps_[i, 0].item() / lengths[i][0]
        )
        assert losses[i].item() == pytest.approx(slow, rel=1e-4)
        assert logged["chosen_reward"][i].item() == pytest.approx(beta * (w - rw), abs=1e-6)
        assert logged["rejected_reward"][i].item() == pytest.approx(beta * (l - rl), abs=1e-6)
    assert logged["margin"].tolist() == pytest.approx(
        (logged["chosen_reward"] - logged["rejected_reward"]).tolist()
    )
    assert logged["accuracy"][1] == 0.5 and logged["accuracy"][0] == (logged["margin"][0] > 0)
    if kind in ("sigmoid", "ipo"):
        assert logged["chosen_logratio"].tolist() == [1.0, 0.0, -5.0]
        assert logged["rejected_logratio"].tolist() == [-2.0, 0.0, 2.0]


# ---------------------------------------------------------------- through main
def run_args(chain, output_dir, **changes):  # noqa: F811
    args = dict(
        model=str(chain / "sft"), output_dir=str(output_dir), batch_size=16, steps=3, warmup_steps=0
    )
    return dpo.Args(**(args | dict(learning_rate=1e-3, micro_batch_tokens=4096) | changes))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("precompute", [True, False])
def test_first_step_and_learning(chain, tmp_path, kind, precompute):  # noqa: F811
    """The first loss is known; then accuracy and margin rise, and nothing is logged that is not there."""
    args = dict(loss_type=kind, precompute_ref=precompute, steps=40, batch_size=32, epochs=20)
    dpo.main(run_args(chain, tmp_path / "run", **args))
    start, first, *_, last = metrics(tmp_path / "run")
    if kind in ("sigmoid", "ipo"):
        assert first["margin"] == pytest.approx(0, abs=1e-5) == first["chosen_logratio"]
        assert start["eval/margin"] == pytest.approx(0, abs=1e-5)
        assert start["eval/loss"] == pytest.approx(
            {"sigmoid": math.log(2), "ipo": 25.0}[kind], abs=1e-4
        )
        assert first["loss"] == pytest.approx({"sigmoid": math.log(2), "ipo": 25.0}[kind], abs=1e-4)
    else:
        assert not any("logratio" in key for key in first.keys() | last.keys())
    assert start["eval/kl"] == 0 < last["eval/kl"]
    assert last["margin"] > first["margin"] + 0.01 and last["loss"] < first["loss"]
    assert {
        "eval/accuracy",
        "eval/accuracy_stderr",
        "eval/gold",
        "chosen_reward",
        "rejected_reward",
    } <= {
        *start,
        *last,
    }


def test_micro_batches_and_cached_reference_change_nothing(chain, tmp_path, cut_by_budget_alone):  # noqa: F811
    rows = []
    for budget, precompute in ((40, True), (100_000, False), (100_000, True)):
        folder = tmp_path / f"{budget}{precompute}"
        dpo.main(
            run_args(
                chain, folder, micro_batch_tokens=budget, precompute_ref=precompute, sft_coef=0.3
            )
        )
        rows.append(metrics(folder))
    for one, other in zip(rows[0], rows[1]):
        for key in one.keys() & {
            "loss",
            "grad_norm",
            "chosen_logratio",
            "eval/loss",
            "eval/rejected_logratio",
        }:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    for one, other in zip(rows[1], rows[2]):
        assert one["loss" if "loss" in one else "eval/loss"] == pytest.approx(
            other["loss" if "loss" in other else "eval/loss"], rel=1e-5
        )


def test_sft_coef_adds_the_nll_per_token(chain, tmp_path):  # noqa: F811
    for coef in (0.0, 0.5):
        dpo.main(run_args(chain, tmp_path / str(coef), sft_coef=coef, steps=1))
    plain, more = (metrics(tmp_path / name)[0]["eval/loss"] for name in ("0.0", "0.5"))
    tokenizer = common.load_tokenizer(str(chain / "sft"))
    policy = common.load_policy(str(chain / "sft"), torch.device("cpu"))
    args = run_args(chain, tmp_path / "x")
    held_out = common.load_held_out(tokenizer, "preference", args)
    nll = []
    for e in held_out:
        batch = common.completion_batch([e["prompt_ids"]], [e["chosen_ids"]], torch.device("cpu"))
        with torch.no_grad():
            inner, _ = dpo.token_logprobs(
                policy, batch.input_ids, batch.attention_mask, batch.completion_mask[:, 1:]
            )
        nll.append(-inner.sum().item() / len(e["chosen_ids"]))
    assert more - plain == pytest.approx(0.5 * np.mean(nll), rel=1e-4)


def test_the_cache_is_keyed_by_model_and_data(chain, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A resumed run reads it; another model or other rows do not."""
    tokenizer, args = common.load_tokenizer(str(chain / "sft")), run_args(chain, tmp_path)
    examples = common.load_examples(tokenizer, "sort", "preference", args)[:20]
    model = common.load_policy(str(chain / "sft"), torch.device("cpu"))
    _, autocast = common.setup(args)
    calls, inner = [], dpo.pair_logps
    monkeypatch.setattr(dpo, "pair_logps", lambda *a: calls.append(1) or inner(*a))
    file = tmp_path / "reference.pt"

    def logps_of(model, examples, args=args):
        calls.clear()
        return dpo.reference_logps(model, examples, args, autocast, file), len(calls)

    first, computed = logps_of(model, examples)
    again, recomputed = logps_of(model, examples)
    assert (computed, recomputed) == (1, 0) and torch.equal(first, again)
    assert logps_of(model, examples[:-1])[1] == 1, "other rows"
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert logps_of(model, examples[:-1])[1] == 1, "another model"
    assert logps_of(model, examples[:-1], run_args(chain, tmp_path, dtype="bfloat16"))[1] == 1, (
        "another dtype"
    )
    assert (
        logps_of(model, examples[:-1][::-1], run_args(chain, tmp_path, dtype="bfloat16"))[1] == 1
    ), "order"


def test_resume_is_exact(chain, tmp_path, monkeypatch):  # noqa: F811
    log = common.Run.log

    def broken_log(self, step, values, show):
        log(self, step, values, show)
        if step == 3:
            raise KeyboardInterrupt

    args = dict(steps=4, save_every=2, eval_every=3)
    dpo.main(run_args(chain, tmp_path / "whole", **args))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", broken_log)
        dpo.main(run_args(chain, tmp_path / "halves", **args))
    dpo.main(run_args(chain, tmp_path / "halves", resume=True, **args))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [
        [{k: v for k, v in row.items() if "second" not in k} for row in metrics(tmp_path / name)]
        for name in ("whole", "halves")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss_type="ipo", label_smoothing=0.1), ["--label-smoothing", "ipo"]),
        (dict(simpo_margin=0.5), ["--simpo-margin", "sigmoid"]),
        (dict(beta=0.0), ["--beta is 0.0"]),
        (dict(beta=-1.0), ["--beta is -1.0", "at least 0"]),
        (dict(label_smoothing=0.7), ["--label-smoothing 0.7"]),
    ],
)
def test_refused(chain, tmp_path, capsys, changes, words):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        dpo.main(run_args(chain, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    refused(capsys, *words)


def test_empty_answers_train_eos_only(chain, tmp_path, capsys):  # noqa: F811
    """They are legal, and kept; a pair without a difference is dropped, and counted."""
    rows = [
        dict(prompt="ba>", chosen="ab", rejected=""),
        dict(prompt="ba>", chosen="a", rejected="a"),
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo.main(
        run_args(
            chain,
            tmp_path / "run",
            dataset=str(tmp_path / "pairs.jsonl"),
            steps=2,
            epochs=2,
            batch_size=1,
        )
    )
    assert (
        "1 of 2 rows; 1 dropped whose chosen and rejected are the same" in capsys.readouterr().out
    )
    assert metrics(tmp_path / "run")[-1]["margin"] != 0
    shutil.rmtree(tmp_path / "run")
