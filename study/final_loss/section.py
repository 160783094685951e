"""What runs of one task and data say about final losses: budget by budget, curve by curve."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from largebatch.study.curves import curves_of
from largebatch.study.decisions import Decisions
from largebatch.study.final_loss.points import LossPoint, has_spent, loss_points
from largebatch.study.reading import RunSummary
from largebatch.study.statistics.losses import (
    LossDifference,
    LossPair,
    MeanLoss,
    SeedLoss,
    batch_excess,
    loss_means,
    loss_pairs,
)

_UNREACHED = 1.0
"""Where curves are put in order, a batch size that one lacks counts as so much above the least."""


@dataclass(frozen=True)
class BudgetStudy:
    """One budget, everything by the name of the curve, the one of least loss first.

    Attributes:
        means: with their intervals.
        pairs: each two curves, the later in order less the earlier.
        excess: of each curve, its other batch sizes less the best one.
    """

    budget: int
    points: Mapping[str, Sequence[LossPoint]]
    means: Mapping[str, Sequence[MeanLoss]]
    pairs: Sequence[LossPair]
    excess: Mapping[str, Sequence[LossDifference]]

    @property
    def names(self) -> list[str]:
        return list(self.points)

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({point.batch_size for own in self.points.values() for point in own})

    def mean(self, curve: str, batch_size: int) -> MeanLoss | None:
        """A point's loss with its interval; None where there is none, or it diverged."""
        found = (one for one in self.means.get(curve, ()) if one.batch_size == batch_size)
        return next(found, None)

    def over_best(self, curve: str, batch_size: int) -> LossDifference | None:
        """A point's loss less that at the curve's best batch size; None there."""
        found = (one for one in self.excess.get(curve, ()) if one.batch_size == batch_size)
        return next(found, None)

    def pair(self, curve: str, other: str) -> LossPair | None:
        """`curve` less `other`, which comes before it."""
        found = (one for one in self.pairs if (one.optimizer, one.other) == (curve, other))
        return next(found, None)


@dataclass(frozen=True)
class LossSection:
    """Final losses of one task and data set, the budgets in ascending order."""

    task: str
    data_hash: str | None
    curves: Sequence[tuple[str, str]]
    """Of each curve its name and its optimizer."""
    budgets: Sequence[BudgetStudy]
    select_seeds: tuple[int, ...]
    runs: Sequence[RunSummary]
    """All of them, trunks too."""

    @property
    def title(self) -> str:
        """What was measured."""
        listed = " and ".join(f"{one.budget:,}" for one in self.budgets)
        return f"{self.task}: final loss after {listed} samples"

    @cached_property
    def all_points(self) -> list[LossPoint]:
        """Of all budgets and curves."""
        return [point for one in self.budgets for own in one.points.values() for point in own]

    @property
    def has_intervals(self) -> bool:
        return any(
            mean.loss.low is not None
            for one in self.budgets
            for own in one.means.values()
            for mean in own
        )


Source = tuple[str, Sequence[RunSummary], Decisions]
"""Of one folder its name, its runs without a target, and what its study decided."""


def loss_sections(sources: Iterable[Source]) -> list[LossSection]:
    """The sections that runs which have spent their budgets make up, in order of task. Curves of a
    later folder that are called as one before are named by their folder too.
    """
    groups: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for name, runs, decisions in sources:
        own: dict[tuple[str, str], list[RunSummary]] = defaultdict(list)
        for run in runs:
            own[run.task, run.data_hash or ""].append(run)
        for key, members in own.items():
            if any(map(has_spent, members)):
                groups[key].append((name, members, decisions))
    return [_section(*key, groups[key]) for key in sorted(groups)]


def _section(task: str, data_hash: str, sources: Sequence[Source]) -> LossSection:
    points: dict[int, dict[str, list[LossPoint]]] = defaultdict(dict)
    known: dict[str, str] = {}
    for name, runs, decisions in sources:
        before = set(known)
        by_budget: dict[int, list[RunSummary]] = defaultdict(list)
        for run in filter(has_spent, runs):
            if run.budget_samples is not None:
                by_budget[run.budget_samples].append(run)
        for budget, members in by_budget.items():
            for curve in curves_of(members, decisions):
                called = f"{curve.name} ({name})" if curve.name in before else curve.name
                known[called] = curve.optimizer
                points[budget][called] = loss_points(replace(curve, name=called), budget, decisions)
    budgets = [_budget(budget, points[budget]) for budget in sorted(points)]
    selecting = {seed for _, _, decisions in sources for seed in decisions.select_seeds}
    reported = {
        seed
        for one in budgets
        for own in one.points.values()
        for point in own
        for seed in point.losses
    }
    return LossSection(
        task,
        data_hash or None,
        sorted(known.items()),
        budgets,
        tuple(sorted(selecting - reported)),
        [run for _, runs, _ in sources for run in runs],
    )


def _budget(budget: int, points: Mapping[str, list[LossPoint]]) -> BudgetStudy:
    order = _in_order(points)
    rows = [
        SeedLoss(name, point.batch_size, seed, loss)
        for name in order
        for point in points[name]
        for seed, loss in sorted(point.losses.items())
    ]
    return BudgetStudy(
        budget,
        {name: points[name] for name in order},
        loss_means(rows),
        loss_pairs(rows),
        batch_excess(rows),
    )


def _in_order(points: Mapping[str, list[LossPoint]]) -> list[str]:
    """The curves, the one of least loss over all batch sizes first."""
    means = {
        name: {p.batch_size: statistics.fmean(p.losses.values()) for p in own if not p.missed}
        for name, own in points.items()
    }
    sizes = sorted({size for own in means.values() for size in own})
    least = {size: min(own[size] for own in means.values() if size in own) for size in sizes}

    def excess(name: str) -> float:
        own = means[name]
        return sum(own[size] - least[size] if size in own else _UNREACHED for size in sizes)

    return sorted(points, key=lambda name: (not means[name], excess(name), name))
