"""Whether a run makes progress, by the heartbeat in its folder and this machine's clock alone."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.launch.processes import is_running
from largebatch.records.heartbeat import Beat, find_beat, process_start
from largebatch.records.names import HEARTBEAT

if TYPE_CHECKING:
    import psutil


def process_of(beat: Beat) -> "psutil.Process | None":
    """The process of a heartbeat; None where it does not run on this machine."""
    if not _is_here(beat) or beat.pid is None or process_start(beat.pid) != beat.pid_started:
        return None
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(beat.pid)
        return process if is_running(process) else None
    return None


def is_gone(beat: Beat) -> bool:
    """Whether the process of a heartbeat was one of this machine, and has ended."""
    return _is_here(beat) and process_of(beat) is None


def _is_here(beat: Beat) -> bool:
    named = beat.pid is not None and beat.pid_started is not None
    return named and beat.host == socket.gethostname()


def has_runs_below(run: Path) -> bool:
    """Whether it is the folder of a sweep or a study."""
    return any(run.glob(f"*/**/{HEARTBEAT}"))


class Progress:
    """Time since a run last made progress. `beat` is its last heartbeat, None before the first;
    `stale`, that of an earlier process, is passed by. `problems` are what could not be read of
    heartbeats, each once.
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
        """Read the heartbeat as it is now."""
        found: list[str] = []
        beat = find_beat(self._run, found)
        self.problems += [problem for problem in found if problem not in self.problems]
        if beat is None or beat == self._stale:
            return
        # Not its time: a process that hangs may still write heartbeats.
        mark = (beat.pid, beat.pid_started, beat.state, beat.phase, beat.step, beat.samples)
        if mark != self._mark:
            self._mark, self._since = mark, self._clock()
        self.beat = beat

    @property
    def seconds(self) -> float:
        """Seconds since the last progress."""
        return self._clock() - self._since

    @property
    def is_stepping(self) -> bool:
        """Whether this process has made a step and not ended: pauses are short from then on."""
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
