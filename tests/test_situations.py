"""What happens to people: weights that are not whole, folders in use, data that changed, rewards of
every make, rows of every make, shells and terminals."""

import gzip
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from language import write_rows
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file
from test_data import ASKED, CHATML, letters, load_file, talk, turns
from test_data import load as load  # a fixture
from test_rewards import example, load_reward, other_tokenizer
from test_rewards import save as save  # a fixture
from test_scripts import chain as chain  # a fixture
from test_scripts import metrics, reward_file

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

ROWS = [
    {"prompt": f"{letters}>", "completion": answer, "answer": answer}
    | {"chosen": answer, "rejected": "b"}
    for letters, answer in (("ca", "ac"), ("dba", "abd"), ("fe", "ef"), ("ihg", "ghi"))
]


def args_of(script, model, folder, **flags):
    """Args of a short run on four rows, in folder/run."""
    data = write_rows(folder / "rows.jsonl", ROWS)
    given = dict(model=str(model), dataset=data, output_dir=str(folder / "run"), steps=1)
    if hasattr(script.Args, "reward"):
        given |= dict(reward="sort", num_generations=2, max_completion_length=4)
        if hasattr(script.Args, "prompts_per_step"):
            given |= dict(prompts_per_step=2)
    else:
        given |= dict(batch_size=2, epochs=9)
    return script.Args(**given | flags)


@pytest.fixture
def stop(capsys):
    """Calls, expects exit status 2 and one sentence on stderr with all the words -> the line."""

    def function(words, call, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*args)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in words), lines[0]
        return lines[0]

    return function


def contents(folder):
    """Every file of a folder, to the byte."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def at_step(monkeypatch, step, action):
    """action() after that step has been logged."""
    inner = common.Run.log

    def log(self, number, *args, **kwargs):
        inner(self, number, *args, **kwargs)
        if number == step:
            action()

    monkeypatch.setattr(common.Run, "log", log)


# ---------------------------------------------------------------- weights
def changed(source, folder, change):
    """A copy of a model after change(weights, config) -> its path."""
    shutil.copytree(source, folder)
    weights = load_weights(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def lose(weights, part):
    for name in [name for name in weights if part in name]:
        del weights[name]


def rename(weights, old, new):
    for name in [name for name in weights if old in name]:
        weights[name.replace(old, new)] = weights.pop(name)


DAMAGES = {
    "head gone": (lambda w, c: (lose(w, "lm_head"), lose(w, "score")), ["{head}.weight"]),
    "layer gone": (lambda w, c: lose(w, "layers.1."), ["model.layers.1."]),
    "layer not in the config": (lambda w, c: c.update(num_hidden_layers=1), ["model.layers.1."]),
    "layer not in the file": (lambda w, c: c.update(num_hidden_layers=3), ["model.layers.2."]),
    "keys renamed": (
        lambda w, c: rename(w, "embed_tokens", "embedding"),
        ["model.embed_tokens.weight", "model.embedding.weight"],
    ),
}


@pytest.fixture(scope="module")
def scorer_dir(scorers, tmp_path_factory):
    """The tiny Llama with a scalar head, saved."""
    folder = tmp_path_factory.mktemp("scorer")
    scorers["llama"].save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flag", ["--model", "--reward", "--value-model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_whole(damage, flag, tiny_dirs, scorer_dir, tmp_path, stop):  # noqa: PLR0917
    """Never random weights in their place, never weights thrown away: weight, flag and folder are
    named, and no run begins."""
    change, words = DAMAGES[damage]
    is_policy = flag == "--model"
    source = tiny_dirs["llama"] if is_policy else scorer_dir
    bad = changed(source, tmp_path / "bad", change)
    script = {"--model": sft, "--reward": rloo, "--value-model": ppo}[flag]
    flags = {flag[2:].replace("-", "_"): bad}
    args = args_of(script, **{"model": tiny_dirs["llama"], "folder": tmp_path} | flags)
    head = "lm_head" if is_policy else "score"
    stop([f"{flag} {bad}", *[word.format(head=head) for word in words]], script.main, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["layer gone", "layer not in the config", "keys renamed"])
def test_a_language_model_that_is_to_be_a_scorer_is_whole_too(damage, tiny_dirs, tmp_path, stop):
    """Its head alone may be new."""
    change, words = DAMAGES[damage]
    bad = changed(tiny_dirs["llama"], tmp_path / "bad", change)
    args = args_of(reward_model, bad, tmp_path)
    stop([f"--model {bad}", words[0]], reward_model.main, args)


def test_constants_of_old_gpt2_files_are_no_weights(tiny_dirs, tmp_path):
    """DialoGPT's, for one, hold attn.masked_bias."""
    path = changed(
        tiny_dirs["gpt2"],
        tmp_path / "old",
        lambda w, c: w.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
    )
    assert common.load_policy(path, CPU).config.n_layer == 2


@pytest.mark.parametrize("in_file", [False, True])
def test_a_tied_head_may_be_in_the_file_or_not(in_file, tiny_dirs, tmp_path):
    """As a policy, and as a language model that is to be a scorer."""

    def tie(weights, config):
        config["tie_word_embeddings"] = True
        del weights["lm_head.weight"]
        if in_file:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    path = changed(tiny_dirs["llama"], tmp_path / "tied", tie)
    policy = common.load_policy(path, CPU, trainable=True)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert policy.lm_head.weight.std() > 0.1, "as drawn, not as made anew"
    common.load_scorer(path, CPU, "--model", trainable=True, init=lambda model, is_new: None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_buffers_of_old_checkpoints_are_no_weights(name, tiny_dirs, tmp_path):
    """Those that Llama, OpenAI's GPT-2 (without a prefix, too) and Pythia have in their files."""

    def age(weights, config):
        causal = torch.ones(1, 1, 64, 64).tril()
        if name == "llama":
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        elif name == "gpt2":
            rename(weights, "transformer.", "")
            weights["h.0.attn.bias"] = causal
        else:
            weights["gpt_neox.layers.0.attention.bias"] = causal
            weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e4)
            weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)

    path = changed(tiny_dirs[name], tmp_path / "old", age)
    ours = common.load_policy(path, CPU, trainable=True).state_dict()
    new = common.load_policy(tiny_dirs[name], CPU).state_dict()
    assert all(torch.equal(ours[key], new[key]) for key in new)


def test_weights_of_other_sizes(tiny_dirs, tmp_path, stop):
    """One sentence, though transformers' own has a line for each weight."""
    path = changed(tiny_dirs["llama"], tmp_path / "x", lambda w, c: c.update(vocab_size=60))
    stop([f"--model {path}"], sft.main, args_of(sft, path, tmp_path))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_models_are_refused(method, tiny_dirs, tmp_path, stop):
    """Whether or not the package that reads them is here."""
    config = dict(quant_method=method, bits=4, load_in_4bit=True, group_size=32, zero_point=True)
    change = lambda w, c: c.update(quantization_config=config)  # noqa: E731
    path = changed(tiny_dirs["llama"], tmp_path / "bad", change)
    stop([f"--model {path}", "quantised"], sft.main, args_of(sft, path, tmp_path))


@pytest.mark.parametrize("flag", ["--model", "--reward", "--value-model"])
def test_adapters_are_refused(flag, tiny_dirs, tmp_path, stop):
    """A folder as peft saves it, with a tokenizer and without the model."""
    folder = tmp_path / "adapter"
    sft.tiny_tokenizer().save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    flags = {flag[2:].replace("-", "_"): str(folder)}
    args = args_of(ppo, **{"model": tiny_dirs["llama"], "folder": tmp_path} | flags)
    stop([f"{flag} {folder}", "adapter", "merge"], ppo.main, args)


@pytest.mark.parametrize("script", [sft, dpo, grpo, reward_model])
def test_a_token_beyond_the_embedding_is_refused(script, chain, tmp_path, stop):
    """A token that was added, and the model never resized; in the data, which else nothing would
    see before the first step."""
    model = tmp_path / "model"
    shutil.copytree(chain / "sft", model)
    tokenizer = common.load_tokenizer(str(model))
    tokenizer.add_tokens(["<step>"])
    tokenizer.save_pretrained(model)
    rows = [row | {"prompt": "a<step>>"} for row in ROWS]
    data = write_rows(tmp_path / "added.jsonl", rows)
    words = [f"--model {model}", f"token {len(tokenizer) - 1}", "resize"]
    stop(words, script.main, args_of(script, model, tmp_path, dataset=data))
    script.main(args_of(script, model, tmp_path))  # where no row has it, it does no harm


@pytest.mark.parametrize("what", ["positions", "embedding"])
@pytest.mark.parametrize(
    "script, flag, source",
    [
        (grpo, "reference", "sft"),
        (rloo, "reference", "sft"),
        (ppo, "value_model", "reward_model"),
    ],
)
def test_a_second_model_that_is_smaller_is_refused(  # noqa: PLR0917
    script, flag, source, what, chain, tmp_path, stop
):
    """Seen before anything is sampled, not as an index error in the first update."""

    def smaller(weights, config):
        if what == "positions":
            config.update(max_position_embeddings=7)
        else:
            config.update(vocab_size=10)
            name = "model.embed_tokens.weight"
            weights[name] = weights[name][:10].clone()

    path = changed(chain / source, tmp_path / "smaller", smaller)
    args = args_of(script, chain / "sft", tmp_path, **{flag: path})
    words = {
        "positions": ["8 tokens do not fit the context of", "7: lower --max-prompt-length"],
        "embedding": ["no embedding of token"],
    }[what]
    stop([f"--{flag.replace('_', '-')} {path}", *words], script.main, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [ppo, grpo, rloo, rejection_sampling])
def test_a_temperature_of_zero_is_refused(script, chain, tmp_path, stop):
    args = script.Args(model=str(chain / "sft"), reward="sort", temperature=0.0)
    args.output_dir = str(tmp_path / "run")
    stop(["--temperature 0.0", "above 0"], script.main, args)


def test_outcome_tokens_without_the_loss_that_reads_them(chain, tmp_path, stop):
    args = args_of(reward_model, chain / "sft", tmp_path, outcome_tokens="all")
    stop(["--outcome-tokens all is for --loss outcome, not"], reward_model.main, args)


# ---------------------------------------------------------------- truth
@pytest.mark.parametrize("script", [sft, dpo, grpo, ppo, rloo, rejection_sampling])
@pytest.mark.parametrize("of_task", ["dataset", "eval_dataset"])
def test_gold_is_the_checker_of_what_is_evaluated(script, of_task, chain, tmp_path):
    """Not of what is trained on: held-out rows of one's own have no `answer`, or another one."""
    rows = [{name: row[name] for name in row if name != "answer"} for row in ROWS]
    other = "eval_dataset" if of_task == "dataset" else "dataset"
    flags = {of_task: "sort", other: write_rows(tmp_path / "own.jsonl", rows)}
    samples = hasattr(script.Args, "reward")
    if samples:
        flags |= dict(reward=reward_file(tmp_path, "return [len(text) for text in completions]"))
    script.main(args_of(script, chain / "sft", tmp_path, **flags))
    first, *_, last = metrics(tmp_path / "run")
    assert ("eval/gold" in first) == (of_task == "eval_dataset")
    assert ("gold" in last) == (of_task == "dataset" and samples)


# ---------------------------------------------------------------- files
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another():
    """another(folder): from now on another process has a run going on in it."""
    started = []

    def hold(folder):
        command = [sys.executable, "-c", HOLD, str(Path(folder, common.LOCK))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"

    yield hold
    for process in started:
        process.communicate()


def is_free(folder):
    """True where another process could start a run."""
    lines = ["import sys", "from filelock import FileLock, Timeout"]
    lines += ["try: FileLock(sys.argv[1]).acquire(blocking=False)", "except Timeout: sys.exit(3)"]
    command = [sys.executable, "-c", "\n".join(lines), str(Path(folder, common.LOCK))]
    return subprocess.run(command).returncode == 0


@pytest.fixture(scope="module")
def ended(tiny_dirs, tmp_path_factory):
    """The folder of a run, ended after two steps; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("ended")
    sft.main(args_of(sft, tiny_dirs["llama"], folder, steps=2))
    return folder / "run"


@pytest.fixture
def run_dir(ended, tmp_path):
    """A copy of that folder."""
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flag, place",
    [
        ("model", "."),
        ("model", "link"),
        ("dataset", "rows.jsonl"),
        ("eval_dataset", "rows.jsonl"),
        ("reward", "."),
        ("reward", "reward.py:reward"),
        ("reward", "link.py:reward"),
        ("value_model", "."),
    ],
)
def test_overwrite_moves_nothing_that_it_needs(flag, place, tiny_dirs, run_dir, stop):
    """Else --model and the rest would be gone when they are to be read."""
    folder = run_dir.parent
    (folder / "link").symlink_to(run_dir)
    (folder / "link.py").symlink_to(run_dir / "reward.py")
    write_rows(run_dir / "rows.jsonl", ROWS)
    reward_file(run_dir, "return [0.0] * len(rows)")
    before = contents(run_dir)
    value = str((folder if place.startswith("link") else run_dir) / place)
    flags = {"model": tiny_dirs["llama"], "folder": folder, "overwrite": True} | {flag: value}
    name = flag.replace("_", "-")
    stop([f"--{name} {value}", "--output-dir", "--overwrite"], ppo.main, args_of(ppo, **flags))
    assert contents(run_dir) == before and not (folder / "run.old").exists()


@pytest.mark.parametrize("flags", [dict(overwrite=True), dict(resume=True), {}])
def test_a_run_that_is_going_on_is_left_alone(flags, tiny_dirs, run_dir, another, stop):
    """By --overwrite, by --resume, and by neither."""
    before = contents(run_dir)
    another(run_dir)
    args = args_of(sft, tiny_dirs["llama"], run_dir.parent, **flags)
    stop([f"--output-dir {run_dir}", "another run is going on"], sft.main, args)
    after = contents(run_dir)
    assert {name: after[name] for name in before} == before
    assert not (run_dir.parent / "run.old").exists()


def test_two_runs_that_start_at_once_in_one_new_folder(tiny_dirs, tmp_path, another, stop):
    """The one that comes second is refused before it loads a model, and what it finds stays."""
    (tmp_path / "run").mkdir()
    another(tmp_path / "run")
    words = [f"--output-dir {tmp_path / 'run'}", "another run is going on"]
    stop(words, sft.main, args_of(sft, tmp_path / "nowhere", tmp_path))
    assert list(contents(tmp_path / "run")) == [common.LOCK]


def test_two_runs_that_both_found_the_folder_free(tiny_dirs, tmp_path, another, monkeypatch, stop):
    """The other one's lock came while this one loaded its models: nothing is written."""
    digest_of = common.digest_of

    def slow(*args):
        (tmp_path / "run").mkdir()
        another(tmp_path / "run")
        return digest_of(*args)

    monkeypatch.setattr(common, "digest_of", slow)
    words = [f"--output-dir {tmp_path / 'run'}", "another run is going on"]
    stop(words, sft.main, args_of(sft, tiny_dirs["llama"], tmp_path))
    assert list(contents(tmp_path / "run")) == [common.LOCK]


def test_a_run_that_came_to_no_step_may_be_begun_again(tiny_dirs, tmp_path):
    """Its reward failed, say: nothing is there that could be lost. What has a log is a run."""
    reward_file(tmp_path, "return [1 / 0]")
    args = args_of(rloo, tiny_dirs["llama"], tmp_path, reward=f"{tmp_path / 'reward.py'}:reward")
    with pytest.raises(ZeroDivisionError):
        rloo.main(args)
    assert (tmp_path / "run/args.json").exists()
    with pytest.raises(ZeroDivisionError):
        rloo.main(args)
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        rloo.main(args)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl/run", "x" * 300, "model"])
def test_folders_that_cannot_be_a_run(name, tiny_dirs, tmp_path, stop):
    """A file, a folder in a file, too long a name, a model that is not ours: one sentence, before a
    model loads, and nothing is written."""
    shutil.copytree(tiny_dirs["llama"], tmp_path / "model")
    args = args_of(sft, "./nowhere", tmp_path, output_dir=str(tmp_path / name))
    before = contents(tmp_path)
    for overwrite in (False, True):
        args.overwrite = overwrite
        line = stop([f"--output-dir {tmp_path / name}"], sft.main, args)
        assert "make room" not in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_old_that_is_not_ours_is_kept(what, tiny_dirs, run_dir):
    """--overwrite takes the next name."""
    old = run_dir.parent / "run.old"
    if what == "folder":
        old.mkdir()
    notes = old / "notes.txt" if what == "folder" else old
    notes.write_text("a week's")
    before = contents(run_dir)
    sft.main(args_of(sft, tiny_dirs["llama"], run_dir.parent, overwrite=True, seed=2))
    assert notes.read_text() == "a week's"
    assert contents(run_dir.parent / "run.old.old") == before
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 2


def test_what_a_run_that_was_killed_at_once_leaves_is_no_run(tiny_dirs, tmp_path):
    """Its lock, and flags half written: the same command starts anew."""
    (tmp_path / "run").mkdir()
    for name in (common.LOCK, "args.json.new"):
        (tmp_path / "run" / name).write_text("")
    sft.main(args_of(sft, tiny_dirs["llama"], tmp_path))
    assert (tmp_path / "run/model.safetensors").exists()


def test_the_lock_is_held_to_the_end(tiny_dirs, run_dir, monkeypatch):
    """Of the new folder, not of the one set aside."""
    free = []

    def look():
        free.append([is_free(run_dir), is_free(f"{run_dir}.old")])

    at_step(monkeypatch, 1, look)
    sft.main(args_of(sft, tiny_dirs["llama"], run_dir.parent, overwrite=True))
    assert free == [[False, True]] and is_free(run_dir)


def test_after_a_failure_the_same_process_can_go_on(tiny_dirs, tmp_path, monkeypatch, capsys):
    """As in a notebook: an exception in a step, then --resume, then --overwrite."""

    def fail():
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        at_step(patch, 2, fail)
        args = args_of(sft, tiny_dirs["llama"], tmp_path, steps=2, save_every=1)
        with pytest.raises(ZeroDivisionError):
            sft.main(args)
    args.resume = True
    sft.main(args)
    assert "resumed after step 1 of 2" in capsys.readouterr().out
    args.resume = False
    args.overwrite = True
    sft.main(args)
    assert (tmp_path / "run.old/model.safetensors").exists() and is_free(tmp_path / "run")


# ---------------------------------------------------------------- resume
def go_on(model, run_dir, **flags):
    return args_of(sft, model, run_dir.parent, **dict(steps=3, resume=True) | flags)


@pytest.mark.parametrize("what", ["row added", "row gone", "row changed", "order", "model"])
def test_resume_with_other_data_or_another_start(what, tiny_dirs, run_dir, tmp_path, stop):
    """Order and number of steps would not be those of the run: refused, and the folder is as
    it was, so that the right flags still go on."""
    rows = {
        "row added": [*ROWS, ROWS[0]],
        "row gone": ROWS[:-1],
        "row changed": [*ROWS[:-1], ROWS[-1] | {"answer": "which only a reward reads"}],
        "order": ROWS[::-1],
        "model": ROWS,
    }[what]
    model = tiny_dirs["llama"]
    if what == "model":
        change = lambda w, c: w["model.norm.weight"].view(torch.int32)[0].add_(1)  # noqa: E731
        model = changed(model, tmp_path / "model", change)
    before = contents(run_dir)
    args = go_on(model, run_dir, dataset=write_rows(tmp_path / "other.jsonl", rows))
    stop(["--resume", "data, their order or start model differ", str(run_dir)], sft.main, args)
    assert contents(run_dir) == before
    sft.main(go_on(tiny_dirs["llama"], run_dir))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]


def test_resume_where_data_and_model_lie_elsewhere(tiny_dirs, run_dir, tmp_path):
    """What they hold counts, not where they are, nor in which of the two forms."""
    shutil.copytree(tiny_dirs["llama"], tmp_path / "moved")
    (tmp_path / "renamed.json").write_text(json.dumps(ROWS))
    sft.main(go_on(tmp_path / "moved", run_dir, dataset=str(tmp_path / "renamed.json")))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    flags = json.loads((run_dir / "args.json").read_text())
    assert flags["model"] == str(tmp_path / "moved") and flags["steps"] == 3


# ---------------------------------------------------------------- rewards
def scores_of(function, examples=None):
    """What the scripts get of a reward function on two examples."""
    tokenizer = sft.tiny_tokenizer()
    examples = examples or [example(tokenizer, "ab>")] * 2
    completions = [tokenizer("ab[EOS]").input_ids] * len(examples)
    return common.checker_reward(function, tokenizer, [1])(examples, completions)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, -2], dtype=np.float32),
        np.array([1, -2], dtype=np.float64),
        np.array([1, -2]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([1, -2]),
        torch.tensor([1, -2], dtype=torch.bfloat16),
        torch.tensor([1.0, -2.0], requires_grad=True),
        [torch.tensor(1.0), torch.tensor(-2)],
        [np.float32(1), np.int64(-2)],
        (1, -2.0),
        (number for number in (1, -2)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_rewards_may_be_numbers_of_any_make(values):
    scores = scores_of(lambda prompts, completions, rows: values)
    assert scores.tolist() == [1, -2] and scores.dtype == torch.float32


@pytest.mark.parametrize(
    "values, word",
    [
        ([0.0, 1e39], "1e+39"),
        ([0.0, -1e300], "-1e+300"),
        ([0, 10**400], "1" + "0" * 30),
        (np.array([0, 1e39]), "1e+39"),
        (np.array([0, np.inf]), "inf"),
        (torch.tensor([0, torch.nan]), "nan"),
        ([torch.tensor(0.0), torch.tensor(-torch.inf)], "-inf"),
        (np.zeros((2, 1)), "[0.0]"),
        (np.zeros(3), "3 numbers"),
        (None, "None: wanted a list"),
        (1.0, "1.0: wanted a list"),
    ],
    ids=str,
)
def test_rewards_that_float32_does_not_hold(values, word, stop):
    """Refused, in an array as in a list."""
    stop(["the reward returned", word], scores_of, lambda prompts, completions, rows: values)


def test_none_in_an_array_says_that_nothing_can_be_said():
    scores = scores_of(lambda prompts, completions, rows: np.array([True, None]))
    assert scores[0] == 1 and scores[1].isnan()


def test_a_reward_that_changes_what_it_is_given():
    """Neither the data nor the same prompt's next completion sees it."""
    tokenizer = sft.tiny_tokenizer()
    message = {"role": "user", "content": "ab"}
    first = example(tokenizer, "ab>", tests=["x", ["y"]], notes={"n": [1]})
    first["prompt"] = [message]
    examples = [first, first]
    before = json.dumps(examples)

    def judge(prompts, completions, rows):
        scores = []
        for prompt, row in zip(prompts, rows):
            scores.append(len(prompt) + len(row["tests"]) + len(row["tests"][1]))
            prompt[0]["content"] += "!"
            prompt.append({"role": "assistant", "content": ""})
            row["tests"][1].clear()
            row["notes"]["n"].pop()
            row.clear()
        prompts.clear()
        rows.clear()
        return scores

    for _ in range(2):
        assert scores_of(judge, examples).tolist() == [4, 4]
    assert json.dumps(examples) == before


@pytest.mark.parametrize("name", ["math", "random", "colorsys", "torch"])
def test_a_reward_file_named_as_a_module(name, tmp_path, monkeypatch):
    """It may import that module, where nothing has yet too, and a file beside it; it stands in for
    neither."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    if name == "colorsys":
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "beside_it.py").write_text("ONE = 1\n")
    lines = [f"import {name}", "import beside_it", "def reward(prompts, completions, rows):"]
    lines += [f"    return [beside_it.ONE + ({name}.__name__ == '{name}')] * len(prompts)"]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    score = load_reward(f"{tmp_path}/{name}.py:reward", [])
    assert score([example(sft.tiny_tokenizer(), "ab>")], [[4, 1]]).tolist() == [2]
    theirs = importlib.import_module(name)
    assert theirs.__name__ == name and str(tmp_path) not in str(theirs.__spec__.origin)
    sys.modules.pop("beside_it")


@pytest.mark.parametrize("limit", ["config", "tokenizer", "other tokens"])
def test_a_reward_model_of_a_short_context(limit, chain, tmp_path, save, stop):
    """Said before training, with its own count of tokens and the flag."""
    if limit == "other tokens":
        tokenizer = other_tokenizer()
        tokenizer.model_max_length = 7
        path = save(tokenizer)
    else:
        change = lambda w, c: c.update(max_position_embeddings=7)  # noqa: E731
        path = changed(chain / "reward_model", tmp_path / "short", change)
    if limit == "tokenizer":
        tokenizer = sft.tiny_tokenizer()
        tokenizer.model_max_length = 7
        tokenizer.save_pretrained(tmp_path / "short")
    args = args_of(rloo, chain / "sft", tmp_path, reward=path)
    words = [f"--reward {path}", "prompts of 4 tokens", "--max-completion-length", "context of 7"]
    stop(words, rloo.main, args)
    assert not (tmp_path / "run").exists()
    args.max_completion_length = 3
    rloo.main(args)


def test_messages_and_a_reward_model_without_a_template(save, stop):
    """Said before training."""
    policy = sft.tiny_tokenizer()
    policy.chat_template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    path = save(other_tokenizer())
    examples = [example(policy, talk("ab"))]
    stop([f"--reward {path}", "chat template"], load_reward, path, examples, policy)


def test_gsm8k_answers_that_are_numbers_in_json():
    rows = [{"answer": answer} for answer in (7, 7.0, -7, "7", "#### 7", 8)]
    scores = common.gsm8k_checker([""] * 6, ["so 7"] * 6, rows)
    assert scores == [1, 1, 0, 1, 1, 0]


# ---------------------------------------------------------------- data
def in_parts(messages):
    """The same, each content cut into two parts."""
    cut = [(message, message["content"]) for message in messages]
    return [
        message
        | {"content": [{"type": "text", "text": text} for text in (content[:1], content[1:])]}
        for message, content in cut
    ]


@pytest.mark.parametrize(
    "kind, names",
    [("sft", ["messages"]), ("prompt", ["prompt"]), ("preference", ["chosen", "rejected"])],
)
def test_content_in_parts_is_the_text_that_they_make(kind, names, load):
    tokenizer = letters(chat=True)
    said = {"chosen": talk("hi", "yes"), "rejected": talk("hi", "no")}
    row = {name: said.get(name, talk("hi", "yes", "so?", "no")[: 4 - len(names)]) for name in names}
    if kind == "sft":
        row = {"messages": talk("hi", "yes", "so?", "no")}
    (plain,) = load([row], kind, tokenizer)
    (cut,) = load([{name: in_parts(row[name]) for name in row}], kind, tokenizer)
    del plain["row"], cut["row"]
    assert cut == plain


IMAGE = {"type": "image", "image": "a.png"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "user", "content": [IMAGE]}, *talk("no", first="assistant")], "not text"),
        (in_parts(talk("hi"))[:1] + [CALL], "tools"),
        (talk("hi") + [CALL | {"content": ""}], "tools"),
        (talk("hi") + [CALL] + talk("yes", first="assistant"), "tools"),
        (talk("hi") + [{"role": "assistant", "content": ["yes"]}], "not text"),
    ],
)
def test_what_is_not_text_is_dropped_and_counted(messages, reason, load, capsys):
    """An image or a call that the template leaves out would teach to answer without."""
    good = {"messages": talk("hi", "yes")}
    (kept,) = load([good, {"messages": messages}], tokenizer=letters(chat=True))
    assert kept["row"] == good
    out = capsys.readouterr().out
    assert "1 rows; 1 dropped with" in out and reason in out


def test_no_calls_of_tools_are_no_calls(load):
    """As the datasets package fills columns that other rows have."""
    messages = [
        message | {"tool_calls": calls} for calls in (None, []) for message in talk("a", "b")
    ]
    (kept,) = load([{"messages": messages}], tokenizer=letters(chat=True))
    assert kept["row"] == {"messages": messages}


BEGUN = [*talk("hi"), {"role": "assistant", "content": "The colour is "}]
SHOWN = turns("hi", tail=f"{ASKED}The colour is ")


@pytest.mark.parametrize("begun", ["The colour is ", "The colour\n", "", " ", "<|im"])
def test_a_begun_answer_is_gone_on_with(begun, load):
    """For RL, and where the rest is a text: no end of turn between, and what is sampled or trained
    is the rest alone."""
    tokenizer = letters(chat=True)
    prompt = [*talk("hi"), {"role": "assistant", "content": begun}]
    shown = turns("hi", tail=ASKED + begun)
    (asked,) = load([{"prompt": prompt}], "prompt", tokenizer)
    assert tokenizer.decode(asked["prompt_ids"]) == shown
    (told,) = load([{"prompt": prompt, "completion": "blue"}], "sft", tokenizer)
    assert told["prompt_ids"] == asked["prompt_ids"]
    assert tokenizer.decode(told["ids"]) == f"{shown}blue<|im_end|>"
    assert told["mask"] == [0] * len(told["prompt_ids"]) + [1] * 5
    row = {"prompt": prompt, "chosen": "blue", "rejected": "red"}
    (pair,) = load([row], "preference", tokenizer)
    assert pair["prompt_ids"] == asked["prompt_ids"]
    ends = [tokenizer.decode(pair[f"{name}_ids"]) for name in ("chosen", "rejected")]
    assert ends == ["blue<|im_end|>", "red<|im_end|>"]


def test_a_reward_model_of_other_tokens_gets_the_begun_answer_as_one_turn(load, save, tmp_path):
    policy = letters(chat=True)
    (asked,) = load([{"prompt": BEGUN}], "prompt", policy)
    theirs = other_tokenizer(chat=True)
    end = common.end_of_turn_id(policy)
    scorer = load_reward(save(theirs), [asked], policy, [end])
    completion = policy("blue", add_special_tokens=False).input_ids
    spelled = theirs(f"{SHOWN}blue<|im_end|>", add_special_tokens=False).input_ids
    assert scorer.ids_of(asked, [*completion, end]) == spelled
    assert scorer.ids_of(asked, completion) == spelled[:-1], "it was cut"


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTY = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_templates_that_open_a_think_block(kind, load, stop):
    """A plain answer is no continuation of it, unless the template writes an empty block before it:
    dropped with the template named as the reason, or kept and trained as rendered."""
    row = {"prompt": talk("hi"), "completion": "yes", "chosen": "yes", "rejected": "no"}
    words = ["0 rows", "1 dropped", "prefix", "chat template", "nothing is left"]
    stop(words, load, [row], kind, letters(chat=True, template=THINKING))
    tokenizer = letters(chat=True, template=THINKING.replace("{{ m.content }}", EMPTY))
    (kept,) = load([row], kind, tokenizer)
    assert tokenizer.decode(kept["prompt_ids"]).endswith(f"{ASKED}<think>\n")
    ids = kept["chosen_ids"] if kind == "preference" else kept["ids"]
    assert tokenizer.decode(ids).endswith("\n</think>\n\nyes<|im_end|>")


def test_columns_that_nothing_reads_are_named_once(load, capsys):
    """`system` and `history`, whose texts people think are trained; in RL the reward has them."""
    rows = [ROWS[0] | {"system": "Be brief."}, ROWS[1] | {"history": []}]
    load(rows, "preference")
    assert capsys.readouterr().out.count("columns that are not used: history, system\n") == 1
    load(rows, "prompt")
    out = capsys.readouterr().out
    assert out.count("columns for a reward function alone: history, system\n") == 1


def test_a_line_break_in_a_template_from_a_shell(load):
    """In '...' a shell leaves its two characters as they are."""
    row = {"prompt": "hi", "completion": "yes"}
    for template in (r"Q: {prompt}\nA: ", "Q: {prompt}\nA: "):
        (made,) = load([row], prompt_template=template)
        assert made["prompt"] == "Q: hi\nA: "


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`; the calls that it got."""
    calls = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS
    fake.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


@pytest.mark.parametrize(
    "dataset, names, options",
    [
        ("someone/data", ["someone/data"], dict(split="train")),
        ("gsm8k:test", ["gsm8k"], dict(split="test")),
        ("openai/gsm8k:main:test", ["openai/gsm8k", "main"], dict(split="test")),
        ("dir/rows.csv", ["csv"], dict(data_files="dir/rows.csv", split="train")),
        ("rows.parquet", ["parquet"], dict(data_files="rows.parquet", split="train")),
        ("rows.jsonl.gz", ["json"], dict(data_files="rows.jsonl.gz", split="train")),
    ],
)
def test_what_the_datasets_package_is_asked_for(dataset, names, options, hub):
    examples = load_file(dataset)
    assert hub == [(tuple(names), options)]
    assert [e["row"] for e in examples] == ROWS
    assert examples[1]["where"] == f"{dataset} row 2"


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_tables_without_the_datasets_package(name, tmp_path, monkeypatch, stop):
    """The file is there: the Hub is nothing to speak of."""
    (tmp_path / name).write_text("prompt,completion\na,b\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = [str(tmp_path / name), "pip install datasets"]
    assert "hub" not in stop(words, load_file, tmp_path / name).lower()


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_tables(name, tmp_path, stop):
    pytest.importorskip("datasets")
    path = tmp_path / name
    if name == "rows.csv":
        lines = [ROWS[0], *(row.values() for row in ROWS)]
        path.write_text("".join(",".join(line) + "\n" for line in lines))
    elif name == "rows.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    assert [e["row"] for e in load_file(path)] == ROWS
    stop([f"{tmp_path}/none{path.suffix}"], load_file, f"{tmp_path}/none{path.suffix}")


# ---------------------------------------------------------------- habits
def test_a_tilde_that_the_shell_left_alone(tiny_dirs, tmp_path, monkeypatch):
    """As in --output-dir=~/run; also for --model, --dataset, and what --resume looks for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dirs["llama"], tmp_path / "model")
    flags = dict(dataset="~/rows.jsonl", output_dir="~/run", steps=2)
    sft.main(args_of(sft, "~/model", tmp_path, **flags))
    assert (tmp_path / "run/model.safetensors").exists() and not (tmp_path / "~").exists()
    argv = ["sft.py", "--resume", "--output-dir", "~/run", "--model", "~/model"]
    monkeypatch.setattr(sys, "argv", argv)
    args = common.cli(sft.Args, laptop={})
    assert args.batch_size == 2
    sft.main(args)


@pytest.mark.parametrize("flag", ["--model", "--dataset", "--eval-dataset", "--output-dir"])
def test_a_variable_of_the_shell_that_is_empty(flag, tiny_dirs, tmp_path, monkeypatch, stop):
    """--model "$MODEL" is no laptop run, and --dataset "" not the folder that one stands in."""
    monkeypatch.chdir(tmp_path)
    given = ["--model", tiny_dirs["llama"], "--output-dir", str(tmp_path / "run"), flag, ""]
    monkeypatch.setattr(sys, "argv", ["sft.py", *given])
    args = common.cli(sft.Args, laptop={})
    stop([f"{flag} is empty", "shell"], sft.main, args)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_every_character(tiny_dirs, tmp_path, monkeypatch):
    """As with PYTHONIOENCODING=ascii: a sample's letters are escaped, and the run ends."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rows = [row | {"prompt": f"\u4f60{row['prompt']}"} for row in ROWS]
    data = write_rows(tmp_path / "letters.jsonl", rows)
    args = args_of(sft, tiny_dirs["llama"], tmp_path, dataset=data, eval_dataset=data)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        sft.main(args)
    out.flush()
    assert rb"\u4f60" in out.buffer.getvalue()
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.fixture
def hang_up():
    """SIGHUP to this process; afterwards its handler is what it was."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda: os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed(tiny_dirs, tmp_path, monkeypatch, hang_up, capsys):
    """The step is saved, the status is 129, and the handler is given back."""
    handler = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGHUP, handler)
    at_step(monkeypatch, 1, hang_up)
    with pytest.raises(SystemExit) as stopped:
        sft.main(args_of(sft, tiny_dirs["llama"], tmp_path, steps=2, save_every=0))
    assert stopped.value.code == 129
    assert "stopped after step 1 of 2; go on with --resume" in capsys.readouterr().out
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 1 and is_free(tmp_path / "run")
    assert signal.getsignal(signal.SIGHUP) == handler


def test_under_nohup_a_hang_up_does_not_stop_the_run(tiny_dirs, tmp_path, monkeypatch, hang_up):
    """Where SIGHUP is ignored the run goes on to its end."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 1, hang_up)
    sft.main(args_of(sft, tiny_dirs["llama"], tmp_path, steps=2))
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_help_into_a_pipe_that_is_closed():
    """As after `--help | head -1`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, sft.__file__, "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b"" and done.returncode == -signal.SIGPIPE


def test_help_in_a_narrow_terminal():
    """Words, and not one letter a line."""
    command = [sys.executable, sft.__file__, "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "20"}
    )
    assert len(done.stdout.splitlines()) < 200


@pytest.mark.parametrize("size", ["2", "", "many"])
def test_world_size_that_no_torchrun_set(size, tiny_dirs, tmp_path, monkeypatch):
    """As clusters do: one process is one process."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "1")
    sft.main(args_of(sft, tiny_dirs["llama"], tmp_path))
    assert (tmp_path / "run/model.safetensors").exists()


def test_main_twice_in_one_process(tiny_dirs, tmp_path):
    """With the same Args, whatever was drawn between: the same weights, to the bit."""
    reward = reward_file(tmp_path, "return [sum(map(ord, text)) % 7 for text in completions]")
    args = args_of(rloo, tiny_dirs["llama"], tmp_path, reward=reward)
    rloo.main(args)
    torch.rand(3)
    random.random()
    args.output_dir = str(tmp_path / "again")
    rloo.main(args)
    one, other = (load_weights(tmp_path / n / "model.safetensors") for n in ("run", "again"))
    start = load_weights(Path(tiny_dirs["llama"], "model.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], start[name]) for name in one)
