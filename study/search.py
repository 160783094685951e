"""The learning-rate search at one batch size, as a pure ask-and-tell protocol.

A grid of factors sqrt(2) around a start, climbed until its best point has a worse neighbour on
either side. Every batch size of an optimizer uses the same grid, so that warm starts meet old
points. What is asked depends on results alone, never on which of two concurrent runs ended first:
the same study asks the same trials however often it is interrupted and on however many cores it
runs.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Final, NamedTuple

GRID_FACTOR: Final = math.sqrt(2.0)
FARTHEST: Final = 12
"""Grid points that a search may leave its start by: a factor of 64 in the learning rate."""


class LearningRateTrial(NamedTuple):
    """One run to make."""

    grid_point: int
    seed: int
    give_up_steps: int
    """A run that has not reached its target by then cannot beat the best so far."""


class Result(NamedTuple):
    """What a run came to."""

    steps: int | None
    """Steps to the target; None for a miss."""
    loss: float
    """The last evaluation loss; infinite or NaN where it diverged."""


class Score(NamedTuple):
    """What a learning rate is worth: lower is better."""

    steps: float
    loss: float


MISS: Final = Score(math.inf, math.inf)


@dataclass
class Search:
    """The search for the best grid point at one batch size.

    Attributes:
        start: the grid point tried first, that of a neighbouring batch size.
        most_steps: a run that needs more is a miss.
        seeds: each grid point is run once for each; its score is their upper median, so that a run
            cut short at the best score leaves every comparison as it was.
    """

    start: int
    most_steps: int
    seeds: tuple[int, ...] = (0,)
    _results: dict[tuple[int, int], Result] = field(default_factory=dict)
    _asked: dict[tuple[int, int], LearningRateTrial] = field(default_factory=dict)

    def ask(self) -> list[LearningRateTrial]:
        """The trials to run next; none while some are out, or when the search is done."""
        if self._asked:
            return []
        give_up = self.most_steps if self.missed else int(self.best_score.steps)
        trials = [
            LearningRateTrial(point, seed, give_up)
            for point in self._wanted()
            for seed in self.seeds
        ]
        self._asked = {(trial.grid_point, trial.seed): trial for trial in trials}
        return trials

    def tell(self, trial: LearningRateTrial, result: Result) -> None:
        """The result of a trial that was asked."""
        del self._asked[trial.grid_point, trial.seed]
        self._results[trial.grid_point, trial.seed] = result

    def _wanted(self) -> list[int]:
        tried = self.tried
        if not tried:
            return [self.start]
        # Nothing has reached the target yet: look farther on both sides.
        around = [tried[0], tried[-1]] if self.missed else [self.best, self.best]
        return [
            point
            for point in (around[0] - 1, around[1] + 1)
            if point not in tried and abs(point - self.start) <= FARTHEST
        ]

    @property
    def done(self) -> bool:
        return not self._asked and bool(self._results) and not self._wanted()

    @property
    def tried(self) -> list[int]:
        return sorted({point for point, _ in self._results})

    def score(self, grid_point: int) -> Score:
        """Upper median of the steps over the seeds; ties go to the lower mean loss."""
        results = [self._results[grid_point, seed] for seed in self.seeds]
        steps = [math.inf if result.steps is None else result.steps for result in results]
        median = statistics.median_high(steps)
        if median == math.inf:
            return MISS
        return Score(median, statistics.fmean(result.loss for result in results))

    @property
    def best(self) -> int:
        """The best grid point so far; of equals the lowest."""
        return min(self.tried, key=self.score)

    @property
    def best_score(self) -> Score:
        return self.score(self.best)

    @property
    def missed(self) -> bool:
        """Whether no grid point has reached the target."""
        return not self._results or self.best_score == MISS
