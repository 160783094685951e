"""Whether a run makes progress, by the heartbeat in its folder and this machine's clock alone."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largebatch.launch.processes import Process, running
from largebatch.records.heartbeat import Beat, find_beat
from largebatch.records.names import HEARTBEAT


def process_of(beat: Beat) -> Process | None:
    """The process of a heartbeat, where it says which."""
    if beat.pid is None or beat.pid_started is None:
        return None
    return Process(beat.pid, beat.pid_started)


def is_gone(beat: Beat) -> bool:
    """Whether the process of a heartbeat was one of this machine, and runs no more."""
    process = process_of(beat)
    return process is not None and beat.host == socket.gethostname() and process not in running()


def has_runs_below(run: Path) -> bool:
    """Whether it is the folder of a sweep or a study."""
    return any(run.glob(f"*/**/{HEARTBEAT}"))


class Progress:
    """How long a run has stood still.

    Args:
        stale: the heartbeat of a process before, which says nothing of this one.

    Attributes:
        beat: the last heartbeat of this run; None before the first.
        problems: what heartbeats held that could not be taken, each once.
    """

    def __init__(
        self, run: Path, stale: Beat | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.beat: Beat | None = None
        self.problems: list[str] = []
        self._run, self._stale, self._clock = run, stale, clock
        self._mark: Any = None
        self._since = clock()

    def look(self) -> None:
        """Take in the heartbeat as it is now."""
        found: list[str] = []
        beat = find_beat(self._run, found)
        self.problems += [problem for problem in found if problem not in self.problems]
        if beat is None or beat == self._stale:
            return
        # Not its time: a process may go on telling that it lives.
        mark = (beat.pid, beat.pid_started, beat.state, beat.phase, beat.step, beat.samples)
        if mark != self._mark:
            self._mark, self._since = mark, self._clock()
        self.beat = beat

    @property
    def seconds(self) -> float:
        """For how long there has been no progress."""
        return self._clock() - self._since

    @property
    def is_stepping(self) -> bool:
        """Whether this process has made a step and not ended: then a pause is short."""
        return self.beat is not None and self.beat.state in ("stepping", "failed")

    @property
    def has_ended(self) -> bool:
        return self.beat is not None and self.beat.state == "ended"

    def __str__(self) -> str:
        if self.beat is None:
            return f"no heartbeat for {self.seconds:.0f} s (is it the folder of that run?)"
        if self.has_ended:
            return f"the run has ended, and its command has not left for {self.seconds:.0f} s"
        phase = f" in phase {self.beat.phase!r}" if self.beat.phase else ""
        where = f"step {self.beat.step} ({self.beat.samples} samples)"
        if self.beat.state == "starting":
            return f"no step for {self.seconds:.0f} s after its start{phase}"
        failed = ", having failed on rank 0" if self.beat.state == "failed" else ""
        return f"no step for {self.seconds:.0f} s after {where}{phase}{failed}"
