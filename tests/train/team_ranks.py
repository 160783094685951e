"""Ranks of `largebatch train`, as a launcher would start them."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import forked


def begin(
    world: Sequence[Mapping[str, str]], words: Sequence[str], folder: Path
) -> list[forked.Popen]:
    """Start a rank with each of these environments; what it says is in `said-RANK` in `folder`."""
    started = []
    for rank, environment in enumerate(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(world))}
        with (folder / f"said-{rank}").open("w") as said:
            started.append(
                forked.Popen(
                    [sys.executable, "-m", "largebatch", *words], cwd=folder,
                    env=os.environ | own | environment, stdout=said, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return started
