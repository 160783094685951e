"""The tables of a section, as text with what it sorts by: for the page and for the terminal."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from largebatch.study.basins import Basin, basin_of
from largebatch.study.page.answers import is_placed
from largebatch.study.page.words import (
    DASH,
    interval,
    seeds_in_words,
    three_digits,
    times,
)
from largebatch.study.points import RulePoint, StudyPoint, is_tuned
from largebatch.study.section_study import SectionStudy
from largebatch.study.statistics.intervals import Estimate


class Entry(NamedTuple):
    """One cell: its text, the number that it sorts by, where that is not the text itself, and an
    interval.
    """

    text: str
    number: float | None = None
    interval: str = ""

    @property
    def whole(self) -> str:
        """The text with its interval."""
        return f"{self.text} ({self.interval})" if self.interval else self.text


@dataclass(frozen=True)
class Listing:
    """One table: `words` are the columns that hold text, to the left; `spare` those that a narrow
    terminal has no room for, the first of them first.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    words: Sequence[str] = ("optimizer", "")
    spare: Sequence[str] = ()


FIT_HEADS: Final = (
    "optimizer", "B_crit", "n", "CBS20", "B_80", "B_50", "S_min", "rate grows as", "",
)  # fmt: skip


def points_table(study: SectionStudy) -> Listing:
    """Steps, samples and the rest of each point."""
    tuned = _tuned_names(study)
    heads = ["optimizer", "batch", "steps", "95% interval", "seeds", "rate", *tuned]
    rows = []
    for point in study.all_points:
        estimate = study.steps(point.curve, point.batch_size)
        rows.append(
            [
                Entry(point.curve),
                _whole(point.batch_size),
                _number(point.steps),
                Entry(interval(estimate) or DASH, None if estimate is None else estimate.low),
                _whole(len(point.steps_by_seed)),
                _number(point.lr),
                *(_number(point.tuned.get(name)) for name in tuned),
                _number(point.samples),
                Entry(*_seconds(point.seconds)),
                Entry(flag_of(point)),
            ]
        )
    heads += ["samples", "seconds", ""]
    return Listing(heads, rows, spare=("seconds", "samples", "seeds"))


def flag_of(point: StudyPoint) -> str:
    """What is to be said of a point."""
    if point.missed:
        return "missed"
    told = ["at edge"] if point.at_edge else []
    if point.dropped_rates:
        listed = ", ".join(f"{rate:.3g}" for rate in point.dropped_rates)
        told.append(f"a seed missed at {listed}")
    return "; ".join(told)


def ratios_table(study: SectionStudy) -> Listing:
    """Each curve's steps over those of the first, with interval and verdict."""
    first, *others = study.names
    rows = []
    for name in others:
        pair = study.pair(name, first)
        for point in pair.points if pair is not None else ():
            rows.append(
                [
                    Entry(name),
                    _whole(point.batch_size),
                    Entry(times(point.ratio.value), point.ratio.value),
                    _factors(point.ratio),
                    _factors(point.band),
                    _whole(point.num_seeds),
                    Entry(point.verdict if point.p is not None else "one seed, no verdict"),
                ]
            )
    heads = ["optimizer", "batch", f"times {first}'s steps", "95% interval", "95% band", "seeds"]
    return Listing([*heads, ""], rows)


def fits_table(study: SectionStudy) -> Listing:
    """What each curve gives, the definitions of a critical batch size side by side."""
    rows = []
    for name in study.names:
        curve = study.estimates[name]
        values = (curve.b_crit, curve.shape, curve.cbs20, curve.b_80, curve.b_50, curve.s_min)
        rows.append(
            [
                Entry(name),
                *map(_estimate, values),
                _exponent(curve.rate_exponent),
                Entry("" if is_placed(study, curve) else "B_crit not identified"),
            ]
        )
    return Listing(FIT_HEADS, rows)


def basins_table(study: SectionStudy) -> Listing:
    """How far off its best rate a curve may be trained at each batch size."""
    rows = []
    for point in study.all_points:
        basin = basin_of(point)
        if basin is None or point.lr is None:
            continue
        miss = None if basin.first_miss is None else basin.first_miss / point.lr
        rows.append(
            [
                Entry(point.curve),
                _whole(point.batch_size),
                _number(point.lr),
                Entry(_span(basin), basin.high / basin.low),
                Entry(DASH if miss is None else f"{times(miss)} times", miss),
                Entry(_open(basin)),
            ]
        )
    heads = ("optimizer", "batch", "rate", "within 10%", "first miss at", "")
    return Listing(heads, rows)


def trials_table(study: SectionStudy) -> Listing:
    """How many runs each curve was given."""
    rows = []
    curves = {curve.name: curve for curve in study.section.curves}
    for name in study.names:
        curve, points = curves[name], study.points[name]
        runs = [run for run in curve.runs if run.rule == "none" or not is_tuned(curve)]
        rates = [len({trial.lr for trial in point.basin}) for point in points]
        reported = sorted({seed for point in points for seed in point.steps_by_seed})
        rows.append(
            [
                Entry(name),
                _whole(len(runs)),
                _whole(len(points)),
                Entry(f"{min(rates)} to {max(rates)}", max(rates)),
                _whole(sum(point.num_cut for point in points)),
                _whole(sum(run.steps_to_target is None for run in runs)),
                Entry(", ".join(["rate", *curve.tuned]) if is_tuned(curve) else "by a rule"),
                Entry(seeds_in_words(reported) if reported else DASH),
                _number(float(sum(run.samples for run in runs))),
            ]
        )
    heads = (
        "optimizer", "runs", "points", "rates a point", "cut", "without target", "searched",
        "reported", "samples spent",
    )  # fmt: skip
    return Listing(heads, rows, ("optimizer", "searched", "reported"))


def rules_table(rules: Sequence[RulePoint]) -> Listing:
    """What scaling rules cost against tuned rates."""
    rows = [
        [
            Entry(rule.curve),
            Entry(rule.rule),
            _whole(rule.base_batch),
            _whole(rule.batch_size),
            _number(rule.lr),
            _number(rule.steps),
            Entry(DASH if rule.ratio is None else times(rule.ratio), rule.ratio),
            _whole(len(rule.steps_by_seed)),
            Entry("same runs" if rule.same_runs else _missed(rule)),
        ]
        for rule in rules
    ]
    heads = ("optimizer", "rule", "base", "batch", "rate", "steps", "ratio", "seeds", "")
    return Listing(heads, rows, ("optimizer", "rule", ""))


def _span(basin: Basin) -> str:
    low, high = f"{basin.low:.3g}", f"{basin.high:.3g}"
    return low if low == high else f"{low} to {high}"


def _missed(rule: RulePoint) -> str:
    count = sum(steps is None for steps in rule.steps_by_seed.values())
    return f"{count} missed" if count else ""


def _open(basin: Basin) -> str:
    sides = [
        side
        for side, beyond in (("below", basin.next_below), ("above", basin.next_above))
        if beyond is None
    ]
    return f"no rate tried {' or '.join(sides)}" if sides else ""


def _tuned_names(study: SectionStudy) -> list[str]:
    return sorted({name for point in study.all_points for name in point.tuned})


def _whole(value: int | None) -> Entry:
    return Entry(DASH if value is None else f"{value:,}", value)


def _number(value: float | None) -> Entry:
    known = value is not None and math.isfinite(value)
    return Entry(three_digits(value) if known and value is not None else DASH, value)


def _estimate(estimate: Estimate | None) -> Entry:
    if estimate is None:
        return Entry(DASH)
    return Entry(three_digits(estimate.value), estimate.value, interval(estimate))


def _exponent(exponent: Estimate | None) -> Entry:
    if exponent is None:
        return Entry(DASH)
    low, high = exponent.low, exponent.high
    span = "" if low is None or high is None else f"{low:.2f} to {high:.2f}"
    return Entry(f"B^{exponent.value:.2f}", exponent.value, span)


def _factors(estimate: Estimate) -> Entry:
    if estimate.low is None or estimate.high is None:
        return Entry(DASH)
    return Entry(f"{times(estimate.low)} to {times(estimate.high)}", estimate.low)


def _seconds(seconds: float | None) -> tuple[str, float | None]:
    return (DASH if seconds is None else f"{seconds:.1f}", seconds)


def by_curve(rows: Iterable[Sequence[Entry]]) -> Iterable[tuple[bool, Sequence[Entry]]]:
    """Each row, and whether it is the first of its curve, the very first aside."""
    previous: str | None = None
    for row in rows:
        yield previous not in (None, row[0].text), row
        previous = row[0].text
