"""The scripts are one family: same name, same text; same flags, same words; no script imports another."""

import ast
import dataclasses
import difflib
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["sft", "reward_model", "rejection_sampling", "ppo", "grpo", "rloo", "dpo"]
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
# shared flags whose default is the method's own
OWN_DEFAULT = {
    "output_dir",
    "learning_rate",
    "steps",
    "batch_size",
    "kl_coef",
    "num_generations",
    "prompts_per_step",
    "update_epochs",
    "temperature",
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


@functools.cache
def functions(name):
    text = source(name)
    nodes = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name != "main"
    ]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@functools.cache
def field_docs(name):
    """Args' fields in order, each with the docstring under it."""
    (args,) = [
        n for n in ast.parse(source(name)).body if isinstance(n, ast.ClassDef) and n.name == "Args"
    ]
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {
        field.target.id: (ast.unparse(field.annotation), doc.value.value) for field, doc in pairs
    }


@pytest.mark.parametrize("one", SCRIPTS)
@pytest.mark.parametrize("other", SCRIPTS)
def test_same_name_same_text(one, other):
    mine, theirs = functions(one), functions(other)
    shared = mine.keys() & theirs.keys()
    assert {n: mine[n] for n in shared} == {n: theirs[n] for n in shared}


@pytest.mark.parametrize("name", SCRIPTS + ["common"])
def test_no_script_is_imported(name):
    imported = re.findall(r"^\s*(?:from|import)\s+(\w+)", source(name), re.MULTILINE)
    assert not set(imported) & set(NAMES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_docstring(name):
    fields = [field.name for field in dataclasses.fields(importlib.import_module(name).Args)]
    docs = field_docs(name)
    assert list(docs) == fields and all(doc.strip() for _, doc in docs.values())


@pytest.mark.parametrize("one", SCRIPTS)
@pytest.mark.parametrize("other", SCRIPTS)
def test_shared_flags_agree(one, other):
    mine, theirs = field_docs(one), field_docs(other)
    shared = [name for name in mine if name in theirs]
    assert shared == [name for name in theirs if name in mine], "shared flags stand in one order"
    defaults = [
        {f.name: f.default for f in dataclasses.fields(importlib.import_module(n).Args)}
        for n in (one, other)
    ]
    for name in set(shared) - OWN_DEFAULT:
        assert mine[name] == theirs[name] and defaults[0][name] == defaults[1][name], name


@pytest.mark.parametrize(
    "one, other, lines, hunks", [("rloo", "grpo", 140, 30), ("grpo", "ppo", 260, 40)]
)
def test_the_diff_is_the_lesson(one, other, lines, hunks):
    """Changed lines, both sides counted, and hunks, as `diff` has them."""
    pair = source(one).splitlines(), source(other).splitlines()
    changed = [
        op
        for op in difflib.SequenceMatcher(None, *pair, autojunk=False).get_opcodes()
        if op[0] != "equal"
    ]
    assert (
        sum(a2 - a1 + b2 - b1 for _, a1, a2, b1, b2 in changed) <= lines and len(changed) <= hunks
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_skeleton(name):
    text, at = source(name), 0
    for line in (
        "@dataclass\nclass Args",
        "def main(args):",
        "    # load: ",
        "        # log, eval, save\n",
        "cli(Args",
    ):
        at = text.index(line, at)
    assert ast.get_docstring(ast.parse(text)).count("python ") >= 2, (
        "how to run it, on the laptop and for real"
    )
