"""How far a study is, how long it has taken and about how long it will."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from largebatch.common.progress import BarOrLines, minutes, time_left
from largebatch.common.text import LineField
from largebatch.records.names import SUMMARY
from largebatch.study.protocol.questions import Job, Place, Question
from largebatch.study.protocol.search import MOST_CONFIRMED, Search

_TYPICAL_CLIMB: Final = 5


class StudyProgress(BarOrLines):
    """A bar on a terminal, else a line every tenth of the way.

    The time left is an estimate: the number of trials of a search is known only when it is done.
    """

    def __init__(self, protocol: Question, folder: Path, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=True), 0.1)
        self._protocol, self._folder = protocol, folder
        self._begin = time.monotonic()
        self._fraction_found: float | None = None
        self._num_runs = 0
        self._under_way: tuple[Job, ...] = ()
        self._shares = self._look()

    def launched(self, jobs: Sequence[Job]) -> None:
        """Note jobs that are to run."""
        self._under_way += tuple(jobs)
        self._shares = self._look()

    def ended(self, job: Job) -> None:
        """Note a job whose result the protocol has been told."""
        self._under_way = tuple(other for other in self._under_way if other != job)
        self._num_runs += 1
        self._shares = self._look()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the records of the jobs as they come in, whoever runs them."""
        if self._fraction_found is None:
            # What was there before says nothing of the pace.
            self._fraction_found, self._begin = self.fraction(), time.monotonic()
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

    def _arrived(self) -> list[Job]:
        jobs = self._under_way
        return [job for job in jobs if (self._folder / job.folder / SUMMARY).exists()]

    def _look(self) -> dict[Place, tuple[float, float]]:
        """Of each place, the trials that are told and those it takes: the watcher reads no more."""
        shares = {}
        for place in self._protocol.places:
            search = self._protocol.searches.get(place)
            told = 0 if search is None else search.num_trials
            takes = math.inf if search is None else self._typical_trials(search)
            shares[place] = (1.0, 1.0) if search is not None and search.done else (told, takes)
        return shares

    def fraction(self) -> float:
        """How much of the study's cost is behind it, by guess between 0 and 1."""
        arrived: dict[Place, int] = {}
        for job in self._arrived():
            if job.is_trial:
                arrived[job.place] = arrived.get(job.place, 0) + 1
        total = done = 0.0
        for place, (told, takes) in self._shares.items():
            cost = self._protocol.cost(place)
            total += cost
            is_done = told == takes == 1.0
            done += cost * (1.0 if is_done else min(0.9, (told + arrived.get(place, 0)) / takes))
        return done / total

    def _typical_trials(self, search: Search) -> int:
        confirmed = MOST_CONFIRMED * (len(search.select_seeds) - 1)
        climbs = 1 + sum(min(2, len(allowed) - 1) for allowed in search.ranges)
        return _TYPICAL_CLIMB * climbs + confirmed + len(search.report_seeds)

    def show(self) -> None:
        """Bring the display up to date."""
        fraction = self.fraction()
        gone = time.monotonic() - self._begin
        runs = self._num_runs + len(self._arrived())
        parts = [
            LineField(f"{fraction:4.0%}", 3),
            LineField(f"{runs} runs", 1),
            LineField(f"{minutes(gone)} gone", 0),
        ]
        made = fraction - (self._fraction_found or 0.0)
        if made >= 0.02 and fraction < 1.0:
            parts.append(LineField(time_left(gone, made, 1.0 - fraction), 2))
        self.update(fraction, parts)
