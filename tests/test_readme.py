"""README's table of flags is made from Args: `python tests/test_readme.py` writes it."""

import dataclasses
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from test_family import ROOT, SCRIPTS, field_docs  # noqa: E402

BEGIN, END = "<!-- flags, written by tests/test_readme.py -->", "<!-- end of flags -->"


def table():
    """One row a flag: name, default (of each script where they differ), what it is."""
    flags = {}
    for script in SCRIPTS:
        defaults = {f.name: f.default for f in dataclasses.fields(importlib.import_module(script).Args)}
        for name, (_, doc) in field_docs(script).items():
            flags.setdefault(name, {})[script] = (defaults[name], " ".join(doc.split()))
    rows = ["| flag | scripts | default | |", "|---|---|---|---|"]
    for name, uses in flags.items():
        where = "all" if len(uses) == len(SCRIPTS) else ", ".join(uses)
        values = [f"`{default}`" for default, _ in uses.values()]
        docs = [doc for _, doc in uses.values()]
        default = values[0] if len(set(values)) == 1 else ", ".join(values)
        text = docs[0] if len(set(docs)) == 1 else "; ".join(f"{s}: {d}" for s, d in zip(uses, docs))
        rows.append(
            f"| `--{name.replace('_', '-')}` | {where} | {default} | {text.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(rows)


def test_flags_in_readme():
    text = (ROOT / "README.md").read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(
        text[: text.index(BEGIN) + len(BEGIN)] + "\n" + table() + "\n" + text[text.index(END) :]
    )
