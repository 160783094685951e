"""From runs that have spent a budget to points: the final loss at each batch size, seed by seed.

Of a study (`study.protocol=loss_at_budget`) the report seeds at the setting that was chosen; of
other runs without a target, the setting of least mean loss among those with the most seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from largebatch.study.curves import StudyCurve, tuned_value
from largebatch.study.decisions import Decision, Decisions, same_value
from largebatch.study.reading import RunSummary

Values = tuple[float, ...]
"""The rate, and what is tuned beside it."""


@dataclass(frozen=True)
class LossPoint:
    """The final loss of one curve at one batch size and budget.

    Attributes:
        losses: of the seeds that are reported; empty where every setting diverged.
        lr: the rate; None where every one diverged. `tuned` holds the keys beside it.
        trials: runs to the budget, at whatever setting.
        runs: those that `losses` is of.
        dropped_rates: rates that were to be reported and diverged on a report seed.
        open_below: no rate below the best was found to be worse; `open_above` likewise.
        selected_by_others: the reported seeds had no say in the choice of the setting.
    """

    curve: str
    batch_size: int
    budget: int
    losses: Mapping[int, float]
    lr: float | None
    tuned: Mapping[str, float]
    trials: tuple[RunSummary, ...]
    runs: tuple[RunSummary, ...]
    dropped_rates: tuple[float, ...]
    open_below: bool
    open_above: bool
    selected_by_others: bool

    @property
    def missed(self) -> bool:
        return not self.losses

    @property
    def at_edge(self) -> bool:
        return not self.missed and (self.open_below or self.open_above)


def has_spent(run: RunSummary) -> bool:
    """Whether a run without a target has spent its budget, or diverged on the way."""
    if run.target is not None or run.give_up_samples is not None:
        return False
    spent = run.budget_samples is not None and run.samples >= run.budget_samples
    return run.status == "diverged" or (run.status == "exhausted" and spent)


def loss_points(curve: StudyCurve, budget: int, decisions: Decisions) -> list[LossPoint]:
    """The points of a curve at a budget, in order of batch size."""
    groups: dict[int, list[RunSummary]] = defaultdict(list)
    for run in curve.runs:
        groups[run.batch_size].append(run)
    return [
        _point(curve, budget, groups[size], decisions.points.get((curve.optimizer, size, budget)),
               decisions)
        for size in sorted(groups)
    ]  # fmt: skip


def loss_of(run: RunSummary) -> float | None:
    """The final evaluation loss; None for a run that diverged."""
    return None if run.status == "diverged" else run.eval_loss


def _point(
    curve: StudyCurve, budget: int, runs: Sequence[RunSummary], decision: Decision | None,
    decisions: Decisions,
) -> LossPoint:  # fmt: skip
    by_setting: dict[Values, list[RunSummary]] = defaultdict(list)
    for run in runs:
        by_setting[_setting(run, curve.tuned)].append(run)
    best = _best(by_setting) if decision is None else _decided(decision, curve.tuned, by_setting)
    roles = () if decision is None else decisions.report_seeds
    reported = [run for run in by_setting.get(best or (), []) if not roles or run.seed in roles]
    losses = {run.seed: loss for run in reported if (loss := loss_of(run)) is not None}
    rates = sorted(
        setting[0] for setting in by_setting if best is not None and setting[1:] == best[1:]
    )
    return LossPoint(
        curve=curve.name,
        batch_size=runs[0].batch_size,
        budget=budget,
        losses=losses,
        lr=None if best is None else best[0],
        tuned={} if best is None else dict(zip(curve.tuned, best[1:], strict=True)),
        trials=tuple(runs),
        runs=tuple(run for run in reported if run.seed in losses),
        dropped_rates=() if decision is None else tuple(one["lr"] for one in decision.dropped),
        open_below=decision.open_below if decision else best is not None and best[0] == rates[0],
        open_above=decision.open_above if decision else best is not None and best[0] == rates[-1],
        selected_by_others=bool(roles),
    )


def _best(by_setting: Mapping[Values, list[RunSummary]]) -> Values | None:
    """Of the settings with the most seeds that of least mean loss; None where all diverged."""
    most = max(len({run.seed for run in runs}) for runs in by_setting.values())
    means: dict[Values, float] = {}
    for setting, runs in by_setting.items():
        losses = [loss_of(run) for run in runs]
        if len({run.seed for run in runs}) == most and None not in losses:
            means[setting] = statistics.fmean(loss for loss in losses if loss is not None)
    return min(means, key=lambda setting: (means[setting], setting), default=None)


def _decided(
    decision: Decision, tuned: Sequence[str], by_setting: Mapping[Values, list[RunSummary]]
) -> Values | None:
    if decision.chosen is None:
        return None
    wanted = tuple(decision.chosen[name] for name in ("lr", *tuned))
    found = (one for one in by_setting if all(map(same_value, one, wanted)))
    return next(found, None)


def _setting(run: RunSummary, tuned: Sequence[str]) -> Values:
    values = (tuned_value(run, name) for name in tuned)
    rate = float(f"{run.lr:.6g}")  # computed in two ways it differs in its last bits
    return (rate, *(math.nan if value is None else value for value in values))
