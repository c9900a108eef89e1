"""Damaged or unsuitable models, directories in use, changed data, rewards of any kind of number."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ARGS, CPU, random_head
from language import write_rows
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file
from test_data import letters, talk
from test_data import refused as refused  # a fixture
from test_scripts import metrics, reward_file

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

SCRIPTS = [sft, reward_model, rejection_sampling, ppo, grpo, rloo, dpo]
ROWS = [
    {"prompt": f"{word}>", "completion": answer, "answer": answer}
    | {"chosen": answer, "rejected": "b"}
    for word, answer in (("ca", "ac"), ("dba", "abd"), ("fe", "ef"), ("ihg", "ghi"))
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


def contents(folder):
    """The bytes of every file."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def small_task(monkeypatch):
    """Few rows of the built-in task."""
    monkeypatch.setattr(common, "TASK_ROWS", {"sft": 8, "pairs": 8, "prompts": 8, "held out": 4})


@pytest.fixture(scope="module")
def scorer_dir(scorers, tmp_path_factory):
    """The tiny Llama with a score head."""
    folder = tmp_path_factory.mktemp("scorer")
    scorers["llama"].save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- weights
def changed(source, folder, change):
    """Path of a copy of a model after change(weights, config)."""
    shutil.copytree(source, folder)
    weights = load_weights(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def lose(weights, part):
    """Delete the weights with this part in their name."""
    for name in [name for name in weights if part in name]:
        del weights[name]


def rename(weights, old, new):
    """Rename the weights with this part in their name."""
    for name in [name for name in weights if old in name]:
        weights[name.replace(old, new)] = weights.pop(name)


def load_as(use, path):
    """Load a model as a script does."""
    tokenizer = common.load_tokenizer(path)
    if use == "policy":
        return common.load_policy(path, tokenizer, ARGS, CPU, trainable=True)
    if use == "reward":
        return common.load_scorer(path, ARGS, CPU)
    return common.load_scorer(path, ARGS, CPU, trainable=True, init=random_head)


DAMAGES = {  # name -> change, parts of the names in the error
    "no head": (lambda w, c: (lose(w, "lm_head"), lose(w, "score")), ["{head}.weight"]),
    "no layer": (lambda w, c: lose(w, "layers.1."), ["model.layers.1."]),
    "more layers": (lambda w, c: c.update(num_hidden_layers=1), ["model.layers.1."]),
    "fewer layers": (lambda w, c: c.update(num_hidden_layers=3), ["model.layers.2."]),
    "other names": (
        lambda w, c: rename(w, "embed_tokens", "embedding"),
        ["model.embed"],
    ),
}


@pytest.mark.parametrize("use", ["policy", "reward", "value model", "new scorer"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_and_unexpected_weights(damage, use, tiny_dirs, scorer_dir, tmp_path, refused):  # noqa: PLR0917
    """They are neither initialized nor skipped. Only a language model may get a new score head."""
    change, words = DAMAGES[damage]
    source = scorer_dir if use in ("reward", "value model") else tiny_dirs["llama"]
    path = changed(source, tmp_path / "damaged", change)
    if damage == "no head" and use == "new scorer":
        load_as(use, path)
        return
    head = "lm_head" if use == "policy" else "score"
    refused([f"{path}: ", *[word.format(head=head) for word in words]], load_as, use, path)


@pytest.mark.parametrize("use", ["policy", "new scorer"])
@pytest.mark.parametrize("in_file", [False, True])
def test_tied_head(in_file, use, tiny_dirs, tmp_path):
    """A file may contain a tied head or not."""

    def tie(weights, config):
        config["tie_word_embeddings"] = True
        del weights["lm_head.weight"]
        if in_file:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    model = load_as(use, changed(tiny_dirs["llama"], tmp_path / "tied", tie))
    expected = load_weights(Path(tiny_dirs["llama"], "model.safetensors"))
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])
    if use == "policy":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_buffers_of_old_checkpoints(name, tiny_dirs, tmp_path):
    """Files of Llama, GPT-2 (also without prefix) and Pythia contain buffers."""

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

    old = load_as("policy", changed(tiny_dirs[name], tmp_path / "old", age)).state_dict()
    new = load_as("policy", tiny_dirs[name]).state_dict()
    assert all(torch.equal(old[key], new[key]) for key in new)


def test_weights_of_another_shape(tiny_dirs, tmp_path):
    path = changed(tiny_dirs["llama"], tmp_path / "x", lambda w, c: c.update(vocab_size=60))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        load_as("policy", path)


@pytest.mark.parametrize("use", ["policy", "reward"])
def test_pickled_weights_are_not_loaded(use, tiny_dirs, scorer_dir, tmp_path):
    shutil.copytree(tiny_dirs["llama"] if use == "policy" else scorer_dir, tmp_path / "pickled")
    file = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_weights(file), tmp_path / "pickled" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load_as(use, str(tmp_path / "pickled"))


# ---------------------------------------------------------------- context and vocabulary
def smaller(what):
    """A change of a model: a context of 7 tokens, or a vocabulary of 10."""

    def change(weights, config):
        if what == "context":
            config.update(max_position_embeddings=7)
        else:
            config.update(vocab_size=10)
            for name in ["model.embed_tokens.weight", "lm_head.weight"]:
                if name in weights:
                    weights[name] = weights[name][:10].clone()

    return change


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_token_beyond_the_embedding_is_refused(script, tiny_dirs, tmp_path, refused):
    """The tokenizer has more tokens than the model, which is harmless if no row contains them."""
    path = changed(tiny_dirs["llama"], tmp_path / "smaller", smaller("vocabulary"))
    words = [path, "ids beyond the vocabulary", "resize"]  # i is token 12
    refused(words, script.main, args_of(script, path, tmp_path))
    assert not (tmp_path / "run").exists()
    # letters up to f
    flags = dict(dataset=write_rows(tmp_path / "known.jsonl", ROWS[:3]))
    if hasattr(script.Args, "reward"):
        flags |= dict(reward=reward_file(tmp_path, "return [len(text) for text in completions]"))
    script.main(args_of(script, path, tmp_path, **flags))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_short_context_is_refused(script, tiny_dirs, tmp_path, refused):
    path = changed(tiny_dirs["llama"], tmp_path / "smaller", smaller("context"))
    rows = [ROWS[0] | {"prompt": "abcd>", "completion": "ab", "chosen": "ab"}]
    # prompt, completion and EOS, or prompt and --max-completion-length
    longest = 9 if hasattr(script.Args, "reward") else 8
    args = args_of(script, path, tmp_path, dataset=write_rows(tmp_path / "long.jsonl", rows))
    refused([f"{path}: {longest} tokens exceed its context of 7"], script.main, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["context", "vocabulary"])
@pytest.mark.parametrize(
    "script, flag", [(grpo, "reference"), (rloo, "reference"), (ppo, "value_model")]
)
def test_a_second_model_that_is_smaller_is_refused(  # noqa: PLR0917
    script, flag, what, tiny_dirs, scorer_dir, tmp_path, refused
):
    """Otherwise the first update would fail with an index error."""
    source = scorer_dir if flag == "value_model" else tiny_dirs["llama"]
    path = changed(source, tmp_path / "smaller", smaller(what))
    args = args_of(script, tiny_dirs["llama"], tmp_path, **{flag: path})
    words = {
        "context": f"{path}: 8 tokens exceed its context of 7",
        "vocabulary": f"{path}: the tokenizer has ids beyond the vocabulary",
    }
    if script is ppo and what == "vocabulary":
        words[what] = f"--value-model {path} does not have the tokens and embeddings"
    refused([words[what]], script.main, args)
    assert not (tmp_path / "run").exists()


def padded(source, folder):
    """A copy of a policy with 10 rows more in its embedding, whose ids it may sample."""

    def change(weights, config):
        config["vocab_size"] += 10
        for name in ["model.embed_tokens.weight", "lm_head.weight"]:
            weights[name] = torch.cat([weights[name], weights[name][:10]])

    return changed(source, folder, change)


@pytest.mark.parametrize(
    "script, flag", [(grpo, "reference"), (rloo, "reference"), (ppo, "value_model")]
)
def test_a_second_model_must_have_the_embeddings_of_the_policy(  # noqa: PLR0917
    script, flag, tiny_dirs, scorer_dir, tmp_path, refused
):
    """The tokenizers are the same, but the policy may sample ids beyond its tokenizer."""
    path = scorer_dir if flag == "value_model" else str(tiny_dirs["llama"])
    policy = padded(tiny_dirs["llama"], tmp_path / "padded")
    words = [f"--{flag.replace('_', '-')} {path}", f"tokens and embeddings of {policy}"]
    refused(words, script.main, args_of(script, policy, tmp_path, **{flag: path}))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_with_a_smaller_embedding_gets_the_text(tiny_dirs, scorer_dir, tmp_path):
    """Ids beyond the tokenizer have no text. PPO's values then start from the policy."""
    policy = padded(tiny_dirs["llama"], tmp_path / "padded")
    args = args_of(ppo, policy, tmp_path, reward=scorer_dir)
    ppo.main(args)
    tokenizer = common.load_tokenizer(policy)
    example = {"row": {}, "prompt": "ab>", "prompt_ids": tokenizer("ab>").input_ids}
    eos = tokenizer.eos_token_id
    rollouts = [
        example | {"completion_ids": ids, "finished": True}
        for ids in ([4, 5, eos], [4, 70, 5, eos], [5, 4, eos])
    ]
    scores = common.load_reward(args, rollouts, tokenizer, CPU)(rollouts)
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-5)
    assert abs(scores[0] - scores[2]) > 1e-3


@pytest.mark.parametrize("other_tokens", [False, True])
def test_a_reward_model_with_a_short_context(
    other_tokens, tiny_dirs, scorer_dir, tmp_path, refused
):
    """Prompts are counted in its own tokens, here with BOS."""

    def change(weights, config):
        smaller("context")(weights, config)
        name = "model.embed_tokens.weight"
        config["vocab_size"] = 128
        weights[name] = torch.cat([weights[name]] * 2)

    path = changed(scorer_dir, tmp_path / "short", change)
    if other_tokens:
        letters(bos=True).save_pretrained(path)
    args = args_of(rloo, tiny_dirs["llama"], tmp_path, reward=path)
    longest = 9 if other_tokens else 8
    refused([f"{path}: {longest} tokens exceed its context of 7"], rloo.main, args)
    assert not (tmp_path / "run").exists()
    args.max_completion_length = 2
    rloo.main(args)


# ---------------------------------------------------------------- flags
@pytest.mark.parametrize("script", [ppo, grpo, rloo, rejection_sampling])
def test_a_temperature_of_zero_is_refused(script, tiny_dirs, tmp_path, refused):
    args = args_of(script, tiny_dirs["llama"], tmp_path, temperature=0.0)
    refused(["--temperature 0.0 must be above 0"], script.main, args)


def test_outcome_tokens_need_the_outcome_loss(tiny_dirs, tmp_path, refused):
    args = args_of(reward_model, tiny_dirs["llama"], tmp_path, outcome_tokens="all")
    refused(["--outcome-tokens all is for --loss outcome, not"], reward_model.main, args)


@pytest.mark.parametrize("loss", ["outcome", "process"])
def test_centering_needs_a_loss_of_comparisons(loss, tiny_dirs, tmp_path, refused):
    """Scores of labels have no constant to center, so --center-coef would be ignored."""
    args = args_of(reward_model, tiny_dirs["llama"], tmp_path, loss=loss, center_coef=0.01)
    refused([f"--center-coef 0.01 must be 0 with --loss {loss}"], reward_model.main, args)


KINDS = {sft: "sft", reward_model: "pairs", dpo: "pairs"}  # the others read prompts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_script_reads_its_kind_of_rows(script, tiny_dirs, tmp_path, monkeypatch):
    calls = []

    def task_rows(kind, held_out, seed):
        calls.append((kind, held_out))
        return [row | {"prompt": "b" + row["prompt"]} if held_out else row for row in ROWS]

    monkeypatch.setattr(common, "task_rows", task_rows)
    flags = dict(ptx_coef=1.0, ptx_dataset="sort") if script is ppo else {}
    script.main(args_of(script, tiny_dirs["llama"], tmp_path, dataset="sort", **flags))
    kind = KINDS.get(script, "prompts")
    assert calls == [(kind, False), (kind, True)] + [("sft", False)] * (script is ppo)


@pytest.mark.parametrize("script", [sft, dpo, grpo, ppo, rloo, rejection_sampling])
@pytest.mark.parametrize("on_task", ["dataset", "eval_dataset"])
def test_gold_is_the_checker_of_what_is_evaluated(script, on_task, tiny_dirs, tmp_path, small_task):
    """Training and evaluation each have gold only if they use rows of the built-in task."""
    rows = [{name: row[name] for name in row if name != "answer"} for row in ROWS]
    other = "eval_dataset" if on_task == "dataset" else "dataset"
    flags = {on_task: "sort", other: write_rows(tmp_path / "own.jsonl", rows)}
    samples = hasattr(script.Args, "reward")
    if samples:
        flags |= dict(reward=reward_file(tmp_path, "return [len(text) for text in completions]"))
    script.main(args_of(script, tiny_dirs["llama"], tmp_path, **flags))
    first, *_, last = metrics(tmp_path / "run")
    assert ("eval/gold" in first) == (on_task == "eval_dataset")
    assert ("gold" in last) == (on_task == "dataset" and samples)


def test_a_base_model_becomes_a_chat_model(tmp_path):
    """sft.py saves the template, which grpo.py and plain transformers use."""
    tokenizer = letters(bos=True)
    tokenizer.save_pretrained(tmp_path / "base")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [
        {"messages": talk(f"what is {i}", "so"), "prompt": talk(f"what is {i}")} for i in "abcd"
    ]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    flags = dict(dataset=data, chat_template="plain", output_dir=str(tmp_path / "sft"), steps=150)
    flags |= dict(epochs=999, learning_rate=1e-2)
    sft.main(args_of(sft, tmp_path / "base", tmp_path, **flags))
    reward = reward_file(tmp_path, "return [float(text == 'so') for text in completions]")
    flags = dict(dataset=data, eval_dataset=data, reward=reward, output_dir=str(tmp_path / "grpo"))
    grpo.main(args_of(grpo, tmp_path / "sft", tmp_path, **flags))
    assert metrics(tmp_path / "grpo")[0]["eval/score_greedy"] == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "grpo")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grpo")
    prompt = tokenizer.apply_chat_template(
        talk("what is a"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=9, do_sample=False)[0]
    text = "<s><|user|>\nwhat is a\n<|assistant|>\nso[EOS]"
    assert tokenizer.decode(ids) == text, "it has learned to answer and to stop"


# ---------------------------------------------------------------- directories and --resume
@pytest.fixture(scope="module")
def ended(tiny_dirs, tmp_path_factory):
    """The directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("ended")
    sft.main(args_of(sft, tiny_dirs["llama"], folder, steps=2))
    return folder / "run"


@pytest.fixture
def run_dir(ended, tmp_path):
    """A copy of the directory of a run."""
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


def resume_args(model, run_dir, **flags):
    return args_of(sft, model, run_dir.parent, **dict(steps=3, resume=True) | flags)


@pytest.mark.parametrize("flags", [{}, dict(overwrite=True), dict(resume=True)], ids=str)
@pytest.mark.parametrize("name", ["model", "notes"])
def test_a_directory_that_is_not_a_run_is_refused(name, flags, tiny_dirs, tmp_path, refused):
    """The error comes before a model loads, and nothing is written."""
    if name == "model":
        shutil.copytree(tiny_dirs["llama"], tmp_path / name)
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("")
    folder = str(tmp_path / name)
    args = args_of(sft, tmp_path / "missing", tmp_path, output_dir=folder, **flags)
    before = contents(tmp_path)
    refused([f"--output-dir {folder} is not empty"], sft.main, args)
    assert contents(tmp_path) == before


def test_a_run_is_kept_without_resume_or_overwrite(tiny_dirs, run_dir, refused):
    """--overwrite renames its directory to name.date-time."""
    before = contents(run_dir)
    args = args_of(sft, tiny_dirs["llama"], run_dir.parent, seed=2)
    refused([f"--output-dir {run_dir} is not empty", "--resume", "--overwrite"], sft.main, args)
    assert contents(run_dir) == before
    args.overwrite = True
    sft.main(args)
    (earlier,) = run_dir.parent.glob("run.????????-??????-??????")
    assert contents(earlier) == before
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 2
    assert [row["step"] for row in metrics(run_dir)] == [1]


@pytest.mark.parametrize("what", ["row added", "row removed", "row changed", "order", "weight"])
def test_resume_with_other_data_or_weights_is_refused(what, tiny_dirs, run_dir, tmp_path, refused):
    """The directory stays unchanged, and the run resumes with the right flags."""
    rows = {
        "row added": [*ROWS, ROWS[0]],
        "row removed": ROWS[:-1],
        "row changed": [*ROWS[:-1], ROWS[-1] | {"answer": "only a reward reads it"}],
        "order": ROWS[::-1],
    }.get(what, ROWS)
    model = tiny_dirs["llama"]
    if what == "weight":  # the last bit of one number
        change = lambda w, c: w["model.norm.weight"].view(torch.int32)[0].add_(1)  # noqa: E731
        model = changed(model, tmp_path / "model", change)
    before = contents(run_dir)
    args = resume_args(model, run_dir, dataset=write_rows(tmp_path / "other.jsonl", rows))
    refused(["--resume: data or initial weights differ"], sft.main, args)
    assert contents(run_dir) == before
    sft.main(resume_args(tiny_dirs["llama"], run_dir))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("batch_size", 4),
        ("seed", 2),
        ("learning_rate", 0.1),
        ("weight_decay", 0.1),
        ("warmup_steps", 0),
        ("lr_schedule", "cosine"),
        ("max_grad_norm", 0.5),
        ("prompt_template", "{prompt} "),
        ("max_length", 99),
        ("train_on", "all"),
        ("dtype", "bfloat16"),
    ],
)
def test_resume_refuses_a_changed_flag(flag, value, tiny_dirs, run_dir, refused):
    """It would skip or repeat rows, or be saved in args.json and have no effect."""
    before = contents(run_dir)
    args = resume_args(tiny_dirs["llama"], run_dir, **{flag: value})
    refused([f"--resume: --{flag.replace('_', '-')} cannot change"], sft.main, args)
    assert contents(run_dir) == before


def test_flags_that_may_change_at_resume(tiny_dirs, run_dir, tmp_path):
    """They change neither the data order nor, apart from --steps, a number."""
    flags = dict(eval_every=1, save_every=1, log_every=1, micro_batch_tokens=8, epochs=10)
    flags |= dict(eval_dataset=write_rows(tmp_path / "more.jsonl", ROWS[:2]), overwrite=True)
    sft.main(resume_args(tiny_dirs["llama"], run_dir, gradient_checkpointing=True, **flags))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]


def test_resume_with_a_template_that_renders_the_date(tiny_dirs, tmp_path):
    """Every day has other token ids, but the same rows."""
    model = tmp_path / "model"
    shutil.copytree(tiny_dirs["llama"], model)
    tokenizer = common.load_tokenizer(str(model))
    rows = [{"messages": talk(row["prompt"], row["answer"])} for row in ROWS]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    for steps, day in enumerate("ab", 1):
        tokenizer.chat_template = day + "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(model)
        sft.main(args_of(sft, model, tmp_path, dataset=data, steps=steps, resume=steps > 1))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_resume_with_moved_data_and_model(tiny_dirs, run_dir, tmp_path):
    """Only their contents count, not their paths or the file format."""
    shutil.copytree(tiny_dirs["llama"], tmp_path / "moved")
    (tmp_path / "renamed.json").write_text(json.dumps(ROWS))
    sft.main(resume_args(tmp_path / "moved", run_dir, dataset=str(tmp_path / "renamed.json")))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    flags = json.loads((run_dir / "args.json").read_text())
    assert flags["model"] == str(tmp_path / "moved") and flags["steps"] == 3


# ---------------------------------------------------------------- rewards
def scores_of(function, row=None):
    """The scores of two completions of one row."""
    example = {"row": row or {}, "prompt": "ab>", "prompt_ids": [4, 5, 3]}
    rollouts = [example | {"completion_ids": [4, 5, 1], "finished": True}] * 2
    return common.checker_reward(function, sft.tiny_tokenizer())(rollouts)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, -2], dtype=np.float32),
        np.array([1, -2]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([1, -2], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.int64(-2)],
        (1, -2.0),
        (number for number in (1, -2)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_rewards_may_be_any_kind_of_number(values):
    scores = scores_of(lambda prompts, completions, rows: values)
    assert scores.tolist() == [1, -2] and scores.dtype == torch.float32


def test_none_in_an_array_is_no_score():
    scores = scores_of(lambda prompts, completions, rows: np.array([True, None]))
    assert scores[0] == 1 and scores[1].isnan()


def test_a_reward_function_gets_copies_of_rows():
    """The copies are shallow, so it may add and remove columns."""
    row = {"answer": "ab", "tests": ["x"]}

    def judge(prompts, completions, rows):
        scores = [len(row) for row in rows]
        rows[0].clear()
        rows[1]["answer"] = "b"
        return scores

    for _ in range(2):  # with `finished` there are three columns
        assert scores_of(judge, row).tolist() == [3, 3]
    assert row == {"answer": "ab", "tests": ["x"]}


@pytest.mark.parametrize("name", ["math", "colorsys", "torch"])
def test_a_reward_file_with_the_name_of_a_module(name, tmp_path, monkeypatch):
    """It can import this module and its neighbors, and it replaces neither."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.delitem(sys.modules, "neighbor", raising=False)
    (tmp_path / "neighbor.py").write_text("ONE = 1\n")
    lines = [f"import {name}", "import neighbor", "def reward(prompts, completions, rows):"]
    lines += [f"    return [neighbor.ONE + ({name}.__name__ == '{name}')] * len(prompts)"]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    function = common.load_checker(f"{tmp_path}/{name}.py:reward", [])
    assert scores_of(function).tolist() == [2, 2]
    assert str(tmp_path) not in str(sys.modules[name].__spec__.origin)


def test_functions_of_a_reward_file_can_be_sent_to_a_process_pool(tmp_path, monkeypatch):
    """They are found by the name of their module, which shadows no other module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = ["def grade(text):", "    return float(len(text))"]
    lines += [
        "def reward(prompts, completions, rows):",
        "    return [grade(c) for c in completions]",
    ]
    (tmp_path / "grading.py").write_text("\n".join(lines))
    before = set(sys.modules)
    function = common.load_checker(f"{tmp_path}/grading.py:reward", [])
    (name,) = set(sys.modules) - before
    assert name.startswith("reward_")
    grade = pickle.loads(pickle.dumps(function.__globals__["grade"]))
    assert grade is sys.modules[name].grade
    del sys.modules[name]


def test_a_reward_file_changes_no_state_of_the_run(tmp_path, monkeypatch):
    """Neither when it is loaded nor when it is called."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    change = [
        "os.chdir(os.path.dirname(os.path.abspath(__file__)))",
        "torch.set_grad_enabled(False)",
    ]
    lines = ["import os", "import torch", *change, "def reward(prompts, completions, rows):"]
    lines += [*[f"    {line}" for line in change], "    return [1.0] * len(prompts)"]
    (tmp_path / "rules.py").write_text("\n".join(lines))
    folder = os.getcwd()
    function = common.load_checker(f"{tmp_path}/rules.py:reward", [])
    assert os.getcwd() == folder and torch.is_grad_enabled()
    assert scores_of(function).tolist() == [1, 1]
    assert os.getcwd() == folder and torch.is_grad_enabled()


# ---------------------------------------------------------------- processes
def test_world_size_without_torchrun(monkeypatch):
    """Clusters set these variables too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert common.world_size() == 1 and common.rank() == 0


def test_main_twice_in_one_process(tiny_dirs, tmp_path):
    """The same Args give the same weights, bit for bit, whatever the global generator is."""
    reward = reward_file(tmp_path, "return [sum(map(ord, text)) % 7 for text in completions]")
    args = args_of(rloo, tiny_dirs["llama"], tmp_path, reward=reward)
    rloo.main(args)
    torch.rand(3)
    args.output_dir = str(tmp_path / "again")
    rloo.main(args)
    one, other = (load_weights(tmp_path / n / "model.safetensors") for n in ("run", "again"))
    start = load_weights(Path(tiny_dirs["llama"], "model.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], start[name]) for name in one)
