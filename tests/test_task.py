"""The built-in task: its rows, which of them are held out, and its exact checker."""

import random
import types

import pytest

import common

KINDS = ["sft", "preference", "prompt"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer rows, to save time."""
    for kind in KINDS:
        monkeypatch.setitem(common.TASK_ROWS, kind, 2000)


def letters(row):
    """What the prompt asks to put into order."""
    prompt = row["prompt"]
    return (
        prompt.removesuffix(">")
        if isinstance(prompt, str)
        else prompt[-1]["content"].split(": ")[-1]
    )


def check(row, completion, finished=True):
    (score,) = common.task_checker([row["prompt"]], [completion], [row | {"finished": finished}])
    return score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_rows(kind, held_out):
    rows = common.task_rows(kind, held_out, seed=1)
    assert len(rows) == common.TASK_ROWS["held out" if held_out else kind]
    keys = {"sft": {"completion"}, "preference": {"chosen", "rejected"}, "prompt": set()}[kind]
    for row in rows:
        assert row.keys() == {"prompt", "answer"} | keys
        assert row["prompt"].endswith(">") and row["answer"] == "".join(sorted(letters(row)))
        assert set(row["answer"]) <= set(common.LETTERS)
        assert (
            row.get("completion", row["answer"])
            == row.get("chosen", row["answer"])
            == row["answer"]
        )
    assert {len(row["answer"]) for row in rows} == {4, 5, 6, 7}


def test_no_prompt_of_any_kind_or_seed_is_held_out():
    cases = [(kind, seed) for kind in KINDS for seed in (1, 2)]
    seen, held_out = (
        {letters(row) for kind, seed in cases for row in common.task_rows(kind, out, seed)}
        for out in (False, True)
    )
    assert len(seen) > 4000 and len(held_out) > 400 and not seen & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_are_the_same_for_every_seed(kind):
    assert common.task_rows(kind, True, 1) == common.task_rows(kind, True, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_the_seed(kind):
    rows = common.task_rows(kind, False, 1)
    assert rows == common.task_rows(kind, False, 1)
    assert rows != common.task_rows(kind, False, 2)


@pytest.mark.parametrize("held_out", [False, True])
def test_chosen_is_right_and_rejected_is_not(held_out):
    for row in common.task_rows("preference", held_out, 1):
        assert check(row, row["chosen"]) == 1.0 and check(row, row["rejected"]) == 0.0
        assert row["rejected"] != row["chosen"]
        assert abs(len(row["rejected"]) - len(row["chosen"])) <= 2  # one slip or two


def test_slips_of_every_sort_and_never_none():
    """Also of a text in which most slips change nothing."""
    draw = random.Random(0)
    for text in ("abcd", "aaaa", "ab"):
        slips = [common.slip(text, draw) for _ in range(500)]
        assert text not in slips
        assert {len(slip) - len(text) for slip in slips} == {-1, 0, 1}


@pytest.mark.parametrize(
    "completion, finished, score",
    [
        ("dcba", True, 1.0),
        ("dcba", False, 0.0),
        ("abcd", True, 0.0),
        ("dcb", True, 0.0),
        ("dcbaa", True, 0.0),
        ("dcba>", True, 0.0),
        ("dc ba", True, 0.0),
        ("DCBA", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_checker_is_exact_and_wants_eos(completion, finished, score):
    assert check({"prompt": "abcd>", "answer": "dcba"}, completion, finished) == score


def test_checker_judges_each_row_by_itself():
    rows = [{"answer": answer, "finished": True} for answer in ("ab", "cd", "ef")]
    assert common.task_checker([""] * 3, ["ab", "ab", "ef"], rows) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_chat_form_gives_messages(kind):
    """The same letters as in the plain form."""
    rows = common.task_rows(kind, False, 1, chat=True)
    for row, plain in zip(rows, common.task_rows(kind, False, 1), strict=True):
        (message,) = row["prompt"]
        assert message["role"] == "user" and letters(row) == letters(plain)
        assert row | {"prompt": ""} == plain | {"prompt": ""}


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ '>' if m.role == 'user' else '[EOS]' }}{% endfor %}"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_every_row_goes_through_the_tokenizer(kind, chat, capsys, tiny_dirs):
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    given = dict(
        prompt_template="{prompt}", train_on="last", seed=1, max_length=64, max_prompt_length=64
    )
    args = types.SimpleNamespace(dataset=common.TASK, eval_dataset=None, **given)
    args.model, args.max_completion_length = tiny_dirs["llama"], 10  # a context of 64
    examples = common.load_examples(tokenizer, common.TASK, kind, args)
    held_out = common.load_held_out(tokenizer, kind, args)
    assert len(examples) == 2000 and len(held_out) == common.TASK_ROWS["held out"]
    assert "dropped" not in capsys.readouterr().out
    assert not {letters(e["row"]) for e in examples} & {letters(e["row"]) for e in held_out}
    for example in examples[:20] + held_out[:20]:
        assert isinstance(example["prompt"], list if chat else str)
        assert tokenizer.decode(example["prompt_ids"]).endswith(letters(example["row"]) + ">")
        answers = {"sft": ["ids"], "preference": ["chosen_ids"], "prompt": []}[kind]
        for ids in (example[key] for key in answers):
            assert tokenizer.decode(ids).endswith(example["row"]["answer"] + "[EOS]")
            assert chat or tokenizer.unk_token_id not in ids
