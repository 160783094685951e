"""Learning rates: the best one against batch size, and steps against rate at each batch size."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from largebatch.common.figures import GREY
from largebatch.study.basins import basin_of
from largebatch.study.labels import label
from largebatch.study.page.axes import (
    WIDE,
    Picture,
    columns_of,
    curve_handles,
    handle,
    new_panels,
    set_batch_axis,
    set_grid,
    set_log_axis,
)
from largebatch.study.page.figures import Styles
from largebatch.study.page.styles import Style
from largebatch.study.page.words import three_digits
from largebatch.study.points import BasinTrial, StudyPoint
from largebatch.study.section_study import SectionStudy, Study

MOST_FACTORS: Final = 5
"""Labels on the axis of the basins' rates."""
FARTHEST: Final = 3.0
"""Times the least steps at a batch size, up to which the basins' panels reach."""


def rate_figure(study: Study, section: SectionStudy, styles: Styles, width: float) -> Picture:
    """The best peak learning rate against batch size, one panel a curve.

    Learning rates of two optimizers are not comparable, their growth is: all panels span the same
    number of decades, so a slope means the same in each.
    """
    names = section.names
    columns = columns_of(width, len(names))
    rows = math.ceil(len(names) / columns)
    handles = [
        handle("o", "best of those tried", markersize=5.5),
        handle("o", "at their edge", markersize=5.5, markerfacecolor="white"),
        Line2D([], [], color=GREY, linewidth=7, alpha=0.25, label="costs at most 10%"),
        handle("x", "first miss above", markersize=5.5),
        Line2D([], [], color=GREY, linestyle="--", label="√B"),
        Line2D([], [], color=GREY, linestyle=":", label="B"),
    ]
    each = 1.45 if width >= WIDE else 1.15
    picture, panels = new_panels(width, [each] * rows, columns, handles, gaps=(0.62, 0.55), top=0.3)
    half_span = max(_half_span(section.points[name]) for name in names)
    for index, name in enumerate(names):
        panel = panels[index]
        set_batch_axis(panel, section.batch_sizes, {1: 9, 2: 4}.get(columns, 4))
        _draw_rates(picture, panel, study, section.points[name], styles[name], half_span)
        panel.set_title(label(name), y=1.0)
        if index + columns >= len(names):
            panel.set_xlabel("Global batch size")
        if index % columns == 0:
            panel.set_ylabel("Best rate")
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    return picture


def basin_figure(study: Study, section: SectionStudy, styles: Styles, width: float) -> Picture:
    """Steps to target against learning rate, one panel a batch size.

    Rates are shown over each curve's best one, so that curves share an axis and a basin's width is
    read off it.
    """
    sizes = section.batch_sizes
    columns = columns_of(width, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    handles = [
        *curve_handles(styles, section.names),
        handle("o", "other seeds", markersize=3.0),
        handle("x", "missed", markersize=5.5),
        handle("^", "cut: needs more", markersize=5.0, markerfacecolor="white"),
    ]
    each = 1.45 if width >= WIDE else 1.3
    picture, panels = new_panels(width, [each] * rows, columns, handles, top=0.3)
    factors = [
        factor
        for point in section.all_points
        for trial in point.basin
        if (factor := trial.lr / _middle(point))
    ]
    left, right = min(min(factors) / 1.15, 0.7), max(max(factors) * 1.15, 1.4)
    base = 2.0 if right / left < 2.0 ** (2 * MOST_FACTORS) else 10.0
    first, last = math.ceil(math.log(left, base)), math.floor(math.log(right, base))
    every = math.ceil((last - first + 1) / MOST_FACTORS)
    ticks = [base**power for power in range(first, last + 1) if power % every == 0]
    for index, size in enumerate(sizes):
        panel = panels[index]
        points = [point for point in section.all_points if point.batch_size == size]
        set_log_axis(panel.xaxis, left, right, 3)
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(FuncFormatter(_factor))
        _draw_basins(picture, panel, study, points, styles)
        panel.set_title(f"batch {size:,}", y=1.0)
        panel.tick_params(labelbottom=index + columns >= len(sizes))
        if index + columns >= len(sizes):
            panel.set_xlabel("Rate, times the best" if width >= WIDE else "Rate / best")
        if index % columns == 0:
            panel.set_ylabel("Steps to target")
    for panel in panels[len(sizes) :]:
        panel.set_axis_off()
    return picture


def _middle(point: StudyPoint) -> float:
    """What the rates tried around a point are shown over: the best, or their middle."""
    rates = [trial.lr for trial in point.basin]
    return point.lr or math.sqrt(min(rates)) * math.sqrt(max(rates))


def _factor(value: float, _: object = None) -> str:
    """A factor as what is multiplied, or divided by: 1/4, 1, 4, 1e6."""
    shown = f"{max(value, 1 / value):g}".replace("e+0", "e")
    return f"1/{shown}" if value < 1 else shown


def _draw_rates(
    picture: Picture, axes: Axes, study: Study, points: Sequence[StudyPoint], style: Style,
    half_span: float,
) -> None:  # fmt: skip
    found = [(point, point.lr) for point in points if point.lr is not None and not point.missed]
    if not found:
        axes.text(0.5, 0.5, "missed at\nevery rate", transform=axes.transAxes, ha="center")
        set_log_axis(axes.yaxis, 0.1, 1.0, 4)
        return
    rates = [lr for _, lr in found]
    middle = math.sqrt(min(rates)) * math.sqrt(max(rates))
    set_log_axis(axes.yaxis, middle / half_span, middle * half_span, 6)
    set_grid(axes)
    batches = [point.batch_size for point, _ in found]
    ends = np.array([batches[0], batches[-1] * 1.01])
    for power, linestyle in ((0.5, "--"), (1.0, ":")):
        guide = rates[0] * (ends / batches[0]) ** power
        axes.plot(ends, guide, color=GREY, linestyle=linestyle, linewidth=1.1, zorder=1)
    basins = [(point, basin) for point, _ in found if (basin := basin_of(point)) is not None]
    at = [point.batch_size for point, _ in basins]
    low, high = [basin.low for _, basin in basins], [basin.high for _, basin in basins]
    axes.fill_between(at, low, high, color=style.colour, alpha=0.2, linewidth=0, zorder=1)
    axes.vlines(at, low, high, color=style.colour, alpha=0.35, linewidth=2.0, zorder=1)
    missed = [(p.batch_size, b.first_miss) for p, b in basins if b.first_miss is not None]
    axes.plot(
        [size for size, _ in missed], [rate for _, rate in missed], linestyle="none", marker="x",
        markersize=5.0, color=style.colour, zorder=3,
    )  # fmt: skip
    axes.plot(batches, rates, color=style.colour, linestyle=style.line, linewidth=1.5, zorder=2)
    for edge in (False, True):
        some = [(point, lr) for point, lr in found if point.at_edge == edge]
        (line,) = axes.plot(
            [point.batch_size for point, _ in some], [lr for _, lr in some], linestyle="none",
            marker=style.marker, markersize=5.5, zorder=4, color=style.colour,
            markerfacecolor="white" if edge else style.colour,
        )  # fmt: skip
        picture.tell(
            line,
            [
                f"{point.curve}, batch {point.batch_size:,}: rate {lr:.3g}; "
                f"{study.short(point.runs[0].folder)}"
                for point, lr in some
            ],
        )


def _half_span(points: Sequence[StudyPoint]) -> float:
    """The factor from the middle of a curve's learning rates to the edge of its panel."""
    rates = [point.lr for point in points if point.lr is not None and not point.missed]
    growth = max(rates, default=1.0) / min(rates, default=1.0)
    return max(1.7 * math.sqrt(growth), 2.5)


def _draw_basins(
    picture: Picture, axes: Axes, study: Study, points: Sequence[StudyPoint], styles: Styles
) -> None:
    trials = [trial for point in points for trial in point.basin]
    steps = [trial.steps for trial in trials if trial.steps is not None]
    bounds = [float(trial.num_steps) for trial in trials if trial.outcome == "cut"]
    least = min(steps, default=min((bound for bound in bounds if bound > 0), default=10.0))
    most = min(max([*steps, *bounds], default=least), FARTHEST * max(steps, default=least))
    bottom, top = least / 1.15, max(most, least * 1.3) * 1.15
    set_log_axis(axes.yaxis, bottom, top * (top / bottom) ** 0.12, 5)
    set_grid(axes)
    for point in points:
        style = styles[point.curve]
        counts = {trial.seed: 0 for trial in point.basin}
        for trial in point.basin:
            counts[trial.seed] += 1
        first = max(counts, key=lambda seed: (counts[seed], -seed))
        groups: list[tuple[list[BasinTrial], dict[str, Any]]] = [
            (
                [t for t in point.basin if t.steps is not None and t.seed == first],
                {"marker": style.marker, "markersize": 4.5, "linestyle": style.line},
            ),
            (
                [t for t in point.basin if t.steps is not None and t.seed != first],
                {"marker": style.marker, "markersize": 2.5, "linestyle": "none", "alpha": 0.7},
            ),
            (
                [t for t in point.basin if t.outcome == "cut"],
                {"marker": "^", "markersize": 4.5, "linestyle": "none", "markerfacecolor": "white"},
            ),
        ]
        for some, look in groups:
            heights = [t.num_steps if t.steps is None else t.steps for t in some]
            kept = [(t, h) for t, h in zip(some, heights, strict=True) if bottom <= h <= top]
            if kept:
                _draw(picture, axes, study, point, kept, style, look)
        missed = [t for t in point.basin if t.outcome in ("missed", "diverged")]
        if missed:
            (line,) = axes.plot(
                [t.lr / _middle(point) for t in missed], [0.95] * len(missed), linestyle="none",
                marker="x", markersize=5.0, color=style.colour,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            picture.tell(line, [trial_tip(study, point, t) for t in missed])


def _draw(
    picture: Picture, axes: Axes, study: Study, point: StudyPoint,
    trials: Sequence[tuple[BasinTrial, float]], style: Style, look: dict[str, Any],
) -> None:  # fmt: skip
    (line,) = axes.plot(
        [t.lr / _middle(point) for t, _ in trials], [height for _, height in trials],
        color=style.colour, linewidth=1.2, zorder=3, **look,
    )  # fmt: skip
    picture.tell(line, [trial_tip(study, point, trial) for trial, _ in trials])


def trial_tip(study: Study, point: StudyPoint, trial: BasinTrial) -> str:
    """What a run was and what became of it."""
    told = {
        "reached": f"{three_digits(trial.steps or 0)} steps",
        "cut": f"cut after {trial.num_steps:,} steps",
    }.get(trial.outcome, trial.outcome)
    return (
        f"{point.curve}, batch {point.batch_size:,}, rate {trial.lr:.3g}, seed {trial.seed}: "
        f"{told}; {study.short(trial.folder)}"
    )
