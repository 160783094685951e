"""Whether a run makes progress, by the heartbeat in its folder and this machine's clock alone."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from largebatch.launch.watch_processes import Process, running
from largebatch.train.record import SUMMARY, UNFINISHED

HEARTBEAT: Final = "heartbeat.json"
"""Written by `train/heartbeat.py`, which says what is in it."""

Beat = dict[str, Any]


def heartbeat(run: Path) -> Beat | None:
    """The last heartbeat of a run; None where there is none."""
    try:
        beat: Beat = json.loads((run / HEARTBEAT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return beat


def is_gone(beat: Beat) -> bool:
    """Whether the process of a heartbeat was one of this machine, and runs no more."""
    if beat.get("host") != socket.gethostname() or beat.get("pid_started") is None:
        return False
    return Process(beat["pid"], beat["pid_started"]) not in running()


def has_ended(run: Path) -> bool:
    """Whether the run has come to an end that nothing is to be added to."""
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return summary["status"] not in UNFINISHED


def has_runs_below(run: Path) -> bool:
    """Whether it is the folder of a sweep or a study."""
    return any(run.glob(f"*/**/{HEARTBEAT}"))


class Progress:
    """How long a run has stood still.

    Args:
        stale: the heartbeat of a process before, which says nothing of this one.

    Attributes:
        beat: the last heartbeat of this run; None before the first.
    """

    def __init__(
        self, run: Path, stale: Beat | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.beat: Beat | None = None
        self._run, self._stale, self._clock = run, stale, clock
        self._mark: Any = None
        self._since = clock()

    def look(self) -> None:
        """Take in the heartbeat as it is now."""
        beat = heartbeat(self._run)
        if beat is None or beat == self._stale:
            return
        # Not its time: a process may go on telling that it lives.
        mark = [beat[name] for name in ("pid", "pid_started", "state", "phase", "step", "samples")]
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
        return self.beat is not None and self.beat["state"] in ("stepping", "failed")

    @property
    def has_ended(self) -> bool:
        return self.beat is not None and self.beat["state"] == "ended"

    def __str__(self) -> str:
        if self.beat is None:
            return f"no heartbeat for {self.seconds:.0f} s (is it the folder of that run?)"
        if self.has_ended:
            return f"the run has ended, and its command has not left for {self.seconds:.0f} s"
        phase = f" in phase {self.beat['phase']!r}" if self.beat["phase"] else ""
        where = f"step {self.beat['step']} ({self.beat['samples']} samples)"
        if self.beat["state"] == "starting":
            return f"no step for {self.seconds:.0f} s after its start{phase}"
        failed = ", having failed on rank 0" if self.beat["state"] == "failed" else ""
        return f"no step for {self.seconds:.0f} s after {where}{phase}{failed}"
