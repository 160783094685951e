"""What the tests of the training command share: running it, and reading what it left.

Lets them, and the processes they spawn, import this folder's noise_ranks.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fixture_types import Command, ReadRun, Train


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run a command line in a folder of its own; returns it completed, output as text."""

    def run(
        *words: str, launcher: Sequence[str] = (), **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        python = [] if launcher and launcher[0].endswith("torchrun") else [sys.executable]
        line = [*launcher, *python, "-m", "largebatch", *words]
        true = launcher or any(name.startswith("PYTHON") for name in environment)
        return (subprocess if true else forked).run(
            forked.launched(line) if launcher else line,
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """`largebatch train` in this process, in a folder of its own; returns the exit code."""
    from largebatch.train import command

    def run(*overrides: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["largebatch"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        if any(word.startswith("engine.nproc=") for word in overrides):
            monkeypatch.setattr(sys, "executable", forked.stand_in())
        return command.main(list(overrides))

    return run


@pytest.fixture
def read_run() -> ReadRun:
    """The lines and the summary of a run's folder."""

    def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads(
            (folder / "summary.json").read_text()
        )

    return read


def scripts() -> Path:
    """Where torchrun and mpiexec of this environment are."""
    return Path(sys.executable).parent
