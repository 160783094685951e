"""The second question of a study: the best final loss after so many samples, the rate decayed.

A run of warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395) is to the bit the same until its
decay begins, whatever its budget: one *trunk* at a constant rate serves all budgets, and each has a
*branch* that resumes from it and decays over the budget's last share (`lr.decay_fraction`; a fifth
by default, which Haegele et al. 2024, arXiv:2405.18392, find enough). So a further budget costs its
decay, about a fifth of a run. The trunk is saved where a branch begins, and made piece by piece,
each from where the last one ended.

At each budget every (optimizer, batch size) has the search of the first question (`search.py`),
with the final loss in the place of the steps: select seeds choose, report seeds measure. What is
asked follows from results alone, and they from the runs on disk.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from largebatch.common.errors import ConfigError
from largebatch.conf.sweep_config import LOSS, StudyConfig
from largebatch.schedules import WSD
from largebatch.study.decisions import Decisions
from largebatch.study.protocol.protocol import STARTUP_SAMPLES, Protocol, StudyJob
from largebatch.study.protocol.search import WALL, Result, Search

TELLING: Final = 0.01
"""A final loss that is this share above the best counts as a wall, as steps 12 % above do."""
_POWER: Final = math.log(WALL) / math.log1p(TELLING)
_LOSSES: Final = (1e-20, 1e20)
"""Whose powers are numbers."""

LossPlace = tuple[str, int, int]
"""An optimizer, a batch size and a budget."""


class LossJob(NamedTuple):
    """One run: a piece of a trunk, or a branch."""

    of: StudyJob
    """Optimizer, batch size, setting and seed."""
    budget: int
    """Of the schedule."""
    begins_at: int | None
    """In samples; None: at the start."""
    ends_at: int | None
    """A piece of a trunk, where its branch begins; None: a branch, which spends its budget."""

    @property
    def optimizer(self) -> str:
        return self.of.optimizer

    @property
    def batch_size(self) -> int:
        return self.of.batch_size

    @property
    def lr(self) -> float:
        return self.of.lr

    @property
    def place(self) -> LossPlace:
        """The point it is of."""
        return *self.of.place, self.budget

    @property
    def is_trial(self) -> bool:
        """Whether its result counts by itself."""
        return self.ends_at is None

    @property
    def most_samples(self) -> int:
        """Where it ends."""
        return self.ends_at or self.budget

    @property
    def folder(self) -> str:
        """Where its record lies, below the study's folder."""
        name = f"decay-{self.budget}" if self.ends_at is None else f"trunk-{self.ends_at}"
        return f"{self.of.folder}/{name}"

    @property
    def overrides(self) -> list[str]:
        """What makes it of the study's configuration."""
        words = [*self.of.setting, f"budget.samples={self.budget}"]
        if self.begins_at is not None:
            trunk = f"{self.of.folder}/trunk-{self.begins_at}"
            words.append(f"branch_from=${{hydra:sweep.dir}}/{trunk}")
        if self.ends_at is not None:  # saved at its end, as it never comes to a multiple before
            words += [f"target.give_up_samples={self.ends_at}", "checkpoint.keep=1"]
            words.append(f"checkpoint.every_samples={10 * self.budget}")
        return [*words, f"hydra.sweep.subdir={self.folder}"]


@dataclass
class LossProtocol:
    """Ask for jobs, tell their results, until `done`.

    Attributes:
        curve: the learning rate's, the same for all budgets.
        protocols: at each budget the first question's, told losses.

    Raises:
        ConfigError: a curve that has no stable phase, or budgets too small for a batch size.
    """

    study: StudyConfig
    optimizers: Mapping[str, Mapping[str, Any]]
    curve: WSD
    protocols: dict[int, Protocol] = field(init=False)
    _open: list[tuple[int, StudyJob]] = field(default_factory=list)
    """Asked for at a budget, and not told."""
    _out: set[str] = field(default_factory=set)
    _trunks: dict[str, Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_budgets()
        self.protocols = {
            budget: Protocol(self.study, self.optimizers, budget) for budget in self.study.budgets
        }

    def branch_point(self, budget: int) -> int:
        """Where the decay of a budget begins, in samples."""
        return budget - self.curve.decaying(budget)

    def ask(self) -> list[LossJob]:
        """Every job that can run now and is not out yet, the longest first."""
        jobs, is_settled = dict[str, LossJob](), False
        while not is_settled:
            for budget, one in self.protocols.items():
                self._open += [(budget, job) for job in one.ask()]
            is_settled = True
            for budget, of in [*self._open]:
                job = self._next(budget, of)
                if job is None:  # its trunk has diverged; what is asked next may be known too
                    self._close(budget, of, Result(None, math.inf))
                    is_settled = False
                elif job.folder not in self._out:
                    jobs[job.folder] = job
        self._out |= jobs.keys()
        return sorted(jobs.values(), key=lambda job: job.most_samples, reverse=True)

    def tell(self, job: LossJob, result: Result) -> None:
        """The result of a job.

        Raises:
            ConfigError: a final loss that is not above 0, which has no ratio to others.
        """
        self._out.remove(job.folder)
        if not job.is_trial:
            self._trunks[job.folder] = result
            return
        if result.loss <= 0:
            raise ConfigError(
                f"study.protocol={LOSS} compares losses by their ratio, and {job.folder} ended at "
                f"{result.loss:g}: they must be above 0"
            )
        self._close(job.budget, job.of, Result(cost_of(result.loss), result.loss))

    @property
    def places(self) -> list[LossPlace]:
        return [(*place, budget) for budget, one in self.protocols.items() for place in one.places]

    @property
    def searches(self) -> dict[LossPlace, Search]:
        """Of every place, as far as opened."""
        return {
            (*place, budget): search
            for budget, one in self.protocols.items()
            for place, search in one.searches.items()
        }

    def cost(self, place: LossPlace) -> float:
        """What a point costs, beside others."""
        _, batch_size, budget = place
        return budget * (1 + STARTUP_SAMPLES / batch_size)

    @property
    def done(self) -> bool:
        return all(one.done for one in self.protocols.values())

    def decisions(self) -> Decisions:
        """What is decided so far, for the report."""
        all_of = {budget: one.decisions() for budget, one in self.protocols.items()}
        points = [
            replace(point, budget=budget)
            for budget, decisions in all_of.items()
            for point in decisions.points.values()
        ]
        first = next(iter(all_of.values()))
        return replace(first, points={point.place: point for point in points}, same_rules=())

    def _close(self, budget: int, of: StudyJob, result: Result) -> None:
        self._open.remove((budget, of))
        self.protocols[budget].tell(of, result)

    def _next(self, budget: int, of: StudyJob) -> LossJob | None:
        """The first run that a branch still waits for, itself at last; None: its trunk diverged."""
        begins_at = None
        for piece in self._pieces(budget, of):
            told = self._trunks.get(piece.folder)
            if told is None:
                return piece
            if not math.isfinite(told.loss):
                return None
            begins_at = piece.ends_at
        return LossJob(of, budget, begins_at, None)

    def _pieces(self, budget: int, of: StudyJob) -> Iterator[LossJob]:
        begins_at = None
        for earlier in self.study.budgets:
            if earlier <= budget:
                ends_at = self.branch_point(earlier)
                yield LossJob(of, earlier, begins_at, ends_at)
                begins_at = ends_at

    def _check_budgets(self) -> None:
        largest = self.study.batch_sizes[-1]
        before = 0
        for budget in self.study.budgets:
            self.curve.check(budget)
            point, decay = self.branch_point(budget), self.curve.decaying(budget)
            if min(decay, point - before) < largest:
                raise ConfigError(
                    f"study.budgets: the decay to {budget:,} samples begins at {point:,} and takes "
                    f"{decay:,}, and a step of batch {largest:,} could pass by one of them or by "
                    "the branch before: take larger budgets, farther apart, or smaller batch sizes"
                )
            before = point


def cost_of(loss: float) -> float | None:
    """What a search makes small in the place of steps; None: the run diverged.

    >>> [round(cost_of(loss) / cost_of(2.0), 2) for loss in (2.0, 2.02, 1.98)]
    [1.0, 1.12, 0.89]
    """
    if not math.isfinite(loss):
        return None
    return float(min(max(loss, _LOSSES[0]), _LOSSES[1]) ** _POWER)
