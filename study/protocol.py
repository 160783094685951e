"""A whole study as one ask-and-tell protocol: a search for each (optimizer, batch size), and the
rules.

The search at `start_batch` begins at the optimizer's own learning rate; the others follow outwards,
each from the best learning rate of the neighbour nearer to the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from largebatch.conf.sweep_config import StudyConfig
from largebatch.study.search import GRID_FACTOR, LearningRateTrial, Result, Search


class StudyJob(NamedTuple):
    """One run of a study."""

    optimizer: str
    batch_size: int
    trial: LearningRateTrial
    lr: float
    """Learning rate at `base_batch`."""
    rule: str = "none"
    base_batch: int | None = None
    """Where `rule` scales from; None for a tuned learning rate."""

    @property
    def folder(self) -> str:
        """Where its record lies, below the study's folder."""
        how = f"lr-{self.lr:.4g}" if self.base_batch is None else f"{self.rule}-{self.base_batch}"
        return f"{self.optimizer}/batch-{self.batch_size}/{how}/seed-{self.trial.seed}"

    @property
    def overrides(self) -> list[str]:
        """What makes it of the study's configuration."""
        scaling = [f"scaling={self.rule}", f"scaling.base_batch={self.base_batch}"]
        return [
            f"optim={self.optimizer}",
            f"batch.size={self.batch_size}",
            f"optim.lr={self.lr!r}",
            *(scaling if self.base_batch is not None else ["scaling=none"]),
            f"seed={self.trial.seed}",
            f"target.give_up_samples={self.trial.give_up_steps * self.batch_size}",
            f"hydra.sweep.subdir={self.folder}",
        ]

    @property
    def most_samples(self) -> int:
        """The most it can cost."""
        return self.trial.give_up_steps * self.batch_size


Place = tuple[str, int]
"""An optimizer and a batch size."""


@dataclass
class Protocol:
    """Ask for jobs, tell their results, until `done`.

    Attributes:
        start_lrs: each optimizer's own learning rate, the origin of its grid.
        budget_samples: a run that needs more is a miss.
    """

    study: StudyConfig
    start_lrs: dict[str, float]
    budget_samples: int
    searches: dict[Place, Search] = field(default_factory=dict)
    _rules_asked: dict[Place, bool] = field(default_factory=dict)

    def ask(self) -> list[StudyJob]:
        """Every job that can run now, the costliest first (the last to end is a short one)."""
        self._open_searches()
        jobs = [
            StudyJob(optimizer, batch_size, trial, self._lr(optimizer, trial.grid_point))
            for (optimizer, batch_size), search in self.searches.items()
            for trial in search.ask()
        ]
        jobs += [job for optimizer in self.study.optimizers for job in self._rule_jobs(optimizer)]
        return sorted(jobs, key=lambda job: job.most_samples, reverse=True)

    def tell(self, job: StudyJob, result: Result) -> None:
        """The result of a job; those of rules decide nothing, the report reads their records."""
        if job.base_batch is None:
            self.searches[job.optimizer, job.batch_size].tell(job.trial, result)

    @property
    def places(self) -> list[Place]:
        return [
            (optimizer, batch_size)
            for optimizer in self.study.optimizers
            for batch_size in self.study.batch_sizes
        ]

    @property
    def done(self) -> bool:
        return all(place in self.searches and self.searches[place].done for place in self.places)

    def _lr(self, optimizer: str, grid_point: int) -> float:
        return float(f"{self.start_lrs[optimizer] * GRID_FACTOR**grid_point:.6g}")

    def _open_searches(self) -> None:
        seeds = tuple(self.study.seeds)
        for optimizer in self.study.optimizers:
            for batch_size, neighbour in self._outwards():
                if (optimizer, batch_size) in self.searches:
                    continue
                most_steps, start = self.budget_samples // batch_size, 0
                if neighbour is not None:
                    before = self.searches.get((optimizer, neighbour))
                    if before is None or not before.done:
                        continue
                    start = before.start if before.missed else before.best
                    if not before.missed:
                        # Twice what would be no gain (larger) or perfect scaling (smaller) is
                        # hopeless.
                        scaling = max(1.0, neighbour / batch_size)
                        most_steps = min(most_steps, int(2 * scaling * before.best_score.steps))
                self.searches[optimizer, batch_size] = Search(start, max(1, most_steps), seeds)

    def _outwards(self) -> Iterator[tuple[int, int | None]]:
        """Each batch size with its neighbour nearer to the start."""
        sizes, middle = self.study.batch_sizes, self.study.batch_sizes.index(self.study.start_batch)
        yield sizes[middle], None
        yield from ((sizes[i], sizes[i - 1]) for i in range(middle + 1, len(sizes)))
        yield from ((sizes[i], sizes[i + 1]) for i in range(middle - 1, -1, -1))

    def _rule_jobs(self, optimizer: str) -> Iterator[StudyJob]:
        """The rules from the smallest batch's best learning rate, where both ends are known."""
        base = self.study.batch_sizes[0]
        for batch_size in self.study.rule_batches:
            ends = [self.searches.get((optimizer, size)) for size in (base, batch_size)]
            known = [search for search in ends if search is not None and search.done]
            asked = self._rules_asked.get((optimizer, batch_size), batch_size == base)
            if asked or len(known) < 2 or any(search.missed for search in known):
                continue
            self._rules_asked[optimizer, batch_size] = True
            give_up = int(2 * known[1].best_score.steps)
            for rule in self.study.rules:
                for seed in self.study.seeds:
                    trial = LearningRateTrial(known[0].best, seed, give_up)
                    lr = self._lr(optimizer, trial.grid_point)
                    yield StudyJob(optimizer, batch_size, trial, lr, rule, base)
