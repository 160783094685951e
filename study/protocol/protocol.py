"""A whole study as one ask-and-tell protocol: a search for each (optimizer, batch size), and the
rules.

The search at `start_batch` begins at the optimizer's own learning rate; the others follow outwards,
each from the best setting of the neighbour nearer to the start, its rate moved by half of what the
square-root rule says, and by a grid point at least: optima move by something between nothing and
that rule. Where keys beside the rate are tuned, that is at `start_batch` and at the largest batch;
the sizes between try what lies from the one to the other, those below take what was found at
`start_batch` (see `tuned_keys.py`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from largebatch.conf.sweep_config import StudyConfig
from largebatch.schedules.scaling import scale_lr
from largebatch.study.decisions import Decision, Decisions, SameRule
from largebatch.study.protocol.search import (
    GRID_FACTOR,
    Result,
    Search,
    SearchTrial,
    Setting,
    Values,
)
from largebatch.study.protocol.tuned_keys import TunedKey, tuned_keys

HOPE: Final = 1.3
"""A search's first runs are cut at this many times the steps that its neighbour leaves to hope."""


class StudyJob(NamedTuple):
    """One run of a study."""

    optimizer: str
    batch_size: int
    trial: SearchTrial
    lr: float
    """Learning rate at `base_batch`."""
    tuned: tuple[tuple[str, float, str], ...] = ()
    """Of each key that is tuned beside the rate: its name, its value, the override."""
    rule: str = "none"
    base_batch: int | None = None
    """Where `rule` scales from; None for a tuned learning rate."""

    @property
    def place(self) -> "Place":
        """The point it is of."""
        return self.optimizer, self.batch_size

    @property
    def is_trial(self) -> bool:
        """Whether its result counts by itself."""
        return True

    @property
    def folder(self) -> str:
        """Where its record lies, below the study's folder."""
        how = f"lr-{self.lr:.4g}" if self.base_batch is None else f"{self.rule}-{self.base_batch}"
        how += "".join(f"-{name}-{value:g}" for name, value, _ in self.tuned)
        return f"{self.optimizer}/batch-{self.batch_size}/{how}/seed-{self.trial.seed}"

    @property
    def setting(self) -> list[str]:
        """The overrides of the optimizer's setting, the batch size and the seed."""
        scaling = [f"scaling={self.rule}", f"scaling.base_batch={self.base_batch}"]
        return [
            f"optim={self.optimizer}",
            f"batch.size={self.batch_size}",
            f"optim.lr={self.lr!r}",
            *(override for _, _, override in self.tuned),
            *(scaling if self.base_batch is not None else ["scaling=none"]),
            f"seed={self.trial.seed}",
        ]

    @property
    def overrides(self) -> list[str]:
        """What makes it of the study's configuration."""
        return [
            *self.setting,
            f"target.give_up_samples={self.most_samples}",
            f"hydra.sweep.subdir={self.folder}",
        ]

    @property
    def most_samples(self) -> int:
        """The most it can cost."""
        return self.trial.give_up_steps * self.batch_size


Place = tuple[str, int]
"""An optimizer and a batch size."""

STARTUP_SAMPLES: Final = 4_000
"""A point's cost grows with its batch size from about this many samples' worth of overhead."""


@dataclass
class Protocol:
    """Ask for jobs, tell their results, until `done`.

    Attributes:
        optimizers: each one's configuration; its learning rate is the origin of its grid.
        budget_samples: a run that needs more is a miss.
        searches: of every place, as far as opened.
    """

    study: StudyConfig
    optimizers: Mapping[str, Mapping[str, Any]]
    budget_samples: int
    searches: dict[Place, Search] = field(default_factory=dict)
    keys: dict[str, tuple[TunedKey, ...]] = field(init=False)
    _rules_asked: set[Place] = field(default_factory=set)
    _rules_reached: dict[tuple[str, int, str], bool] = field(default_factory=dict)
    """Of an optimizer, a batch size and a rule: whether the first report seed reached the target,
    once it is known; the others follow then, and the entry goes."""

    def __post_init__(self) -> None:
        self.keys = {
            name: tuned_keys(config, self.study.search) for name, config in self.optimizers.items()
        }

    def ask(self) -> list[StudyJob]:
        """Every job that can run now, the costliest first (the last to end is a short one)."""
        self._open_searches()
        jobs = [
            self._job(optimizer, batch_size, trial)
            for (optimizer, batch_size), search in self.searches.items()
            for trial in search.ask()
        ]
        jobs += [job for optimizer in self.study.optimizers for job in self._rule_jobs(optimizer)]
        return sorted(jobs, key=lambda job: job.most_samples, reverse=True)

    def tell(self, job: StudyJob, result: Result) -> None:
        """The result of a job; that of a rule decides whether its other seeds are run."""
        if job.base_batch is None:
            self.searches[job.optimizer, job.batch_size].tell(job.trial, result)
        elif job.trial.seed == self._rule_seeds[0]:
            rule = job.optimizer, job.batch_size, job.rule
            self._rules_reached[rule] = result.steps is not None

    @property
    def places(self) -> list[Place]:
        return [
            (optimizer, batch_size)
            for optimizer in self.study.optimizers
            for batch_size in self.study.batch_sizes
        ]

    def cost(self, place: Place) -> float:
        """What a point costs, beside others."""
        return place[1] + STARTUP_SAMPLES

    @property
    def done(self) -> bool:
        return all(place in self.searches and self.searches[place].done for place in self.places)

    def lr(self, optimizer: str, grid_point: int) -> float:
        """The learning rate of a grid point."""
        return float(f"{self.optimizers[optimizer]['lr'] * GRID_FACTOR**grid_point:.6g}")

    def values(self, optimizer: str, setting: Setting) -> dict[str, float]:
        """The values of a setting by name: the rate, and what is tuned beside it."""
        keys = self.keys[optimizer]
        return {"lr": self.lr(optimizer, setting.grid_point)} | {
            key.name: key.grid[place] for key, place in zip(keys, setting.values, strict=True)
        }

    def decisions(self) -> Decisions:
        """What is decided so far, for the report."""
        points = [
            Decision(
                optimizer,
                batch_size,
                None if search.chosen is None else self.values(optimizer, search.chosen),
                tuple(self.values(optimizer, setting) for setting in search.dropped),
                *search.open_sides,
                search.num_trials,
            )
            for (optimizer, batch_size), search in self.searches.items()
            if search.done
        ]
        base = self.study.batch_sizes[0]
        return Decisions(
            tuple(self.study.select_seeds),
            tuple(self.study.report_seeds),
            {name: tuple(key.name for key in keys) for name, keys in self.keys.items()},
            {point.place: point for point in points},
            tuple(
                SameRule(optimizer, rule, base, batch_size)
                for optimizer, batch_size in sorted(self._rules_asked)
                for rule in self.study.rules
                if self.same_as_tuned(optimizer, rule, batch_size)
            ),
        )

    def same_as_tuned(self, optimizer: str, rule: str, batch_size: int) -> bool:
        """Whether a rule's rate is the tuned one, so that its runs are those that are there."""
        ends = [self.searches[optimizer, size] for size in (self.study.batch_sizes[0], batch_size)]
        base, tuned = ends[0].chosen, ends[1].chosen
        if rule not in ("sqrt", "linear") or base is None or tuned is None:
            return False
        rate = scale_lr(
            self.lr(optimizer, base.grid_point), self.study.batch_sizes[0], batch_size, rule
        )
        close = abs(rate / self.lr(optimizer, tuned.grid_point) - 1) < 1e-3
        return close and base.values == tuned.values

    def _job(
        self, optimizer: str, batch_size: int, trial: SearchTrial, rule: str = "none",
        base_batch: int | None = None,
    ) -> StudyJob:  # fmt: skip
        tuned = tuple(
            (key.name, key.grid[place], key.override(key.grid[place]))
            for key, place in zip(self.keys[optimizer], trial.setting.values, strict=True)
        )
        lr = self.lr(optimizer, trial.setting.grid_point)
        return StudyJob(optimizer, batch_size, trial, lr, tuned, rule, base_batch)

    def _open_searches(self) -> None:
        for optimizer in self.study.optimizers:
            for batch_size, neighbour in self._order(optimizer):
                if (optimizer, batch_size) in self.searches:
                    continue
                before = None if neighbour is None else self._done(optimizer, neighbour)
                if neighbour is not None and before is None:
                    continue
                ranges = self._ranges(optimizer, batch_size)
                if ranges is not None:
                    self.searches[optimizer, batch_size] = self._search(
                        optimizer, batch_size, before, neighbour, ranges
                    )

    @property
    def _tuned_at(self) -> tuple[int, int]:
        """The batch sizes at which keys beside the rate are tuned."""
        return self.study.start_batch, self.study.batch_sizes[-1]

    def _ranges(self, optimizer: str, batch_size: int) -> tuple[range, ...] | None:
        """Of each tuned key, the places on its grid that a search may take; None until known."""
        keys = self.keys[optimizer]
        if not keys or batch_size in self._tuned_at:
            return tuple(range(len(key.grid)) for key in keys)
        ends = [self._values_at(optimizer, size) for size in self._tuned_at]
        if batch_size < self.study.start_batch:
            ends[1] = ends[0]
        if ends[0] is None or ends[1] is None:
            return None
        pairs = zip(ends[0], ends[1], strict=True)
        return tuple(range(min(pair), max(pair) + 1) for pair in pairs)

    def _values_at(self, optimizer: str, batch_size: int) -> Values | None:
        """The values found at a batch size, once its search is done."""
        search = self._done(optimizer, batch_size)
        return None if search is None else (search.chosen or search.best or search.start).values

    def _done(self, optimizer: str, batch_size: int) -> Search | None:
        """The search at a batch size, once it is done."""
        search = self.searches.get((optimizer, batch_size))
        return search if search is not None and search.done else None

    def _search(
        self, optimizer: str, batch_size: int, before: Search | None, neighbour: int | None,
        ranges: tuple[range, ...],
    ) -> Search:  # fmt: skip
        keys = self.keys[optimizer]
        own = tuple(key.start for key in keys)
        start, most_steps = Setting(0, own), self.budget_samples // batch_size
        climb_steps = most_steps
        if before is not None and neighbour is not None:
            start = before.best or before.start
            if before.best is not None:
                doublings = math.log2(batch_size / neighbour)
                moved = math.copysign(max(1, round(abs(doublings) / 2)), doublings)
                start = start._replace(grid_point=start.grid_point + int(moved))
                # Of what would be no gain (larger) or perfect scaling (smaller) more is hopeless.
                worst = max(1.0, neighbour / batch_size) * before.best_steps
                climb_steps = math.ceil(HOPE * worst)
                most_steps = min(most_steps, int(2 * worst))
        allowed = zip(start.values, ranges, strict=True)
        values = tuple(min(max(value, places[0]), places[-1]) for value, places in allowed)
        moves = zip(keys, values, start.values, strict=True)
        shift = sum(key.shifts[to] - key.shifts[since] for key, to, since in moves)
        start = Setting(start.grid_point + shift, values)
        return Search(
            start,
            max(1, most_steps),
            tuple(self.study.select_seeds),
            tuple(self.study.report_seeds),
            ranges=ranges,
            shifts=tuple(key.shifts for key in keys),
            most_trials=self.study.most_trials,
            climb_steps=max(1, min(climb_steps, most_steps)),
        )

    def _order(self, optimizer: str) -> Iterator[tuple[int, int | None]]:
        """Each batch size with the one that its search starts from."""
        sizes, start = self.study.batch_sizes, self.study.start_batch
        middle = sizes.index(start)
        outwards = [
            (start, None),
            *((sizes[i], sizes[i - 1]) for i in range(middle + 1, len(sizes))),
            *((sizes[i], sizes[i + 1]) for i in range(middle - 1, -1, -1)),
        ]
        if not self.keys[optimizer] or start == sizes[-1]:
            yield from outwards
            return
        yield from ((size, start if size == sizes[-1] else since) for size, since in outwards)

    def _rule_jobs(self, optimizer: str) -> Iterator[StudyJob]:
        """The rules from the smallest batch's chosen rate, where both ends are known: the first
        report seed, and where it reaches the target the others.
        """
        base = self.study.batch_sizes[0]
        for batch_size in self.study.rule_batches:
            ends = [self.searches.get((optimizer, size)) for size in (base, batch_size)]
            if batch_size == base or any(search is None or not search.done for search in ends):
                continue
            is_new = (optimizer, batch_size) not in self._rules_asked
            self._rules_asked.add((optimizer, batch_size))
            chosen = None if ends[0] is None else ends[0].chosen
            if chosen is None or ends[1] is None or ends[1].chosen is None:
                continue
            give_up = max(1, int(2 * ends[1].best_steps))
            for rule in self.study.rules:
                seeds = self._rule_seeds[:1] if is_new else []
                if self._rules_reached.pop((optimizer, batch_size, rule), False):
                    seeds = self._rule_seeds[1:]
                if self.same_as_tuned(optimizer, rule, batch_size):
                    continue
                for seed in seeds:
                    yield self._job(
                        optimizer, batch_size, SearchTrial(chosen, seed, give_up), rule, base
                    )

    @property
    def _rule_seeds(self) -> list[int]:
        return self.study.report_seeds or self.study.select_seeds[:1]
