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
    (tmp_path / "pairs.py").write_text(block("pairs = sys.argv"))
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


def test_revisions_follow_a_critique(tmp_path, monkeypatch):
    """The revision answers a conversation of prompt, answer, critique by a principle, request to
    revise. sft.py trains on it."""
    tokenizer = save_chat_model(tmp_path / "chat")
    prompts = ["Add 1 and 2.", "Who are you?"]
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    code = block("REVISION").replace("max_new_tokens=300", "max_new_tokens=4, min_new_tokens=4")
    (tmp_path / "revise.py").write_text(code)
    paths = [str(tmp_path / name) for name in ("chat", "prompts.jsonl", "revised.jsonl")]
    monkeypatch.setattr(sys, "argv", ["revise.py", *paths])
    texts = []
    apply_chat_template = transformers.PreTrainedTokenizerBase.apply_chat_template

    def spy(self, messages, **kwargs):
        texts.append([message["content"] for message in messages])
        return apply_chat_template(self, messages, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", spy)
        page = runpy.run_path(str(tmp_path / "revise.py"))
    revised = [json.loads(line) for line in Path(paths[2]).read_text().splitlines()]
    critiques = [page["CRITIQUE"].format(principle) for principle in page["PRINCIPLES"]]
    for i, prompt in enumerate(prompts):
        first, second, third = texts[3 * i : 3 * i + 3]
        assert first == [prompt] == second[:1] and third[:3] == second
        assert second[2] in critiques and third[4] == page["REVISION"]
        conversation = talk(*third)
        ids = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = page["model"].generate(**ids, max_new_tokens=4, min_new_tokens=4)
        new_ids = output[0, ids["input_ids"].shape[1] :]
        expected = tokenizer.decode(new_ids, skip_special_tokens=True)
        assert revised[i] == {"messages": talk(prompt, expected)} and expected
    args = dict(model=paths[0], dataset=paths[2], steps=1)
    sft.main(sft.Args(**args, output_dir=str(tmp_path / "revised")))
    assert metrics(tmp_path / "revised")[-1]["loss"] > 0


def test_win_rate_of_two_runs(tmp_path, monkeypatch, capsys):
    """Only the last samples count, ties are half a win, and pairs of unlike length are apart."""
    golds = {  # prompt -> gold and completion of both runs
        "a": [(1.0, "x" * 20), (0.0, "x" * 20)],
        "b": [(1.0, "x" * 20), (0.0, "x" * 22)],
        "c": [(0.0, "x" * 20), (0.0, "x" * 21)],
        "d": [(0.0, "x" * 20), (1.0, "x" * 23)],
        "e": [(0.0, ""), (1.0, "")],
        "only in the first": [(1.0, "x")],
    }
    for i, folder in enumerate(["first", "second"]):
        (tmp_path / folder).mkdir()
        rows = [{"step": 0, "prompt": "a", "completion": "x", "gold": 1.0 - i}]
        for prompt, runs in golds.items():
            if i < len(runs):
                gold, text = runs[i]
                rows.append({"step": 9, "prompt": prompt, "completion": text, "gold": gold})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / "samples.jsonl").write_text(lines)
    (tmp_path / "win_rate.py").write_text(block("is_like_length"))
    paths = [str(tmp_path / "first"), str(tmp_path / "second")]
    monkeypatch.setattr(sys, "argv", ["win_rate.py", *paths])
    runpy.run_path(str(tmp_path / "win_rate.py"))
    assert capsys.readouterr().out.splitlines() == [
        "all pairs: 0.500 ± 0.200 (5 prompts)",
        "like length: 0.625 ± 0.207 (4 prompts)",
    ]


@pytest.mark.parametrize("prompt", ["a\nb?", talk("a\nb?")], ids=["text", "messages"])
def test_process_reward_is_the_worst_step(prompt, tmp_path, monkeypatch):
    """The score equals transformers' own forward at the worst step. Newlines of the prompt end
    no step, and a step that is cut is not scored."""
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
        ("x\nw\n", False): expected("x\n", "x\nw\n"),  # cut after a finished step
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
    template = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    template += "{{ messages[0].content }}"
    monkeypatch.chdir(tmp_path)
    letters(chat=True, template=template).save_pretrained("models/qwen3")
    prompt = talk("a")
    assert common.render(common.load_tokenizer("models/qwen3"), prompt, None) == "<think>a"
    page = (ROOT / "docs/data.md").read_text()
    (lines,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "{% set" in x]
    exec(lines, {})
    assert common.render(common.load_tokenizer("models/qwen3"), prompt, None) == "a"


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


def test_kept_answers_are_right_and_distinct(rollouts, tmp_path, monkeypatch):
    (tmp_path / "kept.py").write_text(block("kept = sys.argv"))
    kept = tmp_path / "kept.jsonl"
    monkeypatch.setattr(sys, "argv", ["kept.py", str(rollouts), str(kept)])
    runpy.run_path(str(tmp_path / "kept.py"))
    records = [json.loads(x) for x in (rollouts / "rollouts.jsonl").read_text().splitlines()]
    expected = {
        (record["row"]["prompt"], completion)
        for record in records
        for completion, score in zip(record["completions"], record["scores"])
        if score == 1
    }
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {(row["prompt"], row["completion"]) for row in rows} == expected
    assert 0 < len(rows) == len(expected)


def test_chains_name_stages_that_were_run_before(monkeypatch):
    """Every model, reward and data file of a chain is written by an earlier command."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    recipes = importlib.import_module("recipes")
    start = {"runs/sft", "runs/reward_model", "sort"}
    for name in recipes.CHAINS[1:]:
        known = set(start)
        for words in recipes.chain_commands(name):
            if words[0] == "kept.py":
                assert words[1] in known
                known.add(words[2])
                continue
            inputs = ("--model", "--reward", "--value-model", "--dataset", "--eval-dataset")
            used = {recipes.flag(words, x) for x in inputs} - {None}
            assert {path.removesuffix("/rollouts.jsonl") for path in used} <= known
            out = recipes.flag(words, "--output-dir", "runs/ppo")
            assert out not in known
            known.add(out)


def test_tables_of_chains_and_frontier_match_the_measurements(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    recipes = importlib.import_module("recipes")
    closed_form = importlib.import_module("closed_form")
    recipes.table(recipes.read_lines(recipes.POINTS))
    rows = recipes.read_lines(closed_form.END_POINTS)
    closed_form.add_shares(rows)
    closed_form.frontier_table(rows)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    pages = PAGE + (ROOT / "docs/correctness.md").read_text()
    assert len(printed) > 20 and not set(printed) - set(pages.splitlines())


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


@pytest.fixture
def rebel(tmp_path, monkeypatch):
    """rloo.py with the diff of the page applied, as a module."""
    path = tmp_path / "rebel.py"
    path.write_text(apply(block("rloo.py", "diff"), Path(ROOT / "rloo.py").read_text()))
    spec = importlib.util.spec_from_file_location("rebel", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rebel", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("prompt_length", [1, 3])
def test_rebel_loss_matches_the_formula(rebel, prompt_length):
    """Half the mean over pairs of (difference of log-ratios - difference of rewards)^2, in float64.

    After a prompt of one token, the longest row of a batch is completion from end to end."""
    lengths = [5, 3, 1, 4, 2, 2]
    rng = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    logprobs = torch.randn(len(lengths), 7, generator=rng, dtype=torch.float64)
    old_logprobs = torch.randn(len(lengths), 7, generator=rng, dtype=torch.float64)
    width = prompt_length - 1 + max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.float64)
    for row, length in enumerate(lengths):
        mask[row, prompt_length - 1 : prompt_length - 1 + length] = 1
    logprobs = (logprobs[:, :width] * mask).requires_grad_()
    old_logprobs = old_logprobs[:, :width] * mask

    advantages = rebel.leave_one_out_advantages(rewards, 2)[:, None] * mask
    weights = mask / len(mask)
    loss, _ = rebel.reinforce_loss(logprobs, old_logprobs, advantages, weights, epsilon=0.2)
    loss.backward()
    expected = 0.0
    gradient = torch.zeros_like(mask)
    for i in range(0, len(lengths), 2):
        ratios = [(logprobs[row] - old_logprobs[row]).sum().item() for row in (i, i + 1)]
        error = ratios[0] - ratios[1] - (rewards[i] - rewards[i + 1]).item()
        expected += error**2 / len(lengths)
        gradient[i] = 2 * error / len(lengths) * mask[i]
        gradient[i + 1] = -2 * error / len(lengths) * mask[i + 1]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logprobs.grad * mask, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
@pytest.mark.parametrize("prompts", ["sort", "one token"])
def test_rebel_starts_at_the_squared_reward_difference_and_falls(  # noqa: PLR0917
    rebel,
    chain,  # noqa: F811
    prompts,
    num_minibatches,
    tmp_path,
    monkeypatch,
):
    """With log-ratios of 0, the loss of each minibatch is half the mean squared difference of its
    rewards. Four epochs reduce it. Micro-batches of 40 tokens hold one or two pairs."""
    dataset = "sort"
    if prompts == "one token":
        dataset = str(tmp_path / "prompts.jsonl")
        Path(dataset).write_text("".join(f'{{"prompt": "{x}"}}\n' for x in "abcdefgh"))
    (tmp_path / "rule.py").write_text(
        "def rule(prompts, completions, rows):\n"
        "    return [len(c) / 4 + c.count('a') for c in completions]\n"
    )
    differences = []
    batches = []
    leave_one_out = rebel.leave_one_out_advantages
    minibatch_rows = rebel.minibatch_rows

    def spy(rewards, group_size):
        advantages = leave_one_out(rewards, group_size)
        differences.extend(advantages[0::2].tolist())
        return advantages

    def spy_rows(*args):
        batches.extend(minibatch_rows(*args))
        return batches[-num_minibatches:]

    monkeypatch.setattr(rebel, "leave_one_out_advantages", spy)
    monkeypatch.setattr(rebel, "minibatch_rows", spy_rows)
    losses = []
    for epochs, learning_rate in [(1, 0.0), (4, 1e-4)]:
        differences.clear()
        batches.clear()
        rebel.main(
            rebel.Args(
                model=str(chain / "sft"),
                dataset=dataset,
                eval_dataset="sort",
                reward=f"{tmp_path}/rule.py:rule",
                num_generations=2,
                prompts_per_step=8,
                update_epochs=epochs,
                num_minibatches=num_minibatches,
                kl_coef=0.0,
                steps=1,
                learning_rate=learning_rate,
                warmup_steps=0,
                max_completion_length=8,
                micro_batch_tokens=40,
                output_dir=str(tmp_path / str(epochs)),
            )
        )
        losses.append(metrics(tmp_path / str(epochs))[-1]["loss"])
        rows = [row for batch in batches[:num_minibatches] for row in batch.tolist()]
        assert sorted(rows) == list(range(16)) and rows != sorted(rows)
    halves = [
        sum(differences[row // 2] ** 2 for row in batch.tolist()) / len(batch) / 2
        for batch in batches[:num_minibatches]
    ]
    assert losses[0] == pytest.approx(sum(halves) / num_minibatches, rel=1e-4)
    assert 0 < losses[1] < 0.95 * losses[0]
