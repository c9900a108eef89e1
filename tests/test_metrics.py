"""docs/metrics.md names exactly the metrics that each script writes."""

import re

import pytest
import torch
from test_family import ROOT, SCRIPTS, field_docs
from test_scripts import chain, metrics  # noqa: F401

import dpo
import grpo
import ppo
import rejection_sampling
import reward_model
import rloo


def documented():
    """Script -> metrics in the two tables with a column of scripts."""
    found = {name: set() for name in SCRIPTS}
    text = (ROOT / "docs/metrics.md").read_text()
    for line in text[text.index("## Metrics of a step") :].splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if line.startswith("| `"):
            assert len(cells) == 5, line
            for script in SCRIPTS if cells[1] == "all" else cells[1].split(", "):
                found[script] |= set(re.findall(r"`([^`]+)`", cells[0]))
    return found


def written(folder):
    """Names in the metrics.jsonl of a run, with N, k and K for numbers."""
    names = {name for row in metrics(folder) for name in row} - {"step"}
    for number, letter in (("pass@", "k"), ("best_of_", "N"), ("score/", "K")):
        names = {re.sub(rf"{number}\d+", number + letter, name) for name in names}
    return names


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory):  # noqa: F811
    """Script -> directories of its runs, of one or two steps."""
    folder = tmp_path_factory.mktemp("metrics")
    shared = dict(model=str(chain / "sft"), warmup_steps=0)
    scorer = str(chain / "reward_model")
    rewarded = shared | dict(reward=f"{scorer},{scorer}", max_completion_length=6)
    online = rewarded | dict(prompts_per_step=3, steps=1)
    groups = online | dict(num_generations=2)
    ptx = dict(ptx_dataset="sort", ptx_coef=0.5, output_dir=str(folder / "ppo"))
    ppo.main(ppo.Args(**online | ptx))
    rloo.main(rloo.Args(**groups, output_dir=str(folder / "rloo")))
    grpo.main(grpo.Args(**groups, dynamic_sampling=True, output_dir=str(folder / "grpo")))
    dpo.main(dpo.Args(**shared, steps=1, batch_size=8, output_dir=str(folder / "dpo")))
    rejection_sampling.main(
        rejection_sampling.Args(
            **rewarded,
            num_generations=2,
            prompts_per_iteration=4,
            output_dir=str(folder / "rejection_sampling"),
        )
    )
    outcome = dict(loss="outcome", steps=1, output_dir=str(folder / "outcome"))
    reward_model.main(reward_model.Args(**shared, **outcome))
    folders = {name: [folder / name] for name in SCRIPTS}
    folders["sft"] = [chain / "sft"]
    folders["reward_model"] = [chain / "reward_model", folder / "outcome"]
    return folders


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_names_what_is_written(runs, name):
    known = documented()[name] - (set() if torch.cuda.is_available() else {"peak_memory_gib"})
    assert known == set().union(*map(written, runs[name]))


def test_flags_on_the_page_exist():
    flags = {f"--{flag.replace('_', '-')}" for script in SCRIPTS for flag in field_docs(script)}
    assert set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs/metrics.md").read_text())) <= flags
