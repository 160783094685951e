"""Command lines of the project, one after another in one process."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from largebatch.cli import main


def run_each(folder: Path, commands: Mapping[str, Sequence[str]]) -> None:
    """Run each `largebatch WORDS` in its own folder; exit with the first code other than 0."""
    for name, words in commands.items():
        (folder / name).mkdir(parents=True)
        os.chdir(folder / name)
        code = main(list(words))
        if code:
            sys.exit(code)
