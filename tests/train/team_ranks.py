"""Ranks of `largebatch train`, forked from a process that has imported torch once."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    *("largebatch.train.run", "largebatch.train.command", "largebatch.train.display"),
    # What these load costs a rank some seconds: SciPy, and what torch's optimizers import late.
    *("largebatch.train.tasks.digits", "largebatch.train.checkpoint", "torch._dynamo"),
]


def begin(
    world: Sequence[Mapping[str, str]], words: Sequence[str], folder: Path
) -> "list[multiprocessing.process.BaseProcess]":
    """Start a rank with each of these environments; what it says is in `said-RANK` in `folder`."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context: Any = multiprocessing.get_context("forkserver")
    started = []
    for rank, environment in enumerate(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(world))}
        process = context.Process(target=be_rank, args=(own | environment, words, str(folder)))
        process.start()
        started.append(process)
    return started


def be_rank(environment: Mapping[str, str], words: Sequence[str], folder: str) -> None:
    os.chdir(folder)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    said = os.open(f"said-{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from largebatch.cli import main

    sys.exit(main(list(words)))
