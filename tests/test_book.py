"""docs/book.md: its commands and answers run, its functions, tests and metrics exist."""

import re
import runpy
import shlex
import sys

import pytest
from test_family import ROOT, SCRIPTS, definitions
from test_metrics import documented
from test_recipes import block
from test_scripts import chain, small_task  # noqa: F401 (chain is a fixture)

import common

PAGE = (ROOT / "docs/book.md").read_text()
# short forms of the commands: the last of two equal flags counts
BATCHES = "--steps 1 --batch-size 4"
GROUPS = "--steps 1 --prompts-per-step 4 --num-generations 2"
SHORT = {
    "sft": BATCHES,
    "reward_model": BATCHES,
    "dpo": BATCHES,
    "rejection_sampling": f"{BATCHES} --prompts-per-iteration 8 --num-generations 4",
    "ppo": "--steps 1 --prompts-per-step 8",
    "grpo": GROUPS,
    "rloo": GROUPS,
}


def blocks(language):
    """Fenced blocks of a language; commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


ANSWERS = [
    (*re.search(r"\+\+\+ b/(\S+)\n@@ (\S+)", diff).groups(), diff) for diff in blocks("diff")
]


def apply(diff, file):
    """The text of a file with a diff applied, which names functions in place of line numbers."""
    text = (ROOT / file).read_text()
    for hunk in diff.split("\n@@ ")[1:]:
        name, *lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        assert not file.endswith(".py") or old in definitions(file.removesuffix(".py"))[name], old
        text = text.replace(old, new)
    return text


def like_checker(prompts, completions, rows):
    """In place of the exact checker: the tiny model of the tests never sorts."""
    pairs = zip(completions, rows)
    return [float(text == row["answer"] or len(text) % 2 == 0) for text, row in pairs]


@pytest.fixture
def folder(chain, tmp_path, monkeypatch):  # noqa: F811
    """A working directory with the runs of earlier parts and the Python files of the pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(common.CHECKERS, common.TASK, like_checker)
    (tmp_path / "runs").mkdir()
    for name, run in [("sft", "sft"), ("reward_model", "reward_model"), ("rloo", "sft")]:
        (tmp_path / "runs" / name).symlink_to(chain / run)
    (tmp_path / "pairs.py").write_text(block("(_, worst), (_, best)"))
    (tmp_path / "kept.py").write_text(block("sorted({text"))
    for code in blocks("python"):
        with open(re.match(r"# (\w+\.py)\n", code)[1], "a") as file:
            file.write(code)
    return tmp_path


def run(words, monkeypatch, path=None):
    """Run a command in this process, in its short form if it is one of the scripts."""
    script = words[0].removesuffix(".py")
    path = path or (ROOT / words[0] if script in SCRIPTS else words[0])
    monkeypatch.setattr(sys, "argv", [*words, *SHORT.get(script, "").split()])
    runpy.run_path(str(path), run_name="__main__")


def test_commands_run_in_the_order_of_the_page(folder, monkeypatch):
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in dict.fromkeys(lines)]
    assert {words[0] for words in commands} == {"python"}
    assert {words[1] for words in commands} > {f"{script}.py" for script in SCRIPTS}
    for words in commands:
        run(words[1:], monkeypatch)


@pytest.mark.parametrize(
    "file, diff",
    [pytest.param(file, diff, id=f"{file} {function}") for file, function, diff in ANSWERS],
)
def test_answers_apply_and_run(folder, monkeypatch, file, diff):
    text = apply(diff, file)
    if file.endswith(".py"):
        compile(text, file, "exec")
    if file.removesuffix(".py") in SCRIPTS:
        (folder / file).write_text(text)
        run([file], monkeypatch, path=folder / file)


def test_functions_and_tests_exist():
    """Names in backticks after a file, in the paragraphs that begin with **Read**."""
    num_names = 0
    for paragraph in re.findall(r"^\*\*Read\*\*.*?\n\n", PAGE, re.DOTALL | re.MULTILINE):
        known = None
        for name in re.findall(r"`([\w.]+)`", paragraph):
            if name.removesuffix(".py") in [*SCRIPTS, "common"] and name.endswith(".py"):
                known = definitions(name.removesuffix(".py"))
            else:
                assert name in known, name
                num_names += 1
    assert num_names > 30
    for file, words in re.findall(r"`pytest (\S+) -k (\w+)`", PAGE):
        assert re.search(rf"def test_\w*{words}|{words}", (ROOT / file).read_text()), words


def test_metrics_exist():
    """Names in the outputs and in backticks with a slash are metrics of docs/metrics.md."""
    known = set().union(*documented().values())
    names = re.findall(r"([\w/@]+)=", "".join(blocks("text")))
    names += re.findall(r"`((?:eval|best_of_\d+)/[\w@]+)`", PAGE)
    assert len(names) > 40
    for name in names:
        name = re.sub(r"(?<=pass@)\d+", "k", re.sub(r"(?<=best_of_)\d+", "N", name))
        assert name in known, name
