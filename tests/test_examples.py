"""Each example runs by the command in its first lines, and tells the truth it is there for."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "accelerate_loop.py": "accelerate",
    "deepspeed_zero2.py": "deepspeed",
    "hf_trainer.py": "transformers",
    "lightning_module.py": "lightning",
    "optuna_search.py": "optuna",
}
"""What an example cannot do without beside torch."""


@dataclass(frozen=True)
class Printed:
    loss: float
    trust_ratios: dict[str, float]


def commands(example: Path) -> list[str]:
    """The commands in backquotes that its docstring gives, in their order."""
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    return [
        c for c in re.findall(r"`([^`]+)`", docstring) if c.endswith(f"examples/{example.name}")
    ]


@cache
def printed(name: str, which: int = 0, **variables: str) -> Printed:
    """What the example says at the end of its `which`-th command."""
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    words = shlex.split(commands(ROOT / "examples" / name)[which])
    begins = subprocess.run
    if words[0] == "python":
        words, begins = [sys.executable, *words[1:]], forked.run
    elif words[0] == "torchrun":
        words = forked.launched(words)
    done = begins(
        words,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"loss (\d+\.\d+)", done.stdout)
    ratios = re.findall(r"(\S+) +trust ratio (\d+\.\d+)", done.stdout)
    assert len(losses) == 1, done.stdout  # of one rank alone
    return Printed(float(losses[0]), {name: float(ratio) for name, ratio in ratios})


def test_every_example_is_short_and_begins_with_its_command() -> None:
    assert len(EXAMPLES) == 9
    for example in EXAMPLES:
        assert len(example.read_text(encoding="utf-8").splitlines()) < 40
        assert commands(example)


def test_the_plain_loop_learns_and_adapts_weights_only() -> None:
    plain = printed("plain_pytorch.py")
    adapted = {name for name, ratio in plain.trust_ratios.items() if ratio != 1.0}
    assert adapted == {"0.weight", "3.weight"}
    assert plain.trust_ratios.keys() - adapted == {"0.bias", "1.weight", "1.bias", "3.bias"}


@pytest.mark.parametrize(
    "name", ["fsdp2.py", pytest.param("deepspeed_zero2.py", marks=pytest.mark.matrix)]
)
def test_two_ranks_end_where_the_plain_loop_does(name: str) -> None:
    spread, plain = printed(name), printed("plain_pytorch.py")
    assert spread.loss == pytest.approx(plain.loss, rel=1e-4)
    assert spread.trust_ratios == pytest.approx(plain.trust_ratios, abs=2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "accelerate_loop.py",
        "lightning_module.py",
        pytest.param("compiled.py", marks=pytest.mark.matrix),  # half a minute of a C++ compiler
    ],
)
def test_a_framework_that_clips_ends_where_the_plain_loop_does(name: str) -> None:
    framed, plain = printed(name), printed("plain_pytorch.py")
    assert framed.loss == pytest.approx(plain.loss, rel=1e-4)
    assert framed.trust_ratios == pytest.approx(plain.trust_ratios, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("mixed_precision.py", "16"),
        ("lightning_module.py", "bf16-mixed"),
        pytest.param("lightning_module.py", "16-mixed", marks=pytest.mark.matrix),
    ],
)
def test_half_precision_comes_close_to_the_plain_loop(name: str, precision: str) -> None:
    halved, plain = printed(name, PRECISION=precision), printed("plain_pytorch.py")
    assert halved.loss == pytest.approx(plain.loss, rel=0.03)
    assert halved.trust_ratios == pytest.approx(plain.trust_ratios, rel=0.05)


def test_optuna_finds_a_rate_that_learns() -> None:
    assert printed("optuna_search.py").loss < 1.0


@pytest.mark.matrix
def test_the_trainer_comes_to_the_same_on_two_ranks() -> None:
    alone, spread = printed("hf_trainer.py", 0), printed("hf_trainer.py", 1)
    assert spread.loss == pytest.approx(alone.loss, rel=1e-3)
