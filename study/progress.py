"""How far a study is, how long it has taken and about how long it will."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from largebatch.records.names import SUMMARY
from largebatch.study.protocol import Job, Place, Protocol

_TYPICAL_TRIALS: Final = 5
_STARTUP_SAMPLES: Final = 4_000
"""A point's cost grows with its batch size from about this many samples' worth of overhead."""


class StudyProgress:
    """A bar on a terminal, else a line every tenth of the way.

    The time left is an estimate: the number of trials of a search is known only when it is done.
    """

    def __init__(self, protocol: Protocol, folder: Path, console: Console | None = None) -> None:
        self._protocol, self._folder = protocol, folder
        self._console = console or Console(stderr=True)
        self._begin = time.monotonic()
        self._fraction_found: float | None = None
        self._num_runs = 0
        self._under_way: Sequence[Job] = ()
        self._next_line = 0.1
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(), TextColumn("{task.description}"), console=self._console
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def watching(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Count the records of `jobs` as they come in, whoever runs them."""
        if self._fraction_found is None:
            # What was there before says nothing of the pace.
            self._fraction_found, self._begin = self.fraction(), time.monotonic()
        self._under_way = jobs
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                self.show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            self._num_runs += len(jobs)
            self._under_way = ()

    def _arrived(self) -> list[Job]:
        return [job for job in self._under_way if (self._folder / job.folder / SUMMARY).exists()]

    def fraction(self) -> float:
        """How much of the study's cost is behind it, by guess between 0 and 1."""
        arrived: dict[Place, int] = {}
        for job in self._arrived():
            place = (job.optimizer, job.batch_size)
            arrived[place] = arrived.get(place, 0) + 1
        total = done = 0.0
        for place in self._protocol.places:
            cost = place[1] + _STARTUP_SAMPLES
            search = self._protocol.searches.get(place)
            total += cost
            if search is not None and search.done:
                done += cost
            elif search is not None:
                trials = len(search.tried) + arrived.get(place, 0) / len(search.seeds)
                done += cost * min(0.9, trials / _TYPICAL_TRIALS)
        return done / total

    def show(self) -> None:
        """Bring the display up to date."""
        fraction = self.fraction()
        gone = time.monotonic() - self._begin
        runs = self._num_runs + len(self._arrived())
        text = f"{fraction:4.0%}  {runs} runs  {clock(gone)} gone{self._left(fraction, gone)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=fraction, description=text)
        elif fraction >= self._next_line:
            self._console.print(text, highlight=False)
            self._next_line = int(fraction * 10 + 1) / 10

    def _left(self, fraction: float, gone: float) -> str:
        made = fraction - (self._fraction_found or 0.0)
        if made < 0.02 or fraction >= 1.0:
            return ""
        return f", about {clock(gone * (1.0 - fraction) / made)} left"


def clock(seconds: float) -> str:
    """Minutes and seconds, as 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
