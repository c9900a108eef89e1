"""Each script end to end on a tiny model in a few steps, through its own main; the errors a
person meets."""

import contextlib
import functools
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import background
import pytest
import torch
from conftest import end_two_of_three
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

CPU = torch.device("cpu")
SMALL_TASK = {"sft": 64, "pairs": 64, "prompt": 64, "held out": 16}


@functools.cache
def train_chain(folder):
    """sft/ and reward_model/ in a folder, three steps each, trained once a session."""
    args = dict(batch_size=16, steps=3, warmup_steps=0, learning_rate=1e-3)
    sft.main(sft.Args(output_dir=str(folder / "sft"), **args))
    args |= dict(model=str(folder / "sft"), output_dir=str(folder / "reward_model"))
    reward_model.main(reward_model.Args(**args))
    return folder


@contextlib.contextmanager
def small_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "TASK_ROWS", SMALL_TASK)
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of train_chain, and small built-in data."""
    with small_task():
        yield train_chain(tmp_path_factory.getbasetemp() / "chain")


def background_chain():
    """The same for jobs in the background, one for each of their processes."""
    with small_task():
        return train_chain(background.STATE.folder / f"chain {os.getpid()}")


def reward_file(folder, body):
    """--reward of a file with one function of that body."""
    path = folder / "reward.py"
    path.write_text(f"def reward(prompts, completions, rows):\n    {body}\n")
    return f"{path}:reward"


def ppo_args(chain, output_dir, **changes):
    args = dict(
        model=str(chain / "sft"),
        reward=str(chain / "reward_model"),
        output_dir=str(output_dir),
        steps=2,
        prompts_per_step=6,
        num_generations=2,
        max_completion_length=6,
        learning_rate=1e-3,
        warmup_steps=0,
        update_epochs=2,
    )
    return ppo.Args(**args | changes)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def refused(capsys, *words, code=2):
    """Check that the last error was one sentence with these words."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


# ---------------------------------------------------------------- end to end
def test_sft_saves_what_transformers_opens(chain):
    model = AutoModelForCausalLM.from_pretrained(chain / "sft")
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft")
    out = model.generate(
        **tokenizer("dbca>", return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    assert out.shape[1] > 5 and model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    steps = metrics(chain / "sft")
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert steps[0]["eval/loss"] > steps[-1]["eval/loss"]
    assert {"eval/gold", "eval/gold_greedy", "eval/eos_rate"} <= steps[-1].keys()


def test_reward_model_scores_the_same_in_transformers(chain):
    """Right-padded rows through AutoModelForSequenceClassification give sequence_scores to 1e-5."""
    model = AutoModelForSequenceClassification.from_pretrained(chain / "reward_model").eval()
    tokenizer = AutoTokenizer.from_pretrained(chain / "reward_model")
    inputs = tokenizer(
        ["dbca>abcd[EOS]", "hgfedcba>abcdefgh[EOS]", "ba>a"], padding=True, return_tensors="pt"
    )
    ours = common.load_scorer(str(chain / "reward_model"), CPU, "--reward")
    with torch.no_grad():
        theirs = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, 0]
        batch = {"inputs": inputs.input_ids, "attention_mask": inputs.attention_mask}
        scores = reward_model.sequence_scores(ours, batch)
    assert torch.allclose(scores, theirs, atol=1e-5)
    eos_ids = common.find_eos_ids(tokenizer, str(chain / "reward_model"))
    assert tokenizer.pad_token_id not in eos_ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_starts_at_ratio_one_and_kl_zero(chain, tmp_path, temperature):
    """Through main: before the first update the ratio is 1, and the policy is the reference."""
    ppo.main(ppo_args(chain, tmp_path / "run", temperature=temperature, eval_every=1))
    first, second = metrics(tmp_path / "run")[1:]
    assert first["ratio_max_dev"] < 1e-4
    assert first["kl"] == 0 and second["kl"] != 0
    assert {
        "gold",
        "score",
        "eval/gold",
        "eval/score",
        "eval/kl",
        "explained_variance",
    } <= first.keys()
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 3 * 16


def test_ppo_does_not_depend_on_the_micro_batches(chain, tmp_path, cut_by_budget_alone):
    for budget in (20, 10_000):
        ppo.main(
            ppo_args(chain, tmp_path / str(budget), micro_batch_tokens=budget, num_minibatches=3)
        )
    small, large = weights(tmp_path / "20"), weights(tmp_path / "10000")
    assert all(torch.allclose(small[name], large[name], atol=2e-5) for name in small)


def test_ppo_raises_an_exact_reward(chain, tmp_path):
    """A reward that counts one letter goes up: a flipped sign anywhere would take it down."""
    args = dict(
        reward=reward_file(tmp_path, "return [text.count('a') / 6 for text in completions]"),
        steps=15,
        prompts_per_step=32,
        num_generations=1,
        kl_coef=0.0,
        missing_eos_penalty=0.1,
        whiten_rewards=True,
    )
    ppo.main(ppo_args(chain, tmp_path / "run", **args))
    scores = [row["score"] for row in metrics(tmp_path / "run") if "score" in row]
    assert sum(scores[-3:]) / 3 > 3 * sum(scores[:3]) / 3 + 0.1


def test_ppo_pays_for_missing_eos_and_learns_values(chain, tmp_path, monkeypatch):
    """With a score of 1 the first reward is 1 less what missing EOS costs; the value loss falls."""
    end_two_of_three(monkeypatch, ppo)
    args = dict(
        reward=reward_file(tmp_path, "return [1] * len(prompts)"),
        missing_eos_penalty=0.25,
        steps=8,
        value_clip=9.0,
        prompts_per_step=7,
    )
    ppo.main(ppo_args(chain, tmp_path / "run", **args))
    rows = metrics(tmp_path / "run")[1:]
    assert rows[0]["eos_rate"] == pytest.approx(9 / 14)
    assert rows[0]["reward"] == pytest.approx(1 - 0.25 * 5 / 14, abs=1e-5)
    assert rows[-1]["loss/value"] < 0.5 * rows[0]["loss/value"]


def test_reward_model_prefers_the_chosen(chain, tmp_path):
    """Through main, and judged by the evaluation: on pairs seen often the margin grows."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in common.task_rows("preference", False, 1))
    )
    args = dict(
        model=str(chain / "sft"),
        dataset=str(data),
        eval_dataset=str(data),
        batch_size=32,
        epochs=15,
    )
    run = dict(output_dir=str(tmp_path / "run"), learning_rate=1e-3, warmup_steps=0)
    reward_model.main(reward_model.Args(**args, **run))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["eval/margin"] > rows[0]["eval/margin"] + 0.5
    assert rows[-1]["eval/accuracy"] > 0.6


def test_sft_trains_each_completion_once_and_no_prompt(chain, tmp_path):
    """Five rows in batches of two are three steps, and the losses are the mean NLL of what follows
    the prompts, EOS included, by transformers' own forward."""
    rows = [("dbca>", "abcd"), ("b>", ""), ("gf>", "fg"), ("zya>", "a"), ("k>", "kk")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(dict(prompt=p, completion=c)) + "\n" for p, c in rows))
    args = dict(model=str(chain / "sft"), dataset=str(data), batch_size=2, learning_rate=0.0)
    sft.main(sft.Args(**args, output_dir=str(tmp_path / "run")))
    model = AutoModelForCausalLM.from_pretrained(chain / "sft")
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft")
    nll = {}
    for prompt, completion in rows:
        ids = tokenizer(f"{prompt}{completion}[EOS]", return_tensors="pt").input_ids
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        nll[prompt] = -logps[len(prompt) - 1 :, 0]
        assert len(nll[prompt]) == len(completion) + 1
    order = [e["prompt"] for e in common.stream([dict(prompt=p) for p, _ in rows], 1, 0, 5)]
    expected = [torch.cat([nll[p] for p in order[i : i + 2]]).mean().item() for i in (0, 2, 4)]
    assert [row["loss"] for row in metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_every_step_draws_afresh(chain, tmp_path, monkeypatch, script):
    """One prompt and a policy that stands still: what differs between steps is the noise alone, and
    another seed gives another."""
    drawn = []
    inner = script.sample

    def sample(*args, **kwargs):
        drawn.append(inner(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(script, "sample", sample)
    (tmp_path / "prompt.jsonl").write_text('{"prompt": "dbca>"}\n')
    args = dict(
        model=str(chain / "sft"),
        dataset=str(tmp_path / "prompt.jsonl"),
        reward=reward_file(tmp_path, "return [1] * len(prompts)"),
        steps=2,
        prompts_per_step=1,
        num_generations=4,
        max_completion_length=6,
        learning_rate=0.0,
    )
    for seed in (1, 2, 1):
        script.main(script.Args(**args, seed=seed, output_dir=str(tmp_path / str(len(drawn)))))
    assert drawn[:2] == drawn[4:] and len({str(x) for x in drawn}) == 4


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_nothing_that_was_not_judged_is_trained(chain, tmp_path, monkeypatch, script):
    """One None takes its whole group out of batch and metrics: 4 of 6 groups stay (trl#5902 counted
    None as 0)."""
    batches = []
    inner = script.completion_batch

    def completion_batch(prompts, completions, device):
        batches.append(completions)
        return inner(prompts, completions, device)

    monkeypatch.setattr(script, "completion_batch", completion_batch)
    body = "return [None if i in (0, 7) else float(len(c)) for i, c in enumerate(completions)]"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "dbca>"}\n{"prompt": "fe>"}\n')
    args = dict(
        model=str(chain / "sft"),
        dataset=str(tmp_path / "prompts.jsonl"),
        reward=reward_file(tmp_path, body),
        output_dir=str(tmp_path / "run"),
        steps=1,
        prompts_per_step=6,
        num_generations=2,
        max_completion_length=6,
        update_epochs=1,
    )
    script.main(script.Args(**args))
    (completions,) = batches
    assert len(completions) == 8
    (row,) = metrics(tmp_path / "run")
    assert row["unjudged"] == pytest.approx(4 / 12)
    texts = [[i for i in ids if i > 2] for ids in completions]  # less PAD, EOS and UNK
    assert row["score"] == pytest.approx(sum(map(len, texts)) / 8)


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_a_step_that_nothing_of_could_be_judged_stops_the_run(chain, tmp_path, capsys, script):
    args = dict(
        model=str(chain / "sft"),
        reward=reward_file(tmp_path, "return [None] * len(prompts)"),
        output_dir=str(tmp_path / "run"),
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=6,
    )
    with pytest.raises(SystemExit):
        script.main(script.Args(**args))
    refused(capsys, "step 1: ", " 0 ", "judged")


def test_learning_rate_schedules():
    """Warm-up ends at the peak; linear and cosine would be 0 at the step after the last."""

    def rates(schedule):
        args = SimpleNamespace(learning_rate=2.0, warmup_steps=3, lr_schedule=schedule)
        return [ppo.scheduled_learning_rate(step, 7, args) for step in range(8)]

    assert rates("constant") == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert rates("linear") == [0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0]
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([0.5, 1, 1.5, 2, 1 + half, 1, 1 - half, 0])


@pytest.mark.parametrize("script", [sft, reward_model])
def test_training_does_not_depend_on_the_micro_batches(
    chain, tmp_path, script, cut_by_budget_alone
):
    """Through main: the gradient's norm and the loss of every step, at a budget of one row and of
    all rows."""
    for budget in (1, 100_000):
        args = dict(
            model=str(chain / "sft"), output_dir=str(tmp_path / str(budget)), batch_size=16, steps=3
        )
        script.main(script.Args(**args, learning_rate=1e-4, micro_batch_tokens=budget))
    small, large = (metrics(tmp_path / str(budget)) for budget in (1, 100_000))
    for one, other in zip(small, large, strict=True):
        for name in one.keys() & {"loss", "grad_norm", "eval/loss"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_where_ppo_values_start(chain, tmp_path, monkeypatch):
    """At --value-model; at the policy with a head that gives 0; at the reward model."""
    loaded = []
    inner = ppo.load_scorer

    def load_scorer(path, *args, **kwargs):
        loaded.append((path, inner(path, *args, **kwargs)))
        return loaded[-1][1]

    monkeypatch.setattr(ppo, "load_scorer", load_scorer)
    args = dict(reward="sort", steps=1, learning_rate=0.0)
    ppo.main(ppo_args(chain, tmp_path / "1", **args, value_model=str(chain / "reward_model")))
    ppo.main(ppo_args(chain, tmp_path / "2", **args))
    ppo.main(ppo_args(chain, tmp_path / "3", steps=1))
    names = ["reward_model", "sft", "reward_model"]
    assert [path for path, _ in loaded] == [str(chain / name) for name in names]
    assert [bool(model.score.weight.any()) for _, model in loaded] == [True, False, True]


def test_two_rows_are_enough(chain, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"prompt": "ba>", "completion": "ab"}\n{"prompt": "dcf>", "completion": "cdf"}\n'
    )
    sft.main(
        sft.Args(
            model=str(chain / "sft"), dataset=str(data), output_dir=str(tmp_path / "a"), epochs=2
        )
    )
    args = dict(dataset=str(data), reward=str(chain / "reward_model"))
    ppo.main(ppo_args(chain, tmp_path / "b", **args))
    assert "gold" not in metrics(tmp_path / "b")[-1]


@pytest.mark.parametrize("script", [sft, reward_model, dpo])
def test_more_steps_than_the_epochs_have_are_named(chain, tmp_path, capsys, script):
    data = tmp_path / "rows.jsonl"
    row = dict(prompt="ba>", completion="ab", chosen="ab", rejected="b")
    data.write_text(json.dumps(row) + "\n")
    args = dict(model=str(chain / "sft"), dataset=str(data), output_dir=str(tmp_path / "run"))
    script.main(script.Args(**args, epochs=2, batch_size=1, steps=3))
    assert "--steps 3: the run ends after 2," in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_checkpoint_with_sampling_settings_saves(chain, tmp_path):
    """Llama 2 names a temperature without do_sample, which transformers refuses to save."""
    shutil.copytree(chain / "sft", tmp_path / "model")
    config = tmp_path / "model/generation_config.json"
    settings = dict(temperature=0.6, top_p=0.9, eos_token_id=[1, 2])
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    model = str(tmp_path / "model")
    folder = tmp_path / "run"
    sft.main(sft.Args(model=model, output_dir=str(folder), batch_size=32, steps=1))
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2] and not {"temperature", "top_p"} & saved.keys()


def test_bfloat16_compute_keeps_float32_weights(chain, tmp_path):
    """The GPU's path, on the CPU: bfloat16 autocast, a ratio near 1 and a KL of 0 before the first
    update."""
    ppo.main(ppo_args(chain, tmp_path / "run", dtype="bfloat16"))
    (_, first, *_) = metrics(tmp_path / "run")
    assert first["ratio_max_dev"] < 0.05 and first["kl"] == 0
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "run").values())


def test_overwrite_moves_earlier_runs_aside(chain, tmp_path, capsys):
    """Each to a name of its own; nothing is deleted."""
    run = dict(output_dir=str(tmp_path / "run"), batch_size=32, steps=1)
    sft.main(sft.Args(**run, seed=1))
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**run))
    refused(capsys, str(tmp_path / "run"), "--resume", "--overwrite")
    for seed in (2, 3):
        sft.main(sft.Args(**run, overwrite=True, seed=seed))
    for name, seed in [("run.old", 1), ("run.old.old", 2), ("run", 3)]:
        assert json.loads((tmp_path / name / "args.json").read_text())["seed"] == seed
        assert (tmp_path / name / "model.safetensors").is_file()


def test_a_folder_of_other_files_is_not_written_to(chain, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(SystemExit):
            sft.main(sft.Args(output_dir=str(tmp_path), overwrite=overwrite))
        refused(capsys, "--output-dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------- what a person meets
@pytest.mark.parametrize(
    "script, argv, words",
    [
        (ppo, [], ["runs/sft", "python sft.py"]),
        (dpo, ["--label-smoothing", "0.1", "--loss-type", "ipo"], ["--label-smoothing", "ipo"]),
        (dpo, ["--simpo-margin", "2"], ["--simpo-margin", "sigmoid"]),
        (dpo, ["--beta", "0"], ["--beta", "above 0"]),
        (rejection_sampling, ["--select", "top-k"], ["--select top-k", "--select-k None"]),
        (grpo, ["--num-generations", "1"], ["--num-generations is 1"]),
        (rloo, ["--num-generations", "1"], ["--num-generations is 1"]),
        (grpo, ["--kl-estimator", "k3", "--kl-in", "reward"], ["--kl-estimator k3", "--kl-in"]),
        (sft, ["--dataset", "my.jsonl"], ["--dataset", "--model"]),
        (sft, ["--resume"], ["--resume", "runs/sft holds no run"]),
        (sft, ["--chat-template-kwargs", "{}"], ["--chat-template-kwargs needs --model"]),
        (sft, ["--model", "./nowhere"], ["--model ./nowhere", "no directory or Hub id"]),
    ],
)
def test_usage(script, argv, words, tmp_path, monkeypatch, capsys):  # noqa: PLR0917
    """Exit status 2 and one sentence, before any model loads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    laptop = dict(overwrite=True) if script is sft else dict(model="runs/sft")
    with pytest.raises(SystemExit) as stopped:
        script.main(common.cli(script.Args, laptop=laptop))
    assert stopped.value.code == 2
    refused(capsys, *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_minibatches=13), ["--num-minibatches 13", "12 completions"]),
        (dict(reward=None), ["--reward is missing"]),
        (dict(max_completion_length=100), ["do not fit the context", "--max-completion-length"]),
        (dict(max_prompt_length=2), ["longer than --max-prompt-length 2", "nothing is left"]),
        (dict(reward="./nowhere"), ["--reward ./nowhere", "no directory or Hub id"]),
        (dict(value_model="./nowhere"), ["--value-model ./nowhere", "no directory or Hub id"]),
    ],
)
def test_ppo_refuses(chain, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo_args(chain, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_text_on_the_screen_is_escaped(capsys):
    rows = [{"prompt": "a\nb\x1b[31m", "completion": "x" * 500}]
    common.Run.log_samples(SimpleNamespace(append=lambda name, rows: None), 1, rows)
    (line,) = capsys.readouterr().out.splitlines()
    assert r"a\nb\x1b[31m" in line and len(line) < 140
