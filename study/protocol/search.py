"""The search at one batch size, as a pure ask-and-tell protocol: climb, confirm, report.

Selecting seeds choose the setting; report seeds, which had no say in it, measure it.

1. *Climb* on the first selecting seed: a grid of rates a factor sqrt(2) apart is walked until on
   either side a rate is a wall, that is misses or needs over 12 % more steps than the best. Ties
   and noise are walked over. Where a study tunes further keys (momentum), each of their values
   around the best has a climb of its own.
2. *Confirm*: of what lies within 12 % of the best, at most three settings run the other selecting
   seeds. Chosen is the least mean of log steps among those that reach the target on all.
3. *Report*: the report seeds at the chosen setting. Where one of them misses, all move to the next
   lower rate.

Every batch size of an optimizer uses the same grid, so that warm starts meet old points. What is
asked depends on results alone, never on which of two concurrent runs ended first: the same study
asks the same trials however often it is interrupted and on however many cores it runs.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

GRID_FACTOR: Final = math.sqrt(2.0)
FARTHEST: Final = 12
"""Grid points that a search may leave its start by: a factor of 64 in the learning rate."""
WALL: Final = 1.12
"""A rate that needs this many times the best's steps ends the climb on its side."""
BEYOND: Final = 3
"""Rates beyond the best that a side without a wall is walked."""
CUT: Final = 1.15
"""A run is cut at this many times the best's steps: behind the wall, it can only lose."""
MOST_CONFIRMED: Final = 3

Values = tuple[int, ...]
"""Of the keys that are tuned beside the rate, each value's place on its own grid."""


class Setting(NamedTuple):
    """What a search chooses: a rate by its grid point, and the values of further keys."""

    grid_point: int
    values: Values = ()


class SearchTrial(NamedTuple):
    """One run to make."""

    setting: Setting
    seed: int
    give_up_steps: int
    """A run that has not reached its target by then ends."""


class Result(NamedTuple):
    """What a run came to."""

    steps: float | None
    """Steps to the target, between evaluations interpolated; None where it was not reached."""
    loss: float = math.inf
    """The last evaluation loss; infinite or NaN where it diverged."""


@dataclass
class Search:
    """The search for the best setting at one batch size.

    Attributes:
        start: the setting tried first, that of a neighbouring batch size.
        most_steps: a run that needs more is a miss.
        select_seeds: choose the setting, the first by climbing, the others by confirming.
        report_seeds: measure it; none: the selecting seeds' own runs are all there is.
        ranges: of each tuned key, the places on its grid that the climb may take.
        shifts: of each tuned key and value, how many grid points of the rate it moves the start by,
            so that one value's best rate is a start for the next.
        most_trials: of the climb, which ends where they are spent.
        climb_steps: at which its runs are cut as long as none has reached the target; None: at
            `most_steps`.
    """

    start: Setting
    most_steps: int
    select_seeds: tuple[int, ...] = (0,)
    report_seeds: tuple[int, ...] = ()
    ranges: tuple[range, ...] = ()
    shifts: tuple[tuple[int, ...], ...] = ()
    most_trials: int = 64
    climb_steps: int | None = None
    _results: dict[tuple[Setting, int], Result] = field(default_factory=dict)
    _asked: set[tuple[Setting, int]] = field(default_factory=set)
    _cut: set[tuple[Setting, int]] = field(default_factory=set)
    """Results of runs that gave up before `most_steps`: not the best, and no misses."""

    def ask(self) -> list[SearchTrial]:
        """The trials to run next; none while some are out, or when the search is done."""
        return [] if self._asked else self._send(self._wanted())

    def tell(self, trial: SearchTrial, result: Result) -> None:
        """The result of a trial that was asked."""
        run = trial.setting, trial.seed
        self._asked.remove(run)
        self._results[run] = result
        self._cut.discard(run)
        if (
            result.steps is None
            and result.loss < math.inf
            and trial.give_up_steps < self.most_steps
        ):
            self._cut.add(run)

    @property
    def done(self) -> bool:
        return not self._asked and bool(self._results) and not self._wanted()

    @property
    def missed(self) -> bool:
        """Whether no setting has reached the target on the first seed."""
        return self.best is None

    @property
    def best(self) -> Setting | None:
        """The best of the climb; of equals the one of least loss, then the nearest to the start."""
        return min(self._reached(), key=self._order, default=None)

    @property
    def best_steps(self) -> float:
        """The steps of the climb's best setting; infinity where all missed."""
        return math.inf if self.best is None else self._climbed(self.best)

    @property
    def chosen(self) -> Setting | None:
        """The setting that is reported; None where no setting reaches the target on all seeds."""
        for setting in self._reportable():
            if self._reaches(setting, self.report_seeds):
                return setting
        return None

    @property
    def dropped(self) -> list[Setting]:
        """The settings that were to be reported, and missed the target on a report seed."""
        return [
            setting
            for setting in self._reportable()
            if not self._missing(setting, self.report_seeds)
            and not self._reaches(setting, self.report_seeds)
        ]

    @property
    def open_sides(self) -> tuple[bool, bool]:
        """Whether the climb at the best setting's values found no wall below, and above it."""
        if self.best is None:
            return True, True
        walls = [
            rate - self.best.grid_point
            for rate in self._rates(self.best.values)
            if self._is_wall(Setting(rate, self.best.values), self.best)
        ]
        return not any(wall < 0 for wall in walls), not any(wall > 0 for wall in walls)

    @property
    def num_trials(self) -> int:
        """Told so far."""
        return len(self._results)

    @property
    def is_spent(self) -> bool:
        """Whether the trials of the climb are used up."""
        return sum(seed == self.select_seeds[0] for _, seed in self._results) >= self.most_trials

    def _send(self, wanted: Sequence[tuple[Setting, int, int]]) -> list[SearchTrial]:
        self._asked = {(setting, seed) for setting, seed, _ in wanted}
        return [SearchTrial(setting, seed, steps) for setting, seed, steps in wanted]

    def _wanted(self) -> list[tuple[Setting, int, int]]:
        """What comes next: more of the climb, else of the confirmation, else of the report."""
        if not self.is_spent and (climb := list(self._climb())):
            give_up = self.climb_steps or self.most_steps
            if self.best is not None:
                give_up = min(self.most_steps, math.ceil(CUT * self.best_steps))
            return [(setting, self.select_seeds[0], give_up) for setting in climb]
        seeds = self.select_seeds
        if confirm := [m for setting in self._to_confirm() for m in self._missing(setting, seeds)]:
            return confirm
        for setting in self._reportable():
            if missing := self._missing(setting, self.report_seeds):
                return missing
            if self._reaches(setting, self.report_seeds):
                break
        return []

    def _missing(self, setting: Setting, seeds: Sequence[int]) -> list[tuple[Setting, int, int]]:
        return [
            (setting, seed, self.most_steps)
            for seed in seeds
            if (setting, seed) not in self._results or (setting, seed) in self._cut
        ]

    def _climb(self) -> Iterator[Setting]:
        """The settings that the climb asks next; empty at its end."""
        if not self._results:
            yield self.start
            return
        best = self.best
        if best is None:  # nothing has reached the target yet: look farther on both sides
            yield from self._around(self.start.values, FARTHEST)
            return
        yield from (walk := list(self._walk(best)))
        if walk:
            return
        for place, allowed in enumerate(self.ranges):
            for value in (best.values[place] - 1, best.values[place] + 1):
                if value in allowed:
                    yield from self._climb_at(best, place, value)

    def _climb_at(self, best: Setting, place: int, value: int) -> Iterator[Setting]:
        """The climb at a neighbour of the best setting's values."""
        values = (*best.values[:place], value, *best.values[place + 1 :])
        rates = self._rates(values)
        if not rates:
            shift = self.shifts[place]
            yield Setting(best.grid_point + shift[value] - shift[best.values[place]], values)
            return
        near = [
            setting
            for setting in self._reached()
            if setting.values == values and self._climbed(setting) <= CUT * self.best_steps
        ]
        if near:
            yield from self._walk(min(near, key=self._order), beyond=1)
        else:
            yield from self._around(values, 1)

    def _around(self, values: Values, farthest: int) -> Iterator[Setting]:
        """The next rates to both sides of those tried at `values`, all of which missed."""
        rates = self._rates(values)
        middle = (
            self.start.grid_point if values == self.start.values else (rates[0] + rates[-1]) / 2
        )
        for rate in (rates[0] - 1, rates[-1] + 1):
            if abs(rate - middle) <= farthest:
                yield Setting(rate, values)

    def _walk(self, top: Setting, beyond: int = BEYOND) -> Iterator[Setting]:
        """The next rates on the sides of `top` that have no wall yet."""
        rates = self._rates(top.values)
        for way in (-1, 1):
            side = [rate for rate in rates if (rate - top.grid_point) * way > 0]
            farthest = max((abs(rate - top.grid_point) for rate in side), default=0)
            walled = any(self._is_wall(Setting(rate, top.values), top) for rate in side)
            next_rate = top.grid_point + way * (farthest + 1)
            reachable = abs(next_rate - self.start.grid_point) <= FARTHEST
            if not walled and farthest < beyond and reachable:
                yield Setting(next_rate, top.values)

    def _is_wall(self, setting: Setting, top: Setting) -> bool:
        return self._climbed(setting) > WALL * self._climbed(top)

    def _to_confirm(self) -> list[Setting]:
        """At most three settings near the best; where none reaches on all seeds, lower rates."""
        if self.best is None:
            return []
        near = [s for s in self._in_order() if self._climbed(s) <= WALL * self.best_steps]
        near = near[:MOST_CONFIRMED]
        if any(self._is_confirmed(setting) is not False for setting in near):
            return near
        lowest = min(setting.grid_point for setting in near)
        for setting in self._down_from(Setting(lowest - 1, self.best.values)):
            near.append(setting)
            if self._is_confirmed(setting) is not False:
                break
        return near

    def _down_from(self, setting: Setting) -> list[Setting]:
        lowest = self.start.grid_point - FARTHEST
        return [Setting(rate, setting.values) for rate in range(setting.grid_point, lowest - 1, -1)]

    def _is_confirmed(self, setting: Setting) -> bool | None:
        """Whether all selecting seeds reach the target; None: not known yet."""
        if any(
            result.steps is None and (tried, seed) not in self._cut
            for (tried, seed), result in self._results.items()
            if tried == setting and seed in self.select_seeds
        ):
            return False
        return True if self._reaches(setting, self.select_seeds) else None

    def _reaches(self, setting: Setting, seeds: Sequence[int]) -> bool:
        """Whether the runs of all these seeds are there and have reached the target."""
        return all(self._steps(setting, seed) < math.inf for seed in seeds)

    def _reportable(self) -> list[Setting]:
        """The setting that the selecting seeds choose, then lower rates, descending."""
        eligible = [s for s in self._to_confirm() if self._is_confirmed(s)]
        if not eligible:
            return []
        return self._down_from(min(eligible, key=self._mean_log_steps))

    def _mean_log_steps(self, setting: Setting) -> tuple[float, Setting]:
        steps = [math.log(self._steps(setting, seed)) for seed in self.select_seeds]
        return statistics.fmean(steps), setting

    def _in_order(self) -> list[Setting]:
        return sorted(self._reached(), key=self._order)

    def _reached(self) -> list[Setting]:
        first = self.select_seeds[0]
        return [
            s for (s, seed), r in self._results.items() if seed == first and r.steps is not None
        ]

    def _rates(self, values: Values) -> list[int]:
        """The grid points tried at `values`, ascending."""
        return sorted({s.grid_point for s, _ in self._results if s.values == values})

    def _climbed(self, setting: Setting) -> float:
        return self._steps(setting, self.select_seeds[0])

    def _steps(self, setting: Setting, seed: int) -> float:
        result = self._results.get((setting, seed))
        return math.inf if result is None or result.steps is None else result.steps

    def _order(self, setting: Setting) -> tuple[float, float, int, Setting]:
        loss = self._results[setting, self.select_seeds[0]].loss
        return (
            self._climbed(setting),
            loss,
            abs(setting.grid_point - self.start.grid_point),
            setting,
        )
