"""Data: rows of every format become examples with the right prompt, tokens and mask."""

import codecs
import importlib.machinery
import json
import string
import sys
import types
from pathlib import Path

import pytest
import tokenizers
import transformers
from conftest import eos_ids_of

import common
import dpo
import reward_model
import sft

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
CHATML = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "<|im_start|>assistant\n"
SPECIAL = ["[PAD]", "[EOS]", "[UNK]", "<s>", "<|im_start|>", "<|im_end|>"]
MAKE_EXAMPLE = {  # name in the tests -> kind of rows, make_example
    "sft": ("sft", sft.sft_example),
    "preference": ("pairs", dpo.preference_example),
    "comparison": ("pairs", reward_model.comparison_example),
    "step": ("pairs", reward_model.step_example),
    "prompt": ("prompts", common.prompt_example),
}


def letters(bos=False, chat=False, pad="[PAD]", template=CHATML):
    """One token per character.

    With bos, it adds <s> as Llama's tokenizer does. With chat, it has a template like Qwen's."""
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
    """A tokenizer that merges a and b, so a prompt that ends in a may be no prefix in tokens."""
    model = tokenizers.models.BPE({"[EOS]": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        eos_token="[EOS]",
        pad_token="[EOS]",
    )


def stories():
    """The tokenizer of a small Llama."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} does not exist")
    return common.load_tokenizer(str(STORIES))


def flags(**given):
    """The flags that concern data."""
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
    """Alternating messages of user and assistant."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def turns(*contents, tail=""):
    """The text of talk(*contents) in CHATML."""
    shown = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk(*contents))
    return shown + tail


def load_file(path, kind="sft", tokenizer=None, **given):
    """load_examples of a file or a Hub id."""
    return common.load_examples(
        str(path), *MAKE_EXAMPLE[kind], tokenizer or letters(), flags(**given)
    )


@pytest.fixture
def load(tmp_path):
    """Write rows, or the text or bytes of a file, and return load_examples of the file."""

    def function(rows, kind="sft", tokenizer=None, name="rows.jsonl", **given):
        if isinstance(rows, list):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return load_file(tmp_path / name, kind, tokenizer, **given)

    return function


@pytest.fixture
def refused(capsys):
    """Expect exit status 2 and one line on stderr with all the words; return the line."""

    def function(words, call, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*args, **kwargs)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in words), lines[0]
        return lines[0]

    return function


def parts(tokenizer, example):
    """Prompt and completion as text, both without the final EOS."""
    n = len(example["prompt_ids"])
    assert example["ids"][:n] == example["prompt_ids"]
    assert example["ids"][-1] == tokenizer.eos_token_id
    assert example["mask"] == [0] * n + [1] * (len(example["ids"]) - n)
    return tokenizer.decode(example["prompt_ids"]), tokenizer.decode(example["ids"][n:-1])


def trained(tokenizer, example):
    """The text of the tokens in the mask."""
    return tokenizer.decode([i for i, m in zip(example["ids"], example["mask"], strict=True) if m])


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_bom_crlf_and_final_blank_lines(load, name, bom, end):
    if name == "rows.json":
        lines = ["[", '{"prompt": "a>",', '"completion": "b"}', "]"]
    else:
        lines = ['{"prompt": "a>", "completion": "b"}', "", ""]
    (example,) = load(bom + end.join(lines).encode(), name=name)
    assert parts(letters(), example) == ("a>", "b")


def test_only_newlines_separate_rows(load):
    """JSON text may contain the other line separators of Unicode."""
    examples = load(
        '{"prompt": "a\u2028b\x85>", "completion": "b"}\n{"prompt": "c>", "completion": "d"}'
    )
    assert [e["prompt"] for e in examples] == ["a\u2028b\x85>", "c>"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_where_is_file_and_row(load, tmp_path, capsys, name):
    rows = [dict(prompt="a>", completion="b"), dict(prompt="c>", completion="d")]
    examples = load(json.dumps(rows) if name == "rows.json" else rows, name=name)
    assert [e["where"] for e in examples] == [f"{tmp_path / name} row {n}" for n in (1, 2)]
    assert [e["row"] for e in examples] == rows
    assert capsys.readouterr().out == f"{tmp_path / name}: 2 rows\n"


TABLE = [dict(prompt="a>", completion="b"), dict(prompt="c>", completion="d")]


@pytest.mark.parametrize(
    "dataset, names, options",
    [
        ("someone/data", ["someone/data"], dict(split="train")),
        ("gsm8k:test", ["gsm8k"], dict(split="test")),
        ("openai/gsm8k:main:test", ["openai/gsm8k", "main"], dict(split="test")),
    ],
)
def test_calls_of_the_datasets_package(dataset, names, options, monkeypatch):
    """A fake package records the calls."""
    calls = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or TABLE
    fake.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    examples = load_file(dataset)
    assert calls == [(tuple(names), options)]
    assert [e["row"] for e in examples] == TABLE
    assert examples[1]["where"] == f"{dataset} row 2"


# ---------------------------------------------------------------- formats of rows
@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"prompt": "a>", "completion": "b"}, "a>", "b"),
        ({"prompt": "a>", "completion": " b\n"}, "a>", " b\n"),
        ({"prompt": "a {x}>", "completion": "b"}, "a {x}>", "b"),
        ({"prompt": "a>", "completion": "b", "question": "c", "answer": "d"}, "a>", "b"),
        ({"prompt": "a>", "completion": None, "answer": "b"}, "a>", "b"),
        ({"instruction": "Add 1 2.", "output": "3"}, "Add 1 2.", "3"),
        ({"question": "How many?", "answer": "1 and 1.\n#### 2"}, "How many?", "1 and 1.\n#### 2"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_text_is_used_unchanged(load, row, prompt, completion, chat):
    """A chat template is not applied to text."""
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
        ({"question": "How?"}, r"Q: {question}\nA:", "Q: How?\nA:"),  # '...\n...' in a shell
        ({"query": "How?", "level": 3}, "{query} ({level})>", "How? (3)>"),
    ],
)
def test_prompt_template(load, kind, columns, template, prompt):
    """The template is the whole prompt, even if chosen and rejected share a beginning."""
    row = columns | {"output": "b", "chosen": "b c", "rejected": "b d"}
    (example,) = load([row], kind, prompt_template=template)
    assert example["prompt"] == letters().decode(example["prompt_ids"]) == prompt
    if kind == "sft":
        assert parts(letters(), example) == (prompt, "b")
    if kind == "preference":
        assert letters().decode(example["chosen_ids"]) == "b c[EOS]"


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
        ({"messages": talk("hi", "")}, "last", [""]),
        ({"prompt": talk("hi"), "completion": "yo"}, "last", ["yo"]),
        ({"prompt": talk("hi"), "completion": talk("yo", first="assistant")}, "last", ["yo"]),
        ({"prompt": talk("hi", "yo", "so?"), "completion": "no"}, "all", ["no"]),
    ],
)
def test_messages_train_the_chosen_turns(load, row, train_on, shown):
    """Each turn is trained with its end-of-turn token, but without the newline that follows."""
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


@pytest.mark.parametrize("calls", [None, []])
def test_empty_tool_calls_are_no_tool_calls(load, calls):
    """The datasets package fills columns of other rows with these values."""
    row = {"messages": [message | {"tool_calls": calls} for message in talk("hi", "yo")]}
    (example,) = load([row], tokenizer=letters(chat=True))
    assert example["row"] == row


HELPFUL = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        (dict(prompt="a>", chosen="b", rejected="c"), "a>", "b", "c"),
        (dict(instruction="Add 1.", chosen="3", rejected="4"), "Add 1.", "3", "4"),
        (dict(question="a b?", chosen="c d", rejected="c e"), "a b?", "c d", "c e"),
        (dict(prompt="a>", chosen="b c", rejected="b d"), "a>", "b c", "b d"),
        (dict(prompt="a>", chosen="b", rejected=""), "a>", "b", ""),
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
        # UltraFeedback: the text of the prompt is also the first message
        (dict(prompt="hi", chosen=talk("hi", "yes"), rejected=talk("hi", "no")), talk("hi")),
    ],
)
def test_preferences_in_messages(load, row, prompt):
    tokenizer = letters(chat=True)
    (example,) = load([row], "preference", tokenizer)
    assert example["prompt"] == prompt
    assert tokenizer.decode(example["prompt_ids"]) == tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(example["chosen_ids"]) == "yes<|im_end|>"
    assert tokenizer.decode(example["rejected_ids"]) == "no<|im_end|>"


def test_conversations_of_different_lengths():
    """Both keep an answer, even if the shorter one is the beginning of the longer one."""
    long = talk("hi", "yes", "so?", "no")
    short = talk("hi", "yes")
    assert dpo.split_shared_prefix(long, short) == (long[:1], long[1:], short[1:])
    assert dpo.split_shared_prefix(short, long) == (long[:1], short[1:], long[1:])


@pytest.mark.parametrize(
    "margin, expected",
    [({"margin": 0.5}, 0.5), ({"margin": -2}, -2), ({"margin": None}, 0), ({}, 0)],
)
def test_margin(load, margin, expected):
    (example,) = load([dict(prompt="a>", chosen="b", rejected="c") | margin], "preference")
    assert example["margin"] == expected


def test_prompts_keep_their_other_columns(load):
    row = dict(prompt="a>", answer=["b", 1], level=3, hint=None)
    (example,) = load([row], "prompt")
    assert example["row"] == row and example["prompt"] == "a>"
    assert letters().decode(example["prompt_ids"]) == "a>"


# ---------------------------------------------------------------- tokens
@pytest.mark.parametrize("pad", ["[PAD]", "[EOS]"])
@pytest.mark.parametrize("completion", ["b", "b[EOS]", ""])
def test_one_eos_at_the_end_is_trained(load, pad, completion):
    tokenizer = letters(pad=pad)
    rows = [dict(prompt="a>", completion=completion), dict(prompt="a>", completion="longer")]
    examples = load(rows, tokenizer=tokenizer)
    end = tokenizer.eos_token_id
    for example in examples:
        assert example["ids"].count(end) == 1
        assert example["ids"][-1] == end and example["mask"][-1] == 1
    batch = sft.make_batch(examples, "cpu")
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


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_text_that_begins_with_bos_gets_no_second_one(load, kind):
    """The ids of a text with BOS are those of the text without it."""
    rows = [
        dict(prompt=f"{bos}a>", completion="b", chosen="b", rejected="c") for bos in ("", "<s>")
    ]
    for pair in (
        rows,
        [dict(chosen=x["prompt"] + " b", rejected=x["prompt"] + " c") for x in rows],
    ):
        if kind != "preference" and "prompt" not in pair[0]:
            continue
        bare, with_bos = load(pair, kind, letters(bos=True))
        ids = [value for key, value in bare.items() if key.endswith("ids")]
        assert ids == [value for key, value in with_bos.items() if key.endswith("ids")]
        assert bare["prompt_ids"].count(3) == 1


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}",
)
STRICT = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    + CHATML
)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
@pytest.mark.parametrize(
    "template, prompt", [(PARTS, talk("hi")), (NO_SYSTEM, [SYSTEM, *talk("hi")])]
)
def test_a_template_that_drops_text_is_refused(load, refused, kind, template, prompt):  # noqa: PLR0917
    row = dict(prompt=prompt, completion="so", chosen="yes", rejected="no")
    words = ["rows.jsonl row 1: ", "the chat template drops the text"]
    refused(words, load, [row], kind, letters(chat=True, template=template))


def test_a_template_may_strip_text_and_rewrite_earlier_answers(load):
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ (m.content[:1] if m.role == 'assistant' and not loop.last else m.content) | trim }}",
    )
    rows = [{"messages": talk(" hi\n", "hello", "why", "so")}]
    (example,) = load(rows, "sft", letters(chat=True, template=template))
    assert letters().decode(example["prompt_ids"]) == turns("hi", "h", "why", tail=ASKED)


def test_a_template_that_refuses_a_greeting(load):
    """Texts do not need it. Messages that it accepts end with its end of turn if that is EOS."""
    for template in (
        STRICT,
        PARTS.replace("{% if part.type == 'text' %}{{ part.text }}{% endif %}", ""),
    ):
        tokenizer = letters(chat=True, template=template)
        assert common.end_of_turn_id(tokenizer) == tokenizer.eos_token_id
        (example,) = load([{"prompt": "a>", "completion": "b"}], "sft", tokenizer)
        assert example["ids"] == tokenizer("a>b[EOS]").input_ids
    tokenizer = letters(chat=True, template=STRICT)
    tokenizer.eos_token = "<|im_end|>"
    (example,) = load([{"messages": [SYSTEM, *talk("hi", "yo")]}], "sft", tokenizer)
    assert tokenizer.decode(example["ids"]).endswith(f"{ASKED}yo<|im_end|>")


@pytest.mark.parametrize("empty", [None, []])
def test_null_keys_of_messages_are_absent(load, empty):
    """A template may ask whether a key is there."""
    template = CHATML.replace("{{ m.content }}", "{{ m.name if 'name' in m else m.content }}")
    rows = [{"messages": talk("hi", "yo")}]
    rows += [{"messages": [m | {"name": empty} for m in talk("hi", "yo")]}]
    bare, example = load(rows, "sft", letters(chat=True, template=template))
    assert bare["ids"] == example["ids"]
    assert example["row"] == rows[1]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_chat_template(load, tmp_path, bos):
    """sft.py --chat-template: roles in text, EOS after answers, BOS if the tokenizer adds it."""
    tokenizer = letters(bos=bos)
    sft.set_chat_template(tokenizer, "plain")
    shown = "<s>" * bos + "<|system|>\nBe brief.\n<|user|>\nhi\n<|assistant|>\n"
    (example,) = load([{"messages": [SYSTEM, *talk("hi", "yo")]}], "sft", tokenizer)
    assert tokenizer.decode(example["ids"]) == f"{shown}yo[EOS]"
    assert tokenizer.decode(example["prompt_ids"]) == shown
    assert sum(example["mask"]) == 3 and common.end_of_turn_id(tokenizer) == tokenizer.eos_token_id
    (example,) = load(
        [{"messages": talk("hi", "yo", "so", "no")}], "sft", tokenizer, train_on="all"
    )
    assert tokenizer.decode(trained_ids(example)) == "yo[EOS]no[EOS]"
    (tmp_path / "chat.jinja").write_text(CHATML)
    sft.set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == CHATML


def trained_ids(example):
    return [token for token, is_trained in zip(example["ids"], example["mask"]) if is_trained]


def test_chat_template_with_bos(load):
    """BOS comes from the template, and the tokenizer does not add another one."""
    tokenizer = letters(bos=True, chat=True, template="{{ bos_token }}" + CHATML)
    (example,) = load([{"messages": talk("hi", "yo")}], tokenizer=tokenizer)
    assert example["ids"].count(tokenizer.bos_token_id) == 1
    assert example["ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "completion", [" It was happy.", " It", ", he said.", "\nThe end.", "  Two."]
)
def test_leading_space_of_a_llama_tokenizer(load, completion):
    """Prompt and completion are tokenized as one text, and no space between them is lost."""
    tokenizer = stories()
    prompt = "Once upon a time there was a peanut."
    (example,) = load([dict(prompt=prompt, completion=completion)], tokenizer=tokenizer)
    assert example["ids"] == [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    assert example["prompt_ids"] == tokenizer(prompt).input_ids
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(example["prompt_ids"], **options)
    completion_ids = example["ids"][len(example["prompt_ids"]) :]
    rollout = {"prompt_ids": example["prompt_ids"], "completion_ids": completion_ids}
    assert common.completion_text(tokenizer, rollout) == completion
    assert before + completion == tokenizer.decode(example["ids"], **options)
    assert before.strip() == prompt


@pytest.mark.parametrize("completion", ["yo", "yo<|im_end|>", "yo[EOS]"])
def test_rendered_text_ends_once(load, tmp_path, completion):
    """Rows may hold text that a chat template has already rendered, with its control tokens."""
    tokenizer = letters(chat=True)
    prompt = turns("hi", tail=ASKED)
    (example,) = load([dict(prompt=prompt, completion=completion)], tokenizer=tokenizer)
    assert tokenizer.decode(example["prompt_ids"]) == prompt
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in example["prompt_ids"]
    answer = example["ids"][len(example["prompt_ids"]) :]
    assert tokenizer.decode(answer[:-1]) == "yo"
    assert answer[-1] in (tokenizer.eos_token_id, common.end_of_turn_id(tokenizer))


@pytest.mark.parametrize(
    "chat, configured, eos_ids",
    [
        (False, None, [1]),
        (False, 9, [1, 9]),
        (False, [9, 1, 8], [1, 8, 9]),
        (True, [9, 8], [1, 5, 8, 9]),
        (True, None, [1, 5]),
    ],
)
def test_eos_ids(tmp_path, chat, configured, eos_ids):
    """EOS of the tokenizer, end of turn of the chat template, and ids of the generation config."""
    tokenizer = letters(chat=chat)
    assert common.end_of_turn_id(tokenizer) == (5 if chat else 1)
    assert eos_ids_of(tokenizer, tmp_path, configured) == eos_ids


@pytest.mark.parametrize("eos", ["[EOS]", ""])
def test_eos_of_templates_without_end_of_turn(load, tmp_path, eos):
    """The templates of Llama 2 and Mistral write EOS themselves; others write no end at all."""
    template = (
        "{% for m in messages %}{{ m.content }}"
        f"{{% if m.role == 'assistant' %}}{eos}{{% else %}}:{{% endif %}}"
        "{% endfor %}"
    )
    tokenizer = letters(chat=True, template=template)
    assert eos_ids_of(tokenizer, tmp_path) == [tokenizer.eos_token_id]
    (example,) = load([{"messages": talk("hi", "yo")}], tokenizer=tokenizer)
    assert tokenizer.decode(example["ids"]) == "hi:yo[EOS]"
    assert trained(tokenizer, example) == "yo[EOS]"


@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_tokenizer_that_appends_eos(load, kind):
    tokenizer = letters()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", pair="$A $B [EOS]", special_tokens=[("[EOS]", tokenizer.eos_token_id)]
    )
    (example,) = load([dict(prompt="a>", completion="b")], kind, tokenizer)
    assert tokenizer.decode(example["prompt_ids"]) == "a>"
    if kind == "sft":
        assert trained(tokenizer, example) == "b[EOS]"


def test_empty_prompt_with_bos_is_kept(load):
    tokenizer = letters(bos=True)
    (example,) = load([dict(prompt="")], "prompt", tokenizer)
    assert example["prompt_ids"] == [tokenizer.bos_token_id]


# ---------------------------------------------------------------- built-in task, held out, order
@pytest.mark.parametrize("name", ["sft", "preference", "prompt"])
def test_kind_selects_the_rows_of_the_task(name, monkeypatch):
    sizes = {"sft": 3, "pairs": 4, "prompts": 5, "held out": 2}
    monkeypatch.setattr(common, "TASK_ROWS", sizes)
    kind, make_example = MAKE_EXAMPLE[name]
    args = flags(dataset="sort", eval_dataset=None)
    tokenizer = sft.tiny_tokenizer()
    examples = common.load_examples("sort", kind, make_example, tokenizer, args)
    assert [e["row"] for e in examples] == common.task_rows(kind, False, args.seed)
    assert len(examples) == sizes[kind]
    held_out = common.load_held_out(examples, kind, make_example, tokenizer, args)
    assert [e["row"] for e in held_out] == common.task_rows(kind, True, args.seed)
    assert len(held_out) == 2


@pytest.mark.parametrize("kind", ["prompt", "preference", "", None])
def test_unknown_kind_is_refused(kind):
    with pytest.raises(KeyError):
        common.load_examples("sort", kind, common.prompt_example, letters(), flags())


def test_held_out_prompts_that_are_trained_are_counted(load, tmp_path, capsys):
    rows = [{"prompt": talk(text), "completion": "b"} for text in "abca"]
    examples = load(rows, "sft", letters(chat=True))
    held_out = [{"prompt": talk(text), "completion": "c"} for text in "xaby"]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    for number, other in [(2, examples), (0, examples[2:3])]:
        capsys.readouterr()
        args = flags(dataset="rows.jsonl", eval_dataset=str(tmp_path / "held_out.jsonl"))
        common.load_held_out(other, "sft", sft.sft_example, letters(chat=True), args)
        line = f"held_out.jsonl: {number} prompts are also in the training data"
        assert (line in capsys.readouterr().out) == (number > 0)


def test_held_out_rows_need_a_dataset(load, tmp_path):
    load([dict(prompt="a>", completion="b")])
    path = str(tmp_path / "rows.jsonl")
    args = flags(dataset=path, eval_dataset=None)
    assert common.load_held_out([], "sft", sft.sft_example, letters(), args) == []
    args = flags(dataset="x.jsonl", eval_dataset=path)
    (example,) = common.load_held_out([], "sft", sft.sft_example, letters(), args)
    assert example["prompt"] == "a>"


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_epoch_visits_each_row_once(n):
    for epoch in range(3):
        order = common.shuffled_examples(range(n), seed=1, start=epoch * n, stop=epoch * n + n)
        assert sorted(order) == list(range(n))


def test_order_depends_on_epoch_and_seed():
    orders = [
        common.shuffled_examples(range(50), seed=seed, start=start, stop=start + 50)
        for seed in (1, 2)
        for start in (0, 50)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == common.shuffled_examples(range(50), seed=1, start=0, stop=50)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_order_does_not_depend_on_batch_size(size):
    """A batch may be larger than the dataset and may cross the end of an epoch."""
    batches = [
        common.shuffled_examples(range(7), seed=5, start=start, stop=min(start + size, 50))
        for start in range(0, 50, size)
    ]
    assert all(batches)
    assert sum(batches, []) == common.shuffled_examples(range(7), seed=5, start=0, stop=50)
