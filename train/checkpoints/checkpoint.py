"""What a run is continued from: model, optimizer and the loop's own state after some step.

A checkpoint is complete or it is not there (`files.py`), holds what an engine puts into it
(`tensors.py`), and is made by all ranks; none is left waiting (`saving.py`). Here is when: after
how many samples or minutes, how many stay, and what happens where one cannot be written.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.common.text import say
from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks
from largebatch.records.checkpoints import listed, samples_of
from largebatch.records.names import CHECKPOINTS
from largebatch.train.checkpoints.files import (
    FORMAT,
    RankFiles,
    clear_drafts,
    draft_of,
    make_folder,
    name_of,
    publish,
    read_state,
    remove,
    retire,
    set_aside,
)
from largebatch.train.checkpoints.saving import Saving
from largebatch.train.checkpoints.tensors import CheckpointTensors
from largebatch.train.checkpoints.torch_format import of_first


class CheckpointFailed(RuntimeError):
    """One could not be written, and `checkpoint.required` says that this ends the run."""


class Checkpoints:
    """The checkpoints of one run, `checkpoints/samples-N/` in its folder.

    With `mode=async` a save returns when what this rank writes has been copied to host memory, and
    the files are written while training continues. One is written at a time: the next waits for it.

    One that cannot be written, on a full disk say, is removed, on all ranks alike; the last one
    stays, and the run continues with a line on stderr and one in `failures`. With
    `checkpoint.required` it ends.

    Args:
        failed: on rank 0, takes the samples and the words of one that could not be written.
        about: on rank 0, what goes into `state.json` besides the loop's state.
        flush: on rank 0, before one is begun: brings to disk what it must not outlive, or raises
            OSError.

    Attributes:
        last: the one that was last saved or loaded, once it is known to be complete.
        failures: what went wrong, the same on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        tensors: CheckpointTensors,
        config: CheckpointConfig,
        failed: Callable[[int, str], None] = lambda samples, what: None,
        about: Callable[[], Mapping[str, Any]] = dict,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self._flush = flush
        self._run, self._folder = folder, folder / CHECKPOINTS
        self._ranks, self._tensors, self._config = ranks, tensors, config
        self._failed, self._about = failed, about
        self._under_way: tuple[Path, Saving] | None = None
        self._begun_at = time.monotonic()
        self._stuck: set[str] = set()
        self.last: Path | None = None
        self.failures: list[str] = []

    def due(self, samples_before: int, samples_now: int) -> bool:
        """Whether a step has passed a multiple of `every_samples`."""
        every: int | None = self._config.every_samples
        return every is not None and samples_now // every != samples_before // every

    def is_due_by_time(self) -> bool:
        """Whether `every_minutes` have gone by since the last save began, on this rank's clock:
        rank 0 decides, and all ranks follow.
        """
        every: float | None = self._config.every_minutes
        return every is not None and time.monotonic() - self._begun_at >= 60 * every

    def save(self, state: dict[str, Any]) -> None:
        """Save the run as it stands; every rank calls it.

        Args:
            state: the loop's, in plain numbers.

        Raises:
            CheckpointFailed: it, or the one before, could not be written, with `required`.
        """
        self.wait()
        samples: int = state["progress"]["samples"]
        final = self._folder / name_of(samples)
        if final == self.last:
            return
        self._begun_at = time.monotonic()
        try:
            draft = self._folder / of_first(self._ranks, lambda: self._make_draft(final))
        except OSError as error:
            self._note(final, str(error))
            return
        background = self._config.mode == "async"
        # As it is now: lists in it may grow while the files are written.
        saved_by = self._tensors.describe() | {"time": time.time()}
        known = {**state, **self._about(), "format": FORMAT, "saved_by": saved_by}
        whole = json.loads(json.dumps(known))
        writing = self._tensors.begin_save(draft, staged=background)

        def publish_all(parts: list[RankFiles]) -> None:
            files = {name: file for part in parts for name, file in part.files.items()}
            files |= writing.complete([part.results for part in parts])
            publish(draft, final, files, whole)
            self._retire()

        saving = Saving(self._ranks, writing, publish_all, partial(remove, draft), background)
        self._under_way = final, saving
        if not background:
            self.wait()

    def wait(self) -> None:
        """Until no save is under way; every rank calls it."""
        if self._under_way is None:
            return
        final, saving = self._under_way
        what = saving.wait()
        self._under_way = None
        if what:
            self._note(final, what)
        else:
            self.last = final

    def settle(self, seconds: float = 60.0) -> None:
        """After an error: let the save that is under way end, if it does. Ranks may have died."""
        if self._under_way is not None:
            self._under_way[1].join(seconds)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Set model and optimizer to what they were; returns the loop's state. Every rank calls it.

        Checkpoints after it were passed by as broken; they are set aside, out of the way of those
        that the run will make again.

        Raises:
            ConfigError: it does not fit this run.
        """
        self.wait()
        try:
            state = of_first(self._ranks, lambda: read_state(checkpoint))
            self._tensors.load(checkpoint, state.get("saved_by", {}))
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        if self._ranks.is_first:
            for later in listed(self._run):
                if samples_of(later) > samples_of(checkpoint):
                    self._set_aside(later)
        self.last = checkpoint
        return state

    def _set_aside(self, later: Path) -> None:
        try:
            set_aside(later, "passed")
        except OSError as error:  # a save under this name tries again, and says what it costs
            say(f"{later.name} could not be set aside: {error}")

    def _retire(self) -> None:
        try:
            self._tell(retire(self._run, self._config.keep, self._config.keep_every_samples))
        except OSError as error:  # the new one is there all the same
            self._tell({CHECKPOINTS: str(error)})

    def _make_draft(self, final: Path) -> str:
        self._flush()
        make_folder(self._run, self._config.folder)
        self._tell(clear_drafts(self._run))  # by a job that was killed meanwhile
        draft = draft_of(final)
        draft.mkdir()
        return draft.name

    def _tell(self, stuck: dict[str, str]) -> None:
        """Say once of each checkpoint that it could not be deleted: it costs its space."""
        for name, why in stuck.items():
            if name not in self._stuck:
                say(f"{name} could not be deleted: {why}")
        self._stuck |= stuck.keys()

    def _note(self, final: Path, what: str) -> None:
        message = f"{final.name} could not be saved: {what}"
        self.failures.append(message)
        if self._config.required:
            raise CheckpointFailed(message)
        if self._ranks.is_first:
            left = "there is none yet" if self.last is None else f"{self.last.name} stays the last"
            say(f"{message}; {left}, training continues")
            self._failed(samples_of(final), message)
