"""From a curve's runs to points: the steps to target at each batch size, seed by seed.

In a study, selecting seeds chose each point's setting and report seeds measure it: only these make
the point. Elsewhere all seeds do both, which flatters a point by the luck of its best rate; of the
rates with the most seeds, the one of least mean log steps among those that reach the target on all
(Shallue et al. 2018, arXiv:1811.03600, with a mean over seeds). Steps are those between the two
evaluations around the target, interpolated. Runs whose rate came from a scaling rule were not
tuned: they stand beside the curve.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from largebatch.study.curves import StudyCurve, tuned_value
from largebatch.study.decisions import Decision, Decisions, same_value
from largebatch.study.reading import RunSummary

Outcome = Literal["reached", "missed", "diverged", "cut"]
"""What became of a run; one that was cut was ended early, and could only have lost."""


@dataclass(frozen=True)
class BasinTrial:
    """One rate of the basin around a point, on one seed.

    Attributes:
        steps: to the target; None where it was not reached.
        num_steps: made, whatever came of it.
    """

    lr: float
    seed: int
    steps: float | None
    num_steps: int
    outcome: Outcome
    folder: Path


@dataclass(frozen=True)
class StudyPoint:
    """Steps to target of one curve at one global batch size.

    Attributes:
        curve: its name.
        steps_by_seed: of the seeds that are reported; empty where the point missed.
        lr: the rate; None where every one missed. `tuned` holds the keys beside it.
        trials: runs made for the point, at whatever rate.
        runs: those that `steps_by_seed` is of.
        basin: what was tried at the point's other values, of rates and seeds.
        dropped_rates: rates that were to be reported and missed on a report seed.
        open_below: no rate below the best was found to be worse; `open_above` likewise.
        selected_by_others: the reported seeds had no say in the choice of the rate.
        lower_bound: what a missed point still says: more steps than this.
        seconds: median over the seeds, on the machines they ran on.
        whole_steps: median over the seeds, as counted by the runs.
    """

    curve: str
    batch_size: int
    steps_by_seed: Mapping[int, float]
    lr: float | None
    tuned: Mapping[str, float]
    trials: int
    runs: tuple[RunSummary, ...]
    basin: tuple[BasinTrial, ...]
    dropped_rates: tuple[float, ...]
    open_below: bool
    open_above: bool
    selected_by_others: bool
    lower_bound: float | None
    seconds: float | None
    whole_steps: int | None

    @property
    def missed(self) -> bool:
        return not self.steps_by_seed

    @property
    def steps(self) -> float | None:
        """Geometric mean over the seeds."""
        if self.missed:
            return None
        return statistics.geometric_mean(self.steps_by_seed.values())

    @property
    def samples(self) -> float | None:
        steps = self.steps
        return None if steps is None else steps * self.batch_size

    @property
    def at_edge(self) -> bool:
        return not self.missed and (self.open_below or self.open_above)

    @property
    def num_cut(self) -> int:
        """Runs that were ended early, as they could no longer be the best."""
        return sum(trial.outcome == "cut" for trial in self.basin)


@dataclass(frozen=True)
class RulePoint:
    """What a scaling rule's learning rate cost at one batch size, against the tuned one."""

    curve: str
    rule: str
    base_batch: int
    batch_size: int
    lr: float
    steps_by_seed: Mapping[int, float | None]
    tuned_by_seed: Mapping[int, float]
    same_runs: bool
    """Whether the rule's rate is the tuned one, so that these are the same runs."""

    @property
    def steps(self) -> float | None:
        """Geometric mean over the seeds; None where one missed."""
        steps = [value for value in self.steps_by_seed.values() if value is not None]
        if not steps or len(steps) < len(self.steps_by_seed):
            return None
        return statistics.geometric_mean(steps)

    @property
    def tuned_steps(self) -> float | None:
        """Geometric mean of the tuned rate over its seeds; None where it missed."""
        steps = self.tuned_by_seed.values()
        return statistics.geometric_mean(steps) if steps else None

    @property
    def ratio(self) -> float | None:
        """Steps over tuned steps, over common seeds; None where either missed."""
        common = self.steps_by_seed.keys() & self.tuned_by_seed.keys()
        logs = [
            math.log(steps / self.tuned_by_seed[seed])
            for seed in common
            if (steps := self.steps_by_seed[seed]) is not None
        ]
        return math.exp(statistics.fmean(logs)) if logs and len(logs) == len(common) else None


def curve_points(curve: StudyCurve, decisions: Decisions) -> list[StudyPoint]:
    """The points of a curve, in order of batch size.

    Its tuned runs (scaling rule `none`) make it, or, where it has none of these, its rule runs do.
    """
    groups: dict[int, list[RunSummary]] = defaultdict(list)
    for run in curve.runs:
        if run.rule == "none" or not is_tuned(curve):
            groups[run.batch_size].append(run)
    return [
        _point(curve, groups[size], decisions.points.get((curve.optimizer, size)), decisions)
        for size in sorted(groups)
    ]


def rule_points(
    curve: StudyCurve, points: Sequence[StudyPoint], decisions: Decisions
) -> list[RulePoint]:
    """The rule runs of a curve that has tuned runs too, beside its `points`."""
    if not is_tuned(curve):
        return []
    tuned = {point.batch_size: point for point in points}
    groups: dict[tuple[str, int, int, float], list[RunSummary]] = defaultdict(list)
    for run in curve.runs:
        if run.rule != "none":
            groups[run.rule, run.base_batch or 0, run.batch_size, _rounded(run.lr)].append(run)
    found = [
        RulePoint(
            curve.name, rule, base, size, lr, {run.seed: steps_of(run) for run in runs},
            tuned[size].steps_by_seed if size in tuned else {}, same_runs=False,
        )
        for (rule, base, size, lr), runs in groups.items()
    ]  # fmt: skip
    for same in decisions.same_rules:
        point = tuned.get(same.batch_size)
        if same.optimizer == curve.optimizer and point is not None and point.lr is not None:
            found.append(
                RulePoint(
                    curve.name, same.rule, same.base_batch, same.batch_size, point.lr,
                    dict(point.steps_by_seed), point.steps_by_seed, same_runs=True,
                )
            )  # fmt: skip
    return sorted(found, key=lambda point: (point.rule, point.base_batch, point.batch_size))


def is_tuned(curve: StudyCurve) -> bool:
    """Whether at least one of the curve's rates was searched."""
    return any(run.rule == "none" for run in curve.runs)


def steps_of(run: RunSummary) -> float | None:
    """Steps to the target, interpolated where the record says so; None for a miss."""
    return run.steps_interpolated or run.steps_to_target


def _point(
    curve: StudyCurve, runs: Sequence[RunSummary], decision: Decision | None, decisions: Decisions
) -> StudyPoint:
    by_setting: dict[tuple[float, ...], list[RunSummary]] = defaultdict(list)
    for run in runs:
        by_setting[_setting(run, curve.tuned)].append(run)
    best = _decided(curve, by_setting, decision) if decision else _best(by_setting)
    reported = by_setting[best] if best is not None else []
    roles = decisions.report_seeds if decision is not None else ()
    if roles:
        reported = [run for run in reported if run.seed in roles]
    steps = {run.seed: taken for run in reported if (taken := steps_of(run)) is not None}
    values = best or (decision and _setting_of(decision, curve)) or None
    basin = _basin(runs, curve.tuned, None if best is None else best[1:])
    rates = sorted({trial.lr for trial in basin})
    return StudyPoint(
        curve=curve.name,
        batch_size=runs[0].batch_size,
        steps_by_seed=steps,
        lr=None if values is None else values[0],
        tuned={} if values is None else dict(zip(curve.tuned, values[1:], strict=True)),
        trials=len(runs),
        runs=tuple(run for run in reported if run.seed in steps),
        basin=basin,
        dropped_rates=() if decision is None else tuple(s["lr"] for s in decision.dropped),
        open_below=decision.open_below if decision else best is not None and best[0] == rates[0],
        open_above=decision.open_above if decision else best is not None and best[0] == rates[-1],
        selected_by_others=bool(roles),
        lower_bound=None if steps else _lower_bound(runs),
        seconds=_median([run.seconds for run in reported if run.seconds is not None]),
        whole_steps=_whole(
            _median([run.steps_to_target for run in reported if run.steps_to_target is not None])
        ),
    )


def _best(by_setting: Mapping[tuple[float, ...], list[RunSummary]]) -> tuple[float, ...] | None:
    """Of the rates with the most seeds, that of least mean log steps; None where all missed."""
    most = max(len(_seeds(runs)) for runs in by_setting.values())
    scores = {
        setting: (score, setting)
        for setting, runs in by_setting.items()
        if len(_seeds(runs)) == most and (score := _mean_log_steps(runs)) < math.inf
    }
    return min(scores, key=lambda setting: scores[setting], default=None)


def _decided(
    curve: StudyCurve, by_setting: Mapping[tuple[float, ...], list[RunSummary]], decision: Decision
) -> tuple[float, ...] | None:
    """The setting that the study chose, as its runs hold it."""
    wanted = _setting_of(decision, curve)
    if wanted is None:
        return None
    for setting in by_setting:
        if all(map(same_value, setting, wanted)):
            return setting
    return None


def _setting_of(decision: Decision, curve: StudyCurve) -> tuple[float, ...] | None:
    if decision.chosen is None:
        return None
    return tuple(decision.chosen[name] for name in ("lr", *curve.tuned))


def _setting(run: RunSummary, tuned: Sequence[str]) -> tuple[float, ...]:
    values = (tuned_value(run, name) for name in tuned)
    return (_rounded(run.lr), *(math.nan if value is None else value for value in values))


def _basin(
    runs: Sequence[RunSummary], tuned: Sequence[str], values: Sequence[float] | None
) -> tuple[BasinTrial, ...]:
    """What was tried at the point's values beside the rate."""
    trials = [
        BasinTrial(
            _rounded(run.lr), run.seed, steps_of(run), run.steps, outcome_of(run), run.folder
        )
        for run in runs
        if values is None or all(map(same_value, _setting(run, tuned)[1:], values))
    ]
    return tuple(sorted(trials, key=lambda trial: (trial.lr, trial.seed)))


def outcome_of(run: RunSummary) -> Outcome:
    """What became of a run."""
    if run.steps_to_target is not None:
        return "reached"
    if run.status == "diverged":
        return "diverged"
    gave_up = run.give_up_samples is not None and run.samples >= run.give_up_samples
    return "cut" if gave_up else "missed"


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


def _mean_log_steps(runs: Sequence[RunSummary]) -> float:
    steps = [steps_of(run) for run in runs]
    return statistics.fmean(math.inf if one is None else math.log(one) for one in steps)


def _seeds(runs: Sequence[RunSummary]) -> set[int]:
    return {run.seed for run in runs}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median_high(values) if values else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _rounded(lr: float) -> float:
    """One learning rate computed in two ways differs in its last bits: it is still one trial."""
    return float(f"{lr:.6g}")
