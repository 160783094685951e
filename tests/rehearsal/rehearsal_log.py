"""What the host has done to the rehearsal's device: how often, and which line has asked for it."""

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{ROOT}/{f}/" for f in ("optim", "schedules", "train", "benchmarks"))
_FOR_OTHERS = ("Arriving.wait",)  # the line that calls it is told
_HERE = str(Path(__file__).parent)

Counts = Counter[tuple[str, str]]
"""How often, by what was done and by the line."""


class Log:
    """All counts of this process.

    Attributes:
        waits: of the host for all that the device has still to do.
        events: of the host for an event after which the device has been given more to do.
        operators: how many the device has been given so far.
        uploads: copies to the device; "waiting upload" those that the host waits for.
        hosted: operators that XPU sends to the host, a copy each way and a wait each.
        allocated, peak, limit: bytes of the device's memory.
    """

    def __init__(self) -> None:
        self.waits: Counts = Counter()
        self.events: Counts = Counter()
        self.uploads: Counts = Counter()
        self.hosted: Counts = Counter()
        self.operators = 0
        self.allocated = self.peak = 0
        self.limit = 1 << 40

    def counts(self) -> dict[str, Counts]:
        """What has been counted so far, to be subtracted from what it is later."""
        return {
            "waits": Counter(self.waits),
            "events": Counter(self.events),
            "uploads": Counter(self.uploads),
            "hosted": Counter(self.hosted),
        }


log = Log()


def is_beside() -> bool:
    """Whether this is a thread beside training, which may wait."""
    return threading.current_thread().name.startswith(("checkpoint", "decompositions"))


def place() -> str:
    """The innermost line of the product that has led here, or the outermost known of another."""
    frame: FrameType | None = sys._getframe(1)
    other = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and frame.f_code.co_qualname not in _FOR_OTHERS:
            return f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if not file.startswith(_HERE):
            other = f"{file[-40:]}:{frame.f_lineno}"
        frame = frame.f_back
    return f"({threading.current_thread().name}) {other}"
