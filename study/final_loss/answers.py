"""What final losses answer, in sentences: who ends lowest, how far the batch may grow, at which
rate, and how sure that is. What is not told apart is said so.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

from largebatch.study.final_loss.points import LossPoint
from largebatch.study.final_loss.section import BudgetStudy, LossSection
from largebatch.study.page.words import at_sizes, in_a_row, seeds_in_words
from largebatch.study.statistics.intervals import Estimate
from largebatch.study.statistics.losses import LossDifference


def loss_answers(study: LossSection) -> list[tuple[str, str]]:
    """Questions and answers of a section."""
    told = [
        (f"Lowest loss after {one.budget:,} samples", lowest_loss(one)) for one in study.budgets
    ]
    largest = study.budgets[-1]
    return [
        *told,
        (f"How far, at {largest.budget:,} samples", how_far(largest)),
        ("What to train at", what_rate(largest)),
        ("How sure", how_sure(study)),
    ]


def loss_text(value: float) -> str:
    """A loss: four significant digits."""
    return f"{value:.4g}"


def difference_text(value: float) -> str:
    """A difference of losses: two significant digits."""
    return f"{float(f'{value:.2g}'):g}"


def with_ends(estimate: Estimate, text: str, *, of_loss: bool) -> str:
    """A value and its interval."""
    if estimate.low is None or estimate.high is None:
        return text
    shown = loss_text if of_loss else difference_text
    return f"{text} ({shown(estimate.low)} to {shown(estimate.high)})"


def lowest_loss(study: BudgetStudy) -> str:
    """Which curve ends lowest at which batch size."""
    first, *others = study.names
    reached = [point for point in study.points[first] if not point.missed]
    if not reached:
        return f"Diverged at every setting: {in_a_row(study.names)}."
    ends = sorted({reached[0].batch_size, reached[-1].batch_size})
    told = [f"{first} ends lowest: {in_a_row([_at(study, first, size) for size in ends])}"]
    for name in others:
        pair = study.pair(name, first)
        points = () if pair is None else pair.points
        told.append(f"{name} {_compared(points, study.batch_sizes)}")
    return f"{'. '.join(told)}."


def how_far(study: BudgetStudy) -> str:
    """Up to which batch size each curve loses nothing that seeds can tell."""
    told = []
    for name in study.names:
        excess = study.excess.get(name, ())
        higher = [one for one in excess if one.verdict == "higher"]
        sizes = [point.batch_size for point in study.points[name] if not point.missed]
        if len(sizes) < 2:
            told.append(f"{name} has one batch size")
            continue
        best = [size for size in sizes if study.over_best(name, size) is None]
        if all(one.p is None for one in excess):
            values = sorted(one.difference.value for one in excess)
            told.append(
                f"{name} ends {_span(values[0], values[-1])} higher at other batch sizes than at "
                f"{best[0]:,} (no interval)"
            )
            continue
        beyond = [one for one in higher if one.batch_size > best[0]]
        if not beyond:
            told.append(f"{name} loses nothing that its seeds can tell up to {sizes[-1]:,}")
            continue
        kept = [size for size in sizes if size < beyond[0].batch_size]
        last = beyond[-1]
        loss = with_ends(last.difference, difference_text(last.difference.value), of_loss=False)
        told.append(
            f"{name} loses nothing that its seeds can tell up to {kept[-1]:,}, and ends {loss} "
            f"higher at {last.batch_size:,} than at {best[0]:,}"
        )
    return f"{'; '.join(told)}."


def what_rate(study: BudgetStudy) -> str:
    """The peak learning rate of the first curve over batch sizes."""
    first = study.names[0]
    reached = [point for point in study.points[first] if not point.missed]
    if not reached:
        return f"{first} diverged everywhere."
    ends = [reached[0], reached[-1]] if len(reached) > 1 else reached
    told = [f"{first}'s peak learning rate is {in_a_row([_rate(point) for point in ends])}"]
    for key in reached[0].tuned:
        values = [f"{point.tuned[key]:g} at {point.batch_size:,}" for point in ends]
        told.append(f"its {key} {in_a_row(values)}")
    return f"{'; '.join(told)}."


def how_sure(study: LossSection) -> str:
    """Where the numbers come from, and what they do not cover."""
    told = list(_of_seeds(study))
    edges = [point for point in study.all_points if point.at_edge]
    missed = [point for point in study.all_points if point.missed]
    if edges:
        told.append(
            f"At the edge of the rates tried, so no more than upper bounds: {_places(edges)}"
        )
    if missed:
        told.append(f"Diverged at every setting: {_places(missed)}")
    told.append(
        "Not covered: another task, budget or shape of the decay, and rates between those that "
        "were tried"
    )
    return f"{'. '.join(told)}."


def _of_seeds(study: LossSection) -> Iterator[str]:
    points = [point for point in study.all_points if not point.missed]
    if not study.has_intervals:
        yield (
            "One seed a point, so there are no intervals, and a difference may be that seed's luck"
        )
        return
    yield "Each interval holds in 95 of 100 studies like this one"
    seeds = sorted({seed for point in points for seed in point.losses})
    made = f"Losses are those of {seeds_in_words(seeds)}"
    if all(point.selected_by_others for point in points):
        made += f", which had no say in the rates ({seeds_in_words(study.select_seeds)} chose them)"
    else:
        made += ", which chose the rates too: that flatters them"
    yield made
    several = [[*point.losses.values()] for point in points if len(point.losses) > 1]
    freedom = sum(len(own) - 1 for own in several)
    variance = sum((len(own) - 1) * statistics.variance(own) for own in several) / freedom
    yield f"Seeds differ by {difference_text(math.sqrt(variance))} in loss (standard deviation)"


def _compared(points: Sequence[LossDifference], sizes: Sequence[int]) -> str:
    """One curve against the first, batch sizes of one verdict together."""
    if not points:
        return "has no batch size in common with it"
    if all(one.p is None for one in points):
        low, high = min(_values(points)), max(_values(points))
        return f"ends {_span(low, high)} above it (no interval)"
    told = []
    for verdict in ("higher", "lower"):
        some = [one for one in points if one.verdict == verdict]
        if some:
            found = sorted(abs(one.difference.value) for one in some)
            where = at_sizes([one.batch_size for one in some], sizes)
            told.append(f"ends {_span(found[0], found[-1])} {verdict} {where}")
    alike = [one for one in points if one.verdict == "not told apart"]
    if alike:
        last = alike[-1]
        where = at_sizes([one.batch_size for one in alike], sizes).replace("every", "any")
        found_last = last.difference
        text = with_ends(found_last, difference_text(found_last.value), of_loss=False)
        told.append(f"is not told apart from it {where} ({text} at {last.batch_size:,})")
    return in_a_row(told)


def _values(points: Sequence[LossDifference]) -> list[float]:
    return [one.difference.value for one in points]


def _span(low: float, high: float) -> str:
    first, last = difference_text(low), difference_text(high)
    return first if first == last else f"{first} to {last}"


def _at(study: BudgetStudy, name: str, size: int) -> str:
    mean = study.mean(name, size)
    assert mean is not None
    return f"{with_ends(mean.loss, loss_text(mean.loss.value), of_loss=True)} at batch {size:,}"


def _rate(point: LossPoint) -> str:
    return f"{point.lr:.3g} at {point.batch_size:,}"


def _places(points: Sequence[LossPoint]) -> str:
    by_curve: dict[str, list[str]] = {}
    for point in points:
        at = f"{point.batch_size:,} ({point.budget:,} samples)"
        by_curve.setdefault(point.curve, []).append(at)
    return "; ".join(f"{name} at {in_a_row(places)}" for name, places in by_curve.items())
