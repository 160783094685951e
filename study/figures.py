"""The two pictures of a study, as matplotlib figures that touch no global state.

Steps to target against batch size, with the fitted curves and their critical batch sizes; and the
best learning rate against batch size, beside what the linear and the square-root rule would say.
Each optimizer keeps its colour and its marker in both, and no fact is shown by colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from largebatch.common.figures import COLOURS, GREY, GRID, INK, TITLE_SIZE, paper_style
from largebatch.study.fit import CurveFit
from largebatch.study.labels import label
from largebatch.study.points import StudyPoint

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MISSED_ROW = 0.06  # of the panel's height, a row an optimizer that missed somewhere
MOST_LABELLED_TICKS = 6
MOST_IN_CORNER = 5  # optimizers in the legend before it has to leave the panel


@dataclass(frozen=True)
class Style:
    """The look of one optimizer, the same in every figure of a study."""

    colour: str
    marker: str


def optimizer_styles(points: Sequence[StudyPoint]) -> dict[str, Style]:
    """A colour and a marker an optimizer, by alphabetical order."""
    return {
        name: Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        for index, name in enumerate(sorted({point.optimizer for point in points}))
    }


def curve_figure(
    points: Sequence[StudyPoint], fits: Mapping[str, CurveFit | None], title: str
) -> Figure:
    """Steps to target against batch size; a panel below names every critical batch size."""
    styles = optimizer_styles(points)
    fitted = {name: fit for name in styles if (fit := fits.get(name)) is not None}
    with paper_style():
        figure = Figure(figsize=(7.0, 5.0 + (0.35 + 0.17 * len(fitted) if fitted else 0)))
        figure.set_layout_engine("constrained")
        curve, rows = _panels(figure, len(fitted))
        _set_limits(curve, points)
        _draw_guide(curve, points)
        for name, style in styles.items():
            _draw_curve(curve, [p for p in points if p.optimizer == name], style)
            if name in fitted:
                _draw_fit(curve, points, fitted[name], style)
        _draw_missed(curve, points, styles)
        _legend_of_curve(curve, points, styles, bool(fitted))
        curve.set(title=label(title), ylabel="Steps to target")
        if rows is not None:
            _draw_critical(rows, fitted, styles)
        (rows or curve).set_xlabel("Global batch size (samples)")
    return figure


def learning_rate_figure(points: Sequence[StudyPoint], title: str) -> Figure:
    """Best peak learning rate against batch size, one panel an optimizer.

    Learning rates of two optimizers are not comparable, their growth is: all panels span the same
    number of decades, so a slope means the same in each.
    """
    styles = optimizer_styles(points)
    columns = len(styles) if len(styles) <= 3 else math.ceil(math.sqrt(len(styles)))
    rows = math.ceil(len(styles) / columns)
    with paper_style():
        figure = Figure(figsize=(7.0, 1.2 + 2.2 * rows + (0.4 if rows == 1 else 0)))
        figure.set_layout_engine("constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        half_span = max(_half_span(points, name) for name in styles)
        for index, (name, style) in enumerate(styles.items()):
            panel, own = panels[index], [p for p in points if p.optimizer == name]
            _draw_learning_rates(panel, name, own, style, half_span)
            _set_batch_axis(panel, points, most_labels=MOST_LABELLED_TICKS + 1 - columns)
            if index + columns >= len(styles):
                panel.set_xlabel("Global batch size")
            if index % columns == 0:
                panel.set_ylabel("Best peak learning rate")
        for panel in panels[len(styles) :]:
            panel.set_axis_off()
        figure.align_ylabels(list(panels[: len(styles)]))
        figure.legend(handles=_rate_handles(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(label(title), fontsize=TITLE_SIZE)
    return figure


def _panels(figure: Figure, num_fits: int) -> tuple[Axes, Axes | None]:
    if not num_fits:
        return figure.subplots(), None
    ratios = [4.2, 0.35 + 0.17 * num_fits]
    curve, rows = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    return curve, rows


def _set_limits(axes: Axes, points: Sequence[StudyPoint]) -> None:
    steps = [s for p in points for s in (p.steps, p.steps_low, p.steps_high) if s and s < math.inf]
    bottom, top = min(steps, default=10.0) / 1.9, max(steps, default=100.0) * 1.5
    rows = len({p.optimizer for p in points if p.missed})
    if rows:  # make room above the curves, so that a miss cannot be read as a step count
        top = bottom * (top / bottom) ** (1 / (1 - MISSED_ROW * (rows + 0.5)))
    axes.set(xscale="log", yscale="log", ylim=(bottom, top))
    _set_batch_axis(axes, points)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color=GRID, linewidth=0.6)


def _draw_guide(axes: Axes, points: Sequence[StudyPoint]) -> None:
    """Perfect scaling, twice the batch and half the steps, from the first curve's first point."""
    first = next((p for p in points if p.steps is not None), None)
    if first is None or first.steps is None:
        return
    samples = first.steps * first.batch_size
    batches = np.array(axes.get_xlim())
    axes.plot(batches, samples / batches, color=GREY, linestyle="--", linewidth=1.0, zorder=1)


def _draw_curve(axes: Axes, points: Sequence[StudyPoint], style: Style) -> None:
    reached = [p for p in points if p.steps is not None]
    steps = np.array([p.steps for p in reached], dtype=np.float64)
    x = [p.batch_size for p in reached]
    look: dict[str, Any] = {"color": style.colour, "marker": style.marker}
    axes.plot(x, steps, linewidth=1.6, markersize=5.5, zorder=3, **look)
    if any(p.seeds > 1 for p in reached):
        beyond = 10 * axes.get_ylim()[1]  # a seed that missed: the bar leaves the picture
        low = steps - [p.steps_low for p in reached]
        high = [min(p.steps_high, beyond) for p in reached] - steps
        axes.errorbar(
            x, steps, yerr=[low, high], fmt="none", ecolor=style.colour, elinewidth=1.0, capsize=2.5
        )


def _draw_fit(axes: Axes, points: Sequence[StudyPoint], fit: CurveFit, style: Style) -> None:
    batches = np.geomspace(*axes.get_xlim(), 200)
    steps = fit.s_min + fit.e_min / batches
    axes.plot(batches, steps, color=style.colour, linewidth=0.8, alpha=0.65, zorder=2)
    if axes.get_xlim()[0] < fit.b_crit < axes.get_xlim()[1]:
        axes.plot(
            [fit.b_crit],
            [2 * fit.s_min],
            marker="|",
            color=style.colour,
            markersize=15,
            markeredgewidth=2.0,
            zorder=4,
        )


def _draw_missed(axes: Axes, points: Sequence[StudyPoint], styles: Mapping[str, Style]) -> None:
    """Open markers with an arrow along the top, a row an optimizer: none can cover another."""
    names = sorted({p.optimizer for p in points if p.missed})
    transform = axes.get_xaxis_transform()  # x in samples, y as a share of the panel's height
    for row, name in enumerate(names):
        height = 1 - MISSED_ROW * (row + 0.75)
        for batch_size in (p.batch_size for p in points if p.missed and p.optimizer == name):
            axes.annotate(
                "",
                (batch_size, height + 0.65 * MISSED_ROW),
                xytext=(batch_size, height),
                xycoords=transform,
                arrowprops={"arrowstyle": "->", "color": styles[name].colour, "shrinkB": 0},
            )
            look: dict[str, Any] = {
                "markerfacecolor": "white",
                "markeredgecolor": styles[name].colour,
            }
            look["marker"] = styles[name].marker
            axes.plot([batch_size], [height], markersize=6, transform=transform, zorder=4, **look)


def _legend_of_curve(
    axes: Axes, points: Sequence[StudyPoint], styles: Mapping[str, Style], fitted: bool
) -> None:
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, markersize=5.5, label=label(name))
        for name, style in styles.items()
    ]
    if any(p.missed for p in points):
        handles.append(_handle("o", "target missed", markersize=6, markerfacecolor="white"))
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="perfect scaling"))
    if fitted:
        fit = r"fit $S_\mathrm{min} + E_\mathrm{min}/B$"
        critical = r"its $B_\mathrm{crit}$"
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=fit))
        handles.append(_handle("|", critical, markersize=11, markeredgewidth=2.0))
    if len(styles) > MOST_IN_CORNER:
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    else:  # the steps fall with the batch, so the lower left corner is the one that is free
        axes.legend(handles=handles, loc="lower left", framealpha=0.9, edgecolor="none")


def _draw_critical(axes: Axes, fits: Mapping[str, CurveFit], styles: Mapping[str, Style]) -> None:
    """A row an optimizer: B_crit, its leave-one-out range, and its value; arrows leave the axis."""
    left, right = axes.get_xlim()

    def share(batch_size: float) -> float:
        """Where a batch size lies on the axis: 0 at the left end, 1 at the right."""
        return min(max(math.log(batch_size / left) / math.log(right / left), 0.0), 1.0)

    transform = axes.get_yaxis_transform()  # x as a share of the width, y in rows
    for row, (name, fit) in enumerate(fits.items()):
        colour = styles[name].colour
        low, high = map(share, fit.b_crit_range or (fit.b_crit, fit.b_crit))
        at = share(fit.b_crit)
        marker = {0.0: "<", 1.0: ">"}.get(at, "|")
        axes.plot([low, high], [row, row], color=colour, linewidth=1.4, transform=transform)
        axes.plot(
            [at],
            [row],
            marker=marker,
            color=colour,
            markersize=8,
            markeredgewidth=2.0 if marker == "|" else 0.0,
            transform=transform,
            clip_on=False,
        )
        value = {"<": "below the batches tried", ">": "above the batches tried"}.get(
            marker, _round(fit.b_crit) + ("" if fit.identified else "  (not identified)")
        )
        to_the_right = high < 0.6 or low < 1 - high
        axes.annotate(
            f"{label(name)}  {value}",
            (high if to_the_right else low, row),
            xycoords=transform,
            xytext=(8 if to_the_right else -8, 0),
            textcoords="offset points",
            ha="left" if to_the_right else "right",
            va="center_baseline",
            color=INK,
            fontsize=8.5,
        )
    axes.set_ylim(len(fits) - 0.4, -0.6)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylabel(r"$B_\mathrm{crit}$", rotation=0, ha="right", va="center")
    axes.grid(True, axis="x", which="major", color=GRID, linewidth=0.6)


def _draw_learning_rates(
    axes: Axes, name: str, points: Sequence[StudyPoint], style: Style, half_span: float
) -> None:
    found = [(p.batch_size, p.lr, p.at_edge) for p in points if p.lr is not None]
    axes.set(xscale="log", yscale="log", title=label(name))
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    if not found:
        axes.text(0.5, 0.5, "target missed at every rate", transform=axes.transAxes, ha="center")
        return
    batches = [batch for batch, _, _ in found]
    rates = [lr for _, lr, _ in found]
    middle = math.sqrt(min(rates)) * math.sqrt(max(rates))
    axes.set_ylim(middle / half_span, middle * half_span)
    ends = np.array([batches[0], batches[-1] * 1.01])
    for power, linestyle in ((0.5, "--"), (1.0, ":")):
        guide = rates[0] * (ends / batches[0]) ** power
        axes.plot(ends, guide, color=GREY, linestyle=linestyle, linewidth=1.1, zorder=1)
    axes.plot(batches, rates, color=style.colour, linewidth=1.5, zorder=2)
    for batch, lr, at_edge in found:
        face = "white" if at_edge else style.colour
        look: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": style.colour}
        axes.plot([batch], [lr], marker=style.marker, markersize=5.5, zorder=3, **look)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _half_span(points: Sequence[StudyPoint], name: str) -> float:
    """The factor from the middle of an optimizer's learning rates to the edge of its panel."""
    rates = [p.lr for p in points if p.optimizer == name and p.lr is not None]
    growth = max(rates, default=1.0) / min(rates, default=1.0)
    return max(1.5 * math.sqrt(growth), 2.5)


def _rate_handles() -> list[Line2D]:
    return [
        _handle("o", "best of the rates tried", markersize=5.5),
        _handle("o", "at the edge of the rates tried", markersize=5.5, markerfacecolor="white"),
        Line2D([], [], color=GREY, linestyle="--", label=r"$\propto \sqrt{B}$"),
        Line2D([], [], color=GREY, linestyle=":", label=r"$\propto B$"),
    ]


def _handle(marker: str, label: str, **look: Any) -> Line2D:
    return Line2D([], [], linestyle="none", color=GREY, marker=marker, label=label, **look)


def _set_batch_axis(
    axes: Axes, points: Sequence[StudyPoint], most_labels: int = MOST_LABELLED_TICKS
) -> None:
    """Powers of two as plain numbers: every one where they fit, else every second, third, …"""
    batches = [p.batch_size for p in points]
    first, last = round(math.log2(min(batches))), round(math.log2(max(batches)))
    every = max(1, math.ceil((last - first + 1) / most_labels))
    axes.set_xlim(min(batches) / 1.35, max(batches) * 1.35)
    axes.xaxis.set_major_locator(
        FixedLocator([2.0**power for power in range(first, last + 1, every)])
    )
    axes.xaxis.set_minor_locator(FixedLocator([2.0**power for power in range(first, last + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: object = None) -> str:
    """1,024 and 0.02 rather than 10³ and 2 x 10⁻²."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:.4g}"


def _round(value: float) -> str:
    """Three significant digits: what a critical batch size can carry at most."""
    return f"{float(f'{value:.3g}'):,.0f}"
