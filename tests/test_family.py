"""The scripts agree: functions and flags of one name are identical; no script imports another."""

import ast
import dataclasses
import functools
import importlib
import itertools
import re
from pathlib import Path

import pytest
from conftest import COPY

ROOT = Path(__file__).parents[1]
SCRIPTS = ["sft", "reward_model", "rejection_sampling", "ppo", "grpo", "rloo", "dpo"]
NEW = [] if COPY.path is None else [COPY.path.stem]  # pytest --script, see docs/extend.md
PAIRS = list(itertools.combinations(SCRIPTS + NEW, 2))
# shared flags with a default of their own in each method (batch_size: with a unit of its own)
OWN_DEFAULT = {
    "batch_size",
    "output_dir",
    "learning_rate",
    "steps",
    "kl_coef",
    "num_generations",
    "prompts_per_step",
    "update_epochs",
    "temperature",
}


@functools.cache
def source(name):
    return (COPY.path if name in NEW else ROOT / f"{name}.py").read_text()


@functools.cache
def definitions(name):
    """Text of the functions (with decorators), classes and constants of a script, by name."""
    lines = source(name).splitlines()
    texts = {}
    for node in ast.parse(source(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets]
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        texts |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    return texts


@functools.cache
def field_docs(name):
    """Type and docstring of each field of Args, in order."""
    [args] = [
        node
        for node in ast.parse(source(name)).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {
        field.target.id: (ast.unparse(field.annotation), doc.value.value) for field, doc in pairs
    }


def defaults(name):
    return {f.name: f.default for f in dataclasses.fields(importlib.import_module(name).Args)}


@pytest.mark.parametrize("one, other", PAIRS)
def test_same_name_same_text(one, other):
    shared = definitions(one).keys() & definitions(other).keys() - {"Args", "main"}
    ours = {name: definitions(one)[name] for name in shared}
    assert ours == {name: definitions(other)[name] for name in shared}


def test_shared_functions_are_found():
    """Otherwise test_same_name_same_text could pass because it compares nothing."""
    online = {"ppo", "grpo", "rloo"}
    for name, scripts in {
        "token_logprobs": set(SCRIPTS) - online - {"reward_model"},
        "token_logprobs_and_entropy": online,
        "completion_batch": set(SCRIPTS) - {"sft", "reward_model"},
        "sample_and_score": online,
        "evaluate": online,
        "policy_loss": {"ppo", "grpo"},
        "scheduled_learning_rate": set(SCRIPTS),
        "Args": set(SCRIPTS),
    }.items():
        assert {script for script in SCRIPTS if name in definitions(script)} == scripts, name
    assert definitions("ppo")["evaluate"].startswith("@torch.no_grad()\ndef evaluate(")


@pytest.mark.parametrize("name", SCRIPTS + ["common"] + NEW)
def test_no_script_is_imported(name):
    imported = re.findall(r"^\s*(?:from|import)\s+(\w+)", source(name), re.MULTILINE)
    assert not set(imported) & set(SCRIPTS)


def test_common_reads_no_flag_of_a_single_script():
    flags = {
        node.attr
        for node in ast.walk(ast.parse(source("common")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("args")
    }
    assert len(flags) > 10
    for flag in flags:
        assert sum(flag in field_docs(name) for name in SCRIPTS) > 1, flag


@pytest.mark.parametrize("name", SCRIPTS + NEW)
def test_every_flag_has_a_docstring(name):
    docs = field_docs(name)
    assert list(docs) == list(defaults(name))
    assert all(doc.strip() for _, doc in docs.values())


@pytest.mark.parametrize("one, other", PAIRS)
def test_shared_flags_agree(one, other):
    """Order, type, help text and default. A new script only has to keep the order."""
    ours = field_docs(one)
    theirs = field_docs(other)
    shared = [flag for flag in ours if flag in theirs]
    assert shared == [flag for flag in theirs if flag in ours]
    for flag in shared:
        if flag not in OWN_DEFAULT and other not in NEW:
            assert ours[flag] == theirs[flag], flag
            assert defaults(one)[flag] == defaults(other)[flag], flag


@pytest.mark.parametrize("name", SCRIPTS + NEW)
def test_one_skeleton(name):
    """Parts in this order; at least two `python ...` commands in the docstring."""
    text = source(name)
    at = 0
    for line in (
        "@dataclass\nclass Args:\n",
        "    # shared by all scripts\n    model: str | None = None\n",
        "@model_forward\ndef ",
        "@torch.no_grad()\ndef evaluate",
        "def main(args):\n    device = setup(args)\n",
        "    # data first",
        "\n    run = Run(",
        "    start = run.restore()\n",
        " # update",
        " # log, evaluate, save\n",
        " run.log(step + 1, ",
        " run.checkpoint_if_due(step + 1",
        "    run.finish(",
        'if __name__ == "__main__":\n',
        "    main(cli(Args, laptop=laptop))\n",
    ):
        at = text.index(line, at)
    assert ast.get_docstring(ast.parse(text)).count("python ") >= 2


@pytest.mark.parametrize("name", SCRIPTS + NEW)
def test_flags_of_the_method_come_first(name):
    """Flags of all scripts are last."""
    shared = [all(flag in field_docs(script) for script in SCRIPTS) for flag in field_docs(name)]
    assert shared == sorted(shared)
