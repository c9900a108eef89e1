"""Commands of README and docs use flags that exist, their Python runs, their tables are current."""

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

# flags of argparse, torchrun and benchmarks/
OTHER_FLAGS = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
OTHER_FLAGS |= {"--script", "--like"}  # of pytest, see conftest.py
OTHER_FLAGS |= {
    "--shutdown-timeout",
    "--seeds",
    "--study",
    "--check",
    "--growth",
    "--repeats",
    "--only",
    "--prompt",
    "--new",
}
FLAG = r"--[a-z][a-z-]*"


def snippet(words, page="README.md"):
    """The only Python block of a page with these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [block for block in blocks if words in block]
    return found


def flags_of(script):
    return {f"--{name.replace('_', '-')}" for name in field_docs(script)}


def commands(text):
    """Yield (script, its flags) for each command in the blocks and inline code of a page."""
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
    """Flags after a script's name belong to this script, all others to some script."""
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    unknown = [(script, set(flags) - flags_of(script)) for script, flags in commands(text)]
    assert not [(script, flags) for script, flags in unknown if flags - OTHER_FLAGS]
    known = set.union(*map(flags_of, SCRIPTS)) | OTHER_FLAGS
    assert not set(re.findall(rf"(?<![\w-]){FLAG}", text)) - known
    if page == "README.md":
        assert {script for script, _ in commands(text)} == set(SCRIPTS)


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


PAGE_OF = {  # benchmark -> page with its table
    "curves": "results",
    "smollm2": "results",
    "closed_form": "correctness",
    "versus_trl": "scale",
    "speed": "scale",
    "reward_models": "results",
    "book": "results",
    "memory": "scale",
}


@pytest.mark.parametrize("name", PAGE_OF)
def test_tables_match_the_measurements(name, capsys, monkeypatch):
    """Every row that a benchmark prints from its .jsonl file, or calculates, is in a page."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # otherwise speed.py sets it for all tests
    benchmark = importlib.import_module(name)
    if name == "curves":
        benchmark.print_methods(benchmark.load())
    elif name == "smollm2":
        benchmark.print_table()
    elif name == "reward_models":
        benchmark.table()
    elif name == "book":
        benchmark.table(benchmark.STUDIES)
    elif name == "memory":
        monkeypatch.setattr(sys, "argv", ["memory.py"])
        benchmark.main()
    else:
        table = benchmark.print_table if name == "speed" else benchmark.table
        lines = (ROOT / f"benchmarks/{name}.jsonl").read_text().splitlines()
        table([json.loads(line) for line in lines])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    shown = (ROOT / f"docs/{PAGE_OF[name]}.md").read_text().splitlines()
    assert len(printed) > 6 and not set(printed) - set(shown)
