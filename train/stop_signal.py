"""Ctrl-C, SIGTERM, a batch system's warning and a time of day end a run between two steps, its
record closed.

PBS sends SIGTERM before it kills a job, Slurm the signal of `--signal` (use USR2), LSF SIGUSR2, and
SIGXCPU comes with the end of a CPU time limit. SIGUSR1 is none of them: it prints the stacks
(`distributed/rank_dump.py`).
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Final, Self

from largebatch.records.step_record import StepRecord
from largebatch.records.target import Target

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU)

ECHO_SECONDS: Final = 1.0
"""One interruption may come twice: from the batch system, and from a launcher that passes it on."""


class StopSignal:
    """Within it, the first of `SIGNALS` is noted in `signal`; a second one that is no echo of it
    acts as it would have.

    Args:
        at: seconds since the epoch from which on it is time.
    """

    def __init__(self, at: float = math.inf) -> None:
        self.signal: int | None = None
        self._at = at
        self._noted = 0.0
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def is_time(self) -> bool:
        """Whether `at` has come."""
        return time.time() >= self._at

    @property
    def is_due(self) -> bool:
        """Whether this rank's run is to end: by a signal, or as it is time."""
        return self.signal is not None or self.is_time

    def __enter__(self) -> Self:
        # Signals reach the main thread alone; elsewhere (a thread of the user's) there is none to
        # note.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is None:
            self.signal, self._noted = number, time.monotonic()
        elif time.monotonic() - self._noted > ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


@dataclass(frozen=True)
class Stopping:
    """What ends a run before its budget is spent, on all ranks at the same step.

    Attributes:
        signal: of the operating system, or a time of day.
        target: the run ends at the first evaluation that meets it.
        give_up_samples: ends a run without its target; schedules do not see it.
        enough: takes each complete record, a step late; true ends the run as if its budget were
            spent.
    """

    signal: StopSignal = field(default_factory=StopSignal)
    target: Target | None = None
    give_up_samples: int | None = None
    enough: Callable[[StepRecord], bool] = lambda record: False

    @property
    def target_loss(self) -> float | None:
        """Where the target is a loss: that."""
        is_loss = self.target is not None and self.target.metric == "loss"
        return self.target.value if self.target is not None and is_loss else None
