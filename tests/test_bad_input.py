"""Bad files and rows: refused with file and row, or dropped, counted and located."""

import copy
import importlib.util
import json
import random
from pathlib import Path

import pytest
import transformers
from test_data import ASKED, CHATML, letters, load_file, merging, talk, turns
from test_data import load as load  # a fixture
from test_data import refused as refused  # a fixture

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

SCRIPTS = [sft, reward_model, rejection_sampling, ppo, grpo, rloo, dpo]
GOOD = {"prompt": "a>", "completion": "b", "chosen": "b", "rejected": "c"}
LINE = '{"prompt": "a>", "completion": "b"}\n'


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.jsonl", "", ["rows.jsonl row 1: ", "JSONDecodeError"]),
        ("rows.jsonl", "\n \n", ["rows.jsonl row 1: ", "JSONDecodeError"]),
        ("rows.jsonl", LINE * 6 + '{"prompt": \n' + LINE, ["rows.jsonl row 7: ", "JSON"]),
        ("rows.jsonl", LINE * 6 + "prompt,completion\n", ["rows.jsonl row 7: ", "JSON"]),
        ("rows.jsonl", LINE + "[1]\n", ["rows.jsonl row 2: ", "found [1]"]),
        ("rows.jsonl", LINE + "null\n", ["rows.jsonl row 2: ", "NoneType"]),
        ("rows.json", f"[{LINE}, 5]", ["rows.json row 2: ", "int"]),
        ("rows.json", "[]", ["rows.json: no usable rows"]),
    ],
)
def test_bad_files(load, refused, name, content, words):
    refused(words, load, content, name=name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_missing_file(tmp_path, refused, name):
    refused([f"{tmp_path / name} does not exist"], load_file, tmp_path / name)


@pytest.mark.parametrize("name", ["someone/data", "rows.csv", "rows.parquet"])
def test_formats_that_need_the_datasets_package(refused, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused([name, "pip install datasets", ".jsonl"], load_file, name)


# ---------------------------------------------------------------- refused rows
@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("sft", {"text": "a"}, ["no column of ['prompt', 'instruction', 'question']", "['text']"]),
        ("sft", {}, ["no column of"]),
        ("sft", {"prompt": "a>", "solution": "b"}, ["completion", "found ['prompt', 'solution']"]),
        ("sft", {"prompt": "a>", "completion": None}, ["completion", "found ['prompt']"]),
        (
            "preference",
            {"prompt": "a>", "chosen": "b"},
            ["no column of ['rejected']", "['prompt', 'chosen']"],
        ),
        ("preference", {"accepted": "a b"}, ["no column of ['chosen']", "['accepted']"]),
        ("prompt", {"query": "a"}, ["no column of", "['query']"]),
        ("sft", {"prompt": 5, "completion": "b"}, ["TypeError", "int"]),
        ("sft", {"prompt": "a>", "completion": ["b"]}, ["TypeError"]),
        ("sft", {"prompt": "a>", "completion": talk("b")}, ["TypeError", "list"]),
        ("preference", GOOD | {"rejected": talk("c")}, ["TypeError", "list"]),
        ("sft", {"messages": []}, ["no column of"]),
        ("sft", {"messages": {"role": "user"}}, ["no assistant turn"]),
        ("sft", {"messages": [{"content": "a"}]}, ["KeyError: 'role'"]),
        ("sft", {"messages": talk("a")}, ["`messages` has no assistant turn"]),
        ("sft", {"messages": talk("a", first="assistant")}, ["`messages` has no assistant turn"]),
        ("sft", {"messages": talk("a", "b", "c")[::2] + talk("b", "c")}, ["roles must alternate"]),
        ("preference", {"chosen": "yes", "rejected": "no"}, ["no shared beginning"]),
        ("preference", {"chosen": "a b", "rejected": talk("a", "b")}, ["no shared beginning"]),
        ("preference", {"chosen": talk("a"), "rejected": talk("a")}, ["no shared beginning"]),
        (
            "preference",
            {"chosen": talk("hi", "yes"), "rejected": talk("ho", "no")},
            ["no shared beginning"],
        ),
        ("preference", GOOD | {"margin": "high"}, ["ValueError", "'high'"]),
        ("preference", GOOD | {"margin": [1]}, ["TypeError", "list"]),
        ("sft", {"prompt": "a>", "completion": "\ud800"}, ["TypeError"]),
        # a begun answer would be rendered as a complete turn
        ("prompt", {"prompt": talk("a", "b")}, ["ends with an assistant message"]),
        ("sft", {"prompt": talk("a", "b"), "completion": "c"}, ["ends with an assistant message"]),
        ("preference", GOOD | {"prompt": talk("a", "b")}, ["ends with an assistant message"]),
        # roles of ShareGPT; a role with a control token
        ("prompt", {"prompt": [{"role": "human", "content": "a"}]}, ["unknown role", "human"]),
        (
            "sft",
            {"messages": [*talk("a", "b", "c"), {"role": "gpt", "content": "d"}]},
            ["role", "gpt"],
        ),
        (
            "sft",
            {
                "messages": [
                    {"role": "user<|im_end|>", "content": "a"},
                    *talk("b", first="assistant"),
                ]
            },
            ["role"],
        ),
        # Alpaca's blank input must not become the word None
        ("sft", {"prompt": None, "completion": "b"}, ["no column of", "found ['completion']"]),
    ],
)
def test_bad_rows(load, refused, kind, row, words):
    words = ["rows.jsonl row 3: ", *words]
    refused(words, load, [GOOD, GOOD, row], kind, letters(chat=True))


@pytest.mark.parametrize(
    "kind, row",
    [
        ("sft", {"messages": talk("a", "b")}),
        ("sft", {"prompt": talk("a"), "completion": "b"}),
        ("prompt", {"prompt": talk("a")}),
    ],
)
def test_messages_need_a_chat_template(load, refused, kind, row):
    refused(["rows.jsonl row 1: ", "chat_template is not set"], load, [row], kind)


@pytest.mark.parametrize("template", ["{wanted}", "{prompt", "{}", "{prompt.text}", "{prompt:d}"])
def test_bad_prompt_templates(load, refused, template):
    refused(["rows.jsonl row 1: "], load, [GOOD], prompt_template=template)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_bad_rows_stop_each_script_before_a_model_loads(tmp_path, refused, script):
    """The directory of --model has no weights, so loading it would fail with another error."""
    model = str(tmp_path / "model")
    letters().save_pretrained(model)
    transformers.LlamaConfig().save_pretrained(model)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    args = script.Args(model=model, dataset=str(path), output_dir=str(tmp_path / "run"))
    refused([f"{path} row 1: "], script.main, args)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- dropped rows
IMAGE = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
NO_TEXT = "a message without plain text for the chat template"
OTHERS = "a completion with a message that is not from the assistant"
CONTROL = "a message that contains a special token of the tokenizer"
PREFIX = "prompt not a token prefix of prompt + completion (check the template)"
# one template opens a think block, one shortens earlier answers as Qwen3's does
THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SHORTEN = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content[:1] if m.role == 'assistant' and not loop.last else m.content }}",
)
ANSWER = {"prompt": talk("hi"), "completion": "so", "chosen": "yes", "rejected": "no"}
DIALOG = talk("hello", "why", "so", first="assistant")


def with_control_token(token):
    """Rows with the token in a prompt, an earlier turn and an answer."""
    rows = []
    for turn in (1, 2, 3):
        messages = talk("hi", "hello", "why", "so")
        messages[turn]["content"] += f" {token}\n{ASKED}x"
        rows.append({"messages": messages})
    return rows


TEXT = letters()
CHAT = letters(chat=True)
DROPPED = {  # name -> kind, tokenizer, flags, a good row, bad rows, reason
    "long row": (
        "sft",
        TEXT,
        dict(max_length=5),  # prompt, completion and EOS
        dict(prompt="a>", completion="bb"),
        [dict(prompt="a>", completion="bbb"), dict(prompt="a>", completion="bbbb")],
        "longer than --max-length 5",
    ),
    "labeled false": (
        "sft",
        TEXT,
        {},
        GOOD | {"label": True},
        [GOOD | {"label": False}],
        "labeled false",
    ),
    "long pair": (
        "preference",
        TEXT,
        dict(max_length=5),
        dict(prompt="a>", chosen="bb", rejected="cc"),
        [
            dict(prompt="a>", chosen="bbb", rejected="c"),
            dict(prompt="a>", chosen="b", rejected="ccc"),
        ],
        "longer than --max-length 5",
    ),
    "long prompt": (
        "prompt",
        TEXT,
        dict(max_prompt_length=5, max_length=1),
        dict(prompt="aaaaa"),
        [dict(prompt="aaaaaa")],
        "longer than --max-prompt-length 5",
    ),
    "equal pair": (  # unknown characters have the same token
        "preference",
        TEXT,
        {},
        dict(prompt="a>", chosen="b", rejected="c"),
        [
            dict(prompt="a>", chosen="b", rejected="b"),
            dict(prompt="a>", chosen="\u00e9", rejected="\u00e8"),
        ],
        "chosen and rejected have the same tokens",
    ),
    "prefix of a row": (
        "sft",
        merging(),
        {},
        dict(prompt="ca", completion="cb"),
        [dict(prompt="ca", completion="bc")],
        PREFIX,
    ),
    "prefix of a pair": (
        "preference",
        merging(),
        {},
        dict(prompt="ca", chosen="c", rejected="a"),
        [dict(prompt="ca", chosen="c", rejected="b"), dict(prompt="ca", chosen="b", rejected="c")],
        PREFIX,
    ),
    "empty prompt": ("prompt", TEXT, {}, dict(prompt="a>"), [dict(prompt="")], "an empty prompt"),
    "empty prompt of a row": (
        "sft",
        TEXT,
        {},
        GOOD,
        [dict(prompt="", completion="b"), dict(prompt="", completion="")],
        "an empty prompt",
    ),
    "rewritten turns": (
        "sft",
        letters(chat=True, template=SHORTEN),
        dict(train_on="all"),
        {"messages": talk("a", "yo")},
        [{"messages": talk("a", "yo", "b", "no")}],
        "the chat template rewrites earlier turns; use --train-on last",
    ),
    "no text": (
        "sft",
        CHAT,
        {},
        {"messages": talk("hi", "yes")},
        [
            {"messages": [IMAGE, *talk("no", first="assistant")]},
            {"messages": [*talk("hi"), CALL]},
            {"messages": [*talk("hi"), CALL, *talk("yes", first="assistant")]},
            {"messages": [*talk("hi"), {"role": "assistant", "content": None}]},
            {"messages": [*talk("hi"), {"role": "assistant", "content": ["yes"]}]},
            {"messages": [*talk("hi"), {"role": "assistant"}]},
        ],
        NO_TEXT,
    ),
    "no text in a prompt": ("prompt", CHAT, {}, ANSWER, [{"prompt": [IMAGE]}], NO_TEXT),
    # user turns would be trained as the assistant's
    "user turns": ("sft", CHAT, {}, ANSWER, [ANSWER | {"completion": DIALOG}], OTHERS),
    "user turns in a pair": (
        "preference",
        CHAT,
        {},
        ANSWER,
        [ANSWER | {"chosen": DIALOG}, ANSWER | {"rejected": DIALOG}],
        OTHERS,
    ),
    "control token in a pair": (
        "preference",
        CHAT,
        {},
        ANSWER,
        [ANSWER | {name: f"so<|im_end|>\n{turns('x')}"} for name in ("chosen", "rejected")],
        CONTROL,
    ),
}
for token in ["<|im_end|>", "<|im_start|>", "[EOS]", "[PAD]"]:
    DROPPED[f"control token {token}"] = (
        "sft",
        CHAT,
        dict(train_on="all"),
        {"messages": talk("hi", "hello", "why", "so")},
        with_control_token(token),
        CONTROL,
    )


@pytest.mark.parametrize("name", DROPPED)
def test_unusable_rows_are_dropped_and_counted(name, load, tmp_path, capsys, refused):
    """The reason is printed with the number of rows and the location of the first one."""
    kind, tokenizer, flags, good, bad, reason = DROPPED[name]
    (example,) = load([good, *bad], kind, tokenizer, **flags)
    assert example["row"] == good
    path = tmp_path / "rows.jsonl"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 1 rows"
    assert lines[1] == f"{path}: dropped {len(bad)} rows: {reason}, first at {path} row 2"
    refused([f"{path}: no usable rows"], load, bad, kind, tokenizer, **flags)


def test_last_turn_of_a_template_that_rewrites_earlier_turns(load):
    """--train-on last does not drop the row; earlier turns are as the template rewrites them."""
    tokenizer = letters(chat=True, template=SHORTEN)
    (example,) = load([{"messages": talk("hi", "yo", "so", "no")}], tokenizer=tokenizer)
    assert tokenizer.decode(example["ids"]) + "\n" == turns("hi", "y", "so", "no")
    assert example["mask"][-4:] == [0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_templates_that_open_a_think_block(kind, load, capsys):
    """An answer does not continue it, unless the template writes an empty block before the answer.

    Otherwise the row is dropped, with the template as the cause."""
    with pytest.raises(SystemExit):
        load([ANSWER], kind, letters(chat=True, template=THINK))
    out = capsys.readouterr().out
    assert f"dropped 1 rows: {PREFIX}, first at" in out
    empty = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    tokenizer = letters(chat=True, template=THINK.replace("{{ m.content }}", empty))
    (kept,) = load([ANSWER], kind, tokenizer)
    assert tokenizer.decode(kept["prompt_ids"]).endswith(f"{ASKED}<think>\n")
    ids = kept["chosen_ids"] if kind == "preference" else kept["ids"]
    text = "yes" if kind == "preference" else "so"
    assert tokenizer.decode(ids).endswith(f"\n</think>\n\n{text}<|im_end|>")


# ---------------------------------------------------------------- many broken rows
ROWS = {
    "sft text": ("sft", False, lambda i: {"prompt": f"ask {i}: ", "completion": f"answer {i}"}),
    "sft messages": ("sft", True, lambda i: {"messages": talk("hi", f"hello {i}", "why", "so")}),
    "sft prompt messages": (
        "sft",
        True,
        lambda i: {"prompt": talk(f"hi {i}"), "completion": f"hello {i}"},
    ),
    "instruction": ("sft", False, lambda i: {"instruction": f"add {i}", "output": "2"}),
    "question": ("sft", True, lambda i: {"question": f"what is {i} + 1", "answer": f"#### {i}"}),
    "pairs text": (
        "preference",
        False,
        lambda i: {"prompt": f"p{i} ", "chosen": "yes", "rejected": "no"},
    ),
    "pairs messages": (
        "preference",
        True,
        lambda i: {"chosen": talk(f"p{i}", "yes"), "rejected": talk(f"p{i}", "no"), "margin": 0.5},
    ),
    "scores": (
        "comparison",
        False,
        lambda i: {"prompt": f"p{i} ", "completions": ["a", f"b{i}", "c"], "scores": [i, -1, 2.5]},
    ),
    "scores messages": (
        "comparison",
        True,
        lambda i: {
            "prompt": talk(f"p{i}"),
            "completions": ["a", "b", "c"],
            "scores": [True, None, 0],
        },
    ),
    "steps": (
        "step",
        False,
        lambda i: {"prompt": f"p{i} ", "completions": ["a", f"b{i}"], "labels": [True, 0]},
    ),
    "prompts": ("prompt", False, lambda i: {"prompt": f"do {i}", "answer": str(i)}),
    "prompt messages": ("prompt", True, lambda i: {"prompt": talk(f"do {i}"), "answer": str(i)}),
}
VALUES = [
    # neither text nor messages
    *(None, 3, 1.5, True, [], {}, [[]], [None], ["text"], [1], [[["x"]]]),
    {"role": "user", "content": "x"},
    # text
    *(
        "",
        "text",
        "\x00",
        "a\x00b",
        "\ud800",
        "x\udfff",
        "a" * 1000,
        " ",
        "\n",
        "3",
        "\u202e\u200b",
    ),
    # messages
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": 1, "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": ""}],
    [{"role": "\ud800", "content": "x"}],
    [{"role": "us<|im_end|>er", "content": "x"}],
    [{"role": "", "content": "x"}],
    talk("a", first="assistant"),
    talk("a", "b"),
    [*talk("a"), *talk("b")],
    [*talk("a"), "text"],
    [talk("a")],
    talk("a<|im_end|>\n<|im_start|>"),
]


def break_row(rng, row):
    """A copy of a row with one change."""
    row = copy.deepcopy(row)
    key = rng.choice(sorted(row))
    how = rng.randrange(10)
    if how < 6:
        row[key] = rng.choice(VALUES)
    elif how == 6:
        del row[key]
    elif how == 7:
        row[key.upper()] = row.pop(key)
    elif how == 8:
        return rng.choice([None, 1, "text", [], [row], True, {}, {"": ""}])
    else:
        row[key] = rng.choice([json.dumps(row[key]), [row[key]], {key: row[key]}])
    return row


@pytest.mark.parametrize("name", ROWS)
def test_many_broken_rows(name, tmp_path, capsys):
    """One of five rows is broken: it is refused by number, or dropped and counted, or kept whole.

    The other four are kept."""
    kind, chat, make = ROWS[name]
    tokenizer = letters(chat=chat)
    outcomes = []
    for seed in range(45):
        rng = random.Random(f"{name} {seed}")
        rows = [make(i) for i in range(5)]
        broken = rng.randrange(5)
        rows[broken] = break_row(rng, rows[broken])
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            examples = load_file(path, kind, tokenizer)
        except SystemExit as stopped:
            err = capsys.readouterr().err
            assert stopped.code == 2
            assert err.startswith(f"error: {path} row {broken + 1}: "), err
            assert len(err.splitlines()) == 1
            outcomes.append("refused")
            continue
        out, err = capsys.readouterr()
        where = f"{path} row {broken + 1}"
        is_dropped = "dropped 1 rows: " in out and f"first at {where}\n" in out
        assert err == "" and len(examples) == 5 - is_dropped, (path, out)
        for example in examples:
            assert_whole(example, tokenizer, kind)
        outcomes.append("dropped" if is_dropped else "kept")
    assert outcomes.count("refused") >= 10, outcomes


def assert_whole(example, tokenizer, kind):
    """The tokens of prompt and answer decode to the text of the row."""
    row = example["row"]
    prompt = example["prompt"]
    if isinstance(prompt, list):
        prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt)
        prompt += ASKED
    assert tokenizer.decode(example["prompt_ids"]) == with_unk(prompt, tokenizer)
    for name in ("chosen", "rejected"):
        if kind == "preference" and isinstance(row[name], str):
            text = tokenizer.decode(example[f"{name}_ids"][:-1])
            assert text == with_unk(row[name], tokenizer)
    if kind == "sft" and isinstance(row.get("completion"), str):
        ids = [i for i, m in zip(example["ids"], example["mask"], strict=True) if m]
        assert tokenizer.decode(ids[:-1]) == with_unk(row["completion"], tokenizer)


def with_unk(text, tokenizer):
    """The text with [UNK] for each character outside the vocabulary."""
    vocab = tokenizer.get_vocab()
    return "".join(c if c in vocab else "[UNK]" for c in text)


# ---------------------------------------------------------------- no code from files
@pytest.mark.parametrize("file", [common, *SCRIPTS], ids=lambda file: file.__name__)
def test_nothing_is_unpickled_or_evaluated(file):
    """The source has no unsafe torch.load, remote code, eval or exec.

    Only common.py loads models, with safetensors."""
    text = Path(file.__file__).read_text()
    assert text.count("torch.load(") == text.count("weights_only=True")
    for word in ("trust_remote_code", "import pickle", " eval(", " exec(", "os.system"):
        assert word not in text
    if file is not common:
        assert ".from_pretrained(" not in text.replace("GenerationConfig.from_pretrained(", "")
