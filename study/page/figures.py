"""Steps to target against batch size, and the same as a ratio to the curve of fewest steps.

As matplotlib figures that touch no global state. Bars are 95% intervals; bands hold at all batch
sizes at once.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from largebatch.common.figures import GREY, GRID, INK
from largebatch.study.floor import Floor
from largebatch.study.labels import label
from largebatch.study.page.answers import is_placed
from largebatch.study.page.axes import (
    WIDE,
    LineEnd,
    Picture,
    curve_handles,
    handle,
    name_ends,
    new_panels,
    room_for,
    set_batch_axis,
    set_grid,
    set_log_axis,
)
from largebatch.study.page.references import Reference
from largebatch.study.page.styles import Style
from largebatch.study.page.words import interval, seeds_in_words, three_digits, times, with_interval
from largebatch.study.points import StudyPoint
from largebatch.study.section_study import SectionStudy, Study
from largebatch.study.statistics.intervals import CurveEstimates, Estimate

MISSED_ROW: Final = 0.06  # of the panel's height, for each curve that missed somewhere
Styles = Mapping[str, Style]
_FLOOR: Final[dict[str, Any]] = {"linestyle": ":", "marker": "x"}
_REFERENCE_LINES: Final[tuple[dict[str, Any], ...]] = tuple(
    {"linestyle": (0, dashes), "marker": marker, "markersize": 3.5, "linewidth": 1.0}
    for dashes, marker in (((4, 1.5), "1"), ((1, 1), "2"), ((5, 1, 1, 1), "3"), ((2, 2), "4"),
                           ((6, 2, 2, 2), "+"), ((3, 1, 1, 1), "x"), ((8, 2), "|"))
)  # fmt: skip


def steps_figure(
    study: Study, section: SectionStudy, styles: Styles, width: float,
    published: Sequence[Reference] = (),
) -> Picture:  # fmt: skip
    """Steps to target against batch size; a panel below has every critical batch size."""
    fitted = [name for name in section.names if section.estimates[name].b_crit is not None]
    drawn = [name for name in section.names if _reached(section, name)]
    room = room_for(drawn, width) if drawn == section.names else 0.0
    handles = [] if room else curve_handles(styles, section.names)
    if any(point.missed for point in section.all_points):
        handles.append(handle("o", "target missed", markersize=6, markerfacecolor="white"))
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="perfect scaling"))
    if fitted:
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="fit"))
        handles.append(handle("|", "its B_crit", markersize=11, markeredgewidth=2.0))
    if section.floor is not None:
        handles.append(
            Line2D([], [], color=INK, label=label(section.floor.name), markersize=5.5, **_FLOOR)
        )
    moved = published if section.names[0] in fitted else ()
    for reference, line in zip(moved, cycle(_REFERENCE_LINES), strict=False):
        handles.append(Line2D([], [], color=GREY, label=reference.name, **line))
    heights = [3.6 if width >= WIDE else 2.9, *([0.2 + 0.2 * len(fitted)] if fitted else [])]
    picture, panels = new_panels(
        width, heights, 1, handles, gaps=(0.0, 0.15), room=room, sharex=True
    )
    curve, below = panels[0], (panels[1] if fitted else None)
    _set_limits(curve, section, width)
    _draw_guide(curve, section)
    for name in section.names:
        _draw_steps(picture, curve, study, section, name, styles[name])
        if name in fitted:
            _draw_fit(curve, section, name, styles[name])
    if section.floor is not None:
        _draw_floor(picture, curve, section.floor)
    _draw_missed(curve, section, styles)
    for reference, line in zip(moved, cycle(_REFERENCE_LINES), strict=False):
        _draw_reference(curve, section.estimates[section.names[0]], reference, line)
    if room:
        name_ends(curve, [_end(curve, section, name, styles[name].colour) for name in drawn])
    curve.set_ylabel("Steps to target")
    if below is not None:
        _draw_critical(below, section, fitted, styles, width)
    (curve if below is None else below).set_xlabel("Global batch size (samples)")
    return picture


def ratio_figure(study: Study, section: SectionStudy, styles: Styles, width: float) -> Picture:
    """Steps over those of the first curve, with the band that holds at all batch sizes at once."""
    first, *others = section.names
    shown = [name for name in others if (pair := section.pair(name, first)) and pair.points]
    one = f"{first} = 1"
    room = room_for([one, *shown], width)
    handles = [] if room else [Line2D([], [], color=styles[first].colour, label=label(one))]
    handles += [] if room else curve_handles(styles, shown)
    if section.has_intervals:
        handles.append(handle("o", "not told apart", markersize=5.5, markerfacecolor="white"))
    picture, [axes] = new_panels(width, [2.8 if width >= WIDE else 2.5], 1, handles, room=room)
    set_batch_axis(axes, section.batch_sizes, 9 if width >= WIDE else 5)
    values = [1.0]
    ends = [LineEnd(one, axes.get_xlim()[1], 1.0, styles[first].colour)]
    for name in shown:
        pair = section.pair(name, first)
        assert pair is not None
        x = [point.batch_size for point in pair.points]
        y = [point.ratio.value for point in pair.points]
        style = styles[name]
        values += y
        ends.append(LineEnd(name, x[-1], y[-1], style.colour))
        bands = [(p.batch_size, p.band.low, p.band.high) for p in pair.points if p.band.low]
        if bands:
            sizes, low, high = zip(*bands, strict=True)
            axes.fill_between(sizes, low, high, color=style.colour, alpha=0.14, linewidth=0)
            values += [*low, *high]
        axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.4, zorder=3)
        for told in (True, False):
            some = [p for p in pair.points if (p.verdict == "not told apart") != told]
            (line,) = axes.plot(
                [p.batch_size for p in some], [p.ratio.value for p in some], linestyle="none",
                color=style.colour, marker=style.marker, markersize=5.5, zorder=4,
                markerfacecolor=style.colour if told else "white",
            )  # fmt: skip
            picture.tell(
                line,
                [
                    f"{name} over {first} at batch {p.batch_size:,}: {times(p.ratio.value)}"
                    + _span(p.ratio)
                    + (f", {p.verdict}" if p.p is not None else ", one seed")
                    for p in some
                ],
            )
    axes.axhline(1.0, color=styles[first].colour, linewidth=1.4, zorder=2)
    set_log_axis(axes.yaxis, max(min(values) / 1.08, 0.1), min(max(values) * 1.08, 20.0), 7)
    set_grid(axes)
    if room:
        name_ends(axes, ends)
    axes.set(xlabel="Global batch size (samples)", ylabel=f"Steps, times those of {label(first)}")
    return picture


def _span(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({times(estimate.low)} to {times(estimate.high)})"


def _reached(section: SectionStudy, name: str) -> list[tuple[int, float]]:
    """Batch sizes of a curve that have steps, with these."""
    return [
        (point.batch_size, estimate.value)
        for point in section.points[name]
        if (estimate := section.steps(name, point.batch_size)) is not None
    ]


def _end(axes: Axes, section: SectionStudy, name: str, colour: str) -> LineEnd:
    """Where the last of a curve's lines ends: its fit's, or its own."""
    *_, (size, steps) = _reached(section, name)
    right = axes.get_xlim()[1]
    curve = section.estimates[name]
    if curve.b_crit is None:
        return LineEnd(name, size, steps, colour)
    return LineEnd(name, right, model_steps(curve, [right])[0], colour)


def _set_limits(axes: Axes, section: SectionStudy, width: float) -> None:
    known = [
        value
        for point in section.all_points
        if (estimate := section.steps(point.curve, point.batch_size)) is not None
        for value in (estimate.value, estimate.low, estimate.high)
        if value is not None
    ]
    if section.floor is not None:
        known += [end for _, *ends in _bars(section.floor) for end in ends]
    bottom, top = min(known, default=10.0) / 1.3, max(known, default=100.0) * 1.3
    rows = sum(any(point.missed for point in own) for own in section.points.values())
    if rows:  # make room above the curves, so that a miss cannot be read as a step count
        top = bottom * (top / bottom) ** (1 / (1 - MISSED_ROW * (rows + 0.5)))
    set_log_axis(axes.yaxis, bottom, top)
    set_batch_axis(axes, section.batch_sizes, 9 if width >= WIDE else 5)
    set_grid(axes)


def _draw_guide(axes: Axes, section: SectionStudy) -> None:
    """Perfect scaling, twice the batch and half the steps, from the first curve's first point."""
    first = next((p for p in section.all_points if p.samples is not None), None)
    if first is not None and first.samples is not None:
        batches = np.array(axes.get_xlim())
        line = first.samples / batches
        axes.plot(batches, line, color=GREY, linestyle="--", linewidth=1.0, zorder=1)


def _draw_steps(
    picture: Picture, axes: Axes, study: Study, section: SectionStudy, name: str, style: Style
) -> None:
    found = [
        (point, estimate)
        for point in section.points[name]
        if (estimate := section.steps(name, point.batch_size)) is not None
    ]
    if not found:
        return
    x = [point.batch_size for point, _ in found]
    (line,) = axes.plot(
        x, [estimate.value for _, estimate in found], color=style.colour, marker=style.marker,
        linestyle=style.line, linewidth=1.6, markersize=5.5, zorder=3,
    )  # fmt: skip
    picture.tell(line, [point_tip(study, point, estimate) for point, estimate in found])
    bars = [
        (point.batch_size, e.value, e.value - e.low, e.high - e.value)
        for point, e in found
        if e.low is not None and e.high is not None
    ]
    if bars:
        sizes, steps, below, above = zip(*bars, strict=True)
        axes.errorbar(
            sizes, steps, yerr=[below, above], fmt="none", color=style.colour, elinewidth=1.1,
            capsize=3.0, zorder=3,
        )  # fmt: skip


def _draw_floor(picture: Picture, axes: Axes, floor: Floor) -> None:
    """The line of a method that is none of the curves."""
    bars = _bars(floor)
    sizes, steps = [size for size, *_ in bars], [value for _, value, *_ in bars]
    (line,) = axes.plot(sizes, steps, color=INK, linewidth=1.2, markersize=5.5, zorder=3, **_FLOOR)
    picture.tell(
        line,
        [
            f"{floor.name}, batch {point.batch_size:,}: {with_interval(point.steps)} steps"
            for point in floor.points
        ],
    )
    reach = [
        [value - low for _, value, low, _ in bars],
        [high - value for _, value, _, high in bars],
    ]
    axes.errorbar(
        sizes, steps, yerr=reach, fmt="none", color=INK, elinewidth=0.9, capsize=3.0, zorder=3
    )


def _bars(floor: Floor) -> list[tuple[int, float, float, float]]:
    """Of each point its batch size, its steps and their interval, of no width for one seed."""
    return [
        (point.batch_size, e.value, e.value if e.low is None else e.low,
         e.value if e.high is None else e.high)
        for point in floor.points
        if (e := point.steps) is not None
    ]  # fmt: skip


def point_tip(study: Study, point: StudyPoint, steps: Estimate) -> str:
    """What a point is: its steps, its rate, its runs."""
    found = interval(steps)
    tuned = "".join(f", {name} {value:g}" for name, value in point.tuned.items())
    first = study.short(point.runs[0].folder)
    others = f" and {len(point.runs) - 1} more" * (len(point.runs) > 1)
    return (
        f"{point.curve}, batch {point.batch_size:,}: {three_digits(steps.value)} steps"
        + f" ({found})" * bool(found)
        + f", rate {point.lr:.3g}{tuned}, {seeds_in_words(sorted(point.steps_by_seed))}; "
        + f"{first}{others}"
    )


def model_steps(curve: CurveEstimates, batches: Sequence[float]) -> list[float]:
    """The steps of the fit that is printed."""
    assert curve.s_min is not None
    assert curve.e_min is not None
    n = 1.0 if curve.shape_is_one or curve.shape is None else curve.shape.value
    return [
        float((curve.s_min.value**n + (curve.e_min.value / batch) ** n) ** (1 / n))
        for batch in batches
    ]


def _draw_fit(axes: Axes, section: SectionStudy, name: str, style: Style) -> None:
    curve = section.estimates[name]
    batches = np.geomspace(*axes.get_xlim(), 120).tolist()
    axes.plot(
        batches, model_steps(curve, batches), color=style.colour, linewidth=0.9, alpha=0.7, zorder=2
    )
    b_crit = curve.b_crit
    if b_crit is not None and axes.get_xlim()[0] < b_crit.value < axes.get_xlim()[1]:
        axes.plot(
            [b_crit.value], model_steps(curve, [b_crit.value]), marker="|", color=style.colour,
            markersize=15, markeredgewidth=2.0, zorder=4,
        )  # fmt: skip


def _draw_reference(
    axes: Axes, first: CurveEstimates, reference: Reference, line: Mapping[str, Any]
) -> None:
    """A published curve, moved to the first curve's critical batch size and fewest steps."""
    assert first.b_crit is not None
    assert first.s_min is not None
    left, right = axes.get_xlim()
    within = [
        (batch * first.b_crit.value, steps * first.s_min.value)
        for batch, steps in zip(reference.batch_sizes, reference.steps, strict=True)
        if left <= batch * first.b_crit.value <= right
    ]
    axes.plot([x for x, _ in within], [y for _, y in within], color=GREY, zorder=2, **line)


def _draw_missed(axes: Axes, section: SectionStudy, styles: Styles) -> None:
    """Open markers along the top, a row a curve: none can cover another."""
    transform = axes.get_xaxis_transform()  # x in samples, y as a share of the panel's height
    missing = [name for name in section.names if any(p.missed for p in section.points[name])]
    for row, name in enumerate(missing):
        sizes = [point.batch_size for point in section.points[name] if point.missed]
        look: dict[str, Any] = {"markerfacecolor": "white", "color": styles[name].colour}
        axes.plot(
            sizes, [1 - MISSED_ROW * (row + 0.6)] * len(sizes), linestyle="none", markersize=6,
            marker=styles[name].marker, transform=transform, zorder=4, **look,
        )  # fmt: skip


def _draw_critical(
    axes: Axes, section: SectionStudy, fitted: Sequence[str], styles: Styles, width: float
) -> None:
    """A row a curve: B_crit, its interval, and its value; arrows leave the axis."""
    left, right = axes.get_xlim()

    def share(batch_size: float) -> float:
        """Where a batch size lies on the axis: 0 at the left end, 1 at the right."""
        return min(max(math.log(batch_size / left) / math.log(right / left), 0.0), 1.0)

    transform = axes.get_yaxis_transform()  # x as a share of the width, y in rows
    for row, name in enumerate(fitted):
        curve, colour = section.estimates[name], styles[name].colour
        b_crit = curve.b_crit
        assert b_crit is not None
        low, high = share(b_crit.low or b_crit.value), share(b_crit.high or b_crit.value)
        at = share(b_crit.value)
        marker = {0.0: "<", 1.0: ">"}.get(at, "|")
        axes.plot([low, high], [row, row], color=colour, linewidth=1.6, transform=transform)
        axes.plot(
            [at], [row], marker=marker, color=colour, markersize=8, clip_on=False,
            markeredgewidth=2.0 if marker == "|" else 0.0, transform=transform,
        )  # fmt: skip
        value = with_interval(b_crit) if width >= WIDE else three_digits(b_crit.value)
        text = f"{label(name)}  {value}"
        if not is_placed(section, curve):
            text = f"{label(name)}  not identified"
        to_the_right = 1 - high > low
        axes.annotate(
            text, (high if to_the_right else low, row), xycoords=transform,
            xytext=(8 if to_the_right else -8, 0), textcoords="offset points",
            ha="left" if to_the_right else "right", va="center_baseline", color=INK,
            fontsize=8.5 if width >= WIDE and len(fitted) < 9 else 8.0,
        )  # fmt: skip
    axes.set_ylim(len(fitted) - 0.4, -0.6)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylabel("B_crit", rotation=0, ha="right", va="center")
    axes.grid(True, axis="x", which="major", color=GRID, linewidth=0.6)
