"""README's commands have flags that exist, and its Python runs on what each script saves."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from test_family import ROOT, SCRIPTS, field_docs  # noqa: E402
from test_metrics import runs  # noqa: E402, F401
from test_scripts import chain  # noqa: E402, F401

import sft  # noqa: E402

# of Python programs in general, of torchrun, and of benchmarks/
OTHER_FLAGS = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
OTHER_FLAGS |= {
    "--shutdown-timeout",
    "--seeds",
    "--study",
    "--check",
    "--growth",
    "--repeats",
    "--only",
}
FLAG = r"--[a-z][a-z-]*"


def snippet(words, page="README.md"):
    """The block of Python in a page that has these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [block for block in blocks if words in block]
    return found


def flags_of(script):
    return {f"--{name.replace('_', '-')}" for name in field_docs(script)}


def commands(text):
    """(script, the flags after it) of all code in a page: blocks, where a backslash joins lines,
    and what stands between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in lines + re.findall(r"`([^`]+)`", inline):
        for match in re.finditer(r"(?<![\w/])(\w+)\.py\b(?!:)([^&|;]*)", code):
            if match[1] in SCRIPTS:
                yield match[1], re.findall(FLAG, match[2])


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_flags_of_commands_exist(page):
    """Each flag after a script's name is that script's, and any other flag some script's."""
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    unknown = [(script, set(flags) - flags_of(script)) for script, flags in commands(text)]
    assert not [(script, flags) for script, flags in unknown if flags - OTHER_FLAGS]
    known = set.union(*map(flags_of, SCRIPTS)) | OTHER_FLAGS
    assert not set(re.findall(rf"(?<![\w-]){FLAG}", text)) - known
    if page == "README.md":
        assert {script for script, _ in commands(text)} == set(SCRIPTS)


def test_prompts_that_are_kept(runs, tmp_path, monkeypatch):  # noqa: F811
    """The lines that take prompts by their solve rate run on a run's rollouts."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rejection_sampling").symlink_to(runs["rejection_sampling"][0])
    exec(snippet("rollouts.jsonl", "docs/data.md").replace("0.2 <=", "0.0 <="), {})
    rollouts = Path("runs/rejection_sampling/rollouts.jsonl").read_text().splitlines()
    rows = [json.loads(line)["row"] for line in rollouts]
    assert [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "reward_model"])
def test_plain_transformers_opens_it(runs, name, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/ppo").symlink_to(runs[name][0])
    exec(snippet("AutoModelForCausalLM"), {})
    assert capsys.readouterr().out.strip().startswith("dbca>")


def test_it_chats(chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    import transformers

    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chain / "sft")
    end = "{{ '>' if m['role'] == 'user' else '[EOS]' }}"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    transformers.AutoModelForCausalLM.from_pretrained(chain / "sft").save_pretrained("start")
    tokenizer.save_pretrained("start")
    sft.main(sft.Args(model="start", steps=1, max_length=60, output_dir="runs/ppo"))
    capsys.readouterr()
    exec(snippet("pipeline", "docs/data.md").replace("max_new_tokens=50", "max_new_tokens=5"), {})
    assert isinstance(capsys.readouterr().out, str)


TABLES_IN = {  # benchmark -> page
    "curves": "results",
    "smollm2": "results",
    "closed_form": "correctness",
    "versus_trl": "scale",
    "speed": "scale",
}


@pytest.mark.parametrize("name", TABLES_IN)
def test_tables_are_those_of_the_points(name, capsys, monkeypatch):
    """Tables in the documents are, row by row, what a benchmark prints of its points."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # else speed.py would set it for good
    benchmark = importlib.import_module(name)
    if name == "curves":
        benchmark.print_methods(benchmark.load())
    elif name == "smollm2":
        benchmark.print_table()
    else:
        table = benchmark.print_table if name == "speed" else benchmark.table
        lines = (ROOT / f"benchmarks/{name}.jsonl").read_text().splitlines()
        table([json.loads(line) for line in lines])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    shown = (ROOT / f"docs/{TABLES_IN[name]}.md").read_text().splitlines()
    assert len(printed) > 6 and not set(printed) - set(shown)
