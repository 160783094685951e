"""What the README tells people to type works as it is written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
# The studies take minutes each and have tests of their own.
RUNS = [
    line.strip()
    for line in LINES
    if re.match(r"(largebatch (train|sweep|plan)|torchrun|mpiexec -n 2 )", line)
    and "study" not in line
]


def test_the_readme_has_what_is_looked_for() -> None:
    assert len(RUNS) >= 7
    assert "make study" in README
    assert "make test" in README


@pytest.mark.parametrize("line", RUNS)
def test_its_commands_run(line: str, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    words = shlex.split(line)
    if "--help" not in words:
        # A multirun takes the last word for all of its runs. A ramp has to fit; and ranks have no
        # target to miss, as torchrun has an exit code of its own for those that do.
        words.append("budget.samples=1.1e5" if "batch=rampup" in words else "budget.samples=2e4")
        if words[0] in ("torchrun", "mpiexec"):
            words.append("target.loss=null")
    begins = subprocess.run
    if words[0] == "largebatch":  # the script of this name is `python -m largebatch`
        words, begins = [sys.executable, "-m", *words], forked.run
    elif words[0] in ("torchrun", "mpiexec"):
        words = forked.launched(words)
    done = begins(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 3), done.stderr  # reached, or the shortened budget spent
    if "sweep" in words:
        assert len(list(tmp_path.glob("sweeps/mine/*/summary.json"))) == 4
    elif "--help" in words:
        assert "task=" in done.stdout or "task:" in done.stdout
    elif "plan" in words:
        assert list(tmp_path.rglob("plan.png"))
    else:
        assert len(list(tmp_path.glob("runs/*/summary.json"))) == 1
