"""docs/recipes.md: its Python runs, and its diff applies, on small models."""

import contextlib
import importlib.util
import json
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CPU
from test_data import letters, talk
from test_family import ROOT
from test_scripts import chain, metrics  # noqa: F401 (a fixture)

import common
import dpo
import rejection_sampling
import sft

PAGE = (ROOT / "docs/recipes.md").read_text()


def block(words, language="python"):
    (found,) = [x for x in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if words in x]
    return found


@pytest.fixture(scope="module")
def rollouts(chain, tmp_path_factory):  # noqa: F811
    """A run of rejection_sampling.py, with a reward that varies and prompts without a score."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "rule.py").write_text(
        "def rule(prompts, completions, rows):\n"
        "    return [None if 'z' in p else len(c) % 3 for p, c in zip(prompts, completions)]\n"
    )
    rejection_sampling.main(
        rejection_sampling.Args(
            model=str(chain / "sft"),
            reward=f"{folder}/rule.py:rule",
            prompts_per_iteration=24,
            num_generations=4,
            max_completion_length=8,
            steps=1,
            output_dir=str(folder / "run"),
        )
    )
    return folder / "run"


def test_pairs_of_rollouts(rollouts, chain, tmp_path, monkeypatch):  # noqa: F811
    """The best and the worst of each prompt whose scores differ; dpo.py takes them."""
    (tmp_path / "pairs.py").write_text(block("sys.argv"))
    monkeypatch.setattr(sys, "argv", ["pairs.py", str(rollouts), str(tmp_path / "pairs.jsonl")])
    runpy.run_path(str(tmp_path / "pairs.py"))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    records = [json.loads(x) for x in (rollouts / "rollouts.jsonl").read_text().splitlines()]
    by_prompt = {record["row"]["prompt"]: record for record in records}
    assert 0 < len(pairs) < len(records)
    for pair in pairs:
        record = by_prompt[pair["prompt"]]
        triples = zip(record["completions"], record["scores"], record["finished"])
        scores = {text: score for text, score, ended in triples if ended}
        known = [score for score in scores.values() if score is not None]
        assert scores[pair["chosen"]] == max(known) > min(known) == scores[pair["rejected"]]
    args = dict(model=str(chain / "sft"), dataset=str(tmp_path / "pairs.jsonl"), steps=1)
    dpo.main(dpo.Args(**args, output_dir=str(tmp_path / "dpo")))


def test_swapped_answers_swap_the_judges_sign(tmp_path, monkeypatch):
    """Swapped answers swap the sign, and it is a reward like any other."""
    tokenizer = letters(chat=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "judge.py").write_text(block("log_odds"))
    monkeypatch.setenv("JUDGE", str(tmp_path / "judge"))
    functions = runpy.run_path(str(tmp_path / "judge.py"))
    ours = functions["preference"]("Add 1 and 2.", "3", "4")
    assert ours == pytest.approx(-functions["preference"]("Add 1 and 2.", "4", "3"), abs=1e-5)
    assert abs(ours) > 1e-4
    (reward,) = common.load_rewards(
        types.SimpleNamespace(reward=f"{tmp_path}/judge.py:better_than_answer"),
        [],
        tokenizer,
        [1],
        device=CPU,
        autocast=contextlib.nullcontext,
    )
    asked = {"prompt": "Add 1 and 2.", "row": {"answer": "4"}}
    asked["prompt_ids"] = tokenizer(asked["prompt"]).input_ids
    score = reward([asked], [tokenizer("3").input_ids])
    assert score.item() == pytest.approx(ours, abs=1e-4)
    assert talk("x")  # (messages are for models; the judge's question is a text)


def test_prompts_by_solve_rate(rollouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rejection_sampling").symlink_to(rollouts)
    exec(block("solve_rate").replace("0.2 <=", "0.0 <="), {})
    assert len(Path("kept.jsonl").read_text().splitlines()) == 24


def test_sft_on_the_samples_of_a_teacher(rollouts, chain, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/teacher_samples").symlink_to(rollouts)
    exec(block("taught.jsonl"), {})
    records = [json.loads(x) for x in (rollouts / "rollouts.jsonl").read_text().splitlines()]
    right = sum(record["scores"].count(1) for record in records)
    assert len(Path("taught.jsonl").read_text().splitlines()) == right > 0
    args = dict(model=str(chain / "sft"), dataset="taught.jsonl", steps=1, max_length=60)
    sft.main(sft.Args(**args, output_dir="runs/taught"))


def apply(diff, text):
    """Each `-` line is replaced by the `+` lines that follow it; without one, they stand after the
    line of context before them."""
    for hunk in diff.split("@@")[1:]:
        lines = [line for line in hunk.splitlines()[1:] if line]
        added = "\n".join(line[1:] for line in lines if line.startswith("+"))
        (anchor,) = [line for line in lines if not line.startswith("+")]
        assert text.count(anchor[1:]) == 1, anchor
        kept = "" if anchor.startswith("-") else anchor[1:] + "\n"
        text = text.replace(anchor[1:], kept + added)
    return text


def test_rebel_starts_at_the_squared_reward_difference_and_falls(chain, tmp_path, monkeypatch):  # noqa: F811
    """The loss of the first update, where every log-ratio is 0, is the mean of the squared
    differences of rewards, over 2; three more updates bring it down."""
    (tmp_path / "rebel.py").write_text(
        apply(block("rloo.py", "diff"), Path(ROOT / "rloo.py").read_text())
    )
    spec = importlib.util.spec_from_file_location("rebel", tmp_path / "rebel.py")
    rebel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rebel", rebel)
    spec.loader.exec_module(rebel)
    (tmp_path / "rule.py").write_text(
        "def rule(prompts, completions, rows):\n    return [len(c) / 4 for c in completions]\n"
    )
    differences = []
    leave_one_out = rebel.leave_one_out_advantages

    def spy(rewards, group_size):
        advantages = leave_one_out(rewards, group_size)
        differences.extend(advantages[0::2].tolist())
        return advantages

    monkeypatch.setattr(rebel, "leave_one_out_advantages", spy)
    losses = []
    for epochs in (1, 4):
        differences.clear()
        rebel.main(
            rebel.Args(
                model=str(chain / "sft"),
                reward=f"{tmp_path}/rule.py:rule",
                num_generations=2,
                prompts_per_step=8,
                update_epochs=epochs,
                kl_coef=0.0,
                steps=1,
                learning_rate=1e-4,
                warmup_steps=0,
                max_completion_length=8,
                output_dir=str(tmp_path / str(epochs)),
            )
        )
        losses.append(metrics(tmp_path / str(epochs))[-1]["loss"])
    first = sum(d * d for d in differences) / len(differences) / 2
    assert losses[0] == pytest.approx(first, rel=1e-4) and losses[1] < 0.95 * losses[0]
