"""`heartbeat.json` in a run's folder: how far the run has come, for a machine to watch.

Progress is the count of steps, and entering a phase such as an evaluation; that a process lives or
prints is not. `largebatch watch` reads the file by its own clock: those of two machines differ.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from largebatch.common.files import write_whole
from largebatch.records.fields import moment, one_of, text, whole
from largebatch.records.names import HEARTBEAT, MOST_RANKS, WATCH
from largebatch.records.reading import find_fields

STATES: Final = ("starting", "stepping", "ended", "failed")


@dataclass(frozen=True)
class Beat:
    """What a heartbeat says; None where it does not, or what it says cannot be.

    Attributes:
        time: seconds since 1970, by the clock of `host`.
        pid_started: in the kernel's ticks; with `pid` it names a process for good.
    """

    state: str | None = None
    phase: str | None = None
    step: int | None = None
    samples: int | None = None
    time: float | None = None
    pid: int | None = None
    pid_started: int | None = None
    host: str | None = None
    world_size: int | None = None


def find_beat(run: Path, problems: list[str]) -> Beat | None:
    """Read the heartbeat of the run in a folder; None where there is none. What cannot be taken
    is noted.
    """
    read = find_fields(run / HEARTBEAT, problems)
    if read is None:
        return None
    return Beat(
        state=read.find("state", one_of(*STATES)),
        phase=read.find("phase", text),
        step=read.find("step", whole()),
        samples=read.find("samples", whole()),
        time=read.find("time", moment),
        pid=read.find("pid", whole(1)),
        pid_started=read.find("pid_started", whole()),
        host=read.find("host", text),
        world_size=read.find("world_size", whole(1, MOST_RANKS)),
    )


class Heartbeat:
    """Rank 0's, around the run: `starting` until the first step, and `ended` after it.

    A run that an exception ends is `failed`; one that is killed leaves the file as it was.

    Attributes:
        every_seconds: the file is written at most so often for steps.
    """

    def __init__(self, folder: Path, world_size: int, every_seconds: float = 1.0) -> None:
        self.every_seconds = every_seconds
        self._path = folder / HEARTBEAT
        self._written = -float("inf")
        self._beat: dict[str, Any] = {
            "state": "starting",
            "phase": None,
            "step": 0,
            "samples": 0,
            "time": 0.0,
            "pid": os.getpid(),
            "pid_started": process_start(os.getpid()),
            "host": socket.gethostname(),
            "world_size": world_size,
        }

    def __enter__(self) -> Self:
        # Made before the ranks look into it: a file system's clients keep in mind that a folder
        # holds no question, as long as nothing is written there.
        with suppress(OSError):
            (self._path.parent / WATCH).mkdir(parents=True, exist_ok=True)
        self._write()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._write(state="ended" if kind is None else "failed", phase=None)

    def beat(self, step: int, samples: int) -> None:
        """A step is made."""
        news = self._beat["state"] == "starting" or self._beat["phase"] is not None
        self._beat |= {"state": "stepping", "step": step, "samples": samples, "phase": None}
        if news or time.monotonic() - self._written >= self.every_seconds:
            self._write()

    def enter(self, phase: str) -> None:
        """The run does something else than steps ("evaluate", "save"), until the next step."""
        self._write(phase=phase)

    def _write(self, **changed: Any) -> None:
        self._beat |= changed | {"time": time.time()}
        with suppress(OSError):  # a full disk ends no run; that the file grows old is what it says
            write_whole(self._path, json.dumps(self._beat) + "\n", durable=False)
        self._written = time.monotonic()


def process_start(pid: int) -> int | None:
    """When a process of this machine was started, in the kernel's ticks; None where there is none.

    With the process id it names a process for good: ids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, a name in parentheses, may hold anything.
    return int(stat.rpartition(")")[2].split()[19])
