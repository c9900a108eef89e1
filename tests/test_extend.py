"""docs/extend.md: its method passes the step tests, and a wrong sign fails them."""

import os
import subprocess
import sys

from test_family import ROOT, definitions
from test_readme import snippet

CASE = """
from test_steps import GRPO_FLAGS

GRPO_FLAGS["right"] = dict(sign=1.0)
GRPO_FLAGS["wrong"] = dict(sign=-1.0)
"""


def test_the_example_passes_and_a_wrong_sign_fails(tmp_path):
    """The copy of grpo.py lacks --ratio and has a flag of its own, the sign of the loss."""
    text = (ROOT / "grpo.py").read_text()
    loss = snippet("def cispo_loss", "docs/extend.md")
    check = '    if args.ratio == "sequence" and'
    for old, new in {
        definitions("grpo")["policy_loss"]: loss,
        "loss, clipped = policy_loss(": "loss, clipped = cispo_loss(",
        'Literal["sequence", "token", "constant"] = "sequence"': 'str = "token"',
        '    ratio: Literal["token", "sequence"] = "token"\n': "    sign: float = 1.0\n",
        f"{check}{text.partition(check)[2].partition('    if ')[0]}": "",
        'ratio_logprobs(logprobs, old_logprobs, mb["mask"], args.ratio)': "logprobs",
        '                        mb["advantages"],\n': '    args.sign * mb["advantages"],\n',
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "cispo.py").write_text(text)
    formulas = snippet("def surrogate", "docs/extend.md")
    (tmp_path / "cispo_float64.py").write_text(formulas + CASE)
    command = [sys.executable, "-m", "pytest", "tests/test_steps.py", "-k", "right or wrong"]
    command += ["--script", str(tmp_path / "cispo.py"), "--like", "grpo"]
    command += ["-p", "no:cacheprovider", "--basetemp", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in run.stdout, run.stdout + run.stderr
    assert "FAILED tests/test_steps.py::test_grpo_step_is_the_formula[wrong]" in run.stdout
    assert "the gradient is off by" in run.stdout
