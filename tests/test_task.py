"""The built-in task: its rows, its held-out rows and its checker; the checker of GSM8K."""

import math
import random

import pytest
from test_data import refused as refused  # a fixture

import common
import dpo
import ppo
import sft

KINDS = ["sft", "pairs", "prompts"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use fewer rows, to save time."""
    for kind in KINDS:
        monkeypatch.setitem(common.TASK_ROWS, kind, 2000)


def letters(row):
    return row["prompt"].removesuffix(">")


def check(row, completion, finished=True):
    [score] = common.task_checker([row["prompt"]], [completion], [row | {"finished": finished}])
    return score


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_rows(kind, held_out):
    rows = common.task_rows(kind, held_out, seed=1)
    assert len(rows) == common.TASK_ROWS["held out" if held_out else kind]
    for row in rows:
        assert {"prompt", "answer"} <= row.keys()
        assert row["prompt"].endswith(">")
        assert row["answer"] == "".join(sorted(letters(row)))
        assert len(set(row["answer"]) & set(common.LETTERS)) == len(row["answer"])
        assert row.get("chosen", row["answer"]) == row["answer"]
        assert ({"chosen", "rejected"} <= row.keys()) == (kind == "pairs")
    assert {len(row["answer"]) for row in rows} == {4, 5, 6, 7}


def test_rows_of_other_kinds_are_refused():
    with pytest.raises(KeyError, match="prompt"):
        common.task_rows("prompt", False, seed=1)


def test_no_prompt_of_any_kind_or_seed_is_held_out():
    cases = [(kind, seed) for kind in KINDS for seed in (1, 2)]
    seen, held_out = (
        {letters(row) for kind, seed in cases for row in common.task_rows(kind, out, seed)}
        for out in (False, True)
    )
    assert len(seen) > 4000 and len(held_out) > 400 and not seen & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_the_seed_and_held_out_rows_do_not(kind):
    rows = common.task_rows(kind, False, 1)
    assert rows == common.task_rows(kind, False, 1)
    assert rows != common.task_rows(kind, False, 2)
    assert common.task_rows(kind, True, 1) == common.task_rows(kind, True, 2)


@pytest.mark.parametrize("held_out", [False, True])
def test_chosen_is_right_and_rejected_is_not(held_out):
    """Most rejected answers are sorted and differ in length by at most one letter.

    Order or length alone then does not tell them from chosen ones."""
    rows = common.task_rows("pairs", held_out, 1)
    for row in rows:
        assert check(row, row["chosen"]) == 1.0 and check(row, row["rejected"]) == 0.0
        assert set(row["rejected"]) <= set(common.LETTERS)
    differences = [abs(len(row["rejected"]) - len(row["chosen"])) for row in rows]
    assert sum(difference <= 1 for difference in differences) > 0.8 * len(rows)
    in_order = sum(row["rejected"] == "".join(sorted(row["rejected"])) for row in rows) / len(rows)
    assert 0.4 < in_order < 0.9


def test_wrong_answers():
    """Letters are replaced, inserted and dropped. The result is never the right answer."""
    rng = random.Random(0)
    for answer in ("abcd", "aaaa", "ab"):
        wrong = [common.wrong_answer(answer, rng) for _ in range(500)]
        assert answer not in wrong
        assert {len(text) - len(answer) for text in wrong} >= {-1, 0, 1}
    wrong = [common.wrong_answer("abcd", rng) for _ in range(500)]
    assert {"bcd", "abc"} <= set(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_becomes_an_example(kind, capsys, monkeypatch):
    """No row is dropped."""
    monkeypatch.setitem(common.TASK_ROWS, kind, 300)
    monkeypatch.setitem(common.TASK_ROWS, "held out", 100)
    tokenizer = sft.tiny_tokenizer()
    make_example, Args = {
        "sft": (sft.sft_example, sft.Args),
        "pairs": (dpo.preference_example, dpo.Args),
        "prompts": (common.prompt_example, ppo.Args),
    }[kind]
    args = Args(model="x")
    examples = common.load_examples(common.TASK, kind, make_example, tokenizer, args)
    held_out = common.load_held_out(examples, kind, make_example, tokenizer, args)
    assert len(examples) == 300 and len(held_out) == 100
    assert "dropped" not in capsys.readouterr().out
    assert not {letters(e["row"]) for e in examples} & {letters(e["row"]) for e in held_out}
    answer_key = {"sft": "ids", "pairs": "chosen_ids", "prompts": None}[kind]
    for example in examples[:20] + held_out[:20]:
        assert isinstance(example["prompt"], str)
        assert tokenizer.decode(example["prompt_ids"]).endswith(letters(example["row"]) + ">")
        if answer_key is not None:
            ids = example[answer_key]
            assert tokenizer.decode(ids).endswith(example["row"]["answer"] + "[EOS]")
            assert tokenizer.unk_token_id not in ids


# ---------------------------------------------------------------- checkers
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
def test_checker_is_exact_and_needs_eos(completion, finished, score):
    assert check({"prompt": "abcd>", "answer": "dcba"}, completion, finished) == score


def test_checker_scores_each_row_by_its_own_answer():
    rows = [{"answer": answer, "finished": True} for answer in ("ab", "cd", "ef")]
    assert common.task_checker([""] * 3, ["ab", "ab", "ef"], rows) == [1.0, 0.0, 1.0]


# a completion and its final number
FORMS = [
    ("#### 18", 18),
    ("She has 9 * 2 = $<<9*2=18>>18.\n#### 18", 18),
    ("####18", 18),
    ("#### 18.", 18),
    ("#### 18.50", 18.5),
    ("#### $18", 18),
    ("#### $ 18", 18),
    ("#### 18%", 18),
    ("#### 18 dollars", 18),
    ("#### 18kg", 18),
    ("#### **18**", 18),
    ("#### $18$", 18),
    ("#### Step 2: compute 5 + 3\nSo \\boxed{8}", 8),
    ("--18", -18),
    ("#### The answer is 18.", 18),
    ("#### x = 18", 18),
    ("#### 1,234", 1234),
    ("#### 1,234,567.25", 1234567.25),
    ("#### -5", -5),
    ("#### −5", -5),
    ("#### -$5", -5),
    ("#### $-5", -5),
    ("#### --5", -5),
    ("#### −-$5", -5),
    ("#### 0.50", 0.5),
    ("#### 007", 7),
    ("#### 18\nThat was easy, 20 of 20.", 18),
    ("#### Step 1: halve 36\n#### 18", 18),
    ("#### Conclusion\nSo we get \\boxed{18}.", 18),
    ("#### Conclusion\nThe answer is 18.", 18),
    ("\\boxed{18}", 18),
    ("So \\boxed{5} each, \\boxed{42 \\text{ dollars}} of 50.", 42),
    ("It is \\boxed{17}, no, \\boxed{18}. Of 20.", 18),
    ("\\boxed{\\$18}", 18),
    ("\\boxed{18\\%}", 18),
    ("\\boxed{1,234}", 1234),
    ("\\boxed{1{,}234}", 1234),
    ("\\boxed{1\\,234}", 1234),
    ("\\boxed{-0.25}", -0.25),
    ("The answer is 18", 18),
    ("2 and 3 make 5.", 5),
    ("48/2 = 24", 24),
    ("He pays $1,234.5", 1234.5),
    ("", None),
    ("no idea", None),
    ("####", None),
]


@pytest.mark.parametrize("text, number", FORMS)
def test_gsm8k_number(text, number):
    assert common.gsm8k_number(text) == number
    rows = [{"answer": f"They did it.\n#### {answer}"} for answer in (number or 18, 5551)]
    scores = common.gsm8k_checker([""] * 2, [text] * 2, rows)
    assert scores == [float(number is not None), 0.0]


@pytest.mark.parametrize(
    "answer, number",
    [
        ("7", 7.0),
        (7, 7.0),
        (" -1,234.5 \n", -1234.5),
        ("$1,000", 1000.0),
        ("50%", 50.0),
        ("12.", 12.0),
        ("so 3 + 4 = 7\n#### 7", 7.0),
        (r"thus \boxed{1{,}234}", 1234.0),
        ("3/4", None),
        (r"\frac{1}{2}", None),
        (r"thus \boxed{\frac{1}{2}}", None),
        ("#### 12:30", None),
        ("2 and 5", None),
        (r"\sqrt{2}x", None),
        ("2x", None),
        ("5 million", None),
        ("1e5", None),
        ("x^2", None),
        ("about 7", None),
        ("2024-01-05", None),
        ("Paris.", None),
        (True, None),
    ],
)
def test_gsm8k_reference_is_a_plain_number(answer, number, refused):
    """With another answer, a wrong completion with the same number would score 1."""
    rows = [{"answer": answer}]
    examples = [{"row": rows[0], "where": "rows.jsonl row 3"}]
    if number is None:
        assert common.gsm8k_checker([""], [str(answer)], rows) == [0.0]
        refused(["rows.jsonl row 3", "--reward gsm8k"], common.load_checker, "gsm8k", examples)
        return
    common.load_checker("gsm8k", examples)
    texts = [f"#### {number}", f"#### {number + 1}"]
    assert common.gsm8k_checker([""] * 2, texts, rows * 2) == [1.0, 0.0]


def test_gsm8k_number_of_random_text():
    """A finite number or None; nothing is evaluated."""
    assert common.gsm8k_number("#### __import__('os').getpid()") is None
    rng = random.Random(1)
    for _ in range(5000):
        for text in (
            "".join(rng.choices("-−$,./x* #09\\{}boxed\n", k=rng.randint(0, 12))),
            "#### " + "".join(rng.choices("-−$,./09 ", k=6)),
        ):
            number = common.gsm8k_number(text)
            assert number is None or math.isfinite(number)
