"""Rewards: checkers, reward models of every make, their PAD and EOS; and generators."""

import contextlib
import json
import math
import string
import types

import pytest
import tokenizers
import torch
import transformers

import common
import sft
from reward_model import sequence_scores

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
SHAPE |= dict(max_position_embeddings=128, initializer_range=0.3)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wordlevel(tokens, split=".", **special):
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def other_tokenizer(bos=False, chat=False):
    """One token a character, as tiny_tokenizer, but other ids."""
    names = ["[UNK]", "<s>", "</s>", "[PAD]", "<|im_start|>", "<|im_end|>"]
    special = dict(unk_token="[UNK]", eos_token="</s>", pad_token="[PAD]", bos_token="<s>")
    tokenizer = wordlevel([*names, *string.printable], r"[\s\S]", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": names[4:]})
    if bos:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def encoder_tokenizer(**special):
    """As BERT's: [CLS] text [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    special |= dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer = wordlevel([*names, ">", *common.LETTERS], **special)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def spaced_tokenizer():
    """As Llama's: a token holds the space before it, which decoding a completion alone would lose."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[EOS]", "▁Once", "▁there", "▁was"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    special = dict(eos_token="[EOS]", unk_token="[UNK]", pad_token="[EOS]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture
def refused(capsys):
    """Calls, expects that exit status and one line on stderr that holds all the words."""

    def function(words, call, *args, status=2, **kwargs):
        with pytest.raises(SystemExit) as stopped:
            call(*args, **kwargs)
        assert stopped.value.code == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert all(word in lines[0] for word in words), lines[0]

    return function


@pytest.fixture
def save(tmp_path):
    """A model of random weights and its tokenizer -> their directory."""

    def function(tokenizer, kind="LlamaForSequenceClassification", vocab_size=None, **config):
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        config = dict(num_labels=1, pad_token_id=tokenizer.pad_token_id) | config
        size = len(tokenizer) if vocab_size is None else vocab_size
        cls(cls.config_class(vocab_size=size, **SHAPE, **config)).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return function


def reward_model(path, tokenizer, budget=64):
    eos_ids = common.find_eos_ids(tokenizer, path)
    return load_reward(path, [], tokenizer, eos_ids, budget)


def load_reward(reward, examples, tokenizer=None, eos_ids=(1,), budget=64):
    return common.load_reward(
        types.SimpleNamespace(reward=reward, micro_batch_tokens=budget),
        examples,
        tokenizer or sft.tiny_tokenizer(),
        eos_ids,
        device=CPU,
        autocast=contextlib.nullcontext,
    )


def example(tokenizer, prompt, **columns):
    is_chat = isinstance(prompt, list)
    ids = (
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        if is_chat
        else prompt
    )
    ids = tokenizer(ids, add_special_tokens=False).input_ids
    return dict(
        prompt=prompt, prompt_ids=ids, row=dict(prompt=prompt) | columns, where="rows.jsonl line 1"
    )


PROMPTS = ["abcd>", "zyxwvuts>", "hello>", "q>", "monday>"]


def tiny_rows(endings, prompts=PROMPTS):
    """Examples and completions (ids) in tiny_tokenizer's tokens; an ending is a text that may hold [EOS]."""
    tokenizer = sft.tiny_tokenizer()
    examples = [example(tokenizer, prompt) for prompt in prompts]
    return tokenizer, examples, [tokenizer(text).input_ids for text in endings]


@torch.no_grad()
def scored_alone(model, sequences):
    """Each sequence by itself, without padding: the head at its last token."""
    hidden = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    return torch.stack([model.score(h)[0] for h in hidden])


def close(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert len(set(b.tolist())) == len(b)  # else agreement would say little
    return True


# ---------------------------------------------------------------- checkers
FILE = """
def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]
value = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my_reward.py").write_text(FILE)
    return str(tmp_path / "my_reward.py")


def test_function_in_a_file(file):
    tokenizer = sft.tiny_tokenizer()
    score = load_reward(f"{file}:length", [])
    examples = [example(tokenizer, "ab>")] * 2
    assert score(examples, [tokenizer("ab[EOS]").input_ids, [1]]).tolist() == [2.0, 0.0]


def test_function_that_is_not_there(file, refused):
    refused(["--reward is missing", common.TASK, "gsm8k", ":function"], load_reward, None, [])
    refused(["none/file.py", "no such file"], load_reward, "none/file.py:f", [])
    refused([file, "no function other"], load_reward, f"{file}:other", [])
    refused([file, "no function"], load_reward, f"{file}:", [])
    refused([file, ":function"], load_reward, file, [])


@pytest.mark.parametrize("reward", ["runs/reward_model", "./model", "someone/some-model", "/x/y.z"])
def test_any_other_name_is_a_model(reward, monkeypatch):
    monkeypatch.setattr(common, "RewardModel", lambda args, *others: f"the model {args.reward}")
    assert load_reward(reward, []) == f"the model {reward}"


def test_file_with_a_dataclass(tmp_path):
    """What the file defines beside the function is there when it is called."""
    lines = ["from __future__ import annotations", "from dataclasses import dataclass"]
    lines += ["@dataclass", "class Rule:", "    weight: float = 0.5"]
    lines += ["def rule(prompts, completions, rows):", "    return [Rule().weight]"]
    lines += ["assert __name__ != '__main__'"]
    (tmp_path / "rules.py").write_text("\n".join(lines))
    score = load_reward(f"{tmp_path}/rules.py:rule", [])
    assert score([example(sft.tiny_tokenizer(), "ab>")], [[4, 1]]).tolist() == [0.5]


def test_built_in_checker(refused):
    """A row without an answer that it reads is named, with its file and line, before anything is sampled."""
    tokenizer = sft.tiny_tokenizer()
    good = example(tokenizer, "ab>", answer="ba")
    score = load_reward(common.TASK, [good])
    end = tokenizer.eos_token_id
    right = tokenizer("ba").input_ids
    wrong = tokenizer("ab").input_ids
    completions = [[*right, end], right, [*wrong, end]]
    assert score([good] * 3, completions).tolist() == [1, 0, 0]
    for reward, columns in [
        (common.TASK, dict(solution="ba")),
        (common.TASK, dict(answer=5)),
        (common.TASK, dict(answer=None)),
        ("gsm8k", dict(answer="no number at all")),
        ("gsm8k", dict(answer=["#### 3"])),
    ]:
        fine = good | {"row": {"answer": "ba" if reward == common.TASK else "#### 12"}}
        assert callable(load_reward(reward, [fine]))
        bad = example(tokenizer, "ab>", **columns) | {"where": "rows.jsonl line 7"}
        words = ["rows.jsonl line 7", f"--reward {reward}", "`answer`"]
        refused(words, load_reward, reward, [fine, bad])


def test_gold_is_the_exact_checker_of_data_or_reward():
    tokenizer = sft.tiny_tokenizer()
    right = [tokenizer("ab[EOS]").input_ids]
    examples = [example(tokenizer, "ba>", answer="ab")]
    for dataset, reward, has_gold in [
        ("sort", "runs/reward_model", True),
        ("rows.jsonl", "sort", True),
        ("rows.jsonl", "runs/reward_model", False),
        ("rows.jsonl", "my/file.py:sort", False),
    ]:
        args = types.SimpleNamespace(dataset=dataset, reward=reward)
        gold = common.load_gold(args, tokenizer, [1])
        assert (gold is not None) == has_gold
        assert gold is None or gold(examples, right).tolist() == [1.0]
    assert common.load_gold(types.SimpleNamespace(dataset="rows.jsonl"), tokenizer, [1]) is None


def test_checker_is_given_texts_columns_and_finished():
    tokenizer = sft.tiny_tokenizer()
    seen = []

    def judge(prompts, completions, rows):
        seen.append((prompts, completions, rows))
        return [1, None, 0.5, True]

    messages = [{"role": "user", "content": "ab"}]
    examples = [example(tokenizer, "ab>", answer="ba", level=3) for _ in range(4)]
    examples[1]["prompt"] = messages
    before = json.dumps(examples)
    completions = [[*tokenizer("ba").input_ids, 1], tokenizer("ba").input_ids, [2, 3], [1]]
    scores = common.checker_reward(judge, tokenizer, [1, 3])(examples, completions)
    ((prompts, texts, rows),) = seen
    assert prompts == ["ab>", messages, "ab>", "ab>"]
    assert texts == ["ba", "ba", tokenizer.decode([2, 3], skip_special_tokens=True), ""]
    assert [row["finished"] for row in rows] == [True, False, True, True]
    assert all(
        row == e["row"] | {"finished": row["finished"]}
        for row, e in zip(rows, examples, strict=True)
    )
    assert json.dumps(examples) == before  # the data set's own rows stay as they were
    assert scores.dtype == torch.float32
    assert scores.isnan().tolist() == [False, True, False, False]
    assert scores.nan_to_num(-1).tolist() == [1, -1, 0.5, 1]


@pytest.mark.parametrize(
    "result, words",
    [
        ([1.0, math.nan], ["nan", "None"]),
        ([1.0, math.inf], ["inf"]),
        ([1.0, "0.5"], ["'0.5'"]),
        ([1.0, [0.5]], ["[0.5]"]),
        ([1.0], ["1 number", "2 completions"]),
        ([1.0] * 3, ["3 numbers", "2 completions"]),
    ],
)
def test_checker_that_returns_nonsense(refused, result, words):
    tokenizer = sft.tiny_tokenizer()
    score = common.checker_reward(lambda prompts, completions, rows: result, tokenizer, [1])
    refused(["the reward", *words], score, [example(tokenizer, "ab>")] * 2, [[5, 1], [6, 1]])


def test_completion_keeps_its_leading_space():
    tokenizer = spaced_tokenizer()
    ids = tokenizer("there was").input_ids
    assert tokenizer.decode(ids) == "there was"  # decoded alone it has none
    once = example(tokenizer, "Once")
    texts = []
    common.checker_reward(lambda p, c, r: texts.extend(c) or [0], tokenizer, [1])([once], [[*ids, 1]])
    assert texts == [" there was"]


# ---------------------------------------------------------------- reward models
SAMPLED = ["dcba[EOS]", "s[PAD]tuv[EOS]", "olleh[PAD]", "[PAD][PAD]", "[EOS]"]


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_score_is_read_at_the_last_token_by_length(save, budget):
    """Also where the policy sampled a PAD, in the middle or at the end."""
    tokenizer, examples, completions = tiny_rows(SAMPLED)
    model = reward_model(save(tokenizer), tokenizer, budget)
    assert completions[3] == [tokenizer.pad_token_id] * 2
    expected = scored_alone(
        model.model, [e["prompt_ids"] + c for e, c in zip(examples, completions)]
    )
    assert close(model(examples, completions), expected)


def test_score_where_pad_is_eos(save):
    tokenizer, examples, completions = tiny_rows([
        "dcba[EOS]",
        "s[EOS][EOS]",
        "olleh",
        "[EOS]",
        "yad[EOS]",
    ])
    tokenizer.pad_token = "[EOS]"
    model = reward_model(save(tokenizer), tokenizer)
    expected = scored_alone(
        model.model, [e["prompt_ids"] + c for e, c in zip(examples, completions)]
    )
    assert close(model(examples, completions), expected)


def test_same_tokens_and_a_pad_of_its_own(save):
    """The reward model may have one token more; ids go to it as they are, control tokens included."""
    tokenizer, examples, completions = tiny_rows(SAMPLED)
    richer = sft.tiny_tokenizer()
    richer.add_special_tokens({"pad_token": "<pad>"})
    model = reward_model(save(richer), tokenizer)
    assert common.same_ids(tokenizer, richer) and not common.same_ids(richer, tokenizer)
    expected = scored_alone(
        model.model, [e["prompt_ids"] + c for e, c in zip(examples, completions)]
    )
    assert close(model(examples, completions), expected)


@pytest.mark.parametrize("bos", [False, True])
def test_another_tokenizer_is_given_the_text(save, bos):
    """With its own BOS, and its own EOS where the policy had stopped."""
    tokenizer, examples, completions = tiny_rows([
        "dcba[EOS]",
        "stuv",
        "[EOS]",
        "a[PAD]b",
        "yad[EOS]",
    ])
    other = other_tokenizer(bos=bos)
    assert not common.same_ids(tokenizer, other)
    model = reward_model(save(other), tokenizer)
    answers = ["dcba", "stuv", "", "ab", "yad"]
    expected = [other(p + a).input_ids for p, a in zip(PROMPTS, answers, strict=True)]
    expected = [ids + [other.eos_token_id] * (i in (0, 2, 4)) for i, ids in enumerate(expected)]
    assert all(ids.count(other.bos_token_id) == bos for ids in expected)
    assert close(model(examples, completions), scored_alone(model.model, expected))


def test_another_tokenizer_is_given_messages_through_its_own_template(save):
    policy, other = sft.tiny_tokenizer(), other_tokenizer(bos=True, chat=True)
    other.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    policy.chat_template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    first, said = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}
    prompts = [[first], [first, said, {"role": "user", "content": "cd"}]]
    examples = [example(policy, prompt) for prompt in prompts]
    completions = [policy(text).input_ids for text in ("ba[EOS]", "dc")]  # the second one was cut
    model = reward_model(save(other), policy)
    answers = [{"role": "assistant", "content": text} for text in ("ba", "dc")]
    rendered = [
        other.apply_chat_template([*prompt, answer], tokenize=False)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert rendered[0].count("<|im_end|>") == 2
    expected = [other(text, add_special_tokens=False).input_ids for text in rendered]
    assert expected[1].pop() == other.convert_tokens_to_ids("<|im_end|>")
    assert close(model(examples, completions), scored_alone(model.model, expected))


@pytest.mark.parametrize(
    "template, prompt",
    [
        (None, "ab>"),
        pytest.param(CHATML, "ab>"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>"), [dict(role="user", content="ab")]),
        pytest.param(CHATML, [dict(role="user", content="ab")]),
    ],
)
def test_another_tokenizer_scores_what_reward_model_py_trains_on(save, tmp_path, template, prompt):
    """The same row, as load_examples cuts it into tokens: it ends in the same token."""
    policy, other = sft.tiny_tokenizer(), other_tokenizer(bos=True)
    policy.chat_template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    other.chat_template = template
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(dict(prompt=prompt, chosen="ba", rejected="bb"))
    )
    args = types.SimpleNamespace(prompt_template="{prompt}", seed=1, max_length=99)
    (trained,) = common.load_examples(other, str(tmp_path / "rows.jsonl"), "preference", args)
    model = reward_model(save(other), policy)
    score = model([example(policy, prompt)], [policy("ba[EOS]").input_ids])
    expected = scored_alone(model.model, [trained["prompt_ids"] + trained["chosen_ids"]])
    assert close(score, expected)


def test_messages_for_a_reward_model_without_template(save, refused):
    policy = sft.tiny_tokenizer()
    policy.chat_template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    model = reward_model(save(other_tokenizer()), policy)
    refused(
        ["--reward", "chat template"],
        model,
        [example(policy, [dict(role="user", content="ab")])],
        [[5, 1]],
    )


def test_text_over_the_limit_of_the_reward_model(save, refused):
    policy, other = sft.tiny_tokenizer(), other_tokenizer()
    other.model_max_length = 8
    model = reward_model(save(other), policy)
    assert model([example(policy, "abcd>")], [[5, 6, 1]]).shape == (1,)
    words = ["--reward", "9 tokens", "limit"]
    refused(words, model, [example(policy, "abcd>")], [[5, 6, 7, 1]], status=1)


@pytest.mark.parametrize(
    "special, ending",
    [
        (dict(eos_token="[SEP]"), ""),
        pytest.param(dict(eos_token="[SEP]"), "[EOS]"),  # as DeBERTa's and RoBERTa's
        pytest.param({}, ""),
    ],
)
def test_encoder_is_scored_by_its_own_forward(save, special, ending):
    """On what its own tokenizer makes of the text; padding changes nothing."""
    answers = ["dcba", "stuv", "olleh", "a", "yad"]
    tokenizer, examples, completions = tiny_rows([answer + ending for answer in answers])
    encoder = encoder_tokenizer(**special)
    model = reward_model(save(encoder, "BertForSequenceClassification"), tokenizer)
    with torch.no_grad():
        texts = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
        expected = [
            model.model(**encoder(text, return_tensors="pt")).logits[0, 0] for text in texts
        ]
    assert close(model(examples, completions), torch.stack(expected))


@pytest.mark.parametrize(
    "kind, labels, words",
    [
        ("LlamaForSequenceClassification", 2, ["2 labels"]),
        ("BertForSequenceClassification", 3, ["3 labels"]),
        ("LlamaForCausalLM", 1, ["LlamaForCausalLM", "not a reward model", "reward_model.py"]),
    ],
)
def test_models_that_are_no_reward_model(save, refused, kind, labels, words):
    tokenizer = sft.tiny_tokenizer()
    path = save(tokenizer, kind, num_labels=labels)
    refused([f"--reward {path}", *words], reward_model, path, tokenizer)


def test_missing_reward_model(tmp_path, refused):
    path = str(tmp_path / "none")
    refused([f"--reward {path}", "no such directory"], reward_model, path, sft.tiny_tokenizer())


def test_score_that_is_not_finite(save, refused):
    tokenizer, examples, completions = tiny_rows(["a"], ["b>"])
    model = reward_model(save(tokenizer), tokenizer)
    model.model.score.weight.data.fill_(math.nan)
    refused(["--reward", "not finite"], model, examples, completions, status=1)


def test_reward_model_is_frozen(save):
    tokenizer = sft.tiny_tokenizer()
    model = reward_model(save(tokenizer), tokenizer).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- PAD, EOS, new heads
TRAIN = types.SimpleNamespace(seed=1, gradient_checkpointing=False)


def test_new_head(save):
    path = save(sft.tiny_tokenizer(), "LlamaForCausalLM")
    load = dict(device=CPU, flag="--model", train=TRAIN)
    heads = [
        common.load_scorer(path, new_head=name, **load).score.weight
        for name in ("normal", "normal", "zero")
    ]
    assert torch.equal(heads[0], heads[1]) and heads[0].abs().min() > 0
    assert heads[0].shape == heads[2].shape == (1, 16) and not heads[2].any()


BARE = ["[EOS]", *common.LETTERS]  # no PAD, no UNK
WITH_PAD = ["<|right_pad|>", *BARE]


@pytest.mark.parametrize(
    "tokens, special, spare, expected, rows",
    [
        (None, {}, 0, "[PAD]", 30),  # a PAD of its own stays
        (None, dict(pad_token="[EOS]"), 0, "[PAD]", 30),  # among its special tokens is one named so
        (None, dict(pad_token="[UNK]"), 0, "[UNK]", 30),
        (WITH_PAD, {}, 0, "<|right_pad|>", 28),
        (BARE, dict(unk_token="a"), 0, "a", 27),
        (BARE, {}, 3, "[PAD]", 30),  # the embedding has rows to spare
        (BARE, {}, 0, "[PAD]", 28),
    ],
)
def test_choose_pad(save, tokens, special, spare, expected, rows):
    """A PAD that is no EOS, with a row in the embedding; that grows only if it must."""
    tokenizer = sft.tiny_tokenizer()
    if tokens:
        inner = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)})
        )
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[EOS]")
        tokenizer.pad_token = "[EOS]"
        named = [token for token in tokens if "pad" in token]
        tokenizer.add_special_tokens({"additional_special_tokens": named})
    for name, token in special.items():
        setattr(tokenizer, name, token)
    path = save(tokenizer, "LlamaForCausalLM", vocab_size=len(tokenizer) + spare)
    model = common.load_scorer(path, CPU, "--model", train=TRAIN, new_head="normal")
    before = model.get_input_embeddings().weight.detach().clone()
    common.choose_pad(tokenizer, model, [tokenizer.eos_token_id])
    assert tokenizer.pad_token == expected and tokenizer.eos_token == "[EOS]"
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == rows > tokenizer.pad_token_id
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)


def test_choose_pad_avoids_every_eos(save):
    tokenizer = sft.tiny_tokenizer()
    model = reward_model(save(tokenizer), tokenizer).model
    common.choose_pad(tokenizer, model, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert tokenizer.pad_token == "[UNK]" and model.config.pad_token_id == tokenizer.unk_token_id


def test_choose_pad_beyond_the_embedding(save):
    """A tokenizer to which somebody has added [PAD] and left the model as it was."""
    tokenizer = sft.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    path = save(tokenizer, "LlamaForCausalLM", vocab_size=30, pad_token_id=0)
    model = common.load_scorer(path, CPU, "--model", train=TRAIN, new_head="normal")
    common.choose_pad(tokenizer, model, [tokenizer.eos_token_id])
    assert tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("tokens", [None, BARE])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_saved_scores_are_those_of_transformers(save, tmp_path, tokens, pad_is_eos):
    """Opened by AutoModelForSequenceClassification, padded right, pooled at the last id that is not PAD."""
    policy = (
        wordlevel(tokens, eos_token="[EOS]", pad_token="[EOS]")
        if tokens
        else sft.tiny_tokenizer()
    )
    if pad_is_eos:
        policy.pad_token = "[EOS]"
    path = save(policy, "LlamaForCausalLM")
    tokenizer = common.load_tokenizer(path)
    model = common.load_scorer(path, CPU, "--model", train=TRAIN, new_head="normal")
    common.choose_pad(tokenizer, model, common.eos_ids(tokenizer, path))
    out = str(tmp_path / "reward_model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    texts = ["abcd", "zyxwvuts", "hello", "q", "monday"]
    examples = [example(policy, text) for text in texts]
    completions = [[*policy(text[::-1]).input_ids, policy.eos_token_id] for text in texts]
    ours = reward_model(out, policy)(examples, completions)
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    saved = transformers.AutoTokenizer.from_pretrained(out)
    assert saved.pad_token_id == reloaded.config.pad_token_id != policy.eos_token_id
    batch = saved(
        [text + text[::-1] + "[EOS]" for text in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    with torch.no_grad():
        theirs = reloaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[
            :, 0
        ]
    assert close(ours, theirs)


def test_load_tokenizer(tmp_path, refused):
    tokenizer = sft.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    assert common.load_tokenizer(tmp_path / "no_pad").pad_token == "[EOS]"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    path = str(tmp_path / "no_eos")
    refused([f"--model {path}", "no EOS token"], common.load_tokenizer, path)
    assert common.load_tokenizer(path, "--reward").eos_token is None  # an encoder's needs none
    refused(["--model ./none", "no such directory"], common.load_tokenizer, "./none")


@pytest.mark.parametrize(
    "template, end",
    [
        (None, "</s>"),
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", "\n<|im_end|>"), "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "</s>"),
    ],
)
def test_end_of_turn_id(template, end):
    tokenizer = other_tokenizer()
    tokenizer.chat_template = template
    assert common.end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert common.eos_ids(tokenizer, None) == sorted(
        tokenizer.convert_tokens_to_ids(list({end, "</s>"}))
    )


# ---------------------------------------------------------------- generators
def test_generator_is_a_function_of_its_arguments():
    def draw(*args):
        return tuple(torch.rand(4, generator=common.generator(*args)).tolist())

    cases = [
        (1, "sample", 0),
        (2, "sample", 0),
        (1, "sample", 1),
        (1, "shuffle", 0),
        (1, "sample", 11),
    ]
    cases += [(11, "sample", 1), (1, "sample/1", 1), (0, "sample", 0), (-1, "sample", 0)]
    assert len({draw(*case) for case in cases}) == len(cases)
    assert all(draw(*case) == draw(*case) for case in cases)
    assert draw(1, "sample") == draw(1, "sample", 0)


def test_generator_leaves_the_global_one_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(2, generator=common.generator(1, "sample"))
    assert torch.equal(torch.rand(2), expected)
