"""What the runs below one or more folders say: points, estimates and comparisons, by section."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from largebatch.records import printable
from largebatch.records.names import EVALUATED
from largebatch.records.target import Target
from largebatch.study.curves import Section, StudyCurve, leaves, sections_of
from largebatch.study.decisions import Decisions, read_decisions
from largebatch.study.final_loss.points import has_spent
from largebatch.study.final_loss.section import LossSection, Source, loss_sections
from largebatch.study.floor import Floor, find_floor
from largebatch.study.points import (
    RulePoint,
    StudyPoint,
    curve_points,
    outcome_of,
    rule_points,
    steps_of,
)
from largebatch.study.reading import RunSummary, read_runs
from largebatch.study.run_table import RunTable
from largebatch.study.statistics.intervals import CurveEstimates, Estimate, intervals
from largebatch.study.statistics.pairs import Pair, pairs
from largebatch.study.statistics.table import SeedSteps

UNREACHED: Final = 2.0
"""Where curves are put in order, a batch size that one lacks counts as this many times the least
steps there."""


@dataclass(frozen=True)
class SectionStudy:
    """One section, read: everything by the name of the curve, the one of fewest steps first.

    Attributes:
        pairs: each two curves, the later in order over the earlier.
        select_seeds: those that chose the rates and had no other say; none where the seeds that are
            reported chose them.
        most_trials: that every optimizer was allowed for a point's climb; None: not on record.
        floor: a line to draw with the curves; None: there is none.
    """

    section: Section
    points: Mapping[str, Sequence[StudyPoint]]
    estimates: Mapping[str, CurveEstimates]
    pairs: Sequence[Pair]
    rules: Sequence[RulePoint]
    select_seeds: tuple[int, ...]
    most_trials: int | None
    floor: Floor | None = None

    @property
    def names(self) -> list[str]:
        return list(self.points)

    @property
    def all_points(self) -> list[StudyPoint]:
        """Of all curves."""
        return [point for points in self.points.values() for point in points]

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({point.batch_size for point in self.all_points})

    @property
    def seeds(self) -> list[int]:
        """The seeds that points are made of."""
        return sorted({seed for point in self.all_points for seed in point.steps_by_seed})

    @property
    def has_intervals(self) -> bool:
        return any(
            point.steps is not None and point.steps.low is not None
            for curve in self.estimates.values()
            for point in curve.points
        )

    def steps(self, curve: str, batch_size: int) -> Estimate | None:
        """A point's steps with their interval; None where there is none, or it missed."""
        for point in self.estimates[curve].points:
            if point.batch_size == batch_size:
                return point.steps
        return None

    def pair(self, curve: str, other: str) -> Pair | None:
        """`curve` over `other`, which comes before it."""
        found = (p for p in self.pairs if (p.optimizer, p.other) == (curve, other))
        return next(found, None)


@dataclass(frozen=True)
class Study:
    """All sections of the folders that were read, and what was left out of them."""

    folders: Sequence[Path]
    sections: Sequence[SectionStudy]
    problems: Sequence[str]
    losses: Sequence[LossSection] = ()
    """Of runs that had no target, and spent their budgets."""

    @property
    def runs(self) -> list[RunSummary]:
        """Of all sections."""
        found = [run for section in self.sections for run in section.section.runs]
        return found + [run for section in self.losses for run in section.runs]

    def short(self, folder: Path) -> str:
        """A run's folder as its study knows it."""
        path = str(folder)
        for root in self.folders:
            if path.startswith(f"{root}/"):
                return printable(path[len(str(root)) + 1 :])
        return printable(path)


def read_study(*folders: Path | str) -> Study:
    """Read the runs below each folder. Curves of a later folder that are called as one before are
    named by their folder too.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: one is given twice, or there is no finished run with a target.
    """
    roots = [Path(folder) for folder in folders]
    if len({root.resolve() for root in roots}) < len(roots):
        raise ValueError(f"a folder is given twice: {', '.join(map(str, roots))}")
    names = _names(roots)
    problems: list[str] = []
    curves: dict[tuple[str, Target, str], list[tuple[StudyCurve, Decisions]]] = defaultdict(list)
    found: dict[tuple[str, Target, str], Section] = {}
    floors: dict[tuple[str, Target, str], Floor] = {}
    without_target: list[Source] = []
    for root in roots:
        noted: list[str] = []
        runs, decisions, sections = _sections(root, noted)
        if len(sections) == 1:
            floors |= _floor_of(root, sections[0], noted)
        problems += [f"{names[root]}: {note}" for note in noted] if len(roots) > 1 else noted
        for section in sections:
            key = _key(section)
            found.setdefault(key, section)
            taken = {curve.name for curve, _ in curves[key]}
            curves[key] += [
                (
                    replace(curve, name=f"{curve.name} ({names[root]})")
                    if curve.name in taken
                    else curve,
                    decisions,
                )
                for curve in section.curves
            ]
        aimless = [run for run in runs if run.target is None]
        without_target.append((names[root], aimless, decisions))
        if not sections and not any(map(has_spent, aimless)):
            lost = ": ".join(["no finished run with a target" if runs else "no finished run", ""])
            raise ValueError("; ".join([f"{lost.rstrip(': ')} below {root}", *noted]))
    return Study(
        roots,
        [
            replace(section_study(found[key], curves[key]), floor=floors.get(key))
            for key in sorted(found)
        ],
        problems,
        loss_sections(without_target),
    )


def _key(section: Section) -> tuple[str, Target, str]:
    return section.task, section.target, section.data_hash or ""


def _floor_of(
    root: Path, section: Section, problems: list[str]
) -> dict[tuple[str, Target, str], Floor]:
    """The floor in a folder, by the section that it belongs to."""
    floor = find_floor(root, section.task, section.target, problems)
    return {} if floor is None else {_key(section): floor}


def runs(folder: Path | str, *, config: bool = False) -> RunTable:
    """The finished runs below a folder, as rows for a table: `runs(DIR).to_pandas()`.

    `optimizer` is the name of the run's curve, `steps` are those to the target (None: not reached),
    interpolated where the record allows it; `chosen` says whether the run is one that its point is
    made of, so that `intervals([row for row in runs(DIR) if row["chosen"]])` is what the report
    says of one task.

    Args:
        config: add each run's configuration, a column a key.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    _, decisions, sections = _sections(Path(folder), [])
    rows = []
    for section in sections:
        for curve in section.curves:
            chosen = {id(run) for point in curve_points(curve, decisions) for run in point.runs}
            rows += [_row(run, curve, id(run) in chosen) for run in curve.runs]
            if config:
                for row, run in zip(rows[-len(curve.runs) :], curve.runs, strict=True):
                    row |= {f"config.{key}": value for key, value in leaves(run.config).items()}
    columns = dict.fromkeys(key for row in rows for key in row)
    return RunTable({key: row.get(key) for key in columns} for row in rows)


def _row(run: RunSummary, curve: StudyCurve, chosen: bool) -> dict[str, Any]:
    return {
        "task": run.task,
        "target_metric": None if run.target is None else run.target.metric,
        "target_value": None if run.target is None else run.target.value,
        "optimizer": curve.name,
        "batch_size": run.batch_size,
        "seed": run.seed,
        "rate": run.lr,
        "rule": run.rule,
        "base_batch": run.base_batch,
        "steps": steps_of(run),
        "whole_steps": run.steps_to_target,
        "outcome": outcome_of(run),
        "chosen": chosen,
        "num_steps": run.steps,
        "samples": run.samples,
        "eval_loss": run.eval_loss,
        **{f"{EVALUATED}{name}": value for name, value in run.metrics.items()},
        "seconds": run.seconds,
        "folder": str(run.folder),
    }


def _sections(root: Path, problems: list[str]) -> tuple[list[RunSummary], Decisions, list[Section]]:
    found, noted = read_runs(root)
    problems += noted
    conclusive = [run for run in found if run.conclusive]
    decisions = read_decisions(root, problems)
    # A run that has spent its budget without a target says what loss that comes to.
    of_losses = any(map(has_spent, conclusive))
    aimed = [run for run in conclusive if run.target is not None or not of_losses]
    return conclusive, decisions, sections_of(aimed, decisions, problems)


def _names(roots: Sequence[Path]) -> dict[Path, str]:
    """Of each folder its name, or all of its path where two have the same."""
    short = [printable(root.resolve().name) for root in roots]
    names = short if len(set(short)) == len(short) else [printable(root) for root in roots]
    return dict(zip(roots, names, strict=True))


def section_study(section: Section, curves: Sequence[tuple[StudyCurve, Decisions]]) -> SectionStudy:
    """Read a section whose curves are these, each by what its study decided."""
    points = {curve.name: curve_points(curve, decisions) for curve, decisions in curves}
    order = _in_order(points)
    rows = [row for name in order for row in seed_rows(points[name])]
    estimates = intervals(rows)
    rules = [
        rule
        for curve, decisions in curves
        for rule in rule_points(curve, points[curve.name], decisions)
    ]
    selecting = {seed for _, decisions in curves for seed in decisions.select_seeds}
    reported = {seed for name in order for point in points[name] for seed in point.steps_by_seed}
    allowed = {decisions.most_trials for _, decisions in curves}
    return SectionStudy(
        replace(section, curves=[curve for curve, _ in curves]),
        {name: points[name] for name in order},
        {name: estimates.get(name, CurveEstimates(name, ())) for name in order},
        pairs(rows),
        rules,
        tuple(sorted(selecting - reported)),
        allowed.pop() if len(allowed) == 1 else None,
    )


def seed_rows(points: Sequence[StudyPoint]) -> Iterable[SeedSteps]:
    """A curve's points as the statistics take them; a missed one as a bound on every seed."""
    seeds = sorted({seed for point in points for seed in point.steps_by_seed})
    for point in points:
        for seed, steps in sorted(point.steps_by_seed.items()):
            yield SeedSteps(point.curve, point.batch_size, seed, steps, point.lr)
        if point.missed:
            for seed in seeds or [0]:
                yield SeedSteps(
                    point.curve, point.batch_size, seed, None, point.lr, point.lower_bound
                )


def _in_order(points: Mapping[str, Sequence[StudyPoint]]) -> list[str]:
    """The curves, the one of fewest steps over all batch sizes first."""
    logs = {
        name: {point.batch_size: math.log(point.steps) for point in own if point.steps is not None}
        for name, own in points.items()
    }
    sizes = sorted({size for own in logs.values() for size in own})
    least = {size: min(own[size] for own in logs.values() if size in own) for size in sizes}

    def excess(name: str) -> float:
        lacking = math.log(UNREACHED)
        return statistics.fmean(
            logs[name][size] - least[size] if size in logs[name] else lacking for size in sizes
        )

    return sorted(points, key=lambda name: (not logs[name], excess(name) if sizes else 0.0, name))
