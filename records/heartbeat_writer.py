"""`heartbeat.json` in a run's folder: how far the run has come, for a machine to watch.

Progress is the count of steps, and entering a phase such as an evaluation; that a process lives or
prints is none. `largebatch watch` reads the file by its own clock: those of two machines differ.
"""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from largebatch.common.files import write_whole

HEARTBEAT: Final = "heartbeat.json"
WATCH: Final = "watch"
"""The folder of questions to the ranks and their answers; see `distributed/rank_dump.py`."""


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
