"""The tables of a study for programs: one CSV file each, of all sections.

Columns are only ever added at the end. Where a study has several sections, each row ends with its
task and target.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from largebatch.study.curves import tuned_value
from largebatch.study.labels import cell
from largebatch.study.points import is_tuned, outcome_of, steps_of
from largebatch.study.section_study import SectionStudy, Study
from largebatch.study.statistics.intervals import Estimate

CURVE: Final = (
    "optimizer,batch_size,steps,samples,lr,trials,at_edge,missed,seeds,low,high,interpolated,cut"
)
FITS: Final = ",".join(
    [
        "optimizer,s_min,e_min,b_crit,s_min_low,s_min_high,e_min_low,e_min_high,b_crit_low",
        "b_crit_high,n,n_low,n_high,cbs20,cbs20_low,cbs20_high,b_80,b_80_low,b_80_high",
        "b_50,b_50_low,b_50_high,rate_exponent,rate_exponent_low,rate_exponent_high",
        "n_is_one,identified,rms,points",
    ]
)
PAIRS: Final = (
    "optimizer,other,quantity,batch_size,ratio,low,high,band_low,band_high,p,verdict,seeds"
)
RULES: Final = (
    "optimizer,rule,base_batch,batch_size,lr,steps,tuned_steps,ratio,seeds,missed,same_runs"
)
BASIN: Final = "optimizer,batch_size,lr,seed,outcome,steps,num_steps,chosen"

Row = Sequence[object]


def write_csv_files(study: Study, folder: Path) -> dict[str, Path]:
    """Write all of them; returns each by its name, `rules` only where there are rule runs."""
    tables = {
        "curve": (CURVE, curve_rows),
        "fits": (FITS, fit_rows),
        "pairs": (PAIRS, pair_rows),
        "rules": (RULES, rule_rows),
    }
    written = {}
    for name, (columns, rows_of) in tables.items():
        if name != "rules" or any(section.rules for section in study.sections):
            rows = ((section, row) for section in study.sections for row in rows_of(section))
            written[name] = _write(folder / f"{name}.csv", columns.split(","), rows, study)
    tuned = sorted({n for s in study.sections for c in s.section.curves for n in c.tuned})
    written["basin"] = _write(
        folder / "basin.csv", [*BASIN.split(","), *tuned, "run"], _basin_rows(study, tuned), study
    )
    return written


def curve_rows(section: SectionStudy) -> Iterator[Row]:
    """A point each."""
    for point in section.all_points:
        estimate = section.steps(point.curve, point.batch_size)
        steps, size = point.whole_steps, point.batch_size
        yield (
            point.curve, size, steps, None if steps is None else steps * size, point.lr,
            point.trials, point.at_edge, point.missed, len(point.steps_by_seed),
            *_ends(estimate), point.steps, point.num_cut,
        )  # fmt: skip


def fit_rows(section: SectionStudy) -> Iterator[Row]:
    """A curve with a fit each."""
    for name in section.names:
        curve = section.estimates[name]
        if curve.b_crit is None:
            continue
        first = (curve.s_min, curve.e_min, curve.b_crit)
        others = (curve.shape, curve.cbs20, curve.b_80, curve.b_50, curve.rate_exponent)
        yield (
            name,
            *(None if estimate is None else estimate.value for estimate in first),
            *(end for estimate in first for end in _ends(estimate)),
            *(value for estimate in others for value in _with_ends(estimate)),
            curve.shape_is_one,
            curve.identified,
            curve.rms,
            sum(point.steps is not None for point in curve.points),
        )


def pair_rows(section: SectionStudy) -> Iterator[Row]:
    """Two curves at a batch size each, and a row for the ratio of their critical batch sizes."""
    for pair in section.pairs:
        for point in pair.points:
            yield (
                pair.optimizer, pair.other, "steps", point.batch_size, point.ratio.value,
                *_ends(point.ratio), *_ends(point.band), point.p,
                point.verdict if point.p is not None else None, point.num_seeds,
            )  # fmt: skip
        if pair.b_crit is not None:
            yield (
                pair.optimizer, pair.other, "b_crit", None, pair.b_crit.value,
                *_ends(pair.b_crit), None, None, None, None, None,
            )  # fmt: skip


def rule_rows(section: SectionStudy) -> Iterator[Row]:
    """A rule at a batch size each."""
    for rule in section.rules:
        missed = sum(steps is None for steps in rule.steps_by_seed.values())
        yield (
            rule.curve, rule.rule, rule.base_batch, rule.batch_size, rule.lr, rule.steps,
            rule.tuned_steps, rule.ratio, len(rule.steps_by_seed), missed,
            rule.same_runs,
        )  # fmt: skip


def _basin_rows(study: Study, tuned: Sequence[str]) -> Iterator[tuple[SectionStudy, Row]]:
    """A run each, of those that searched."""
    for section in study.sections:
        chosen = {id(run) for point in section.all_points for run in point.runs}
        for curve in sorted(section.section.curves, key=lambda one: section.names.index(one.name)):
            runs = [run for run in curve.runs if run.rule == "none" or not is_tuned(curve)]
            for run in sorted(runs, key=lambda one: (one.batch_size, one.lr, one.seed)):
                values = [tuned_value(run, name) if name in curve.tuned else None for name in tuned]
                yield section, (
                    curve.name, run.batch_size, run.lr, run.seed, outcome_of(run), steps_of(run),
                    run.steps, id(run) in chosen, *values, study.short(run.folder),
                )  # fmt: skip


def _target(section: SectionStudy) -> float | str:
    """The loss, or the metric with its value."""
    target = section.section.target
    return target.value if target.metric == "loss" else str(target)


def _ends(estimate: Estimate | None) -> tuple[float | None, float | None]:
    return (None, None) if estimate is None else (estimate.low, estimate.high)


def _with_ends(estimate: Estimate | None) -> tuple[float | None, ...]:
    return (None if estimate is None else estimate.value, *_ends(estimate))


def _write(
    path: Path, columns: Sequence[str], rows: Iterable[tuple[SectionStudy, Row]], study: Study
) -> Path:
    several = len(study.sections) > 1
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(["task", "target"] if several else [])])
        for section, row in rows:
            where = [section.section.task, _target(section)] if several else []
            writer.writerow([cell(value) for value in (*row, *where)])
    return path
