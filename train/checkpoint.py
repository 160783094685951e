"""What a run is continued from: model, optimizer and the loop's own state after some step.

A checkpoint is complete or it is not there: it is written under another name, by all ranks, and
takes its own when everything is on disk. Tensors go through `torch.distributed.checkpoint`, keyed
by their names in the model, so that a world of another size can read them; the rest is
`state.json`.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from largebatch.train.ranks import Ranks
from largebatch.train.resume import CHECKPOINTS, STATE, complete


class Checkpoints:
    """The checkpoints of one run, `checkpoints/samples-N/` in its folder.

    Args:
        keep: so many of the last ones stay, older ones are deleted when a new one is complete.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, model: nn.Module, optimizer: Optimizer, keep: int
    ) -> None:
        self._run, self._folder = folder, folder / CHECKPOINTS
        self._ranks, self._model, self._optimizer = ranks, model, optimizer
        self._keep = keep
        self._last: int | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Save the run as it stands; every rank calls it.

        Args:
            state: the loop's, in plain numbers.
        """
        samples: int = state["progress"]["samples"]
        if samples == self._last:
            return
        self._last = samples
        final = self._folder / f"samples-{samples:015d}"
        draft = final.with_name(f".{final.name}")
        if self._ranks.is_first:
            self._folder.mkdir(exist_ok=True)
            for left in self._folder.glob(".samples-*"):  # by a job that was killed meanwhile
                shutil.rmtree(left)
        self._wait_for_all()
        with quiet():
            state_dict_saver.save(
                self._tensors(), checkpoint_id=draft, no_dist=self._ranks.size == 1
            )
        if self._ranks.is_first:
            (draft / STATE).write_text(json.dumps(state), encoding="utf-8")
            for path in (*draft.iterdir(), draft):
                flush_to_disk(path)
            draft.rename(final)
            flush_to_disk(self._folder)
            for old in complete(self._run)[: -self._keep]:
                old.rename(old.with_name(f".{old.name}"))  # never half deleted under its own name
                shutil.rmtree(old.with_name(f".{old.name}"))

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Set model and optimizer to what they were; returns the loop's state."""
        tensors = self._tensors()
        with quiet():
            state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=self._ranks.size == 1)
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=tensors["model"],
                optim_state_dict=tensors["optimizer"],
            )
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        self._last = state["progress"]["samples"]
        return state

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _wait_for_all(self) -> None:
        if self._ranks.size > 1:
            dist.barrier()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
