"""Data: every form of row, every refusal, and where prompts, turns and masks end in tokens."""

import codecs
import importlib.machinery
import importlib.util
import json
import string
import sys
import types
from pathlib import Path

import pytest
import tokenizers
import transformers

import common
import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo
import sft

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
CHATML = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["[PAD]", "[EOS]", "[UNK]", "<s>", "<|im_start|>", "<|im_end|>"]
MAKE_EXAMPLE = {
    "sft": sft.sft_example,
    "preference": dpo.preference_example,
    "comparison": reward_model.comparison_example,
    "step": reward_model.step_example,
    "prompt": grpo.prompt_example,
}


def letters(bos=False, chat=False, pad="[PAD]", template=CHATML):
    """One token a character; `bos`: it adds <s> as Llama's does, `chat`: a template as Qwen's."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B",
            special_tokens=[("<s>", vocab["<s>"])],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="[EOS]",
        unk_token="[UNK]",
        pad_token=pad,
        bos_token="<s>" if bos else None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    tokenizer.chat_template = template if chat else None
    return tokenizer


def merging():
    """a and b merge into one token, so that a prompt ending in a may be no prefix in tokens."""
    model = tokenizers.models.BPE({"[EOS]": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        eos_token="[EOS]",
        pad_token="[EOS]",
    )


def stories():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there: a Llama tokenizer is tested where it is")
    return common.load_tokenizer(str(STORIES))


def flags(**given):
    defaults = {
        "prompt_template": "{prompt}",
        "train_on": "last",
        "seed": 1,
        "max_length": 500,
        "max_prompt_length": 500,
        "loss": "bradley-terry",
        "outcome_tokens": "last",
        "step_separator": "\n",
    }
    return types.SimpleNamespace(**defaults | given)


def talk(*contents, first="user"):
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def turns(*contents, tail=""):
    """The same, as CHATML renders it."""
    shown = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk(*contents))
    return shown + tail


ASKED = "<|im_start|>assistant\n"


def load_file(path, kind="sft", tokenizer=None, **given):
    """load_examples of a file, or of a Hub id."""
    return common.load_examples(
        str(path), MAKE_EXAMPLE[kind], tokenizer or letters(), flags(**given)
    )


@pytest.fixture
def load(tmp_path):
    """rows (or the text, or bytes, of a file) -> load_examples of a file that holds them."""

    def function(rows, kind="sft", tokenizer=None, name="rows.jsonl", **given):
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return load_file(tmp_path / name, kind, tokenizer, **given)

    return function


@pytest.fixture
def refused(capsys):
    """Calls, expects exit status 2 and one line on stderr with all the words; returns the line."""

    def function(words, call, *args, **kwargs):
        with pytest.raises(SystemExit) as stopped:
            call(*args, **kwargs)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert all(word in lines[0] for word in words), lines[0]
        return lines[0]

    return function


def parts(tokenizer, example):
    """Prompt, and the rest without the EOS that must end it, as text."""
    n = len(example["prompt_ids"])
    assert example["ids"][:n] == example["prompt_ids"]
    assert example["ids"][-1] == tokenizer.eos_token_id
    assert example["mask"] == [0] * n + [1] * (len(example["ids"]) - n)
    return tokenizer.decode(example["prompt_ids"]), tokenizer.decode(example["ids"][n:-1])


def trained(tokenizer, example):
    return tokenizer.decode([i for i, m in zip(example["ids"], example["mask"], strict=True) if m])


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_bom_crlf_and_blank_lines_are_read(load, name, bom, end):
    if name == "rows.json":
        lines = ["[", '{"prompt": "a>",', '"completion": "b"}', "]"]
    else:
        lines = ['{"prompt": "a>", "completion": "b"}', "", ""]
    (example,) = load(bom + end.join(lines).encode(), name=name)
    assert parts(letters(), example) == ("a>", "b")


def test_rows_are_separated_by_newlines_only(load):
    """Other line separators of Unicode are legal inside a JSON text."""
    examples = load(
        '{"prompt": "a\u2028b\x85>", "completion": "b"}\n{"prompt": "c>", "completion": "d"}'
    )
    assert [e["prompt"] for e in examples] == ["a\u2028b\x85>", "c>"]


def test_where_names_file_and_line(load, tmp_path):
    examples = load('{"prompt": "a>", "completion": "b"}\n\n{"prompt": "c>", "completion": "d"}\n')
    assert [e["where"] for e in examples] == [f"{tmp_path / 'rows.jsonl'} line {n}" for n in (1, 3)]
    rows = '[{"prompt": "a>", "completion": "b"}, {"prompt": "c>", "completion": "d"}]'
    examples = load(rows, name="rows.json")
    assert [e["where"] for e in examples] == [f"{tmp_path / 'rows.json'} row {n}" for n in (1, 2)]


def test_two_rows_are_a_data_set(load, capsys):
    rows = [{"prompt": "a>", "completion": "b"}, {"prompt": "c>", "completion": "d"}]
    assert len(load(rows)) == 2
    assert capsys.readouterr().out.endswith("rows.jsonl: 2 rows\n")


GOOD = '{"prompt": "a>", "completion": "b"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.jsonl", "", ["rows.jsonl", "0 rows", "nothing is left"]),
        ("rows.jsonl", "\n \n", ["rows.jsonl", "0 rows"]),
        ("rows.json", "", ["rows.json", "cannot be read"]),
        ("rows.json", "[]", ["rows.json", "0 rows"]),
        ("rows.jsonl", GOOD * 6 + '{"prompt": \n' + GOOD, ["rows.jsonl line 7", "JSON"]),
        ("rows.jsonl", GOOD * 6 + "prompt,completion\n", ["rows.jsonl line 7", "JSON"]),
        ("rows.jsonl", "[" * 100_000, ["rows.jsonl line 1", "JSON"]),
        ("rows.json", "[\n" + "\n" * 5 + "{,}]", ["rows.json", "line 7", "JSON"]),
        ("rows.json", GOOD, ["rows.json row 1", "str", "not an object"]),
        ("rows.json", "5", ["rows.json", "cannot be read", "a list"]),
        ("rows.jsonl", GOOD + "[1]\n", ["rows.jsonl line 2", "list", "not an object"]),
        ("rows.jsonl", GOOD + "null\n", ["rows.jsonl line 2", "NoneType", "not an object"]),
        ("rows.json", f'[{GOOD}, "a"]', ["rows.json row 2", "str", "not an object"]),
        ("rows.json", f"[{GOOD}, null]", ["rows.json row 2", "NoneType", "not an object"]),
        ("rows.jsonl", GOOD.encode("utf-16"), ["rows.jsonl", "utf-8", "position 0"]),
        ("rows.jsonl", GOOD.encode() + b'"\xe9"', ["rows.jsonl", "utf-8"]),
        ("rows.jsonl", GOOD.encode("utf-16-le"), ["rows.jsonl line 1", "JSON"]),
    ],
)
def test_bad_files(load, refused, name, content, words):
    refused(words, load, content, name=name)


def test_hub_name_without_the_datasets_package(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(["someone/data", "pip install datasets", ".jsonl"], load_file, "someone/data")
    refused(["nowhere.jsonl: there is no such file"], load_file, "nowhere.jsonl")


@pytest.mark.parametrize("split, prompts", [("", ["a>", "b>"]), (":test", ["c>"])])
def test_hub_splits(monkeypatch, split, prompts):
    """The datasets package has a stand-in, which holds one data set with two splits."""
    splits = {"train": ["a>", "b>"], "test": ["c>"]}

    def load_dataset(name, split):
        assert name == "someone/data"
        return [{"prompt": prompt, "completion": "d"} for prompt in splits[split]]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    fake.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    examples = load_file(f"someone/data{split}")
    assert [e["prompt"] for e in examples] == prompts
    assert examples[0]["where"] == f"someone/data{split} row 1"


# ---------------------------------------------------------------- refusals of rows
NO_ROLE = [{"content": "a"}]


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("sft", {"text": "a"}, ["no column", "prompt", "instruction", "question", "among text"]),
        ("sft", {}, ["no column", "prompt"]),
        ("sft", {"prompt": "a>", "solution": "b"}, ["completion", "among prompt, solution"]),
        ("sft", {"instruction": "a", "input": ""}, ["output", "among instruction, input"]),
        ("sft", {"question": "a", "solution": "b"}, ["answer", "among question, solution"]),
        ("preference", {"prompt": "a>", "chosen": "b"}, ["rejected", "among prompt, chosen"]),
        ("preference", {"chosen": "a b"}, ["rejected", "among chosen"]),
        ("preference", {"accepted": "a b"}, ["chosen", "among accepted"]),
        ("prompt", {"query": "a"}, ["prompt", "question", "among query"]),
        ("sft", {"prompt": 5, "completion": "b"}, ["`prompt`", "no text", "5"]),
        ("sft", {"prompt": "a>", "completion": None}, ["`completion`", "no text", "None"]),
        ("sft", {"prompt": "a>", "completion": ["b"]}, ["`completion`", "role", "['b']"]),
        (
            "sft",
            {"prompt": "a>", "completion": talk("b")},
            ["prompt is a text", "answer", "messages"],
        ),
        (
            "preference",
            {"prompt": "a>", "chosen": "b", "rejected": talk("c")},
            ["prompt is a text", "answer", "messages"],
        ),
        ("sft", {"messages": []}, ["`messages`", "list of messages"]),
        ("sft", {"messages": {"role": "user"}}, ["`messages`", "list of messages"]),
        ("sft", {"messages": NO_ROLE}, ["`messages`", "{'content': 'a'}", "role", "content"]),
        ("sft", {"messages": [{"role": "user", "content": None}]}, ["`messages`", "content"]),
        ("sft", {"messages": "a"}, ["`messages`", "no assistant turn"]),
        ("sft", {"messages": talk("a")}, ["`messages`", "no assistant turn"]),
        ("sft", {"messages": talk("a", first="assistant")}, ["`messages`", "no assistant turn"]),
        ("sft", {"messages": talk("a", "b")}, ["chat template", "none"]),
        ("sft", {"prompt": talk("a"), "completion": "b"}, ["chat template", "none"]),
        ("prompt", {"prompt": talk("a")}, ["chat template", "none"]),
        ("preference", {"chosen": "yes", "rejected": "no"}, ["`rejected`", "begin alike"]),
        ("preference", {"chosen": "a b", "rejected": talk("a", "b")}, ["begin alike"]),
        ("preference", {"chosen": talk("a"), "rejected": talk("a")}, ["begin alike"]),
    ],
)
def test_bad_rows(load, refused, kind, row, words):
    """The sentence names the file, its line, the column that is wanted and what was found."""
    good = {"prompt": "a>", "completion": "b", "chosen": "b", "rejected": "c"}
    refused(["rows.jsonl line 3: ", *words], load, [good, good, row], kind)


@pytest.mark.parametrize("margin", ["high", "0.5", float("nan"), float("inf"), 10**400, [1]])
def test_margin_that_is_no_number(load, refused, margin):
    row = {"prompt": "a>", "chosen": "b", "rejected": "c", "margin": margin}
    refused(["rows.jsonl line 1", "`margin`", "number"], load, [row], "preference")


@pytest.mark.parametrize("template", ["{wanted}", "{prompt", "{}", "{prompt.text}", "{prompt:d}"])
def test_template_that_does_not_fit(load, refused, template):
    words = ["rows.jsonl line 1", "--prompt-template", repr(template), "columns prompt, completion"]
    refused(words, load, [{"prompt": "a>", "completion": "b"}], prompt_template=template)


def test_template_is_for_texts(load, refused):
    row = {"prompt": talk("a"), "completion": "b"}
    words = ["rows.jsonl line 1", "--prompt-template", "`prompt`"]
    refused(words, load, [row], tokenizer=letters(chat=True), prompt_template="{prompt} ")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk("a") + talk("b", "c")},
        {"prompt": talk("a") + talk("b"), "completion": "c"},
    ],
)
def test_template_refuses_messages(load, refused, row):
    words = ["rows.jsonl line 1", "chat template", "roles must alternate"]
    refused(words, load, [row], tokenizer=letters(chat=True))


@pytest.mark.parametrize("chat", [False, True])
def test_text_that_is_no_unicode(load, refused, chat):
    prompt = json.dumps(talk("a") if chat else "a>")
    row = f'{{"prompt": {prompt}, "completion": "\\ud800"}}'
    refused(["rows.jsonl line 1", "surrogate"], load, row, tokenizer=letters(chat=chat))


@pytest.mark.parametrize(
    "script",
    [sft, reward_model, rejection_sampling, ppo, grpo, rloo, dpo],
    ids=lambda s: s.__name__,
)
def test_bad_rows_stop_each_script_before_a_model_loads(tmp_path, refused, script):
    """The directory of --model holds no weights: loading it first would be another error."""
    model = str(tmp_path / "model")
    letters().save_pretrained(model)
    transformers.LlamaConfig().save_pretrained(model)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    args = script.Args(model=model, dataset=str(path), output_dir=str(tmp_path / "run"))
    if hasattr(args, "reward"):
        args.reward = model
    refused([f"{path} line 1: "], script.main, args)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- forms of rows
@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"prompt": "a>", "completion": "b"}, "a>", "b"),
        ({"prompt": "a>", "completion": " b\n"}, "a>", " b\n"),
        ({"prompt": "a {x}>", "completion": "b"}, "a {x}>", "b"),
        ({"prompt": "a>", "completion": "b", "question": "c", "answer": "d"}, "a>", "b"),
        ({"prompt": "a>", "answer": "b"}, "a>", "b"),
        ({"instruction": "Add 1 2.", "output": "3"}, "Add 1 2.", "3"),
        ({"question": "How many?", "answer": "1 and 1.\n#### 2"}, "How many?", "1 and 1.\n#### 2"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_texts_are_used_as_they_are(load, row, prompt, completion, chat):
    """Texts are used as they are, whether or not the tokenizer has a chat template."""
    tokenizer = letters(chat=chat)
    (example,) = load([row], tokenizer=tokenizer)
    assert example["prompt"] == prompt and example["row"] == row
    assert tokenizer.decode(example["prompt_ids"]) == prompt
    end = "<|im_end|>" if chat else "[EOS]"
    assert trained(tokenizer, example) == completion + end
    assert tokenizer.decode(example["ids"]) == prompt + completion + end


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
@pytest.mark.parametrize(
    "columns, template, prompt",
    [
        ({"prompt": "a", "hint": "h"}, "{hint}: {prompt} ", "h: a "),
        ({"instruction": "Add.", "input": "1 2"}, "{instruction}\n{input}", "Add.\n1 2"),
        ({"question": "How?"}, "Q: {question} A:", "Q: How? A:"),
        ({"query": "How?", "level": 3}, "{query} ({level})>", "How? (3)>"),
    ],
)
def test_prompt_template(load, kind, columns, template, prompt):
    """It is the prompt even where chosen and rejected begin alike."""
    row = columns | {"output": "b", "chosen": "b c", "rejected": "b d"}
    (example,) = load([row], kind, prompt_template=template)
    assert example["prompt"] == letters().decode(example["prompt_ids"]) == prompt
    if kind == "sft":
        assert parts(letters(), example) == (prompt, "b")
    if kind == "preference":
        assert letters().decode(example["chosen_ids"]) == "b c[EOS]"


def test_columns_that_are_not_used_are_named(load, capsys):
    """Alpaca's `input` is one where no --prompt-template has it."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}
    load([row, row])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert line.endswith("rows.jsonl: columns that are not used: id, input")
    load([row], prompt_template="{instruction}\n{input}")
    assert "not used: id\n" in capsys.readouterr().out
    load([row], "prompt")  # they go to the checker
    assert "not used" not in capsys.readouterr().out


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row, train_on, shown",
    [
        ({"messages": talk("hi", "yo")}, "last", ["yo"]),
        ({"messages": talk("hi", "yo", "so?", "no")}, "last", ["no"]),
        ({"messages": talk("hi", "yo", "so?", "no")}, "all", ["yo", "no"]),
        ({"messages": talk("hi", "yo", "so?")}, "last", ["yo"]),
        ({"messages": talk("hi", "yo", "so?")}, "all", ["yo"]),
        ({"messages": [SYSTEM, *talk("hi", "yo", "so?", "no")]}, "all", ["yo", "no"]),
        ({"messages": talk("oh", "hi", "yo", first="assistant")}, "all", ["yo"]),
        ({"prompt": talk("hi"), "completion": "yo"}, "last", ["yo"]),
        ({"prompt": talk("hi"), "completion": talk("yo", first="assistant")}, "last", ["yo"]),
        ({"prompt": talk("hi", "yo", "so?"), "completion": "no"}, "all", ["no"]),
    ],
)
def test_messages_train_the_turns_asked_for_and_their_end(load, row, train_on, shown):
    """Trained: the turns asked for and the token that ends each, not the newline after it."""
    tokenizer = letters(chat=True)
    (example,) = load([row], tokenizer=tokenizer, train_on=train_on)
    assert trained(tokenizer, example) == "".join(f"{text}<|im_end|>" for text in shown)
    assert example["ids"][-1] == common.end_of_turn_id(tokenizer)
    assert tokenizer.eos_token_id not in example["ids"]
    messages = row.get("messages") or row["prompt"] + talk(shown[-1], first="assistant")
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    whole = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    assert tokenizer.decode(example["ids"]) + "\n" == whole
    assert example["prompt"] == messages[:last]
    before = tokenizer.apply_chat_template(messages[:last], tokenize=False) + ASKED
    assert tokenizer.decode(example["prompt_ids"]) == before


def test_train_on_all_drops_rows_that_a_template_renders_anew(load, capsys):
    """As Qwen 3's does, which leaves the thoughts of earlier turns out."""
    content = "{{ m.content[:1] if m.role == 'assistant' and not loop.last else m.content }}"
    tokenizer = letters(chat=True, template=CHATML.replace("{{ m.content }}", content))
    rows = [{"messages": talk("hi", "yo", "so", "no")}, {"messages": talk("a", "yo")}]
    examples = load(rows, tokenizer=tokenizer, train_on="all")
    assert [e["row"] for e in examples] == rows[1:]
    assert "1 rows; 1 dropped whose turns" in capsys.readouterr().out
    assert len(load(rows, tokenizer=tokenizer, train_on="last")) == 2


HELPFUL = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        (dict(prompt="a>", chosen="b", rejected="c"), "a>", "b", "c"),
        (dict(instruction="Add 1.", chosen="3", rejected="4"), "Add 1.", "3", "4"),
        (dict(question="a b?", chosen="c d", rejected="c e"), "a b?", "c d", "c e"),
        (dict(prompt="a>", chosen="b c", rejected="b d"), "a>", "b c", "b d"),
        (dict(chosen=HELPFUL + " yes", rejected=HELPFUL + " no"), HELPFUL, " yes", " no"),
        (dict(chosen=HELPFUL + " I am", rejected=HELPFUL + " I do"), HELPFUL, " I am", " I do"),
        (dict(chosen=HELPFUL + " I", rejected=HELPFUL + " I do"), HELPFUL, " I", " I do"),
        (dict(chosen="say it: good", rejected="say it: bad"), "say it:", " good", " bad"),
        (dict(chosen="say it: bad", rejected="say it: bed"), "say it:", " bad", " bed"),
        (dict(chosen="say it:\nyes", rejected="say it:\nno"), "say it:", "\nyes", "\nno"),
    ],
)
def test_preferences(load, row, prompt, chosen, rejected):
    tokenizer = letters()
    (example,) = load([row], "preference", tokenizer)
    assert example["prompt"] == tokenizer.decode(example["prompt_ids"]) == prompt
    for key, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert tokenizer.decode(example[key]) == text + "[EOS]"


@pytest.mark.parametrize(
    "row, prompt",
    [
        (dict(prompt=talk("hi"), chosen="yes", rejected="no"), talk("hi")),
        (
            dict(
                prompt=talk("hi"),
                chosen=talk("yes", first="assistant"),
                rejected=talk("no", first="assistant"),
            ),
            talk("hi"),
        ),
        (dict(chosen=talk("hi", "yes"), rejected=talk("hi", "no")), talk("hi")),
        (
            dict(chosen=talk("hi", "a", "so?", "yes"), rejected=talk("hi", "a", "so?", "no")),
            talk("hi", "a", "so?"),
        ),
        (
            dict(prompt="hi", chosen=talk("hi", "yes"), rejected=talk("hi", "no"), margin=None),
            talk("hi"),
        ),
    ],
)
def test_preferences_in_messages(load, row, prompt):
    """The last is UltraFeedback's form: the prompt as a text, and again in both conversations."""
    tokenizer = letters(chat=True)
    (example,) = load([row], "preference", tokenizer)
    assert example["prompt"] == prompt
    assert tokenizer.decode(example["prompt_ids"]) == tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(example["chosen_ids"]) == "yes<|im_end|>"
    assert tokenizer.decode(example["rejected_ids"]) == "no<|im_end|>"


def test_a_conversation_that_goes_on_where_the_other_ends():
    """Both keep an answer, though all of the shorter is the beginning of the longer."""
    long = talk("hi", "yes", "so?", "no")
    short = talk("hi", "yes")
    assert dpo.split_shared_prefix(long, short) == (long[:1], long[1:], short[1:])
    assert dpo.split_shared_prefix(short, long) == (long[:1], short[1:], long[1:])


def test_messages_that_begin_differently(load, refused):
    row = dict(chosen=talk("hi", "yes"), rejected=talk("ho", "no"))
    refused(["line 1", "begin alike"], load, [row], "preference", letters(chat=True))


@pytest.mark.parametrize(
    "margin, expected",
    [({"margin": 0.5}, 0.5), ({"margin": -2}, -2), ({"margin": None}, 0), ({}, 0)],
)
def test_margin(load, margin, expected):
    (example,) = load([dict(prompt="a>", chosen="b", rejected="c") | margin], "preference")
    assert example["margin"] == expected


def test_prompts_keep_their_further_columns(load):
    row = dict(prompt="a>", answer=["b", 1], level=3)
    (example,) = load([row], "prompt")
    assert example["row"] == row and example["prompt"] == "a>"
    assert letters().decode(example["prompt_ids"]) == "a>"


# ---------------------------------------------------------------- tokens
@pytest.mark.parametrize("pad", ["[PAD]", "[EOS]"])
@pytest.mark.parametrize("completion", ["b", "b[EOS]"])
def test_one_eos_at_the_end_and_trained(load, pad, completion):
    tokenizer = letters(pad=pad)
    rows = [dict(prompt="a>", completion=completion), dict(prompt="a>", completion="longer")]
    examples = load(rows, tokenizer=tokenizer)
    end = tokenizer.eos_token_id
    for example in examples:
        assert example["ids"].count(end) == 1
        assert example["ids"][-1] == end and example["mask"][-1] == 1
    batch = sft.make_batch([e["ids"] for e in examples], [e["mask"] for e in examples], "cpu")
    is_trained_end = (batch["targets"] == end) & (batch["mask"] == 1)
    assert is_trained_end.sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(e["ids"]) - 1 for e in examples]
    (pair,) = load([dict(prompt="a>", chosen=completion, rejected="c")], "preference", tokenizer)
    assert pair["chosen_ids"].count(end) == pair["rejected_ids"].count(end) == 1


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
@pytest.mark.parametrize(
    "make, count",
    [
        (stories, 1),
        (lambda: letters(bos=True), 1),
        (lambda: letters(bos=True, chat=True), 1),
        (letters, 0),
        (sft.tiny_tokenizer, 0),
    ],
)
def test_bos_once_or_never(load, kind, make, count):
    tokenizer = make()
    bos = tokenizer.bos_token_id
    row = dict(prompt="once>", completion=" a", chosen=" b", rejected=" c")
    (example,) = load([row], kind, tokenizer)
    assert example["prompt_ids"][:count] == [bos] * count
    for key in ("ids", "chosen_ids", "rejected_ids", "prompt_ids"):
        expected = count if key in ("ids", "prompt_ids") else 0
        assert example.get(key, [bos] * expected).count(bos) == expected


def test_a_chat_template_writes_bos_itself(load):
    tokenizer = letters(bos=True, chat=True, template="{{ bos_token }}" + CHATML)
    (example,) = load([{"messages": talk("hi", "yo")}], tokenizer=tokenizer)
    assert example["ids"].count(tokenizer.bos_token_id) == 1
    assert example["ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "completion", [" It was happy.", " It", ", he said.", "\nThe end.", "  Two."]
)
def test_leading_space_of_a_llama_tokenizer(load, completion):
    """Tokens are those of the one text; the space that joins prompt and completion is not lost."""
    tokenizer, prompt = stories(), "Once upon a time there was a peanut."
    (example,) = load([dict(prompt=prompt, completion=completion)], tokenizer=tokenizer)
    assert example["ids"] == [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    assert example["prompt_ids"] == tokenizer(prompt).input_ids
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(example["prompt_ids"], **options)
    answer = example["ids"][len(example["prompt_ids"]) :]
    assert common.completion_text(tokenizer, example["prompt_ids"], answer) == completion
    assert before + completion == tokenizer.decode(example["ids"], **options)
    assert before.strip() == prompt


def test_empty_completion_trains_eos_alone(load):
    tokenizer = letters()
    (example,) = load([dict(prompt="a>", completion="")], tokenizer=tokenizer)
    assert trained(tokenizer, example) == "[EOS]" and sum(example["mask"]) == 1
    (pair,) = load([dict(prompt="a>", chosen="b", rejected="")], "preference", tokenizer)
    assert pair["rejected_ids"] == [tokenizer.eos_token_id]


def test_empty_turn_trains_end_of_turn_alone(load):
    tokenizer = letters(chat=True)
    (example,) = load([{"messages": talk("hi", "")}], tokenizer=tokenizer)
    assert trained(tokenizer, example) == "<|im_end|>"


@pytest.mark.parametrize("completion", ["yo", "yo<|im_end|>", "yo[EOS]"])
def test_text_rows_end_once_where_the_tokenizer_has_a_chat_template(load, tmp_path, completion):
    """People bring rendered prompts, and completions that end in EOS."""
    tokenizer = letters(chat=True)
    (example,) = load(
        [dict(prompt=turns("hi") + ASKED, completion=completion)], tokenizer=tokenizer
    )
    answer = example["ids"][len(example["prompt_ids"]) :]
    assert tokenizer.decode(answer[:-1]) == "yo"
    assert answer[-1] in common.find_eos_ids(tokenizer, str(tmp_path))


def test_end_of_turn_joins_eos(tmp_path):
    tokenizer = letters(chat=True)
    eos, im_end = tokenizer.convert_tokens_to_ids(["[EOS]", "<|im_end|>"])
    assert common.end_of_turn_id(tokenizer) == im_end
    assert common.find_eos_ids(tokenizer, str(tmp_path)) == [eos, im_end]
    assert common.end_of_turn_id(letters()) == eos
    assert common.find_eos_ids(letters(), str(tmp_path)) == [eos]


@pytest.mark.parametrize(
    "chat, generation, more",
    [
        (False, 9, [9]),
        (False, [9, 1, 8], [8, 9]),
        (True, [9, 8], [5, 8, 9]),
        (True, None, [5]),
    ],
)
def test_eos_ids_of_tokenizer_and_generation_config(tmp_path, chat, generation, more):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    transformers.GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
    tokenizer = letters(chat=chat)
    assert tokenizer.eos_token_id == 1
    assert common.find_eos_ids(tokenizer, str(tmp_path)) == [1, *more]


def test_eos_of_a_template_that_writes_eos(load, tmp_path):
    """As Llama 2's and Mistral's do."""
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}[EOS]{% else %}:{% endif %}"
        "{% endfor %}"
    )
    tokenizer = letters(chat=True, template=template)
    assert common.find_eos_ids(tokenizer, str(tmp_path)) == [tokenizer.eos_token_id]
    (example,) = load([{"messages": talk("hi", "yo")}], tokenizer=tokenizer)
    assert tokenizer.decode(example["ids"]) == "hi:yo[EOS]"
    assert trained(tokenizer, example) == "yo[EOS]"


def test_eos_where_the_template_writes_none(load):
    template = "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' }}{% endfor %}"
    tokenizer = letters(chat=True, template=template)
    (example,) = load([{"messages": talk("hi", "yo")}], tokenizer=tokenizer)
    assert trained(tokenizer, example) == "yo[EOS]"


def test_overlong_rows_are_dropped_and_counted(load, capsys):
    rows = [dict(prompt="a>", completion="b" * n) for n in (1, 2, 3, 4)]
    examples = load(rows, max_length=5)  # prompt, completion and EOS
    assert [e["row"] for e in examples] == rows[:2]
    said = capsys.readouterr().out
    assert "2 rows; 2 dropped longer than --max-length 5, the first at" in said


def test_overlong_pairs_and_prompts_are_dropped_and_counted(load, capsys):
    pairs = [
        dict(prompt="a>", chosen="b" * n, rejected="c" * m) for n, m in ((2, 2), (3, 1), (1, 3))
    ]
    assert [e["row"] for e in load(pairs, "preference", max_length=5)] == pairs[:1]
    assert "1 rows; 2 dropped longer than --max-length 5" in capsys.readouterr().out
    prompts = [dict(prompt="a" * n) for n in (4, 5, 6)]
    examples = load(prompts, "prompt", max_prompt_length=5, max_length=1)
    assert [e["row"] for e in examples] == prompts[:2]
    assert "2 rows; 1 dropped longer than --max-prompt-length 5" in capsys.readouterr().out


def test_identical_pairs_are_dropped_and_counted(load, capsys):
    """Identical in tokens: two letters that the tokenizer does not know are one."""
    pairs = [
        dict(prompt="a>", chosen=c, rejected=r)
        for c, r in (("b", "b"), ("\u00e9", "\u00e8"), ("b", "c"))
    ]
    assert [e["row"] for e in load(pairs, "preference")] == pairs[2:]
    out = capsys.readouterr().out
    assert "1 rows; 2 dropped" in out and "same" in out


@pytest.mark.parametrize(
    "kind, rows",
    [
        ("sft", [dict(prompt="ca", completion="bc"), dict(prompt="ca", completion="cb")]),
        (
            "preference",
            [
                dict(prompt="ca", chosen="c", rejected="b"),
                dict(prompt="ca", chosen="c", rejected="a"),
            ],
        ),
    ],
)
def test_prompts_that_are_no_token_prefix_are_dropped_and_counted(load, capsys, kind, rows):
    assert [e["row"] for e in load(rows, kind, merging())] == rows[1:]
    out = capsys.readouterr().out
    assert "1 rows; 1 dropped" in out and "prefix" in out


@pytest.mark.parametrize(
    "kind, row, reason",
    [
        ("sft", dict(prompt="ca", completion="cacaca"), "--max-length 5"),
        ("prompt", dict(prompt="cacaca"), "--max-prompt-length 5"),
        ("preference", dict(prompt="ca", chosen="c", rejected="c"), "same"),
        ("sft", dict(prompt="ca", completion="b"), "prefix"),
        ("sft", dict(prompt="", completion="b"), "empty"),
    ],
)
def test_no_row_left(load, refused, kind, row, reason):
    words = ["rows.jsonl", "0 rows", "1 dropped", "nothing is left", reason]
    refused(words, load, [row], kind, merging(), max_length=5, max_prompt_length=5)


@pytest.mark.parametrize(
    "kind, row",
    [("sft", dict(prompt="", completion="")), ("prompt", dict(prompt="", answer="b"))],
)
def test_empty_text_is_dropped_and_counted(load, kind, row):
    good = dict(prompt="a>", completion="b", answer="b")
    assert [e["row"] for e in load([good, row], kind)] == [good]


def test_columns_that_only_some_rows_have_are_named(load, capsys):
    load([dict(prompt="a>", answer="b"), dict(prompt="a>"), dict(prompt="b>")], "prompt")
    assert "column answer is in 1 of 3 rows" in capsys.readouterr().out
    load([dict(prompt="a>", answer="b")] * 2, "prompt")
    assert "column answer" not in capsys.readouterr().out


def test_texts_beside_a_chat_template_are_named(load, capsys):
    load([dict(prompt="a>")], "prompt", letters(chat=True))
    assert "no chat template touches" in capsys.readouterr().out
    load([dict(prompt=talk("a"))], "prompt", letters(chat=True))
    load([dict(prompt="a>")], "prompt", letters())
    assert "chat template" not in capsys.readouterr().out


def test_empty_prompt_of_a_tokenizer_with_bos_is_kept(load):
    tokenizer = letters(bos=True)
    (example,) = load([dict(prompt="")], "prompt", tokenizer)
    assert example["prompt_ids"] == [tokenizer.bos_token_id]


@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_tokenizer_that_adds_eos_itself(load, kind):
    tokenizer = letters()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", pair="$A $B [EOS]", special_tokens=[("[EOS]", tokenizer.eos_token_id)]
    )
    (example,) = load([dict(prompt="a>", completion="b")], kind, tokenizer)
    assert tokenizer.decode(example["prompt_ids"]) == "a>"


# ---------------------------------------------------------------- held out, order
def test_held_out_only_where_asked(load, tmp_path, capsys):
    load([dict(prompt="a>", completion="b")])
    path = str(tmp_path / "rows.jsonl")
    capsys.readouterr()
    args = flags(dataset=path, eval_dataset=None)
    assert common.load_held_out(sft.sft_example, letters(), args) == []
    assert "nothing is held out" in capsys.readouterr().out
    args = flags(dataset="x.jsonl", eval_dataset=path)
    (example,) = common.load_held_out(sft.sft_example, letters(), args)
    assert example["prompt"] == "a>" and "held out" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 2, 7])
def test_stream_visits_each_row_once_an_epoch(n):
    for epoch in range(3):
        order = common.stream(range(n), seed=1, start=epoch * n, stop=epoch * n + n)
        assert sorted(order) == list(range(n))


def test_stream_is_another_order_in_each_epoch_and_for_each_seed():
    orders = [
        common.stream(range(50), seed=seed, start=start, stop=start + 50)
        for seed in (1, 2)
        for start in (0, 50)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == common.stream(range(50), seed=1, start=0, stop=50)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_stream_is_one_however_it_is_cut(size):
    """A batch may be larger than the data set, and may reach over the end of an epoch."""
    batches = [
        common.stream(range(7), seed=5, start=start, stop=min(start + size, 50))
        for start in range(0, 50, size)
    ]
    assert all(batches)
    assert sum(batches, []) == common.stream(range(7), seed=5, start=0, stop=50)


# ---------------------------------------------------------------- variables of the chat template
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def test_chat_template_kwargs(load, tmp_path, capsys):
    """Qwen3's switch: with it rows are trained that were dropped, the message of which names the
    flag; the saved tokenizer has it too, for whoever opens it."""
    letters(chat=True, template=THINKING).save_pretrained(tmp_path / "model")
    row = {"prompt": talk("hi"), "completion": "yo"}
    with pytest.raises(SystemExit):
        load([row], tokenizer=common.load_tokenizer(str(tmp_path / "model")))
    assert "--chat-template-kwargs" in capsys.readouterr().err
    tokenizer = common.load_tokenizer(
        str(tmp_path / "model"), template_kwargs='{"enable_thinking": false, "role": null}'
    )
    (example,) = load([row], tokenizer=tokenizer)
    assert tokenizer.decode(example["ids"]) == turns("hi", tail=ASKED) + "yo<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    asked = again.apply_chat_template(talk("hi"), add_generation_prompt=True, tokenize=False)
    assert asked == turns("hi", tail=ASKED)
    options = dict(add_generation_prompt=True, tokenize=False)
    for opened in (
        again.apply_chat_template(talk("hi"), enable_thinking=True, **options),
        common.load_tokenizer(
            str(tmp_path / "saved"), template_kwargs='{"enable_thinking": true}'
        ).apply_chat_template(talk("hi"), **options),
    ):  # whoever comes later can have it otherwise
        assert opened == turns("hi", tail=ASKED + "<think>\n")


@pytest.mark.parametrize("name", ["enable_thinkng", "enable-thinking"])
def test_chat_template_kwargs_that_the_template_lacks(name, tmp_path, capsys):
    letters(chat=True, template=THINKING).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path / "model"), template_kwargs=json.dumps({name: False}))
    assert f"the chat template has no variable {name}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{enable_thinking: false}", "[1]", "false", "{"])
def test_chat_template_kwargs_that_are_no_object(text, tmp_path, capsys):
    letters(chat=True).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        common.load_tokenizer(str(tmp_path / "model"), template_kwargs=text)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--chat-template-kwargs {text!r}: wanted a JSON object" in line


def test_chat_template_kwargs_without_a_template(tmp_path, capsys):
    letters().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path / "model"), template_kwargs="{}")
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_that_strips_reasoning_of_earlier_turns(load, capsys):
    """As Qwen3's and gpt-oss's: --train-on all cannot be had, and the message says what can."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('/')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = letters(chat=True, template=template)
    row = {"messages": talk("hi", "hm/yo", "so?", "oh/no")}
    (example,) = load([row], tokenizer=tokenizer)
    assert trained(tokenizer, example).startswith("oh/no")
    with pytest.raises(SystemExit):
        load([row], tokenizer=tokenizer, train_on="all")
    assert "use --train-on last" in capsys.readouterr().err
