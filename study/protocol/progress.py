"""How far a study is, how long it has taken and about how long it will."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from largebatch.common.progress import BarOrLines, minutes, time_left
from largebatch.records.names import SUMMARY
from largebatch.study.protocol.protocol import Place, Protocol, StudyJob
from largebatch.study.protocol.search import MOST_CONFIRMED, Search

_TYPICAL_CLIMB: Final = 5
_STARTUP_SAMPLES: Final = 4_000
"""A point's cost grows with its batch size from about this many samples' worth of overhead."""


class StudyProgress(BarOrLines):
    """A bar on a terminal, else a line every tenth of the way.

    The time left is an estimate: the number of trials of a search is known only when it is done.
    """

    def __init__(self, protocol: Protocol, folder: Path, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=True), 0.1)
        self._protocol, self._folder = protocol, folder
        self._begin = time.monotonic()
        self._fraction_found: float | None = None
        self._num_runs = 0
        self._under_way: Sequence[StudyJob] = ()

    @contextmanager
    def watching(self, jobs: Sequence[StudyJob]) -> Iterator[None]:
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

    def _arrived(self) -> list[StudyJob]:
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
                trials = search.num_trials + arrived.get(place, 0)
                done += cost * min(0.9, trials / self._typical_trials(search))
        return done / total

    def _typical_trials(self, search: Search) -> int:
        confirmed = MOST_CONFIRMED * (len(search.select_seeds) - 1)
        climbs = 1 + 2 * len(search.grid_sizes)
        return _TYPICAL_CLIMB * climbs + confirmed + len(search.report_seeds)

    def show(self) -> None:
        """Bring the display up to date."""
        fraction = self.fraction()
        gone = time.monotonic() - self._begin
        runs = self._num_runs + len(self._arrived())
        text = f"{fraction:4.0%}  {runs} runs  {minutes(gone)} gone"
        made = fraction - (self._fraction_found or 0.0)
        if made >= 0.02 and fraction < 1.0:
            text += time_left(gone, made, 1.0 - fraction)
        self.update(fraction, text)
