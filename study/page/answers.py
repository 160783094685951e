"""What a study answers, in sentences: who needs the fewest steps at which batch size, how far each
scales, at which batch size and rate to train, and how sure that is.

No number without its interval, where there is one; what is not told apart is said so.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from largebatch.study.basins import basin_of
from largebatch.study.page.words import (
    at_sizes,
    in_a_row,
    interval,
    plural,
    seeds_in_words,
    span_of_times,
    three_digits,
    times,
    with_interval,
)
from largebatch.study.points import StudyPoint
from largebatch.study.section_study import SectionStudy
from largebatch.study.statistics.intervals import CurveEstimates, Estimate
from largebatch.study.statistics.pairs import Pair, PairPoint
from largebatch.study.statistics.solver import FEWEST_POINTS

MOST_COMPARED: Final = 3
"""Curves that the first answer names one by one; the table has the others."""
MOST_UNSURE: Final = 1.0
"""An interval of a rate's exponent wider than this, from no growth to B, says nothing."""


class Sentence(NamedTuple):
    """One answer."""

    question: str
    text: str


def answers(study: SectionStudy) -> list[Sentence]:
    """The four sentences of a section."""
    first = study.names[0]
    if all(point.missed for point in study.all_points):
        told = f"Missed the target at every batch size: {in_a_row(study.names)}."
        return [Sentence("Fewest steps", told), Sentence("How sure", how_sure(study))]
    return [
        Sentence("Fewest steps", fewest_steps(study)),
        Sentence("How far", how_far(study)),
        Sentence("What to train at", f"{what_batch(study, first)} {what_rate(study, first)}"),
        Sentence("How sure", how_sure(study)),
    ]


def fewest_steps(study: SectionStudy) -> str:
    """Which curve needs the fewest steps at which batch size."""
    first, *others = study.names
    ends = _ends(study, first)
    opening = f"{first} needs {in_a_row([_steps_at(study, first, size) for size in ends])}"
    if not others:
        return opening + "."
    told = [_compared(study, name, first) for name in others[:MOST_COMPARED]]
    ahead = any(point.ratio.value < 1 for pair in _over(study, first) for point in pair.points)
    over_all = ", over all batch sizes" * ahead
    opening = f"{first} needs the fewest steps{over_all}: {opening.removeprefix(f'{first} needs ')}"
    rest = others[MOST_COMPARED:]
    if rest:
        ratios = [p.ratio.value for name in rest for p in _points(study.pair(name, first))]
        told.append(
            f"the other {plural(len(rest), 'curve')} "
            + (f"{span_of_times(ratios)} times as many" if ratios else "reached nowhere")
            + " (side by side below)"
        )
    return f"{opening}. {'; '.join(told)}."


def how_far(study: SectionStudy) -> str:
    """The critical batch sizes, put in order as far as the seeds can."""
    known = [(name, b) for name in study.names if (b := study.estimates[name].b_crit) is not None]
    lacking = [name for name in study.names if study.estimates[name].b_crit is None]
    sure = [name for name, _ in known if is_placed(study, study.estimates[name])]
    told = []
    if sure:
        largest = max(sure, key=lambda name: _value(study.estimates[name].b_crit))
        same: list[str] = [largest]
        smaller: list[str] = []
        for name in sorted(sure, key=lambda one: -_value(study.estimates[one].b_crit)):
            if name != largest:
                (smaller if _is_smaller(study, name, largest) else same).append(name)
        told.append(
            "Critical batch size (a run there takes twice the fewest steps and twice the fewest "
            f"samples): {in_a_row([_critical(study, name) for name in same])}"
            + (", not told apart" if len(same) > 1 and study.has_intervals else "")
        )
        if smaller:
            told.append(f"Smaller: {in_a_row([_critical(study, name) for name in smaller])}")
    told += [
        f"Not identified for {name}: {why_unplaced(study, study.estimates[name])}"
        for name, _ in known
        if name not in sure
    ]
    if lacking:
        told.append(
            f"No fit for {in_a_row(lacking)}: it needs {FEWEST_POINTS} batch sizes that reach the "
            "target"
        )
    bends = [
        f"{name} {_how(estimate)}, n = {with_interval(shape)}, so that its steps there are "
        f"{times(2 ** (1 / shape.value))} times the fewest"
        for name in sure
        if (shape := (estimate := study.estimates[name]).shape) and not estimate.shape_is_one
    ]
    if bends:
        told.append(f"Another bend than S_min + E_min / B: {'; '.join(bends)}")
    return f"{'. '.join(told)}."


def is_placed(study: SectionStudy, curve: CurveEstimates) -> bool:
    """Whether B_crit may be named: identified, or, with one seed, between the batch sizes."""
    b_crit = curve.b_crit
    if b_crit is None or curve.identified:
        return curve.identified
    sizes = [point.batch_size for point in curve.points if point.steps is not None]
    within = 4 * min(sizes) <= b_crit.value <= max(sizes) / 4
    return within and b_crit.low is None and not study.has_intervals


def why_unplaced(study: SectionStudy, curve: CurveEstimates) -> str:
    """Why a critical batch size is not named."""
    if curve.b_crit is None:
        return f"no fit, it needs {FEWEST_POINTS} batch sizes that reach the target"
    sizes = [point.batch_size for point in curve.points if point.steps is not None]
    told = f"the fit says {with_interval(curve.b_crit)}"
    if not 4 * min(sizes) <= curve.b_crit.value <= max(sizes) / 4:
        return f"{told}, and the batch sizes do not reach a factor 4 to both sides of it"
    if curve.b_crit.low is None:
        return f"{told}, and there are too few seeds for an interval"
    return f"{told}, an interval wider than a factor 1.5 to either side"


def what_batch(study: SectionStudy, name: str) -> str:
    """Up to which batch size samples are well spent, and what the largest ones buy."""
    curve, reached = study.estimates[name], _reached(study, name)
    told = []
    if curve.b_80 is not None and curve.b_50 is not None:
        start = f"{reached[0].batch_size:,}"
        told.append(
            f"{name} keeps 80% of the sample efficiency of batch {start} up to a batch of "
            f"{_within_tried(curve.b_80, reached)}, and 50% up to "
            f"{_within_tried(curve.b_50, reached)}"
        )
    last = reached[-1]
    earlier = [point for point in reached if point.batch_size * 4 <= last.batch_size]
    if earlier and earlier[-1].steps is not None and last.steps is not None:
        before = earlier[-1]
        saved = 1 - last.steps / _value_of(before.steps)
        factor = last.batch_size / before.batch_size
        told.append(
            f"beyond {before.batch_size:,}, {factor:g} times the batch "
            + (f"saves {saved:.0%} of the steps" if saved > 0 else "saves no steps")
        )
    return f"{'; '.join(told)}." if told else f"{name} has too few batch sizes for advice."


def what_rate(study: SectionStudy, name: str) -> str:
    """The learning rate over batch sizes, and how far off it may be."""
    reached = [point for point in _reached(study, name) if point.lr is not None]
    first, last = reached[0], reached[-1]
    told = [f"Its learning rate is {_rate(first.lr)} at {first.batch_size:,}"]
    if last is not first:
        told[0] += f" and {_rate(last.lr)} at {last.batch_size:,}"
        told[0] += _growth(study.estimates[name].rate_exponent)
    for key in first.tuned:
        values = [f"{point.tuned[key]:g} at {point.batch_size:,}" for point in (first, last)]
        told.append(f"its {key} {in_a_row(values if last is not first else values[:1])}")
    basins = [(point, basin) for point in reached if (basin := basin_of(point)) is not None]
    below = min(_value_of(point.lr) / basin.low for point, basin in basins)
    above = min(basin.high / _value_of(point.lr) for point, basin in basins)
    sides = [
        f"{times(factor)} times {side}"
        for factor, side in ((below, "lower"), (above, "higher"))
        if factor > 1.01
    ]
    if sides:
        told.append(f"a rate {' or '.join(sides)} costs at most 10% at every batch size")
    missed = [
        (basin.first_miss / _value_of(point.lr), point.batch_size)
        for point, basin in basins
        if basin.first_miss is not None
    ]
    if missed:
        factor, size = min(missed)
        told.append(f"at {times(factor)} times the rate a run misses (batch {size:,})")
    return f"{'; '.join(told)}."


def _growth(exponent: Estimate | None) -> str:
    """How a rate grows with the batch; nothing where the points hardly say it."""
    if exponent is None or exponent.low is None or exponent.high is None:
        return ""
    if exponent.high - exponent.low > MOST_UNSURE:
        return ""
    return f", as batch^{exponent.value:.2f} ({exponent.low:.2f} to {exponent.high:.2f})"


def how_sure(study: SectionStudy) -> str:
    """Where the numbers come from, and what they do not cover."""
    told = list(_of_seeds(study))
    edges = [point for point in study.all_points if point.at_edge]
    missed = [point for point in study.all_points if point.missed]
    if edges:
        told.append(
            f"At the edge of the rates tried, so no more than upper bounds: {_places(edges)}"
        )
    if missed:
        told.append(f"Missed at every rate: {_places(missed)}")
    told.append(
        "Not covered: another task, target or schedule, and rates between those that were tried"
    )
    return f"{'. '.join(told)}."


def _of_seeds(study: SectionStudy) -> Iterator[str]:
    seeds = study.seeds
    most = max((len(point.steps_by_seed) for point in study.all_points), default=0)
    if most <= 1:
        yield (
            "One seed a point, so there are no intervals, and a difference may be that seed's luck"
        )
        return
    if study.has_intervals:
        yield "Each interval holds in 95 of 100 studies like this one"
    made = f"Steps are those of {seeds_in_words(seeds)}"
    points = [point for point in study.all_points if not point.missed]
    if all(point.selected_by_others for point in points):
        made += f", which had no say in the rates ({seeds_in_words(study.select_seeds)} chose them)"
    else:
        made += ", which chose the rates too: that flatters them by a few percent"
    yield made
    logs = [[math.log(s) for s in point.steps_by_seed.values()] for point in points]
    freedom = sum(len(own) - 1 for own in logs)
    if freedom:
        spread = math.sqrt(
            sum((len(own) - 1) * statistics.variance(own) for own in logs if len(own) > 1) / freedom
        )
        yield f"Seeds differ by {math.expm1(spread):.1%} in steps (standard deviation)"


def _compared(study: SectionStudy, name: str, first: str) -> str:
    """One curve against the first, batch sizes of one verdict together."""
    pair, sizes = study.pair(name, first), study.batch_sizes
    points = _points(pair)
    if not points:
        return f"{name} has no batch size in common with it"
    if all(point.p is None for point in points):
        ratios = [point.ratio.value for point in points]
        return f"{name} {span_of_times(ratios)} times as many (no interval)"
    told = []
    for verdict in ("more", "fewer"):
        some = [point for point in points if point.verdict == verdict]
        if some:
            where = at_sizes([point.batch_size for point in some], sizes)
            told.append(f"needs {_ratios(some)} times as many {where}")
    alike = [point for point in points if point.verdict == "not told apart"]
    if alike:
        last = alike[-1]
        at = f", at {last.batch_size:,}" * (len(alike) > 1)
        span = f"{times(last.ratio.value)} times{_of_ratio(last.ratio)}{at}"
        where = at_sizes([point.batch_size for point in alike], sizes)
        told.append(f"is not told apart from it {where.replace('every', 'any')} ({span})")
    missed = [point.batch_size for point in study.points[name] if point.missed]
    if missed:
        told.append(f"missed the target {at_sizes(missed, sizes)}")
    return f"{name} {in_a_row(told)}"


def _ratios(points: Sequence[PairPoint]) -> str:
    if len(points) == 1:
        low, high = points[0].ratio.low, points[0].ratio.high
        span = "" if low is None or high is None else f" ({times(low)} to {times(high)})"
        return times(points[0].ratio.value) + span
    return span_of_times([point.ratio.value for point in points])


def _of_ratio(ratio: Estimate) -> str:
    if ratio.low is None or ratio.high is None:
        return ""
    return f", 95% interval {times(ratio.low)} to {times(ratio.high)}"


def _is_smaller(study: SectionStudy, name: str, largest: str) -> bool:
    """Whether the interval of the ratio of two critical batch sizes lies to one side of 1."""
    pair = study.pair(name, largest) or study.pair(largest, name)
    ratio = pair.b_crit if pair is not None else None
    if ratio is None or ratio.low is None or ratio.high is None:
        return False
    return ratio.high < 1 or ratio.low > 1


def _critical(study: SectionStudy, name: str) -> str:
    b_crit = study.estimates[name].b_crit
    found = interval(b_crit)
    return f"{name} {three_digits(_value(b_crit))}" + (f" ({found})" if found else "")


def _how(curve: CurveEstimates) -> str:
    return "sharper" if curve.shape is not None and curve.shape.value > 1 else "wider"


def _within_tried(batch: Estimate, points: Sequence[StudyPoint]) -> str:
    last = points[-1].batch_size
    if batch.value > last:
        return f"more than {last:,}, the largest tried"
    return with_interval(batch)


def _steps_at(study: SectionStudy, name: str, size: int) -> str:
    return f"{with_interval(study.steps(name, size))} steps at batch {size:,}"


def _ends(study: SectionStudy, name: str) -> list[int]:
    reached = [point.batch_size for point in _reached(study, name)]
    return sorted({reached[0], reached[-1]})


def _reached(study: SectionStudy, name: str) -> list[StudyPoint]:
    return [point for point in study.points[name] if not point.missed]


def _over(study: SectionStudy, first: str) -> list[Pair]:
    return [pair for pair in study.pairs if pair.other == first]


def _points(pair: Pair | None) -> Sequence[PairPoint]:
    return pair.points if pair is not None else ()


def _places(points: Sequence[StudyPoint]) -> str:
    by_curve: dict[str, list[int]] = {}
    for point in points:
        by_curve.setdefault(point.curve, []).append(point.batch_size)
    return "; ".join(
        f"{name} at {in_a_row([f'{size:,}' for size in sizes])}" for name, sizes in by_curve.items()
    )


def _rate(lr: float | None) -> str:
    return f"{_value_of(lr):.3g}"


def _value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def _value_of(number: float | None) -> float:
    assert number is not None
    return number
