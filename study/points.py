"""From runs to points: the steps to target of one optimizer at one batch size, at its best rate.

A learning rate's score is the upper median over seeds of the steps to target, where a run that
missed counts as infinity; the best learning rate is the one with the lowest score. That is the
statistic of Shallue et al. 2018 (arXiv:1811.03600) with the median over seeds of AlgoPerf. Runs
whose learning rate came from a scaling rule were not tuned: they stand beside the curve.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.study.runs import RunSummary


@dataclass(frozen=True)
class StudyPoint:
    """Steps and samples to target of one optimizer at one global batch size.

    `steps`, `samples`, `seconds` and `lr` (at the best learning rate; None where every one missed)
    belong to the median run; its seconds are those of its machine, with whatever else ran there.
    `steps_low` and `steps_high` are the extremes over its `seeds` runs, infinity where one missed.
    `lower_bound` is what a missed point still says: more steps than this.
    """

    optimizer: str
    batch_size: int
    steps: int | None
    samples: int | None
    lr: float | None
    trials: int
    at_edge: bool
    seeds: int
    steps_low: float
    steps_high: float
    lower_bound: float | None
    seconds: float | None = None

    @property
    def missed(self) -> bool:
        return self.steps is None


@dataclass(frozen=True)
class RulePoint:
    """What a scaling rule's learning rate cost at one batch size, against the tuned one."""

    optimizer: str
    rule: str
    base_batch: int | None
    batch_size: int
    lr: float
    steps: int | None
    tuned_steps: int | None

    @property
    def ratio(self) -> float | None:
        """Steps over tuned steps: 1 is as good as a search; None where either missed."""
        if self.steps is None or self.tuned_steps is None:
            return None
        return self.steps / self.tuned_steps


def curve_points(runs: Sequence[RunSummary]) -> list[StudyPoint]:
    """The points of every optimizer's curve, in order of optimizer and batch size.

    An optimizer's tuned runs (scaling rule `none`) make its curve, or, where it has none of
    these, its rule runs do. Runs that decide nothing (see `RunSummary.conclusive`) are left out.
    """
    tuned = tuned_optimizers(runs)
    groups: dict[tuple[str, int], list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.conclusive and (run.rule == "none" or run.optimizer not in tuned):
            groups[run.optimizer, run.batch_size].append(run)
    return [_point(groups[key]) for key in sorted(groups)]


def rule_points(runs: Sequence[RunSummary], points: Sequence[StudyPoint]) -> list[RulePoint]:
    """The rule runs of every optimizer that has tuned runs too, beside their `points`."""
    tuned = tuned_optimizers(runs)
    tuned_steps = {(point.optimizer, point.batch_size): point.steps for point in points}
    groups: dict[tuple[str, str, int, int, float], list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.conclusive and run.rule != "none" and run.optimizer in tuned:
            key = (run.optimizer, run.rule, run.base_batch or 0, run.batch_size, _rounded(run.lr))
            groups[key].append(run)
    return [
        RulePoint(
            optimizer=optimizer,
            rule=rule,
            base_batch=base_batch or None,
            batch_size=batch_size,
            lr=lr,
            steps=median_run(group).steps_to_target,
            tuned_steps=tuned_steps.get((optimizer, batch_size)),
        )
        for (optimizer, rule, base_batch, batch_size, lr), group in sorted(groups.items())
    ]


def tuned_optimizers(runs: Sequence[RunSummary]) -> set[str]:
    """The optimizers that have at least one conclusive run whose learning rate was searched."""
    return {run.optimizer for run in runs if run.conclusive and run.rule == "none"}


def median_run(runs: Sequence[RunSummary]) -> RunSummary:
    """The run with the upper median of the steps to target: of two, the slower one."""
    return sorted(runs, key=_steps)[len(runs) // 2]


def _point(runs: Sequence[RunSummary]) -> StudyPoint:
    trials: dict[float, list[RunSummary]] = defaultdict(list)
    for run in runs:
        trials[_rounded(run.lr)].append(run)
    best = min(trials, key=lambda lr: (_steps(median_run(trials[lr])), _loss(trials[lr]), lr))
    median = median_run(trials[best])
    missed = median.steps_to_target is None
    steps = [_steps(run) for run in trials[best]]
    return StudyPoint(
        optimizer=median.optimizer,
        batch_size=median.batch_size,
        steps=median.steps_to_target,
        samples=median.samples_to_target,
        lr=None if missed else best,
        trials=len(trials),
        at_edge=not missed and best in (min(trials), max(trials)),
        seeds=len(trials[best]),
        steps_low=min(steps),
        steps_high=max(steps),
        lower_bound=_lower_bound(runs) if missed else None,
        seconds=None if missed else median.seconds,
    )


def _lower_bound(runs: Sequence[RunSummary]) -> float | None:
    """Steps that a missed point provably needs more than, None where nothing is known.

    A run that diverged at step 5 did not need more than 5 steps, it would never have arrived:
    its own limit counts, where one was set.
    """
    limits = [run.steps for run in runs if run.status == "exhausted" and run.steps > 0]
    if limits:
        return float(min(limits))
    given_up = [run.give_up_samples / run.batch_size for run in runs if run.give_up_samples]
    return min(given_up, default=None)


def _steps(run: RunSummary) -> float:
    return math.inf if run.steps_to_target is None else run.steps_to_target


def _loss(runs: Sequence[RunSummary]) -> float:
    """Mean final evaluation loss, infinity where a run has none."""
    return sum(math.inf if run.eval_loss is None else run.eval_loss for run in runs) / len(runs)


def _rounded(lr: float) -> float:
    """One learning rate computed in two ways differs in its last bits: it is still one trial."""
    return float(f"{lr:.6g}")
