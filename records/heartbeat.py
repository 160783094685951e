"""`heartbeat.json`: how far a run has come, as `records/heartbeat_writer.py` writes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from largebatch.records.fields import moment, one_of, text, whole
from largebatch.records.names import HEARTBEAT, MOST_RANKS
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
