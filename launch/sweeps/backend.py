"""What runs the trials of a sweep, as its conductor sees it: a device, a slice of nodes, a job."""

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from largebatch.launch.sweeps.record import Trial


@dataclass
class Attempt:
    """A trial that has been begun, at `began` by the monotonic clock, on `nodes` as far as known;
    the number counts from 1, over all the sweep's jobs.
    """

    trial: Trial
    number: int
    nodes: tuple[str, ...] = ()
    began: float = field(default_factory=time.monotonic)

    def file(self, ending: str) -> Path:
        """A file of this attempt in the trial's folder: its script, its output, …"""
        return self.trial.folder / f"attempt-{self.number}.{ending}"


class Ended(NamedTuple):
    attempt: Attempt
    code: int | None
    """None: it is not known, as whoever ran it is gone."""


class Backend(Protocol):
    """Where trials run; those of one that `outlives` the sweep continue when it stops."""

    outlives: bool = False

    def room(self, avoid: frozenset[str]) -> tuple[str, ...] | None:
        """Nodes for one more trial, none of them in `avoid`, or () where they are known only once
        it runs; None: no room now.
        """

    def begin(self, attempt: Attempt) -> None:
        """Begin it where `room` was found."""

    def adopt(self, attempt: Attempt, job: dict[str, Any]) -> bool:
        """Go on with what an earlier sweep began, where it is still there."""
        del attempt, job
        return False

    def show(self, trial: Trial) -> str:
        """What would be done to begin it, where that can be known."""
        return shlex.join(trial.command)

    def ended(self) -> list[Ended]:
        """Attempts that have ended since the last call."""

    def is_dead(self, node: str) -> bool:
        """Whether the node does not even start a trivial command."""
        del node
        return False

    def leave_out(self, nodes: set[str]) -> None:
        """Begin nothing on them from now on."""

    def nodes(self) -> set[str]:
        """Those that trials may use, and that are not left out; empty where nobody knows yet."""
        return set()

    def is_spent(self) -> bool:
        """Whether there is nothing left to run on."""
        return False

    def stop(self) -> None:
        """SIGTERM to all that runs, so that it saves and ends."""

    def kill(self) -> None:
        """SIGKILL to what is left."""

    def close(self) -> None:
        """Let go of everything."""
