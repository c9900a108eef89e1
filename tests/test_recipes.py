"""Python and diff of docs/recipes.md, and the chat template lines of docs/data.md, run."""

import importlib.util
import json
import math
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
import reward_model
import sft

PAGE = (ROOT / "docs/recipes.md").read_text()


def block(words, language="python"):
    """The only block of the page with these words."""
    (found,) = [x for x in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if words in x]
    return found


@pytest.fixture(scope="module")
def rollouts(chain, tmp_path_factory):  # noqa: F811
    """Rollouts with different scores per prompt; prompts with a z have no score."""
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
    """pairs.py takes the best and the worst completion of a prompt, and dpo.py trains on them."""
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


def save_chat_model(folder):
    """A tiny language model with a chat template, one token per character."""
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
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def reward_of(path, tokenizer, prompt, completions, finished, row=None):  # noqa: PLR0917
    """--reward PATH of completions of one prompt, given as texts, through common.Reward."""
    args = types.SimpleNamespace(reward=path, reward_combine="mean")
    prompt_ids, _ = common.encode_completions(tokenizer, prompt, [])
    example = {"prompt": prompt, "prompt_ids": prompt_ids, "row": row or {}}
    ids_of = tokenizer.convert_tokens_to_ids  # one token per character, special tokens spelled out
    rollouts = [
        example | {"completion_ids": list(map(ids_of, text)), "finished": is_finished}
        for text, is_finished in zip(completions, finished)
    ]
    return common.load_reward(args, [], tokenizer, CPU)(rollouts).tolist()


def test_judge_is_antisymmetric_and_a_reward(tmp_path, monkeypatch):
    tokenizer = save_chat_model(tmp_path / "judge")
    (tmp_path / "judge.py").write_text(block("log_odds"))
    monkeypatch.setenv("JUDGE", str(tmp_path / "judge"))
    functions = runpy.run_path(str(tmp_path / "judge.py"))
    preference = functions["preference"]("Add 1 and 2.", "3", "4")
    swapped = functions["preference"]("Add 1 and 2.", "4", "3")
    assert preference == pytest.approx(-swapped, abs=1e-5) and abs(preference) > 1e-4
    path = f"{tmp_path}/judge.py:better_than_answer"
    scores = reward_of(path, tokenizer, "Add 1 and 2.", ["3"], [True], row={"answer": "4"})
    assert scores == pytest.approx([preference], abs=1e-4)


@pytest.mark.parametrize("prompt", ["a\nb?", talk("a\nb?")], ids=["text", "messages"])
def test_process_reward_is_the_worst_step(prompt, tmp_path, monkeypatch):
    """The score equals transformers' own forward at the worst step. Newlines of the prompt end
    no step, and the last step of an unfinished completion is not scored."""
    tokenizer = save_chat_model(tmp_path / "sft")
    row = {"prompt": prompt, "completions": ["x", "yz"], "labels": [True, False]}
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    args = dict(model=str(tmp_path / "sft"), dataset=str(tmp_path / "steps.jsonl"), loss="process")
    reward_model.main(reward_model.Args(**args, steps=1, output_dir=str(tmp_path / "prm")))
    (tmp_path / "prm.py").write_text(block("worst_step"))
    monkeypatch.setenv("PRM", str(tmp_path / "prm"))

    text = prompt if isinstance(prompt, str) else common.render(tokenizer, prompt, None)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "prm").eval()

    def expected(*steps):
        ids = [tokenizer(text + step, return_tensors="pt") for step in steps]
        scores = torch.stack([model(**x).logits[0, 0] for x in ids])
        assert len(scores) == 1 or scores.std() > 1e-3  # so the minimum matters
        return torch.nn.functional.logsigmoid(scores).min().item()

    end = "<|im_end|>"
    completions = {
        ("x\nyz\n\nw", True): expected("x\n", "x\nyz\n", f"x\nyz\n\nw{end}"),
        ("x\nyz\nw", False): expected("x\n", "x\nyz\n"),
        ("w\nv", True): expected("w\n", f"w\nv{end}"),
        ("w\nv", False): expected("w\n"),
        ("v", True): expected(f"v{end}"),
        ("v", False): expected("v"),  # no step has ended
    }
    texts, finished = zip(*completions)
    scores = reward_of(f"{tmp_path}/prm.py:reward", tokenizer, prompt, texts, finished)
    assert scores == pytest.approx(list(completions.values()), abs=1e-4)
    if isinstance(prompt, list):  # it would end the turn
        (score,) = reward_of(f"{tmp_path}/prm.py:reward", tokenizer, prompt, [f"x{end}y"], [True])
        assert math.isnan(score)


def test_chat_template_variable_is_saved(tmp_path, monkeypatch):
    """The lines of docs/data.md turn off reasoning in every later load of the tokenizer."""
    template = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}x"
    monkeypatch.chdir(tmp_path)
    letters(chat=True, template=template).save_pretrained("models/qwen3")
    prompt = talk("a")
    assert common.render(common.load_tokenizer("models/qwen3"), prompt, None) == "<think>x"
    page = (ROOT / "docs/data.md").read_text()
    (lines,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "{% set" in x]
    exec(lines, {})
    assert common.render(common.load_tokenizer("models/qwen3"), prompt, None) == "x"


def test_prompts_by_solve_rate(rollouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rejection_sampling").symlink_to(rollouts)
    exec(block("solve_rate").replace("0.2 <=", "0.0 <="), {})
    records = [json.loads(x) for x in (rollouts / "rollouts.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert kept == [record["row"] for record in records] and len(kept) == 24


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
    """Apply a diff: `+` lines replace the `-` line before them, or follow a line of context."""
    for hunk in diff.split("@@")[1:]:
        lines = [line for line in hunk.splitlines()[1:] if line]
        added = "\n".join(line[1:] for line in lines if line.startswith("+"))
        (anchor,) = [line for line in lines if not line.startswith("+")]
        assert text.count(anchor[1:]) == 1, anchor
        kept = "" if anchor.startswith("-") else anchor[1:] + "\n"
        text = text.replace(anchor[1:], kept + added)
    return text


def test_rebel_starts_at_the_squared_reward_difference_and_falls(chain, tmp_path, monkeypatch):  # noqa: F811
    """In the first update every log-ratio is 0, so the loss is half the mean squared difference of
    rewards. Three more updates reduce it."""
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
