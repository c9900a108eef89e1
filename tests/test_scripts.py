"""Every script end to end through main, a few steps on a tiny model; common errors of users."""

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
from conftest import ARGS, CPU, at_last_token, end_two_of_three
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import grpo
import ppo
import reward_model
import rloo
import sft

SMALL_TASK = {"sft": 64, "pairs": 64, "prompts": 64, "held out": 16}


@functools.cache
def train_chain(folder):
    """sft/ and reward_model/ in a folder, three steps each, trained once per session."""
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
    """The folder of train_chain; the built-in task is small."""
    with small_task():
        yield train_chain(tmp_path_factory.getbasetemp() / "chain")


def background_chain():
    """The folder of train_chain for background jobs, one per process."""
    with small_task():
        return train_chain(background.STATE.folder / f"chain {os.getpid()}")


def reward_file(folder, body):
    """The --reward of a new file with one function."""
    path = folder / "reward.py"
    path.write_text(f"def reward(prompts, completions, rows):\n    {body}\n")
    return f"{path}:reward"


def write_rows(path, rows):
    """Write a .jsonl file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


def refused(capsys, *words):
    """Check that exactly one error was printed, on one line with these words."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def check_refused(script, args, capsys, *words):
    """Check that main exits with status 2 and an error with these words."""
    with pytest.raises(SystemExit) as stopped:
        script.main(args)
    assert stopped.value.code == 2
    refused(capsys, *words)


# ---------------------------------------------------------------- end to end
def test_transformers_opens_the_model_of_sft(chain):
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
    """AutoModelForSequenceClassification gives our scores for right-padded rows."""
    path = str(chain / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["dbca>abcd[EOS]", "hgfedcba>abcdefgh[EOS]", "ba>a"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {"inputs": inputs.input_ids, "attention_mask": inputs.attention_mask}
    ours = common.load_scorer(path, ARGS, CPU)
    with torch.no_grad():
        expected = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, 0]
        for score in (reward_model.sequence_scores, common.last_token_scores):
            scores = score(ours, at_last_token(batch)).flatten()
            assert torch.allclose(scores, expected, atol=1e-5)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_and_kl_zero_at_the_start(chain, tmp_path, script, temperature):
    args = script.Args(
        model=str(chain / "sft"),
        reward=str(chain / "reward_model"),
        output_dir=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=6,
        num_generations=4,
        num_minibatches=2,
        max_completion_length=6,
        learning_rate=1e-3,
        warmup_steps=0,
        temperature=temperature,
        eval_every=1,
    )
    script.main(args)
    first, second = metrics(tmp_path / "run")[1:]
    assert first["ratio_max_dev"] < 1e-4 and abs(first["kl"]) < 1e-4 < abs(second["kl"])
    if script is ppo:  # all log-probs are by the same forward pass
        assert first["kl"] == 0
    wanted = {"gold", "score", "unscored", "eval/gold", "eval/gold_greedy", "eval/pass@4"}
    wanted |= {"eval/score", "eval/kl"}
    wanted |= {"explained_variance"} if script is ppo else {"zero_std_groups"}
    assert wanted <= first.keys()
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 3 * 16


@pytest.mark.parametrize("script", [sft, reward_model, dpo])
def test_losses_do_not_depend_on_the_micro_batches(chain, tmp_path, script):
    """Losses and gradient norms agree between a budget of one row and a budget of all rows."""
    for budget in (1, 100_000):
        args = dict(
            model=str(chain / "sft"),
            output_dir=str(tmp_path / str(budget)),
            batch_size=16,
            steps=3,
            learning_rate=1e-4,
            micro_batch_tokens=budget,
        )
        if script is dpo:
            args["sft_coef"] = 0.3
        script.main(script.Args(**args))
    names = {"loss", "grad_norm", "eval/loss", "chosen_logratio", "eval/rejected_logratio"}
    small, large = (metrics(tmp_path / str(budget)) for budget in (1, 100_000))
    for one, other in zip(small, large, strict=True):
        for name in one.keys() & names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_ppo_does_not_depend_on_the_micro_batches(chain, tmp_path):
    for budget in (20, 10_000):
        args = dict(micro_batch_tokens=budget, num_minibatches=3)
        ppo.main(ppo_args(chain, tmp_path / str(budget), **args))
    small, large = weights(tmp_path / "20"), weights(tmp_path / "10000")
    assert all(torch.allclose(small[name], large[name], atol=2e-5) for name in small)


def test_ppo_raises_an_exact_reward(chain, tmp_path):
    """The frequency of a letter is the reward and goes up."""
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


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_missing_eos_penalty(chain, tmp_path, monkeypatch, script):
    """Scores are 1, so the reward is 1 minus the penalty times the share without EOS."""
    end_two_of_three(monkeypatch, script)
    args = dict(
        model=str(chain / "sft"),
        reward=reward_file(tmp_path, "return [1] * len(prompts)"),
        output_dir=str(tmp_path / "run"),
        missing_eos_penalty=0.25,
        steps=1,
        prompts_per_step=7,
        num_generations=2,
        max_completion_length=6,
    )
    script.main(script.Args(**args))
    row = metrics(tmp_path / "run")[1]
    assert row["score"] == 1 and row["eos_rate"] == pytest.approx(9 / 14)
    assert row["reward"] == pytest.approx(1 - 0.25 * 5 / 14, abs=1e-5)


def test_ppo_learns_values(chain, tmp_path):
    args = dict(
        reward=reward_file(tmp_path, "return [1] * len(prompts)"),
        steps=8,
        value_clip=9.0,
        prompts_per_step=7,
    )
    ppo.main(ppo_args(chain, tmp_path / "run", **args))
    losses = [row["loss/value"] for row in metrics(tmp_path / "run")[1:]]
    assert losses[-1] < 0.5 * losses[0]


def test_reward_model_prefers_the_chosen(chain, tmp_path):
    """The margin of evaluated pairs grows when the same pairs are trained on."""
    data = write_rows(tmp_path / "pairs.jsonl", common.task_rows("pairs", False, 1))
    args = dict(
        model=str(chain / "sft"),
        dataset=data,
        eval_dataset=data,
        batch_size=32,
        epochs=15,
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-3,
        warmup_steps=0,
    )
    reward_model.main(reward_model.Args(**args))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["eval/margin"] > rows[0]["eval/margin"] + 0.5
    assert rows[-1]["eval/accuracy"] > 0.6


def test_sft_loss_is_the_nll_of_the_completions(chain, tmp_path):
    """Five rows in batches of two are three steps; each row is trained once, EOS included.

    The expected losses are means over tokens by the forward pass of transformers."""
    rows = [("dbca>", "abcd"), ("b>", ""), ("gf>", "fg"), ("zya>", "a"), ("k>", "kk")]
    data = write_rows(tmp_path / "rows.jsonl", [dict(prompt=p, completion=c) for p, c in rows])
    args = dict(model=str(chain / "sft"), dataset=data, batch_size=2, learning_rate=0.0)
    sft.main(sft.Args(**args, output_dir=str(tmp_path / "run")))
    model = AutoModelForCausalLM.from_pretrained(chain / "sft")
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft")
    nll = []
    for prompt, completion in rows:
        ids = tokenizer(f"{prompt}{completion}[EOS]", return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        nll.append(-logprobs[len(prompt) - 1 :, 0])
        assert len(nll[-1]) == len(completion) + 1
    order = common.shuffled_examples(nll, 1, 0, 5)
    expected = [torch.cat(order[i : i + 2]).mean().item() for i in (0, 2, 4)]
    assert [row["loss"] for row in metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_each_step_samples_with_new_noise(chain, tmp_path, monkeypatch, script):
    """One prompt, learning rate 0: only the noise differs between steps and between seeds."""
    sampled = []
    inner = script.sample

    def sample(*args, **kwargs):
        rollouts = inner(*args, **kwargs)
        sampled.append([rollout["completion_ids"] for rollout in rollouts])
        return rollouts

    monkeypatch.setattr(script, "sample", sample)
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "prompt.jsonl", [dict(prompt="dbca>")]),
        reward=reward_file(tmp_path, "return [1] * len(prompts)"),
        steps=2,
        prompts_per_step=1,
        num_generations=4,
        max_completion_length=6,
        learning_rate=0.0,
    )
    for seed in (1, 2, 1):
        script.main(script.Args(**args, seed=seed, output_dir=str(tmp_path / str(len(sampled)))))
    assert sampled[:2] == sampled[4:] and len({str(ids) for ids in sampled}) == 4


# ---------------------------------------------------------------- rollouts.jsonl
@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_rollouts_can_be_read(chain, tmp_path, script):
    """Every --log-every steps, a whole group: prompt, completions, scores, rewards, advantages."""
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "prompts.jsonl", [dict(prompt="dbca>"), dict(prompt="fe>")]),
        reward=reward_file(tmp_path, "return [float(len(c)) for c in completions]"),
        output_dir=str(tmp_path / "run"),
        steps=4,
        prompts_per_step=2,
        num_generations=9,
        max_completion_length=6,
        missing_eos_penalty=0.5,
        kl_coef=0.0,
        log_every=2,
    )
    script.main(script.Args(**args))
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 9 + [4] * 9
    for group in (rows[:9], rows[9:]):
        assert len({row["prompt"] for row in group}) == 1
        for row in group:
            assert row["score"] == len(row["completion"])
            assert row["reward"] == row["score"] - 0.5 * (not row["finished"])
            assert len(row["completion"]) <= row["length"] <= 6
        if script is not ppo:
            assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
            ordered = sorted(group, key=lambda row: row["reward"])
            advantages = [row["advantage"] for row in ordered]
            assert advantages == sorted(advantages) and advantages[0] < 0 < advantages[-1]


# ---------------------------------------------------------------- completions without a score
@pytest.mark.parametrize("script", [ppo, rloo, grpo])
def test_groups_with_an_unscored_completion_are_dropped(chain, tmp_path, monkeypatch, script):
    """Two None drop two of six groups from batch and metrics; trl#5902 counted None as 0."""
    batches = []
    inner = script.completion_batch

    def completion_batch(rollouts, device):
        batches.append([rollout["completion_ids"] for rollout in rollouts])
        return inner(rollouts, device)

    monkeypatch.setattr(script, "completion_batch", completion_batch)
    body = "return [None if i in (0, 7) else float(len(c)) for i, c in enumerate(completions)]"
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "prompts.jsonl", [dict(prompt="dbca>"), dict(prompt="fe>")]),
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
    assert row["unscored"] == pytest.approx(4 / 12)
    letters = [[i for i in ids if i > 2] for ids in completions]  # without PAD, EOS and UNK
    assert row["score"] == pytest.approx(sum(map(len, letters)) / 8)


@pytest.mark.parametrize(
    "script, flags",
    [(ppo, {}), (rloo, {}), (grpo, {}), (grpo, dict(dynamic_sampling=True))],
)
def test_fewer_scored_completions_than_minibatches(chain, tmp_path, capsys, script, flags):
    """The run ends with an error: no score at all, or 4 completions for 5 minibatches."""
    args = dict(
        model=str(chain / "sft"),
        steps=1,
        prompts_per_step=3,
        num_generations=4,
        max_completion_length=6,
        **flags,
    )
    for scored, num_minibatches in [(0, 1), (4, 5), (4, 4)]:
        body = f"return [1.0 if p in prompts[:{scored}] else None for p in prompts]"
        args |= dict(
            reward=reward_file(tmp_path, body),
            num_minibatches=num_minibatches,
            output_dir=str(tmp_path / f"{scored}-{num_minibatches}"),
        )
        if scored < num_minibatches:
            words = [f"--num-minibatches {num_minibatches}: ", f" {scored} scored"]
            check_refused(script, script.Args(**args), capsys, *words)
    if not flags:
        script.main(script.Args(**args))
        row = metrics(tmp_path / "4-4")[1]
        assert row["unscored"] == pytest.approx(2 / 3)
        assert row["score"] == 1 == row.get("zero_std_groups", 1)


# ---------------------------------------------------------------- models and data
def test_learning_rate_schedules():
    """Warmup ends at the peak; linear and cosine reach 0 one step after the last."""

    def rates(schedule):
        args = SimpleNamespace(learning_rate=2.0, warmup_steps=3, lr_schedule=schedule)
        return [ppo.scheduled_learning_rate(step, 7, args) for step in range(8)]

    assert rates("constant") == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert rates("linear") == [0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0]
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([0.5, 1, 1.5, 2, 1 + half, 1, 1 - half, 0])


def test_initial_value_model_of_ppo(chain, tmp_path, monkeypatch):
    """--value-model; otherwise the policy with a zero head, or the reward model if there is one."""
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


@pytest.mark.parametrize("script", [sft, reward_model, dpo])
@pytest.mark.parametrize("batch_size, steps, expected", [(1, 1, 1), (1, 3, 2), (64, None, 1)])
def test_number_of_steps(chain, tmp_path, script, batch_size, steps, expected):  # noqa: PLR0917
    """Two epochs of one row are two batches of one row, or one larger batch; --steps is a limit."""
    row = dict(prompt="ba>", completion="ab", chosen="ab", rejected="b")
    args = dict(
        model=str(chain / "sft"),
        dataset=write_rows(tmp_path / "rows.jsonl", [row]),
        output_dir=str(tmp_path / "run"),
        epochs=2,
        batch_size=batch_size,
        steps=steps,
    )
    script.main(script.Args(**args))
    assert metrics(tmp_path / "run")[-1]["step"] == expected


def test_ppo_with_fewer_prompts_than_a_step(chain, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [dict(prompt="ba>"), dict(prompt="dcf>")])
    ppo.main(ppo_args(chain, tmp_path / "run", dataset=data))
    assert "gold" not in metrics(tmp_path / "run")[-1]


def test_sampling_settings_of_a_checkpoint_are_not_saved(chain, tmp_path):
    """The config of Llama 2 has a temperature without do_sample; transformers cannot save it."""
    shutil.copytree(chain / "sft", tmp_path / "model")
    config = tmp_path / "model/generation_config.json"
    settings = dict(temperature=0.6, top_p=0.9, eos_token_id=[1, 2])
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    folder = tmp_path / "run"
    args = dict(model=str(tmp_path / "model"), batch_size=32, steps=1)
    sft.main(sft.Args(**args, output_dir=str(folder)))
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2] and not {"temperature", "top_p"} & saved.keys()


def test_bfloat16_compute_keeps_float32_weights(chain, tmp_path):
    """bfloat16 autocast on the CPU: before the first update the ratio is near 1 and the KL 0."""
    ppo.main(ppo_args(chain, tmp_path / "run", dtype="bfloat16"))
    first = metrics(tmp_path / "run")[1]
    assert first["ratio_max_dev"] < 0.05 and first["kl"] == 0
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "run").values())


# ---------------------------------------------------------------- output directories and errors
def test_overwrite_moves_the_earlier_run_aside(chain, tmp_path, capsys):
    run = dict(output_dir=str(tmp_path / "run"), batch_size=32, steps=1)
    sft.main(sft.Args(**run, seed=1))
    check_refused(sft, sft.Args(**run), capsys, str(tmp_path / "run"), "--resume", "--overwrite")
    sft.main(sft.Args(**run, overwrite=True, seed=2))
    (earlier,) = tmp_path.glob("run.*-*")
    for folder, seed in [(earlier, 1), (tmp_path / "run", 2)]:
        assert json.loads((folder / "args.json").read_text())["seed"] == seed
        assert (folder / "model.safetensors").is_file()


def test_a_folder_of_other_files_is_not_written_to(chain, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    for overwrite in (False, True):
        args = sft.Args(output_dir=str(tmp_path), overwrite=overwrite)
        check_refused(sft, args, capsys, "--output-dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "script, argv, words",
    [
        (ppo, [], ["runs/sft does not exist", "`python NAME.py`"]),
        (dpo, ["--label-smoothing", "0.1", "--loss-type", "ipo"], ["--label-smoothing", "ipo"]),
        (grpo, ["--num-generations", "1"], ["--num-generations must be at least 2"]),
        (sft, ["--dataset", "my.jsonl"], ["--dataset", "--model"]),
    ],
)
def test_usage(script, argv, words, tmp_path, monkeypatch, capsys):  # noqa: PLR0917
    """Exit with status 2 and one sentence before any model is loaded."""
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
        (dict(reward=None), ["--reward is missing"]),
        (dict(max_completion_length=100), ["exceed its context of 64"]),
        (dict(max_prompt_length=2), ["sort", "no usable rows"]),
        (dict(ptx_coef=1.0), ["--ptx-coef", "--ptx-dataset"]),
        (dict(ptx_dataset="sort"), ["--ptx-coef", "--ptx-dataset"]),
    ],
)
def test_ppo_refuses(chain, tmp_path, capsys, changes, words):
    check_refused(ppo, ppo_args(chain, tmp_path / "run", **changes), capsys, *words)
    assert not (tmp_path / "run").exists()


def test_printed_samples_are_short_and_escaped(capsys):
    rollout = {"prompt": "a\nb\x1b[31m", "prompt_ids": [], "completion_ids": [5] * 500}
    run = SimpleNamespace(append=lambda name, row: None, tokenizer=sft.tiny_tokenizer())
    common.Run.log_samples(run, 1, [rollout], {})
    (line,) = capsys.readouterr().out.splitlines()
    assert r"a\nb\x1b[31m" in line and len(line) < 140
