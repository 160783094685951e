"""How long steps take, evaluations and saves left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """The host's clock around steps. It never waits for a device: there a step's time is that
    between two moments at which the host could continue, and right on average.
    """

    def __init__(self) -> None:
        self.pause = 0.0
        self.start()

    def start(self) -> None:
        """A step begins, and nothing is known of those before it."""
        self._begun = time.perf_counter()
        self._seconds, self._steps = 0.0, 0

    def step(self) -> float:
        """A step ends, and another begins; returns its seconds."""
        now = time.perf_counter()
        seconds, self._begun = now - self._begun, now
        self._seconds += seconds
        self._steps += 1
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed time from step timing; `pause` says how long it was."""
        before = time.perf_counter()
        yield
        self.pause = time.perf_counter() - before
        self._begun += self.pause

    def mean_of_steps(self) -> float:
        """Seconds of a step, over those since this was last asked."""
        mean = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        return mean
